"""Raw little-endian bytes to tensors and back, for every dtype of a manifest.

The only place where torch meets the wire. Nothing here is ever unpickled.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from protos.errors import DataCorrupt, ManifestInvalid
from protos.manifest import ALIGNMENT, Manifest, TensorSpec

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("farflung's wire format is little-endian, and so must the machine be")

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


MAX_READ_BYTES = 1 << 30
"""Of one read; the kernel's own bound is just under 2 GiB."""


def dtype_name(tensor: Tensor) -> str:
    """The manifest's name of a tensor's dtype.

    Raises:
        ManifestInvalid: A dtype that manifests don't have (complex, quantised).
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ManifestInvalid(f"tensors of dtype {name} can't be exchanged")
    return name


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    flat = tensor.detach().contiguous().flatten()
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def from_bytes(data: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that owns a copy of some bytes.

    Raises:
        ManifestInvalid: The bytes don't make that dtype and shape.
    """
    out = torch.empty(shape, dtype=DTYPES[dtype])
    if len(data) != out.numel() * out.element_size():
        raise ManifestInvalid(f"{len(data)} bytes don't make {dtype} {list(shape)}")
    if out.numel():
        out.flatten().view(torch.uint8).numpy().data[:] = data
    return out


def iterate_bytes(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """An artefact's bytes in order, padding included, tensor by tensor.

    Raises:
        ManifestInvalid: A tensor is missing or has another shape or dtype than the manifest says.
    """
    for spec in manifest:
        data = view_bytes(_checked(spec, tensors))
        yield data
        if padding := -len(data) % ALIGNMENT:
            yield memoryview(bytes(padding))


def _checked(spec: TensorSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors.get(spec.name)
    if tensor is None:
        raise ManifestInvalid(f"tensor {spec.name} is missing", tensor=spec.name)
    if tuple(tensor.shape) != spec.shape or dtype_name(tensor) != spec.dtype:
        raise ManifestInvalid(
            f"tensor {spec.name} is {dtype_name(tensor)} {list(tensor.shape)}, "
            f"but the manifest says {spec.dtype} {list(spec.shape)}",
            tensor=spec.name,
        )
    return tensor.detach().cpu()


class ArtefactFile(Mapping[str, Tensor]):
    """The tensors of an artefact's file, of which nothing is read before it is asked for.

    By name they are mapped copy-on-write (pages are read when touched); `read_into` reads a range
    into memory that is there already, which costs less than touching fresh pages.

    Args:
        path: The file.
        manifest: What it holds.

    Raises:
        DataCorrupt: The file has another size than the manifest says.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != manifest.nbytes:
                raise DataCorrupt(
                    f"{path.name}: {size} bytes where the manifest says {manifest.nbytes}"
                )
            self._fd = os.dup(file.fileno())
        self._mapped: dict[str, Tensor] | None = None

    def __del__(self) -> None:
        """Close the file; mapped tensors stay good."""
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, mapped."""
        if self._mapped is None:
            self._mapped = self._map()
        return self._mapped[name]

    def __iter__(self) -> Iterator[str]:
        """Names in the manifest's order."""
        return (spec.name for spec in self.manifest)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.manifest)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.manifest

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read elements of a tensor into a contiguous CPU tensor of the same dtype.

        Args:
            name: Which tensor.
            start: First element, counted in the flattened tensor.
            out: As many elements as are wanted.

        Raises:
            DataCorrupt: The file ends before.
        """
        position = self.manifest.positions[name]
        at = self.manifest.offsets[position] + start * out.element_size()
        view = view_bytes(out)
        while view:
            got = os.preadv(self._fd, [view[:MAX_READ_BYTES]], at)
            if not got:
                raise DataCorrupt(f"tensor {name}: its file was cut", tensor=name)
            view, at = view[got:], at + got

    def _map(self) -> dict[str, Tensor]:
        if not self.manifest.nbytes:
            return {s.name: torch.empty(s.shape, dtype=DTYPES[s.dtype]) for s in self.manifest}
        flat = torch.frombuffer(mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        out = {}
        for spec, offset in zip(self.manifest, self.manifest.offsets, strict=True):
            part = flat[offset : offset + spec.nbytes]
            if spec.elements == 0:
                out[spec.name] = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
            else:
                out[spec.name] = part.view(DTYPES[spec.dtype]).view(spec.shape)
        return out


def map_file(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of an artefact's file, mapped (see `ArtefactFile`).

    Raises:
        DataCorrupt: The file has another size than the manifest says.
    """
    return dict(ArtefactFile(path, manifest))
