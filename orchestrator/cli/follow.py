"""`launch --follow` and `watch`: how a run goes, live, and what its end means for the exit code."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from orchestrator import views
from orchestrator.cli import tables
from orchestrator.cli.output import complain, console, print_json_line
from orchestrator.client import OperatorClient
from protos.errors import ERRORS, ComputeFailed, DeadlineExceeded, TaskFailed

ENDED = frozenset({"finished", "stopped", "paused", "failed"})
INTERRUPTED = 130
ROUNDS_SHOWN = 15


def follow_everything(client: OperatorClient, as_json: bool) -> int:
    """Print what happens anywhere in the federation until Ctrl-C."""
    stream = client.watch()
    try:
        for event in stream:
            if as_json:
                print_json_line(event)
            elif event.text:
                _print(line(event), event.level)
    except KeyboardInterrupt:
        stream.close()
        complain("stopped following; the daemon goes on", as_json, error="Interrupted")
        return INTERRUPTED
    return 0


def follow_run(client: OperatorClient, name: str, as_json: bool) -> int:
    """Show a run until it ends or Ctrl-C.

    Returns:
        The exit code: 0 only if the run ended well and every round had all its sites.
    """
    run = client.run(name)
    try:
        run = show_json(client, run) if as_json else show(client, run)
    except KeyboardInterrupt:
        complain(
            f"stopped following; run {run.name} goes on. `farflung watch {run.name}` shows it "
            f"again, `farflung stop {run.name}` ends it",
            as_json,
            error="Interrupted",
        )
        return INTERRUPTED
    rounds = client.rounds(run.id)
    if not as_json:
        out = console()
        out.print(tables.round_table(rounds))
        out.print(ending(run), markup=False)
    code, problems = verdict(run, rounds)
    for problem in problems:
        complain(problem, as_json, error="Incomplete")
    return code


def verdict(run: views.Run, rounds: Sequence[views.Round]) -> tuple[int, list[str]]:
    """Exit code of a run that ended, and what there is to complain about, worst first."""
    problems: list[tuple[int, str]] = []
    if run.state == "failed":
        problems.append((ERRORS[TaskFailed].exit_code, f"run {run.name} failed: {run.reason}"))
    if run.state == "paused":
        problems.append(
            (ERRORS[DeadlineExceeded].exit_code, f"run {run.name} is paused: {run.reason}")
        )
    for entry in rounds:
        for site, reason in entry.missing.items():
            problems.append(
                (
                    ERRORS[DeadlineExceeded].exit_code,
                    f"round {entry.round} went on without {site}: {reason}",
                )
            )
        for site, reason in entry.unassessed.items():
            text = f"round {entry.round} was assessed without {site}: {reason}"
            problems.append((ERRORS[DeadlineExceeded].exit_code, text))
    problems += [
        (ERRORS[DeadlineExceeded].exit_code, f"round {entry.round} was {entry.reason}")
        for entry in rounds
        if entry.state == "abandoned" and entry.held
    ]
    for entry in rounds:
        problems += [
            (
                ERRORS[ComputeFailed].exit_code,
                f"round {entry.round}: {plugin.name} was {plugin.state}: {plugin.reason}",
            )
            for plugin in entry.plugins
            if plugin.state != "done"
        ]
    code = problems[0][0] if problems else 0
    return code, [sentence for _, sentence in problems]


# -- three manners ---------------------------------------------------------------------------------


def show(client: OperatorClient, run: views.Run) -> views.Run:
    """Follow a run up to its end: a live picture on a terminal, a line an event elsewhere."""
    out = console()
    if not out.is_terminal:
        for event in _events(client, run):
            if event.text:
                _print(line(event), event.level)
        return client.run(run.id)
    screen = Screen(run, client.rounds(run.id))
    live: AbstractContextManager[object] = (
        nullcontext()
        if run.state in ENDED
        else Live(get_renderable=screen.draw, console=out, refresh_per_second=4, transient=True)
    )
    with live:
        for event in _events(client, run):
            screen.take(event)
            if event.kind == "log" and event.level != "info" and event.text:
                out.print(Text(line(event), style=_style(event.level)))
    return client.run(run.id)


def show_json(client: OperatorClient, run: views.Run) -> views.Run:
    """Follow a run up to its end: each event is a line of JSON."""
    for event in _events(client, run):
        print_json_line(event)
    return client.run(run.id)


def _events(client: OperatorClient, run: views.Run) -> Iterator[views.Event]:
    """The events of a run up to its end; a run that ended already gives its history."""
    if run.state in ENDED:
        yield from client.watch(run.id, follow=False)
        return
    with closing(client.watch(run.id)) as stream:
        for event in stream:
            yield event
            # History may hold ends that an extension undid, so the daemon has the last word.
            ended = event.kind == "run" and event.data.get("state") in ENDED
            if ended and client.run(run.id).state in ENDED:
                return


class Screen:
    """The live picture of a run: its status, its last rounds, the sites of the round under way.

    Args:
        run: The run.
        rounds: Its rounds so far.
    """

    def __init__(self, run: views.Run, rounds: Sequence[views.Round]) -> None:
        self.run = run
        self.rounds = {entry.round: entry for entry in rounds}

    def take(self, event: views.Event) -> None:
        """Take over the newer view that an event carries."""
        if event.kind == "run" and event.data:
            self.run = views.Run.model_validate(event.data)
        elif event.kind == "round" and event.data:
            entry = views.Round.model_validate(event.data)
            self.rounds[entry.round] = entry

    def draw(self) -> RenderableType:
        """The picture as it is now."""
        rounds = [self.rounds[key] for key in sorted(self.rounds)][-ROUNDS_SHOWN:]
        parts: list[RenderableType] = [Text(status(self.run), style="bold")]
        if self.run.diagnosis:
            parts.append(Text(self.run.diagnosis))
        if rounds:
            parts += ["", tables.round_table(rounds)]
            if rounds[-1].state in ("planned", "closed"):
                parts += ["", tables.work_table(rounds[-1])]
        return Group(*parts)


def status(run: views.Run) -> str:
    """The run in one line."""
    said = run.headline or f"round {run.current or run.committed} of {run.rounds}"
    return f"{run.name} · {run.state} · {said}"


def ending(run: views.Run) -> str:
    """How a run ended, in one line."""
    took = tables.duration(run.ended - run.started) if run.ended and run.started else "?"
    best = f", best round {run.best}" if run.best is not None else ""
    return (
        f"Run {run.name} {run.state}: {run.committed} of {run.rounds} rounds in {took}, "
        f"{tables.size(run.wire_bytes)} sent{best}. "
        f"`farflung export {run.name} --round best DIR` writes its model."
    )


def line(event: views.Event) -> str:
    """An event as one line with its time."""
    return f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {event.text}"


def _style(level: str) -> str:
    return {"warning": "yellow", "error": "bold red"}.get(level, "")


def _print(text: str, level: str) -> None:
    console().print(Text(text, style=_style(level)), soft_wrap=True)
