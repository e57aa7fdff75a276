"""Contributions on their way in, over a real ledger and store, through the handlers of the service."""

import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.blocks import Blocks
from orchestrator.doorkeeper import Doorkeeper
from orchestrator.intake import Intake
from orchestrator.ledger import RoundRow
from orchestrator.reception import Reception
from orchestrator.recorder import LedgerRecorder
from orchestrator.rounds.plan import plan_row
from orchestrator.site_service import BulkService
from orchestrator.views import WorkState
from protos.bulk import Chunk, Incoming
from protos.contribution import Header
from protos.digest import digest
from protos.errors import (
    ContributionRefused,
    FarflungError,
    InvalidInput,
    ManifestInvalid,
    NotEnrolled,
    NotFound,
    NotYet,
    Unavailable,
)
from protos.identity import certificate_pem
from protos.manifest import CHUNK_BYTES, Index, Manifest
from protos.plan import Plan, Schedule, StrategyChoice, TaskChoice, Work
from protos.tensors import iterate_bytes
from protos.v1 import common_pb2, site_pb2
from strategies import registry
from tests.support import strategies_for_tests
from tests.support.authority import Authority
from tests.support.contributor import Call, Contributor, arrived, chunks
from tests.support.workbench import Workbench, of_spec

COUNTED, LATE, REFUSED = (
    common_pb2.Answer.COUNTED,
    common_pb2.Answer.LATE,
    common_pb2.Answer.REFUSED,
)
MANIFEST = Manifest(
    (
        of_spec("w", (400_000,)),
        of_spec("mean", (5,), kind="statistic"),
        of_spec("n", (), "int64"),
        of_spec("head", (3,), group="head"),
    )
)


class Heard:
    """What the round under way would hear."""

    def __init__(self) -> None:
        self.counts: list[tuple[str, str]] = []
        self.failures: list[tuple[str, str, str, str]] = []
        self.troubles: list[tuple[str, str]] = []
        self.sent = self.received = 0

    def progress(self, site: str, plan_id: str, state: WorkState, said: Any) -> None:
        """Nothing."""

    def counted(self, site: str, plan_id: str, header_digest: str) -> None:
        self.counts.append((site, plan_id))

    def failed(self, site: str, plan_id: str, error: str, message: str, how: str) -> None:
        self.failures.append((site, error, message, how))

    def moved(self, site: str, received: int = 0, sent: int = 0) -> None:
        self.received += received
        self.sent += sent

    def left_run(self, site: str, run: str) -> None:
        """Nothing."""

    def troubled(self, site: str, text: str) -> None:
        self.troubles.append((site, text))


class Hall:
    """A round that is planned for two sites, and the doors."""

    whole = False
    """Whether contributions come in one message, and not in pieces."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.authority = Authority("f-hall")
        self.sites = {n: Contributor(self.authority, n) for n in ("north", "south")}
        for number, site in enumerate(self.sites.values()):
            bench.ledger.invite(site.name, f"t{number}", 4e9)
            bench.ledger.use_token(
                f"t{number}",
                fingerprint=site.caller.fingerprint,
                certificate_pem=certificate_pem(site.caller.certificate),
                expires=4e9,
            )
        self.north = self.sites["north"]
        self.values = {
            "w": torch.arange(400_000.0) / 1000,
            "mean": torch.full((5,), 1e9),
            "n": torch.tensor(2**40),
            "head": torch.tensor([3.0, 0.0, 4.0]),
        }
        self.base = bench.put_model(MANIFEST, self.values)
        self.heard = Heard()
        self.open_doors()
        bench.run("r")
        self.plans: dict[str, Plan] = {}

    def open_doors(self) -> None:
        bench, recorder = self.bench, LedgerRecorder(self.bench.ledger, self.heard)
        self.intake = Intake(
            bench.ledger, bench.store, bench.home.spool, recorder, Blocks(bench.engine)
        )
        self.reception = Reception(bench.ledger, self.intake, recorder)
        self.service = BulkService(
            bench.ledger,
            bench.store,
            Doorkeeper(bench.ledger, "f-hall"),
            self.reception,
            recorder,
        )

    def open(self, number: int = 1, attempt: int = 1, abandoning: str = "", **more: Any) -> Plan:
        """Plan an attempt for both sites; gives the north's plan."""
        for site in self.sites:
            fields: dict[str, Any] = {
                "run": "r",
                "round": number,
                "attempt": attempt,
                "site": site,
                "base": self.base,
                "manifest": MANIFEST.digest,
                "accepts": (self.base,),
                "task": TaskChoice(name="t"),
                "work": Work(epochs=1),
                "schedule": Schedule(lr=0.1),
            }
            self.plans[site] = Plan(**{**fields, **more})
        row = RoundRow(more.get("run", "r"), number, attempt, base=self.base)
        self.bench.ledger.plan_round(
            row, [plan_row(p) for p in self.plans.values()], abandoning=abandoning
        )
        return self.plans["north"]

    def data(self, **values: torch.Tensor) -> bytes:
        return self.north.payload(MANIFEST, {**self.values, **values})

    def send(
        self, head: site_pb2.ContributionHead, data: bytes, by: Contributor | None = None
    ) -> common_pb2.Answer:
        if self.whole:
            return self.reception.take_whole((by or self.north).caller, head, data)
        return self.service.Contribute(arrived(head, chunks(data)), (by or self.north).call)

    def restarted(self) -> "Hall":
        """The same as the next daemon would find it."""
        later = Hall.__new__(Hall)
        later.__dict__.update(self.__dict__)
        later.open_doors()
        return later

    def status(self, plan: Plan, by: Contributor | None = None) -> site_pb2.StatusReply:
        request = site_pb2.StatusRequest(plan_id=plan.id)
        return self.service.ContributionStatus(request, (by or self.north).call)

    @property
    def spooled(self) -> list[Path]:
        return [p for p in self.bench.home.spool.rglob("*") if p.is_file()]

    def stored(self) -> list[str]:
        """What counts, by site."""
        return [c.site for c in self.bench.ledger.contributions("r", 1, 1)]


@pytest.fixture
def hall(tmp_path: Path) -> Iterator[Hall]:
    bench = Workbench(tmp_path)
    yield Hall(bench)
    bench.close()


either_way = pytest.mark.parametrize("whole", [False, True], ids=["in pieces", "whole"])


# -- what counts ------------------------------------------------------------------------------------


@either_way
def test_a_contribution_is_stored_counted_and_acknowledged(hall: Hall, whole: bool) -> None:
    hall.whole = whole
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    answer = hall.send(head, data)
    assert (answer.verdict, answer.plan_id, answer.error) == (COUNTED, plan.id, "")
    assert answer.contribution == digest(head.header)
    row = hall.bench.ledger.contribution(answer.contribution)
    # What was signed is kept as it was carried.
    assert (row.header, row.signature) == (head.header, head.signature)
    assert row.fingerprint == hall.north.caller.fingerprint
    assert hall.bench.bytes_of(row.index) == data
    assert hall.spooled == []
    assert hall.heard.counts == [("north", plan.id)]
    assert hall.heard.sent == len(data)
    squares = hall.values["w"].double().square().sum() + 25
    # Of parameters alone: neither the statistic nor the counter.
    assert row.norm == pytest.approx(math.sqrt(float(squares)), rel=1e-5)


@either_way
def test_the_same_again_is_answered_the_same(hall: Hall, whole: bool) -> None:
    hall.whole = whole
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    first = hall.send(head, data)
    assert hall.send(head, b"") == first
    assert hall.send(head, data) == first
    assert hall.status(plan).answer.verdict == COUNTED
    assert hall.stored() == ["north"]
    assert hall.spooled == []


@either_way
def test_another_one_for_the_same_plan_is_refused_and_the_first_stays(
    hall: Hall, whole: bool
) -> None:
    hall.whole = whole
    plan, data = hall.open(), hall.data()
    first = hall.send(hall.north.head(plan, data, MANIFEST.digest), data)
    other = hall.data(head=torch.zeros(3))
    answer = hall.send(hall.north.head(plan, other, MANIFEST.digest), other)
    assert answer.verdict == REFUSED
    assert [c.digest for c in hall.bench.ledger.contributions("r", 1, 1)] == [first.contribution]
    assert hall.spooled == []
    # Nor does one that is wrong in itself change what is shown of the first.
    wrong = hall.north.head(plan, other, MANIFEST.digest, signer=hall.sites["south"].key)
    assert hall.send(wrong, other).verdict == REFUSED
    assert hall.heard.failures == []
    assert hall.status(plan).answer.verdict == COUNTED


@either_way
def test_too_late_is_said_and_nothing_of_it_counts(hall: Hall, whole: bool) -> None:
    hall.whole = whole
    plan, data = hall.open(), hall.data()
    hall.bench.ledger.close_round("r", 1, 1, None, "the deadline passed")
    answer = hall.send(hall.north.head(plan, data, MANIFEST.digest), data)
    assert (answer.verdict, answer.error) == (LATE, "RoundClosed")
    assert "closed before this came" in answer.message
    assert hall.stored() == []
    assert hall.spooled == []
    assert hall.heard.counts == []
    assert hall.status(plan).answer.verdict == LATE


def test_finished_work_of_an_abandoned_attempt_counts_in_the_next(hall: Hall) -> None:
    first, data = hall.open(), hall.data()
    second = hall.open(attempt=2, abandoning="below quorum")
    answer = hall.send(hall.north.head(first, data, MANIFEST.digest), data)
    assert (answer.verdict, answer.plan_id) == (COUNTED, second.id)
    assert hall.heard.counts == [("north", second.id)]
    assert [c.site for c in hall.bench.ledger.contributions("r", 1, 2)] == ["north"]


@either_way
def test_work_for_a_closed_round_waits_for_the_next_one(hall: Hall, whole: bool) -> None:
    hall.whole, ledger = whole, hall.bench.ledger
    hall.bench.run("p", cohort="{quorum = 1, stale = 1}")
    ledger.set_run("p", state="running")
    plan, data = hall.open(run="p"), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    ledger.close_round("p", 1, 1, None, "the deadline passed")
    for _ in range(2):
        with pytest.raises(NotYet, match="site north: round 1 is closed"):
            hall.send(head, data)
    assert hall.heard.troubles == [], "nothing is wrong"
    if not whole:
        assert hall.heard.sent == 0, "it is said before its bytes are taken"
    model = hall.bench.put_model(MANIFEST, {**hall.values, "head": torch.ones(3)})
    ledger.commit_round("p", 1, 1, model=model)
    later = hall.open(2, run="p", base=model, accepts=(model, hall.base))
    answer = hall.send(head, data)
    assert (answer.verdict, answer.plan_id) == (COUNTED, later.id)
    assert hall.heard.counts == [("north", later.id)]
    found = hall.status(plan).answer  # as a site asks that did not hear the answer
    assert (found.verdict, found.plan_id) == (COUNTED, later.id)
    assert found.contribution == answer.contribution
    assert hall.send(head, data) == answer


# -- interrupted transfers --------------------------------------------------------------------------


def test_an_interrupted_transfer_goes_on_where_it_was(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    assert not hall.status(plan).known
    with pytest.raises(InvalidInput, match="1 chunks are missing"):
        hall.service.Contribute(arrived(head, chunks(data, [1])), hall.north.call)
    status = hall.status(plan)
    assert status.known
    assert [(r.first, r.end) for r in status.missing] == [(0, 1)]
    later = hall.restarted()
    answer = later.service.Contribute(arrived(head, chunks(data, [0])), hall.north.call)
    assert answer.verdict == COUNTED
    assert hall.bench.bytes_of(hall.bench.ledger.contribution(answer.contribution).index) == data


def test_a_stream_that_breaks_leaves_what_came(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)

    def breaks() -> Iterator[Incoming]:
        yield from arrived(head, chunks(data, [0]))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        hall.service.Contribute(breaks(), hall.north.call)
    assert [(r.first, r.end) for r in hall.status(plan).missing] == [(1, 2)]


def test_status_while_a_stream_writes_disturbs_nothing(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)

    def asks() -> Iterator[Incoming]:
        for message in arrived(head, chunks(data)):
            yield message
            assert hall.status(plan).known

    assert hall.service.Contribute(asks(), hall.north.call).verdict == COUNTED
    assert hall.spooled == []


def test_a_second_stream_waits_for_the_first_and_hears_its_answer(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not begin the file anew while the first one's is being taken into the store."""
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    answers: list[common_pb2.Answer] = []
    threads: list[threading.Thread] = []
    waits = threading.Event()

    monkeypatch.setattr("orchestrator.turns._pause", waits.set)
    real = hall.intake._examine

    def examine(*args: Any) -> Any:
        threads.append(threading.Thread(target=lambda: answers.append(hall.send(head, data))))
        threads[0].start()
        assert waits.wait(20)
        return real(*args)

    monkeypatch.setattr(hall.intake, "_examine", examine)
    answers.append(hall.send(head, data))
    threads[0].join()
    assert [a.verdict for a in answers] == [COUNTED, COUNTED]
    assert len(threads) == 1
    row = hall.bench.ledger.contributions("r", 1, 1)[0]
    hall.bench.store.verify(row.index)
    assert hall.spooled == []


def test_a_first_stream_that_hangs_is_not_waited_for_for_ever(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.intake.TURN_S", 0.0)
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    announced = hall.intake.announce(hall.north.caller, head)
    with hall.intake.receiving(announced), pytest.raises(Unavailable, match="another stream"):
        hall.send(head, data)
    assert hall.send(head, data).verdict == COUNTED


def test_what_another_process_wrote_is_looked_at_before_it_is_believed(hall: Hall) -> None:
    """Two gateways, in turns: neither knows what the disk did while the other had the file."""
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    other = hall.restarted()
    with pytest.raises(InvalidInput, match="1 chunks are missing"):
        hall.service.Contribute(arrived(head, chunks(data, [0])), hall.north.call)
    assert [(r.first, r.end) for r in other.status(plan).missing] == [(1, 2)]
    part = next(path for path in hall.spooled if path.name == "payload.part")
    with part.open("r+b") as file:
        file.write(b"\xff" * 100)
    assert [(r.first, r.end) for r in hall.status(plan).missing] == [(0, 2)]
    assert other.send(head, data).verdict == COUNTED
    assert hall.send(head, b"").verdict == COUNTED
    assert hall.spooled == []


def test_one_process_writes_and_another_says_so(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.intake.STATUS_S", 0.0)
    monkeypatch.setattr("orchestrator.intake.TURN_S", 0.0)
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    other = hall.restarted()

    def asks() -> Iterator[Incoming]:
        for message in arrived(head, chunks(data)):
            yield message
            assert hall.status(plan).known  # whoever receives it knows what is missing
            with pytest.raises(Unavailable, match="site north: another stream"):
                other.status(plan)
            with pytest.raises(Unavailable, match="site north: another stream"):
                other.send(head, data)

    assert hall.service.Contribute(asks(), hall.north.call).verdict == COUNTED
    assert other.status(plan).answer.verdict == COUNTED
    assert hall.spooled == []


# -- what is refused --------------------------------------------------------------------------------


def refused(hall: Hall, head: site_pb2.ContributionHead, data: bytes) -> common_pb2.Answer:
    """Send what must be refused for good, and check that nothing of it is left."""
    answer = hall.send(head, data)
    assert answer.verdict == REFUSED
    assert "site north" in answer.message
    assert hall.stored() == []
    assert hall.spooled == []
    plan = hall.plans["north"]
    if Header.decode(head.header).plan_id == plan.id:
        row = hall.bench.ledger.plan(plan.id, "north")
        assert row is not None
        assert (row.answer, row.error, row.message) == ("refused", answer.error, answer.message)
        assert hall.heard.failures == [("north", answer.error, answer.message, "refused")]
        assert hall.status(plan).answer.message == answer.message
        # And then the round can go on without it, and the south is not concerned.
        assert [p.site for p in hall.bench.ledger.open_plans("south")] == ["south"]
    return answer


@pytest.mark.parametrize(
    ("tensor", "position", "value"),
    [
        ("w", 0, math.nan),
        ("w", 399_999, math.inf),
        ("w", 300_000, -math.inf),
        ("mean", 4, math.nan),
        ("head", 1, math.inf),
    ],
)
def test_what_is_not_finite_is_refused_by_tensor(
    hall: Hall, tensor: str, position: int, value: float
) -> None:
    plan = hall.open()
    bad = hall.values[tensor].clone()
    bad[position] = value
    data = hall.data(**{tensor: bad})
    answer = refused(hall, hall.north.head(plan, data, MANIFEST.digest), data)
    assert answer.error == "ContributionRefused"
    assert f"site north, tensor {tensor}: it holds NaN or infinity" in answer.message


def test_what_came_whole_is_looked_at_too(hall: Hall) -> None:
    hall.whole = True
    plan, data = hall.open(), hall.data(head=torch.tensor([3.0, math.nan, 4.0]))
    answer = hall.send(hall.north.head(plan, data, MANIFEST.digest), data)
    assert answer.verdict == REFUSED
    assert "tensor head: it holds NaN" in answer.message
    assert hall.stored() == []
    assert not list((hall.bench.home.store / "scratch").iterdir())


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"x" + d[1:]])
def test_what_came_whole_and_damaged_is_to_be_sent_again(
    hall: Hall, damage: Callable[[bytes], bytes]
) -> None:
    hall.whole = True
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    with pytest.raises(InvalidInput, match="send it again"):
        hall.send(head, damage(data))
    assert hall.stored() == []
    assert hall.send(head, data).verdict == COUNTED


def test_large_numbers_are_not_infinite(hall: Hall) -> None:
    """Their squares are, in fp32."""
    plan = hall.open()
    data = hall.data(head=torch.tensor([3e38, -3e38, 0]))
    assert hall.send(hall.north.head(plan, data, MANIFEST.digest), data).verdict == COUNTED
    norm = hall.bench.ledger.contributions("r", 1, 1)[0].norm
    assert norm == pytest.approx(3e38 * math.sqrt(2), rel=1e-5)


def test_any_bits_of_a_counter_are_numbers(hall: Hall) -> None:
    plan, data = hall.open(), hall.data(n=torch.tensor(-1))
    assert hall.send(hall.north.head(plan, data, MANIFEST.digest), data).verdict == COUNTED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_side_payloads_are_finite_too(hall: Hall, dtype: torch.dtype) -> None:
    plan, side = hall.open(), torch.tensor([1.0, math.nan]).to(dtype)
    data = hall.north.payload(MANIFEST, hall.values, [side])
    head = hall.north.head(plan, data, MANIFEST.digest, {"s/sums": (side, "sum")})
    assert "tensor s/sums: it holds NaN" in refused(hall, head, data).message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"base": "7" * 64}, "it was trained from the base 777777777777"),
        ({"base": ""}, r"it was trained from the base \(none\)"),
        ({"work_digest": "7" * 64}, "it answers other work"),
        ({"kind": "assess"}, "it is a assess contribution to a train plan"),
        ({"index": "7" * 64}, "the index is not the one that the header names"),
        ({"manifest": "7" * 64}, "index and header name different manifests"),
        ({"codec": "half", "blocks": (1, 2)}, "2 blocks for 5 tiles"),
        ({"partial": True}, "it is partial work, which the run does not take"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_header_that_does_not_fit_the_plan(
    hall: Hall, changes: dict[str, Any], what: str
) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest, **changes)
    with pytest.raises(FarflungError, match=what):
        hall.intake.announce(hall.north.caller, head)
    refused(hall, head, data)


def test_partial_work_counts_where_the_run_takes_it(hall: Hall) -> None:
    hall.bench.run("p", cohort="{partial = true}")
    plan, data = hall.open(run="p"), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest, partial=True)
    assert hall.send(head, data).verdict == common_pb2.Answer.COUNTED


@pytest.mark.parametrize("shape", [(399_999,), (400_001,), (200_000, 2)])
def test_other_shapes_are_refused(hall: Hall, shape: tuple[int, ...]) -> None:
    plan = hall.open()
    other = Manifest((of_spec("w", shape), *MANIFEST.tensors[1:]))
    data = hall.north.payload(other, {**hall.values, "w": torch.zeros(shape)})
    answer = refused(hall, hall.north.head(plan, data, other.digest), data)
    assert "its tensors are not those of the plan" in answer.message


@pytest.mark.parametrize("extra", [-4, 4, CHUNK_BYTES])
def test_other_sizes_are_refused_before_a_byte_moves(hall: Hall, extra: int) -> None:
    plan, data = hall.open(), hall.data()
    longer = (data + bytes(max(0, extra)))[: len(data) + extra]
    answer = refused(hall, hall.north.head(plan, longer, MANIFEST.digest), longer)
    assert f"{len(longer)} bytes are announced where header and manifest make" in answer.message
    assert hall.heard.sent == 0


def test_more_bytes_than_were_announced_are_refused(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    answer = refused(hall, head, data + bytes(CHUNK_BYTES))
    assert "chunk 1: " in answer.message


def test_a_damaged_chunk_is_asked_for_again_and_nothing_else(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(InvalidInput, match="announced digest; send it again"):
        hall.send(head, damaged)
    assert [(r.first, r.end) for r in hall.status(plan).missing] == [(1, 2)]
    answer = hall.service.Contribute(arrived(head, chunks(data, [1])), hall.north.call)
    assert answer.verdict == COUNTED
    assert hall.bench.bytes_of(hall.bench.ledger.contribution(answer.contribution).index) == data


@pytest.mark.parametrize("at", [0, CHUNK_BYTES - 1])
def test_a_byte_that_the_disk_damaged_costs_its_chunk(hall: Hall, at: int) -> None:
    """While the daemon was down; in the same process a record is believed."""
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    with pytest.raises(InvalidInput, match="1 chunks are missing"):
        hall.service.Contribute(arrived(head, chunks(data, [0])), hall.north.call)
    (part,) = hall.bench.home.spool.rglob("payload.part")
    with part.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    later = hall.restarted()
    assert [(r.first, r.end) for r in later.status(plan).missing] == [(0, 2)]
    assert later.send(head, data).verdict == COUNTED


def test_a_complete_payload_outlives_its_daemon(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(hall.bench.store), "adopt", dies)
        with pytest.raises(KeyboardInterrupt):
            hall.send(head, data)
    later = hall.restarted()
    assert list(later.status(plan).missing) == []
    answer = later.service.Contribute(arrived(head, iter(())), hall.north.call)
    assert answer.verdict == COUNTED
    assert hall.bench.bytes_of(hall.bench.ledger.contribution(answer.contribution).index) == data


def test_a_side_payload_may_not_be_endless(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.heads.MAX_SIDE_BYTES", 15)
    plan, side = hall.open(), torch.zeros(4)
    data = hall.north.payload(MANIFEST, hall.values, [side])
    head = hall.north.head(plan, data, MANIFEST.digest, {"s/x": (side, "sum")})
    assert "16 bytes of side payloads" in refused(hall, head, data).message


def test_a_foreign_signature_is_refused(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    for changes in (
        {"signer": hall.sites["south"].key},
        {"signed_plan": "r/2/1/train"},
    ):
        head = hall.north.head(plan, data, MANIFEST.digest, **changes)
        with pytest.raises(ContributionRefused, match="signature does not hold"):
            hall.intake.announce(hall.north.caller, head)
    refused(hall, head, data)


def test_nobody_speaks_for_another(hall: Hall) -> None:
    """Not even with that one's plan in hand, and not to its harm."""
    plan, data = hall.open(), hall.data()
    south = hall.sites["south"]
    for signer in (hall.north.key, south.key):
        head = hall.north.head(plan, data, MANIFEST.digest, site="south", signer=signer)
        with pytest.raises(ContributionRefused, match="the header speaks for south"):
            hall.intake.announce(hall.north.caller, head)
    assert hall.send(head, data).verdict == REFUSED
    assert hall.spooled == []
    theirs = hall.bench.ledger.plan(hall.plans["south"].id, "south")
    assert theirs is not None
    assert theirs.answer == ""


@pytest.mark.parametrize("plan_id", ["r/9/1/train", "other/1/1/train", "", "r/1/1", "r/1/x/train"])
def test_a_plan_that_it_was_not_given_is_not_there(hall: Hall, plan_id: str) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest, plan_id=plan_id)
    with pytest.raises(NotFound, match="site north: no plan"):
        hall.intake.announce(hall.north.caller, head)
    assert refused(hall, head, data).error == "NotFound"
    # Its own plan is not concerned.
    assert [p.id for p in hall.bench.ledger.open_plans("north")] == [plan.id]


def test_another_sites_plan_is_not_there(hall: Hall) -> None:
    hall.open()
    other = Plan.decode(plan_row(hall.plans["south"]).plan).model_copy(update={"attempt": 7})
    rows = [plan_row(other)]
    hall.bench.ledger.close_round("r", 1, 1, None, "x")
    hall.bench.ledger.abandon_round("r", 1, 1, "x")
    hall.bench.ledger.plan_round(RoundRow("r", 1, 7, base=hall.base), rows)
    data = hall.data()
    with pytest.raises(NotFound):
        hall.intake.announce(hall.north.caller, hall.north.head(other, data, MANIFEST.digest))
    assert not hall.status(other).known


@pytest.mark.parametrize("what", ["header", "index", "both"])
def test_documents_that_can_not_be_read_are_refused(hall: Hall, what: str) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    if what != "index":
        head.header = head.header + b" "
    if what != "header":
        head.index = b"[" * 1000
    with pytest.raises((ManifestInvalid, ContributionRefused)):
        hall.intake.announce(hall.north.caller, head)
    assert hall.send(head, data).verdict == REFUSED
    assert hall.spooled == []
    assert hall.stored() == []


def test_a_stream_begins_with_its_head(hall: Hall) -> None:
    hall.open()
    for stream in ([], [Chunk(0, memoryview(b""))]):
        with pytest.raises(InvalidInput, match="first message must be the head"):
            hall.service.Contribute(iter(stream), hall.north.call)


# -- encoded contributions --------------------------------------------------------------------------


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> StrategyChoice:
    codec = strategies_for_tests.HalfPrecision
    every = {**registry.catalogue(), codec.name: codec}
    monkeypatch.setattr(registry, "catalogue", lambda: every)
    return StrategyChoice(name=codec.name)


def block(tensor: torch.Tensor) -> bytes:
    return b"\1" + len(tensor).to_bytes(4, "little") + tensor.half().numpy().tobytes()


@pytest.mark.parametrize(
    ("piece", "verdict", "what"),
    [
        (block(torch.tensor([3.0, 0.0, 4.0])), COUNTED, ""),
        (block(torch.tensor([3.0, math.nan, 4.0])), REFUSED, "tensor head: it holds NaN"),
        (block(torch.tensor([3.0, 0.0])), REFUSED, "can't be decoded.*block of the wrong length"),
        (b"", REFUSED, "can't be decoded.*block without a head"),
        (b"junk", REFUSED, "can't be decoded"),
    ],
    ids=["right", "NaN", "short", "empty", "junk"],
)
@either_way
def test_blocks_are_decoded_before_they_count(
    hall: Hall, half: StrategyChoice, piece: bytes, verdict: int, what: str, whole: bool
) -> None:
    """A block that no codec reads would otherwise be sent again for ever, or break the round."""
    hall.whole = whole
    plan = hall.open(stack=(half,), groups=("head",))
    covered = MANIFEST.covering(["head"])
    head = hall.north.head(plan, piece, covered.digest, codec=half.name, blocks=(len(piece),))
    if verdict == COUNTED:
        assert hall.send(head, piece).verdict == COUNTED
        assert hall.bench.ledger.contributions("r", 1, 1)[0].norm == 5.0
    else:
        message = refused(hall, head, piece).message
        assert re.search(what, message), message


def test_a_codec_that_the_run_does_not_have_is_refused(hall: Hall, half: StrategyChoice) -> None:
    plan = hall.open(groups=("head",))
    piece = block(torch.tensor([3.0, 0.0, 4.0]))
    covered = MANIFEST.covering(["head"])
    head = hall.north.head(plan, piece, covered.digest, codec=half.name, blocks=(len(piece),))
    assert "is not this run's codec" in refused(hall, head, piece).message


# -- first models -----------------------------------------------------------------------------------


def first_model(manifest: Manifest, values: dict[str, torch.Tensor]) -> bytes:
    return b"".join(iterate_bytes(manifest, values))


def as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def asked_for_a_first_model(hall: Hall) -> Plan:
    plan = hall.open(number=0, kind="init", base="", manifest="", accepts=())
    hall.plans = {"north": plan}
    return plan


def test_a_first_model_comes_with_its_manifest(hall: Hall) -> None:
    plan = asked_for_a_first_model(hall)
    manifest = Manifest((*MANIFEST.tensors, of_spec("half", (3,), "bfloat16")))
    values = {**hall.values, "half": torch.ones(3).bfloat16()}
    sides = {"init/manifest": (as_bytes(manifest.encoded), "keep per site")}
    data = first_model(manifest, values) + manifest.encoded
    head = hall.north.head(plan, data, manifest.digest, sides)  # type: ignore[arg-type]
    assert hall.send(head, data).verdict == COUNTED


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("half", "tensor half: it holds NaN"),
        ("w", "tensor w: it holds NaN"),
        ("mean", "tensor mean: it holds NaN"),
        ("anchor", "tensor anchor: it holds NaN"),
        ("other manifest", "its first model"),
        ("other size", "its first model"),
        ("no manifest", "it carries no manifest"),
        ("junk", "manifest"),
    ],
)
def test_a_first_model_is_looked_into_before_it_counts(hall: Hall, name: str, what: str) -> None:
    """The run would otherwise begin with it, and every site would train on NaN."""
    plan = asked_for_a_first_model(hall)
    manifest = Manifest((*MANIFEST.tensors, of_spec("half", (3,), "bfloat16")))
    frozen = Manifest((of_spec("anchor", (3,), "float16", placement="frozen"),))
    values = {
        **hall.values,
        "half": torch.ones(3).bfloat16(),
        "anchor": torch.ones(3).half(),
    }
    if name in values:
        values[name] = values[name].clone()
        values[name].view(-1)[-1] = math.nan
    model, encoded = first_model(manifest, values), manifest.encoded
    digest_of = manifest.digest
    if name == "other manifest":
        digest_of = MANIFEST.digest
    elif name == "other size":
        model += bytes(64)
    elif name == "junk":
        encoded = b"[" * 99
    parts = {
        "init/manifest": encoded,
        "init/frozen": first_model(frozen, values),
        "init/frozen_manifest": frozen.encoded,
    }
    if name == "no manifest":
        del parts["init/manifest"]
    sides: Any = {key: (as_bytes(part), "keep per site") for key, part in parts.items()}
    data = model + b"".join(parts.values())
    head = hall.north.head(plan, data, digest_of, sides)
    answer = hall.send(head, data)
    assert answer.verdict == REFUSED
    assert "site north" in answer.message
    assert what in answer.message
    assert hall.spooled == []
    assert hall.bench.ledger.contributions("r", 0, 1) == []


# -- assessments ------------------------------------------------------------------------------------


def test_an_assessment_is_sums_alone(hall: Hall) -> None:
    hall.open()
    hall.bench.ledger.close_round("r", 1, 1, None, "x")
    plan = hall.plans["north"].model_copy(update={"kind": "assess"})
    hall.bench.ledger.open_exchange("r", 1, 1, "assess", [plan_row(plan)])
    sums = torch.tensor([12.0, 3.5], dtype=torch.float64)
    data = hall.north.payload(Manifest(()), {}, [sums])
    head = hall.north.head(plan, data, Manifest(()).digest, {"val/nll": (sums, "sum")})
    assert hall.send(head, data).verdict == COUNTED
    assert hall.heard.counts == [("north", plan.id)]
    row = hall.bench.ledger.contributions("r", 1, 1, "assess")[0]
    assert row.norm is None
    assert hall.bench.bytes_of(row.index) == data


# -- who may ----------------------------------------------------------------------------------------


def fetch(hall: Hall, name: str, call: Call, ranges: Any = ()) -> list[site_pb2.FetchReply]:
    """What any reader of the .proto file makes of the bytes on the wire."""
    missing = [common_pb2.ChunkRange(first=a, end=b) for a, b in ranges]
    replies = hall.service.FetchModel(site_pb2.FetchRequest(digest=name, missing=missing), call)
    return [
        site_pb2.FetchReply.FromString(r if isinstance(r, bytes) else r.SerializeToString())
        for r in replies
    ]


def test_a_site_fetches_the_base_of_its_open_plan_and_nothing_else(hall: Hall) -> None:
    south = hall.sites["south"]
    with pytest.raises(NotEnrolled, match="no open plan"):
        fetch(hall, hall.base, hall.north.call)
    plan, data = hall.open(), hall.data()
    head, *parts = fetch(hall, hall.base, hall.north.call)
    assert Index.decode(head.head.index).digest == hall.base
    assert Manifest.decode(head.head.manifest) == MANIFEST
    assert b"".join(p.chunk.data for p in parts) == hall.bench.bytes_of(hall.base)
    assert [p.chunk.number for p in fetch(hall, hall.base, hall.north.call, [(1, 2)])[1:]] == [1]
    answer = hall.send(hall.north.head(plan, data, MANIFEST.digest), data)
    # What another site sent is nobody's to fetch, and not the sender's either.
    payload = hall.bench.ledger.contribution(answer.contribution).index
    for call in (south.call, hall.north.call):
        for name in (payload, answer.contribution, "", "7" * 64, MANIFEST.digest, "../keys/ca.key"):
            with pytest.raises(NotEnrolled, match="no open plan"):
                fetch(hall, name, call)
    # Its own plan is answered; the south's is still open.
    with pytest.raises(NotEnrolled):
        fetch(hall, hall.base, hall.north.call)
    assert fetch(hall, hall.base, south.call)


def test_nobody_sees_how_far_another_one_is(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    hall.send(hall.north.head(plan, data, MANIFEST.digest), data)
    status = hall.status(plan, hall.sites["south"])  # the same id is the south's own plan
    assert not status.known
    assert not status.HasField("answer")


@pytest.mark.parametrize(
    "call",
    [
        Call(None),
        Call(Authority("f-hall").pems("north")[1]),
        Call(Authority("f-other").pems("north")[1]),
    ],
    ids=["no certificate", "another authority's", "another federation's"],
)
def test_strangers_get_nothing(hall: Hall, call: Call) -> None:
    plan, data = hall.open(), hall.data()
    head = hall.north.head(plan, data, MANIFEST.digest)
    for attempt in (
        lambda: fetch(hall, hall.base, call),
        lambda: hall.service.Contribute(arrived(head, chunks(data)), call),
        lambda: hall.service.ContributionStatus(site_pb2.StatusRequest(plan_id=plan.id), call),
    ):
        with pytest.raises(NotEnrolled):
            attempt()
    assert hall.heard.failures == []
    assert hall.stored() == []


@pytest.mark.parametrize("role", ["bootstrap", "orchestrator"])
def test_other_roles_are_no_sites(hall: Hall, role: Any) -> None:
    hall.open()
    with pytest.raises(NotEnrolled, match=f"a {role} certificate may not do that"):
        fetch(hall, hall.base, Call(hall.authority.pems("north", role)[1]))


def test_a_revoked_site_gets_nothing(hall: Hall) -> None:
    plan, data = hall.open(), hall.data()
    hall.bench.ledger.revoke("north")
    with pytest.raises(NotEnrolled, match="revoked or replaced"):
        hall.send(hall.north.head(plan, data, MANIFEST.digest), data)
    with pytest.raises(NotEnrolled, match="revoked or replaced"):
        fetch(hall, hall.base, hall.north.call)
    assert hall.spooled == []
