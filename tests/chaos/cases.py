"""The cases of `make kill-anywhere`: which process is killed where, in which runs, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from protos.faults import POINTS

MOMENT, ROUSED = "a random moment", "after another kill"


class Shape(NamedTuple):
    """A kind of run.

    Attributes:
        hidden: Units of the model: of many, contributions travel in calls of their own, of few, with
            the control stream.
        rounds: Of the run.
        distils: Whether the orchestrator distils too, for which it starts a process in every round.
        fails: Whether a site's training fails once in every round, so that a second attempt counts what the
            others have finished; and the model is looked at with the orchestrator's own data too.
        cut_short: Whether sites contribute what they have done when the deadline is near.
        processes: That may be killed.
    """

    hidden: int
    rounds: int
    distils: bool = False
    fails: bool = False
    cut_short: bool = False
    processes: tuple[str, ...] = ("daemon", "link", "trainer")


@dataclass(frozen=True)
class Case:
    """Where a process is killed.

    Attributes:
        process: daemon, gateway, compute, link or trainer.
        at: The point, or `MOMENT`.
        shape: Of the run.
        roused: Whether the process gets there only after another kill.
        number: Tells random moments apart.
    """

    process: str
    at: str
    shape: str
    roused: bool = False
    number: int = 0

    @property
    def name(self) -> str:
        """For people, and for the file of results."""
        words = [self.process, self.at, *([ROUSED] if self.roused else []), f"({self.shape})"]
        return " ".join([*words, *([str(self.number)] if self.number else [])])

    @classmethod
    def named(cls, name: str) -> Self:
        """The case of a name."""
        rest, _, shape = name.partition(" (")
        shape, _, number = shape.partition(")")
        process, _, at = rest.partition(" ")
        roused = at.endswith(ROUSED)
        at = at.removesuffix(ROUSED).strip()
        return cls(process, at, shape, roused, int(number or 0))


class Result(NamedTuple):
    """What came of a case.

    Attributes:
        name: Of the case.
        struck: Whether the process got to the point.
        identical: Whether the run is the undisturbed one.
        why: What is different.
    """

    name: str
    struck: bool
    identical: bool
    why: str = ""


@dataclass
class Disturbed:
    """A run in which processes were killed.

    Attributes:
        shape: Of the run.
        run: Its id.
        struck: The cases.
        missed: Those whose point was not reached.
        kills: Processes killed, also those that only roused.
        again: Steps that were trained more than once.
        problem: What is wrong with the run; empty for nothing.
    """

    shape: str
    run: str = ""
    struck: list[Case] = field(default_factory=list)
    missed: list[Case] = field(default_factory=list)
    kills: int = 0
    again: int = 0
    problem: str = ""


def points(names: Iterable[str]) -> set[str]:
    """The points that cases of these names are about."""
    return {at for name in names if (at := Case.named(name).at) in POINTS}
