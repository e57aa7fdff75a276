"""Every error that can cross the wire or end a command, in one tree.

    FarflungError
    ├── InvalidInput            what was given is wrong: a file, a key, an argument
    │   ├── ConfigInvalid       a configuration key (``key`` names it)
    │   └── ManifestInvalid     a manifest, an index or a header breaks its bounds
    ├── Refused                 understood, and not allowed
    │   ├── NotEnrolled         no certificate, a foreign one, or a revoked one
    │   ├── TokenUsed           the join token was used, revoked, or has expired
    │   ├── PolicyRefused       the site's own policy does not accept the plan
    │   └── ContributionRefused a contribution that must not be counted (site, tensor)
    ├── NotFound                a run, round, site, model or strategy that isn't there
    ├── Conflict                the thing exists already or is in another state
    │   ├── HomeLocked          a second daemon on one home, a second agent on one folder
    │   ├── RoundClosed         the answer came after the round was closed ("late")
    │   └── NotYet              it counts in the next round, which is not open yet; sent again then
    ├── Unavailable             the other end can't be reached now; trying again helps
    ├── DeadlineExceeded        the quorum was not there at the deadline
    ├── OutOfSpace              disk or memory reserved for a round is not there
    ├── DataCorrupt             bytes do not have the digest that they were stored under
    ├── TaskFailed              a task or strategy raised, was killed, or ran out of memory
    └── ComputeFailed           Ray, a reducer or a plug-in process failed

Facts are attributes (``error.facts``), never only prose. One table, ``ERRORS``, maps each
class to its gRPC status, its exit code and the sentence that a stranger may read. Anything
that is not in the tree becomes INTERNAL with a reference id, and its cause stays in the log.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple


class FarflungError(Exception):
    """Base of all errors that a user may see.

    Args:
        message: What happened, where (site, tensor, key) and what to do.
        **facts: The same as data: strings, numbers, booleans.
    """

    def __init__(self, message: str, **facts: str | int | float | bool) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts


class InvalidInput(FarflungError):
    """What was given is wrong."""


class ConfigInvalid(InvalidInput):
    """A configuration file or one of its keys is wrong."""


class ManifestInvalid(InvalidInput):
    """A manifest, an index or a header breaks its bounds."""


class Refused(FarflungError):
    """Understood, and not allowed."""


class NotEnrolled(Refused):
    """The caller's certificate is missing, foreign, revoked or of another role."""


class TokenUsed(Refused):
    """The join token was used before, was revoked, or has expired."""


class PolicyRefused(Refused):
    """The site's own policy does not accept the plan."""


class ContributionRefused(Refused):
    """A contribution that must not be counted; facts name site and tensor."""


class NotFound(FarflungError):
    """A run, round, site, model or strategy that is not there."""


class Conflict(FarflungError):
    """The thing exists already, or is in another state than the call needs."""


class HomeLocked(Conflict):
    """Another process holds this home folder."""


class RoundClosed(Conflict):
    """The answer came after its round was closed."""


class NotYet(Conflict):
    """The answer counts in the next round, which is not open yet."""


class Unavailable(FarflungError):
    """The other end can't be reached now."""


class DeadlineExceeded(FarflungError):
    """The quorum was not there at the deadline."""


class OutOfSpace(FarflungError):
    """Disk or memory that a round needs is not there."""


class DataCorrupt(FarflungError):
    """Bytes do not have the digest that they were stored or announced under."""


class TaskFailed(FarflungError):
    """A task or strategy raised, was killed by a signal, or ran out of memory."""


class ComputeFailed(FarflungError):
    """Ray, a reducer or a plug-in process failed."""


class Row(NamedTuple):
    """How one error class looks from outside.

    Attributes:
        status: Name of the gRPC status code.
        exit_code: Exit code of a command that ends with it (sysexits.h where one fits).
        public: One sentence that may be shown to a caller who is not trusted.
    """

    status: str
    exit_code: int
    public: str


ERRORS: dict[type[FarflungError], Row] = {
    FarflungError: Row("INTERNAL", 70, "An internal error; the log has the cause."),
    InvalidInput: Row("INVALID_ARGUMENT", 65, "The request is not valid."),
    ConfigInvalid: Row("INVALID_ARGUMENT", 78, "The configuration is not valid."),
    ManifestInvalid: Row("INVALID_ARGUMENT", 65, "The manifest or header is not valid."),
    Refused: Row("PERMISSION_DENIED", 77, "Not allowed."),
    NotEnrolled: Row("UNAUTHENTICATED", 77, "This certificate may not do that."),
    TokenUsed: Row("UNAUTHENTICATED", 77, "The join token was used or has expired."),
    PolicyRefused: Row("PERMISSION_DENIED", 77, "The site's policy does not allow it."),
    ContributionRefused: Row("PERMISSION_DENIED", 77, "The contribution was refused."),
    NotFound: Row("NOT_FOUND", 66, "There is no such thing."),
    Conflict: Row("FAILED_PRECONDITION", 75, "It is not in a state that allows this."),
    HomeLocked: Row("FAILED_PRECONDITION", 75, "Another process uses this folder."),
    RoundClosed: Row("FAILED_PRECONDITION", 75, "The round was closed before this came."),
    NotYet: Row("FAILED_PRECONDITION", 75, "It counts in the next round, which is not open yet."),
    Unavailable: Row("UNAVAILABLE", 69, "The other end can't be reached now."),
    DeadlineExceeded: Row("DEADLINE_EXCEEDED", 75, "The deadline passed below the quorum."),
    OutOfSpace: Row("RESOURCE_EXHAUSTED", 74, "There is not enough space."),
    DataCorrupt: Row("DATA_LOSS", 74, "Bytes do not match their digest."),
    TaskFailed: Row("ABORTED", 76, "The task failed."),
    ComputeFailed: Row("ABORTED", 76, "The reduction or a plug-in failed."),
}


def row(error: BaseException) -> Row:
    """The table's row of an error; of its nearest listed base, INTERNAL for strangers."""
    for cls in type(error).__mro__:
        if cls in ERRORS:
            return ERRORS[cls]
    return ERRORS[FarflungError]


def by_name(name: str) -> type[FarflungError]:
    """The error class of that name; ``FarflungError`` for a name that we do not know."""
    return next((cls for cls in ERRORS if cls.__name__ == name), FarflungError)


def reference_id() -> str:
    """A short id that ties an INTERNAL answer to its line in the log."""
    return secrets.token_hex(4)
