"""Scenes: what has to happen for a process to get to a point that no killed run of `arena` leads to.

A run is one round long, and goes on by a round for each scene. In that round something happens on purpose, a
contribution that is not finite, a line that breaks between two chunks, a site that joins, and a process is
killed where that leads. The run has to end as one of the same seed in which nothing is killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.child import Child
from protos.errors import Unavailable
from protos.faults import Fault
from tests.chaos.arena import Arena, End
from tests.chaos.cases import Case, Disturbed
from tests.support.faulty import LOOK_S, ORCHESTRATOR
from tests.support.field import SITES

PLAYS, CUT_SHORT = "scenes", "cut-short"
"""Shapes. In the second one a site contributes the one step that it has made when the deadline is near,
which changes the model: the run that it is compared with has the same done to it."""

ROUNDS = 6
"""Of a run, at least."""
WAIT_S = 90.0
SITE, OTHERS = SITES[0], SITES[1:]
SLOW_MBIT, BRIEFLY_S, LONG_S = 8, 4.0, 60.0

Play = Callable[["Stage", Case], None]


class Stage(Arena):
    """An `Arena` in which scenes are played; its sites have lines of their own.

    Attributes:
        run: The one under way.
        joined: Sites that joined.
    """

    run = ""
    joined = 0
    _rounds = 0
    _killed: Case | None = None

    def cases(self, shape: str) -> list[Case]:
        """Where a process is killed in scenes of a shape."""
        return [Case(*key, shape) for key in SCENES[shape]]

    def disturb(self, cases: Sequence[Case], seed: int) -> Disturbed:
        """One run with a scene for each case."""
        out = Disturbed(cases[0].shape)
        self._begin(out.shape, seed)
        out.run = self.run
        try:
            for case in cases:
                struck = self._played(case)
                (out.struck if struck else out.missed).append(case)
                out.kills += struck
                self._end()
            self._fill_up(out.shape, ROUNDS)
        except (TimeoutError, RuntimeError) as error:
            out.problem = str(error)
            out.struck = out.struck or [case]
        self._recover(out, [End(name) for name in (ORCHESTRATOR, *SITES)])
        if not out.problem:
            self._of_rounds(out.shape, self._rounds)
            out.problem = self._difference(out, out.shape, seed)
        return out

    def undisturbed(self, shape: str, seed: int, fails: bool = False) -> dict[int, tuple[Any, ...]]:
        """What a run comes to in which nobody is killed."""
        if shape != CUT_SHORT:
            return super().undisturbed(shape, seed, fails)
        rounds = self.shapes[shape].rounds
        self._begin(shape, seed)
        self._fill_up(shape, rounds)
        return self.rounds(self.run)

    def _fill_up(self, shape: str, rounds: int) -> None:
        while self._rounds < rounds:
            if shape == CUT_SHORT:
                self.cut_short()
            else:
                self.go_on()
            self._end()

    def _begin(self, shape: str, seed: int) -> None:
        self._of_rounds(shape, 1)
        self.run, self._rounds = self.launch(shape, seed), 1
        self._end()

    def _of_rounds(self, shape: str, rounds: int) -> None:
        self.shapes[shape] = self.shapes[shape]._replace(rounds=rounds)

    def _played(self, case: Case) -> bool:
        """Play a scene; whether the process was killed."""
        self.ground.federation.forget_traces()
        self._killed = None
        try:
            SCENES[case.shape][case.process, case.at](self, case)
        except TimeoutError as error:
            print(f"  {case.name}: {str(error).partition(chr(10))[0]}", flush=True)
        return self._killed == case

    def _end(self) -> None:
        """Everything is as it should be, and the run gets to its last round."""
        federation = self.ground.federation
        for name in (ORCHESTRATOR, *SITES):
            federation.forgive(name)
        for site in SITES:
            federation.mend(site)
        self.ground.clear()

        def ended() -> bool:
            state, reason, _ = self.told(self.run)
            if state in ("paused", "failed"):
                raise RuntimeError(f"the run is {state}: {reason}\n{federation.told()}")
            if state == "stopped" and self.serves():
                self.go_on()
            return state == "finished" and self.serves()

        self.until(ended, "the run's end")
        federation.await_sites(SITES)

    # -- what scenes are made of ---------------------------------------------------------------------

    def go_on(self) -> None:
        """One more round."""
        self._rounds += 1
        self.ground.federation.client.extend(self.run, self._rounds)

    def until(self, so: Callable[[], bool], what: str, revive: bool = True) -> None:
        """Wait until something is so; what dies meanwhile is started again."""
        federation, deadline = self.ground.federation, time.monotonic() + WAIT_S
        while not so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {what} within {WAIT_S:g} s\n{federation.told()}")
            if revive:
                federation.revive(wait=False)
            time.sleep(LOOK_S)

    def reached(self, who: str, process: str, at: str, often: int = 1, revive: bool = True) -> None:
        """Wait until a process has got somewhere since the traces were forgotten."""
        trace, count = self.ground.federation.trace, (process, at)
        self.until(lambda: trace(who).count(count) >= often, f"{at} of {who}", revive)

    def arm(self, case: Case) -> None:
        """From now on the process is killed there."""
        self.ground.federation.kill(self._end_of(case), at=case.at, process=case.process)

    def struck(self, who: str) -> None:
        """Wait until what was to go wrong at one end has gone wrong."""
        self.until(lambda: self.ground.federation.struck(who), f"the fault of {who}")

    def killed(self, case: Case, end: str = "") -> None:
        """Wait until the process was killed."""
        self.struck(end or self._end_of(case))
        self._killed = case

    def hold(self) -> Path:
        """The site's training stands still in its next step, until the file is gone."""
        gate = self.ground.switches[SITE] / "gate"
        gate.touch()
        return gate

    def held(self) -> None:
        """Wait until it does."""
        self.until((self.ground.switches[SITE] / "reached").exists, f"{SITE} held")

    def last(self) -> None:
        """The round goes on until only the site is missing, which is held."""
        self.hold()
        self.go_on()
        self.held()
        self.reached(ORCHESTRATOR, "daemon", "record.told", len(OTHERS))

    def release(self) -> None:
        """The site trains on."""
        (self.ground.switches[SITE] / "gate").unlink()

    def stop_run(self) -> None:
        """As its operator does who wants it to end at once."""
        with suppress(Unavailable):  # it is killed over it
            self.ground.federation.client.stop(self.run, now=True)

    def cut_short(self, case: Case | None = None) -> None:
        """A round in which the site has made one step when it is asked for what it has done."""
        self.ground.federation.forget_traces()
        self.hold()
        if case is not None:
            self.arm(case)
        self.go_on()
        if case is not None:
            self.killed(case)
        # A trainer that is killed over it has another one told.
        often = 2 if case is not None and case.process == "trainer" else 1
        self.reached(SITE, "trainer", "finish.heard", often)
        self.release()

    @staticmethod
    def _end_of(case: Case) -> str:
        return ORCHESTRATOR if case.process == "daemon" else SITE


# -- the scenes -------------------------------------------------------------------------------------------


def _plain(stage: Stage, case: Case) -> None:
    """Every round of a model of this size gets there."""
    stage.arm(case)
    stage.go_on()
    stage.killed(case)


def _not_finite(stage: Stage, case: Case) -> None:
    (stage.ground.switches[SITE] / "fault").write_text("nan once")
    _plain(stage, case)


def _torn_checkpoint(stage: Stage, case: Case) -> None:
    """The trainer dies, and what it saved is torn."""
    federation = stage.ground.federation
    (stage.ground.switches[SITE] / "slow").write_text("0.2")
    stage.go_on()
    stage.reached(SITE, "trainer", "checkpoint.saved")
    stage.hold()
    stage.held()
    checkpoint = federation.folder(SITE) / "checkpoint.safetensors"
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    stage.arm(case)
    stage.kill_now(SITE, "trainer")
    stage.killed(case)


def _another_trainer(stage: Stage, case: Case) -> None:
    stage.hold()
    stage.go_on()
    stage.held()
    stage.arm(case)
    stage.kill_now(SITE, "trainer")
    stage.killed(case)


def _left_in_work(stage: Stage, case: Case) -> None:
    """The link dies while its trainer has written what it is to take in."""
    federation = stage.ground.federation
    written = Fault("payload.written", do="delay", process="trainer", seconds=LONG_S)
    federation.fail(SITE, written)
    stage.go_on()
    stage.struck(SITE)
    stage.arm(case)
    stage.kill_now(SITE, "link")
    stage.killed(case)


def _another_link(stage: Stage, case: Case) -> None:
    stage.ground.federation.kill(SITE)
    stage.ground.federation.revive()
    stage.ground.federation.await_sites(SITES)
    _plain(stage, case)


def _cut_in_a_fetch(stage: Stage, case: Case) -> None:
    federation = stage.ground.federation
    federation.throttle(SITE, SLOW_MBIT, "down")
    stage.go_on()
    stage.reached(SITE, "link", "fetch.chunk.written")
    stage.arm(case)
    federation.cut(SITE)
    stage.killed(case)


def _lost_part(stage: Stage, case: Case) -> None:
    """Of a fetch only the record of what came is left."""
    federation = stage.ground.federation
    _cut_in_a_fetch(stage, Case("link", "part.recorded", case.shape))
    for part in (federation.folder(SITE) / "cache").glob("*.part"):
        part.unlink()
    stage.arm(case)
    stage.killed(case)


def _cut_in_an_upload(stage: Stage, case: Case) -> None:
    federation = stage.ground.federation
    stage.last()
    federation.forget_traces()
    federation.throttle(SITE, SLOW_MBIT, "up")
    stage.release()
    stage.reached(ORCHESTRATOR, "daemon", "spool.chunk.written")
    stage.arm(case)
    federation.cut(SITE)
    stage.killed(case)


def _sent_twice(stage: Stage, case: Case) -> None:
    """While a contribution is looked at its line breaks, and the site sends it again."""
    federation = stage.ground.federation
    stage.last()
    looked_at = Fault("spool.finished", do="delay", process="daemon", seconds=BRIEFLY_S)
    federation.fail(ORCHESTRATOR, looked_at)
    stage.release()
    stage.struck(ORCHESTRATOR)
    stage.arm(case)
    federation.cut(SITE)
    stage.killed(case)


def _left_in_the_spool(stage: Stage, case: Case) -> None:
    """The daemon dies before it has written down whose contribution comes."""
    federation = stage.ground.federation
    federation.kill(ORCHESTRATOR, at="spool.index.written", process="daemon")
    stage.go_on()
    stage.until(lambda: not federation.daemon.alive, "the daemon's end", revive=False)
    stage.arm(case)
    stage.killed(case)


def _left_alone(stage: Stage, case: Case) -> None:
    """The link dies while its site trains."""
    stage.last()
    stage.arm(case)
    stage.kill_now(SITE, "link")
    stage.killed(case)
    stage.release()


def _stopped(stage: Stage, case: Case) -> None:
    """The operator stops the run while the site trains."""
    stage.last()
    stage.arm(case)
    stage.stop_run()
    stage.killed(case)


def _late(stage: Stage, case: Case) -> None:
    """… and what the site has done comes when it is attached again."""
    federation = stage.ground.federation
    stage.last()
    federation.sever(SITE)
    stage.release()
    stage.reached(SITE, "link", "outbox.admitted")
    stage.stop_run()
    stage.until(lambda: stage.told(stage.run)[0] == "stopped", "the run stopped")
    stage.arm(case)
    federation.mend(SITE)
    stage.killed(case)


def _joins(stage: Stage, case: Case) -> None:
    """A site joins, and what was killed over it takes the join up with the same token."""
    federation = stage.ground.federation
    site = f"new-{stage.joined}"
    stage.joined += 1
    folder = federation.folder(site)
    folder.mkdir(parents=True, mode=0o700)
    token = folder / "token"
    token.write_text(federation.client.invite(site).token)
    token.chmod(0o600)
    (folder / "site.toml").write_text((federation.folder(SITE) / "site.toml").read_text())

    def join() -> Child:
        return federation._site_command(site, "join", f"@{token}")

    end = site if case.process == "link" else ORCHESTRATOR
    federation.kill(end, at=case.at, process=case.process)
    join().join(60)
    stage.killed(case, end)
    if case.process == "daemon":
        stage.until(stage.serves, "a daemon")
    if case.at != "join.done":  # it has joined, and the token is used
        _must(join().join(60) == 0, f"{case.at}: the token does not take the join up")
    federation.start_site(site)
    state = {row.name: row for row in federation.client.sites()}[site]
    _must(state.state == "attached", f"{case.at}: the site is {state.state}")
    federation.stop_site(site)
    federation.client.revoke(site)
    del federation._children[site]


def _must(so: bool, what: str) -> None:
    if not so:
        raise RuntimeError(what)


SCENES: dict[str, dict[tuple[str, str], Play]] = {
    PLAYS: {
        ("link", "outbox.verdict.synced"): _plain,
        ("daemon", "record.refused"): _not_finite,
        ("daemon", "receive.refused"): _not_finite,
        ("trainer", "checkpoint.refused"): _torn_checkpoint,
        ("trainer", "prepare.task.loaded"): _another_trainer,
        ("link", "outbox.leftover.removed"): _left_in_work,
        ("link", "fetch.manifest.written"): _another_link,
        ("link", "part.synced"): _cut_in_a_fetch,
        ("link", "part.recorded"): _cut_in_a_fetch,
        ("link", "part.old_record.removed"): _lost_part,
        ("daemon", "part.synced"): _cut_in_an_upload,
        ("daemon", "part.recorded"): _cut_in_an_upload,
        ("daemon", "status.asked"): _cut_in_an_upload,
        ("link", "contribute.status.heard"): _cut_in_an_upload,
        ("daemon", "part.discarded"): _sent_twice,
        ("daemon", "receive.settled"): _sent_twice,
        ("daemon", "spool.swept"): _left_in_the_spool,
        ("daemon", "session.detached"): _left_alone,
        ("daemon", "gather.cancelled"): _stopped,
        ("link", "plan.cancelled"): _stopped,
        ("trainer", "cancel.heard"): _stopped,
        ("daemon", "accept.late"): _late,
        **{("link", f"join.{at}"): _joins for at in ("begun", "key.kept", "stored", "done")},
        **{("link", f"keys.{at}"): _joins for at in ("written", "replaced")},
        **{("daemon", f"enrol.{at}"): _joins for at in ("issued", "recorded")},
    },
    CUT_SHORT: {
        ("daemon", "gather.finishing"): Stage.cut_short,
        ("link", "plan.finishing"): Stage.cut_short,
        ("trainer", "finish.heard"): Stage.cut_short,
    },
}
