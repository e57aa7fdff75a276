"""The orchestrator's parts without its doors: a real ledger, store and compute in a folder.

What sites would send is written as they would write it: real manifests, headers, indexes, bytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.arithmetic import FUNCTIONS
from orchestrator.board import Board
from orchestrator.compute import ComputeConfig, InProcessCompute
from orchestrator.compute.interface import Compute
from orchestrator.config import DaemonConfig, parse_daemon
from orchestrator.exchange import Exchange
from orchestrator.home import Home
from orchestrator.ledger import ContributionRow, Ledger, PlanKind, RoundRow, RunRow
from orchestrator.rounds.engine import Engine, Model, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.run_config import RunConfig, parse_run
from orchestrator.store import Store
from protos.chunks import IndexWriter
from protos.contribution import Header, Merge, PayloadSpec
from protos.digest import digest
from protos.manifest import Manifest, TensorSpec
from protos.plan import StrategyChoice
from protos.tensors import DTYPES, dtype_name, iterate_bytes, map_file, view_bytes
from strategies.stack import Stack

RUN_FILE = 'name = "{name}"\nrounds = {rounds}\n[task]\nname = "t"\n'


@cache
def empty_ledger() -> bytes:
    """The file of a new ledger; making one takes a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        Ledger.open(path).close()
        return path.read_bytes()


def of_spec(name: str, shape: tuple[int, ...], dtype: str = "float32", **more: Any) -> TensorSpec:
    """A tensor of a manifest; integers are counters."""
    floating = dtype.startswith(("float", "bfloat"))
    return TensorSpec(
        name, shape, dtype, **{"kind": "parameter" if floating else "counter", **more}
    )


class Workbench:
    """Parts of a daemon in a folder.

    Args:
        root: An empty folder.
        compute: Where functions run; in this process by default.
        config: The daemon's configuration, TOML.
        workers: As many runs of tiles are made as for so many.
        home: A home that is there and has no ledger yet; one without keys is made by default.

    Attributes:
        notes: What an operator would have read.
    """

    def __init__(
        self,
        root: Path,
        compute: Compute | None = None,
        config: str = "",
        workers: int = 1,
        home: Home | None = None,
    ) -> None:
        self.home = home or Home(root / "home")
        self.home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home.make_folders()
        self.home.ledger.write_bytes(empty_ledger())
        self.ledger = Ledger.open(self.home.ledger)
        self.store = Store(self.home.store)
        self.board = Board()
        self.notes: list[str] = []
        settings: DaemonConfig = parse_daemon(config)
        self.engine = Engine(
            home=self.home,
            config=settings,
            ledger=self.ledger,
            store=self.store,
            compute=compute or InProcessCompute(ComputeConfig(functions=FUNCTIONS)),
            board=self.board,
            exchange=Exchange(self.ledger, self.board, settings.sites.grace_s, self._say),
            note=self._note,
            publish=lambda: None,
            workers=workers,
        )

    def run_tasks_here(self) -> None:
        """Run a task's code in this process, where it takes a child and seconds in a daemon."""
        ask = self.engine.ask
        self.engine.isolated = lambda function, args, threads=1: ask(function, args)  # type: ignore[method-assign]

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    def _say(self, level: str, site: str, text: str) -> None:
        self.notes.append(text)

    def _note(self, level: str, run: str, round: int | None, site: str, text: str) -> None:
        self.notes.append(text)

    # -- bytes ------------------------------------------------------------------------------------

    def put_model(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> str:
        """Store a model; gives the digest of its index."""
        path = self.store.scratch("model")
        path.write_bytes(b"".join(iterate_bytes(manifest, tensors)))
        self.store.put_manifest(manifest)
        return self.store.put_file(path, manifest.digest).digest

    def tensors(self, artefact: str) -> dict[str, Tensor]:
        """The tensors of a stored artefact."""
        manifest = self.store.manifest(self.store.index(artefact).manifest)
        return {k: v.clone() for k, v in map_file(self.store.path(artefact), manifest).items()}

    def bytes_of(self, artefact: str) -> bytes:
        """The bytes of a stored artefact."""
        return self.store.path(artefact).read_bytes()

    def contribution(
        self,
        site: str,
        covered: Manifest,
        updates: Mapping[str, Tensor],
        *,
        base: str = "",
        examples: int = 1,
        blocks: Mapping[str, Sequence[bytes]] | None = None,
        codec: str = "",
        payloads: Mapping[str, tuple[Tensor, Merge]] | None = None,
        metrics: Mapping[str, float] | None = None,
        run: str = "r",
        round: int = 1,
        attempt: int = 1,
        kind: PlanKind = "train",
        work_digest: str = "0" * 64,
    ) -> ContributionRow:
        """Store what a site sends; gives its row.

        Args:
            site: Who sends.
            covered: The manifest of what is sent.
            updates: By name, base - local for parameters, values for others.
            base: The base.
            examples: Weight.
            blocks: With a codec: for each of its tensors the blocks of its tiles.
            codec: Name of the codec.
            payloads: Side payloads with their merge rules.
            metrics: Of the header.
            run: Of the plan that is answered, as the next four.
            round: See run.
            attempt: See run.
            kind: See run.
            work_digest: See run.
        """
        path = self.store.scratch(f"contribution-{site}")
        writer = IndexWriter(path)
        sizes = []
        counters = {name: iter(parts) for name, parts in (blocks or {}).items()}
        for tile in covered.tiles if kind == "train" else ():
            if tile.spec.name in counters:
                block = next(counters[tile.spec.name])
            else:
                flat = updates[tile.spec.name].flatten()[tile.start : tile.stop]
                block = bytes(view_bytes(flat.to(DTYPES[tile.spec.wire_dtype])))
            writer.write(block)
            sizes.append(len(block))
        specs = []
        for name, (tensor, merge) in (payloads or {}).items():
            shape, dtype = tuple(tensor.shape), dtype_name(tensor)
            specs.append(PayloadSpec(name=name, shape=shape, dtype=dtype, merge=merge))
            writer.write(view_bytes(tensor))
        index = writer.finish(covered.digest)
        self.store.adopt(index, path)
        header = Header(
            plan_id=f"{run}/{round}/{attempt}/{kind}",
            work_digest=work_digest,
            site=site,
            kind=kind,
            base=base,
            manifest=covered.digest,
            index=index.digest,
            codec=codec,
            blocks=tuple(sizes) if codec else (),
            payloads=tuple(specs),
            examples=examples,
            metrics=dict(metrics or {}),
        )
        return ContributionRow(
            digest=header.digest,
            plan_id=header.plan_id,
            run=run,
            round=round,
            attempt=attempt,
            kind=kind,
            site=site,
            work_digest=work_digest,
            header=header.encode(),
            signature=b"signature",
            fingerprint="f",
            index=index.digest,
            manifest=covered.digest,
            nbytes=index.nbytes,
            norm=None,
            received=time.time(),
        )

    # -- rounds -----------------------------------------------------------------------------------

    def planned(
        self,
        base: str,
        stack: Sequence[StrategyChoice] = (),
        *,
        covered: Sequence[str] | None = None,
        round: int = 1,
        outer_state: str = "",
        seed: int = 0,
        frozen: str = "",
        base_before: str = "",
    ) -> Planned:
        """A round that is planned on a stored base, in no ledger."""
        run = parse_run(RUN_FILE.format(name="r", rounds=9))
        config = run.model_copy(update={"strategy": tuple(stack), "seed": seed})
        manifest = self.store.manifest(self.store.index(base).manifest)
        draft = {
            "manifest": manifest.digest,
            "groups": sorted({t.group for t in manifest}),
            "covered": None if covered is None else list(covered),
            "stack": [c.model_dump(mode="json") for c in Stack(stack).active(round)],
            "memos": {},
        }
        row = RoundRow("r", round, 1, state="closed", base=base, draft=draft)
        before = RoundRow("r", round - 1, 1, base=base_before, model=base, outer_state=outer_state)
        return Planned(config, self.run_row(config), row, Model(base, frozen), before)

    def run_row(self, config: RunConfig, identity: str = "r") -> RunRow:
        """A run's row."""
        return RunRow(
            id=identity,
            name=config.name,
            config=config.resolved,
            config_digest=config.digest,
            rounds=config.rounds,
            created=time.time(),
        )

    def closed(self, rows: Sequence[ContributionRow]) -> Closed:
        """The closed set of some contributions."""
        return Closed(tuple(sorted(rows, key=lambda row: row.site)))

    # -- a ledger with a history --------------------------------------------------------------------

    def enrol(self, *sites: str) -> None:
        """Enrol sites, with certificates that are none."""
        for site in sites:
            token = digest(site.encode())[:24]
            later = time.time() + 3600
            self.ledger.invite(site, token, later)
            self.ledger.use_token(
                token, fingerprint=f"f-{site}", certificate_pem=b"pem", expires=later
            )

    def run(self, name: str = "r", rounds: int = 3, **more: Any) -> RunRow:
        """A run in the ledger, whose id is its name; ``more`` are further lines of the file."""
        text = "".join(f"{key} = {value}\n" for key, value in more.items())
        config = parse_run(text + RUN_FILE.format(name=name, rounds=rounds))
        row = self.run_row(config, name)
        self.ledger.create_run(row)
        return row

    def commit(
        self,
        run: str,
        number: int,
        model: str = "",
        *,
        outer_state: str = "",
        summary: Mapping[str, Any] | None = None,
        attempt: int = 1,
    ) -> RoundRow:
        """Commit a round in the ledger; without a model a small one of its own is stored."""
        if not model:
            one = Manifest((of_spec("w", (2,)),))
            seed = int(digest(f"{run} {number}".encode())[:6], 16)
            model = self.put_model(one, {"w": torch.tensor([1.0, float(seed)])})
        row = RoundRow(run, number, attempt, started=time.time())
        self.ledger.plan_round(row)
        self.ledger.close_round(run, number, attempt, None, "every site answered")
        return self.ledger.commit_round(
            run, number, attempt, model=model, outer_state=outer_state, summary=dict(summary or {})
        )
