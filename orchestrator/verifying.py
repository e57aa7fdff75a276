"""A run's ledger checked as a whole: its chain, the rows beside it, and the bytes that it names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.ledger import RoundRow, RunRow
from orchestrator.ledger.audit import Audit
from orchestrator.ledger.database import to_json
from orchestrator.ledger.told import Attempt
from orchestrator.ledger.transcript import NAME, transcript
from orchestrator.ledger.verification import verify
from orchestrator.rounds.engine import Engine, Model
from orchestrator.views import Finding, Verification
from protos.digest import digest
from protos.errors import DataCorrupt, InvalidInput, ManifestInvalid, NotFound
from protos.identity import load_certificate

ENDED = ("committed", "abandoned", "superseded")
TRIES = 3
"""A run that goes on may replace plans while they are read."""

MAX_LINE_BYTES = 256 << 20
"""A line holds the plans of one exchange, or one header: this is ten thousand sites."""


def verify_run(engine: Engine, name: str) -> Verification:
    """Check a run: what an export of its ledger would show, and what only its owner can see.

    Raises:
        NotFound: There is no such run.
    """
    run = engine.ledger.run(name)
    authority = engine.home.authority()[1]
    for _ in range(TRIES):
        found, audit = verify(transcript(engine.ledger, run.id), authority)
        if not found.problems or len(engine.ledger.entries(run.id)) == audit.number:
            break
    rows = {(r.round, r.attempt): r for r in engine.ledger.rounds(run.id, all_attempts=True)}
    problems = [*found.problems, *_rows(engine, run, audit, rows)]
    erased: list[Finding] = []
    look = _Bytes(engine, problems, erased)
    for key, one in sorted(audit.attempts.items()):
        if key in rows:
            look.model(one, rows[key])
    look.contributions(run, audit)
    return found.model_copy(update={"problems": tuple(problems), "erased": tuple(erased)})


def verify_file(path: Path, authority: Path) -> Verification:
    """Check an export of a ledger, without a daemon.

    Args:
        path: The file, or the folder that `farflung export --ledger` wrote it into.
        authority: The certificate of the federation's authority.

    Raises:
        NotFound: One of the files is not there.
        InvalidInput: One of them is something else.
    """
    file = path / NAME if path.is_dir() else path
    try:
        certificate = load_certificate(authority.read_bytes())
    except OSError as error:
        raise NotFound(
            f"{authority}: the authority's certificate can't be read ({error.strerror}); say with "
            "--authority where it is (keys/ca.pem in the orchestrator's home)"
        ) from error
    try:
        return verify(_lines(file), certificate)[0]
    except OSError as error:
        raise NotFound(f"{file}: it can't be read ({error.strerror})") from error


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.readline(MAX_LINE_BYTES):
            if len(data) == MAX_LINE_BYTES:
                raise InvalidInput(f"{path}: a line is longer than {MAX_LINE_BYTES} bytes")
            yield data


# -- rows -----------------------------------------------------------------------------------------


def _rows(
    engine: Engine, run: RunRow, audit: Audit, rows: dict[tuple[int, int], RoundRow]
) -> Iterator[Finding]:
    """Where the tables say something else than the chain."""
    for key, one in sorted(audit.attempts.items()):
        where = f"round {key[0]}, attempt {key[1]}"
        row = rows.get(key)
        if row is None:
            yield Finding(text=f"{where}: its row is missing", round=key[0])
            continue
        if one.state not in ENDED:
            continue  # it may have gone on meanwhile
        for what, said, there in _told(one, row):
            if said != there:
                yield Finding(text=f"{where}: its {what} is not what was written", round=key[0])
        counted = engine.ledger.contributions(run.id, *key)
        acknowledged = set(one.counted.values())
        for c in counted:
            if c.digest not in acknowledged:
                text = (
                    f"{where}: a contribution of site {c.site} counts that was never acknowledged"
                )
                yield Finding(text=text, round=key[0], site=c.site)
        for lost in acknowledged - {c.digest for c in counted}:
            # What a later plan of the same exchange replaced counts no more.
            site = audit.accepted[lost].site
            if lost in one.closed_set:
                text = f"{where}: the acknowledged contribution of site {site} does not count"
                yield Finding(text=text, round=key[0], site=site)
    for key in sorted(rows.keys() - audit.attempts.keys()):
        if rows[key].state in ENDED:
            text = f"round {key[0]}, attempt {key[1]}: no entry tells of it"
            yield Finding(text=text, round=key[0])
    now = engine.ledger.run(run.id)
    newest = audit.history[-1] if audit.history else None
    still = len(engine.ledger.entries(run.id)) == audit.number
    if newest is not None and still and now.model != newest.model:
        yield Finding(text=f"the run's model is not that of round {newest.round}")


def _told(one: Attempt, row: RoundRow) -> Iterator[tuple[str, object, object]]:
    """What the chain says of an attempt, and what its row says."""
    yield "state", one.state, row.state
    yield "base", one.base, row.base
    yield "draft", one.draft, digest(to_json(row.draft).encode())
    yield "closed set", one.closed_set, row.closed_set
    if one.state != "abandoned":
        yield "model", one.model, row.model
        yield "outer state", one.outer_state, row.outer_state
        yield "memos", one.memos, digest(to_json(row.memos).encode())
        yield "summary", one.summary, digest(to_json(row.summary).encode())


# -- bytes ----------------------------------------------------------------------------------------


class _Bytes:
    """Looks whether what the ledger names is in the store, with its digest."""

    def __init__(self, engine: Engine, problems: list[Finding], erased: list[Finding]) -> None:
        self._engine, self._problems, self._erased = engine, problems, erased
        self._known: dict[str, tuple[str, str]] = {}

    def model(self, one: Attempt, row: RoundRow) -> None:
        """Everything that a committed attempt left."""
        if one.state not in ("committed", "superseded"):
            return
        store, summary = self._engine.store, row.summary
        for place, name in Model.of(row).parts().items():
            what = "model" if place == "shared" else f"{place} part of the model"
            self._look(name, what, one.round, self._model)
        if row.outer_state:
            self._look(row.outer_state, "outer state", one.round, self._model)
        for kind, what in (("files", "file {} of strategies"), ("payloads", "side payload {}")):
            for key, spec in sorted(summary.get(kind, {}).items()):
                self._look(spec["object"], what.format(key), one.round, store.get_bytes)

    def contributions(self, run: RunRow, audit: Audit) -> None:
        """What the sites sent, as far as retention keeps it."""
        kept = self._engine.config.retention.contributions
        committed = [one.round for one in audit.history]
        recent = committed if kept == "all" else committed[-kept:] if kept else []
        gone: dict[int, set[str]] = defaultdict(set)
        missing: list[tuple[int, str, str]] = []
        oldest: int | None = None
        for _, one in sorted(audit.attempts.items()):
            for name in one.counted.values():
                accepted = audit.accepted[name]
                outcome, reason = self._state(accepted.index, self._engine.store.verify)
                if outcome == "there":
                    oldest = one.round if oldest is None else min(oldest, one.round)
                elif outcome == "erased":
                    gone[one.round].add(accepted.site)
                elif outcome == "corrupt":
                    self._say(
                        one.round, f"contribution of site {accepted.site}", reason, accepted.site
                    )
                elif one.state == "superseded" or (
                    one.round not in recent and one.round <= max(committed, default=-1)
                ):
                    gone[one.round].add(accepted.site)
                elif one.state != "abandoned":
                    missing.append((one.round, accepted.site, reason))
        for number, site, reason in missing:
            # Retention removes from the oldest on. It may have kept less when these went.
            if number != max(committed, default=-1) and (oldest is None or number < oldest):
                gone[number].add(site)
            else:
                self._say(number, f"contribution of site {site}", reason, site)
        for number, sites in sorted(gone.items()):
            whose = ", ".join(sorted(sites))
            text = f"round {number}: the contributions of {whose} were removed by [retention]"
            self._erased.append(Finding(text=text, round=number))

    def _model(self, name: str) -> None:
        self._engine.store.verify(name)
        self._engine.store.manifest(self._engine.store.index(name).manifest)

    def _look(self, name: str, what: str, round: int, check: Callable[[str], object]) -> None:
        outcome, reason = self._state(name, check)
        if outcome == "erased":
            text = f"round {round}: its {what} was erased: {reason}"
            self._erased.append(Finding(text=text, round=round))
        elif outcome != "there":
            self._say(round, f"its {what}", reason)

    def _say(self, round: int, what: str, reason: str, site: str = "") -> None:
        self._problems.append(
            Finding(text=f"round {round}: {what}: {reason}", round=round, site=site)
        )

    def _state(self, name: str, check: Callable[[str], object]) -> tuple[str, str]:
        """there, erased, lost or corrupt, and why; each is read once."""
        if name not in self._known:
            self._known[name] = _checked(name, check)
        return self._known[name]


def _checked(name: str, check: Callable[[str], object]) -> tuple[str, str]:
    try:
        check(name)
    except NotFound as error:
        if error.facts.get("erased"):
            return "erased", str(error.facts["reason"])
        return "lost", f"{error.message}, and nothing says that it was removed"
    except (DataCorrupt, ManifestInvalid) as error:
        return "corrupt", error.message
    return "there", ""
