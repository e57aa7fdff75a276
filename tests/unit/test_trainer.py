"""What a site computes for a plan, without processes: the loop, the update, the payload."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from protos.errors import ConfigInvalid, DataCorrupt, ManifestInvalid, TaskFailed
from protos.manifest import Manifest
from protos.plan import Schedule, Work
from protos.tensors import map_file
from site_agent.pipe import Progress
from site_agent.trainer import watch as watch_module
from site_agent.trainer.pace import Pace
from site_agent.trainer.randomness import seed_epoch, shuffled
from site_agent.trainer.watch import JobCancelled, Watch
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


# -- the loop --------------------------------------------------------------------------------------


def test_a_round_equals_plain_torch(bench: Bench) -> None:
    """The same batches, rates and steps by hand give the same update, to the bit."""
    schedule = Schedule(shape="exp", lr=0.4, decay=0.25)
    plan = plan_of(work=Work(epochs=2), schedule=schedule, optimizer=sgd(momentum=0.9))
    header, update, _ = bench.perform(plan)

    work = workload_of(plan)
    data = site_tasks.clouds(1, 40)
    model = work.model
    base = {k: v.clone() for k, v in work.state().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    step = 0
    for epoch in range(2):
        seed_epoch(plan, epoch)
        for part in shuffled(plan, epoch, 40).split(8):
            optimizer.param_groups[0]["lr"] = 0.4 * 0.25 ** (step / 10)
            optimizer.zero_grad()
            F.cross_entropy(model(data.tensors[0][part]), data.tensors[1][part]).backward()
            optimizer.step()
            step += 1
    assert header.steps == step == 10
    for name, value in work.state().items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(update[name], value.to(update[name].dtype))
        else:
            assert torch.equal(update[name], base[name] - value)


def test_the_cycle_restarts_every_round(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "BRIEF_S", 0.0)
    rates = {}
    for number in (1, 2):
        bench.told.clear()
        schedule = Schedule(shape="exp", lr=0.4, decay=0.25)
        bench.perform(plan_of(round=number, schedule=schedule))
        rates[number] = (bench.told[0].learning_rate, bench.told[-2].learning_rate)
    assert rates[1] == rates[2] == (0.4, pytest.approx(0.4 * 0.25**0.75))


@pytest.mark.parametrize(
    ("work", "steps", "epochs"),
    [
        (Work(epochs=2), 10, 2.0),
        (Work(epochs=1.5), 8, 1.6),  # 7.5 steps of 5 an epoch
        (Work(epochs=0.01), 1, 0.2),
        (Work(steps=7), 7, 1.4),
        (Work(tokens=20), 3, 0.6),
    ],
)
def test_work_in_any_unit(bench: Bench, work: Work, steps: int, epochs: float) -> None:
    header, _, _ = bench.perform(plan_of(work=work))
    assert (header.steps, header.epochs) == (steps, pytest.approx(epochs))


def test_work_in_seconds_ends() -> None:
    now = [0.0]
    pace = Pace(Work(seconds=10), Schedule(lr=1.0, shape="exp", decay=0.25), 5, lambda: now[0])
    rates = []
    while not pace.finished():
        rates.append(pace.rate())
        pace.step(0)
        now[0] += 2.5
    assert rates == pytest.approx([0.25 ** (k / 4) for k in range(4)])
    assert pace.epochs == 0.8


def test_a_rate_by_epoch_stays_within_it() -> None:
    schedule = Schedule(lr=1.0, shape="exp", decay=0.25, granularity="epoch")
    pace = Pace(Work(epochs=2), schedule, 3)
    rates = []
    while not pace.finished():
        for _ in range(3):
            rates.append(pace.rate())
            pace.step(0)
        pace.end_epoch(3)
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5])


def test_a_stream_of_unknown_length(bench: Bench) -> None:
    header, _, _ = bench.perform(plan_of(task="Streamed", work=Work(epochs=2)))
    assert (header.steps, header.epochs, header.examples) == (10, 2.0, 40)
    with pytest.raises(ConfigInvalid, match="whole epochs"):
        bench.perform(plan_of(task="Streamed", work=Work(epochs=1.5)))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(bench: Bench) -> None:
    plan = plan_of(params={"dropout": 0.5})
    base = base_of(bench.folder, plan)
    digests = [
        bench.perform(plan.model_copy(update=change), base=base)[0].index
        for change in ({}, {"attempt": 2}, {"seed": 8}, {"round": 2}, {"site": "south"})
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_warm_trainer_gives_the_bits_of_a_fresh_one(bench: Bench) -> None:
    plan = plan_of(task="Personal", params={"dropout": 0.5})
    fresh = bench.perform(plan)[0].index
    work = workload_of(plan)
    bench.perform(plan.model_copy(update={"round": 5}), work=work)
    assert bench.perform(plan, work=work)[0].index == fresh


def test_a_loss_that_is_no_number_names_its_step(bench: Bench) -> None:
    with pytest.raises(TaskFailed, match="site north: the loss became nan at step 3") as caught:
        bench.perform(plan_of(params={"trouble": "nan", "at_step": 3}))
    assert caught.value.facts["step"] == 3


def test_a_cancelled_job_stops(bench: Bench) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(JobCancelled):
        bench.perform(plan_of(), cancelled=cancelled)


def test_gradients_are_clipped(bench: Bench) -> None:
    plan = plan_of(work=Work(steps=1), gradient_clip=1e-3, optimizer=sgd())
    _, update, _ = bench.perform(plan)
    parameters = [update[t.name] for t in workload_of(plan).shared if t.kind == "parameter"]
    total = torch.cat([p.flatten() for p in parameters]).norm()
    assert float(total) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_examples_weigh_never_times_epochs(bench: Bench) -> None:
    assert bench.perform(plan_of(work=Work(epochs=3)))[0].examples == 40


def test_metrics_are_the_training_loss(bench: Bench) -> None:
    header, _, _ = bench.perform(plan_of(work=Work(epochs=4)))
    assert set(header.metrics) == {"train_loss", "train_loss_first"}
    assert set(header.seconds) == {"training", "encoding"}


# -- payload ---------------------------------------------------------------------------------------


def test_a_frozen_part_is_neither_trained_nor_sent(bench: Bench) -> None:
    plan = plan_of(task="Frozen")
    _, update, _ = bench.perform(plan)
    assert "0.weight" not in update
    assert bench.work is not None
    assert torch.equal(bench.work.state()["0.weight"], workload_of(plan).state()["0.weight"])


def test_a_frozen_part_that_differs_is_asked_for_and_loaded(bench: Bench) -> None:
    frozen = base_of(bench.folder, plan_of(task="Frozen"), "frozen")
    work = workload_of(plan_of(task="Unlike"))
    assert workload_of(plan_of(task="Frozen")).has_frozen(frozen[2].digest)
    assert work.has_frozen("")
    assert not work.has_frozen(frozen[2].digest)
    work.read_frozen(frozen[0], frozen[2].digest)
    assert work.has_frozen(frozen[2].digest)
    with pytest.raises(DataCorrupt):
        work.read_frozen(frozen[0], "0" * 64)


def test_tied_tensors_travel_once(bench: Bench) -> None:
    _, update, _ = bench.perform(plan_of(task="Tied"))
    assert set(update) == {"0.weight", "2.weight", "2.bias"}
    assert workload_of(plan_of(task="Tied")).shared["0.weight"].ties == ("1.weight",)


def test_only_the_groups_of_the_plan_are_sent(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ByGroup(EVERY["test_by_group"]):  # type: ignore[misc]
        def groups(self) -> dict[str, str]:
            return {"4.*": "head"}

    monkeypatch.setitem(EVERY, "test_by_group", ByGroup)
    plan = plan_of(stack=("test_by_group",))
    groups = {t.group for t in workload_of(plan).shared}
    assert len(groups) > 1
    for group in groups:
        _, update, _ = bench.perform(plan.model_copy(update={"groups": (group,)}))
        assert set(update) == {t.name for t in workload_of(plan).shared if t.group == group}


def test_a_codecs_blocks_stand_in_the_header(bench: Bench) -> None:
    plan = plan_of(stack=("test_half_precision",))
    header, _, out = bench.perform(plan)
    manifest = workload_of(plan).shared
    assert header.codec == "test_half_precision"
    assert len(header.blocks) == len(manifest.tiles)
    codec = EVERY["test_half_precision"]()
    _, raw, _ = bench.perform(plan_of())
    data = (out / "payload").read_bytes()
    for tile, (start, stop) in zip(manifest.tiles, header.block_spans(manifest), strict=True):
        if tile.spec.kind == "parameter":
            sent = codec.decode(data[start:stop], tile)
            exact = raw[tile.spec.name].flatten()[tile.start : tile.stop]
            assert torch.allclose(sent, exact, atol=1e-3)


def test_side_payloads_are_sent_with_their_rules(bench: Bench) -> None:
    header, tensors, _ = bench.perform(plan_of(stack=("test_four_payloads",)))
    assert {p.merge for p in header.payloads} == {
        "sum", "mean by count", "concatenate", "keep per site",
    }  # fmt: skip
    assert set(header.payload_names) <= set(tensors)


def test_a_step_may_be_owned_by_a_strategy(bench: Bench) -> None:
    header, update, _ = bench.perform(plan_of(stack=("test_two_optimizers",)))
    assert header.steps == 4
    assert float(update["0.weight"].abs().sum()) > 0


@pytest.mark.parametrize("name", ["fedprox", "self_distillation", "co_learning"])
def test_methods_run_in_the_loop(bench: Bench, name: str) -> None:
    assert bench.perform(plan_of(stack=(name,)))[0].steps == 4


def test_a_job_that_is_over_at_once_tells_nothing(bench: Bench) -> None:
    watch = Watch(1, bench.told.append)
    watch.tell(Progress(job=1, state="TRAINING"))
    assert bench.told == []
    watch = Watch(1, bench.told.append, began=time.monotonic() - watch_module.BRIEF_S)
    watch.tell(Progress(job=1, state="ENCODING"))
    assert [progress.state for progress in bench.told] == ["ENCODING"]


def test_a_strategy_that_breaks_a_tensor_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(EVERY["fedprox"]):  # type: ignore[misc]
        def encode(self, update: Any, plan: Any, state: Any) -> Any:
            update.tensors["0.weight"] = update.tensors["0.weight"][:1]
            return update, state

    monkeypatch.setitem(EVERY, "fedprox", Breaks)
    with pytest.raises(ManifestInvalid, match=r"site north: tensor 0\.weight is float32 \[1, 4\]"):
        bench.perform(plan_of(stack=("fedprox",)))


def test_a_base_of_another_model_names_the_tensor(bench: Bench) -> None:
    other = base_of(bench.folder, plan_of(params={"hidden": 9}))
    with pytest.raises(ManifestInvalid, match=r"tensor 0\.weight is float32 \[8, 4\]"):
        bench.perform(plan_of(), base=other)


def test_a_first_base_is_the_model_as_built(bench: Bench) -> None:
    plan = plan_of(kind="init", task="Frozen")
    header, tensors, out = bench.perform(plan)
    work = workload_of(plan)
    assert Manifest.decode(bytes(tensors["init/manifest"].tolist())) == work.shared
    assert Manifest.decode(bytes(tensors["init/frozen_manifest"].tolist())) == work.frozen
    model = out / "model"
    model.write_bytes((out / "payload").read_bytes()[: work.shared.nbytes])
    for name, value in map_file(model, work.shared).items():
        assert torch.equal(value, work.state()[name])
    assert header.examples == 0


def test_a_task_may_own_its_loop(bench: Bench) -> None:
    plan = plan_of(
        task="OwnLoop", work=Work(steps=3), schedule=Schedule(shape="exp", lr=0.2, decay=0.25)
    )
    header, update, _ = bench.perform(plan)
    assert (header.steps, header.epochs) == (3, 3.0)
    assert bench.work is not None
    task = bench.work.task
    model = bench.work.stack.build(task)
    base = base_of(bench.folder, plan)
    model.load_state_dict(map_file(base[0], base[1]), strict=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, targets = task.train_data().tensors  # type: ignore[attr-defined]
    for u in (0.0, 1 / 3, 2 / 3):
        gradients = torch.autograd.grad(
            F.cross_entropy(model(inputs), targets), list(model.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.2 * 0.25**u * gradient
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(update[name], before[name] - parameter.detach())
    assert header.examples == len(targets)


def test_a_strategy_that_needs_our_loop_is_refused_by_name(bench: Bench) -> None:
    with pytest.raises(
        ConfigInvalid, match="strategy fedprox: it needs our training loop, which the task OwnLoop"
    ):
        bench.perform(plan_of(task="OwnLoop", stack=("fedprox",)))
