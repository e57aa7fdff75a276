"""The daemon's side: starts the compute process, asks it, starts it again when it died."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from orchestrator.compute import errors
from orchestrator.compute.config import ComputeConfig
from orchestrator.compute.interface import Compute
from orchestrator.compute.protocol import Lines, LineTooLong
from orchestrator.compute.supervise import end_session, session_members

logger = logging.getLogger(__name__)

MAX_DEATHS = 5
DEATHS_WITHIN_S = 300.0
_GRACE_S = 5.0  # what the other side needs to answer that a request's time is over
_STOP_S = 10.0
_MAX_TEMP_PATH = 40  # a socket's path has 107 bytes, and Ray adds up to 66
_PASSED = (
    *("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_HOME"),
)

EventHandler = Callable[[str, dict[str, Any]], None]


class _Child:
    """One started process with its folder and its open requests."""

    def __init__(self, config: ComputeConfig, log: Path | None) -> None:
        self.folder = _temp_dir()
        try:
            with contextlib.ExitStack() as stack:
                stderr = stack.enter_context(log.open("ab")) if log else None
                self.process = subprocess.Popen(
                    # -P: what the daemon can import, and not what lies where it was started.
                    [
                        *(sys.executable, "-P", "-m", "orchestrator.compute"),
                        *(str(os.getpid()), config.at(self.folder).to_json()),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=_environment(),
                    cwd="/",
                    # Ctrl-C in a terminal is for the daemon, which then stops us.
                    start_new_session=True,
                )
        except OSError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        assert self.process.stdin  # noqa: S101 - for the type checker, as the next line
        assert self.process.stdout  # noqa: S101
        self.lines = Lines(self.process.stdout, self.process.stdin)
        self.pending: dict[int, Future[Any]] = {}

    def end(self) -> None:
        """Leaves no process and no file of it."""
        for attempt in (self.process.terminate, self.process.kill):
            try:
                self.process.wait(_STOP_S)
                break
            except subprocess.TimeoutExpired:
                attempt()
        else:
            self.process.wait(_STOP_S)
        if left := end_session(self.process.pid):
            logger.error("processes of compute can't be ended: %s", left)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _NotSentError(Exception):
    """The process ended before it heard of the request."""


class ComputeClient(Compute):
    """Compute in a confined process of its own, with Ray.

    Args:
        config: What the process may do; see ``ComputeConfig``.
        log: A file for what Ray and the plug-ins print; default: the daemon's own stderr.
        on_event: Called with ``ready``, ``failed``, ``died`` or ``restarting`` and facts, from a
            thread of this client; the daemon shows it to the operator.
    """

    def __init__(
        self,
        config: ComputeConfig | None = None,
        *,
        log: Path | None = None,
        on_event: EventHandler | None = None,
    ) -> None:
        self._config = config or ComputeConfig()
        self._log = log
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._state = threading.Condition()
        self._child: _Child | None = None
        self._facts: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.restarts = 0

    def start(self) -> None:
        """Begins to start Ray; returns at once. A second call does nothing."""
        with self._state:
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, name="compute", daemon=True)
                self._thread.start()

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Waits until Ray serves requests; see ``Compute.wait_ready``."""
        return self._ready(time.monotonic() + timeout_s, timeout_s)[1]

    def call(self, op: str, args: dict[str, Any], timeout_s: float) -> Any:
        """Does one operation in the compute process; see ``Compute.call``."""
        deadline = time.monotonic() + timeout_s
        while True:
            child, _ = self._ready(deadline, timeout_s)
            try:
                return self._ask(child, op, args, timeout_s, deadline)
            except _NotSentError as error:
                if not self._gone(child, deadline):
                    message = f"compute ended before {op} was sent"
                    raise errors.ComputeDied(message, op=op) from error

    def _gone(self, child: _Child, deadline: float) -> bool:
        """Waits until a dead process is known to be: who asks again must not meet it twice."""
        with self._state:
            left = max(0.0, deadline - time.monotonic())
            return self._state.wait_for(lambda: self._child is not child, left)

    def _ask(
        self, child: _Child, op: str, args: dict[str, Any], timeout_s: float, deadline: float
    ) -> Any:
        number, answer = next(self._ids), Future[Any]()
        with self._state:
            if child is not self._child:
                raise _NotSentError
            child.pending[number] = answer
        left = max(0.1, deadline - time.monotonic())
        try:
            child.lines.send({"id": number, "op": op, "args": args, "timeout_s": left})
            return answer.result(left + _GRACE_S)
        except FutureTimeoutError:
            message = f"no answer to {op} within {timeout_s:g} s"
            raise errors.ComputeTimedOut(message, op=op, seconds=timeout_s) from None
        except (LineTooLong, TypeError) as error:  # TypeError: the arguments are not JSON
            raise errors.ComputeRefused(f"{op}: {error}", op=op) from error
        except (OSError, ValueError) as error:  # a closed pipe; ValueError: closed on our side
            raise _NotSentError from error
        finally:
            with self._state:
                child.pending.pop(number, None)

    def process_ids(self) -> list[int]:
        """The processes of compute, Ray's included, as the host numbers them."""
        with self._state:
            child = self._child
        return session_members(child.process.pid) if child else []

    def stop(self) -> None:
        """Ends Ray and everything below it; open requests fail with ``ComputeDied``."""
        with self._state:
            self._stopping = True
            child, thread = self._child, self._thread
        if child:
            # Not by closing its input: that would wait for a writer whose pipe is full.
            child.process.terminate()
            try:
                child.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
        if thread and thread is not threading.current_thread():
            thread.join()

    def _ready(self, deadline: float, timeout_s: float) -> tuple[_Child, dict[str, Any]]:
        with self._state:
            if self._thread is None:
                raise errors.ComputeNotReady("compute was not started")

            def settled() -> bool:
                return bool(self._facts is not None or self._error or self._stopping)

            if not self._state.wait_for(settled, max(0.0, deadline - time.monotonic())):
                message = f"Ray was not ready within {timeout_s:g} s"
                raise errors.ComputeNotReady(message, seconds=timeout_s)
            if self._error:
                raise errors.from_json(errors.to_json(self._error))
            if self._stopping or self._child is None or self._facts is None:
                raise errors.ComputeNotReady("compute was stopped")
            return self._child, self._facts

    def _live(self) -> None:
        """The client's one thread: starts the process, reads its lines, starts it again."""
        while True:
            with self._state:
                if self._stopping:
                    return
                try:
                    child = self._child = _Child(self._config, self._log)
                except OSError as error:
                    self._fail(errors.ComputeNotReady(f"compute can't be started: {error}"))
                    return
            try:
                self._read(child)
            finally:
                child.end()
            if not self._bury(child):
                return

    def _read(self, child: _Child) -> None:
        try:
            while (message := child.lines.receive()) is not None:
                if "event" in message:
                    self._heard(message)
                    continue
                with self._state:
                    answer = child.pending.pop(message["id"], None)
                if answer is None:
                    continue  # it came too late for its caller
                if message["ok"]:
                    answer.set_result(message["value"])
                else:
                    answer.set_exception(errors.from_json(message["error"]))
        except (ValueError, KeyError, TypeError):
            logger.exception("compute sent a line that is not of the protocol")
            child.process.terminate()

    def _heard(self, message: dict[str, Any]) -> None:
        if message["event"] == "ready":
            with self._state:
                self._facts = dict(message["facts"])
                self._state.notify_all()
            logger.info("compute is ready: %s", message["facts"])
            self._tell("ready", message["facts"])
        else:
            with self._state:
                self._fail(errors.from_json(message["error"]))

    def _bury(self, child: _Child) -> bool:
        """Tells everybody that the process has ended; returns whether to start another."""
        code = child.process.returncode
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        with self._state:
            self._child, self._facts = None, None
            open_requests = list(child.pending.values())
            child.pending.clear()
            stopping, failed = self._stopping, self._error is not None
            self._state.notify_all()
        for answer in open_requests:
            message = f"compute ended {how} before it answered; nothing of it was committed"
            answer.set_exception(errors.ComputeDied(message, status=code))
        if stopping or failed:
            return False
        logger.error("compute ended %s with %d requests open", how, len(open_requests))
        self._tell("died", {"status": code, "requests": len(open_requests)})
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WITHIN_S:
            message = f"compute ended {MAX_DEATHS} times within {DEATHS_WITHIN_S:g} s, last {how}"
            with self._state:
                self._fail(errors.ComputeNotReady(message, status=code))
            return False
        self.restarts += 1
        self._tell("restarting", {"restarts": self.restarts})
        return True

    def _fail(self, error: Exception) -> None:
        """Gives up; the caller holds the lock."""
        self._error = error
        self._state.notify_all()
        logger.error("compute can't be used: %s", error)
        self._tell("failed", errors.to_json(error))

    def _tell(self, event: str, facts: dict[str, Any]) -> None:
        if self._on_event:
            try:
                self._on_event(event, facts)
            except Exception:
                logger.exception("the handler of compute's events raised at %s", event)


def _environment() -> dict[str, str]:
    """What Ray's processes see: no credential that the daemon may have been given."""
    env = {name: os.environ[name] for name in _PASSED if name in os.environ}
    paths = [str(Path(path).absolute()) for path in sys.path if path]
    return env | {"PYTHONPATH": os.pathsep.join(paths)}


def _temp_dir() -> str:
    """A private folder whose path is short enough for Ray's sockets."""
    for parent in (tempfile.gettempdir(), "/tmp", "/dev/shm"):  # noqa: S108 - mkdtemp makes it private
        if len(parent) + 12 <= _MAX_TEMP_PATH and os.access(parent, os.W_OK):
            return tempfile.mkdtemp(prefix="ff-", dir=parent)
    raise FileNotFoundError("no temporary folder with a path of 28 bytes at most")
