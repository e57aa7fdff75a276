"""The reduction, through files and headers as they are in a round, against plain arithmetic.

The oracles here hold whole vectors, know no tiles, and add one site after the other in fp64.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.ledger import ContributionRow
from orchestrator.rounds import reduce as reduce_module
from orchestrator.rounds.engine import Candidate
from orchestrator.rounds.passes import added_gram, relative_change
from orchestrator.rounds.reduce import job_of, reduce, runs
from protos.digest import digest
from protos.errors import ContributionRefused
from protos.manifest import TILE_ELEMENTS, Manifest
from protos.plan import StrategyChoice
from protos.tensors import DTYPES
from strategies import registry
from tests.support import strategies_for_tests
from tests.support.workbench import Workbench, of_spec

EVERY = {
    **registry.catalogue(),
    **{cls.name: cls for cls in strategies_for_tests.ALL},
}
SITES = ("east", "north", "south")
EXAMPLES = {"east": 16, "north": 32, "south": 80}
"""Weights of 1/8, 1/4 and 5/8: sums of fp32 values are then exact in fp64, with or without the fused
multiply-add that torch uses where the processor has it, and there is only one right answer."""
LONG = 2 * TILE_ELEMENTS + 123

MANIFEST = Manifest(
    (
        of_spec("body.weight", (2, TILE_ELEMENTS // 2 + 61)),
        of_spec("body.scale", ()),
        of_spec("norm.mean", (700,), kind="statistic"),
        of_spec("norm.batches", (), "int64"),
        of_spec("nothing", (0, 3)),
        of_spec("head.weight", (5, 7), group="head", ties=("decoder.weight",)),
    )
)


@pytest.fixture(autouse=True)
def everything_in_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: EVERY)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path)
    yield bench
    bench.close()


def choice(name: str, **params: Any) -> StrategyChoice:
    return StrategyChoice(name=name, params=params)


def drawn(manifest: Manifest, seed: int) -> dict[str, Tensor]:
    """Random tensors of a manifest."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for spec in manifest:
        if spec.kind == "counter":
            values = torch.randint(
                0, 2 if spec.dtype == "bool" else 100, spec.shape, generator=generator
            )
        else:
            values = torch.randn(spec.shape, generator=generator)
        out[spec.name] = values.to(DTYPES[spec.dtype])
    return out


def updates_of(manifest: Manifest) -> dict[str, dict[str, Tensor]]:
    return {site: drawn(manifest, seed) for seed, site in enumerate(SITES, 1)}


def send(
    bench: Workbench,
    manifest: Manifest,
    updates: Mapping[str, Mapping[str, Tensor]],
    base: str,
    **more: Any,
) -> list[ContributionRow]:
    return [
        bench.contribution(
            site, manifest, tensors, base=base, examples=EXAMPLES.get(site, 10), **more
        )
        for site, tensors in updates.items()
    ]


def reduced(
    bench: Workbench,
    base: str,
    rows: Sequence[ContributionRow],
    stack: Sequence[StrategyChoice] = (),
    **more: Any,
) -> Candidate:
    bench.board.begin("r", more.get("round", 1), 1, [r.site for r in rows])
    return reduce(bench.engine, bench.planned(base, stack, **more), bench.closed(rows))


def mean(parts: Sequence[Tensor], weights: Sequence[float]) -> np.ndarray[Any, Any]:
    """The weighted mean, added in the order of the sites, in fp64, of whole vectors."""
    out = np.zeros(tuple(parts[0].shape))
    for part, weight in zip(parts, weights, strict=True):
        out = out + weight * part.to(torch.float64).numpy()
    return out


def shares(examples: Mapping[str, int] = EXAMPLES) -> list[float]:
    return [examples[s] / sum(examples.values()) for s in sorted(examples)]


def stepped(base: Tensor, change: np.ndarray[Any, Any]) -> Tensor:
    """base - change, where the change is rounded to fp32 and the difference once more."""
    wire = np.float64 if base.dtype == torch.float64 else np.float32
    new = base.to(torch.float64).numpy() - change.astype(wire).astype(np.float64)
    return torch.from_numpy(np.asarray(new)).to(base.dtype).reshape(base.shape)


def plain(
    base: Mapping[str, Tensor], updates: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """What FedAvg makes of it."""
    out = {}
    for spec in MANIFEST:
        parts = [updates[s][spec.name] for s in SITES]
        if spec.kind == "counter":
            out[spec.name] = torch.stack(parts).amax(0)
        elif spec.kind == "statistic":
            out[spec.name] = torch.from_numpy(mean(parts, shares()).astype(np.float32))
        else:
            out[spec.name] = stepped(base[spec.name], mean(parts, shares()))
    return out


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# -- FedAvg -----------------------------------------------------------------------------------------


def test_the_mean_is_the_oracles_to_the_last_bit(bench: Workbench) -> None:
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    model = bench.put_model(MANIFEST, base)
    candidate = reduced(bench, model, send(bench, MANIFEST, updates, model))
    expected = plain(base, updates)
    same(bench.tensors(candidate.model.shared), expected)
    # The padding between tensors is zero, so that the digest is one of the values alone.
    assert bench.put_model(MANIFEST, expected) == candidate.model.shared
    assert candidate.weights == dict(zip(SITES, shares(), strict=True))
    assert candidate.outer_state == ""


def test_other_weights_have_the_bits_of_the_whole_vector(bench: Workbench) -> None:
    """Where sums are not exact: as if all tiles were one, with the same operation."""
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    model = bench.put_model(MANIFEST, base)
    rows = [
        bench.contribution(s, MANIFEST, updates[s], examples=n)
        for s, n in zip(SITES, (10, 25, 65), strict=True)
    ]
    found = bench.tensors(reduced(bench, model, rows).model.shared)
    for spec in MANIFEST:
        if spec.kind == "parameter":
            whole = torch.zeros(spec.elements, dtype=torch.float64)
            for site, weight in zip(SITES, (0.1, 0.25, 0.65), strict=True):
                whole.add_(updates[site][spec.name].flatten(), alpha=weight)
            expected = stepped(base[spec.name].flatten(), whole.numpy())
            assert torch.equal(found[spec.name].flatten(), expected)


def test_order_of_arrival_does_not_matter(bench: Workbench) -> None:
    updates = updates_of(MANIFEST)
    model = bench.put_model(MANIFEST, drawn(MANIFEST, 0))
    rows = send(bench, MANIFEST, updates, model)
    first = reduced(bench, model, rows).model.shared
    assert reduced(bench, model, rows[::-1]).model.shared == first


@pytest.mark.parametrize("stack", [(), ("fedavgm",), ("trimmed_mean",), ("test_close_ones",)])
def test_runs_of_tiles_and_workers_do_not_matter(
    bench: Workbench, stack: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    model = bench.put_model(MANIFEST, base)
    rows = send(bench, MANIFEST, updates, model)
    found = set()
    for workers, each, run_bytes in ((1, 1, 2**40), (1, 1, 1), (1, 2, 1), (2, 4, 1), (16, 4, 1)):
        bench.engine.workers = workers
        monkeypatch.setattr(reduce_module, "RUNS_PER_WORKER", each)
        monkeypatch.setattr(reduce_module, "RUN_BYTES", run_bytes)
        candidate = reduced(bench, model, rows, [choice(name) for name in stack])
        found.add(
            (candidate.model.shared, candidate.outer_state, candidate.relative_change,
             tuple(candidate.weights.items()))
        )  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("kind", ["parameter", "statistic"])
def test_every_floating_dtype(bench: Workbench, dtype: str, kind: str) -> None:
    """Values that need no rounding until the last step, which has to be a single one."""
    manifest = Manifest((of_spec("w", (6,), dtype, kind=kind), of_spec("pad", (1,))))
    base = {"w": torch.tensor([1.0, -2, 0.5, 4, 1, 0]), "pad": torch.zeros(1)}
    base = {"w": base["w"].to(DTYPES[dtype]), "pad": base["pad"]}
    sent = {
        "east": torch.tensor([1.0, 2, -4, 0.25, 2**-9, 0]),
        "north": torch.tensor([0.5, 2, 4, -0.25, 2**-9, 8]),
    }
    model = bench.put_model(manifest, base)
    rows = [
        bench.contribution(s, manifest, {"w": v.double(), "pad": torch.zeros(1)}, examples=n)
        for (s, v), n in zip(sent.items(), (3, 1), strict=True)
    ]
    average = 0.75 * sent["east"].double() + 0.25 * sent["north"].double()
    exact = base["w"].double() - average if kind == "parameter" else average
    found = bench.tensors(reduced(bench, model, rows).model.shared)["w"]
    assert found.dtype == DTYPES[dtype]
    assert torch.equal(found.double(), exact.to(DTYPES[dtype]).double())


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8", "bool"])
def test_counters_take_the_maximum(bench: Workbench, dtype: str) -> None:
    manifest = Manifest((of_spec("n", (3,), dtype),))
    top = {"int64": 2**62 + 1, "int32": 2**31 - 1, "int16": 2**15 - 1, "int8": 127, "uint8": 255}
    high = top.get(dtype, 1)
    model = bench.put_model(manifest, {"n": torch.tensor([high, 1, 0]).to(DTYPES[dtype])})
    rows = [
        bench.contribution(s, manifest, {"n": torch.tensor(v, dtype=DTYPES[dtype])}, examples=n)
        for s, v, n in (("east", [0, high, 0], 1), ("north", [1, 0, 0], 1000))
    ]
    found = bench.tensors(reduced(bench, model, rows).model.shared)["n"]
    assert found.tolist() == torch.tensor([1, high, 0], dtype=DTYPES[dtype]).tolist()


def test_one_site_is_its_own_mean(bench: Workbench) -> None:
    base, update = drawn(MANIFEST, 0), drawn(MANIFEST, 1)
    model = bench.put_model(MANIFEST, base)
    candidate = reduced(bench, model, send(bench, MANIFEST, {"north": update}, model))
    found = bench.tensors(candidate.model.shared)
    for spec in MANIFEST:
        sent = update[spec.name]
        expected = stepped(base[spec.name], sent.double().numpy())
        assert torch.equal(found[spec.name], expected if spec.kind == "parameter" else sent)


def test_without_any_examples_sites_weigh_alike(bench: Workbench) -> None:
    manifest = Manifest((of_spec("w", (2,)),))
    model = bench.put_model(manifest, {"w": torch.zeros(2)})
    rows = [
        bench.contribution(s, manifest, {"w": torch.full((2,), v)}, examples=0)
        for s, v in (("east", 1.0), ("north", 3.0))
    ]
    candidate = reduced(bench, model, rows)
    assert candidate.weights == {"east": 0.5, "north": 0.5}
    assert bench.tensors(candidate.model.shared)["w"].tolist() == [-2.0, -2.0]


def test_relative_change_is_of_parameters_before_the_outer_step(bench: Workbench) -> None:
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    model = bench.put_model(MANIFEST, base)
    rows = send(bench, MANIFEST, updates, model)
    moved = size = 0.0
    for spec in MANIFEST:
        if spec.kind == "parameter":
            delta = mean([updates[s][spec.name] for s in SITES], shares()).astype(np.float32)
            moved += float((delta.astype(np.float64) ** 2).sum())
            size += float((base[spec.name].double().numpy() ** 2).sum())
    plain_change = reduced(bench, model, rows).relative_change
    assert plain_change == pytest.approx(math.sqrt(moved / size), rel=1e-12)
    far = reduced(bench, model, rows, [choice("fedavgm", learning_rate=100.0)])
    assert far.relative_change == plain_change


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_sums_of_tiles_are_added_in_their_order(order: tuple[int, ...]) -> None:
    """Whichever run of them is done first: in another order these would not be 1."""
    sums = [1e16, -1e16, 1.0]
    results = [
        {"tiles": [{"tile": k, "gram": [[sums[k]]], "delta_sq": sums[k], "base_sq": 1.0}]}
        for k in order
    ]
    assert added_gram(results, 1) == [[1.0]]
    assert relative_change(results) == 1 / math.sqrt(3)


def test_a_base_of_zeros_has_no_relative_change(bench: Workbench) -> None:
    manifest = Manifest((of_spec("w", (2,)),))
    model = bench.put_model(manifest, {"w": torch.zeros(2)})
    row = bench.contribution("north", manifest, {"w": torch.ones(2)})
    assert reduced(bench, model, [row]).relative_change == math.inf


# -- parts, groups ----------------------------------------------------------------------------------


def cached(path: Path) -> bool:
    """Whether all of a file is in memory: a read that may not wait says so."""
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        try:
            return os.preadv(file.fileno(), [bytearray(size)], 0, os.RWF_NOWAIT) == size
        except BlockingIOError:
            return False
        except OSError as error:
            pytest.skip(f"this file system does not tell: {error}")


def test_the_base_before_makes_room_in_memory_for_the_next_model(bench: Workbench) -> None:
    manifest = Manifest((of_spec("w", (1 << 21,)),))
    models = [bench.put_model(manifest, drawn(manifest, seed)) for seed in (7, 8)]
    earlier, base = (bench.store.path(model) for model in models)
    rows = send(bench, manifest, updates_of(manifest), models[1])
    before = digest(earlier.read_bytes())
    expected = reduced(bench, models[1], rows)  # a first round has no base before
    assert cached(earlier)
    candidate = reduced(bench, models[1], rows, base_before=models[0])
    assert not cached(earlier)
    assert cached(base)  # nobody waits for the disk in order to send it
    assert candidate.model == expected.model
    assert digest(earlier.read_bytes()) == before


def test_a_base_before_that_is_gone_is_not_missed(bench: Workbench) -> None:
    model = bench.put_model(MANIFEST, drawn(MANIFEST, 7))
    rows = send(bench, MANIFEST, updates_of(MANIFEST), model)
    expected = reduced(bench, model, rows)
    assert reduced(bench, model, rows, base_before="ab" * 32).model == expected.model
    assert reduced(bench, model, rows, base_before=model).model == expected.model
    assert cached(bench.store.path(model))


def test_what_no_contribution_covers_stays_as_it_is(bench: Workbench) -> None:
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    model = bench.put_model(MANIFEST, base)
    head = MANIFEST.covering(["head"])
    rows = send(bench, head, updates, model)
    stack = [choice("fedavgm", momentum=0.5)]
    candidate = reduced(bench, model, rows, stack, covered=["head"])
    expected = {**base, "head.weight": plain(base, updates)["head.weight"]}
    same(bench.tensors(candidate.model.shared), expected)
    state = bench.tensors(candidate.outer_state)
    assert not state["fedavgm.velocity/body.weight"].any()
    assert state["fedavgm.velocity/head.weight"].all()
    # What was remembered of the other part is still there after a round without it.
    other = MANIFEST.covering(["all"])
    rows = send(bench, other, updates, candidate.model.shared)
    again = reduced(
        bench, candidate.model.shared, rows, stack, covered=["all"], round=2,
        outer_state=candidate.outer_state,
    )  # fmt: skip
    later = bench.tensors(again.outer_state)
    assert torch.equal(later["fedavgm.velocity/head.weight"], state["fedavgm.velocity/head.weight"])
    assert later["fedavgm.velocity/body.weight"].any()


def test_weights_may_differ_by_group(bench: Workbench) -> None:
    manifest = Manifest(
        (
            of_spec("0.weight", (4,)),
            of_spec("2.weight", (4,), group="head"),
            of_spec("2.bias", (4,), group="idle"),
            of_spec("2.mean", (4,), kind="statistic", group="idle"),
            of_spec("2.var", (4,), kind="statistic", group="head"),
        )
    )
    base, updates = drawn(manifest, 0), updates_of(manifest)
    model = bench.put_model(manifest, base)
    rows = send(bench, manifest, updates, model)
    found = bench.tensors(reduced(bench, model, rows, [choice("test_by_group")]).model.shared)
    everyone = mean([updates[s]["0.weight"] for s in SITES], shares())
    assert torch.equal(found["0.weight"], stepped(base["0.weight"], everyone))
    # The head follows its first site alone, and where nobody weighs anything nothing moves.
    assert torch.equal(found["2.weight"], base["2.weight"] - updates["east"]["2.weight"])
    assert torch.equal(found["2.var"], updates["east"]["2.var"])
    assert torch.equal(found["2.bias"], base["2.bias"])
    assert torch.equal(found["2.mean"], base["2.mean"])


def test_statistics_are_a_mean_even_where_weights_do_not_sum_to_one(bench: Workbench) -> None:
    manifest = Manifest((of_spec("w", (4,)), of_spec("mean", (4,), kind="statistic")))
    updates = {s: {**u, "mean": torch.full((4,), 3.0)} for s, u in updates_of(manifest).items()}
    model = bench.put_model(manifest, drawn(manifest, 0))
    rows = send(bench, manifest, updates, model)
    candidate = reduced(bench, model, rows, [choice("test_close_ones", limit=0.01)])
    assert sum(candidate.weights.values()) < 0.1
    assert bench.tensors(candidate.model.shared)["mean"].tolist() == pytest.approx([3.0] * 4)


# -- rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_median_by_the_reduce_hook(bench: Workbench, n: int) -> None:
    manifest = Manifest((of_spec("w", (LONG,)), of_spec("m", (3,), kind="statistic")))
    base = drawn(manifest, 0)
    updates = {f"s{k}": drawn(manifest, k + 1) for k in range(n)}
    model = bench.put_model(manifest, base)
    rows = [
        bench.contribution(s, manifest, tensors, examples=10**k)
        for k, (s, tensors) in enumerate(updates.items())
    ]
    found = bench.tensors(
        reduced(bench, model, rows, [choice("trimmed_mean", trim=0.5)]).model.shared
    )
    middle = np.median(np.stack([u["w"].double().numpy() for u in updates.values()]), axis=0)
    assert torch.equal(found["w"], stepped(base["w"], middle))
    # Statistics take the plain mean, whatever the rule for parameters is.
    weights = [10**k / sum(10**i for i in range(n)) for k in range(n)]
    average = mean([u["m"] for u in updates.values()], weights).astype(np.float32)
    assert torch.equal(found["m"], torch.from_numpy(average))


def test_norms_and_gram_are_those_of_the_whole_vectors(bench: Workbench) -> None:
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    updates["south"] = {
        k: -v if v.dtype.is_floating_point else v for k, v in updates["east"].items()
    }
    model = bench.put_model(MANIFEST, base)
    rows = send(bench, MANIFEST, updates, model)
    limit = 50.0
    candidate = reduced(bench, model, rows, [choice("test_close_ones", limit=limit)])
    names = [t.name for t in MANIFEST if t.kind == "parameter"]
    flat = np.stack(
        [np.concatenate([updates[s][n].double().flatten().numpy() for n in names]) for s in SITES]
    )
    gram = flat @ flat.T
    norms = np.sqrt(gram.diagonal())
    friends = np.float32((gram / np.outer(norms, norms) > 0).sum(axis=1)) / np.float32(len(SITES))
    expected = np.array(shares()) * friends * np.minimum(limit / norms, 1)
    assert list(candidate.weights.values()) == pytest.approx(expected.tolist(), rel=1e-9)


def test_server_momentum_over_two_rounds_is_that_of_whole_vectors(bench: Workbench) -> None:
    stack = [choice("fedavgm", momentum=0.75, learning_rate=0.5)]
    base = drawn(MANIFEST, 0)
    names = [t.name for t in MANIFEST if t.kind == "parameter" and t.elements]
    velocity = {n: np.zeros(tuple(base[n].shape), np.float32) for n in names}
    model, state, expected = bench.put_model(MANIFEST, base), "", dict(base)
    for number in (1, 2):
        updates = {s: drawn(MANIFEST, 10 * number + k) for k, s in enumerate(SITES)}
        rows = send(bench, MANIFEST, updates, model)
        candidate = reduced(bench, model, rows, stack, round=number, outer_state=state)
        for n in names:
            delta = mean([updates[s][n] for s in SITES], shares()).astype(np.float32)
            exact = 0.75 * velocity[n].astype(np.float64) + delta.astype(np.float64)
            expected[n] = stepped(expected[n], 0.5 * exact)
            velocity[n] = exact.astype(np.float32)
        model, state = candidate.model.shared, candidate.outer_state
        found = bench.tensors(model)
        remembered = bench.tensors(state)
        assert set(remembered) == {f"fedavgm.velocity/{n}" for n in names}
        for n in names:
            assert torch.equal(found[n], expected[n]), (number, n)
            own = remembered[f"fedavgm.velocity/{n}"]
            assert torch.equal(own, torch.from_numpy(np.asarray(velocity[n])).flatten()), n


def test_a_strategy_out_of_its_phase_does_nothing_and_remembers(bench: Workbench) -> None:
    stack = [
        StrategyChoice(name="fedavgm", params={"momentum": 0.9}, rounds=(1, 2)),
        StrategyChoice(name="test_outer_noise", params={"deviation": 0.5}, rounds=(2, 3)),
    ]
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    model = bench.put_model(MANIFEST, base)
    rows = send(bench, MANIFEST, updates, model)
    first = reduced(bench, model, rows, stack, round=1)
    one = bench.tensors(first.outer_state)
    assert one["fedavgm.velocity/head.weight"].any()
    assert not one["test_outer_noise.total/head.weight"].any()
    same(bench.tensors(first.model.shared), plain(base, updates))  # its first step is the mean
    second = reduced(bench, model, rows, stack, round=2, outer_state=first.outer_state)
    two = bench.tensors(second.outer_state)
    assert torch.equal(two["fedavgm.velocity/head.weight"], one["fedavgm.velocity/head.weight"])
    assert two["test_outer_noise.total/head.weight"].any()
    third = reduced(bench, model, rows, stack, round=3, outer_state=second.outer_state)
    same(bench.tensors(third.model.shared), plain(base, updates))
    same(bench.tensors(third.outer_state), two)


def test_noise_is_drawn_for_seed_round_and_tile(bench: Workbench) -> None:
    model = bench.put_model(MANIFEST, drawn(MANIFEST, 0))
    rows = send(bench, MANIFEST, updates_of(MANIFEST), model)
    stack = [choice("test_outer_noise", deviation=0.5)]
    ways: list[dict[str, Any]] = [{}, {}, {"seed": 1}, {"round": 2}]
    found = [reduced(bench, model, rows, stack, **way).model.shared for way in ways]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    noise = bench.tensors(found[0])["body.weight"].flatten()
    noise -= bench.tensors(reduced(bench, model, rows).model.shared)["body.weight"].flatten()
    rest = len(noise) - TILE_ELEMENTS
    assert not torch.equal(noise[:rest], noise[TILE_ELEMENTS:])


def test_state_of_another_model_is_not_taken(bench: Workbench) -> None:
    """A run that starts from a round of one with other tensors begins with an empty memory."""
    other = Manifest((of_spec("v", (3,)),))
    foreign = bench.put_model(other, {"v": torch.ones(3)})
    model = bench.put_model(MANIFEST, drawn(MANIFEST, 0))
    rows = send(bench, MANIFEST, updates_of(MANIFEST), model)
    fresh = reduced(bench, model, rows, [choice("fedavgm")])
    again = reduced(bench, model, rows, [choice("fedavgm")], outer_state=foreign)
    assert again.outer_state == fresh.outer_state


# -- the wire ---------------------------------------------------------------------------------------


def half(tensor: Tensor) -> list[bytes]:
    """Blocks of the test codec, fp16."""
    parts = tensor.flatten().half().split(TILE_ELEMENTS)
    return [b"\1" + len(p).to_bytes(4, "little") + p.numpy().tobytes() for p in parts]


def test_a_codec_is_decoded_tile_by_tile(bench: Workbench) -> None:
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    names = [t.name for t in MANIFEST if t.kind == "parameter" and t.elements]
    model = bench.put_model(MANIFEST, base)
    rows = [
        bench.contribution(
            s, MANIFEST, updates[s], examples=EXAMPLES[s], codec="test_half_precision",
            blocks={n: half(updates[s][n]) for n in names},
        )
        for s in SITES
    ]  # fmt: skip
    found = reduced(bench, model, rows, [choice("test_half_precision")]).model.shared
    rounded = {
        s: {n: t.half().float() if n in names else t for n, t in updates[s].items()} for s in SITES
    }
    same(bench.tensors(found), plain(base, rounded))


def test_encoded_and_raw_contributions_may_meet(bench: Workbench) -> None:
    """The degenerate form of a codec may send raw tiles."""
    base, updates = drawn(MANIFEST, 0), updates_of(MANIFEST)
    names = [t.name for t in MANIFEST if t.kind == "parameter" and t.elements]
    model = bench.put_model(MANIFEST, base)
    rows = send(bench, MANIFEST, {s: updates[s] for s in SITES[:2]}, model)
    rows.append(
        bench.contribution(
            "south", MANIFEST, updates["south"], examples=EXAMPLES["south"],
            codec="test_half_precision", blocks={n: half(updates["south"][n]) for n in names},
        )
    )  # fmt: skip
    found = reduced(bench, model, rows, [choice("test_half_precision")]).model.shared
    rounded = {n: t.half().float() if n in names else t for n, t in updates["south"].items()}
    same(bench.tensors(found), plain(base, {**updates, "south": rounded}))


def test_a_foreign_codec_is_refused(bench: Workbench) -> None:
    manifest = Manifest((of_spec("w", (2,)),))
    model = bench.put_model(manifest, {"w": torch.zeros(2)})
    row = bench.contribution(
        "north", manifest, {}, codec="test_half_precision", blocks={"w": half(torch.ones(2))}
    )
    with pytest.raises(ContributionRefused, match=r"site north: encoded with test_half_precision"):
        reduced(bench, model, [row])


@pytest.mark.parametrize(
    ("blocks", "bad"),
    [
        ({"w": half(torch.tensor([1.0, 2.0, 3.0]))}, ""),
        ({"w": half(torch.tensor([1.0, math.nan, 3.0]))}, "w"),
        ({"w": half(torch.tensor([1.0, 1e30, 3.0]))}, "w"),  # infinite in fp16
    ],
)
def test_a_decoded_contribution_is_checked(
    bench: Workbench, tmp_path: Path, blocks: dict[str, list[bytes]], bad: str
) -> None:
    manifest = Manifest((of_spec("m", (2,), kind="statistic"), of_spec("w", (3,))))
    row = bench.contribution(
        "north", manifest, {"m": torch.ones(2) * 100}, codec="test_half_precision", blocks=blocks
    )
    bench.store.put_manifest(manifest)
    found = bench.engine.ask(
        "check_blocks",
        {
            "manifest": str(bench.engine.manifest_file(tmp_path, manifest.digest)),
            "covered": None,
            "stack": [choice("test_half_precision").model_dump(mode="json")],
            "header": str(bench.engine.header_file(tmp_path, row)),
            "payload": str(bench.store.path(row.index)),
            "site": "north",
        },
    )
    assert found["bad"] == bad
    assert found["norm"] is None if bad else found["norm"] == pytest.approx(math.sqrt(14))


@pytest.mark.parametrize(
    ("codec", "block", "why"),
    [
        ("int8", bytes(6), "6 bytes where 7 belong"),
        ("int8", bytes(4) * 9, "36 bytes where 7 belong"),
        ("top_k", bytes(4) + b"\3\0", "positions"),  # three values, and the fourth of them
    ],
)
def test_blocks_that_are_none_are_refused_by_site_and_tensor(
    bench: Workbench, codec: str, block: bytes, why: str
) -> None:
    manifest = Manifest((of_spec("w", (3,)),))
    model = bench.put_model(manifest, {"w": torch.zeros(3)})
    row = bench.contribution("north", manifest, {}, codec=codec, blocks={"w": [block]})
    with pytest.raises(ContributionRefused, match=f"site north, tensor w, .*{codec}: .*{why}"):
        reduced(bench, model, [row], [choice(codec)])


# -- side payloads ----------------------------------------------------------------------------------


def test_side_payloads_are_merged_by_their_rules(bench: Workbench) -> None:
    manifest = Manifest((of_spec("w", (2,)),))
    model = bench.put_model(manifest, {"w": torch.zeros(2)})
    rows = [
        bench.contribution(
            site, manifest, {"w": torch.zeros(2)}, examples=n,
            payloads={
                "s/sum": (torch.tensor([n, 1]), "sum"),
                "s/mean": (torch.tensor([float(n), 1.0]), "mean by count"),
                "s/rows": (torch.full((k + 1, 2), float(k)), "concatenate"),
                "s/own": (torch.tensor([float(n)]), "keep per site"),
            },
        )
        for k, (site, n) in enumerate(EXAMPLES.items())
    ]  # fmt: skip
    merged = reduced(bench, model, rows).payloads
    assert set(merged) == {"s/sum", "s/mean", "s/rows"}
    found = {}
    for name, spec in merged.items():
        raw = bench.store.get_bytes(spec["object"])[spec["offset"] :][: spec["nbytes"]]
        found[name] = np.frombuffer(raw, spec["dtype"]).reshape(spec["shape"])
    assert found["s/sum"].tolist() == [128, 3]
    assert found["s/mean"].tolist() == pytest.approx([60.0, 1.0])
    assert found["s/rows"].tolist() == [[0, 0], [1, 1], [1, 1], [2, 2], [2, 2], [2, 2]]


# -- how the work is divided ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "sizes", [[], [5], [LONG], [1] * 9, [LONG, 3, 3, LONG, 0, 7], [3, 10 * TILE_ELEMENTS]]
)
def test_runs_cover_all_tiles_once_and_in_order(sizes: list[int], count: int) -> None:
    manifest = Manifest(tuple(of_spec(f"t{i}", (n,)) for i, n in enumerate(sizes)))
    found = runs(manifest, count)
    assert [t for a, b in found for t in range(a, b)] == list(range(len(manifest.tiles)))
    assert len(found) <= count
    assert all(a < b for a, b in found)


def test_runs_are_of_about_equal_work() -> None:
    manifest = Manifest(tuple(of_spec(f"t{i}", (TILE_ELEMENTS,)) for i in range(64)))
    assert {b - a for a, b in runs(manifest, 8)} == {8}


# -- memory -----------------------------------------------------------------------------------------

PEAK = """
import json, resource, sys
from orchestrator.arithmetic import reduction
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large = json.loads(sys.argv[1]), json.loads(sys.argv[2])
reduction.reduce_run(small)
before = peak()
reduction.measure_run(large)
reduction.reduce_run(large)
print(json.dumps({"grown": peak() - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stack", [[], ["fedavgm"], ["trimmed_mean"]], ids=str)
def test_memory_is_that_of_a_tile_whatever_the_model(
    bench: Workbench, tmp_path: Path, stack: list[str]
) -> None:
    """64 MB of model, three contributions of the same size, and less than 16 MB in memory."""
    manifest = Manifest((of_spec("w", (16 * 2**20,)),))
    zero = torch.zeros(16 * 2**20)
    model = bench.put_model(manifest, {"w": zero})
    rows = [bench.contribution(s, manifest, {"w": zero}, examples=1) for s in SITES]
    planned = bench.planned(model, [choice(name) for name in stack])
    job = job_of(bench.engine, planned, bench.closed(rows).contributions, tmp_path)
    made = bench.engine.ask("prepare", {"job": job})
    assert bool(made["state_manifest"]) == (stack == ["fedavgm"])
    args = [
        json.dumps({"job": job, "weights": [[1 / 3]] * 3, "first": 0, "end": n})
        for n in (2, len(manifest.tiles))
    ]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *args], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["grown"] < 16 << 20
