"""What the steps of a round work with, and the values that they hand on."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.board import Board
from orchestrator.compute.config import Limits
from orchestrator.compute.errors import FunctionFailed, PluginRaised
from orchestrator.compute.interface import Compute
from orchestrator.config import DaemonConfig
from orchestrator.exchange import Exchange
from orchestrator.home import Home
from orchestrator.ledger import ContributionRow, Ledger, RoundRow, RunRow
from orchestrator.run_config import RunConfig
from orchestrator.store import Store
from orchestrator.views import Plugin
from protos.chunks import write_durably
from protos.contribution import Header
from protos.digest import canonical
from protos.errors import ConfigInvalid, FarflungError, by_name
from protos.faults import reach
from protos.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

_WHO = re.compile(r"\A(the plug-in )?\w+ raised \w+( at item \d+ of \d+)?: ")

COMPUTE_S = 24 * 3600.0
"""Bound of one reduction; Ray's own failures come much sooner."""

READY_S = 300.0

WORKER_S = 60.0
"""What a worker may need to start, beside the bounds of what it is asked."""


@dataclass
class Engine:
    """The daemon's parts, as a round sees them.

    Attributes:
        note: Called with (level, run, round, site, text) for what an operator should read.
        publish: Called when the view of a round changed.
    """

    home: Home
    config: DaemonConfig
    ledger: Ledger
    store: Store
    compute: Compute
    board: Board
    exchange: Exchange
    note: Callable[[str, str, int | None, str, str], None]
    publish: Callable[[], None]
    workers: int = 1
    stopping: Callable[[], bool] = field(default=lambda: False)
    _stacks: dict[bytes, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    def ask(
        self, function: str, args: dict[str, Any], seconds: float = COMPUTE_S
    ) -> dict[str, Any]:
        """One call of a function of `arithmetic.FUNCTIONS`, bounded in time.

        Raises:
            FarflungError: What the function raised, if it is in the tree of `protos/errors.py`.
            ComputeFailed: It raised something else, or could not be run.
        """
        return self.run(function, [args], seconds)[0]

    def run(
        self, function: str, items: list[dict[str, Any]], seconds: float = COMPUTE_S
    ) -> list[dict[str, Any]]:
        """The same for many items, in parallel; gives the results in their order."""
        try:
            reach("compute.asking")
            return self.compute.map(function, items, seconds)
        except FunctionFailed as error:
            raise _said(error) from error

    def isolated(self, function: str, args: dict[str, Any], threads: int = 1) -> dict[str, Any]:
        """One call in a process without keys or network, within the limits of ``[plugins]``.

        Raises:
            FarflungError: As of `ask`.
        """
        limits = Limits(self.config.plugins.seconds, self.config.plugins.memory_bytes, threads)
        try:
            reach("compute.isolating")
            return self.compute.isolated(function, args, limits)
        except PluginRaised as error:
            raise _said(error) from error

    def stack_facts(self, stack: list[dict[str, Any]]) -> dict[str, Any]:
        """What `arithmetic.planning.check_stack` says of some choices; asked once for each stack.

        Raises:
            ConfigInvalid: What is wrong with them.
        """
        name = canonical(stack)
        if name not in self._stacks:
            self._stacks[name] = self.ask("check_stack", {"stack": stack})
        return self._stacks[name]

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A folder for one step's files, gone afterwards."""
        folder = self.home.work / f"{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        reach("scratch.made")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            reach("scratch.removed")

    def task(self, config: RunConfig) -> dict[str, Any]:
        """The run's task as the arithmetic wants it, from this orchestrator's own configuration.

        Raises:
            ConfigInvalid: The orchestrator does not have it.
        """
        source = self.config.tasks.get(config.task.name)
        if source is None:
            raise ConfigInvalid(
                f"task {config.task.name}: this orchestrator does not have it; add "
                f"[tasks.{config.task.name}] to {self.home.config_file}, or take the first base "
                'from a site ([init] from = "site:NAME") and leave out what needs proxy data',
                key="tasks",
            )
        return {
            "name": config.task.name,
            "source": source.source,
            "params": config.task.params,
            "settings": source.settings,
            "folder": str(self.home.path),
        }

    def manifest_file(self, folder: Path, digest: str) -> Path:
        """A manifest as a file in a scratch folder."""
        path = folder / f"{digest}.manifest"
        if not path.exists():
            path.write_bytes(self.store.manifest(digest).encoded)
        return path

    def header_file(self, folder: Path, row: ContributionRow) -> Path:
        """A contribution's header as a file in a scratch folder."""
        path = folder / f"{row.digest}.header"
        if not path.exists():
            path.write_bytes(row.header)
        return path

    def part_args(self, folder: Path, model: Model) -> dict[str, dict[str, str]]:
        """Each stored part of a model as {manifest, path}."""
        out = {}
        for place, digest in model.parts().items():
            index = self.store.index(digest)
            out[place] = {
                "manifest": str(self.manifest_file(folder, index.manifest)),
                "path": str(self.store.lend(digest, folder)),
            }
        return out

    def adopt_parts(self, parts: dict[str, dict[str, str]]) -> Model:
        """Store the parts of a model that the arithmetic wrote."""
        digests = {}
        for place, part in parts.items():
            manifest = Manifest.decode(part["manifest"].encode())
            self.store.put_manifest(manifest)
            reach("parts.manifest.put")
            digests[place] = self.store.put_file(Path(part["path"]), manifest.digest).digest
        return Model(digests["shared"], digests.get("frozen", ""), digests.get("orchestrator", ""))


def _said(error: FunctionFailed | PluginRaised) -> FarflungError:
    """What a function of ours said in words of ours; anything else stays a failure of compute."""
    cls = by_name(str(error.facts.get("error", "")))
    if cls is FarflungError:
        return error
    facts = {k: v for k, v in error.facts.items() if k in ("function", "where")}
    message = _WHO.sub("", error.message, count=1)
    return cls(message.removesuffix(f" ({error.facts.get('where', '')})"), **facts)


@dataclass(frozen=True)
class Model:
    """A model in the store: the digests of its parts' indexes; empty where there is none."""

    shared: str
    frozen: str = ""
    orchestrator: str = ""

    def parts(self) -> dict[str, str]:
        """Place to digest, of the parts that there are."""
        every = {
            "shared": self.shared,
            "frozen": self.frozen,
            "orchestrator": self.orchestrator,
        }
        return {place: digest for place, digest in every.items() if digest}

    @classmethod
    def of(cls, row: RoundRow) -> Model:
        """The model of a committed or held round."""
        return cls(row.model, row.summary.get("frozen", ""), row.summary.get("orchestrator", ""))


@dataclass(frozen=True)
class Planned:
    """A round that was planned: its row, and what the ledger knows about its run.

    Attributes:
        config: The run's configuration.
        run: The run's row.
        row: The attempt.
        base: The model it starts from.
        before: The last committed round (0 for the first base).
    """

    config: RunConfig
    run: RunRow
    row: RoundRow
    base: Model
    before: RoundRow

    @property
    def stack(self) -> list[dict[str, Any]]:
        """The strategies that act in this round."""
        return list(self.row.draft["stack"])

    @property
    def whole_stack(self) -> list[dict[str, Any]]:
        """All strategies of the run."""
        return [c.model_dump(mode="json") for c in self.config.stack]

    @property
    def name(self) -> str:
        """For scratch folders and messages."""
        return f"{self.run.id}-{self.row.round}-{self.row.attempt}"


@dataclass(frozen=True)
class Candidate:
    """A reduced and perhaps refined model that is not committed yet.

    Attributes:
        model: In the store.
        outer_state: Digest; empty for none.
        relative_change: Of the reduction, before outer step and refine.
        weights: Weight of each site, mean over the groups.
        memos: Strategies' memos so far.
        plugins: What refine did.
        payloads: Merged side payloads: name to {object, offset, nbytes, dtype, shape, merge}.
        files: What strategies keep beside the model: "strategy/name" to {object, nbytes}.
        held: Why the round must be held; empty if it need not.
        cosines: Of each site's update to the sum of the others', if the run's gate asks for it.
        average: What it was before plug-ins changed its model; None if none did.
    """

    model: Model
    outer_state: str
    relative_change: float
    weights: dict[str, float]
    memos: dict[str, Any]
    plugins: tuple[Plugin, ...] = ()
    payloads: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    held: str = ""
    cosines: dict[str, float] = field(default_factory=dict)
    average: Candidate | None = None


@dataclass(frozen=True)
class Assessment:
    """What the sites' evaluation of the candidate came to.

    Attributes:
        done: Whether the quorum answered.
        scores: Pooled.
        sites: Per site.
        reliability: By split.
        calibration: Fitted maps by strategy.
        plugins: What the calibration strategies report.
        missing: Sites that did not answer, with the reason.
        again: Whether the sites have to be asked again, for what the maps do to their outputs.
    """

    done: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    sites: dict[str, dict[str, float]] = field(default_factory=dict)
    reliability: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[Plugin, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    again: bool = False


def payload_specs(engine: Engine, row: ContributionRow, folder: Path) -> dict[str, dict[str, Any]]:
    """Where each side payload of a contribution lies, for whoever works in a scratch folder."""
    header = Header.decode(row.header)
    spans = header.tail_spans(row.nbytes)
    path = engine.store.place(row.index, folder) if header.payloads else ""
    return {
        p.name: {
            "path": path,
            "offset": spans[p.name][0],
            "nbytes": p.nbytes,
            "dtype": p.dtype,
            "shape": list(p.shape),
            "merge": p.merge,
        }
        for p in header.payloads
    }


@contextmanager
def timed(board: Board, phase: str) -> Iterator[None]:
    """Count a step's wall seconds for the round's view."""
    start = time.monotonic()
    try:
        yield
    finally:
        board.took(phase, time.monotonic() - start)


def write_json(path: Path, document: Any) -> str:
    """A document as a file; gives its path as text."""
    write_durably(path, json.dumps(document).encode())
    return str(path)
