"""What a site changed: base - local, computed tile by tile while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from protos.manifest import TILE_ELEMENTS, Manifest, TensorSpec
from protos.tensors import DTYPES, ArtefactFile, view_bytes


class Differences(MutableMapping[str, Tensor]):
    """The update of a trained model: **base - local** for parameters, else the local value.

    In fp32 or wider (`TensorSpec.wire_dtype`), on the CPU. A tensor comes to be when a strategy asks
    for it, and stays, so that it can be changed in place, until it is popped. What nobody asked for
    never exists as a whole: `written` makes it in one tile's memory.

    Args:
        covered: The tensors that the plan covers.
        base: The base.
        local: The trained model's tensors; they must not change any more.
    """

    def __init__(self, covered: Manifest, base: ArtefactFile, local: Mapping[str, Tensor]) -> None:
        self._base, self._local = base, local
        self._untouched = {spec.name: spec for spec in covered}
        self._given: dict[str, Tensor | None] = dict.fromkeys(self._untouched)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, computed at the first time."""
        value = self._given[name]
        if value is None:
            spec = self._untouched.pop(name)
            value = self._given[name] = self._whole(spec)
        return value

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Another value."""
        self._untouched.pop(name, None)
        self._given[name] = value

    def __delitem__(self, name: str) -> None:
        """Drop one, and its memory."""
        del self._given[name]
        self._untouched.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        """Names in the manifest's order."""
        return iter(self._given)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._given)

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name; computes nothing."""
        return name in self._given

    def _whole(self, spec: TensorSpec) -> Tensor:
        # Always a copy, so that a strategy can't reach into the model.
        dtype = DTYPES[spec.wire_dtype]
        local = self._local[spec.name].detach().to("cpu", dtype, copy=True)
        if spec.kind != "parameter":
            return local
        return torch.sub(self._base[spec.name].to(dtype), local, out=local)

    def untouched(self, name: str) -> bool:
        """Whether nobody asked for a tensor, or changed it."""
        return name in self._untouched

    def written(self, spec: TensorSpec) -> Iterator[memoryview]:
        """The bytes of an untouched tensor, tile by tile; each view is good until the next one."""
        dtype = DTYPES[spec.wire_dtype]
        local = self._local[spec.name].detach().reshape(-1)
        size = min(TILE_ELEMENTS, spec.elements)
        tile = torch.empty(size, dtype=dtype)
        base = tile if spec.dtype == spec.wire_dtype else torch.empty(size, dtype=local.dtype)
        for start in range(0, spec.elements, TILE_ELEMENTS):
            stop = min(start + TILE_ELEMENTS, spec.elements)
            mine, out = local[start:stop], tile[: stop - start]
            if spec.kind == "parameter":
                theirs = base[: stop - start]
                self._base.read_into(spec.name, start, theirs)
                torch.sub(theirs.to(dtype), mine.to("cpu", dtype), out=out)
            else:
                out.copy_(mine)
            yield view_bytes(out)
