"""Raw bytes and tensors: the same bits back, for every dtype and every awkward shape."""

from pathlib import Path

import pytest
import torch

from protos.errors import DataCorrupt, ManifestInvalid
from protos.manifest import DTYPE_BYTES, Manifest, TensorSpec
from protos.tensors import DTYPES, dtype_name, from_bytes, iterate_bytes, map_file, view_bytes

SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (0,), (3, 0, 2), (2, 3, 4)]


def bits(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Every byte pattern, those of NaN, infinity and subnormal numbers among them."""
    size = DTYPE_BYTES[dtype]
    count = torch.Size(shape).numel() * size
    if dtype == "bool":
        return bytes(i % 2 for i in range(count))
    return bytes((i * 37 + 251) % 256 for i in range(count))


def spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    kind = "parameter" if dtype.startswith(("float", "bfloat")) else "counter"
    return TensorSpec(name, shape, dtype, kind)  # type: ignore[arg-type]


def test_every_dtype_of_a_manifest_is_one_of_torch() -> None:
    assert set(DTYPES) == set(DTYPE_BYTES)
    for name, dtype in DTYPES.items():
        assert dtype.itemsize == DTYPE_BYTES[name]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_bits_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    data = bits(dtype, shape)
    for given in (data, bytearray(data), memoryview(data)):
        tensor = from_bytes(given, dtype, shape)
        assert tensor.dtype == DTYPES[dtype]
        assert tuple(tensor.shape) == shape
        assert dtype_name(tensor) == dtype
        assert bytes(view_bytes(tensor)) == data


def test_bytes_are_little_endian() -> None:
    assert bytes(view_bytes(torch.tensor([1, 258], dtype=torch.int32))) == bytes.fromhex(
        "0100000002010000"
    )
    assert from_bytes(bytes.fromhex("0000803f"), "float32", ()).item() == 1.0
    assert from_bytes(bytes.fromhex("803f"), "bfloat16", (1,)).item() == 1.0


def test_a_tensor_owns_its_copy() -> None:
    data = bytearray(b"\1\2\3\4")
    tensor = from_bytes(data, "uint8", (4,))
    data[0] = 99
    assert tensor.tolist() == [1, 2, 3, 4]
    tensor[1] = 7
    assert data[1] == 2


def test_a_view_is_no_copy() -> None:
    tensor = torch.zeros(4)
    view = view_bytes(tensor)
    tensor[0] = 1.0
    assert view[:4] == bytes.fromhex("0000803f")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12.0)[::2],
        torch.arange(3.0).expand(4, 3),
        torch.arange(12.0).view(3, 4)[:, 1:3],
        torch.arange(12.0).requires_grad_(),
        torch.arange(6.0).view(1, 2, 3).to(memory_format=torch.preserve_format).permute(2, 0, 1),
    ],
    ids=["transposed", "strided", "expanded", "slice", "with gradient", "permuted"],
)
def test_memory_order_does_not_matter(tensor: torch.Tensor) -> None:
    again = from_bytes(view_bytes(tensor), "float32", tuple(tensor.shape))
    assert torch.equal(again, tensor.detach())


@pytest.mark.parametrize("size", [0, 7, 9])
def test_wrong_number_of_bytes_is_refused(size: int) -> None:
    with pytest.raises(ManifestInvalid, match=rf"{size} bytes don't make float32 \[2\]"):
        from_bytes(bytes(size), "float32", (2,))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.uint16),
    ],
    ids=["complex", "uint16"],
)
def test_dtypes_that_no_manifest_has_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ManifestInvalid, match="can't be exchanged"):
        dtype_name(tensor)


@pytest.fixture
def every() -> tuple[Manifest, dict[str, torch.Tensor]]:
    """A manifest with every dtype in every shape, and tensors for it."""
    specs, tensors = [], {}
    for dtype in sorted(DTYPE_BYTES):
        for shape in SHAPES:
            name = f"{dtype}{list(shape)}"
            specs.append(spec(name, dtype, shape))
            tensors[name] = from_bytes(bits(dtype, shape), dtype, shape)
    return Manifest(tuple(specs)), tensors


def test_artefact_is_tensors_at_their_offsets_and_zeros_between(
    every: tuple[Manifest, dict[str, torch.Tensor]],
) -> None:
    manifest, tensors = every
    data = b"".join(iterate_bytes(manifest, tensors))
    assert len(data) == manifest.nbytes
    expected = bytearray(manifest.nbytes)
    for one, offset in zip(manifest, manifest.offsets, strict=True):
        expected[offset : offset + one.nbytes] = bits(one.dtype, one.shape)
    assert data == bytes(expected)


def test_mapped_file_equals_the_tensors(
    every: tuple[Manifest, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    manifest, tensors = every
    path = tmp_path / "model"
    path.write_bytes(b"".join(iterate_bytes(manifest, tensors)))
    before = path.read_bytes()
    mapped = map_file(path, manifest)
    assert list(mapped) == [s.name for s in manifest]
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert mapped[name].shape == tensor.shape
        assert bytes(view_bytes(mapped[name])) == bytes(view_bytes(tensor))
    # Copy on write: what a plug-in changes is its own.
    for tensor in mapped.values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_empty_models_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"")
    assert map_file(path, Manifest(())) == {}
    nothing = map_file(path, Manifest((TensorSpec("w", (0, 3), "bfloat16"),)))
    assert nothing["w"].shape == (0, 3)
    assert nothing["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("size", [0, 63, 65, 128])
def test_file_of_another_size_is_corrupt(size: int, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(size))
    with pytest.raises(DataCorrupt, match=f"model: {size} bytes where the manifest says 64"):
        map_file(tmp_path / "model", Manifest((TensorSpec("w", (3,), "float32"),)))


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({}, "tensor w is missing"),
        ({"w": torch.zeros(4)}, r"tensor w is float32 \[4\], but the manifest says float32 \[3\]"),
        ({"w": torch.zeros(3).double()}, r"tensor w is float64"),
        ({"w": torch.zeros(3, 1)}, r"tensor w is float32 \[3, 1\]"),
    ],
)
def test_tensors_that_the_manifest_does_not_describe_are_refused(
    tensors: dict[str, torch.Tensor], problem: str
) -> None:
    with pytest.raises(ManifestInvalid, match=problem) as caught:
        list(iterate_bytes(Manifest((TensorSpec("w", (3,), "float32"),)), tensors))
    assert caught.value.facts == {"tensor": "w"}
