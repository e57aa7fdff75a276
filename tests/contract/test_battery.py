"""The battery: what every strategy has to pass, ours and those that exercise the protocol.

A review of a new method reads only what is new in it; everything here it gets for nothing.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from protos.errors import ConfigInvalid
from protos.manifest import Manifest, TensorSpec
from protos.plan import StrategyChoice
from strategies import registry
from strategies.context import Cohort, Moment
from strategies.listing import describe, listing
from strategies.protocol import HOOKS, Family, Need
from strategies.row import rows
from strategies.stack import Stack, owns_loss, trains_on_labels
from tests.support import strategies_for_tests
from tests.support.little_federation import LittleFederation

OURS = dict(registry.catalogue())
EVERY = {**OURS, **{cls.name: cls for cls in strategies_for_tests.ALL}}

# Hyperparameters with which a method does something in rounds as small as those here.
BRISK: dict[str, dict[str, Any]] = {
    "count_noise": {"seed": 1},
    "acls": {"margin": 0.1},
    "clsa": {"levels": ["0"]},
    "co_learning": {"epsilon": 1.0, "max_epochs": 4},
    "feddf": {"steps": 6, "batch_size": 8},
    "feature_replay": {"memory": 4, "rotation_steps": 5, "steps": 5},
    "fyi": {"iterations": 3, "least": 1, "flip": False},
    "fedavgm": {"momentum": 0.5},
    "mbls": {"margin": 0.1},
    "one": {"ramp": 0.0},
    "seed": {"queue": 32},
    "self_distillation": {"start": 1, "ramp": 1},
    "soft_tree": {"steps": 4, "depth": 2},
    "student": {"steps": 6, "batch_size": 8},
    "temperature": {"points": 16},
    "top_k": {"fraction": 0.3},
    "trimmed_mean": {"trim": 0.4},
}


@pytest.fixture(autouse=True)
def everything_in_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: EVERY)


def choice(name: str, params: dict[str, Any] | None = None) -> StrategyChoice:
    return StrategyChoice(name=name, params=BRISK.get(name, {}) if params is None else params)


def off(name: str) -> StrategyChoice:
    degenerate = EVERY[name].degenerate
    assert degenerate is not None
    return choice(name, dict(degenerate))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def flat_state(federation: LittleFederation) -> dict[str, Tensor]:
    """All tensors that a federation remembers."""
    out = {f"model/{k}": v for k, v in federation.model.items()}
    for position, tile in enumerate(federation.outer):
        out |= {f"outer/{position}/{k}": v for k, v in tile.items()}
    for site, state in federation.state.items():
        for strategy, own in state.items():
            out |= {f"site/{site}/{strategy}/{k}": v for k, v in own.items()}
        out |= {f"placed/{site}/{k}": v for k, v in federation.placed[site].items()}
    out |= {f"payloads/{k}": v for k, v in federation.summary.payloads.items()}
    return out


every = pytest.mark.parametrize("name", sorted(EVERY))
ours = pytest.mark.parametrize("name", sorted(OURS))


# ------------------------------------------------------------------------------- what it says


@ours
def test_its_docstring_teaches(name: str) -> None:
    cls = OURS[name]
    doc = inspect.getdoc(cls) or ""
    assert "Degenerate case:" in doc
    assert "::" in doc, "there is no formula"
    if cls.paper:
        assert "Departures:" in doc
        assert re.search(r"\b(19|20)\d\d\b", cls.paper)
        assert re.search(r"arXiv:|doi:", cls.paper)
    for field in describe(cls)["fields"]:
        assert field["doc"], f"{field['name']} is not explained under Attributes"


@every
def test_it_describes_itself(name: str) -> None:
    cls = EVERY[name]
    assert re.fullmatch(r"[a-z][a-z0-9_]*", cls.name)
    assert "\n" not in cls.summary
    assert 10 < len(cls.summary) <= 80
    assert cls.summary.endswith(".")
    assert cls.family in get_args(Family)
    assert cls.needs <= set(get_args(Need))
    assert set(cls.hooks()) <= set(HOOKS)
    assert cls.hooks(), "it changes nothing"
    assert "Degenerate case:" in (cls.__doc__ or "")
    assert json.loads(json.dumps(describe(cls))) == describe(cls)
    assert ("decode" in cls.hooks()) == cls.wire_codec


@ours
def test_it_lives_in_the_folder_of_its_family(name: str) -> None:
    folder, file = OURS[name].__module__.split(".")[1:]
    assert (folder, file) == (OURS[name].family, name)


def test_the_listing_names_all_of_them() -> None:
    assert [entry["name"] for entry in listing()] == sorted(OURS)


# ---------------------------------------------------------------------------- what it is made of


@every
def test_it_is_a_frozen_value(name: str) -> None:
    strategy = EVERY[name]()
    assert strategy == EVERY[name].model_validate_json(strategy.model_dump_json())
    fields = list(EVERY[name].model_fields)
    assert fields
    with pytest.raises(ValidationError):
        setattr(strategy, fields[0], getattr(strategy, fields[0]))


@every
def test_it_refuses_what_it_does_not_know(name: str) -> None:
    with pytest.raises(ConfigInvalid, match="no_such_key"):
        registry.make(name, {"no_such_key": 1})
    for field, info in EVERY[name].model_fields.items():
        if info.annotation is float:
            with pytest.raises(ConfigInvalid, match=field):
                registry.make(name, {field: float("nan")})


# ------------------------------------------------------------------------------- what it does


@every
def test_tile_hooks_leave_their_inputs_alone(name: str) -> None:
    strategy = registry.make(name, BRISK.get(name, {}))
    tile = Manifest((TensorSpec("w", (5,), "float32"),)).tiles[0]
    moment = Moment(round=1, seed=3, sites=3)
    generator = torch.Generator().manual_seed(0)
    delta, base = torch.randn(2, 5, generator=generator)
    state = strategy.init_state(tile)
    assert all(v.shape == (5,) for v in state.values())
    before = {k: v.clone() for k, v in state.items()}
    given = (delta.clone(), base.clone())
    step, after = strategy.step(delta, base, state, tile, moment)
    assert torch.equal(delta, given[0])
    assert torch.equal(base, given[1])
    assert same(state, before)
    assert step.dtype == delta.dtype
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    again, _ = strategy.step(delta, base, state, tile, moment)
    assert torch.equal(step, again), "the same moment must give the same noise"

    rows = torch.randn(3, 5, generator=generator)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    if strategy.overrides("reduce"):
        kept = rows.clone(), weights.clone()
        assert strategy.reduce(rows, weights, tile).shape == (5,)
        assert torch.equal(rows, kept[0])
        assert torch.equal(weights, kept[1])
    if strategy.overrides("weigh"):
        kept_weights = weights.clone()
        strategy.weigh(weights, cohort_of(rows))
        assert torch.equal(weights, kept_weights)
    if strategy.overrides("evaluate"):
        outputs, targets = torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
        kept_outputs = outputs.clone()
        parts = [strategy.evaluate(outputs[a:b], targets[a:b]) for a, b in ((0, 2), (2, 6))]
        whole = strategy.evaluate(outputs, targets)
        assert torch.equal(outputs, kept_outputs)
        for key, value in whole.items():
            torch.testing.assert_close(parts[0][key] + parts[1][key], value, rtol=1e-12, atol=1e-12)


def cohort_of(rows: Tensor) -> Cohort:
    n = len(rows)
    flat = rows.double()
    return Cohort(
        sites=tuple(f"site{k}" for k in range(n)),
        examples=torch.full((n,), 8.0).double(),
        losses=torch.full((n,), torch.nan).double(),
        staleness=torch.zeros(n, dtype=torch.int64),
        groups=("all", "head", "idle"),
        norms=flat.norm(dim=1),
        gram=flat @ flat.T,
    )


@every
def test_same_seed_same_bits(name: str) -> None:
    first, second = (LittleFederation([choice(name)], seed=5).run(2) for _ in range(2))
    assert same(flat_state(first), flat_state(second))
    assert first.memos == second.memos
    assert first.files == second.files
    assert first.calibrations == second.calibrations


@every
def test_its_plan_may_be_asked_twice(name: str) -> None:
    """A second attempt of a round asks again, with the memo of before or with that of after."""
    federation = LittleFederation([choice(name)]).run(2)
    draft = federation.plans[-1].but(round=3, last=federation.summary)
    once, memos = federation.stack.plan(draft, federation.memos)
    twice, _ = federation.stack.plan(draft, federation.memos)
    after, again = federation.stack.plan(draft, memos)
    assert once == twice == after
    assert memos == again
    assert json.loads(json.dumps(memos, allow_nan=False)) == memos


@every
def test_its_state_survives_the_disk(name: str, tmp_path: Path) -> None:
    straight = LittleFederation([choice(name)]).run(3)
    stopped = LittleFederation([choice(name)]).run(2)
    save_file({k: v.contiguous().clone() for k, v in flat_state(stopped).items()}, tmp_path / "s")
    resumed = LittleFederation([choice(name)])
    restore(resumed, load_file(tmp_path / "s"))
    resumed.memos = json.loads(json.dumps(stopped.memos))
    resumed.files = dict(stopped.files)
    resumed.summary = stopped.summary
    resumed.run(1)
    assert same(flat_state(straight), flat_state(resumed))
    assert straight.files == resumed.files


def restore(federation: LittleFederation, saved: dict[str, Tensor]) -> None:
    for key, value in saved.items():
        match key.split("/"):
            case ["model", name]:
                federation.model[name] = value
            case ["outer", position, name]:
                federation.outer[int(position)][name] = value
            case ["site", site, strategy, name]:
                federation.state[site].setdefault(strategy, {})[name] = value
            case ["placed", site, name]:
                federation.placed[site][name] = value


@pytest.mark.parametrize(
    "name", sorted(set(EVERY) - {"count_noise", "test_disagreement"})
)  # of scores
def test_it_changes_something(name: str) -> None:
    """Else the comparison with its degenerate case would show nothing."""
    plain, with_it = LittleFederation([]).run(2), LittleFederation([choice(name)]).run(2)
    changed = not same(plain.model, with_it.model)
    assert changed or with_it.calibrations or with_it.summary.payloads or with_it.files


@every
def test_switched_off_it_is_the_stack_without_it(name: str) -> None:
    plain, switched_off = LittleFederation([]).run(2), LittleFederation([off(name)]).run(2)
    assert same(plain.model, switched_off.model)
    assert plain.summary.scores == switched_off.summary.scores
    assert not switched_off.files
    outputs = torch.randn(4, 3)
    for method, calibration in switched_off.calibrations.items():
        given = switched_off.stack.transform(outputs, {method: calibration.parameters})
        assert torch.equal(given, outputs)


@ours
def test_switched_off_among_others(name: str) -> None:
    others = [choice(other) for other in ("co_learning", "fedavgm") if other != name]
    without = LittleFederation(others).run(2)
    among = LittleFederation([*others[:1], off(name), *others[1:]]).run(2)
    assert same(without.model, among.model)


def fitting_pairs() -> Iterator[tuple[str, str]]:
    for a, b in combinations(sorted(EVERY), 2):
        one, other = EVERY[a], EVERY[b]
        if any(one.overrides(h) and other.overrides(h) for h in ("reduce", "calibrate", "decode")):
            continue
        if owns_loss(one) and owns_loss(other):
            continue
        ways = ((one, other), (other, one))
        if any(x.blends_labels and trains_on_labels(y) for x, y in ways):
            continue
        if any(x.overrides("local_step") and y.overrides("objective") for x, y in ways):
            continue
        if {a, b} == {"seed", "test_own_normalisation"}:
            continue  # one resets a tensor by name, and the other puts its layer into a graft
        if {a, b} == {"feature_replay", "one"}:
            continue  # with branches no one layer gives the logits; the site's error says so
        if {a, b} == {"alife", "student"}:
            continue  # the task's student lacks the classes that arrive; the plug-in's error says so
        if a in OURS or b in OURS:
            yield a, b


@pytest.mark.parametrize(("a", "b"), list(fitting_pairs()))
def test_it_stacks_with_every_other_that_fits(a: str, b: str) -> None:
    federation = LittleFederation([choice(a), choice(b)]).run(1)
    assert all(v.isfinite().all() for v in federation.model.values())
    for site, sent in federation.contributions.items():
        assert sent.keys() == {t.name for t in federation.manifest.of("shared")}, site


def test_two_owners_of_one_thing_do_not_fit() -> None:
    class Other(strategies_for_tests.TwoOptimizers):
        name = "test_other"

    EVERY["test_other"] = Other
    try:
        with pytest.raises(ConfigInvalid, match="only one may own the loss"):
            Stack([choice("test_two_optimizers"), choice("test_other")])
    finally:
        del EVERY["test_other"]


def test_the_hooks_are_all_exercised() -> None:
    used = {hook for cls in EVERY.values() for hook in cls.hooks()}
    assert used == set(HOOKS)
    assert {need for cls in EVERY.values() for need in cls.needs} == set(get_args(Need))


# ----------------------------------------------------------------------------------- its row


@pytest.mark.parametrize("number", sorted(rows()))
def test_a_row_can_be_run_and_can_fail(number: int) -> None:
    row = rows()[number]
    assert row.method in OURS
    sites = {site.name for site in row.sites}
    for arm in row.arms:
        config = row.config(arm, seed=1)
        assert config["seed"] == config["task"]["params"]["seed"] == 1
        assert set(config["cohort"]["sites"]) <= sites
        for entry in config["strategy"]:
            registry.make(entry["name"], {k: v for k, v in entry.items() if k != "name"})
    arms = (*row.arms, *row.beside)
    nothing = {arm: defaultdict(lambda: 0.1, exchanges=99.0) for arm in arms}
    assert row.holds([nothing]), "a row that can't fail shows nothing"
