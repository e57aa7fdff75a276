"""What the demo runs: the example's run file, and the runs that it is compared with."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.examples_folder import examples_folder
from protos.errors import NotFound
from strategies.row import merged

SITES = ("north", "south", "east")
ALL_DATA = "all-data"
"""The site that holds everybody's data: what the federation is there to do without."""

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")

Tables = dict[str, Any]


class Workload(NamedTuple):
    """One of the example's workloads, made ready for the demo.

    Attributes:
        title: What the images are, in words.
        task: Name of the task.
        source: Where its code is.
        run: The run file.
    """

    title: str
    task: str
    source: str
    run: Tables

    def site(self, part: int, parts: int, threads: int) -> Tables:
        """``site.toml`` of a site with one part of the images."""
        settings = {"part": part, "parts": parts}
        return {
            "tasks": {self.task: {"source": self.source, "settings": settings}},
            "site": {"device": "cpu"},
            "trainer": {"threads": threads},
        }

    @property
    def orchestrator_tasks(self) -> Tables:
        """The orchestrator has the task for the first model and its proxy images, and no part."""
        return {self.task: {"source": self.source}}


def workload(rounds: int | None) -> Workload:
    """Fashion-MNIST where it is installed, else digits; the plug-ins are on in both.

    Args:
        rounds: Instead of the example's own number.

    Raises:
        NotFound: Neither is there.
    """
    folder = examples_folder()
    fashion = _read(folder / "fashion-mnist" / "run.toml")
    more: Tables = {} if rounds is None else {"rounds": rounds}
    if FASHION_MNIST.is_file():
        params = fashion["task"]["params"]
        title = (
            f"Fashion-MNIST: {params['subset']:,} of its 60,000 training images, the same ones "
            f"each time, skewed over the sites (Dirichlet {params['alpha']:g}); "
            f"{params['proxy']:,} more, without labels, at the orchestrator; all 10,000 to test"
        )
        name, cls, run = "fashion_mnist", "FashionMnist", fashion
    else:
        if importlib.util.find_spec("sklearn") is None:
            raise NotFound(
                "there are no images: neither Fashion-MNIST (apt-get install "
                "dataset-fashion-mnist) nor scikit-learn's digits (pip install scikit-learn)"
            )
        digits = _read(folder / "digits" / "run.toml")
        skewed = {"task": {"params": {"alpha": 0.5, "proxy": 200}}}
        run = merged(digits, {**skewed, "strategy": fashion["strategy"]})
        title = (
            "scikit-learn's digits, skewed over the sites (Dirichlet 0.5); 200 more, without "
            "labels, at the orchestrator; 600 to test"
        )
        name, cls = "digits", "Digits"
    run = merged(run, {"cohort": {"sites": list(SITES), "quorum": 2}, **more})
    return Workload(title, name, f"{folder / 'images.py'}:{cls}", run)


def fedavg(run: Mapping[str, Any]) -> Tables:
    """FedAvg with one local epoch: as many rounds, hence as many bytes."""
    return _arm(run, "fedavg", SITES, 1.0, [{"name": "temperature"}])


def isolated(run: Mapping[str, Any], site: str, epochs: float) -> Tables:
    """One site by itself, with as many epochs in all."""
    return _arm(run, f"isolated-{site}", (site,), epochs, _cycles(run))


def centralised(run: Mapping[str, Any], epochs: float) -> Tables:
    """All data in one place, with as many epochs in all."""
    return _arm(run, "centralised", (ALL_DATA,), epochs, _cycles(run))


def _cycles(run: Mapping[str, Any]) -> list[Tables]:
    """The same learning-rate cycles; the epochs are given, so they do not grow."""
    stack = [entry for entry in run["strategy"] if entry["name"] in ("co_learning", "temperature")]
    return [
        {**entry, "factor": 1.0} if entry["name"] == "co_learning" else entry for entry in stack
    ]


def _arm(
    run: Mapping[str, Any], name: str, sites: tuple[str, ...], epochs: float, stack: list[Tables]
) -> Tables:
    return {
        **run,
        "name": f"{run['name']}-{name}",
        "cohort": {**run["cohort"], "sites": list(sites), "quorum": "all"},
        "local": {**run["local"], "work": {"epochs": epochs}},
        "strategy": stack,
    }


def _read(path: Path) -> Tables:
    return tomllib.loads(path.read_text(encoding="utf-8"))
