"""What the ledger gives and takes: frozen rows, and the words that stand in their columns.

Times are seconds since the epoch (UTC). Dictionaries are stored as JSON: what comes back has text
keys, and lists where tuples went in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.views import RoundState, RunState

MemberState = Literal["invited", "enrolled", "revoked"]

PlanKind = Literal["train", "init", "assess", "baseline", "reassess"]

Answer = Literal["counted", "late", "refused", "failed", "left"]
"""How a plan ended at a site. ``failed`` and ``left`` come from the site; a contribution that
arrives after all, while the exchange is open, takes their place. The others are final."""

EntryKind = Literal[
    "created", "extended", "planned", "opened", "accepted", "carried",
    "closed", "held", "committed", "abandoned", "rolled_back",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class SiteRow:
    """A site of the federation.

    Attributes:
        name: Its name, as in its certificate.
        state: invited (never enrolled, or invited again after it was revoked), enrolled, revoked.
        fingerprint: Of its newest certificate; empty before it enrolled.
        certificate_expires: When that expires.
        created: When it was first invited.
    """

    name: str
    state: MemberState
    fingerprint: str
    certificate_expires: float | None
    created: float


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A join token.

    Attributes:
        id: Its public id; the ledger never sees the secret part.
        site: Whom it lets in.
        created: When.
        expires: When it stops working.
        used: When it was used; None if it was not.
        fingerprint: Of the certificate that it was used for; empty if it was not used.
        revoked: Whether a newer invitation or a revocation took it back.
    """

    id: str
    site: str
    created: float
    expires: float
    used: float | None
    fingerprint: str
    revoked: bool


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """A certificate that was given to a site.

    Attributes:
        fingerprint: See ``protos.identity.fingerprint``.
        site: Whose.
        pem: The certificate.
        issued: When it was recorded.
        expires: When it expires.
        revoked: When it was revoked; None if it was not.
    """

    fingerprint: str
    site: str
    pem: bytes
    issued: float
    expires: float
    revoked: float | None


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run.

    Attributes:
        id: Its id, as in plans.
        name: What people call it; unique.
        config: The resolved run file.
        config_digest: Digest of the canonical form of ``config``.
        rounds: How many rounds it shall have.
        created: When it was submitted.
        state: See ``views.RunState``.
        reason: Why it is paused, stopped or failed; of one that is running, that it is to be stopped.
        started: When its first round began.
        ended: When it reached its end; None while it is queued or running.
        parent: (run id, round) that it was started from; None for none.
        model: Digest of the index of its current model; empty before there is one.
        outer_state: Digest of the outer state that belongs to ``model``; empty for none.
    """

    id: str
    name: str
    config: dict[str, Any]
    config_digest: str
    rounds: int
    created: float
    state: RunState = "queued"
    reason: str = ""
    started: float | None = None
    ended: float | None = None
    parent: tuple[str, int] | None = None
    model: str = ""
    outer_state: str = ""


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One attempt of one round.

    Attributes:
        run: Id of the run.
        round: 1, 2, …; 0 for the exchange that makes the first base.
        attempt: 1, 2, …
        state: planned → closed → [held] → committed, or abandoned from any of the first three;
            superseded, if the run was rolled back to before it after it was committed.
        base: Digest of the index of the base.
        draft: What was planned, as data.
        quorum: Least number of contributions.
        deadline_s: Seconds from ``started`` to the deadline, time with the daemon down included
            (`Ledger.extend_deadline`).
        started: When it was planned.
        closed: When it was closed.
        ended: When it was committed or abandoned.
        reason: Why it was closed, held or abandoned: the newest of them.
        closed_set: Digests of the contributions that were closed in, in the order of site names.
        model: Digest of the index of the candidate (held) or of the result (committed).
        outer_state: Digest of the outer state that belongs to it; empty for none.
        memos: What each strategy remembers beside tensors, by name.
        summary: What the round came to, for views.
    """

    run: str
    round: int
    attempt: int
    state: RoundState = "planned"
    base: str = ""
    draft: dict[str, Any] = field(default_factory=dict)
    quorum: int = 1
    deadline_s: float = 3600.0
    started: float = 0.0
    closed: float | None = None
    ended: float | None = None
    reason: str = ""
    closed_set: tuple[str, ...] = ()
    model: str = ""
    outer_state: str = ""
    memos: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What one site was asked, and how that ended.

    Attributes:
        run: Id of the run.
        round: Of the round.
        attempt: Of the attempt.
        kind: See ``protos.plan.Plan``.
        site: To whom it is addressed.
        plan: The bytes of the plan, as they go out.
        work_digest: `Plan.work_digest`.
        answer: How it ended; empty while it is open.
        error: Class of the error, for ``failed`` and ``refused``.
        message: What happened, where, what to do.
        answered: When.
        contribution: Digest of the contribution that counts for it; empty if none does.
    """

    run: str
    round: int
    attempt: int
    kind: PlanKind
    site: str
    plan: bytes
    work_digest: str
    answer: Answer | Literal[""] = ""
    error: str = ""
    message: str = ""
    answered: float | None = None
    contribution: str = ""

    @property
    def id(self) -> str:
        """The same as `Plan.id`."""
        return f"{self.run}/{self.round}/{self.attempt}/{self.kind}"


@dataclass(frozen=True, slots=True)
class ContributionRow:
    """A contribution that reached its end: it counted, or it was late.

    Attributes:
        digest: `Header.digest`.
        plan_id: Id of the plan that its header names.
        run: Id of the run.
        round: Of the round: later than the one that its header names, if it counts there.
        attempt: Of the attempt that its header names, or in which it counts in a later round.
        kind: As in the plan.
        site: Who contributed.
        work_digest: As in the header.
        header: The signed bytes, as carried; empty for a late one.
        signature: Over them; empty for a late one.
        fingerprint: Of the certificate that signed.
        index: Digest of the payload's index.
        manifest: Digest of the manifest of the covered tensors.
        nbytes: Size of the payload.
        norm: Euclidean norm of the parameters, if it was taken.
        received: When the last byte came.
        verdict: counted or late.
    """

    digest: str
    plan_id: str
    run: str
    round: int
    attempt: int
    kind: PlanKind
    site: str
    work_digest: str
    header: bytes
    signature: bytes
    fingerprint: str
    index: str
    manifest: str
    nbytes: int
    norm: float | None
    received: float
    verdict: Literal["counted", "late"] = "counted"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The final answer to a contribution.

    Attributes:
        verdict: counted, late or refused.
        plan_id: Id of the plan that it counts for: of another attempt than its header names
            if that one was abandoned and the same work was asked for again, or of a later round.
        reason: Why not, in words; empty for counted.
        again: It had been answered before, and this is the same answer.
    """

    verdict: Literal["counted", "late", "refused"]
    plan_id: str
    reason: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One link of a run's hash chain: digests and ids, no site names, no bytes.

    Attributes:
        run: Id of the run.
        number: 1, 2, …; the first one is ``created``, with the digest of the configuration.
        kind: What happened.
        time: When.
        document: What it says, as canonical JSON.
        previous: Digest of the entry before; empty for the first.
        digest: Over run, number, kind, time, document and previous.
    """

    run: str
    number: int
    kind: EntryKind
    time: float
    document: str
    previous: str
    digest: str


@dataclass(frozen=True, slots=True)
class SignatureRow:
    """What the orchestrator signed.

    Attributes:
        time: When.
        fingerprint: Of the certificate of the key.
        value: The signature.
        pem: That certificate.
    """

    time: float
    fingerprint: str
    value: bytes
    pem: bytes
