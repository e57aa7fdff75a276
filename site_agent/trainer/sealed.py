"""Safetensors files that say what they hold: what a disk changed of one is noticed, and not believed.

safetensors has no digest of its own. Here the header has one, of all names, types, shapes, bytes and texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from protos.digest import canonical, hasher
from protos.errors import DataCorrupt

SEAL = "blake3"


def write(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Write tensors into a file, on whatever device they are; not synced.

    Args:
        tensors: By name; they may share memory.
        path: The file.
        about: Texts beside them; none is called `SEAL`.

    Raises:
        OSError: It can't be written.
        SafetensorError: The same, in its words.
    """
    alone = _apart(tensors)
    save_file(alone, path, {**about, SEAL: _seal(alone, about)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, in memory of their own, and the texts beside them.

    A file without a seal, of an earlier version, is taken as it is.

    Raises:
        FileNotFoundError: There is none.
        DataCorrupt: It is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataCorrupt(f"{path.name} can't be read: {error}") from None
    seal = about.pop(SEAL, None)
    if seal is not None and seal != _seal(tensors, about):
        raise DataCorrupt(f"{path.name} is damaged: it is not what was written")
    return tensors, about


def _seal(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    shapes = {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}
    seal = hasher()
    seal.update(canonical([dict(about), shapes]))
    for name in sorted(tensors):
        seal.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return seal.hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them, which refuses two that share memory.

    Only those are cloned: a residual is as large as the model.
    """
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart
