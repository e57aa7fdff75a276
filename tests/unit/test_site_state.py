"""What a site remembers between rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from protos.errors import DataCorrupt
from protos.plan import OptimizerChoice
from site_agent.trainer import sealed
from site_agent.trainer.site_state import STATE, SiteState
from strategies import registry
from tests.support.disk import flip
from tests.support.sites import base_of, plan_of
from tests.support.trainer_bench import EVERY, Bench


@pytest.fixture(autouse=True)
def more_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: EVERY)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


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
