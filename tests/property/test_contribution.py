"""Headers and plans: one encoding each, every number bounded, every byte of a payload accounted for."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protos.contribution import MAX_EXAMPLES, MAX_HEADER_BYTES, Header, PayloadSpec
from protos.digest import canonical, digest
from protos.errors import ManifestInvalid
from protos.manifest import MAX_BYTES, Manifest, TensorSpec
from protos.plan import MAX_PLAN_BYTES, Plan, Schedule, TaskChoice, Work
from tests.support.documents import (
    damages,
    digests,
    headers,
    json_values,
    manifests,
    plans,
    rewritten,
)

Damage = Callable[[bytes], bytes]

HEADER = Header(
    plan_id="r/1/1/train",
    work_digest="0" * 64,
    site="north",
    base="1" * 64,
    manifest="2" * 64,
    index="3" * 64,
    examples=10,
)
PLAN = Plan(
    run="r",
    round=1,
    attempt=1,
    site="north",
    task=TaskChoice(name="t"),
    work=Work(epochs=1),
    schedule=Schedule(lr=0.1),
)


# -- round trips ----------------------------------------------------------------------------------


@given(headers())
def test_header_comes_back(header: Header) -> None:
    again = Header.decode(header.encode())
    assert again == header
    assert again.encode() == header.encode()
    assert again.digest == header.digest == digest(header.encode())


@settings(max_examples=25)
@given(plans())
def test_plan_comes_back(plan: Plan) -> None:
    again = Plan.decode(plan.encode())
    assert again == plan
    assert again.encode() == plan.encode()
    assert again.work_digest == plan.work_digest


@given(headers(), damages())
def test_damaged_header_never_passes_for_the_old_one(header: Header, damage: Damage) -> None:
    data = damage(header.encode())
    try:
        found = Header.decode(data)
    except ManifestInvalid:
        return
    assert found.encode() == data
    assert (found.digest == header.digest) == (data == header.encode())


@given(plans(), damages())
def test_damaged_plan_never_passes_for_the_old_one(plan: Plan, damage: Damage) -> None:
    data = damage(plan.encode())
    try:
        found = Plan.decode(data)
    except ManifestInvalid:
        return
    assert found.encode() == data


@pytest.mark.parametrize("document", [HEADER, PLAN], ids=["header", "plan"])
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b" ",
        lambda data: data.replace(b'"north"', b'"nort\\u0068"'),
        lambda data: data.replace(b'"site":"north"', b'"site":"south","site":"north"'),
        lambda data: data.replace(b'{"a', b'{ "a').replace(b'{"b', b'{ "b'),
        lambda data: data.replace(b".0", b"", 1),
        lambda data: b"[" * 100_000,
        lambda data: b'{"site":' * 100_000,
        lambda data: b"null",
        lambda data: b"",
        lambda data: b"\xff" + data,
    ],
    ids=[
        "white space", "escape", "key twice", "space", "other words", "deep", "deep keys", "null",
        "nothing", "not text",
    ],
)  # fmt: skip
def test_what_is_not_canonical_is_refused(
    document: Header | Plan, change: Callable[[bytes], bytes]
) -> None:
    data = change(document.encode())
    assert data != document.encode()
    with pytest.raises(ManifestInvalid):
        type(document).decode(data)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("where", ["metrics", "epochs"])
def test_no_number_of_a_header_is_nan_or_infinite(where: str, number: str) -> None:
    marked = HEADER.model_copy(update={"metrics": {"a": 77.5}, "epochs": 77.5}).encode()
    key = '"a"' if where == "metrics" else '"epochs"'
    data = marked.replace(f"{key}:77.5".encode(), f"{key}:{number}".encode())
    assert data != marked
    with pytest.raises(ManifestInvalid):
        Header.decode(data)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
@pytest.mark.parametrize("where", ["task", "payload", "calibration", "schedule"])
def test_no_number_of_a_plan_is_nan_or_infinite(where: str, number: str) -> None:
    """Free parameters too: a digest can't be taken over them, and a site must say so, not fall."""
    value: Any = 77.5
    update: dict[str, Any] = {
        "task": TaskChoice(name="t", params={"a": [value]}),
        "payload": {"s": {"a": value}},
        "calibration": {"s": value},
        "schedule": Schedule(lr=value),
    }
    marked = PLAN.model_copy(update={where: update[where]}).encode()
    data = marked.replace(b"77.5", number.encode())
    assert data != marked
    with pytest.raises(ManifestInvalid):
        Plan.decode(data)


@given(st.sampled_from(sorted(json.loads(HEADER.encode()))), json_values)
@example("payloads", [[]])
@example("blocks", [True])
def test_any_value_of_a_headers_field_is_read_or_refused(field: str, value: Any) -> None:
    data = rewritten(HEADER.encode(), lambda d: d.update({field: value}))
    try:
        found = Header.decode(data)
    except ManifestInvalid:
        return
    assert found.encode() == data


@pytest.mark.parametrize(
    "changes",
    [
        {"examples": -1},
        {"examples": MAX_EXAMPLES + 1},
        {"examples": 1.5},
        {"examples": "5"},
        {"examples": None},
        {"steps": -1},
        {"epochs": -0.5},
        {"epochs": 1},  # canonical is 1.0
        {"site": ""},
        {"site": "../../etc"},
        {"site": "a" * 64},
        {"plan_id": "x" * 257},
        {"work_digest": "0" * 63},
        {"work_digest": "G" * 64},
        {"work_digest": ""},
        {"base": "x"},
        {"index": "0" * 65},
        {"kind": "steal"},
        {"metrics": {str(i): 1.0 for i in range(257)}},
        {"metrics": {"a": "1"}},
        {"packages": {str(i): "1" for i in range(65)}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_bounds_of_a_header(changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid):
        Header.decode(rewritten(HEADER.encode(), lambda d: d.update(changes)))


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"name": "nostrategy"}, False),
        ({"name": "s/" + "x" * 255}, False),
        ({"shape": [1 << 43]}, True),
        ({"shape": [1 << 44]}, False),
        ({"shape": [1 << 43, 1 << 43]}, False),
        ({"shape": [-1]}, False),
        ({"shape": [-4, -4]}, False),
        ({"shape": [0, 1 << 45]}, False),
        ({"shape": [1] * 17}, False),
        ({"dtype": "float128"}, False),
        ({"merge": "steal"}, False),
    ],
    ids=str,
)
def test_bounds_of_a_side_payload(changes: dict[str, Any], valid: bool) -> None:
    spec = {"dtype": "float16", "merge": "sum", "name": "s/x", "shape": [2], **changes}
    data = rewritten(HEADER.encode(), lambda d: d.update(payloads=[spec]))
    if valid:
        assert Header.decode(data).payloads[0].nbytes <= MAX_BYTES
    else:
        with pytest.raises(ManifestInvalid):
            Header.decode(data)


def test_number_of_side_payloads_is_bounded_and_their_names_differ() -> None:
    spec = {"dtype": "float32", "merge": "sum", "shape": [1]}
    many = [{**spec, "name": f"s/{i}"} for i in range(1025)]
    assert len(
        Header.decode(rewritten(HEADER.encode(), lambda d: d.update(payloads=many[1:]))).payloads
    )
    for wrong in (many, [many[0], many[0]]):
        with pytest.raises(ManifestInvalid):
            Header.decode(rewritten(HEADER.encode(), lambda d, w=wrong: d.update(payloads=w)))


@pytest.mark.parametrize(
    ("decode", "limit"), [(Header.decode, MAX_HEADER_BYTES), (Plan.decode, MAX_PLAN_BYTES)]
)
def test_size_is_looked_at_first(decode: Callable[[bytes], object], limit: int) -> None:
    with pytest.raises(ManifestInvalid, match="exceeds"):
        decode(b" " * (limit + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"round": -1},
        {"attempt": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"seed": 1 << 63},
        {"deadline_s": 0.0},
        {"run": "a/b"},
        {"site": ""},
        {"base": "xyz"},
        {"accepts": ["xyz"]},
        {"kind": "other"},
        {"gradient_clip": 0.0},
        {"work": {"epochs": None, "seconds": None, "steps": None, "tokens": None}},
        {"work": {"epochs": 1.0, "seconds": None, "steps": 1, "tokens": None}},
        {"work": {"epochs": 0.0, "seconds": None, "steps": None, "tokens": None}},
        {"work": {"epochs": None, "seconds": None, "steps": 1.5, "tokens": None}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_bounds_of_a_plan(changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid):
        Plan.decode(rewritten(PLAN.encode(), lambda d: d.update(changes)))


def test_refusal_names_the_key() -> None:
    with pytest.raises(ManifestInvalid, match=r"^header: examples: "):
        Header.decode(rewritten(HEADER.encode(), lambda d: d.update(examples=-1)))
    with pytest.raises(ManifestInvalid, match=r"^plan: schedule\.lr: "):
        Plan.decode(rewritten(PLAN.encode(), lambda d: d["schedule"].update(lr=-1.0)))


# -- the work digest ------------------------------------------------------------------------------


@settings(max_examples=25)
@given(plans(), digests)
def test_work_is_the_same_in_the_next_attempt(plan: Plan, other: str) -> None:
    again = plan.model_copy(
        update={"attempt": plan.attempt + 1, "deadline_s": plan.deadline_s + 1, "accepts": (other,)}
    )
    assert again.work_digest == plan.work_digest
    assert again.id != plan.id


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "s"}, {"round": 2}, {"site": "south"}, {"kind": "assess"}, {"base": "4" * 64},
        {"manifest": "4" * 64}, {"frozen": "4" * 64}, {"groups": ("a",)}, {"seed": 1},
        {"batch_size": 3}, {"work": Work(epochs=2)}, {"schedule": Schedule(lr=0.2)},
        {"task": TaskChoice(name="t", params={"a": 1})}, {"payload": {"s": 1}},
        {"gradient_clip": 1.0}, {"last_counted": "4" * 64}, {"calibration": {"s": 1}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_whatever_decides_the_result_is_in_the_work_digest(changes: dict[str, Any]) -> None:
    assert PLAN.model_copy(update=changes).work_digest != PLAN.work_digest


def test_plan_id_is_run_round_attempt_kind() -> None:
    assert PLAN.id == "r/1/1/train"


# -- where everything lies in a payload -------------------------------------------------------------


def laid_out(header: Header, manifest: Manifest) -> list[tuple[int, int]]:
    spans = sorted(header.block_spans(manifest)) + list(header.payload_spans(manifest).values())
    return [span for span in spans if span[0] < span[1]]


@settings(max_examples=25)
@given(manifests(), headers())
def test_raw_tiles_then_side_payloads_fill_the_payload(manifest: Manifest, header: Header) -> None:
    header = header.model_copy(update={"kind": "train", "codec": "", "blocks": ()})
    assert [b - a for a, b in header.block_spans(manifest)] == [
        t.wire_nbytes for t in manifest.tiles
    ]
    end = 0
    for start, stop in laid_out(header, manifest):
        assert start == end
        end = stop
    assert end == header.expected_nbytes(manifest)


@settings(max_examples=25)
@given(manifests(), headers(), st.data())
def test_encoded_blocks_lie_as_the_table_says(
    manifest: Manifest, header: Header, data: st.DataObject
) -> None:
    n = len(manifest.tiles)
    sizes = tuple(data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)))
    header = header.model_copy(update={"kind": "train", "codec": "half", "blocks": sizes})
    assert [b - a for a, b in header.block_spans(manifest)] == list(sizes)
    side = sum(p.nbytes for p in header.payloads)
    assert header.expected_nbytes(manifest) == sum(sizes) + side


@pytest.mark.parametrize(
    "blocks", [(), (5,), (5, 5, 5), (-1, 5), (MAX_BYTES + 1, 5), (5, 2 * 12 + 257)], ids=str
)
def test_a_block_table_that_does_not_fit_is_refused(blocks: tuple[int, ...]) -> None:
    manifest = Manifest((TensorSpec("a", (3,), "float32"), TensorSpec("b", (3,), "float32")))
    header = HEADER.model_copy(update={"codec": "half", "blocks": blocks})
    with pytest.raises(ManifestInvalid, match="site north"):
        header.block_spans(manifest)


@settings(max_examples=25)
@given(manifests(), headers())
def test_a_first_model_is_the_artefact_of_its_manifest(manifest: Manifest, header: Header) -> None:
    header = header.model_copy(update={"kind": "init"})
    side = sum(p.nbytes for p in header.payloads)
    assert header.expected_nbytes(manifest) == manifest.nbytes + side
    for tile, (start, stop) in zip(manifest.tiles, header.block_spans(manifest), strict=True):
        offset = manifest.offsets[tile.tensor]
        assert offset <= start <= stop <= offset + tile.spec.nbytes


@pytest.mark.parametrize("kind", ["assess", "baseline", "reassess"])
@settings(max_examples=25)
@given(manifests(), headers())
def test_an_assessment_is_side_payloads_only(kind: str, manifest: Manifest, header: Header) -> None:
    header = header.model_copy(update={"kind": kind})
    assert header.block_spans(manifest) == []
    assert header.expected_nbytes(manifest) == sum(p.nbytes for p in header.payloads)


def test_side_payloads_longer_than_the_payload_are_refused() -> None:
    spec = PayloadSpec(name="s/x", shape=(4,), dtype="float32")
    header = HEADER.model_copy(update={"payloads": (spec,)})
    assert header.tail_spans(16) == {"s/x": (0, 16)}
    with pytest.raises(ManifestInvalid, match="site north: the side payloads exceed 15 bytes"):
        header.tail_spans(15)


def test_canonical_has_no_form_for_nan() -> None:
    for value in (float("nan"), float("inf"), {"a": [-float("inf")]}):
        with pytest.raises(ValueError):
            canonical(value)
