"""What `bench reduce` measures: one model, what some sites sent, and whoever reduces it.

``python -m orchestrator.bench.reduction ENGINE`` reduces as often as it is asked, a line of JSON each
way. Every engine is a process of its own, so that each has its own memory and processor time:

    floor       one thread without any of ours around it: reads, adds, writes and hashes
    in-process  `InProcessCompute`
    ray:N       N workers; this process is then what the daemon is, and holds no torch
    nodes:N     a Ray cluster of N nodes with one CPU each, on this machine
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.arithmetic import FUNCTIONS
from orchestrator.bench.ray_nodes import ray_nodes
from orchestrator.bench.sampler import read
from orchestrator.board import Board
from orchestrator.compute import Compute, ComputeClient, ComputeConfig, InProcessCompute
from orchestrator.compute.protocol import Lines
from orchestrator.config import parse_daemon
from orchestrator.exchange import Exchange
from orchestrator.home import Home
from orchestrator.ledger import ContributionRow, Ledger, RoundRow, RunRow
from orchestrator.rounds.engine import Engine, Model, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.rounds.reduce import reduce
from orchestrator.run_config import RunConfig, parse_run
from orchestrator.store import Store
from protos.chunks import IndexWriter
from protos.contribution import Header
from protos.digest import digest
from protos.manifest import CHUNK_BYTES, TILE_ELEMENTS, Index, Manifest, TensorSpec
from protos.plan import StrategyChoice

RULES: dict[str, tuple[StrategyChoice, ...]] = {
    "mean": (),
    "trimmed_mean": (StrategyChoice(name="trimmed_mean"),),
    "median": (StrategyChoice(name="trimmed_mean", params={"trim": 0.5}),),
    "fedavgm": (StrategyChoice(name="fedavgm"),),
}
"""Rules by the name that they are asked for; ``trim = 0.5`` is the median."""

TENSORS = 5
"""Of different sizes, none of which is a whole number of tiles or chunks."""

FLOOR_FILE = "scratch/floor"
READY_S = 300.0


# -- the inputs ----------------------------------------------------------------------------------------


def make_inputs(folder: Path, sites: int, model_bytes: int) -> int:
    """Store a base and a contribution of each site; gives the model's size in bytes.

    Sizes are multiples of a tensor's alignment, so that the floor may take a model for one vector.
    """
    home = Home(folder)
    home.path.mkdir(mode=0o700, parents=True)
    home.make_folders()
    store = Store(home.store)
    unit = max(1, model_bytes // (4 * 16 * sum(range(1, TENSORS + 1))))
    manifest = Manifest(
        tuple(TensorSpec(f"t{i}", (unit * 16 * i,), "float32") for i in range(1, TENSORS + 1))
    )
    store.put_manifest(manifest)
    base = _drawn(store, manifest, 0)
    rows = []
    for number in range(sites):
        index = _drawn(store, manifest, number + 1)
        header = Header(
            plan_id="bench/1/1/train",
            work_digest="0" * 64,
            site=f"site-{number:03d}",
            base=base.digest,
            manifest=manifest.digest,
            index=index.digest,
            examples=(number + 1) * 100,
        )
        rows.append(header.encode().decode())
    document = {"manifest": manifest.digest, "base": base.digest, "headers": rows}
    (folder / "case.json").write_text(json.dumps(document))
    return manifest.nbytes


def _drawn(store: Store, manifest: Manifest, seed: int) -> Index:
    generator = np.random.default_rng(seed)
    path = store.scratch("drawn")
    writer = IndexWriter(path)
    left = manifest.nbytes // 4
    while left:
        values = generator.random(min(left, TILE_ELEMENTS), dtype=np.float32) - np.float32(0.5)
        writer.write(values.view(np.uint8).data)
        left -= len(values)
    index = writer.finish(manifest.digest)
    store.adopt(index, path)
    return index


# -- the engines ---------------------------------------------------------------------------------------


class Bench:
    """The orchestrator's parts that a reduction needs, on the inputs of a folder.

    Args:
        folder: See `make_inputs`.
        compute: Where functions run.
        workers: How many at once.
    """

    def __init__(self, folder: Path, compute: Compute, workers: int) -> None:
        home = Home(folder)
        settings = parse_daemon("")
        board = Board()
        ledger = Ledger.open(home.ledger)
        case = json.loads((folder / "case.json").read_text())
        self._base, self._manifest = case["base"], case["manifest"]
        self.engine = Engine(
            home=home,
            config=settings,
            ledger=ledger,
            store=Store(home.store),
            compute=compute,
            board=board,
            exchange=Exchange(ledger, board, settings.sites.grace_s, lambda *_: None),
            note=lambda *_: None,
            publish=lambda: None,
            workers=workers,
        )
        self._closed = Closed(tuple(self._row(text.encode()) for text in case["headers"]))
        board.begin("bench", 1, 1, [c.site for c in self._closed.contributions])

    def _row(self, encoded: bytes) -> ContributionRow:
        header = Header.decode(encoded)
        nbytes = self.engine.store.index(header.index).nbytes
        return ContributionRow(
            digest=header.digest,
            plan_id=header.plan_id,
            run="bench",
            round=1,
            attempt=1,
            kind="train",
            site=header.site,
            work_digest=header.work_digest,
            header=encoded,
            signature=b"",
            fingerprint="",
            index=header.index,
            manifest=header.manifest,
            nbytes=nbytes,
            norm=None,
            received=time.time(),
        )

    def reduce(self, rule: str) -> str:
        """One reduction, as a round does it; gives the digest of the next model."""
        config = parse_run('name = "bench"\nrounds = 1\n[task]\nname = "bench"\n')
        config = config.model_copy(update={"strategy": RULES[rule]})
        draft = {
            "manifest": self._manifest,
            "groups": ["all"],
            "covered": None,
            "stack": [c.model_dump(mode="json") for c in RULES[rule]],
            "memos": {},
        }
        row = RoundRow("bench", 1, 1, state="closed", base=self._base, draft=draft)
        before = RoundRow("bench", 0, 1, model=self._base)
        planned = Planned(config, _run(config), row, Model(self._base), before)
        return reduce(self.engine, planned, self._closed).model.shared

    def forget(self, digest: str) -> None:
        """Remove what was reduced, so that the next one is written again."""
        self.engine.store.erase(digest, "bench")

    def close(self) -> None:
        """Close the ledger."""
        self.engine.ledger.close()


def _run(config: RunConfig) -> RunRow:
    return RunRow(
        id="bench",
        name=config.name,
        config=config.resolved,
        config_digest=config.digest,
        rounds=1,
        created=time.time(),
    )


def floor(folder: Path) -> str:
    """The least that a mean costs: one thread that reads, adds in fp64, writes and hashes.

    The model is one vector, all files are read from front to back, nothing is checked, decoded,
    measured or synced. Gives the digest of the artefact, which is that of the real reduction.
    """
    import torch

    torch.set_num_threads(1)
    case = json.loads((folder / "case.json").read_text())
    store = Store(Home(folder).store)
    manifest = store.manifest(case["manifest"])
    headers = [Header.decode(text.encode()) for text in case["headers"]]
    total = sum(h.examples for h in headers)
    weights = [h.examples / total for h in headers]
    inputs = [os.open(store.path(h.index), os.O_RDONLY) for h in headers]
    base = os.open(store.path(case["base"]), os.O_RDONLY)
    out = os.open(store.root / FLOOR_FILE, os.O_CREAT | os.O_WRONLY)
    row = torch.empty(CHUNK_BYTES // 4)
    mean, new = (torch.empty(len(row), dtype=torch.float64) for _ in range(2))
    digests = []
    for at in range(0, manifest.nbytes, CHUNK_BYTES):
        n = min(len(row), (manifest.nbytes - at) // 4)
        values, after, update = row[:n], new[:n], mean[:n].zero_()
        buffer = values.view(torch.uint8).numpy().data
        for fd, weight in zip(inputs, weights, strict=True):
            os.preadv(fd, [buffer], at)
            update.add_(after.copy_(values), alpha=weight)
        update.copy_(values.copy_(update))  # rounded once, as the difference below
        os.preadv(base, [buffer], at)
        values.copy_(after.copy_(values).sub_(update))
        os.pwrite(out, buffer, at)
        digests.append(digest(buffer))
    for fd in (*inputs, base, out):
        os.close(fd)
    return Index(manifest.digest, manifest.nbytes, tuple(digests)).digest


# -- the process ---------------------------------------------------------------------------------------


def serve(engine: str) -> None:
    """Answer requests ``{"folder": …, "rule": …}`` until the end of standard input.

    An answer has ``wall_s``, ``cpu_s`` (of this process and of Ray's that belong to it), ``digest``,
    and ``peaks``: the largest resident memory of this process, of a worker, of another of Ray's.
    """
    lines = Lines(sys.stdin.buffer, sys.stdout.buffer)
    with contextlib.ExitStack() as stack:
        compute, workers, pids = _compute(engine, stack)
        if compute is not None:
            stack.enter_context(compute).wait_ready(READY_S)
        lines.send({"ready": True})
        benches: dict[str, Bench] = {}
        while (request := lines.receive()) is not None:
            folder, rule = request["folder"], request["rule"]
            if compute is None:
                lines.send(_measured(partial(floor, Path(folder)), pids))
                Path(Home(Path(folder)).store, FLOOR_FILE).unlink()  # or the next writes into pages
                continue
            if folder not in benches:
                benches[folder] = Bench(Path(folder), compute, workers)
                stack.callback(benches[folder].close)
            bench = benches[folder]
            answer = _measured(partial(bench.reduce, rule), pids)
            bench.forget(answer["digest"])
            lines.send(answer)


def _compute(
    engine: str, stack: contextlib.ExitStack
) -> tuple[Compute | None, int, Callable[[], list[int]]]:
    """Where functions run, how many at once, and the processes beside this one."""
    kind, _, count = engine.partition(":")
    config = ComputeConfig(functions=FUNCTIONS, preload=("orchestrator.arithmetic.preload",))
    if kind == "floor":
        return None, 1, list
    if kind == "in-process":
        return InProcessCompute(config), 1, list
    workers = int(count)
    if kind == "ray":
        client = ComputeClient(replace(config, num_cpus=workers))
        return client, workers, client.process_ids
    nodes = stack.enter_context(ray_nodes(workers))
    client = ComputeClient(
        replace(
            config,
            address=nodes.address,
            token_file=nodes.token_file,
            private_networks=nodes.networks,
        )
    )
    return client, workers, lambda: [*client.process_ids(), *nodes.process_ids()]


def _measured(work: Callable[[], str], below: Callable[[], list[int]]) -> dict[str, Any]:
    before = {}
    for pid in (os.getpid(), *below()):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # peaks are counted from here
        if (reading := read(pid)) is not None:
            before[pid] = reading.own_s
    own, start = time.process_time(), time.perf_counter()
    name = work()
    wall, cpu = time.perf_counter() - start, time.process_time() - own
    peaks: dict[str, int] = {"daemon": _peak_bytes(os.getpid())}
    for pid in below():
        if (reading := read(pid)) is not None:
            cpu += reading.own_s - before.get(pid, 0.0)
            kind = "worker" if _is_worker(pid) else "ray"
            peaks[kind] = max(peaks.get(kind, 0), _peak_bytes(pid))
    return {"wall_s": wall, "cpu_s": cpu, "digest": name, "peaks": peaks}


def _peak_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    return False


if __name__ == "__main__":
    serve(sys.argv[1])
