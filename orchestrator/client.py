"""What the command line, the demo and the benchmarks talk through: a client of the daemon."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import grpc
from pydantic import ValidationError

from orchestrator import views
from orchestrator.operator_socket import FOLDER, OperatorSocket
from protos.errors import Conflict, InvalidInput, Unavailable
from protos.hang_up import MOST_S, hang_up
from protos.plan import first_problem
from protos.rpc import from_rpc_error
from protos.v1 import operator_pb2, operator_pb2_grpc

CALL_TIMEOUT_S = 60.0
"""For answers that the daemon has at hand; what moves files or waits has no limit."""

Answered = TypeVar("Answered")
Viewed = TypeVar("Viewed", bound=views.View)


class Invitation(NamedTuple):
    """A join token, and until when it may be used (RFC 3339, UTC)."""

    token: str
    expires: str


class EventStream(Iterator[views.Event]):
    """The events of `OperatorClient.watch`; `close` ends it, from another thread too."""

    def __init__(self, call: Any, explain: Callable[[grpc.RpcError], Exception]) -> None:
        self._call = call
        self._explain = explain
        self._closed = False

    def __next__(self) -> views.Event:
        try:
            return _parsed(views.Event, next(self._call).json)
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from None
            raise self._explain(error) from None

    def close(self) -> None:
        """Stop following; a `next` that waits ends."""
        self._closed = True
        self._call.cancel()


class OperatorClient:
    """A client of the daemon that runs on a home folder.

    Every method raises what the daemon raised (`protos/errors.py`), and `Unavailable` where no
    daemon runs.

    Args:
        home: The home folder.
    """

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        if not (self.home / FOLDER).is_dir():
            raise Unavailable(
                f"there is no home in {self.home}; make one with `farflung init`",
                home=str(self.home),
            )
        self._socket = OperatorSocket(self.home)
        # Start files and exports are large, and nobody but the home's owner reaches the socket.
        self._channel = grpc.insecure_channel(
            self._socket.target,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._stub = operator_pb2_grpc.OperatorStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        hang_up(self._channel, MOST_S)
        self._socket.close()

    def __enter__(self) -> OperatorClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the daemon and its sites --------------------------------------------------------------

    def status(self) -> views.Daemon:
        """The daemon itself."""
        return self._one(views.Daemon, self._stub.Status, operator_pb2.Empty())

    def sites(self) -> list[views.Site]:
        """All sites that were ever invited."""
        return self._many(views.Site, self._stub.Sites, operator_pb2.Empty())

    def invite(self, site: str, valid_s: float = 0.0) -> Invitation:
        """A join token for a site, to be used once; 0: valid as long as the configuration says."""
        request = operator_pb2.InviteRequest(site=site, valid_s=valid_s)
        reply = self._call(self._stub.Invite, request, CALL_TIMEOUT_S)
        return Invitation(reply.token, reply.expires)

    def revoke(self, site: str) -> views.Site:
        """Take a site's certificates and tokens back."""
        return self._one(views.Site, self._stub.Revoke, operator_pb2.SiteName(site=site))

    # -- runs ------------------------------------------------------------------------------------

    def launch(self, config: str, start_from: str = "", start_file: bytes = b"") -> views.Run:
        """Submit a run.

        Args:
            config: The run file, TOML.
            start_from: Overrides ``[init] from``: "RUN@ROUND" or "RUN@best".
            start_file: Bytes of the safetensors file that the run starts from.
        """
        request = operator_pb2.LaunchRequest(
            config=config, start_from=start_from, start_file=start_file
        )
        return self._one(views.Run, self._stub.Launch, request, None)

    def runs(self) -> list[views.Run]:
        """All runs."""
        return self._many(views.Run, self._stub.Runs, operator_pb2.Empty())

    def run(self, name: str) -> views.Run:
        """One run, by name or id."""
        return self._one(views.Run, self._stub.Run, operator_pb2.RunName(run=name))

    def rounds(self, name: str) -> list[views.Round]:
        """The rounds of a run, oldest first."""
        return self._many(views.Round, self._stub.Rounds, operator_pb2.RunName(run=name))

    def watch(self, run: str = "", after: int = 0, follow: bool = True) -> EventStream:
        """Events, oldest first, then live.

        Args:
            run: Of one run; empty: of everything.
            after: Only events with a greater number.
            follow: Go on with what happens from now on.
        """
        request = operator_pb2.WatchRequest(run=run, after=after, follow=follow)
        return EventStream(self._stub.Watch(request), self._explained)

    def stop(self, run: str, now: bool = False) -> views.Run:
        """End a run after the round under way, or at once."""
        return self._one(views.Run, self._stub.Stop, operator_pb2.StopRequest(run=run, now=now))

    def extend(self, run: str, rounds: int) -> views.Run:
        """Let a run have so many rounds in all; a finished one goes on, a paused one tries again."""
        request = operator_pb2.ExtendRequest(run=run, rounds=rounds)
        return self._one(views.Run, self._stub.Extend, request)

    def release(self, run: str) -> views.Run:
        """Commit the round that a run waits with."""
        return self._one(views.Run, self._stub.Release, operator_pb2.RunName(run=run))

    def reject(self, run: str) -> views.Run:
        """Drop the round that a run waits with; the next one starts from the last good model."""
        return self._one(views.Run, self._stub.Reject, operator_pb2.RunName(run=run))

    def roll_back(self, run: str, round: int) -> views.Run:
        """Let a run go on from an earlier round; those after it are taken back."""
        request = operator_pb2.RollbackRequest(run=run, round=round)
        return self._one(views.Run, self._stub.Rollback, request)

    def verify(self, run: str) -> views.Verification:
        """Check a run's ledger, and that the store has what it names."""
        return self._one(views.Verification, self._stub.Verify, operator_pb2.RunName(run=run), None)

    def replay(self, run: str, round: int) -> views.Replay:
        """Compute a committed round again from what the sites sent."""
        request = operator_pb2.ReplayRequest(run=run, round=round)
        return self._one(views.Replay, self._stub.Replay, request, None)

    def export(
        self,
        run: str,
        round: str,
        directory: Path,
        of: str = "",
        stored: bool = False,
        ledger: bool = False,
    ) -> list[Path]:
        """Write a round's model and what belongs to it into a folder.

        All files are complete and synced before the first one appears under its name.

        Args:
            run: Name or id.
            round: A number, "best", or empty for the last.
            directory: Made if it is not there; files of the same names are replaced.
            of: A strategy whose files are wanted instead of the model.
            stored: Whether the model is wanted with everything that only training needs.
            ledger: Whether the run's ledger is wanted instead of the model.
        """
        request = operator_pb2.ExportRequest(
            run=run, round=round, of=of, stored=stored, ledger=ledger
        )
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export-", dir=directory))
        try:
            names = self._received(request, staging)
            for name in names:
                (staging / name).replace(directory / name)
            _sync(directory)
        finally:
            shutil.rmtree(staging)
        return [directory / name for name in names]

    def kept(self, run: str, round: int, strategy: str) -> dict[str, bytes]:
        """What a strategy keeps beside the model of a round: name to bytes."""
        request = operator_pb2.ExportRequest(run=run, round=str(round), of=strategy)
        with tempfile.TemporaryDirectory(prefix="farflung-kept-") as folder:
            names = self._received(request, Path(folder))
            return {name: (Path(folder) / name).read_bytes() for name in names}

    def _received(self, request: operator_pb2.ExportRequest, folder: Path) -> list[str]:
        """Write the parts of a stream; gives the names in the order in which they came."""
        names: list[str] = []
        try:
            for part in self._stub.Export(request):
                if not views.FILE_NAME.fullmatch(part.name):
                    raise InvalidInput(f"export: {part.name!r} is not a file name")
                if part.name not in names:
                    names.append(part.name)
                with (folder / part.name).open("ab") as file:
                    file.write(part.data)
        except grpc.RpcError as error:
            raise self._explained(error) from None
        for name in names:
            _sync(folder / name)
        return names

    def collect(self, dry_run: bool = False) -> views.Collected:
        """Remove what retention no longer keeps, or say what would be removed."""
        request = operator_pb2.CollectRequest(dry_run=dry_run)
        return self._one(views.Collected, self._stub.Collect, request, None)

    # -- one call ----------------------------------------------------------------------------------

    def _one(
        self,
        view: type[Viewed],
        method: Callable[..., Any],
        request: Any,
        timeout_s: float | None = CALL_TIMEOUT_S,
    ) -> Viewed:
        return _parsed(view, self._call(method, request, timeout_s).json)

    def _many(self, view: type[Viewed], method: Callable[..., Any], request: Any) -> list[Viewed]:
        answer = json.loads(self._call(method, request, CALL_TIMEOUT_S).json)
        return [_parsed(view, json.dumps(item)) for item in answer]

    def _call(
        self, method: Callable[..., Answered], request: Any, timeout_s: float | None
    ) -> Answered:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error) from None

    def _explained(self, error: grpc.RpcError) -> Exception:
        found = from_rpc_error(error)
        if isinstance(found, Unavailable) and not self._answers():
            return Unavailable(
                f"no daemon runs on {self.home}; start it with `farflung serve`",
                home=str(self.home),
            )
        return found

    def _answers(self) -> bool:
        """Whether somebody listens on the socket, asked without gRPC and its back-off."""
        address = self._socket.target.removeprefix("unix:")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)
            try:
                probe.connect(address)
            except OSError:
                return False
        return True


def _parsed(view: type[Viewed], text: str) -> Viewed:
    try:
        return view.model_validate_json(text)
    except ValidationError as error:
        raise Conflict(
            f"the daemon's answer is of another version of Farflung ({first_problem(error)}); "
            "start the daemon again after an upgrade"
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
