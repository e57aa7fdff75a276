"""A round's training half-way: what a trainer that was killed goes on from, to the same bits.

One safetensors file for a site: the model, the optimizer, the strategies' states and torch's random
state as tensors, all else as JSON in the file's header. A newer one is written beside it, synced, and
renamed over it, so that there are never more than two. It is of use to the same work alone: same plan,
code, settings, state to start from, and versions.

What lives in no tensor is not in it: a strategy's ``scratch`` is empty again after a resume, and so is
whatever a model keeps outside its parameters and buffers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from protos.chunks import sync_folder
from protos.errors import DataCorrupt
from protos.faults import reach
from site_agent.trainer import sealed
from strategies.stack import State

BRIEF_S = 1.0
"""An epoch that ends sooner after the last save is not worth one of its own."""

MODEL, OPTIMIZER, STRATEGY, RANDOM = "model/", "optimizer/", "strategy/", "random/"


@dataclass
class Checkpoint:
    """Where a round's training is, between two steps.

    Attributes:
        model: What training changes of the model.
        optimizer: State of the inner optimizer.
        strategies: States of the strategies.
        random: Random states that are tensors.
        about: The rest, as JSON has it: ``pace``, ``losses``, ``random``, ``examples``, ``data``.
    """

    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    strategies: State = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """Where a round's training is saved, and how often.

    Args:
        path: The file; others of its folder are not touched, but for ``.<name>.new``.
        mark: Digest of everything that decides the bits of this work.
        every_s: Seconds of training between two; None for every end of an epoch.
        clock: Seconds.
    """

    def __init__(
        self,
        path: Path,
        mark: str,
        every_s: float | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._path, self._mark, self._every_s, self._clock = path, mark, every_s, clock
        self._last = clock()

    def due(self, epoch_ended: bool) -> bool:
        """Whether it is time, between two steps."""
        passed = self._clock() - self._last
        if self._every_s is None:
            return epoch_ended and passed >= BRIEF_S
        return passed >= self._every_s

    def read(self) -> Checkpoint | None:
        """What this work got to before; None if there is nothing of it. Another work's is removed."""
        self._last = self._clock()
        try:
            found, about = sealed.read(self._path)
            if about.get("mark") == self._mark:
                return _parted(found, json.loads(about["about"]))
        except FileNotFoundError:
            return None
        except (DataCorrupt, KeyError, ValueError) as error:
            sys.stderr.write(f"training begins anew: {error}\n")
        self._path.unlink(missing_ok=True)
        reach("checkpoint.refused")
        return None

    def write(self, checkpoint: Checkpoint) -> None:
        """Save it durably. A disk that is full costs this one, not the round."""
        tensors = {MODEL + name: value for name, value in checkpoint.model.items()}
        tensors |= {OPTIMIZER + name: value for name, value in checkpoint.optimizer.items()}
        tensors |= {RANDOM + name: value for name, value in checkpoint.random.items()}
        for strategy, state in checkpoint.strategies.items():
            tensors |= {f"{STRATEGY}{strategy}/{key}": value for key, value in state.items()}
        about = {"mark": self._mark, "about": json.dumps(checkpoint.about)}
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            sealed.write(tensors, new, about)
            reach("checkpoint.written")
            fd = os.open(new, os.O_RDONLY)
            try:
                os.fsync(fd)
                reach("checkpoint.synced")
            finally:
                os.close(fd)
            new.replace(self._path)
            reach("checkpoint.renamed")
            sync_folder(self._path.parent)
            reach("checkpoint.saved")
        except (OSError, SafetensorError) as error:
            new.unlink(missing_ok=True)
            sys.stderr.write(f"training could not be saved half-way: {error}\n")
        self._last = self._clock()


def _parted(tensors: dict[str, Tensor], about: dict[str, Any]) -> Checkpoint:
    out = Checkpoint(about=about)
    for name, value in tensors.items():
        place, _, rest = name.partition("/")
        if place == "strategy":
            strategy, _, key = rest.partition("/")
            out.strategies.setdefault(strategy, {})[key] = value
        else:
            {"model": out.model, "optimizer": out.optimizer, "random": out.random}[place][rest] = (
                value
            )
    return out
