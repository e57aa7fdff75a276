"""Bases, plans and real agents for tests of the site agent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protos.chunks import IndexWriter
from protos.contribution import Header
from protos.digest import digest
from protos.manifest import Index, Manifest
from protos.plan import Plan, Schedule, StrategyChoice, TaskChoice, Work
from protos.tensors import from_bytes, iterate_bytes
from site_agent.pipe import Prepare
from site_agent.trainer.device import Device
from site_agent.trainer.workload import LoadedTask, Workload

TASKS = Path(__file__).with_name("site_tasks.py")
CPU = Device(torch.device("cpu"))


def plan_of(**changes: Any) -> Plan:
    task = changes.pop("task", "Clouds")
    stack = changes.pop("stack", ())
    fields: dict[str, Any] = {
        "run": "r1", "round": 1, "attempt": 1, "site": "north",
        "task": TaskChoice(name=task, params=changes.pop("params", {})),
        "stack": tuple(StrategyChoice(name=s) if isinstance(s, str) else s for s in stack),
        "work": Work(steps=4), "schedule": Schedule(lr=0.1), "batch_size": 8, "seed": 7,
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def order_of(plan: Plan, **settings: Any) -> Prepare:
    source = f"{TASKS}:{plan.task.name}"
    return Prepare(job=1, plan=plan, source=source, settings=settings)


def workload_of(plan: Plan, **settings: Any) -> Workload:
    return Workload("north", LoadedTask(order_of(plan, **settings)), plan, CPU)


def artefact(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> Index:
    path.unlink(missing_ok=True)
    writer = IndexWriter(path)
    for part in iterate_bytes(manifest, tensors):
        writer.write(part)
    path.with_name(f"{manifest.digest}.manifest").write_bytes(manifest.encoded)
    return writer.finish(manifest.digest)


def base_of(folder: Path, plan: Plan, place: str = "shared") -> tuple[Path, Manifest, Index]:
    """The model of a plan's task as an artefact."""
    work = workload_of(plan)
    manifest = work.manifest.of(place)  # type: ignore[arg-type]
    path = folder / f"{digest(plan.encode())[:12]}-{place}.data"
    return path, manifest, artefact(path, manifest, work.state())


def unpack(header: Header, manifest: Manifest, payload: Path) -> dict[str, Tensor]:
    """The raw tensors of a contribution and its side payloads, by name."""
    data = payload.read_bytes()
    out: dict[str, list[Tensor]] = {}
    for tile, (start, stop) in zip(manifest.tiles, header.block_spans(manifest), strict=True):
        dtype = tile.spec.dtype if header.kind == "init" else tile.spec.wire_dtype
        out.setdefault(tile.spec.name, []).append(
            from_bytes(data[start:stop], dtype, (tile.elements,))
        )
    tensors = {n: torch.cat(parts).view(manifest[n].shape) for n, parts in out.items()}
    for spec in header.payloads:
        start, stop = header.tail_spans(len(data))[spec.name]
        tensors[spec.name] = from_bytes(data[start:stop], spec.dtype, spec.shape)
    return tensors


def write_config(home: Path, tasks: Sequence[str], more: str = "") -> None:
    home.mkdir(parents=True, exist_ok=True)
    tables = "".join(f'[tasks.{name}]\nsource = "{TASKS}:{name}"\n' for name in tasks)
    (home / "site.toml").write_text(tables + "\n" + more)


def site_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "site_agent.cli", *words]


def ask(home: Path, *words: str) -> dict[str, Any]:
    """A command with ``--json`` on a home."""
    done = subprocess.run(
        site_command(*words, "--home", str(home), "--json"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class RunningAgent:
    """``farflung-site run`` as a process; ``before`` stands before the command."""

    def __init__(self, home: Path, before: Sequence[str] = (), **environment: str) -> None:
        self.home = home
        self._log = (home / "stdout.log").open("ab")
        self.process = subprocess.Popen(
            [*before, *site_command("run", "--home", str(home), "--json")],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **environment},
        )

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home / "log/agent.log").read_text().splitlines()]

    def stop(self) -> int:
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        code = self.process.wait(30)
        self._log.close()
        return code
