"""A transfer that is cut again and again, and whose ends are killed: nothing is sent twice for long."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from orchestrator.bench import weights
from orchestrator.bench.trial import CONSTANT
from orchestrator.federation import Federation
from tests.support.proxy import Proxy

SITE = "north"

WAIT_S = 100.0
TASKS = {
    "weights": {
        "source": f"{Path(weights.__file__)}:Weights",
        "settings": {"constant": CONSTANT},
    }
}


def tables(address: str) -> dict[str, Any]:
    return {
        "network": {"address": address},
        "tasks": TASKS,
        "site": {"device": "cpu"},
        "trainer": {"threads": 1},
    }


def config(nbytes: int) -> dict[str, Any]:
    return {
        "name": "resume",
        "rounds": 1,
        "task": {"name": "weights", "params": {"elements": nbytes // (4 * weights.TENSORS)}},
        "init": {"from": "task"},
        "cohort": {"sites": [SITE], "quorum": "all", "deadline_s": 1500},
        "local": {
            "work": {"steps": 1},
            "batch_size": 1,
            "lr": 1.0,
            "optimizer": {"name": "sgd", "momentum": 0.0},
        },
        "assess": {"every": 0},
        "strategy": [],
    }


@pytest.mark.parametrize(
    ("nbytes", "mbit_per_s", "most", "cut_every_s"),
    [
        pytest.param(60_000_000, 200, 1.25, 0, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
        pytest.param(
            1_000_000_000, 800, 1.02, 3, marks=[pytest.mark.slow, pytest.mark.timeout(1500)]
        ),
    ],
    ids=["60 MB", "1 GB"],
)
def test_interrupted_transfers_go_on_where_they_were(
    nbytes: int, mbit_per_s: float, most: float, cut_every_s: float, tmp_path: Path
) -> None:
    """The base down, the update up: each is cut, and has both its ends killed.

    Args:
        nbytes: Size of the model.
        mbit_per_s: Of the line, each way.
        most: Bytes on the wire per byte of payload. A cut may cost a chunk in part and what the
            receiver had not written yet, whatever the size of the model.
        cut_every_s: Time between further cuts; 0 for none.
    """
    part = nbytes // 6
    federation = Federation(tmp_path, sites={}, orchestrator_tasks=TASKS, dashboard=False)
    federation.configure()
    bound = tomllib.loads(federation.home.config_file.read_text())["listen"]["bind"]
    with Proxy(bound) as proxy, federation:
        proxy.up.slow(mbit_per_s)
        proxy.down.slow(mbit_per_s)
        federation.add_site(SITE, tables(proxy.address))
        run = federation.launch(config(nbytes))
        stop_cutting = proxy.cut_every(cut_every_s) if cut_every_s else lambda: None

        def site_dies() -> None:
            federation.kill(SITE)
            federation.start_site(SITE, wait=False)

        def daemon_dies() -> None:
            federation.kill_daemon()
            federation.start_daemon()

        for way, dies in (
            (proxy.down, site_dies),
            (proxy.down, daemon_dies),
            (proxy.up, site_dies),
            (proxy.up, daemon_dies),
        ):
            way.await_bytes(part, WAIT_S)
            proxy.cut()
            way.await_bytes(part, WAIT_S)
            dies()
        finished = federation.wait(run, WAIT_S)
        stop_cutting()
        assert finished.state == "finished", finished.reason
        assert proxy.up.nbytes <= most * nbytes
        assert proxy.down.nbytes <= most * nbytes
        before, after = (
            load_file(
                next(
                    path
                    for path in federation.client.export(run, number, tmp_path / number)
                    if path.suffix == ".safetensors"
                )
            )
            for number in ("0", "1")
        )
        for name, tensor in before.items():
            if name != "still":
                assert (after[name] - tensor - CONSTANT).abs().max() < 1e-6
