"""Results as a Markdown table with its bars, in the README between two marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from textwrap import wrap
from typing import Any, NamedTuple

from benchmarks.peers.case import Figures
from protos.errors import InvalidInput

OURS = "Farflung"
PEERS = ("Flower", "NVIDIA FLARE")
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"

CPU_BARS = {"Flower": 10.0, "NVIDIA FLARE": 3.0}
"""How many times more processor time a peer takes, at least, at every size."""

MEMORY_BAR, MEMORY_BAR_BYTES = 10.0, 400_000_000
"""How many times more memory each peer's server takes, at least, at this size."""

DIFFERENCES = """\
Processor seconds are those of all processes of a system from the beginning of one round to that
of the next; memory is resident, summed over a process tree, its peak over the run. The peers
average inside their server, Farflung in Ray's processes, which the row below the daemon's adds.
All run on this one machine over loopback, train nothing and evaluate nothing. Farflung and FLARE
use mutual TLS; Flower runs with the `--insecure` of its guide, without TLS. Farflung writes and
syncs every contribution, a ledger and every model; FLARE writes the model of every round; Flower
keeps everything in memory. Flower starts a process for every message to a site, the others keep
theirs."""
WIDTH = 136
"""Of the README's lines."""


class Result(NamedTuple):
    """One system at one size.

    Attributes:
        system: Its name.
        version: Empty if it failed before it could tell.
        model_bytes: Size of the model.
        figures: None if it failed.
        error: Why it failed.
    """

    system: str
    version: str
    model_bytes: int
    figures: Figures | None = None
    error: str = ""


class Results(NamedTuple):
    """One run of the comparison.

    Attributes:
        date: ISO 8601.
        machine: What the figures were measured on, in words by key.
        sites: How many.
        rounds: How many; the first is left out.
        results: In the order in which they were measured.
    """

    date: str
    machine: Mapping[str, str]
    sites: int
    rounds: int
    results: Sequence[Result]

    def to_json(self) -> dict[str, Any]:
        """As tables."""
        told = [{**r._asdict(), "figures": r.figures and r.figures._asdict()} for r in self.results]
        return {**self._asdict(), "results": told}

    @staticmethod
    def from_json(tables: Mapping[str, Any]) -> Results:
        """The inverse of `to_json`.

        Raises:
            InvalidInput: It is something else.
        """
        try:
            told = [
                Result(**{**r, "figures": r["figures"] and Figures(**r["figures"])})
                for r in tables["results"]
            ]
            return Results(**{**tables, "results": told})
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"these are not results of this benchmark: {error}") from error

    def at(self, system: str, model_bytes: int) -> Figures | None:
        """The figures of a system at a size; None if there are none."""
        return next(
            (r.figures for r in self.results if (r.system, r.model_bytes) == (system, model_bytes)),
            None,
        )

    @property
    def sizes(self) -> list[int]:
        """Sizes of models, as measured."""
        return list(dict.fromkeys(result.model_bytes for result in self.results))


class _Row(NamedTuple):
    what: str
    of: Callable[[Figures], float]
    digits: int
    compared: bool = True


ROWS = (
    _Row("CPU seconds a round, all processes", lambda f: median(f.cpu_s), 1),
    _Row("wall seconds a round", lambda f: median(f.wall_s), 1),
    _Row("server (Farflung: daemon), peak MB", lambda f: f.server_peak_rss_bytes / 1e6, 0),
    _Row(
        "server (Farflung: daemon and Ray), at most MB",
        lambda f: (f.server_peak_rss_bytes + f.ray_peak_rss_bytes) / 1e6,
        0,
    ),
    _Row("a site, peak MB", lambda f: f.site_peak_rss_bytes / 1e6, 0),
    _Row("cores busy with other work", lambda f: f.foreign_cores, 2, compared=False),
)


def part(results: Results) -> str:
    """What stands between the marks: how it was measured, the table, the bars, the differences."""
    versions = {r.system: r.version for r in results.results if r.version}
    systems = ", ".join(f"{name} {version}" for name, version in versions.items())
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    how = (
        f"`make bench-peers`, {results.date}: {results.sites} sites, {results.rounds} rounds, "
        f"medians without the first. {systems}. {machine}."
    )
    lines = [
        *wrap(how, WIDTH),
        "",
        *_table(results),
        "",
        *[line for result in results.results if result.error for line in (_failure(result), "")],
        *wrap(_verdict(results), WIDTH),
        "",
        *wrap(DIFFERENCES, WIDTH),
    ]
    return "\n".join(lines)


def _table(results: Results) -> list[str]:
    ratios = [f"{peer} ÷ {OURS}" for peer in PEERS]
    lines = [
        f"| model | | {' | '.join((OURS, *PEERS, *ratios))} |",
        "| --- | --- |" + " ---: |" * (1 + 2 * len(PEERS)),
    ]
    for size in results.sizes:
        ours, *theirs = (results.at(system, size) for system in (OURS, *PEERS))
        for row in ROWS:
            cells = [_cell(figures, row) for figures in (ours, *theirs)]
            cells += [_ratio_cell(ours, figures, row) for figures in theirs]
            first = f"{size / 1e6:g} MB" if row is ROWS[0] else ""
            lines.append(f"| {first} | {row.what} | {' | '.join(cells)} |")
    return lines


def _cell(figures: Figures | None, row: _Row) -> str:
    return "–" if figures is None else f"{row.of(figures):,.{row.digits}f}"


def _ratio_cell(ours: Figures | None, theirs: Figures | None, row: _Row) -> str:
    if ours is None or theirs is None or not row.compared:
        return ""
    return f"{ratio(ours, theirs, row.of):.1f}"


def ratio(ours: Figures, theirs: Figures, of: Callable[[Figures], float]) -> float:
    """How many times more the peer takes."""
    return of(theirs) / of(ours)


def _failure(result: Result) -> str:
    return f"{result.system} at {result.model_bytes / 1e6:g} MB: {result.error}"


def shortfalls(results: Results) -> list[str]:
    """Which bars do not hold; a system without figures does not meet any."""
    short = []
    for size in results.sizes:
        bars = [(peer, "CPU", ROWS[0].of, bar) for peer, bar in CPU_BARS.items()]
        if size == MEMORY_BAR_BYTES:
            bars += [(peer, "daemon memory", ROWS[2].of, MEMORY_BAR) for peer in PEERS]
        ours = results.at(OURS, size)
        for peer, what, of, bar in bars:
            theirs = results.at(peer, size)
            where = f"{what} against {peer} at {size / 1e6:g} MB"
            if ours is None or theirs is None:
                short.append(f"{where}: not measured")
            elif (times := ratio(ours, theirs, of)) < bar:
                short.append(f"{where}: {times:.1f} times less, the bar is {bar:g}")
    return short


def _verdict(results: Results) -> str:
    asked = " and ".join(f"{bar:g} times less than {peer}'s" for peer, bar in CPU_BARS.items())
    aims = f"Aims: processor time at least {asked} at every size"
    if MEMORY_BAR_BYTES in results.sizes:
        aims += f"; daemon's memory {MEMORY_BAR:g} times less than either's server at 400 MB"
    short = shortfalls(results)
    return f"{aims}. " + (f"Fell short: {'; '.join(short)}." if short else "All hold.")


def replaced(document: str, text: str) -> str:
    """The document with what stands between the marks replaced.

    Raises:
        InvalidInput: It does not have each mark once, in order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise InvalidInput(f"the document does not have {BEGIN} and {END} once each, in order")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"
