"""A federation whose processes can be made to fail at a named point; see `protos.faults`.

federation.kill("east", at="contribute.sent")     # when its link gets there the next time
run = federation.launch(…)
federation.await_fault("east")
federation.revive()
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.federation import DAEMON, Federation
from protos.errors import ComputeFailed
from protos.faults import DONE, FOLDER, PLAN, TRACE, Fault

ORCHESTRATOR = "orchestrator"
LOOK_S = 0.02


class FaultyFederation(Federation):
    """See the module. Sites are named by their names, the daemon as "orchestrator"."""

    def _variables(self, name: str) -> dict[str, str]:
        return {**super()._variables(name), FOLDER: str(self.faults(name))}

    def faults(self, who: str) -> Path:
        """The folder that the processes of one end follow."""
        return self.root / "faults" / (DAEMON if who == ORCHESTRATOR else who)

    def fail(self, who: str, fault: Fault) -> None:
        """Have something go wrong at one end, once; what was to go wrong before is forgotten."""
        fault.put(self.faults(who))

    def kill(self, who: str, at: str = "", hit: int = 1, process: str = "") -> None:
        """``kill -9``: at once, a site's agent with its trainer; or a process that reaches a point.

        Args:
            who: The end.
            at: Name of the point; the process that reaches it is killed.
            hit: At which time, from now on.
            process: daemon, link or trainer, where more than one reaches it.
        """
        if at:
            self.fail(who, Fault(at, hit, process=process))
        elif who == ORCHESTRATOR:
            self.kill_daemon()
        else:
            super().kill(who)

    def forgive(self, who: str) -> bool:
        """Take back what has not gone wrong yet; whether there was something."""
        plan = self.faults(who) / PLAN
        found = plan.exists()
        plan.unlink(missing_ok=True)
        return found

    def armed(self, who: str) -> bool:
        """Whether something is still to go wrong."""
        return (self.faults(who) / PLAN).exists()

    def struck(self, who: str) -> bool:
        """Whether what was to go wrong has gone wrong."""
        return (self.faults(who) / DONE).exists()

    def await_fault(self, who: str, timeout_s: float = 60.0) -> None:
        """Wait until it has; and until the daemon or the agent that was killed is gone."""
        self.await_that(lambda: self.struck(who), f"the fault of {who}", timeout_s)
        fault = Fault(**json.loads((self.faults(who) / DONE).read_text()))
        process = next(process for process, at in reversed(self.trace(who)) if at == fault.at)
        if fault.do == "kill" and process != "trainer":
            self._children[DAEMON if who == ORCHESTRATOR else who].join(timeout_s)

    def await_that(
        self, so: Callable[[], bool], what: str, timeout_s: float, *, revive: bool = False
    ) -> None:
        """Wait until something is so that no event tells, with processes that die meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {what} within {timeout_s:g} s\n{self.told()}")
            if revive:
                self.revive()
            time.sleep(LOOK_S)

    def revive(self) -> list[str]:
        """Start what has died, as systemd would; gives who that was."""
        dead = [name for name, child in self._children.items() if not child.alive]
        for name in sorted(dead, key=lambda name: name != DAEMON):
            if name == DAEMON:
                try:
                    self.start_daemon()
                except ComputeFailed:  # it was to be killed in its start: once more, the next time
                    if self.daemon.alive:
                        raise
            else:
                self.start_site(name, wait=False)
        return dead

    def trace(self, who: str) -> list[tuple[str, str]]:
        """What was reached so far: kind of process and point, in order."""
        file = self.faults(who) / TRACE
        lines = file.read_text().splitlines() if file.exists() else []
        return [tuple(line.split(" ", 1)) for line in lines]  # type: ignore[misc]
