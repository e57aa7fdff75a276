"""Whole models at the orchestrator: the first base, and the way to and from safetensors.

Only here and in `refining` is a whole model held; with a task's or a strategy's code, in a process of
its own.
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
from strategies.holdout import check_holdout
from strategies.loading import load_task
from strategies.manifest import describe
from strategies.needs import AT_THE_ORCHESTRATOR, check_needs
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
    task, stack = _task_of(args), stack_of(args["stack"])
    seed_everything(args["seed"], "model")
    model = stack.build(task)
    return task, stack, model, stack.manifest(model, task)


def _task_of(args: Mapping[str, Any]) -> Task:
    raw = args["task"]
    return load_task(
        raw["name"], raw["source"], raw["params"], raw["settings"], Path(raw["folder"])
    )


def check_task(args: dict[str, Any]) -> dict[str, Any]:
    """See that the task here has what a run needs of it, and that its model can be built.

    Args:
        args: As for `build`, and ``holdout``: whether models are judged by its data.

    Raises:
        ConfigInvalid: What is missing, for what.
    """
    task, stack = _task_of(args), stack_of(args["stack"])
    check_needs(stack.strategies, task, AT_THE_ORCHESTRATOR)
    if args["holdout"]:
        check_holdout(task)
    if args["holdout"] or stack.having("build"):
        build(args)
    return {}


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

    A start replaces the random tensors. It is a model of the run, or one of the task alone, which
    the strategies then change: a head that knows five classes is widened with what it has learned.

    Args:
        args: As for `build`, and ``out``: a folder; ``start``: a safetensors file, or empty;
            ``parts``: place to {manifest, path} of a stored model that is the start, or empty.

    Returns:
        Per place that has tensors: ``manifest`` (text) and ``path``.

    Raises:
        InvalidInput: The start is neither; names the first tensor that it lacks.
    """
    task, stack, model, manifest = build(args)
    given = read_safetensors(Path(args["start"]))[0] if args.get("start") else {}
    for part in args.get("parts", {}).values():
        stored = Manifest.decode(Path(part["manifest"]).read_bytes())
        given.update(map_file(Path(part["path"]), stored))
    if not given:
        return write_parts(Path(args["out"]), manifest, state_of(model))
    problem = _misfit(given, manifest)
    if problem and stack.having("build"):
        seed_everything(args["seed"], "model")
        plain = task.model()
        known = describe(plain, list(task.placement().items()), ())
        if not _misfit(given, known):
            _take(plain, given, known)
            model = stack.build(task, plain)
            return write_parts(Path(args["out"]), stack.manifest(model, task), state_of(model))
    if problem:
        raise InvalidInput(f"init: {problem}")
    _take(model, given, manifest)
    return write_parts(Path(args["out"]), manifest, state_of(model))


def _misfit(given: Mapping[str, Tensor], manifest: Manifest) -> str:
    """Why some tensors are not a model of a manifest; empty if they are."""
    for spec in manifest:
        if spec.placement == "site":
            continue
        if spec.name not in given:
            return f"the start has no tensor {spec.name}"
        if tuple(given[spec.name].shape) != spec.shape:
            return (
                f"tensor {spec.name} has the shape {list(given[spec.name].shape)} where the task's "
                f"model has {list(spec.shape)}"
            )
    return ""


def _take(model: nn.Module, given: Mapping[str, Tensor], manifest: Manifest) -> None:
    own = state_of(model)
    with torch.no_grad():
        for spec in manifest:
            if spec.placement != "site":
                own[spec.name].copy_(given[spec.name])


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
    return _write_safetensors(args, Manifest(tuple(specs)), tensors)


def deploy(args: dict[str, Any]) -> dict[str, Any]:
    """Write what the ``export`` hooks make of a stored model as one safetensors file.

    Runs the task's and the strategies' code: in a process without keys or network.

    Args:
        args: As for `build`, and ``round``, ``parts`` (place to {manifest, path}), ``out`` (the
            file), ``metadata``.

    Returns:
        As `to_safetensors`, and ``manifest`` (text) of what was written, ``stored`` (parameters of
        the model as it is stored), ``at_sites`` (names of tensors that are part of what is deployed
        and are not in the file, since they never leave their site).

    Raises:
        InvalidInput: The task here does not build the model of that round; names a tensor.
    """
    task, stack, model, manifest = build(args)
    for place in PLACES:
        own, part = manifest.of(place), args["parts"].get(place)
        given = Manifest.decode(Path(part["manifest"]).read_bytes()) if part else Manifest(())
        if differing := _differing(own, given):
            raise InvalidInput(
                f"task {args['task']['name']}: it builds another model than the one of round "
                f"{args['round']}; the first tensor that differs is {differing}",
                tensor=differing,
            )
        if part:
            load_part(model, Path(part["path"]), given)
    before = model.state_dict(keep_vars=True)
    at_sites = {id(before[spec.name]) for spec in manifest.of("site")}
    deployed = Stack(stack.active(args["round"])).export(model.eval())
    after = deployed.state_dict(keep_vars=True)
    specs, missing = [], []
    for spec in describe(deployed, list(task.placement().items()), ()):
        # What a hook passes on is the same tensor, whatever it is called now.
        if id(after[spec.name]) in at_sites:
            missing.append(spec.name)
        else:
            specs.append(spec)
    whole = Manifest(tuple(specs))
    written = _write_safetensors(args, whole, {t.name: after[t.name].detach() for t in whole})
    parameters = sum(t.elements for t in manifest.of(*PLACES) if t.kind == "parameter")
    return {
        **written,
        "manifest": whole.encoded.decode(),
        "stored": parameters,
        "at_sites": missing,
    }


def _differing(own: Manifest, given: Manifest) -> str:
    """The first tensor that only one of two manifests has, or that has another shape or type."""

    def of(spec: TensorSpec) -> tuple[object, ...]:
        return (spec.name, spec.shape, spec.dtype)

    for one, other in ((own, given), (given, own)):
        for spec in one:
            if spec.name not in other or of(other[spec.name]) != of(spec):
                return spec.name
    return ""


def _write_safetensors(
    args: Mapping[str, Any], whole: Manifest, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    for spec in whole:
        for alias in spec.ties:
            tensors[alias] = tensors[spec.name].clone()
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in args["metadata"].items()}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        args["out"],
        metadata={**metadata, "format": "pt", MANIFEST_KEY: whole.encoded.decode()},
    )
    return {
        "tensors": len(whole),
        "parameters": sum(s.elements for s in whole if s.kind == "parameter"),
        "bytes": Path(args["out"]).stat().st_size,
    }
