"""The Ray driver: the innermost process, the only one that imports Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from orchestrator.compute import cluster, errors, listeners, ops
from orchestrator.compute.config import ComputeConfig, Level, Limits
from orchestrator.compute.functions import import_modules, run_function
from orchestrator.compute.protocol import Lines, LineTooLong
from orchestrator.compute.sandbox import Cell, run_isolated

_START_S = 120.0  # Ray started in 3 to 11 s here, the latter on a busy host
_TOO_SLOW = "timed out during startup"  # what Ray says after 30 s, which can't be changed
_QUEUE_S = 5.0
_REQUESTS = 16  # served at once; Ray queues their tasks
_LOOK_S = 1.0
_RAYS_OWN = ("gcs_server", "raylet")
"""Head and node: without either nothing is computed any more, and Ray starts neither again."""


def serve(config: ComputeConfig, level: Level, reader: IO[bytes], writer: IO[bytes]) -> int:
    """Starts Ray, reports ``ready`` or ``failed``, and serves requests until end-of-file.

    If the host is so busy that Ray does not come up in its time, nothing is reported: whoever waits
    sees the end of this process and starts it again, as after any other death.

    Must be called in the main thread: Ray ties the life of its processes to the thread that
    starts them.
    """
    lines = Lines(reader, writer)
    try:
        engine = RayEngine(config, level)
    except Exception as error:  # noqa: BLE001 - whatever Ray raises, the daemon is told
        failure = errors.to_json(error, where=_log_tail(config))
        if _TOO_SLOW in str(error):
            logging.getLogger(__name__).error("Ray did not start: %s", error)
            return 1
        if failure["class"] == "ComputeFailed":
            failure |= {"class": "ComputeNotReady", "message": f"Ray did not start: {error}"}
        lines.send({"event": "failed", "error": failure})
        return 1
    lines.send({"event": "ready", "facts": engine.facts()})
    engine.preload()
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="compute") as pool:
        while (request := lines.receive()) is not None:
            pool.submit(_answer, engine, lines, request)
        # The daemon has gone: whoever supervises us ends Ray faster than Ray itself does.
        os._exit(0)


def _answer(engine: RayEngine, lines: Lines, request: dict[str, Any]) -> None:
    reply: dict[str, Any] = {"id": request["id"]}
    try:
        timeout_s = float(request["timeout_s"])
        value = ops.perform(engine, request["op"], request["args"], timeout_s)
        reply |= {"ok": True, "value": value}
    except Exception as error:  # noqa: BLE001 - it belongs to the caller, who gets it
        reply |= {"ok": False, "error": errors.to_json(error, where=request["op"])}
    with contextlib.suppress(OSError):  # the daemon has gone; the loop above sees it too
        try:
            lines.send(reply)
        except (LineTooLong, TypeError) as error:
            failure = errors.ComputeRefused(f"the result of {request['op']}: {error}")
            lines.send({"id": request["id"], "ok": False, "error": errors.to_json(failure)})


class Keeper:
    """The worker that stays, for single calls."""

    def preload(self, modules: tuple[str, ...]) -> None:
        """See ``import_modules``."""
        import_modules(modules)

    def run(self, spec: str, text: str) -> str:
        """See ``run_function``."""
        return run_function(spec, text)


class RayEngine:
    """Runs functions as Ray tasks."""

    def __init__(self, config: ComputeConfig, level: Level) -> None:
        """Starts Ray and makes sure that nobody else can reach it.

        Raises:
            ComputeExposed: Others could.
        """
        self._config = config
        self._level = level
        self.functions = config.functions
        hidden = (*config.hidden, config.temp_dir)  # Ray's sockets are in reach by path
        self._cell = Cell(hidden, config.levels, config.plugins_may_reach_keys, config.preload)
        started = time.monotonic()
        _set_environment(config)

        import ray

        self._ray = ray
        self._num_cpus, self._nodes = config.num_cpus, ["127.0.0.1"]
        if config.address:
            folder = cluster.join(config)
            self._cell = replace(self._cell, hidden=(*self._cell.hidden, folder))
        else:
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                object_store_memory=config.object_store_memory_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=config.temp_dir,
            )
            threading.Thread(target=_end_with_ray, name="ray's life", daemon=True).start()
        self._run = ray.remote(run_function)
        self._isolate = ray.remote(run_isolated)
        self._keeper = self._new_keeper()
        self._keeper_free = threading.Lock()
        # A worker listens as well, so one must be up before we look.
        first = [ray.remote(import_modules).remote(()), self._keeper.preload.remote(())]
        ray.get(first, timeout=_START_S)
        if config.address:
            found = cluster.check(config, _START_S)
            self._listeners, self._nodes = found.listeners, found.nodes
            self._num_cpus = found.cpus
        else:
            self._listeners = self._check_listeners()
        self._start_s = time.monotonic() - started

    def _check_listeners(self) -> list[str]:
        if self._level is Level.NONE:
            import psutil

            pids = [p.pid for p in psutil.Process(os.getppid()).children(recursive=True)]
            found = listeners.listening(pids)
            hosts = listeners.host_addresses()
            listeners.require_private(found, hosts, self._config.private_networks)
        else:
            found = listeners.listening()
            if not listeners.only_loopback_exists():
                raise errors.ComputeExposed("the network namespace has an interface beside lo")
        return sorted(f"{listener.address}:{listener.port}" for listener in found)

    def facts(self) -> dict[str, Any]:
        """How Ray runs here."""
        return {
            "engine": "ray",
            "ray": self._ray.__version__,
            "level": self._level.value,
            "keys_hidden": self._keys_hidden(),
            "listeners": self._listeners,
            "start_s": round(self._start_s, 3),
            "num_cpus": self._num_cpus,
            "address": self._config.address,
            "nodes": self._nodes,
        }

    def _keys_hidden(self) -> bool:
        """Whether no task can read them; those of a cluster that run on this host may."""
        if not self._config.hidden:
            return True
        return self._level is not Level.NONE and not self._config.address

    def _new_keeper(self) -> Any:
        # It needs no CPU of Ray's, or on a machine with one all tasks would wait for it for ever.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 1}
        return self._ray.remote(Keeper).options(**options).remote()

    def preload(self) -> None:
        """Has the worker that stays import what requests need; nobody waits for it."""
        if self._config.preload:
            self._keeper.preload.remote(self._config.preload)

    def map(self, spec: str, texts: list[str], timeout_s: float) -> list[str]:
        """One task of one CPU per text; a task whose worker died is run once more.

        A single one is given to the worker that stays, if that is free: half the way of a task.
        """
        if len(texts) == 1 and self._keeper_free.acquire(blocking=False):
            try:
                return self._get([self._keeper.run.remote(spec, texts[0])], timeout_s)
            except errors.ComputeTimedOut:
                # Restarted, it would begin with the same call again.
                self._ray.kill(self._keeper, no_restart=True)
                self._keeper = self._new_keeper()
                self.preload()
                raise
            finally:
                self._keeper_free.release()
        strategy = "SPREAD" if self._config.address else "DEFAULT"
        remote = self._run.options(num_cpus=1, max_retries=1, scheduling_strategy=strategy)
        return self._get([remote.remote(spec, text) for text in texts], timeout_s)

    def isolated(self, spec: str, text: str, limits: Limits, timeout_s: float) -> dict[str, Any]:
        """One task that starts the plug-in's own process; with a cluster it is started here.

        Here is where the keys are known to be hidden, and where a network can be taken away.
        """
        if self._config.address:
            return run_isolated(spec, text, limits, self._cell)
        remote = self._isolate.options(num_cpus=1, max_retries=0)
        refs = [remote.remote(spec, text, limits, self._cell)]
        outcome: dict[str, Any] = self._get(refs, max(timeout_s, limits.seconds + _QUEUE_S))[0]
        return outcome

    def _get(self, refs: list[Any], timeout_s: float) -> list[Any]:
        raised = self._ray.exceptions
        try:
            return list(self._ray.get(refs, timeout=timeout_s))
        except raised.GetTimeoutError:
            self._cancel(refs)
            message = f"not done after {timeout_s:.3g} s: {len(refs)} tasks, now cancelled"
            raise errors.ComputeTimedOut(message, seconds=timeout_s, tasks=len(refs)) from None
        except raised.OutOfMemoryError as error:
            self._cancel(refs)
            message = f"Ray ended a worker because the host is out of memory: {error}"
            raise errors.ComputeDied(message, error="OutOfMemoryError") from error
        except raised.RayError as error:
            self._cancel(refs)
            name = type(error).__name__
            raise errors.ComputeDied(f"a Ray worker failed: {name}: {error}", error=name) from error

    def _cancel(self, refs: list[Any]) -> None:
        for ref in refs:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError, TypeError):
                self._ray.cancel(ref, force=True)


def _end_with_ray() -> None:
    """End this process once Ray's head or node is gone: whoever waits has it started again."""
    import psutil

    own = [p for p in psutil.Process().children() if p.name() in _RAYS_OWN]
    while True:
        for process in own:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                logging.getLogger(__name__).error("Ray's %s is gone", process.name())
                os._exit(1)
        time.sleep(_LOOK_S)


def _set_environment(config: ComputeConfig) -> None:
    """Must run before Ray is imported: it reads most of these then."""
    token = config.token_file
    if not config.address:
        token = str(Path(config.temp_dir, "token"))
        fd = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as stream:
            stream.write(secrets.token_hex(32))
        # Despite its name it also works on Linux: Ray 2.60 then takes 127.0.0.1 for the
        # node's address and listens there only. Without it `_node_ip_address` is ignored.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.update(
        {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": token,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ROTATION_MAX_BYTES": str(2**20),
            "RAY_ROTATION_BACKUP_COUNT": "1",
            "HOME": config.temp_dir,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            **config.ray_environment,
        }
    )


def _log_tail(config: ComputeConfig) -> str:
    """The last words of Ray's own logs; its folder is gone when anybody could look."""
    tail = []
    for name in ("gcs_server.out", "raylet.out"):
        with contextlib.suppress(OSError):
            path = Path(config.temp_dir, "session_latest", "logs", name)
            tail += path.read_text(errors="replace").splitlines()[-3:]
    return " | ".join(tail)[-2000:]
