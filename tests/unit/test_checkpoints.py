"""A round's training that is cut off goes on to the same bits, and nothing is trained twice for long."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from protos import faults
from protos.contribution import Header
from protos.faults import Fault
from protos.plan import OptimizerChoice, Plan, Schedule, StrategyChoice, Work
from site_agent.trainer.checkpoint import BRIEF_S, Checkpoint, Checkpoints
from site_agent.trainer.exchange import Clock, Exchange
from site_agent.trainer.watch import Watch
from tests.support.disk import flip
from tests.support.sites import base_of, plan_of, workload_of

EVERY_STEP_S = 1e-9
ADAM = OptimizerChoice(name="adamw", keep_state=True)


@pytest.fixture
def switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(faults.FOLDER, str(tmp_path / "faults"))
    faults.enter("trainer")
    yield tmp_path / "faults"
    monkeypatch.delenv(faults.FOLDER)
    faults.enter("trainer")


def steps(switches: Path) -> int:
    trace = switches / faults.TRACE
    lines = (line.rsplit(" ", 1)[0] for line in trace.read_text().splitlines())
    return sum(line == "trainer train.stepped" for line in lines)


def perform(
    folder: Path,
    plan: Plan,
    name: str,
    every_s: float | None = EVERY_STEP_S,
    enough: bool = False,
    **settings: Any,
) -> tuple[Header, Path]:
    base, manifest, _ = base_of(folder, plan)
    plan = plan.model_copy(update={"manifest": manifest.digest})
    out = folder / name
    checkpoint = folder / "checkpoint.safetensors"
    finishing = threading.Event()
    if enough:
        finishing.set()
    exchange = Exchange(
        workload_of(plan, **settings),
        plan,
        Watch(1, lambda _: None, finishing=finishing),
        Clock(),
        base,
        None,
        out,
        checkpoint=checkpoint,
        checkpoint_s=every_s,
    )
    header, _ = exchange.perform()
    checkpoint.unlink(missing_ok=True)  # as the link does when it has the contribution
    return header, out


def cut_off(folder: Path, switches: Path, plan: Plan, at: str, hit: int, **more: Any) -> None:
    Fault(at, hit, do="raise", error="EIO").put(switches)
    with pytest.raises(OSError, match="Input/output"):
        perform(folder, plan, f"cut-{os.urandom(4).hex()}", **more)


def the_same(first: tuple[Header, Path], second: tuple[Header, Path]) -> None:
    for name in ("index", "metrics", "steps", "epochs", "examples"):
        assert getattr(first[0], name) == getattr(second[0], name), name
    states = [out / "state.safetensors" for _, out in (first, second)]
    assert states[0].exists() == states[1].exists()
    if states[0].exists():
        mine, theirs = map(load_file, states)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(
    "changes",
    [
        {"params": {"dropout": 0.5}},
        {"task": "Noisy", "params": {"dropout": 0.5}},
        {"task": "Streamed", "optimizer": ADAM},
        {"task": "Personal", "stack": ("int8", "self_distillation"), "round": 3},
        {"task": "Tied", "optimizer": ADAM},
        {"task": "Frozen", "stack": ("fedprox", StrategyChoice(name="top_k"))},
        {"stack": ("mixup", "count_noise"), "schedule": Schedule(lr=0.4, shape="exp", decay=0.25)},
    ],
    ids=lambda c: " ".join(map(str, c.values())) or "plain",
)
def test_training_goes_on_to_the_same_bits(
    tmp_path: Path, switches: Path, changes: dict[str, Any]
) -> None:
    plan = plan_of(**{"work": Work(epochs=2), **changes})
    undisturbed = perform(tmp_path, plan, "undisturbed")
    planned = steps(switches)
    assert planned == 10
    # In the middle of an epoch, at its end, and before its first step.
    cuts = [
        ("train.stepped", 3),
        ("train.epoch.ended", 1),
        ("train.stepped", 4),
        ("train.begun", 1),
    ]
    for at, hit in cuts:
        cut_off(tmp_path, switches, plan, at, hit)
    the_same(perform(tmp_path, plan, "resumed"), undisturbed)
    assert planned < steps(switches) - planned <= planned + len(cuts)  # at most a step of each


def test_the_ends_of_epochs_are_saved_by_default(tmp_path: Path, switches: Path) -> None:
    now = [0.0]
    keeper = Checkpoints(tmp_path / "c", "mark", None, lambda: now[0])
    now[0] = BRIEF_S / 2
    assert not keeper.due(epoch_ended=True)
    now[0] = BRIEF_S
    assert keeper.due(epoch_ended=True)
    assert not keeper.due(epoch_ended=False)
    keeper.write(Checkpoint())
    assert not keeper.due(epoch_ended=True)


def test_other_work_does_not_go_on_from_it(tmp_path: Path, switches: Path) -> None:
    plan = plan_of(work=Work(epochs=2))
    for change in ({"round": 2}, {"seed": 8}):
        cut_off(tmp_path, switches, plan, "train.stepped", 5)
        other = plan.model_copy(update=change)
        before = steps(switches)
        perform(tmp_path, other, f"other-{change}")
        assert steps(switches) - before == 10
    cut_off(tmp_path, switches, plan, "train.stepped", 5)
    before = steps(switches)
    perform(tmp_path, plan, "other-data", seed=2)  # the site's settings are others
    assert steps(switches) - before == 10
    cut_off(tmp_path, switches, plan, "train.stepped", 5)
    again = plan.model_copy(update={"attempt": 2})  # the same work
    before = steps(switches)
    perform(tmp_path, again, "again")
    assert steps(switches) - before == 6


def test_what_was_saved_is_enough_if_the_deadline_is_near(tmp_path: Path, switches: Path) -> None:
    plan = plan_of(work=Work(epochs=2))
    cut_off(tmp_path, switches, plan, "train.stepped", 5)
    before = steps(switches)
    header, _ = perform(tmp_path, plan, "partial", enough=True)
    assert steps(switches) == before
    assert (header.partial, header.steps, header.examples) == (True, 4, 16)


def torn(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rotten(file: Path) -> None:
    flip(file, file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [torn, rotten])
def test_what_is_damaged_is_not_believed(
    tmp_path: Path, switches: Path, damage: Callable[[Path], None]
) -> None:
    plan = plan_of(work=Work(epochs=2))
    undisturbed = perform(tmp_path, plan, "undisturbed")
    cut_off(tmp_path, switches, plan, "train.stepped", 5)
    damage(tmp_path / "checkpoint.safetensors")
    the_same(perform(tmp_path, plan, "anew"), undisturbed)


def test_a_full_disk_costs_the_checkpoint_and_not_the_round(tmp_path: Path, switches: Path) -> None:
    plan = plan_of(work=Work(epochs=2))
    undisturbed = perform(tmp_path, plan, "undisturbed")
    Fault("checkpoint.written", 3, do="raise").put(switches)
    the_same(perform(tmp_path, plan, "full"), undisturbed)
    assert (switches / faults.DONE).exists()
    assert not list(tmp_path.glob(".*.new"))
