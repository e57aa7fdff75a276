"""The manifest of a model: which tensors it has, where they live, and which of them are one."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from protos.manifest import Kind, Manifest, Placement, TensorSpec


def describe(
    model: nn.Module, placements: Sequence[tuple[str, str]], groups: Sequence[tuple[str, str]]
) -> Manifest:
    """The manifest of a model; the last matching pattern wins.

    Parameters that require no gradient are ``frozen`` unless a pattern says otherwise. Tied
    tensors appear once, under the first of their names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    ties: dict[str, list[str]] = {}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module: not exchanged
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            ties.setdefault(owner, []).append(name)
    specs = []
    for name in first.values():
        tensor = state[name]
        parameter = parameters.get(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        kind: Kind = "parameter" if parameter is not None else "statistic"
        if not tensor.dtype.is_floating_point:
            kind = "counter"
        placement = "frozen" if parameter is not None and not parameter.requires_grad else "shared"
        for pattern, value in placements:
            if fnmatchcase(name, pattern):
                placement = value
        group = "all"
        for pattern, value in groups:
            if fnmatchcase(name, pattern):
                group = value
        specs.append(
            TensorSpec(
                name, tuple(tensor.shape), dtype, kind, group, cast(Placement, placement),
                tuple(ties.get(name, ())),
            )
        )  # fmt: skip
    return Manifest(tuple(specs))
