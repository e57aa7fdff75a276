"""Evaluation at a site: sums over its samples, never samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protos.plan import Plan
from site_agent.pipe import Progress
from site_agent.trainer.batches import Batches
from site_agent.trainer.device import widened
from site_agent.trainer.watch import Watch
from site_agent.trainer.workload import Workload
from strategies.scores import Sums, add, flatten, is_classification, narrowed, sums_of

BATCH_SIZE = 512
SPLITS = ("val", "test")
KEPT_BYTES = 2**26
"""Outputs of a split larger than that are computed again for the second exchange, not kept."""


def assess(work: Workload, plan: Plan, watch: Watch) -> tuple[dict[str, Tensor], int]:
    """The sums that a plan asks for, by side payload name, and the number of val samples.

    For assess and baseline: ``val/…`` and ``test/…``, and what each strategy's ``evaluate`` adds
    over val as ``strategy/…``. For reassess: ``val_calibrated/…`` and ``test_calibrated/…``, after the
    transforms of the strategies for which the plan has a calibration map. Strategies that rate
    outputs after the map add ``strategy/val/…`` and ``strategy/test/…``: in reassess, or, where the
    stack has no map, in the others.
    """
    out: dict[str, Tensor] = {}
    samples = 0
    work.model.eval()
    if plan.kind == "assess":
        work.outputs.clear()
    for split in SPLITS:
        sums = _split(work, plan, split, watch)
        prefix = f"{split}_calibrated" if plan.kind == "reassess" else split
        for name, value in narrowed(sums).items():
            # A name with a slash is a strategy's own.
            out[name if "/" in name else f"{prefix}/{name}"] = value
        if split == "val" and sums:
            samples = int(sums["n"])
    return dict(work.stack.release(out)), samples


def kept(work: Workload, plan: Plan) -> bool:
    """Whether all that a plan asks for follows from outputs that were kept, not from the model."""
    splits = [split for split in SPLITS if work.loaded.dataset(split) is not None]
    return plan.kind == "reassess" and all(_key(plan, split) in work.outputs for split in splits)


def _key(plan: Plan, split: str) -> tuple[str, int, int, str, str]:
    return plan.run, plan.round, plan.attempt, plan.base, split


@torch.no_grad()
def _split(work: Workload, plan: Plan, split: str, watch: Watch) -> Sums:
    batches = work.batches(split, BATCH_SIZE)
    if batches is None:
        return {}
    total: Sums = {}
    done = 0
    for outputs, targets in _outputs(work, plan, split, batches):
        watch.check()
        if plan.kind == "reassess":
            if is_classification(work.task) and outputs.dim() > 2:
                outputs, targets = flatten(outputs, targets)
            outputs = work.stack.transform(outputs, plan.calibration)
        part = sums_of(work.task, outputs, targets)
        part |= _of_strategies(work, plan, split, outputs, targets)
        total = add(total, part)
        done += int(part["n"])
        if watch.due:
            watch.tell(
                Progress(
                    job=watch.job,
                    state="TRAINING",
                    done=done,
                    planned=float(batches.examples or 0),
                    unit=f"{split} samples",
                )
            )
    return total


def _outputs(work: Workload, plan: Plan, split: str, batches: Batches) -> Iterator[tuple[Any, Any]]:
    """Outputs and targets, batch by batch.

    Those of the first exchange serve the second one, too, if they are no larger than `KEPT_BYTES`:
    the model is the same, and to run it is what an assessment costs.
    """
    known = work.outputs.pop(_key(plan, split), None) if plan.kind == "reassess" else None
    if known is not None:
        yield from known
        return
    room, seen = KEPT_BYTES, []
    for batch in batches.epoch(None, 0):
        inputs, targets = work.task.unpack(batch)
        with work.device.autocast():
            outputs = work.task.forward(work.model, inputs)
        outputs = widened(outputs)
        yield outputs, targets
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            room -= outputs.nbytes + targets.nbytes
            seen.append((outputs, targets))
        else:
            room = -1
        if room < 0:
            seen.clear()
    if plan.kind != "reassess" and work.stack.mapping and room >= 0:
        work.outputs[_key(plan, split)] = seen


def _of_strategies(work: Workload, plan: Plan, split: str, outputs: Any, targets: Any) -> Sums:
    if is_classification(work.task):
        outputs, targets = flatten(outputs, targets)
    sums: Sums = {}
    if split == "val" and plan.kind != "reassess":
        sums |= work.stack.evaluate(outputs, targets)
    if plan.kind == "reassess" or not work.stack.mapping:
        sums |= work.stack.observe(outputs, targets, split)
    return {name: value.detach().to("cpu") for name, value in sums.items()}
