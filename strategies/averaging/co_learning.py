"""Co-learning: a cyclical learning rate, and more local epochs once the shared model settles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from protos.plan import Schedule, Work
from strategies.context import Draft, Memo
from strategies.protocol import Family, Strategy


class CoLearning(Strategy):
    r"""Model averaging with CLR and ILE, the default strategy.

    Two decisions, both in the plan of round i, for all sites alike::

        CLR   lr(u) = lr * decay ** u            u: done part of the round, in [0, 1)
        ILE   T_1 = local.work.epochs
              T_i = min(factor * T_{i-1}, max_epochs)   if delta_{i-1} <= epsilon
                    T_{i-1}                              otherwise
              delta_i = ||reduced update of round i|| / ||its base||

    CLR: the rate decays inside the round and starts anew at every round. ILE: the number of local
    epochs T grows when the shared model has stopped moving; delta is taken over parameters,
    before outer optimizer and refinement, and statistics such as BatchNorm's are no part of it.
    The average itself is weighted with example counts, never with epochs.

    Degenerate case: ``decay = 1, factor = 1`` is FedAvg, the empty stack.

    Departures: the body of the paper was not at hand when this was written, so the constants are
    a recollection, and every one of them is a field. The rate decays per step by default, not per
    epoch. ILE has a cap, since with CLR delta shrinks by itself and a threshold once met is met
    again (uncapped, 12 rounds from T_1 = 2 came to 1,891 local epochs in a trial of ours). ILE
    needs work in epochs; with steps, tokens or seconds only CLR acts.

    Attributes:
        decay: Lowest rate of the cycle as a part of the peak, in (0, 1]; 1 leaves the schedule of
            the run file as it is.
        shape: exp as above; cosine or triangular between the same two rates.
        granularity: Whether the rate moves with every step or with every local epoch.
        epsilon: Threshold for delta, >= 0. It depends on model and peak rate: look at the deltas
            of a first run (on small images 0.02 to 0.2 was of use, 0.01 never fired).
        factor: Growth of the local epochs, >= 1; 1 switches ILE off.
        max_epochs: No round gets more by growth, >= 1.
    """

    name: ClassVar[str] = "co_learning"
    family: ClassVar[Family] = "averaging"
    summary: ClassVar[str] = "Cyclical learning rate; local epochs grow when the model settles."
    paper: ClassVar[str] = (
        "Xu, Mi, Feng, Wang, Chen, Zheng, Lan: Collaborative Deep Learning Across Multiple Data "
        "Centers, 2018, arXiv:1810.06877"
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"decay": 1.0, "factor": 1.0}

    decay: float = Field(0.25, gt=0, le=1)
    shape: Literal["exp", "cosine", "triangular"] = "exp"
    granularity: Literal["step", "epoch"] = "step"
    epsilon: float = Field(0.01, ge=0)
    factor: float = Field(2.0, ge=1, le=100)
    max_epochs: float = Field(40.0, ge=1)

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Set this round's cycle, and its local epochs from the last committed round's delta.

        The memo holds ``epochs`` (T_i), ``judged`` (the round whose delta is already in it) and
        ``grown`` (whether this round's T was raised), so that asking again for the same round
        gives the same answer, whether with the memo of before or of after.
        """
        if self.decay < 1:
            draft = draft.but(
                schedule=Schedule(
                    shape=self.shape,
                    lr=draft.schedule.lr,
                    decay=self.decay,
                    granularity=self.granularity,
                )
            )
        if draft.work.epochs is None:
            return draft, memo
        if not memo:  # the first round it acts in
            memo = {"epochs": draft.work.epochs, "judged": draft.last.round, "grown": False}
        elif memo["judged"] < draft.last.round:
            epochs = float(memo["epochs"])
            settled = draft.last.relative_change <= self.epsilon  # NaN is not settled
            grown = max(epochs, min(self.factor * epochs, self.max_epochs)) if settled else epochs
            memo = {"epochs": grown, "judged": draft.last.round, "grown": grown > epochs}
        return draft.but(work=Work(epochs=memo["epochs"])), memo
