"""Co-learning: a cyclical learning rate, and more local epochs once the shared model settles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from protos.plan import Schedule, Work
from strategies.context import Draft, Memo
from strategies.protocol import Family, Strategy
from strategies.row import Row, Seed, Site, at_least, mean


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


_ALL = tuple(f"site{k}" for k in range(5))
_SITES = tuple(Site(name, {"part": k, "parts": 5}) for k, name in enumerate(_ALL))
_CYCLE = {"name": "co_learning", "decay": 0.25, "factor": 1.0}


def _arm(
    strategy: list[dict[str, Any]],
    rounds: int = 8,
    epochs: int = 5,
    alpha: float = 0.0,
    lr: float = 0.05,
    sites: tuple[str, ...] = _ALL,
) -> dict[str, Any]:
    """40 local epochs in all, unless ``strategy`` adds some."""
    return {
        "rounds": rounds,
        "strategy": strategy,
        "task": {"params": {"alpha": alpha}},
        "init": {"from": f"site:{sites[0]}"},
        "cohort": {"sites": list(sites)},
        "local": {"work": {"epochs": epochs}, "lr": lr},
    }


def _holds(seeds: Sequence[Seed]) -> list[str]:
    accuracy = {arm: 100 * mean(seeds, arm) for arm in ROW.arms}
    shares = [seed["iid-ile"]["exchanges"] / seed["iid-clr-1"]["exchanges"] for seed in seeds]
    out = at_least("CLR over ELR", accuracy["iid-clr"] - accuracy["iid-elr"], 0.5)
    for split, gap in (("iid", -1.5), ("skew", -3.0)):
        clr = accuracy[f"{split}-clr"]
        out += at_least(f"{split}: CLR over centralised", clr - accuracy["centralised"], gap)
        out += at_least(f"{split}: CLR over one site", clr - accuracy[f"{split}-alone"], 4.0)
    out += at_least("CLR+ILE over one epoch", accuracy["iid-ile"] - accuracy["iid-clr-1"], -0.7)
    out += at_least("exchanges saved by ILE", 1 - max(shares), 0.7)
    out += at_least("CLR at a high rate", accuracy["iid-hot-clr"], 88.0)
    return out + at_least("100 - constant high rate", 100 - accuracy["iid-hot-constant"], 20.0)


ROW = Row(
    number=5,
    method="co_learning",
    claim="Averaging works for deep nets if the rate is cyclical and local epochs grow with calm.",
    control="a rate decayed over the run, a constant rate, centralised training, one site alone",
    data="M5",
    task="m5",
    sites=(*_SITES, Site("union", {})),
    run={
        "task": {"name": "m5"},
        "cohort": {"quorum": "all", "deadline_s": 900.0},
        "local": {"batch_size": 32, "optimizer": {"name": "sgd", "momentum": 0.9}},
        "assess": {"every": 1000},  # only the last round
    },
    arms={
        "centralised": _arm([{"name": "global_decay"}], rounds=1, epochs=40, sites=("union",)),
        "iid-clr": _arm([_CYCLE]),
        "iid-clr-1": _arm([_CYCLE], rounds=40, epochs=1),
        "iid-ile": _arm(
            [{"name": "co_learning", "epsilon": 0.2, "max_epochs": 8.0}], rounds=9, epochs=1
        ),
        "iid-elr": _arm([{"name": "global_decay"}]),
        "iid-constant": _arm([]),
        "iid-hot-clr": _arm([{**_CYCLE, "decay": 0.1}], lr=0.25),
        "iid-hot-constant": _arm([], lr=0.25),
        "iid-alone": _arm([_CYCLE], sites=("site0",)),
        "skew-clr": _arm([_CYCLE], alpha=0.5),
        "skew-elr": _arm([{"name": "global_decay"}], alpha=0.5),
        "skew-constant": _arm([], alpha=0.5),
        "skew-alone": _arm([_CYCLE], alpha=0.5, sites=("site0",)),
    },
    holds=_holds,
    reproduced="partly",
)
