"""A contribution from its head to the final answer, whichever way its bytes come."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from orchestrator.doorkeeper import Caller
from orchestrator.heads import Announced
from orchestrator.intake import Intake
from orchestrator.ledger import Ledger, PlanRow
from orchestrator.recorder import Recorder
from protos.bulk import Chunk
from protos.contribution import Header
from protos.errors import (
    ContributionRefused,
    FarflungError,
    InvalidInput,
    ManifestInvalid,
    NotFound,
    NotYet,
    OutOfSpace,
    RoundClosed,
    Unavailable,
)
from protos.faults import reach
from protos.v1 import common_pb2, site_pb2

log = logging.getLogger(__name__)

Pieces = Callable[[Announced], AbstractContextManager[Iterator[Chunk]]]
"""The chunks of a contribution whose head is right; they may have to wait for their turn."""

VERDICTS = {
    "counted": common_pb2.Answer.COUNTED,
    "late": common_pb2.Answer.LATE,
    "refused": common_pb2.Answer.REFUSED,
    "failed": common_pb2.Answer.REFUSED,
    "left": common_pb2.Answer.REFUSED,
}


class Reception:
    """Takes contributions in.

    Args:
        ledger: Knows what was answered before.
        intake: Checks and stores them.
        recorder: Writes down what came of them.
    """

    def __init__(self, ledger: Ledger, intake: Intake, recorder: Recorder) -> None:
        self._ledger, self._intake, self._recorder = ledger, intake, recorder

    def take(
        self, caller: Caller, head: site_pb2.ContributionHead, pieces: Pieces
    ) -> common_pb2.Answer:
        """One contribution that comes in pieces; the answer is final.

        Raises:
            FarflungError: Sending again may help: chunks are missing or damaged, something is not
                there just now.
        """

        def received(announced: Announced) -> common_pb2.Answer:
            site = announced.header.site
            with pieces(announced) as chunks, self._intake.receiving(announced) as file:
                # Asked only now: an older stream may just have had its answer.
                row = self._ledger.plan(announced.header.plan_id, site)
                settled = _settled(row, announced)
                if settled is not None:
                    file.discard()
                    reach("receive.settled")
                    self._intake.forget(site, announced.digest)
                    return settled
                if row is not None:
                    self._ledger.awaits(row, announced.header.base)
                self._recorder.moved(site, sent=self._intake.receive(file, chunks, site))
                if not file.complete:
                    missing = sum(end - first for first, end in file.missing())
                    raise InvalidInput(
                        f"site {site}: {missing} chunks are missing; send them", site=site
                    )
                reach("receive.whole")
                return self._intake.complete(announced, file, caller)

        return self._answered(caller, head, received)

    def take_whole(
        self, caller: Caller, head: site_pb2.ContributionHead, data: bytes
    ) -> common_pb2.Answer:
        """One contribution that came in one message; see `take`."""

        def received(announced: Announced) -> common_pb2.Answer:
            self._recorder.moved(announced.header.site, sent=len(data))
            settled = _settled(announced.row, announced)
            return settled or self._intake.take(announced, data, caller)

        return self._answered(caller, head, received)

    def _answered(
        self,
        caller: Caller,
        head: site_pb2.ContributionHead,
        received: Callable[[Announced], common_pb2.Answer],
    ) -> common_pb2.Answer:
        site, plan_id = caller.identity.name, ""
        try:
            announced = self._intake.announce(caller, head)
            reach("receive.announced")
            plan_id = announced.header.plan_id
            return received(announced)
        except ConnectionError:
            raise  # the way here broke, not the disk
        except OSError as error:
            raise self._put_off(site, _of_the_disk(site, error)) from error
        except FarflungError as error:
            if not _final(error):
                raise self._put_off(site, error) from error.__cause__
            return self._refuse(site, plan_id or _plan_of(head.header), error)

    def _put_off(self, site: str, error: FarflungError) -> FarflungError:
        """What the site is told, and an operator where it is no matter of the bytes' way here."""
        if not isinstance(error, InvalidInput | NotYet):
            self._recorder.troubled(site, f"a contribution can't be taken in: {error.message}")
        return error

    def status(self, caller: Caller, plan_id: str) -> site_pb2.StatusReply:
        """What is missing of the caller's contribution, or its final answer."""
        row = self._ledger.plan(plan_id, caller.identity.name)
        reach("status.asked")
        if row is not None and row.answer in ("counted", "late", "refused"):
            final = _answer(row.answer, plan_id, row.contribution, row.error, row.message)
            return site_pb2.StatusReply(known=True, answer=final)
        elsewhere = None if row is None or row.answer else self._ledger.counted_for(row)
        if elsewhere is not None:
            found = _answer("counted", elsewhere.id, elsewhere.contribution)
            return site_pb2.StatusReply(known=True, answer=found)
        missing = self._intake.missing(caller, plan_id)
        return site_pb2.StatusReply(
            known=missing is not None,
            missing=[common_pb2.ChunkRange(first=a, end=b) for a, b in missing or ()],
        )

    def _refuse(self, site: str, plan_id: str, error: FarflungError) -> common_pb2.Answer:
        name = type(error).__name__
        log.warning("contribution refused: %s", error.message, extra={"site": site})
        self._recorder.refuse(plan_id, site, name, error.message)
        reach("receive.refused")
        return _answer("refused", plan_id, "", name, error.message)


def _settled(row: PlanRow | None, announced: Announced) -> common_pb2.Answer | None:
    """The answer that a plan has already, if a contribution to it was counted."""
    if row is None or row.answer != "counted":
        return None
    plan_id, contribution = announced.header.plan_id, announced.digest
    if row.contribution == contribution:
        return _answer("counted", plan_id, contribution)
    text = f"site {announced.header.site}: another one was counted"
    return _answer("refused", plan_id, contribution, "Conflict", text)


def _answer(
    verdict: str, plan_id: str, contribution: str, error: str = "", message: str = ""
) -> common_pb2.Answer:
    return common_pb2.Answer(
        verdict=VERDICTS[verdict],
        error=error,
        message=message,
        plan_id=plan_id,
        contribution=contribution,
    )


def _of_the_disk(site: str, error: OSError) -> FarflungError:
    """What the orchestrator's own disk says of a contribution that arrives."""
    text = f"site {site}: the orchestrator can't write it down: {error.strerror or error}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutOfSpace(text, site=site) if full else Unavailable(text, site=site)


def _final(error: FarflungError) -> bool:
    """Whether sending the same again can't help: such an answer empties the outbox."""
    return isinstance(error, ContributionRefused | ManifestInvalid | NotFound | RoundClosed)


def _plan_of(header: bytes) -> str:
    try:
        return Header.decode(header).plan_id
    except FarflungError:
        return ""
