"""Whole models at the orchestrator: the first base, and the way to and from safetensors.

Only here and in `refining` is a whole model held, in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator.arithmetic.planning import stack_of
from protos.errors import InvalidInput
from protos.manifest import Manifest, Placement, TensorSpec
from protos.tensors import dtype_name, iterate_bytes, map_file
from strategies.loading import load_task
from strategies.stack import Stack
from strategies.task import Task, seed_everything

PLACES: tuple[Placement, ...] = ("shared", "frozen", "orchestrator")
"""The parts of a model that the orchestrator stores, each an artefact of its own."""

MANIFEST_KEY = "farflung.manifest"


def build(args: Mapping[str, Any]) -> tuple[Task, Stack, nn.Module, Manifest]:
    """The task, the stack, a new model, and its whole manifest.

    Args:
        args: ``task`` (name, source, params, settings, folder), ``stack``, ``seed``.
    """
    raw = args["task"]
    task = load_task(
        raw["name"], raw["source"], raw["params"], raw["settings"], Path(raw["folder"])
    )
    stack = stack_of(args["stack"])
    seed_everything(args["seed"], "model")
    model = stack.build(task)
    return task, stack, model, stack.manifest(model, task)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model by name, detached; extra state of modules left out."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def write_part(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Write the artefact of a manifest."""
    with path.open("wb") as file:
        for piece in iterate_bytes(manifest, tensors):
            file.write(piece)


def load_part(model: nn.Module, path: Path, manifest: Manifest) -> None:
    """Copy an artefact's tensors into a model."""
    own = state_of(model)
    with torch.no_grad():
        for name, tensor in map_file(path, manifest).items():
            own[name].copy_(tensor)


def first_model(args: dict[str, Any]) -> dict[str, Any]:
    """Build the first base from the orchestrator's own task and write its parts.

    Args:
        args: As for `build`, and ``out``: a folder; ``start``: a safetensors file whose tensors
            replace the random ones, or empty.

    Returns:
        Per place that has tensors: ``manifest`` (text) and ``path``.
    """
    _, _, model, manifest = build(args)
    if args.get("start"):
        given = read_safetensors(Path(args["start"]))[0]
        own = state_of(model)
        for spec in manifest:
            if spec.placement == "site":
                continue
            if spec.name not in given:
                raise InvalidInput(f"init: the file has no tensor {spec.name}", tensor=spec.name)
            if tuple(given[spec.name].shape) != spec.shape:
                raise InvalidInput(
                    f"init: tensor {spec.name} has the shape {list(given[spec.name].shape)} "
                    f"where the task's model has {list(spec.shape)}",
                    tensor=spec.name,
                )
            with torch.no_grad():
                own[spec.name].copy_(given[spec.name])
    return write_parts(Path(args["out"]), manifest, state_of(model))


def write_parts(
    folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Write each part of a model that has tensors."""
    out: dict[str, dict[str, str]] = {}
    for place in PLACES:
        part = manifest.of(place)
        if len(part) or place == "shared":
            path = folder / f"{place}.data"
            write_part(path, part, tensors)
            out[place] = {"manifest": part.encoded.decode(), "path": str(path)}
    return out


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Manifest | None]:
    """The tensors of a file, and the manifest in its metadata if it is one of our exports.

    Raises:
        InvalidInput: Not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"init: not a safetensors file ({type(error).__name__})") from None
    text = metadata.get(MANIFEST_KEY)
    return tensors, Manifest.decode(text.encode()) if text else None


def from_safetensors(args: dict[str, Any]) -> dict[str, Any]:
    """A first base from a file alone, where the orchestrator does not have the task.

    A foreign file says nothing of kinds: floating tensors are taken for parameters, others for
    counters. A site whose model differs refuses, naming the first tensor that does.

    Args:
        args: ``start`` (path), ``out`` (folder).
    """
    tensors, manifest = read_safetensors(Path(args["start"]))
    if manifest is None:
        manifest = Manifest(
            tuple(
                TensorSpec(
                    name,
                    tuple(t.shape),
                    dtype_name(t),
                    "parameter" if t.dtype.is_floating_point else "counter",
                )
                for name, t in tensors.items()
            )
        )
    return write_parts(Path(args["out"]), manifest, tensors)


def to_safetensors(args: dict[str, Any]) -> dict[str, Any]:
    """Write a stored model as one safetensors file, with its manifest in the metadata.

    Args:
        args: ``parts``: list of {manifest, path} (paths), ``out``: the file, ``metadata``.

    Returns:
        ``tensors``, ``parameters``, ``bytes``.
    """
    tensors: dict[str, Tensor] = {}
    specs: list[TensorSpec] = []
    for part in args["parts"]:
        manifest = Manifest.decode(Path(part["manifest"]).read_bytes())
        specs += manifest.tensors
        tensors.update(map_file(Path(part["path"]), manifest))
    whole = Manifest(tuple(specs))
    for spec in specs:
        for alias in spec.ties:
            tensors[alias] = tensors[spec.name].clone()
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in args["metadata"].items()}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        args["out"],
        metadata={**metadata, "format": "pt", MANIFEST_KEY: whole.encoded.decode()},
    )
    return {
        "tensors": len(specs),
        "parameters": sum(s.elements for s in specs if s.kind == "parameter"),
        "bytes": Path(args["out"]).stat().st_size,
    }
