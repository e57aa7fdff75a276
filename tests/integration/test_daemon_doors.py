"""The daemon's doors, from outside: real processes, real TLS, and callers of every kind.

The ledger is filled before the daemon starts, with a round that waits for two sites, so that
nothing here needs Ray.
"""

import json
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from orchestrator.admission import AT_ONCE
from orchestrator.federation import Federation
from orchestrator.ledger import RoundRow
from orchestrator.rounds.plan import plan_row
from protos.errors import FarflungError, InvalidInput, NotEnrolled, TokenUsed, Unavailable
from protos.identity import (
    JoinToken,
    Key,
    certificate_pem,
    key_pem,
    load_certificate,
    new_key,
    signing_request,
)
from protos.manifest import Index, Manifest
from protos.plan import Plan, Schedule, TaskChoice, Work
from protos.rpc import from_rpc_error
from protos.v1 import common_pb2, site_pb2, site_pb2_grpc
from tests.support.authority import Authority
from tests.support.contributor import Contributor, chunks, messages
from tests.support.workbench import Workbench, of_spec

pytestmark = pytest.mark.xdist_group("doors")  # one daemon for all of them

CALL_S = 20.0
MANIFEST = Manifest((of_spec("w", (2_500_000,)),))  # a large one: its transfers take turns
VALUES = {"w": torch.arange(2_500_000.0)}
SITES = ("north", "south", "west", "east")


@dataclass
class Doors:
    """A running daemon, what its round waits for, and keys of every kind."""

    federation: Federation
    address: str
    authority: Authority
    sites: dict[str, Contributor]
    plans: dict[str, Plan]
    base: str

    def channel(self, key: bytes | None, certificate: bytes | None) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self.authority.pem, key, certificate)
        return grpc.secure_channel(self.address, credentials)

    def as_site(self, site: Contributor) -> grpc.Channel:
        return self.channel(key_pem(site.key), certificate_pem(site.caller.certificate))

    def as_token(self, token: JoinToken) -> grpc.Channel:
        return self.channel(token.key, token.certificate)

    def invite(self, site: str) -> JoinToken:
        return JoinToken.decode(self.federation.client.invite(site).token)


def fill(federation: Federation, root: Path) -> Doors:
    """Write the past of a federation: its sites, a model, a round that is planned."""
    home = federation.home
    authority = Authority.__new__(Authority)
    authority.federation = home.federation
    authority.key, authority.certificate = home.authority()
    bench = Workbench(root, home=home)
    sites = {}
    for name in SITES:
        site = sites[name] = Contributor(authority, name)
        bench.ledger.invite(name, f"token-{name}", 4e9)
        bench.ledger.use_token(
            f"token-{name}",
            fingerprint=site.caller.fingerprint,
            certificate_pem=certificate_pem(site.caller.certificate),
            expires=4e9,
        )
    bench.run("r", rounds=3)
    base = bench.put_model(MANIFEST, VALUES)
    bench.commit("r", 0, base)
    plans = {
        name: Plan(
            run="r", round=1, attempt=1, site=name, base=base, manifest=MANIFEST.digest,
            accepts=(base,), task=TaskChoice(name="t"), work=Work(epochs=1),
            schedule=Schedule(lr=0.1),
        )
        for name in ("north", "south")
    }  # fmt: skip
    draft = {"cohort": ["north", "south"], "schedule": {"lr": 0.1, "decay": 1.0}}
    row = RoundRow("r", 1, 1, base=base, quorum=2, draft=draft, started=2e9, deadline_s=1e9)
    bench.ledger.plan_round(row, [plan_row(p) for p in plans.values()])
    bench.ledger.set_run("r", state="running", started=1.0)
    bench.close()
    return Doors(federation, "", authority, sites, plans, base)


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    root = tmp_path_factory.mktemp("doors")
    federation = Federation(root, sites={}, dashboard=False)
    try:
        federation.configure()
        doors = fill(federation, root)
        doors.address = federation.start_daemon()["address"]
        yield doors
    finally:
        federation.close()


# -- calls ------------------------------------------------------------------------------------------


def hello(protocol: int = 1) -> site_pb2.FromSite:
    return site_pb2.FromSite(hello=site_pb2.Hello(version="0", protocol=protocol))


class Attached:
    """An open control stream, on which some things are said."""

    def __init__(
        self,
        channel: grpc.Channel,
        first: site_pb2.FromSite | None = None,
        *more: site_pb2.FromSite,
    ) -> None:
        self._end = threading.Event()
        first = first or hello()

        def said() -> Iterator[site_pb2.FromSite]:
            yield first
            yield from more
            self._end.wait()

        self.stream = site_pb2_grpc.ControlStub(channel).Attach(said(), timeout=CALL_S)

    def next(self) -> site_pb2.ToSite:
        try:
            return next(self.stream)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def close(self) -> None:
        self._end.set()
        self.stream.cancel()


def attach(channel: grpc.Channel) -> site_pb2.ToSite:
    stream = Attached(channel)
    try:
        return stream.next()
    finally:
        stream.close()


def fetch(channel: grpc.Channel, name: str) -> list[site_pb2.FetchReply]:
    request = site_pb2.FetchRequest(digest=name)
    try:
        return list(site_pb2_grpc.BulkStub(channel).FetchModel(request, timeout=CALL_S))
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def contribute(
    channel: grpc.Channel, head: site_pb2.ContributionHead, data: bytes
) -> common_pb2.Answer:
    try:
        stub = site_pb2_grpc.BulkStub(channel)
        return stub.Contribute(messages(head, chunks(data)), timeout=CALL_S)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def status(channel: grpc.Channel, plan: str) -> site_pb2.StatusReply:
    request = site_pb2.StatusRequest(plan_id=plan)
    try:
        return site_pb2_grpc.BulkStub(channel).ContributionStatus(request, timeout=CALL_S)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def enroll(channel: grpc.Channel, key: Key) -> site_pb2.EnrollReply:
    request = site_pb2.EnrollRequest(signing_request=signing_request(key))
    try:
        return site_pb2_grpc.ControlStub(channel).Enroll(request, timeout=CALL_S)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def every_call(doors: Doors, enrolling: bool = True) -> list[Callable[[grpc.Channel], Any]]:
    """Each call that there is, as a site would make it."""
    north, plan = doors.sites["north"], doors.plans["north"]
    data = north.payload(MANIFEST, VALUES)
    head = north.head(plan, data, MANIFEST.digest)
    calls: list[Callable[[grpc.Channel], Any]] = [
        attach,
        lambda channel: fetch(channel, doors.base),
        lambda channel: contribute(channel, head, data),
        lambda channel: status(channel, plan.id),
    ]
    return [*calls, lambda channel: enroll(channel, new_key())] if enrolling else calls


# -- who gets in ------------------------------------------------------------------------------------


def test_a_site_gets_its_plan_its_base_and_its_answer(doors: Doors) -> None:
    with doors.as_site(doors.sites["south"]) as channel:
        stream = Attached(channel)
        assert stream.next().welcome.federation == doors.authority.federation
        assert Plan.decode(stream.next().plan.plan) == doors.plans["south"]
        stream.close()
        first, *rest = fetch(channel, doors.base)
        assert Index.decode(first.head.index).digest == doors.base
        assert len(b"".join(r.chunk.data for r in rest)) == MANIFEST.nbytes
        assert not status(channel, doors.plans["south"].id).known


def test_downloads_that_nobody_reads_keep_no_other_site_waiting(doors: Doors) -> None:
    request = site_pb2.FetchRequest(digest=doors.base)
    with (
        doors.as_site(doors.sites["south"]) as channel,
        doors.as_site(doors.sites["south"]) as another,
    ):
        stub = site_pb2_grpc.BulkStub(channel)
        unread = [stub.FetchModel(request, timeout=2 * CALL_S) for _ in range(3 * AT_ONCE)]
        assert all(next(stream).HasField("head") for stream in unread)
        assert len(fetch(another, doors.base)) > MANIFEST.nbytes >> 20
        for stream in unread:
            stream.cancel()


def test_no_certificate_gets_nothing(doors: Doors) -> None:
    for call in every_call(doors):
        with doors.channel(None, None) as channel, pytest.raises(Unavailable):
            call(channel)


def test_no_tls_gets_nothing(doors: Doors) -> None:
    with grpc.insecure_channel(doors.address) as channel, pytest.raises(Unavailable):
        attach(channel)


@pytest.mark.parametrize("role", ["site", "bootstrap", "orchestrator"])
def test_another_authoritys_certificate_gets_nothing(doors: Doors, role: Any) -> None:
    """Also if it says everything that ours say."""
    foreign = Authority(doors.authority.federation).pems("north", role)
    for call in every_call(doors):
        with doors.channel(*foreign) as channel, pytest.raises(Unavailable):
            call(channel)


@pytest.mark.parametrize("role", ["orchestrator", "ledger"])
def test_the_orchestrators_own_certificates_are_no_sites(doors: Doors, role: Any) -> None:
    """A stolen key of the server, or of what signs, must not be a way in: its purpose is another one."""
    own = doors.authority.pems("orchestrator", role)
    for call in every_call(doors):
        with doors.channel(*own) as channel, pytest.raises((NotEnrolled, Unavailable)):
            call(channel)


def test_a_certificate_that_was_never_given_out_gets_nothing(doors: Doors) -> None:
    """Signed by our authority for a known site, but not in the ledger."""
    with doors.channel(*doors.authority.pems("north")) as channel:
        for call in every_call(doors):
            with pytest.raises(NotEnrolled, match="revoked or replaced"):
                call(channel)


def test_a_certificate_of_another_federation_gets_nothing(doors: Doors) -> None:
    """Of the same authority, had it ever signed one."""
    with doors.channel(*doors.authority.pems("north", federation="f-other")) as channel:
        for call in every_call(doors):
            with pytest.raises(NotEnrolled, match="federation"):
                call(channel)


def test_a_revoked_site_gets_nothing_and_its_stream_ends(doors: Doors) -> None:
    with doors.as_site(doors.sites["west"]) as channel:
        stream = Attached(channel)
        assert stream.next().HasField("welcome")
        assert doors.federation.client.revoke("west").state == "revoked"
        assert list(stream.stream) == []
        for call in every_call(doors):
            with pytest.raises(NotEnrolled, match="revoked"):
                call(channel)


def test_the_newest_stream_of_a_site_is_the_true_one(doors: Doors) -> None:
    with doors.as_site(doors.sites["east"]) as one, doors.as_site(doors.sites["east"]) as two:
        first = Attached(one)
        assert first.next().HasField("welcome")
        second = Attached(two)
        assert second.next().HasField("welcome")
        assert list(first.stream) == []
        assert {s.name: s.state for s in doors.federation.client.sites()}["east"] == "attached"
        second.close()


def test_a_heartbeat_comes_back(doors: Doors) -> None:
    # The one without a number only says that the site is paused.
    beats = [site_pb2.FromSite(heartbeat=site_pb2.Heartbeat(sequence=n)) for n in (0, 7, 8)]
    with doors.as_site(doors.sites["east"]) as channel:
        stream = Attached(channel, hello(), *beats)
        told = (
            message.heartbeat.sequence for message in stream.stream if message.HasField("heartbeat")
        )
        assert [next(told), next(told)] == [7, 8]
        stream.close()


def test_an_agent_of_another_protocol_is_told_what_to_do(doors: Doors) -> None:
    with doors.as_site(doors.sites["east"]) as channel:
        with pytest.raises(InvalidInput, match="upgrade the older one"):
            Attached(channel, hello(protocol=2)).next()
        with pytest.raises(InvalidInput, match="first message must be hello"):
            Attached(channel, site_pb2.FromSite(heartbeat=site_pb2.Heartbeat())).next()


# -- joining ----------------------------------------------------------------------------------------


def test_a_token_enrols_once(doors: Doors) -> None:
    token, key = doors.invite("fresh"), new_key()
    with doors.as_token(token) as channel:
        reply = enroll(channel, key)
        assert reply.site == "fresh"
        assert load_certificate(reply.certificate).public_key() == key.public_key()
        # The same key may ask again, since the answer may have been lost; another one may not.
        assert enroll(channel, key).certificate == reply.certificate
        with pytest.raises(TokenUsed, match="used before"):
            enroll(channel, new_key())
    with doors.channel(key_pem(key), reply.certificate) as channel:
        assert attach(channel).HasField("welcome")


def test_a_token_enrols_and_does_nothing_else(doors: Doors) -> None:
    with doors.as_token(doors.invite("guest")) as channel:
        for call in every_call(doors, enrolling=False):
            with pytest.raises(NotEnrolled, match="a bootstrap certificate may not do that"):
                call(channel)


def test_a_newer_token_replaces_the_older_one(doors: Doors) -> None:
    old, new = doors.invite("twice"), doors.invite("twice")
    with doors.as_token(old) as channel, pytest.raises(TokenUsed, match="taken back"):
        enroll(channel, new_key())
    with doors.as_token(new) as channel:
        assert enroll(channel, new_key()).site == "twice"


def test_a_token_of_a_revoked_site_is_worthless(doors: Doors) -> None:
    token = doors.invite("gone")
    doors.federation.client.revoke("gone")
    with doors.as_token(token) as channel, pytest.raises(TokenUsed):
        enroll(channel, new_key())


def test_a_token_that_this_daemon_never_gave_is_worthless(doors: Doors) -> None:
    stranger = doors.authority.pems("0" * 24, "bootstrap")
    with doors.channel(*stranger) as channel, pytest.raises(TokenUsed, match="unknown here"):
        enroll(channel, new_key())


def test_a_request_without_its_key_is_refused_and_the_token_is_not_used_up(doors: Doors) -> None:
    with doors.as_token(doors.invite("late")) as channel:
        stub = site_pb2_grpc.ControlStub(channel)
        for junk in (b"", b"junk", signing_request(new_key())[:200]):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Enroll(site_pb2.EnrollRequest(signing_request=junk), timeout=CALL_S)
            assert isinstance(from_rpc_error(caught.value), InvalidInput)
        assert enroll(channel, new_key()).site == "late"


def test_a_site_renews_under_its_own_name_and_both_are_let_in(doors: Doors) -> None:
    east, key = doors.sites["east"], new_key()
    with doors.as_site(east) as channel:
        reply = enroll(channel, key)
        assert reply.site == "east"
        assert attach(channel).HasField("welcome")
    with doors.channel(key_pem(key), reply.certificate) as channel:
        assert attach(channel).HasField("welcome")


# -- what a site may not --------------------------------------------------------------------------


def test_nothing_of_another_site_can_be_had(doors: Doors) -> None:
    north, south = doors.sites["north"], doors.sites["south"]
    plan = doors.plans["north"]
    data = north.payload(MANIFEST, VALUES)
    head = north.head(plan, data, MANIFEST.digest)
    with doors.as_site(north) as mine, doors.as_site(south) as theirs:
        # Not in its name, not with its bytes, not its progress.
        answer = contribute(theirs, head, data)
        assert (answer.verdict, answer.error) == (common_pb2.Answer.REFUSED, "ContributionRefused")
        assert "the header speaks for north" in answer.message
        answer = contribute(mine, head, data)
        assert answer.verdict == common_pb2.Answer.COUNTED
        assert contribute(mine, head, data) == answer
        for name in (
            Index.decode(head.index).digest,
            answer.contribution,
            MANIFEST.digest,
            "0" * 64,
        ):
            for channel in (mine, theirs):
                with pytest.raises(FarflungError, match="no open plan"):
                    fetch(channel, name)
        # Its own part is done, so the base is no business of its any more.
        with pytest.raises(FarflungError, match="no open plan"):
            fetch(mine, doors.base)
    with doors.as_site(doors.sites["east"]) as channel:
        with pytest.raises(FarflungError, match="no open plan"):
            fetch(channel, doors.base)
        assert not status(channel, plan.id).known


# -- one daemon, one port ---------------------------------------------------------------------------


def serve(home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "serve", "--home", str(home)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_second_daemon_on_the_home_ends_by_name(doors: Doors) -> None:
    done = serve(doors.federation.home.path)
    assert done.returncode == 75
    said = " ".join((done.stdout + done.stderr).split())
    assert f"in use by process {doors.federation.daemon.pid}" in said
    assert "Traceback" not in said
    assert doors.federation.client.status().address == doors.address


def test_a_second_server_does_not_share_the_port(doors: Doors, tmp_path: Path) -> None:
    """In silence, calls would otherwise go to the one or the other."""
    other = Federation(
        tmp_path, sites={}, dashboard=False, daemon={"listen": {"bind": doors.address}}
    )
    other.configure()
    done = serve(other.home.path)
    assert done.returncode == 69
    said = " ".join((done.stdout + done.stderr).split())
    assert f"{doors.address} can't be bound" in said
    assert "Traceback" not in said
    with doors.as_site(doors.sites["south"]) as channel:
        assert attach(channel).HasField("welcome")


def test_operators_come_in_by_the_owners_socket_only(doors: Doors) -> None:
    home = doors.federation.home
    assert stat.S_IMODE(home.run.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.socket.stat().st_mode) == 0o600
    with doors.as_site(doors.sites["south"]) as channel:
        call = channel.unary_unary("/farflung.v1.Operator/Status")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=CALL_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_log_is_json_and_holds_no_key(doors: Doors) -> None:
    lines = (doors.federation.home.log / "daemon.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    assert all({"time", "level", "text"} <= set(d) for d in documents)
    refusals = [d for d in documents if d["text"].startswith("contribution refused")]
    assert all(d["site"] == "south" for d in refusals)
    assert "PRIVATE KEY" not in "".join(lines)
    # What strangers do is no internal error.
    assert [d for d in documents if "exception" in d] == []


# -- the end ----------------------------------------------------------------------------------------


def test_at_the_end_sites_are_told_and_nothing_is_lost(tmp_path: Path) -> None:
    federation = Federation(tmp_path, sites={}, dashboard=False)
    federation.configure()
    doors = fill(federation, tmp_path)
    try:
        doors.address = federation.start_daemon()["address"]
        with doors.as_site(doors.sites["south"]) as channel:
            stream = Attached(channel)
            assert stream.next().HasField("welcome")
            federation.stop_daemon()
            kinds = [m.WhichOneof("kind") for m in stream.stream]
            assert kinds[-1] == "drain"
        assert federation.daemon.exit_code == 0
        # The next one goes on with the same round, and offers the same plan.
        federation.start_daemon()
        with doors.as_site(doors.sites["south"]) as channel:
            stream = Attached(channel)
            assert stream.next().HasField("welcome")
            assert Plan.decode(stream.next().plan.plan) == doors.plans["south"]
            stream.close()
    finally:
        federation.close()
