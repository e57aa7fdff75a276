"""A storm of faults against a real federation, and what survived it.

    python -m tests.chaos.storm --minutes 20 --rate 300 --seed 1

Three sites and a daemon train rounds with an encoded update and its error feedback (int8), momentum at
the sites and at the orchestrator, and calibration; all three sites have to be in every round. For the
given minutes faults come at random times, so many an hour: which ones, where and when follows from the
seed. Whatever dies is started again at once, as systemd would; a run that is paused because a disk was
full is taken up again, as its operator would. Then the run is stopped, the ledger verified, every round
computed again, and the same run done in another home with no faults at all: it says what each model has
to be, and how many rounds an hour there are without faults.

The last line is all of that in figures. The exit code is 0 if the bars hold: every round replays to its
digests, `verify` finds nothing, the models are those of the undisturbed run, at least 95 % of the sites
that were asked took part in each round, at least 60 % of the rounds an hour, no internal error.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.federation import DAEMON
from tests.chaos.gale import ROUNDS, STUCK_S, Gale, Kind, Storm
from tests.support.clock import clocks_possible
from tests.support.disk import small_disks_possible
from tests.support.faulty import FaultyFederation
from tests.support.field import SITES, Field

LEAST_RATE, LEAST_PART = 0.6, 0.95
DISK_BYTES = 192 << 20
CALM_ROUNDS = 8
"""Without faults, before the storm and after it: other work of the machine is then about the same."""


@dataclass
class Outcome:
    """What survived.

    Attributes:
        gale: The storm itself.
        seed: Of it.
        calm_rate: Rounds an hour without faults.
        rounds: Committed in all, with those before and after the storm.
        replayed: Rounds that were computed again to the same digests.
        part: Share of the asked sites that took part, in the round with the fewest.
        unassessed: Rounds whose model was not assessed by all of them.
        identical: Whether every model is the undisturbed run's.
        problems: What `verify`, the logs and the replays say.
    """

    gale: Gale
    seed: int
    calm_rate: float = 0.0
    rounds: int = 0
    replayed: int = 0
    part: float = 0.0
    unassessed: int = 0
    identical: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Rounds an hour in the storm."""
        return self.gale.rounds / self.gale.seconds * 3600 if self.gale.seconds else 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing was lost or changed."""
        return (
            not self.gale.why
            and not self.problems
            and self.rounds > 0
            and self.replayed == self.rounds
            and self.part >= LEAST_PART
            and self.identical
        )

    @property
    def holds(self) -> bool:
        """Whether the bars hold."""
        return self.sound and self.rate >= LEAST_RATE * self.calm_rate

    def line(self) -> str:
        """The figures."""
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.gale.faults.items()))
        share = self.rate / self.calm_rate if self.calm_rate else 0.0
        return (
            f"storm of {self.gale.seconds / 60:.1f} min, seed {self.seed}:"
            f" {self.gale.faults.total()} faults ({kinds});"
            f" {self.gale.rounds} rounds, {self.rate:.0f} an hour of {self.calm_rate:.0f} without"
            f" faults ({share:.0%}); {self.gale.given_up} attempts given up,"
            f" {self.gale.resumed} times taken up by the operator;"
            f" replayed {self.replayed} of {self.rounds};"
            f" verify and logs: {len(self.problems)} problems; at least {self.part:.0%} of the"
            f" sites in each round; {self.unassessed} rounds not assessed by all;"
            f" {'identical' if self.identical else 'NOT IDENTICAL'}"
        )


def ground_at(root: Path, stormy: bool) -> Field:
    """A federation that keeps everything; the stormy one can be disturbed in every way."""
    faults: dict[str, Any] = {}
    if stormy:
        disks = {} if small_disks_possible() else dict.fromkeys(SITES, DISK_BYTES)
        faults = {"lines": True, "disks": disks, "clocks": not clocks_possible()}
    return Field(
        root,
        daemon={"retention": {"contributions": "all"}},
        trainer={"checkpoint": 0.2},
        **faults,
    )


def config_of(ground: Field, seed: int) -> dict[str, Any]:
    """The run: everything in it has a state to lose."""
    return ground.config(
        "storm",
        rounds=ROUNDS,
        seed=seed,
        task={"name": "blobs", "params": {"hidden": 60_000, "samples": 600}},
        cohort={"quorum": "all", "deadline_s": 600, "attempts": 20},
        local={
            "work": {"epochs": 3},
            "batch_size": 20,
            "lr": 0.05,
            "optimizer": {"name": "sgd", "momentum": 0.9, "keep_state": True},
        },
        strategy=[{"name": "int8"}, {"name": "fedavgm"}, {"name": "temperature"}],
    )


def launched(ground: Field, seed: int) -> str:
    """A run whose first round is committed: everything is warm."""
    federation = ground.federation
    run = federation.launch(config_of(ground, seed))
    federation.await_that(lambda: len(federation.committed(run)) >= 1, "the first round", STUCK_S)
    return run


def storm(
    root: Path,
    minutes: float,
    rate: float,
    seed: int,
    kinds: tuple[Kind, ...] = (),
    calm_rounds: int = CALM_ROUNDS,
) -> Outcome:
    """The storm, and what survived.

    Args:
        root: An empty folder. What the processes said stays in it.
        minutes: How long.
        rate: Faults an hour.
        seed: Of faults and run.
        kinds: Which faults; all that this machine can do by default.
        calm_rounds: How many before the storm and after it.
    """
    stormy, models = ground_at(root / "stormy", True), dict[int, str]()
    federation = stormy.federation
    with federation:
        blowing = Storm(stormy, rate, seed, kinds)
        outcome = Outcome(blowing.gale, seed)
        try:
            run = launched(stormy, seed)
            before_s = _seconds_of(federation, run, calm_rounds)
            blowing.blow(run, minutes * 60)
            if not blowing.gale.why:
                blowing.calm(run)
                _seconds_of(federation, run, 1)  # the one under way
                after_s = _seconds_of(federation, run, calm_rounds)
                outcome.calm_rate = 2 * calm_rounds / (before_s + after_s) * 3600
                federation.client.stop(run)
                federation.wait(run, STUCK_S)
            models = federation.committed(run)
            if not blowing.gale.why:
                _look_back(federation, run, outcome)
        except TimeoutError as error:
            blowing.gale.why = str(error)
        finally:
            _keep_logs(federation)
    if not blowing.gale.why:
        quiet = ground_at(root / "quiet", False)
        with quiet.federation:
            right = _undisturbed(quiet, seed, len(models))
        outcome.identical = right == models
        for number in sorted(n for n in models if right.get(n) != models[n])[:1]:
            outcome.problems.append(f"round {number} is the first with another model")
    return outcome


def _look_back(federation: FaultyFederation, run: str, outcome: Outcome) -> None:
    """Verify the run, compute its rounds again, and read the logs."""
    client, gale = federation.client, outcome.gale
    found = client.verify(run)
    outcome.problems += [one.text for one in (*found.problems, *found.erased)]
    rounds = [one for one in federation.rounds(run) if one.round and one.state == "committed"]
    gale.given_up = sum(one.attempt - 1 for one in rounds)
    outcome.rounds = len(rounds)
    outcome.unassessed = sum(bool(one.unassessed) for one in rounds)
    outcome.part = 1.0
    for one in rounds:
        done = client.replay(run, one.round)
        outcome.part = min(outcome.part, len(done.sites) / len(SITES))
        if done.identical:
            outcome.replayed += 1
        else:
            outcome.problems.append(f"round {one.round} does not replay: {done.compared}")
    for log in (federation.home.log / "daemon.jsonl", federation.root / "log" / f"{DAEMON}.log"):
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        outcome.problems += [line[:400] for line in lines if "internal error" in line]


def _seconds_of(federation: FaultyFederation, run: str, rounds: int) -> float:
    """How long so many rounds take, from now on."""
    began, last = time.monotonic(), len(federation.committed(run)) + rounds
    federation.await_that(
        lambda: len(federation.committed(run)) >= last, f"{rounds} rounds more", STUCK_S * rounds
    )
    return time.monotonic() - began


def _undisturbed(ground: Field, seed: int, rounds: int) -> dict[int, str]:
    """Models of a run that nothing disturbs."""
    federation, run = ground.federation, launched(ground, seed)
    _seconds_of(federation, run, max(0, rounds - len(federation.committed(run))))
    federation.client.stop(run, now=True)
    models = federation.committed(run)
    return {number: models[number] for number in range(1, rounds + 1)}


def _keep_logs(federation: FaultyFederation) -> None:
    """The sites' logs, whose disks go with their federation."""
    for site in SITES:
        if (log := federation.folder(site) / "log").exists():
            shutil.copytree(log, federation.root / "log" / site, dirs_exist_ok=True)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=300.0, help="faults an hour")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--root", type=Path, help="where to run; a folder that is removed if not given"
    )
    chosen = parser.parse_args()
    root = chosen.root or Path(tempfile.mkdtemp(prefix="storm-"))
    for why in (small_disks_possible(), clocks_possible()):
        if why:
            print(f"left out: {why}")
    outcome = storm(root, chosen.minutes, chosen.rate, chosen.seed)
    for problem in [*([outcome.gale.why] if outcome.gale.why else []), *outcome.problems]:
        print(f"problem: {problem}")
    if outcome.sound and not chosen.root:
        shutil.rmtree(root)
    else:
        print(f"logs and homes are in {root}")
    print(outcome.line())
    return 0 if outcome.holds else 1


if __name__ == "__main__":
    sys.exit(main())
