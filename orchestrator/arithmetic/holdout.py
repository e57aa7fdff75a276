"""Judges a model on the orchestrator's own data: in a process without keys or network."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from orchestrator.arithmetic.models import build, load_part
from protos.manifest import Manifest
from strategies.holdout import SPLITS, score


def holdout(args: dict[str, Any]) -> dict[str, Any]:
    """The scores of a model on the orchestrator's own data.

    Tensors that are placed at the sites are as the task builds them: no site's are here.

    Args:
        args: As for `models.build`, and ``parts`` (place to {manifest, path}), ``device``.

    Returns:
        ``scores``: "holdout.accuracy" and so on from ``val_data``, "holdout_test.…" from
        ``test_data``, for what there is; ``cpu_seconds`` of this process since it began.
    """
    task, _, model, _ = build(args)
    for part in args["parts"].values():
        load_part(model, Path(part["path"]), Manifest.decode(Path(part["manifest"]).read_bytes()))
    model = model.to(args["device"])
    found: dict[str, float] = {}
    for split, name in SPLITS.items():
        data = getattr(task, name)()
        if data is not None:
            values = score(task, model, data, args["device"])
            found |= {f"{split}.{k}": v for k, v in values.items() if math.isfinite(v)}
    return {"scores": found, "cpu_seconds": time.process_time()}
