"""A learning rate that falls once over the whole run: what a cyclical one is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from protos.plan import Schedule
from strategies.context import Draft, Memo
from strategies.protocol import Family, Strategy


class GlobalDecay(Strategy):
    """One exponential decay from the first step of the run to its last, without restarts.

    With v in [0, 1] the done part of the run (rounds count alike)::

        lr(v) = lr * decay ** v

    Round i of R starts at ``lr * decay ** ((i - 1) / R)`` and ends where round i + 1 starts. In
    the co-learning literature this is the control "ELR", averaging with an ordinary decayed rate.

    Degenerate case: ``decay = 1`` leaves the schedule of the run file as it is.

    Attributes:
        decay: Last rate of the run as a part of the first, in (0, 1].
    """

    name: ClassVar[str] = "global_decay"
    family: ClassVar[Family] = "recipes"
    summary: ClassVar[str] = "The learning rate falls once over the whole run, without restarts."
    degenerate: ClassVar[Mapping[str, Any]] = {"decay": 1.0}

    decay: float = Field(0.05, gt=0, le=1)

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Set this round's piece of the curve."""
        if self.decay == 1:
            return draft, memo
        start = draft.schedule.lr * self.decay ** ((draft.round - 1) / draft.rounds)
        piece = Schedule(shape="exp", lr=start, decay=self.decay ** (1 / draft.rounds))
        return draft.but(schedule=piece), memo
