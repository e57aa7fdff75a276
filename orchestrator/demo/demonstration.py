"""The demo itself: real processes, the live table, the comparisons, and the closing table."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.cli.follow import show, verdict
from orchestrator.cli.output import complain, console, print_json, say
from orchestrator.demo import plan
from orchestrator.demo.results import Result, mean, result_of, result_table
from orchestrator.federation import Federation
from protos.errors import ComputeFailed, Conflict

RUN_S = 900.0


def run_demo(home: Path | None, rounds: int | None, keep: bool, as_json: bool) -> int:
    """Run the demo.

    Args:
        home: Folder for everything; a new one if None.
        rounds: Rounds of each run; the example's if None.
        keep: Leave all running at the end, until Ctrl-C.
        as_json: Print the closing table as JSON, and nothing else.

    Returns:
        The exit code.
    """
    chosen = plan.workload(rounds)
    root = home or Path(tempfile.mkdtemp(prefix="farflung-demo-"))
    if (root / "orchestrator").exists():
        raise Conflict(f"{root} holds a federation already; give the demo another --home")
    federation = Federation(
        root,
        sites={
            site: chosen.site(part, len(plan.SITES), threads=1)
            for part, site in enumerate(plan.SITES)
        },
        orchestrator_tasks=chosen.orchestrator_tasks,
    )
    with _interruptible(), federation:
        demo = Demonstration(federation, chosen, quiet=as_json)
        code = demo.show()
        if keep:
            if not as_json:
                say("Everything keeps running; Ctrl-C ends it.")
            threading.Event().wait()
    return code


class Demonstration:
    """The runs of a demo, one after the other, on one federation.

    Args:
        federation: Started.
        workload: What to train on.
        quiet: Print JSON at the end and nothing before it.
    """

    def __init__(self, federation: Federation, workload: plan.Workload, quiet: bool) -> None:
        self._federation, self._workload, self._quiet = federation, workload, quiet
        self._started = time.monotonic()

    def show(self) -> int:
        """Run everything and print what came out of it; gives the exit code."""
        federation, run_file = self._federation, self._workload.run
        daemon = federation.client.status()
        self._say(
            self._workload.title,
            f"sites: {', '.join(plan.SITES)}, three processes of their own, over mutual TLS",
            f"page: {daemon.dashboard}",
            "",
        )
        main = federation.client.run(federation.launch(run_file))
        if not self._quiet:
            main = show(federation.client, main)
        main = federation.wait(main.id, RUN_S)
        entries = federation.rounds(main.id)
        code, problems = verdict(main, entries)
        for problem in problems:
            complain(problem, self._quiet, error="Incomplete")
        if main.state != "finished":
            return code
        epochs = sum(entry.work.get("epochs", 0.0) for entry in entries)
        results = [result_of("co-learning, 3 sites", main, epochs)]
        self._say("", "The same without co-learning, and without the others:")
        results += self._compare(run_file, epochs)
        model = federation.root / "model"
        federation.client.export(main.id, "", model)
        self._close(results, main.id, model, daemon.dashboard)
        return code

    def _compare(self, run_file: plan.Tables, epochs: float) -> Iterator[Result]:
        each = epochs / run_file["rounds"]
        yield self._arm(
            "FedAvg, one local epoch, 3 sites", plan.fedavg(run_file), float(run_file["rounds"])
        )
        alone = [
            self._arm(f"{site} by itself", plan.isolated(run_file, site, each), epochs)
            for site in plan.SITES
        ]
        yield mean("isolated site, mean of 3", alone)
        # It starts only now, so that it takes nothing from the others.
        self._federation.add_site(plan.ALL_DATA, self._workload.site(0, 1, threads=1))
        yield self._arm(
            "centralised, all data at one site", plan.centralised(run_file, each), epochs
        )

    def _arm(self, title: str, config: plan.Tables, epochs: float) -> Result:
        run = self._federation.run(config, RUN_S)
        if run.state != "finished":
            raise ComputeFailed(f"demo: run {run.name} is {run.state}: {run.reason}")
        result = result_of(title, run, epochs)
        self._say(f"  {title}: {result.accuracy:.1%} after {result.seconds:.0f} s")
        return result

    def _close(self, results: list[Result], run: str, model: Path, page: str) -> None:
        home = self._federation.home
        if self._quiet:
            print_json(
                {
                    "results": [result._asdict() for result in results],
                    "run": run,
                    "model": str(model),
                    "ledger": str(home.ledger),
                    "dashboard": page,
                    "home": str(home.path),
                    "seconds": time.monotonic() - self._started,
                }
            )
            return
        console().print("", result_table(results), "")
        say(
            f"model: {model}",
            f"ledger: {home.ledger}",
            f"page: {page} (`farflung serve --home {home.path}` opens it again)",
            f"The runs took {time.monotonic() - self._started:.0f} s.",
        )

    def _say(self, *lines: str) -> None:
        if not self._quiet:
            say(*lines)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the demo as Ctrl-C does: with everything it started."""

    def interrupt(number: int, frame: FrameType | None) -> Any:
        raise KeyboardInterrupt

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    ]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
