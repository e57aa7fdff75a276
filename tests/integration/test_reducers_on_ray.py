"""The same reduction over Ray, with one worker and with two: the same bits as in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.compute import ComputeClient
from orchestrator.rounds import reduce as reduce_module
from orchestrator.rounds.engine import Candidate
from protos.manifest import TILE_ELEMENTS, Manifest
from protos.plan import StrategyChoice
from tests.support.workbench import Workbench, of_spec

MANIFEST = Manifest(
    (
        of_spec("w", (3 * TILE_ELEMENTS + 77,)),
        of_spec("half", (1000,), "bfloat16"),
        of_spec("mean", (50,), kind="statistic"),
        of_spec("n", (), "int64"),
    )
)
STACK = [
    StrategyChoice(name="trimmed_mean", params={"trim": 0.34}),
    StrategyChoice(name="fedavgm", params={"momentum": 0.9, "nesterov": True}),
]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path)
    yield bench
    bench.close()


def two_rounds(bench: Workbench) -> list[Candidate]:
    """Two rounds of a stack with a robust rule and an outer optimizer, on the same contributions."""
    generator = torch.Generator().manual_seed(1)

    def drawn() -> dict[str, torch.Tensor]:
        return {
            "w": torch.randn(MANIFEST["w"].shape, generator=generator),
            "half": torch.randn(1000, generator=generator).bfloat16(),
            "mean": torch.randn(50, generator=generator),
            "n": torch.randint(100, (), generator=generator),
        }

    model, state, out = bench.put_model(MANIFEST, drawn()), "", []
    for number in (1, 2):
        rows = [
            bench.contribution(site, MANIFEST, drawn(), base=model, examples=n, round=number)
            for site, n in (("a", 3), ("b", 11), ("c", 7), ("d", 5))
        ]
        planned = bench.planned(model, STACK, round=number, outer_state=state)
        candidate = reduce_module.reduce(bench.engine, planned, bench.closed(rows))
        model, state = candidate.model.shared, candidate.outer_state
        out.append(candidate)
    return out


def test_ray_gives_the_same_digests(
    bench: Workbench, compute: ComputeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = two_rounds(bench)
    bench.engine.compute = compute
    assert two_rounds(bench) == expected  # all passes in one call
    monkeypatch.setattr(reduce_module, "RUN_BYTES", 1)
    for tasks in (1, 2, 5):
        # One task is one worker; more are given to both of them.
        monkeypatch.setattr(reduce_module, "RUNS_PER_WORKER", tasks)
        assert two_rounds(bench) == expected
