"""Work that is cut before its end, at a site."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from protos.plan import OptimizerChoice, Schedule, Work
from site_agent.trainer import watch as watch_module
from site_agent.trainer.randomness import seed_epoch, shuffled
from site_agent.trainer.site_state import SiteState
from strategies import registry
from tests.support import site_tasks
from tests.support.sites import base_of, plan_of, workload_of
from tests.support.trainer_bench import EVERY, Bench, sgd


@pytest.fixture(autouse=True)
def more_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: EVERY)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is told, so that a test may say when it has heard enough."""
    monkeypatch.setattr(watch_module, "BRIEF_S", 0.0)
    monkeypatch.setattr(watch_module, "INTERVAL_S", 0.0)


@pytest.mark.usefixtures("talkative")
def test_work_that_is_cut_is_the_steps_that_were_done(bench: Bench) -> None:
    """The bits of the same steps by hand, in the cycle of the whole work, at that part of the weight."""
    schedule = Schedule(shape="exp", lr=0.4, decay=0.25)
    plan = plan_of(work=Work(steps=10), schedule=schedule, optimizer=sgd(momentum=0.9))
    header, update, _ = bench.perform(plan, enough_at=7)
    assert (header.partial, header.steps, header.epochs) == (True, 7, 1.4)
    assert header.examples == 28  # 40 of them, 7 of 10 steps
    assert header.done("steps") == 7

    work = workload_of(plan)
    data, base = site_tasks.clouds(1, 40), {k: v.clone() for k, v in work.state().items()}
    optimizer = torch.optim.SGD(work.model.parameters(), lr=1.0, momentum=0.9)
    parts = []
    for epoch in range(2):
        seed_epoch(plan, epoch)
        parts += shuffled(plan, epoch, 40).split(8)
    for step, part in enumerate(parts[:7]):
        optimizer.param_groups[0]["lr"] = 0.4 * 0.25 ** (step / 10)
        optimizer.zero_grad()
        F.cross_entropy(work.model(data.tensors[0][part]), data.tensors[1][part]).backward()
        optimizer.step()
    for tensor in work.shared:
        if tensor.kind == "parameter":
            assert torch.equal(update[tensor.name], base[tensor.name] - work.state()[tensor.name])


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize(
    ("work", "enough_at", "steps", "examples"),
    [
        (Work(epochs=2), 0.0, 1, 4),  # said before it began: one step, and not none
        (Work(epochs=2), 1.0, 5, 20),
        (Work(epochs=0.5), 0.2, 1, 20),  # of two steps
        (Work(tokens=40), 16.0, 2, 16),
    ],
    ids=str,
)
def test_the_weight_of_partial_work_is_its_share_of_the_examples(
    bench: Bench, work: Work, enough_at: float, steps: int, examples: int
) -> None:
    header, _, _ = bench.perform(plan_of(work=work), enough_at=enough_at)
    assert (header.partial, header.steps, header.examples) == (True, steps, examples)


@pytest.mark.usefixtures("talkative")
def test_work_that_was_done_when_enough_was_said_is_whole(bench: Bench) -> None:
    header, _, _ = bench.perform(plan_of(work=Work(steps=4)), enough_at=4)
    assert (header.partial, header.steps, header.examples) == (False, 4, 40)


@pytest.mark.usefixtures("talkative")
def test_a_loop_of_the_tasks_own_is_cut_where_it_asks(bench: Bench) -> None:
    plan = plan_of(task="OwnLoop", work=Work(epochs=10))
    header, _, _ = bench.perform(plan, enough_at=3)
    assert (header.partial, header.steps, header.examples) == (True, 3, 12)


@pytest.mark.usefixtures("talkative")
def test_what_a_site_remembers_goes_on_from_partial_work(bench: Bench) -> None:
    choice = OptimizerChoice(name="sgd", momentum=0.9, keep_state=True)
    plan = plan_of(work=Work(epochs=2), optimizer=choice, stack=("test_half_precision",))
    base = base_of(bench.folder, plan)
    _, _, cut = bench.perform(plan, base=base, enough_at=0.6)
    _, _, whole = bench.perform(plan, base=base)
    states = [SiteState.read(folder) for folder in (cut, whole)]
    assert states[0].optimizer.keys() == states[1].optimizer.keys()
    assert states[0].strategies.keys() == states[1].strategies.keys()
    again = plan.model_copy(update={"round": 2})
    digests = {bench.perform(again, f, base=base)[0].index for f in (cut, whole)}
    assert len(digests) == 2  # each goes on from its own
