"""An operator that answers from a recording, and lets a test make something happen.

``python -m tests.support.recorded_operator [--port N] [--big | --empty]`` serves the page from
it, to look at.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Sequence

from orchestrator.dashboard.app import serve
from orchestrator.views import Daemon, Event, Round, Run, Site
from protos.errors import NotFound
from tests.support.recorded_run import Recording


class Following:
    """Events as an iterator that another thread can end."""

    def __init__(self, operator: RecordedOperator, run: str, after: int, follow: bool) -> None:
        self.operator, self.run, self.after, self.follow = operator, run, after, follow
        self.closed = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        changed = self.operator.changed
        with changed:
            while not self.closed:
                for event in self.operator.events:
                    if event.number > self.after and (not self.run or event.run == self.run):
                        self.after = event.number
                        return event
                if not self.follow:
                    break
                changed.wait()
        raise StopIteration

    def close(self) -> None:
        with self.operator.changed:
            self.closed = True
            self.operator.changed.notify_all()


class RecordedOperator:
    """What the dashboard reads, over a recording (None: nothing ever ran)."""

    def __init__(self, recording: Recording | None) -> None:
        self.recording = recording
        self.changed = threading.Condition()
        self.events: list[Event] = []

    def status(self) -> Daemon:
        if self.recording is not None:
            return self.recording.status()
        return Recording(1, 0, live=False).status().model_copy(update={"sites": 0, "attached": 0})

    def sites(self) -> Sequence[Site]:
        return self.recording.sites() if self.recording else []

    def runs(self) -> Sequence[Run]:
        return [self.recording.run()] if self.recording else []

    def run(self, name: str) -> Run:
        for run in self.runs():
            if name in (run.id, run.name):
                return run
        raise NotFound(f"no run is called {name!r}; `farflung runs` lists them", run=name)

    def rounds(self, name: str) -> Sequence[Round]:
        self.run(name)
        return self.recording.rounds() if self.recording else []

    def kept(self, run: str, round: int, strategy: str) -> dict[str, bytes]:
        self.run(run)
        return self.recording.kept(strategy, round) if self.recording else {}

    def watch(self, run: str, after: int, follow: bool) -> Following:
        return Following(self, run, after, follow)

    # ---------------------------------------------------------------------- what a test can do

    def tell(self, **fields: object) -> Event:
        """An event with the next number."""
        with self.changed:
            number = self.events[-1].number + 1 if self.events else 1
            event = Event.model_validate({"number": number, "time": time.time(), **fields})
            self.events.append(event)
            self.changed.notify_all()
        return event

    def commit(self) -> Round:
        """The round under way is done, and the next one begins."""
        recording = self.recording
        assert recording is not None
        n = len(recording.done) + 1
        recording.epochs = recording._epochs(n + 1)
        recording.done.append(recording.round(n))
        recording.live = n < recording.planned
        done = recording.done[-1]
        run = recording.run()
        for kind, view in (("round", done), ("run", run)):
            self.tell(kind=kind, run=run.id, round=n, data=view.model_dump(mode="json"))
        if recording.live:
            under_way = recording.current()
            data = under_way.model_dump(mode="json")
            self.tell(kind="round", run=run.id, round=under_way.round, data=data)
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--big", action="store_true", help="64 sites, 500 rounds")
    parser.add_argument("--empty", action="store_true", help="no run, no site")
    parser.add_argument("--new", action="store_true", help="the first round is under way")
    parser.add_argument("--live", action="store_true", help="commits a round every six seconds")
    options = parser.parse_args()
    recording = None
    if options.big:
        recording = Recording(500, 499, 64, now=time.time())
    elif not options.empty:
        recording = Recording(committed=0 if options.new else 9, now=time.time())
    operator = RecordedOperator(recording)
    with serve(operator, port=options.port) as dashboard:
        print(dashboard.url, flush=True)
        try:
            while True:
                threading.Event().wait(6.0)
                if options.live and recording is not None and recording.live:
                    recording.now = time.time()
                    operator.commit()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
