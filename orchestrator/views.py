"""What an operator sees: the nouns of ``--json``, of the tables, and of the page.

One definition for all three. Times are seconds since the epoch (UTC), sizes bytes, durations
seconds; a number that is not known is None, never a made-up value.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of files that an export may hold."""

SiteState = Literal[
    "never attached", "attached", "gone", "paused", "revoked",
]  # fmt: skip

WorkState = Literal[
    "asked", "waiting", "preparing", "fetching", "training", "encoding", "sending",
    "counted", "late", "refused", "failed", "gone", "left",
]  # fmt: skip

RunState = Literal["queued", "running", "finished", "stopped", "paused", "failed"]

RoundState = Literal["planned", "closed", "held", "committed", "abandoned", "superseded"]


class View(BaseModel):
    """Base: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Daemon(View):
    """The daemon itself."""

    federation: str
    version: str
    address: str
    dashboard: str
    home: str
    compute: Literal["starting", "ready", "failed"]
    compute_detail: str = ""
    started: float
    sites: int
    attached: int
    queued: int
    running: str | None = None


class Site(View):
    """One site.

    Attributes:
        trouble: What keeps it from taking part, in words; empty if nothing is known to.
    """

    name: str
    state: SiteState
    since: float | None = None
    certificate_expires: float | None = None
    version: str = ""
    device: str = ""
    tasks: dict[str, str] = {}
    packages: dict[str, str] = {}
    invited: bool = False
    trouble: str = ""


class SitePhase(View):
    """A stretch of one site's time in a round."""

    state: WorkState
    start: float
    end: float | None = None


class SiteWork(View):
    """One site in one round: the row of the round's table and of its timeline.

    Attributes:
        reason: What went wrong, where, what to do; with the error's class in ``error``.
        phases: The timeline, oldest first.
        done: Of ``planned``, in ``unit``.
        partial: Its work was cut before the deadline; ``done`` of it is in its contribution.
        from_round: The earlier round for which what counts here was done; None for this one.
        waits_until: No window of the site is open: when one opens, Unix time.
        scores: Scores of the candidate at this site, by name.
    """

    site: str
    state: WorkState
    error: str = ""
    reason: str = ""
    phases: tuple[SitePhase, ...] = ()
    done: float | None = None
    planned: float | None = None
    unit: str = ""
    partial: bool = False
    from_round: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    examples: int | None = None
    examples_per_s: float | None = None
    eta_s: float | None = None
    waits_until: float | None = None
    received_bytes: int = 0
    sent_bytes: int = 0
    norm: float | None = None
    weight: float | None = None
    scores: dict[str, float] = {}


class Plugin(View):
    """What one strategy reports of a round.

    Attributes:
        state: done, skipped (with the reason), or not asked for in this round.
        seconds: Wall seconds, with the start of its process.
        cpu_seconds: CPU seconds of all threads of its process, with its start.
        report: Numbers by name.
        files: Digests of the files that it made in this round, by name.
    """

    name: str
    state: Literal["done", "skipped", "held"]
    reason: str = ""
    seconds: float | None = None
    cpu_seconds: float | None = None
    report: dict[str, float] = {}
    files: dict[str, str] = {}


class Reliability(View):
    """A reliability curve: per bin count, mean confidence, accuracy (None where empty)."""

    count: tuple[float, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


class Round(View):
    """One round, with its last attempt.

    Attributes:
        relative_change: ||reduced delta|| / ||base||.
        scores: Pooled, by name: "val.accuracy", "val.nll", "val.ece", "test.…",
            "test_calibrated.ece", ….
        seconds: Wall seconds by phase: waiting, preparing, fetching, training, encoding, sending,
            reducing, refining, assessing, committing (site phases: mean over the sites).
        learning_rate: (first, last) inside the round.
        work: Local work asked for, e.g. {"epochs": 5.0}.
        calibration: Fitted maps by strategy.
        missing: Sites that were asked and not counted, with the reason.
        unassessed: Sites that were counted and did not evaluate the model, with the reason.
        held: Why it was held; empty if it was not.
    """

    run: str
    round: int
    attempt: int
    state: RoundState
    assessed: bool = False
    started: float
    closed: float | None = None
    committed: float | None = None
    deadline: float | None = None
    quorum: int
    base: str = ""
    model: str = ""
    work: dict[str, float] = {}
    learning_rate: tuple[float, float] | None = None
    relative_change: float | None = None
    scores: dict[str, float] = {}
    seconds: dict[str, float] = {}
    wire_bytes: int = 0
    sites: tuple[SiteWork, ...] = ()
    plugins: tuple[Plugin, ...] = ()
    calibration: dict[str, Any] = {}
    reliability: dict[str, Reliability] = {}
    missing: dict[str, str] = {}
    unassessed: dict[str, str] = {}
    reason: str = ""
    held: str = ""


class Run(View):
    """One run.

    Attributes:
        headline: The status line in words.
        diagnosis: The newest finding in one sentence; empty if there is nothing to say.
        needs_action: Whether somebody has to act.
        best: Round with the best validation score so far.
    """

    id: str
    name: str
    state: RunState
    reason: str = ""
    headline: str = ""
    diagnosis: str = ""
    needs_action: bool = False
    rounds: int
    committed: int
    current: int | None = None
    best: int | None = None
    created: float
    started: float | None = None
    ended: float | None = None
    eta_s: float | None = None
    strategies: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    epsilon: float | None = None
    scores: dict[str, float] = {}
    references: dict[str, float] = {}
    wire_bytes: int = 0
    config_digest: str = ""
    config: dict[str, Any] = {}
    model: str = ""


class Event(View):
    """Something that happened: what ``watch`` prints and the page's stream carries.

    Attributes:
        number: Ascending; the stream resumes after it.
        kind: run, round, site, plugin, log: which view in ``data`` is new.
        data: The new view (Run, Round or Site as JSON), or {} for a log line.
        text: One line in words.
        level: info, warning, error.
    """

    number: int
    time: float
    kind: Literal["run", "round", "site", "daemon", "log"]
    run: str = ""
    round: int | None = None
    site: str = ""
    level: Literal["info", "warning", "error"] = "info"
    text: str = ""
    data: dict[str, Any] = {}


class Collected(View):
    """What ``gc`` removed, or would remove."""

    dry_run: bool
    files: int
    bytes: int
    kept: int
    names: tuple[str, ...] = ()


class Finding(View):
    """Something that a check of a ledger came upon.

    Attributes:
        text: What is wrong, where, in words.
        entry: Number of the entry in the run's chain; 0 for what stands before the first, None for
            what no entry tells.
    """

    text: str
    entry: int | None = None
    round: int | None = None
    site: str = ""


class Verification(View):
    """What `verify` found in a run's ledger, or in an export of one.

    Attributes:
        committed: Rounds whose models were checked, the first base among them.
        contributions: Contributions whose signatures were checked.
        digest: Of the newest entry: with it somebody else's copy is compared.
        sealed: When the export was made; None for the ledger itself.
        problems: What is lost, doubled, altered, out of order, or was never acknowledged.
        erased: What is not there any more because retention or an operator removed it.
    """

    federation: str
    run: str
    entries: int
    committed: int
    contributions: int
    digest: str
    sealed: float | None = None
    problems: tuple[Finding, ...] = ()
    erased: tuple[Finding, ...] = ()


class Compared(View):
    """One result of a round, as it was recorded and as it was computed again.

    Attributes:
        what: model, outer state, memos, scores, …
        recorded: Its digest; empty for none.
        computed: The same of what came out now.
        tensors: Where they differ, if the recorded bytes are there to be compared.
    """

    what: str
    recorded: str
    computed: str
    tensors: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.recorded == self.computed


class Replay(View):
    """A committed round, computed again from what the sites sent.

    Attributes:
        sites: Whose contributions it was computed from.
        identical: Whether everything that was compared is the same.
        notes: What was not computed again, and why.
    """

    run: str
    round: int
    attempt: int
    sites: tuple[str, ...]
    identical: bool
    compared: tuple[Compared, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
