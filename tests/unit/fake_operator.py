"""A daemon that only answers: canned views behind a real socket, for client and command line."""
# ruff: noqa: N802  # the names of calls are the .proto file's

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from orchestrator import views
from orchestrator.operator_socket import OperatorSocket
from protos.errors import Conflict, NotFound
from protos.rpc import ErrorInterceptor
from protos.v1 import operator_pb2, operator_pb2_grpc


def view(value: Any) -> operator_pb2.View:
    if isinstance(value, list):
        return operator_pb2.View(json=json.dumps([v.model_dump(mode="json") for v in value]))
    return operator_pb2.View(json=value.model_dump_json())


def a_run(name: str = "fashion", **changes: Any) -> views.Run:
    fields: dict[str, Any] = {
        "id": f"{name}-1", "name": name, "state": "running", "rounds": 3, "committed": 2,
        "current": 3, "created": 1.0, "strategies": ("co_learning",), "sites": ("north", "south"),
        "scores": {"test.accuracy": 0.8125},
    }  # fmt: skip
    return views.Run(**{**fields, **changes})


def a_round(number: int, **changes: Any) -> views.Round:
    fields: dict[str, Any] = {
        "run": "fashion-1", "round": number, "attempt": 1, "state": "committed", "started": 10.0,
        "committed": 12.5, "quorum": 2, "relative_change": 0.03125, "wire_bytes": 2_000_000,
        "work": {"epochs": 5.0}, "assessed": True,
        "scores": {"test.accuracy": 0.75, "test.nll": 0.5, "test.ece": 0.0625},
        "sites": (
            views.SiteWork(site="north", state="counted"),
            views.SiteWork(site="south", state="counted"),
        ),
    }  # fmt: skip
    return views.Round(**{**fields, **changes})


class FakeOperator(operator_pb2_grpc.OperatorServicer):
    """Remembers what it was asked (`asked`) and answers what it was given."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.run_views = [a_run(), a_run("digits", state="finished", committed=3, current=None)]
        self.round_views = [a_round(1), a_round(2)]
        self.events: list[views.Event] = []
        self.files: list[tuple[str, bytes]] = []
        self.live: queue.Queue[views.Event | None] = queue.Queue()
        self.looked: queue.Queue[str] = queue.Queue()
        self.following = threading.Event()

    def Status(self, request: Any, context: Any) -> Any:
        return view(
            views.Daemon(
                federation="f", version="0.1.0", address="127.0.0.1:8470",
                dashboard="http://127.0.0.1:8471/", home="/h", compute="ready", started=1.0,
                sites=2, attached=1, queued=0, running="fashion-1",
            )
        )  # fmt: skip

    def Invite(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return operator_pb2.InviteReply(token="farflung-join-1.x", expires="2030-01-01T00:00:00Z")

    def Revoke(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return view(views.Site(name=request.site, state="revoked"))

    def Sites(self, request: Any, context: Any) -> Any:
        return view(
            [
                views.Site(name="north", state="attached", tasks={"digits": "ab" * 32}),
                views.Site(name="south", state="gone", since=5.0),
            ]
        )

    def Launch(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return view(self.run_views[0])

    def Runs(self, request: Any, context: Any) -> Any:
        return view(self.run_views)

    def Run(self, request: Any, context: Any) -> Any:
        self.looked.put(request.run)
        for run in self.run_views:
            if request.run in (run.id, run.name):
                return view(run)
        raise NotFound(f"run: there is no {request.run}", run=request.run)

    def Rounds(self, request: Any, context: Any) -> Any:
        return view(self.round_views)

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self.asked.append(request)
        for event in self.events:
            if event.number > request.after:
                yield view(event)
        self.following.set()
        if request.follow:
            context.add_callback(lambda: self.live.put(None))
            while (event := self.live.get(timeout=30)) is not None:
                yield view(event)

    def Stop(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        raise Conflict("run fashion: it has ended already")

    def Extend(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return view(a_run(rounds=3 + request.rounds))

    def Release(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return view(a_run(state="queued"))

    def Reject(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return view(a_run(state="queued"))

    def Rollback(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return view(a_run(state="queued"))

    def Verify(self, request: Any, context: Any) -> Any:
        finding = views.Finding(text="round 1: the contributions of north were removed", round=1)
        lost = views.Finding(text="entry 7 (accepted, round 2, site north): lost", entry=7, round=2)
        return view(
            views.Verification(
                federation="f", run="fashion-1", entries=9, committed=3, contributions=4,
                digest="ab" * 32, problems=() if request.run == "fashion" else (lost,),
                erased=(finding,),
            )
        )  # fmt: skip

    def Replay(self, request: Any, context: Any) -> Any:
        same = request.round == 2
        model = views.Compared(
            what="model", recorded="a" * 64, computed="a" * 64 if same else "b" * 64,
            tensors=() if same else ("first.weight",),
        )  # fmt: skip
        return view(
            views.Replay(
                run="fashion", round=request.round, attempt=1, sites=("east", "north"),
                identical=same, compared=(model,), notes=("feddf had no part in the model",),
            )
        )  # fmt: skip

    def Export(self, request: Any, context: Any) -> Iterator[Any]:
        self.asked.append(request)
        for name, data in self.files:
            yield operator_pb2.FilePart(name=name, data=data)

    def Collect(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return view(views.Collected(dry_run=request.dry_run, files=3, bytes=300, kept=7))


@contextmanager
def fake_daemon(home: Path) -> Iterator[FakeOperator]:
    (home / "run").mkdir(parents=True, exist_ok=True)
    operator = FakeOperator()
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[ErrorInterceptor()])
    operator_pb2_grpc.add_OperatorServicer_to_server(operator, server)
    with OperatorSocket(home) as socket:
        server.add_insecure_port(socket.target)
        server.start()
        try:
            yield operator
        finally:
            operator.live.put(None)
            server.stop(None).wait()
