"""Runs one strategy's ``refine`` on the candidate: in a process without keys or network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.arithmetic.job import open_source
from orchestrator.arithmetic.models import build, load_part, state_of, write_parts
from orchestrator.arithmetic.planning import payload_loader
from orchestrator.views import FILE_NAME
from protos.errors import ComputeFailed
from protos.manifest import Manifest
from protos.tensors import DTYPES, map_file
from strategies.context import Refinement
from strategies.stack import Stack

MAX_FILE_BYTES = 256 << 20
"""Of one file that a strategy keeps: the daemon holds it in memory once, to store it."""


class Files(MutableMapping[str, bytes]):
    """The files of the last round, read when they are asked for; a strategy may set its own.

    Args:
        stored: Paths by "strategy/name".
        strategy: Whose turn it is.
    """

    def __init__(self, stored: Mapping[str, str], strategy: str) -> None:
        self._stored, self._prefix = dict(stored), f"{strategy}/"
        self.new: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        return self.new[name] if name in self.new else Path(self._stored[name]).read_bytes()

    def __setitem__(self, name: str, data: bytes) -> None:
        self._own(name)
        if len(data) > MAX_FILE_BYTES:
            raise ComputeFailed(
                f"file {name}: {len(data)} bytes exceed the {MAX_FILE_BYTES} that may be kept"
            )
        self.new[name] = bytes(data)

    def __delitem__(self, name: str) -> None:
        self._own(name)
        self.new.pop(name, None)
        self._stored.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._stored, *self.new}))

    def __len__(self) -> int:
        return len({*self._stored, *self.new})

    def _own(self, name: str) -> None:
        rest = name.removeprefix(self._prefix)
        if rest == name or not FILE_NAME.fullmatch(rest):
            raise ComputeFailed(
                f'file {name}: a strategy keeps files as "{self._prefix}NAME", where NAME is made of '
                "letters, digits, dots, dashes and underscores"
            )


def refine(args: dict[str, Any]) -> dict[str, Any]:
    """The candidate after one strategy's ``refine``.

    Args:
        args: As for `models.build`, and ``strategy`` (name), ``round``, ``parts`` (place to
            {manifest, path}), ``base`` (path of the shared part of the round's base), ``covered``,
            ``sources`` (as in a reduction's job, ``weights`` of one group), ``payloads``,
            ``site_payloads`` (the unmerged ones by site), ``memo``, ``files`` (paths by name),
            ``out`` (folder), ``device``.

    Returns:
        ``parts`` as of `models.first_model`, ``report`` (numbers), ``memo``, ``files`` (paths of
        the new ones by name), ``kept`` (names of all that are there now), ``cpu_seconds`` (of this
        process since it began).

    Raises:
        ComputeFailed: The refined model holds NaN or infinity, naming the tensor.
    """
    task, stack, model, _ = build(args)
    manifests = {}
    for place, part in args["parts"].items():
        manifests[place] = Manifest.decode(Path(part["manifest"]).read_bytes())
        load_part(model, Path(part["path"]), manifests[place])
    shared = manifests["shared"]
    covered = shared.covering(args["covered"])
    base = map_file(Path(args["base"]), shared)
    sources = {row["site"]: row for row in args["sources"]}

    def load_site(site: str) -> dict[str, Tensor]:
        return _site_state(sources[site], shared, covered, base, stack)

    strategy = next(s for s in stack.strategies if s.name == args["strategy"])
    memo = dict(args["memo"])
    files = Files(args["files"], strategy.name)
    with payload_loader() as load:
        pooled = {name: load(spec) for name, spec in args["payloads"].items()}
        by_site = {
            site: {name: load(spec) for name, spec in own.items()}
            for site, own in args["site_payloads"].items()
        }
    refinement = Refinement(
        round=args["round"],
        seed=args["seed"],
        task=task,
        model=model,
        weights={site: row["weights"][0] for site, row in sources.items()},
        load_site=load_site,
        payloads=pooled,
        site_payloads=by_site,
        device=args["device"],
        scratch=Path(args["out"]),
        memo=memo,
        files=files,
    )
    report = strategy.refine(refinement)
    tensors = {k: v.cpu() for k, v in state_of(refinement.model).items()}
    for spec in shared:
        if spec.kind != "counter" and not bool(torch.isfinite(tensors[spec.name]).all()):
            raise ComputeFailed(
                f"strategy {strategy.name}: tensor {spec.name} is not finite after refine",
                tensor=spec.name,
            )
    whole = Manifest(tuple(t for m in manifests.values() for t in m))
    parts = write_parts(Path(args["out"]), whole, tensors)
    return {
        "parts": parts,
        "report": report,
        "memo": json.loads(json.dumps(refinement.memo)),
        "files": _written(Path(args["out"]), files.new),
        "kept": list(files),
        "cpu_seconds": time.process_time(),
    }


def _written(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    out = {}
    for number, (name, data) in enumerate(sorted(files.items())):
        path = folder / f"{number}.file"
        path.write_bytes(data)
        out[name] = str(path)
    return out


def _site_state(
    row: dict[str, Any], shared: Manifest, covered: Manifest, base: dict[str, Tensor], stack: Stack
) -> dict[str, Tensor]:
    source = open_source(row, covered)
    try:
        pieces: dict[str, list[Tensor]] = {}
        for tile in covered.tiles:
            pieces.setdefault(tile.spec.name, []).append(source.read(tile, stack))
    finally:
        source.reader.close()
    out = {name: tensor.clone() for name, tensor in base.items() if name not in pieces}
    for name, parts in pieces.items():
        spec = shared[name]
        flat = torch.cat(parts)
        if spec.kind == "parameter":
            flat = base[name].flatten().to(flat.dtype) - flat
        out[name] = flat.to(DTYPES[spec.dtype]).view(spec.shape)
    return out
