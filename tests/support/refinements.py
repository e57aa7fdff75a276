"""A refinement in one process: three sites with linear models, and what a plug-in is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from strategies.context import Refinement
from strategies.task import Task

SITES = ("east", "north", "south")
FEATURES, CLASSES = 4, 3


class Proxy(Task):
    """A linear model and forty unlabelled inputs."""

    input_shape = (FEATURES,)

    def model(self) -> nn.Module:
        return nn.Linear(FEATURES, CLASSES)

    def proxy_data(self) -> Dataset[Any] | None:
        generator = torch.Generator().manual_seed(7)
        return TensorDataset(torch.randn(40, FEATURES, generator=generator))


def site_state(site: str) -> dict[str, Tensor]:
    """The model of a site."""
    generator = torch.Generator().manual_seed(SITES.index(site))
    return {
        "weight": torch.randn(CLASSES, FEATURES, generator=generator),
        "bias": torch.randn(CLASSES, generator=generator),
    }


def refinement(
    task: Task | None = None,
    loaded: list[str] | None = None,
    files: dict[str, bytes] | None = None,
    payloads: Mapping[str, Tensor] | None = None,
    site_payloads: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Refinement:
    """Round 3 of a run; sites weigh 10, 20 and 70.

    Args:
        task: `Proxy` by default.
        loaded: Notes which sites' models were read.
        files: What strategies kept.
        payloads: Merged side payloads.
        site_payloads: What each site sent.
    """
    task = task or Proxy()
    model = task.model()
    average = {
        name: sum((site_state(s)[name] for s in SITES), torch.zeros(1)) / 3
        for name in ("weight", "bias")
    }
    model.load_state_dict(average, strict=False)

    def load(site: str) -> dict[str, Tensor]:
        if loaded is not None:
            loaded.append(site)
        return site_state(site)

    return Refinement(
        3, 1, task, model, dict(zip(SITES, (10.0, 20.0, 70.0), strict=True)), load,
        dict(payloads or {}), dict(site_payloads or {}), files={} if files is None else files,
    )  # fmt: skip
