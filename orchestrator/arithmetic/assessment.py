"""Pools what the sites sent as sums, and turns sums into scores and calibration maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orchestrator.arithmetic.bounds import OutOfBounds, bounded
from orchestrator.arithmetic.planning import payload_loader, stack_of
from protos.errors import InvalidInput
from protos.tensors import view_bytes
from strategies.scores import reliability, scores
from strategies.stack import Stack

SPLITS = ("val", "test", "val_calibrated", "test_calibrated")


def _merge(name: str, rule: str, tensors: list[Tensor], examples: list[float]) -> Tensor | None:
    if rule in ("concatenate", "condensed"):
        return torch.cat(tensors)
    if any(t.shape != tensors[0].shape for t in tensors):
        shapes = [list(t.shape) for t in tensors]
        raise InvalidInput(f"side payload {name}: the sites sent different shapes {shapes}")
    if rule == "keep per site":
        return None
    if rule == "sum":
        if not tensors[0].dtype.is_floating_point:
            return torch.stack(tensors).sum(0, dtype=torch.int64)
        return torch.stack([t.double() for t in tensors]).sum(0)
    total = sum(examples)
    weights = [e / total if total else 1 / len(examples) for e in examples]
    return sum((t.double() * w for t, w in zip(tensors, weights, strict=True)), torch.zeros(()))


def pool(args: dict[str, Any]) -> dict[str, Any]:
    """Merge side payloads over the sites by their rules and write them into one file.

    Args:
        args: ``sites``: list of {site, examples, payloads: {name: spec with merge}} in site-id
            order; ``out``: a file.

    Returns:
        ``payloads``: name to {path, offset, nbytes, dtype, shape, merge}. A payload that only some
        sites sent is merged over those.
    """
    names = sorted({n for row in args["sites"] for n in row["payloads"]})
    out: dict[str, Any] = {}
    at = 0
    with open(args["out"], "wb") as file, payload_loader() as load:  # noqa: PTH123
        for name in names:
            rows = [r for r in args["sites"] if name in r["payloads"]]
            rule = rows[0]["payloads"][name]["merge"]
            if any(r["payloads"][name]["merge"] != rule for r in rows):
                raise InvalidInput(f"side payload {name}: the sites disagree on its merge rule")
            tensors = [load(r["payloads"][name]) for r in rows]
            merged = _merge(name, rule, tensors, [float(r["examples"]) for r in rows])
            if merged is None:
                continue
            data = view_bytes(merged)
            file.write(data)
            out[name] = {
                "path": args["out"],
                "offset": at,
                "nbytes": len(data),
                "dtype": str(merged.dtype).removeprefix("torch."),
                "shape": list(merged.shape),
                "merge": rule,
            }
            at += len(data)
    return {"payloads": out}


def _by_split(payloads: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for name, tensor in payloads.items():
        split, _, key = name.partition("/")
        if split in SPLITS:
            out.setdefault(split, {})[key] = tensor
    return out


def assess(args: dict[str, Any]) -> dict[str, Any]:
    """Scores, reliability curves and calibration maps from the sites' sums.

    Args:
        args: ``stack`` and ``sites`` as for `pool`; ``calibrate``: whether to fit the map;
            ``seconds`` and ``memory_bytes``: what a strategy may use; ``without``: names of
            strategies that are not asked.

    Returns:
        ``scores``: pooled, "split.name"; ``sites``: the same per site; ``reliability``: by split;
        ``calibration``: fitted parameters of the strategy that changes outputs, by its name;
        ``settled``: of those that look at outputs after it; ``awaited``: whether they have still to
        see them; ``reports``: numbers by strategy; ``failed``: why a strategy's map or scores are
        not there, by its name.
    """
    with payload_loader() as load:
        per_site = {
            row["site"]: {name: load(spec) for name, spec in row["payloads"].items()}
            for row in args["sites"]
        }
    pooled: dict[str, Tensor] = {}
    with_val = 0
    for own in per_site.values():
        if float(own.get("val/n", own.get("val_calibrated/n", 0))):
            with_val += 1
        for name, tensor in own.items():
            pooled[name] = pooled[name] + tensor.double() if name in pooled else tensor.double()
    calibrate = args.get("calibrate", True)
    out: dict[str, Any] = {
        "scores": _flat(pooled),
        "sites": {site: _flat(own) for site, own in per_site.items()},
        "reliability": {s: _curve(sums) for s, sums in _by_split(pooled).items() if "bins" in sums},
        "calibration": {}, "settled": {}, "reports": {}, "failed": {},
    }  # fmt: skip
    left_out = set(args.get("without", ()))
    for choice in args["stack"]:
        if choice["name"] in left_out:
            continue
        alone = stack_of([choice])
        try:
            with bounded(args["seconds"], args["memory_bytes"]):
                found = _asked(alone, pooled, per_site, with_val, calibrate)
        except OutOfBounds as error:
            out["failed"][choice["name"]] = str(error)
            continue
        for key in ("calibration", "settled", "reports", "scores"):
            out[key] |= found[key]
        for site, own in found["sites"].items():
            out["sites"][site] |= own
    # A site shows outputs to those in the second exchange if its stack has a map, fitted or not.
    stack = stack_of(args["stack"])
    waiting = {s.name for s in stack.rating} - left_out - out["failed"].keys()
    out["awaited"] = calibrate and bool(stack.mapping and waiting)
    return out


def _asked(
    stack: Stack,
    pooled: dict[str, Tensor],
    per_site: dict[str, dict[str, Tensor]],
    with_val: int,
    calibrate: bool,
) -> dict[str, Any]:
    """What one strategy, alone in a stack, makes of the sums."""
    fitted = stack.calibrate(pooled, with_val) if calibrate else {}
    settled = stack.settle(pooled, with_val)
    known = {name: m.parameters for name, m in settled.items()}
    return {
        "calibration": {name: m.parameters for name, m in fitted.items()},
        "settled": known,
        "reports": {name: dict(m.report) for name, m in (fitted | settled).items()},
        "scores": stack.rate(pooled, known),
        "sites": {site: stack.rate(own, known) for site, own in per_site.items()},
    }


def _curve(sums: dict[str, Tensor]) -> dict[str, list[float | None]]:
    """A reliability curve as `views.Reliability` wants it: None where a bin is empty."""
    bins = reliability(sums)
    return {
        "count": [b.samples for b in bins],
        "confidence": [b.confidence if b.samples else None for b in bins],
        "accuracy": [b.accuracy if b.samples else None for b in bins],
    }


def _flat(payloads: dict[str, Tensor]) -> dict[str, float]:
    out = {}
    for split, sums in _by_split(payloads).items():
        out.update({f"{split}.{name}": value for name, value in scores(sums).items()})
    return out
