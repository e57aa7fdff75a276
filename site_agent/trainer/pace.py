"""How far a round's local work is: in epochs, steps, tokens or seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Any

from protos.errors import ConfigInvalid
from protos.plan import Schedule, Work
from strategies.schedule import learning_rate


class Pace:
    """Counts a round's work and says when it is done.

    Args:
        work: How much is planned.
        schedule: Learning rate inside the round.
        per_epoch: Steps of one pass; None while that is unknown.
        clock: Seconds; for work in seconds.

    Raises:
        ConfigInvalid: A fraction of an epoch of a data set whose length is unknown.
    """

    def __init__(
        self,
        work: Work,
        schedule: Schedule,
        per_epoch: int | None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.unit, self.planned = work.unit, work.amount
        self.steps = self.tokens = self.epoch = self.in_epoch = 0
        self._schedule, self._clock = schedule, clock
        self._per_epoch = per_epoch
        self._started = clock()
        self._rate = learning_rate(schedule, 0.0)
        self._at_epoch_start = True
        self._limit: int | None = None
        if self.unit == "steps":
            self._limit = int(self.planned)
        elif self.unit == "epochs":
            if per_epoch is not None:
                # A fraction of an epoch ends within it; never less than one step.
                self._limit = max(1, round(self.planned * per_epoch))
            elif self.planned != int(self.planned):
                raise ConfigInvalid(
                    f"work: {self.planned} epochs of a data set whose length is unknown; "
                    "give whole epochs, or steps",
                    key="local.work",
                )

    def finished(self) -> bool:
        """Whether the planned work is done."""
        if self._limit is not None:
            return self.steps >= self._limit
        return self.done >= self.planned

    @property
    def done(self) -> float:
        """What is done, in ``unit``."""
        match self.unit:
            case "steps":
                return float(self.steps)
            case "tokens":
                return float(self.tokens)
            case "seconds":
                return self._clock() - self._started
            case _:
                return self.epochs

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        if self._per_epoch:
            return self.steps / self._per_epoch
        return float(self.epoch)

    @property
    def progress(self) -> float:
        """The done part of the round, in [0, 1]."""
        if self._limit is not None:
            return min(self.steps / self._limit, 1.0)
        return min(self.done / self.planned, 1.0)

    @property
    def total(self) -> int:
        """Planned steps; an estimate where the work is in tokens or seconds."""
        if self._limit is not None:
            return self._limit
        if self.steps and (progress := self.progress):
            return max(self.steps, math.ceil(self.steps / progress))
        return max(1, int(self.planned * (self._per_epoch or 1))) if self.unit == "epochs" else 1

    @property
    def current(self) -> float:
        """The learning rate of the last step."""
        return self._rate

    def rate(self) -> float:
        """The learning rate of the step that comes now."""
        if self._schedule.granularity == "step" or self._at_epoch_start:
            self._rate = learning_rate(self._schedule, self.progress)
            self._at_epoch_start = False
        return self._rate

    def step(self, tokens: int) -> None:
        """One step was made, over so many tokens."""
        self.steps += 1
        self.in_epoch += 1
        self.tokens += tokens

    def end_epoch(self, per_epoch: int | None) -> None:
        """A pass over the data ended; how many steps it had is known now."""
        self.epoch += 1
        self.in_epoch = 0
        self._at_epoch_start = True
        if self._per_epoch is None:
            self._per_epoch = per_epoch

    def saved(self) -> dict[str, Any]:
        """Where it is, as JSON."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "epoch": self.epoch,
            "in_epoch": self.in_epoch,
            "_rate": self._rate,
            "_at_epoch_start": self._at_epoch_start,
            "_per_epoch": self._per_epoch,
            "seconds": self._clock() - self._started,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` was asked."""
        self._started = self._clock() - saved["seconds"]
        for name, value in saved.items():
            if name != "seconds":
                setattr(self, name, value)
