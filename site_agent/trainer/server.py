"""Serves the link: orders in, events out, one job at a time."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from protos.errors import TaskFailed
from protos.faults import reach
from protos.spares import Spares
from site_agent.pipe import (
    CancelJob,
    Cancelled,
    Done,
    FinishJob,
    Line,
    Perform,
    Prepare,
    Quit,
    Ready,
    Started,
    read_order,
)
from site_agent.trainer.device import Device
from site_agent.trainer.exchange import Clock, Exchange
from site_agent.trainer.failures import describe
from site_agent.trainer.watch import JobCancelled, Watch
from site_agent.trainer.workload import LoadedTask, Workload


class Server:
    """The trainer's side of the pipe.

    Args:
        orders: File descriptor that orders are read from.
        events: File descriptor that events are written to.
        site: Name of the site.
        device: Where to train.
        loader_workers: Processes that load data sets which aren't plain tensors.
    """

    def __init__(
        self, orders: int, events: int, site: str, device: Device, loader_workers: int = 0
    ) -> None:
        self._orders, self._events = orders, events
        self._site, self._device, self._workers = site, device, loader_workers
        self._inbox: queue.SimpleQueue[Prepare | Perform | Quit] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._cancelled: dict[int, threading.Event] = {}
        self._finishing: dict[int, threading.Event] = {}
        self._task: LoadedTask | None = None
        self._work: Workload | None = None
        self._job: tuple[Prepare, Clock] | None = None

    def run(self) -> None:
        """Serve until the link says quit."""
        threading.Thread(target=self._read, name="orders", daemon=True).start()
        self._tell(Started(packages=self._device.packages(), device=str(self._device.torch)))
        while True:
            order = self._inbox.get()
            if isinstance(order, Quit):
                return
            try:
                if isinstance(order, Prepare):
                    self._prepare(order)
                else:
                    self._perform(order)
            except JobCancelled:
                self._forget(order.job)
                self._tell(Cancelled(job=order.job))
            except BaseException as error:  # noqa: BLE001  # a task may raise anything, also SystemExit
                with suppress(OSError):  # the log's disk may be what is full
                    traceback.print_exc(file=sys.stderr)
                self._tell(describe(order.job, error))

    # -- orders ----------------------------------------------------------------------------------

    def _prepare(self, order: Prepare) -> None:
        self._job, clock = None, Clock()
        reach("prepare.heard")
        watch = self._watch(order.job)
        watch.check()
        with clock.phase("preparing"):
            if self._task is None or self._task.key != LoadedTask.key_of(order):
                self._work = self._task = None
                self._task = LoadedTask(order)
                reach("prepare.task.loaded")
            if self._work is None or self._work.key != Workload.key_of(self._task, order.plan):
                self._work = None
                self._work = Workload(
                    self._site, self._task, order.plan, self._device, self._workers
                )
            self._task.load(order.plan.kind)
            have = self._work.has_frozen(order.plan.frozen)
        watch.check()
        reach("prepare.loaded")
        self._job = (order, clock)
        self._tell(Ready(job=order.job, need_frozen=not have))
        reach("prepare.told")

    def _perform(self, order: Perform) -> None:
        if self._job is None or self._job[0].job != order.job or self._work is None:
            raise TaskFailed(f"site {self._site}: job {order.job} was not prepared")
        (prepared, clock), self._job = self._job, None
        reach("perform.heard")
        watch = self._watch(order.job)
        watch.check()
        if order.frozen:
            self._work.read_frozen(Path(order.frozen), prepared.plan.frozen)
        exchange = Exchange(
            work=self._work,
            plan=prepared.plan,
            watch=watch,
            clock=clock,
            base=Path(order.base) if order.base else None,
            state=Path(order.state) if order.state else None,
            out=Path(order.out),
            spares=Spares(Path(order.spares), 0) if order.spares else None,
            checkpoint=Path(order.checkpoint) if order.checkpoint else None,
            checkpoint_s=order.checkpoint_s,
        )
        header, index = exchange.perform()
        reach("perform.done")
        self._forget(order.job)
        self._tell(Done(job=order.job, header=header, index=index.encoded.decode()))
        reach("perform.told")

    def _watch(self, job: int) -> Watch:
        cancelled = self._cancelled.setdefault(job, threading.Event())
        finishing = self._finishing.setdefault(job, threading.Event())
        return Watch(job, self._tell, cancelled, finishing)

    def _forget(self, job: int) -> None:
        self._cancelled.pop(job, None)
        self._finishing.pop(job, None)

    # -- pipe ------------------------------------------------------------------------------------

    def _read(self) -> None:
        with os.fdopen(self._orders, "rb") as lines:
            for line in lines:
                order = read_order(line)
                if isinstance(order, CancelJob):
                    self._cancelled.setdefault(order.job, threading.Event()).set()
                    reach("cancel.heard")
                elif isinstance(order, FinishJob):
                    self._finishing.setdefault(order.job, threading.Event()).set()
                    reach("finish.heard")
                else:
                    self._inbox.put(order)
        # The link is gone: nobody is left to train for.
        os._exit(0)

    def _tell(self, line: Line) -> None:
        data = memoryview(line.encode())
        with self._writing:
            while data:
                try:
                    data = data[os.write(self._events, data) :]
                except BrokenPipeError:
                    os._exit(0)
