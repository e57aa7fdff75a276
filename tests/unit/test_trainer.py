"""What a site computes for a plan, without processes: the loop, the update, the state, the payload."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from protos.contribution import ASSESSMENTS, Header
from protos.errors import ConfigInvalid, DataCorrupt, ManifestInvalid, TaskFailed
from protos.manifest import Index, Manifest
from protos.plan import OptimizerChoice, Plan, Schedule, StrategyChoice, Work
from protos.tensors import map_file
from site_agent.pipe import Progress
from site_agent.trainer import assessing, sealed
from site_agent.trainer import watch as watch_module
from site_agent.trainer.exchange import Clock, Exchange
from site_agent.trainer.pace import Pace
from site_agent.trainer.randomness import seed_epoch, shuffled
from site_agent.trainer.site_state import STATE, SiteState
from site_agent.trainer.watch import JobCancelled, Watch
from site_agent.trainer.workload import Workload
from strategies import registry
from strategies.stack import Stack
from tests.support import site_tasks, strategies_for_tests
from tests.support.disk import flip
from tests.support.sites import base_of, plan_of, unpack, workload_of

EVERY = {**registry.catalogue(), **{cls.name: cls for cls in strategies_for_tests.ALL}}


@pytest.fixture(autouse=True)
def more_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: EVERY)


class Bench:
    """Performs plans in this process, as the trainer does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.told: list[Progress] = []
        self.work: Workload | None = None

    def perform(
        self,
        plan: Plan,
        state: Path | None = None,
        work: Workload | None = None,
        base: tuple[Path, Manifest, Index] | None = None,
        cancelled: threading.Event | None = None,
        enough_at: float | None = None,
    ) -> tuple[Header, dict[str, Tensor], Path]:
        self.count += 1
        self.work = work or workload_of(plan)
        out = self.folder / f"out-{self.count}"
        if plan.kind != "init":
            base = base or base_of(self.folder, plan)
            plan = plan.model_copy(update={"manifest": base[1].digest})
        finishing = threading.Event()

        def tell(progress: Progress) -> None:
            self.told.append(progress)
            if enough_at is not None and progress.done >= enough_at:
                finishing.set()

        watch = Watch(1, tell, cancelled, finishing)
        exchange = Exchange(self.work, plan, watch, Clock(), base[0] if base else None, state, out)
        header, index = exchange.perform()
        assert Header.decode(header.encode()) == header
        assert header.index == index.digest
        assert (out / "payload").stat().st_size == index.nbytes
        covered = self.work.shared.covering(plan.groups)
        if plan.kind in ASSESSMENTS:
            covered = Manifest(())
        assert header.expected_nbytes(covered) == index.nbytes
        if header.codec:
            return header, {}, out
        return header, unpack(header, covered, out / "payload"), out


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def sgd(**fields: Any) -> OptimizerChoice:
    return OptimizerChoice.model_validate({"name": "sgd", "momentum": 0.0, **fields})


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


# -- state -----------------------------------------------------------------------------------------


def test_the_optimizers_state_is_kept_only_if_the_plan_says_so(bench: Bench) -> None:
    for name in ("sgd", "adam", "adamw"):
        choice = OptimizerChoice(name=name, momentum=0.9, keep_state=True)  # type: ignore[arg-type]
        plan = plan_of(optimizer=choice)
        _, _, out = bench.perform(plan)
        again = plan.model_copy(update={"round": 2})
        base = base_of(bench.folder, again)
        kept = bench.perform(again, out, base=base)[0].index
        assert kept != bench.perform(again, base=base)[0].index
    _, _, out = bench.perform(plan_of())
    assert [path.name for path in out.iterdir()] == ["payload"], "there is nothing to remember"


def test_states_of_strategies_travel_in_and_out(bench: Bench) -> None:
    plan = plan_of(stack=("test_half_precision",))
    _, _, out = bench.perform(plan)
    state = SiteState.read(out)
    assert set(state.strategies) == {"test_half_precision"}
    # A round without the strategy carries its state on.
    _, _, second = bench.perform(plan_of(round=2), out)
    carried = SiteState.read(second).strategies["test_half_precision"]
    for name, value in state.strategies["test_half_precision"].items():
        assert torch.equal(carried[name], value)


def test_a_state_that_a_disk_damaged_counts_as_lost(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, out = bench.perform(plan_of(stack=("test_half_precision",)))
    flip(out / STATE, (out / STATE).stat().st_size - 1)
    later = plan_of(stack=("test_half_precision",), round=2, last_counted="c" * 64)
    base = base_of(bench.folder, later)
    header, _, after = bench.perform(later, out, base=base)
    assert header.metrics["train_state_missing"] == 1.0
    assert "state.safetensors is damaged" in capsys.readouterr().err
    fresh, _, anew = bench.perform(later, base=base)
    assert header.index == fresh.index
    states = [SiteState.read(folder).strategies["test_half_precision"] for folder in (after, anew)]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value)


def test_a_state_of_an_earlier_version_has_no_seal(tmp_path: Path) -> None:
    save_file({"own/a": torch.ones(2)}, tmp_path / STATE, {"run": "r"})
    assert SiteState.read(tmp_path).own["a"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.int64])
def test_a_seal_is_of_every_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.ones(3, 2).to(dtype), "none": torch.zeros(0), "one": torch.tensor(7)}
    file = tmp_path / "file"
    sealed.write(tensors, file, {"run": "r"})
    assert sealed.read(file)[1] == {"run": "r"}
    refused, whole = 0, file.read_bytes()
    for at in range(len(whole)):
        flip(file, at)
        try:
            found, _ = sealed.read(file)
        except DataCorrupt:
            refused += 1
        else:  # white space, or the name of the seal
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], value) for name, value in tensors.items())
        file.write_bytes(whole)
    assert refused > len(whole) - 20


def test_what_is_placed_at_the_site_stays_and_comes_back(bench: Bench) -> None:
    plan = plan_of(task="Personal")
    header, update, out = bench.perform(plan)
    assert not any(name.startswith("1.") for name in update)
    own = SiteState.read(out).own
    assert set(own) == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    payload = (out / "payload").read_bytes()
    for name in ("1.weight", "1.running_mean"):
        assert own[name].numpy().tobytes() not in payload
    assert int(own["1.num_batches_tracked"]) == header.steps
    _, _, later = bench.perform(plan.model_copy(update={"round": 2}), out)
    found = SiteState.read(later).own["1.num_batches_tracked"]
    assert int(found) == 2 * header.steps


def test_adopt_may_reset_what_is_placed_at_the_site(bench: Bench) -> None:
    plan = plan_of(stack=("test_own_normalisation",))
    header, _, out = bench.perform(plan)
    _, _, later = bench.perform(plan.model_copy(update={"round": 2}), out)
    found = SiteState.read(later).own["1.num_batches_tracked"]
    assert int(found) == header.steps


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


def test_a_state_may_hold_tensors_that_share_memory(tmp_path: Path) -> None:
    """And one that was read may be changed in place and written again: a residual is."""
    whole = torch.arange(6.0)
    state = SiteState(
        strategies={"s": {"whole": whole, "part": whole[2:], "row": whole.view(2, 3)}}
    )
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    state.write(tmp_path / "first", {"run": "r"})
    read = SiteState.read(tmp_path / "first")
    for tensor in read.strategies["s"].values():
        tensor.add_(1)
    read.write(tmp_path / "second", {})
    for folder, added in (("first", 0), ("second", 1)):
        found = SiteState.read(tmp_path / folder).strategies["s"]
        assert found["whole"].tolist() == (whole + added).tolist()
        assert found["part"].tolist() == (whole[2:] + added).tolist()
        assert found["row"].tolist() == (whole.view(2, 3) + added).tolist()


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


# -- assess ----------------------------------------------------------------------------------------


def test_assess_sums_equal_those_of_the_whole_set(bench: Bench) -> None:
    plan = plan_of(kind="assess")
    header, sums, out = bench.perform(plan)
    data = site_tasks.clouds(101, 30)
    model = workload_of(plan).model.eval()
    with torch.no_grad():
        outputs = model(data.tensors[0])
    right = (outputs.argmax(1) == data.tensors[1]).sum()
    assert float(sums["val/correct"]) == float(right)
    assert float(sums["val/nll"]) == pytest.approx(
        float(F.cross_entropy(outputs, data.tensors[1], reduction="sum")), rel=1e-6
    )
    assert header.examples == 30
    assert all(p.merge == "sum" for p in header.payloads)
    assert [path.name for path in out.iterdir()] == ["payload"]


def test_assess_and_reassess_of_a_calibration(bench: Bench) -> None:
    stack = (StrategyChoice(name="temperature"),)
    header, sums, _ = bench.perform(plan_of(kind="assess", stack=stack))
    assert any(name.startswith("temperature/") for name in header.payload_names)
    maps = {name: c.parameters for name, c in Stack(stack).calibrate(sums).items()}
    assert maps
    plan = plan_of(kind="reassess", stack=stack, calibration=maps)
    again, later, _ = bench.perform(plan)
    assert not any(name.startswith("temperature/") for name in again.payload_names)
    assert float(later["val_calibrated/n"]) == 30
    assert float(later["val_calibrated/correct"]) == float(sums["val/correct"])


def test_the_second_exchange_does_not_run_the_model_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = (StrategyChoice(name="temperature"),)
    first = plan_of(kind="assess", stack=stack)
    again = plan_of(kind="reassess", stack=stack, calibration={"temperature": {"temperature": 2.0}})
    work, ran = workload_of(first), []
    forward = work.task.forward

    def counted(*arguments: Any) -> Any:
        ran.append(1)
        return forward(*arguments)

    monkeypatch.setattr(work.task, "forward", counted, raising=False)

    def runs(plan: Plan) -> tuple[int, dict[str, Tensor]]:
        ran.clear()
        _, sums, _ = bench.perform(plan, work=work)
        return len(ran), sums

    there, fresh = runs(again)
    assert there > 0
    assert runs(first)[0] == there
    none, kept = runs(again)
    assert none == 0
    assert kept.keys() == fresh.keys()
    assert all(torch.equal(kept[name], fresh[name]) for name in fresh)
    # Nor does it read the model: it may be larger than all else that an assessment needs.
    runs(first)
    _, manifest, index = base_of(bench.folder, first)
    _, unread, _ = bench.perform(again, work=work, base=(bench.folder / "none", manifest, index))
    assert all(torch.equal(unread[name], fresh[name]) for name in fresh)
    # Asked once more, as after a break; for another model; or if its outputs are too large to keep.
    assert runs(again)[0] == there
    runs(first)
    assert runs(again.model_copy(update={"base": "0" * 64}))[0] == there
    runs(first.model_copy(update={"round": 2}))
    assert {key[1] for key in work.outputs} == {2}
    monkeypatch.setattr(assessing, "KEPT_BYTES", 10)
    runs(first)
    assert not work.outputs
    assert runs(again)[0] == there


def test_an_assessment_reads_of_a_site_s_memory_its_own_tensors_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SiteState, "read", lambda _: pytest.fail("it may be twice the model"))
    bench.perform(plan_of(kind="assess"), state=bench.folder)
    with pytest.raises(pytest.fail.Exception):
        bench.perform(plan_of(), state=bench.folder)


def test_a_site_s_own_tensors_are_assessed_with_the_candidate(bench: Bench) -> None:
    stack = ("test_own_normalisation",)
    _, _, state = bench.perform(plan_of(stack=stack))
    plan = plan_of(stack=stack, kind="assess")
    _, remembered, _ = bench.perform(plan, state=state)
    _, fresh, _ = bench.perform(plan)
    assert not torch.equal(remembered["val/nll"], fresh["val/nll"])


def test_what_looks_behind_the_map_is_asked_for_once(bench: Bench) -> None:
    sets, temperature = StrategyChoice(name="conformal"), StrategyChoice(name="temperature")
    names = {"conformal/val/own", "conformal/val/every", "conformal/test/own"}
    for stack, kind in (((sets,), "assess"), ((sets, temperature), "reassess")):
        asked = {"assess": "reassess", "reassess": "assess"}[kind]
        _, sums, _ = bench.perform(plan_of(kind=kind, stack=stack))
        assert names <= sums.keys()
        assert int(sums["conformal/val/own"].sum()) == 30
        if len(stack) > 1:
            _, other, _ = bench.perform(plan_of(kind=asked, stack=stack))
            assert not names & other.keys()


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
