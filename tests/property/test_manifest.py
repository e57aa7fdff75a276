"""Manifests and indexes: one encoding each, everything bounded before anything is made of it."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protos.digest import canonical, digest
from protos.errors import ManifestInvalid
from protos.manifest import (
    ALIGNMENT,
    CHUNK_BYTES,
    DTYPE_BYTES,
    MAX_BYTES,
    MAX_DIMENSIONS,
    MAX_ENCODED_BYTES,
    MAX_TENSORS,
    TILE_ELEMENTS,
    Index,
    Manifest,
    TensorSpec,
)
from tests.support.documents import damages, digests, indexes, json_values, manifests, rewritten

Damage = Callable[[bytes], bytes]

ROW = TensorSpec("w", (2, 3), "float32").as_json()


def encoded(**changes: Any) -> bytes:
    """A manifest of one tensor, some of whose fields are something else."""
    return canonical({"version": 1, "tensors": [{**ROW, **changes}]})


# -- round trips ----------------------------------------------------------------------------------


@given(manifests())
def test_manifest_comes_back(manifest: Manifest) -> None:
    again = Manifest.decode(manifest.encoded)
    assert again == manifest
    assert again.digest == manifest.digest == digest(manifest.encoded)


@given(indexes())
def test_index_comes_back(index: Index) -> None:
    assert Index.decode(index.encoded) == index
    assert Index.decode(index.encoded).digest == index.digest == digest(index.encoded)


def test_the_encoding_is_fixed() -> None:
    """Every digest in every ledger hangs on it."""
    assert Manifest((TensorSpec("w", (2, 3), "float32", ties=("é",)),)).encoded == (
        '{"tensors":[{"dtype":"float32","group":"all","kind":"parameter","name":"w",'
        '"placement":"shared","shape":[2,3],"ties":["é"]}],"version":1}'.encode()
    )
    assert Index("0" * 64, 3, ("1" * 64,)).encoded == (
        b'{"chunk_bytes":1048576,"chunks":["%s"],"manifest":"%s","nbytes":3,"version":1}'
        % (b"1" * 64, b"0" * 64)
    )


# -- damage ---------------------------------------------------------------------------------------


@given(manifests(), damages())
def test_damaged_manifest_never_passes_for_the_old_one(manifest: Manifest, damage: Damage) -> None:
    data = damage(manifest.encoded)
    try:
        found = Manifest.decode(data)
    except ManifestInvalid:
        return
    # What is accepted has exactly these bytes, so that the digest in a plan or header decides.
    assert found.encoded == data
    assert (found == manifest) == (data == manifest.encoded) == (found.digest == manifest.digest)


@given(indexes(), damages())
def test_damaged_index_never_passes_for_the_old_one(index: Index, damage: Damage) -> None:
    data = damage(index.encoded)
    try:
        found = Index.decode(data)
    except ManifestInvalid:
        return
    assert found.encoded == data
    assert (found == index) == (data == index.encoded) == (found.digest == index.digest)


@given(st.binary(max_size=60))
@example(b"null")
@example(b"[]")
@example(b"1")
@example(b'"\\ud800"')
@example(b'{"\\ud800":1}')
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    for decode in (Manifest.decode, Index.decode):
        with pytest.raises(ManifestInvalid):
            decode(data)


@given(st.sampled_from(sorted(ROW)), json_values)
@example("dtype", [])
@example("kind", {})
@example("placement", [])
@example("name", "\ud800")
def test_any_value_of_any_field_is_read_or_refused(field: str, value: Any) -> None:
    data = json.dumps(
        {"tensors": [{**ROW, field: value}], "version": 1}, sort_keys=True, separators=(",", ":")
    ).encode()
    try:
        found = Manifest.decode(data)
    except ManifestInvalid:
        return
    assert found.encoded == data


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded().replace(b":1}", b": 1}"), id="white space"),
        pytest.param(encoded() + b"\n", id="after the end"),
        pytest.param(b"\xef\xbb\xbf" + encoded(), id="byte order mark"),
        pytest.param(encoded().decode().encode("utf-16"), id="another encoding of text"),
        pytest.param(encoded().replace(b'"w"', b'"\\u0077"'), id="needless escape"),
        pytest.param(encoded().replace(b"[2,3]", b"[2.0,3]"), id="number in other words"),
        pytest.param(encoded().replace(b'"version":1', b'"version":true'), id="true for one"),
        pytest.param(encoded().replace(b'"version":1', b'"version":1.0'), id="1.0 for one"),
        pytest.param(encoded().replace(b'"version":1', b'"version":2'), id="another version"),
        pytest.param(encoded().replace(b'"version":1', b'"version":1,"version":1'), id="twice"),
        pytest.param(
            encoded().replace(b'"shape":[2,3]', b'"shape":[9],"shape":[2,3]'), id="key twice"
        ),
        pytest.param(encoded().replace(b'"ties":[]', b'"ties":[],"x":1'), id="another key"),
        pytest.param(encoded().replace(b',"ties":[]', b""), id="missing key"),
        pytest.param(
            b'{"version":1,"tensors":[' + canonical(ROW) + b"]}", id="keys in another order"
        ),
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes) -> None:
    assert Manifest.decode(encoded()).encoded == encoded()
    with pytest.raises(ManifestInvalid):
        Manifest.decode(data)


INDEX = Index("0" * 64, 3, ("1" * 64,)).encoded


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(INDEX + b" ", id="after the end"),
        pytest.param(INDEX.replace(b"[", b"[ "), id="white space"),
        pytest.param(INDEX.replace(b'"chunks":["1', b'"chunks":["\\u0031'), id="escape"),
        pytest.param(INDEX.replace(b'"version":1', b'"version":true'), id="true for one"),
        pytest.param(INDEX.replace(b"1048576", b"1048576.0"), id="number in other words"),
        pytest.param(INDEX.replace(b'"nbytes":3', b'"nbytes":9,"nbytes":3'), id="key twice"),
        pytest.param(b'{"version":1,' + INDEX[1:-13] + b"}", id="keys in another order"),
    ],
)
def test_what_is_not_canonical_is_no_index(data: bytes) -> None:
    """Two encodings of one index would be two names of one artefact."""
    assert json.loads(data) == json.loads(INDEX)
    with pytest.raises(ManifestInvalid, match="not in canonical form"):
        Index.decode(data)


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [MAX_BYTES]},
        {"shape": [1 << 22, 1 << 22]},
        {"shape": [MAX_BYTES + 1, 0]},
        {"shape": [1 << 200]},
        {"shape": [-1, -1]},
        {"shape": [True]},
        {"shape": [2.0]},
        {"shape": ["2"]},
        {"shape": [1] * (MAX_DIMENSIONS + 1)},
        {"shape": {"0": 1}},
        {"name": ""},
        {"name": "é" * 257},
        {"name": 5},
        {"group": ""},
        {"dtype": "complex64"},
        {"dtype": "float32 "},
        {"dtype": "int64"},  # a parameter is floating
        {"dtype": "bool", "kind": "statistic"},
        {"kind": "counter"},
        {"kind": "gradient"},
        {"placement": "elsewhere"},
        {"ties": ["w"]},
        {"ties": ["v", "v"]},
        {"ties": [""]},
        {"ties": ["v"] * 65},
        {"ties": "v"},
    ],
    ids=str,
)
def test_bounds_of_a_tensor(changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid):
        Manifest.decode(encoded(**changes))


def test_refusal_names_the_tensor() -> None:
    with pytest.raises(ManifestInvalid, match=r"tensor 0 \(layer\.7\): at most 16 dimensions"):
        Manifest.decode(encoded(name="layer.7", shape=[1] * 17))


def test_tensors_together_are_bounded_too() -> None:
    half = {**ROW, "shape": [MAX_BYTES // 8]}
    rows = [{**half, "name": name} for name in "abc"]
    assert Manifest.decode(canonical({"version": 1, "tensors": rows[:2]})).nbytes == MAX_BYTES
    with pytest.raises(ManifestInvalid, match="exceed"):
        Manifest.decode(canonical({"version": 1, "tensors": rows}))


def test_a_name_stands_once() -> None:
    for other in (ROW, {**ROW, "name": "v", "ties": ["w"]}):
        with pytest.raises(ManifestInvalid, match="twice"):
            Manifest.decode(canonical({"version": 1, "tensors": [ROW, other]}))


def test_number_of_tensors_is_bounded() -> None:
    with pytest.raises(ManifestInvalid, match=f"at most {MAX_TENSORS}"):
        Manifest.decode(canonical({"version": 1, "tensors": [0] * (MAX_TENSORS + 1)}))


@pytest.mark.parametrize("decode", [Manifest.decode, Index.decode])
def test_size_is_looked_at_first(decode: Callable[[bytes], object]) -> None:
    data = bytes(MAX_ENCODED_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(ManifestInvalid, match="exceeds"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("decode", [Manifest.decode, Index.decode])
@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"version":1,"tensors":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"tensors":[' + b"9" * 10_000 + b'],"version":1}',
        b'{"tensors":[NaN],"version":NaN}',
        b'{"tensors":Infinity,"version":1}',
    ],
    ids=["deep", "deep keys", "deep and closed", "long number", "NaN", "Infinity"],
)
def test_hostile_json_is_refused(decode: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        decode(data)


@given(indexes(), st.integers(-3, 3).filter(bool), digests)
def test_index_has_as_many_chunks_as_its_size_needs(
    index: Index, difference: int, extra: str
) -> None:
    def change(document: Any) -> None:
        chunks = [*document["chunks"], extra, extra, extra]
        document["chunks"] = chunks[: max(0, len(index.chunks) + difference)]

    if len(index.chunks) + difference < 0:
        return
    with pytest.raises(ManifestInvalid, match="do not make"):
        Index.decode(rewritten(index.encoded, change))


@pytest.mark.parametrize(
    "changes",
    [
        {"nbytes": -1, "chunks": []},
        {"nbytes": 0.0, "chunks": []},
        {"nbytes": False, "chunks": []},
        {"nbytes": MAX_BYTES + 1},
        {"chunk_bytes": CHUNK_BYTES // 2},
        {"chunks": {"0": "1" * 64}},
        {"chunks": ["1" * 63]},
        {"chunks": ["A" * 64]},
        {"chunks": ["1" * 64 + "\n"]},
        {"chunks": [["1" * 64]]},
        {"manifest": ""},
        {"manifest": None},
        {"version": 2},
    ],
    ids=str,
)
def test_bounds_of_an_index(changes: dict[str, Any]) -> None:
    index = Index("0" * 64, 3, ("1" * 64,))
    with pytest.raises(ManifestInvalid):
        Index.decode(rewritten(index.encoded, lambda d: d.update(changes)))


# -- what follows from a manifest -----------------------------------------------------------------


@given(manifests())
def test_tensors_lie_apart_and_aligned(manifest: Manifest) -> None:
    end = 0
    for spec, offset in zip(manifest, manifest.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + spec.nbytes
    assert end <= manifest.nbytes < end + ALIGNMENT


@given(st.lists(st.integers(0, 3 * TILE_ELEMENTS), max_size=4))
def test_tiles_cover_every_element_once_and_never_cross_a_tensor(sizes: list[int]) -> None:
    manifest = Manifest(tuple(TensorSpec(f"t{i}", (n,), "float32") for i, n in enumerate(sizes)))
    covered = dict.fromkeys(range(len(sizes)), 0)
    for number, tile in enumerate(manifest.tiles):
        assert tile.index == number
        assert tile.spec is manifest.tensors[tile.tensor]
        assert tile.start == covered[tile.tensor]
        assert 0 < tile.elements <= TILE_ELEMENTS
        covered[tile.tensor] = tile.stop
    assert covered == dict(enumerate(sizes))


def test_tile_borders_are_those_of_the_whole_wherever_a_part_is_looked_at() -> None:
    specs = tuple(TensorSpec(n, (TILE_ELEMENTS + 5,), "float32", group=n) for n in "abc")
    whole = {(t.spec.name, t.start, t.stop) for t in Manifest(specs).tiles}
    for names in ("a", "bc", "ac"):
        part = Manifest(specs).covering(names)
        assert [s.name for s in part] == list(names)
        assert {(t.spec.name, t.start, t.stop) for t in part.tiles} == {
            row for row in whole if row[0] in names
        }


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_updates_travel_in_fp32_or_wider(dtype: str) -> None:
    if dtype.startswith(("float", "bfloat")):
        expected = "float64" if dtype == "float64" else "float32"
        assert TensorSpec("w", (), dtype).wire_dtype == expected
    else:
        assert TensorSpec("w", (), dtype, "counter").wire_dtype == dtype


@given(manifests())
def test_parts_by_placement_and_group_are_the_manifest_in_its_order(manifest: Manifest) -> None:
    parts = [manifest.of(p) for p in ("shared", "site", "orchestrator", "frozen")]
    assert sum(len(p) for p in parts) == len(manifest)
    assert manifest.of("shared", "site", "orchestrator", "frozen") == manifest
    assert manifest.covering(None) == manifest
    assert manifest.covering([]) == Manifest(())
    for part in parts:
        assert list(part) == [t for t in manifest if t in part.tensors]
