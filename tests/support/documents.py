"""Manifests, indexes, headers and plans as Hypothesis draws them, and damage to their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from protos.contribution import Header, PayloadSpec
from protos.digest import canonical
from protos.manifest import CHUNK_BYTES, DTYPE_BYTES, Index, Kind, Manifest, TensorSpec
from protos.plan import OptimizerChoice, Plan, Schedule, StrategyChoice, TaskChoice, Work

FLOATING = [d for d in DTYPE_BYTES if d.startswith(("float", "bfloat"))]
WHOLE = [d for d in DTYPE_BYTES if d not in FLOATING]

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
site_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def manifests(draw: st.DrawFn, most: int = 6, extent: int = 40) -> Manifest:
    """Any valid manifest of a few small tensors: empty ones, scalars and tied ones too."""
    names = draw(st.lists(texts, max_size=2 * most, unique=True))
    specs = []
    while names and len(specs) < most:
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        kinds: list[Kind] = ["parameter", "statistic"] if dtype in FLOATING else ["counter"]
        name = names.pop()
        ties = tuple(names.pop() for _ in range(min(len(names), draw(st.integers(0, 1)))))
        specs.append(
            TensorSpec(
                name,
                tuple(draw(st.lists(st.integers(0, extent), max_size=3))),
                dtype,
                draw(st.sampled_from(kinds)),
                draw(st.sampled_from(["all", "head", "körper"])),
                draw(st.sampled_from(["shared", "site", "orchestrator", "frozen"])),
                ties,
            )
        )
    return Manifest(tuple(specs))


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """Any valid index of at most five chunks."""
    nbytes = draw(st.integers(0, 5 * CHUNK_BYTES))
    count = -(-nbytes // CHUNK_BYTES)
    return Index(draw(digests), nbytes, tuple(draw(digests) for _ in range(count)))


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Any valid header."""
    keys = draw(st.lists(texts, max_size=3, unique=True))
    return Header(
        plan_id=draw(texts),
        work_digest=draw(digests),
        site=draw(site_names),
        kind=draw(st.sampled_from(["train", "init", "assess", "baseline", "reassess"])),
        base=draw(st.just("") | digests),
        manifest=draw(digests),
        index=draw(digests),
        codec=draw(st.sampled_from(["", "half"])),
        blocks=tuple(draw(st.lists(st.integers(0, 2**44), max_size=4))),
        payloads=tuple(
            PayloadSpec(
                name=f"s/{key}",
                shape=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
                dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
                merge=draw(
                    st.sampled_from(["sum", "mean by count", "concatenate", "keep per site"])
                ),
            )
            for key in keys
        ),
        examples=draw(st.integers(0, 2**40)),
        steps=draw(st.integers(0, 2**40)),
        epochs=draw(st.floats(0, 1e9)),
        partial=draw(st.booleans()),
        metrics=draw(st.dictionaries(texts, numbers, max_size=3)),
        packages=draw(st.dictionaries(texts, texts, max_size=3)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any valid plan."""
    unit = draw(st.sampled_from(["epochs", "steps", "tokens", "seconds"]))
    amount = draw(
        st.integers(1, 2**40)
        if unit in ("steps", "tokens")
        else st.floats(1e-6, 1e9, allow_nan=False)
    )
    parameters = st.dictionaries(texts, json_values, max_size=3)
    return Plan(
        run=draw(site_names),
        round=draw(st.integers(0, 10**6)),
        attempt=draw(st.integers(1, 100)),
        kind=draw(st.sampled_from(["train", "init", "assess", "baseline", "reassess"])),
        site=draw(site_names),
        base=draw(digests),
        manifest=draw(digests),
        accepts=tuple(draw(st.lists(digests, max_size=2))),
        frozen=draw(st.just("") | digests),
        groups=draw(st.none() | st.lists(texts, max_size=2).map(tuple)),
        task=TaskChoice(name="task", params=draw(parameters)),
        stack=(
            StrategyChoice(name="a", params=draw(parameters), rounds=(1, None)),
            StrategyChoice(name="b", rounds=draw(st.none() | st.just((0, 3)))),
        ),
        payload=draw(parameters),
        work=Work(**{unit: amount}),
        schedule=Schedule(lr=draw(st.floats(1e-9, 1e3)), decay=draw(st.floats(1e-6, 1))),
        optimizer=OptimizerChoice(weight_decay=draw(st.floats(0, 1))),
        batch_size=draw(st.integers(1, 10**6)),
        seed=draw(st.integers(0, 2**63 - 1)),
        gradient_clip=draw(st.none() | st.floats(1e-6, 1e6)),
        calibration=draw(parameters),
    )


def rewritten(data: bytes, change: Callable[[Any], None]) -> bytes:
    """A canonical document after a change to its content, written canonically again."""
    document = json.loads(data)
    change(document)
    return canonical(document)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A way to damage bytes: flip, drop, repeat, insert, cut."""
    how = draw(st.sampled_from(["flip", "drop", "repeat", "insert", "cut", "swap"]))
    where, other = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    byte = draw(st.integers(1, 255))

    def damage(data: bytes) -> bytes:
        at = min(int(where * len(data)), len(data) - 1)
        to = min(int(other * len(data)), len(data) - 1)
        match how:
            case "flip":
                return data[:at] + bytes([data[at] ^ byte]) + data[at + 1 :]
            case "drop":
                return data[:at] + data[at + 1 :]
            case "repeat":
                return data[:at] + data[min(at, to) : max(at, to) + 1] + data[at:]
            case "insert":
                return data[:at] + bytes([byte]) + data[at:]
            case "cut":
                return data[:at]
            case _:
                changed = bytearray(data)
                changed[at], changed[to] = data[to], data[at]
                return bytes(changed)

    return damage
