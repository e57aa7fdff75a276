"""The first base of a run: what a start is, and what a run's strategies make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.arithmetic.models import first_model
from orchestrator.config import parse_daemon
from orchestrator.launching import launch
from orchestrator.rounds.first import first
from protos.errors import InvalidInput
from protos.manifest import Manifest
from protos.tensors import map_file
from tests.support.field import BLOBS
from tests.support.workbench import Workbench

WIDE = {"name": "alife", "params": {"new": 2}, "rounds": None}


def made(
    folder: Path, stack: list[dict[str, Any]], hidden: int = 12, **start: Any
) -> dict[str, dict[str, str]]:
    folder.mkdir()
    task = {
        "name": "blobs", "source": BLOBS, "params": {"hidden": hidden}, "settings": {}, "folder": "",
    }  # fmt: skip
    return first_model({"task": task, "stack": stack, "seed": 3, "out": str(folder), **start})


def stored(folder: Path, parts: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """As `Engine.part_args` names them."""
    out = {}
    for place, part in parts.items():
        file = folder / f"{place}.manifest"
        file.write_text(part["manifest"])
        out[place] = {"manifest": str(file), "path": part["path"]}
    return out


def tensors(parts: dict[str, dict[str, str]]) -> dict[str, Tensor]:
    shared = Manifest.decode(parts["shared"]["manifest"].encode())
    return {k: v.clone() for k, v in map_file(Path(parts["shared"]["path"]), shared).items()}


def test_a_model_of_the_task_is_changed_with_what_it_has_learned(tmp_path: Path) -> None:
    plain = made(tmp_path / "plain", [])
    learned = tensors(plain)
    start = stored(tmp_path / "plain", plain)
    wide = tensors(made(tmp_path / "wide", [WIDE], parts=start))
    assert wide["second.weight"].shape == (5, 12)
    assert torch.equal(wide["second.weight"][:3], learned["second.weight"])
    assert torch.equal(wide["second.weight"][3:], learned["second.weight"][[0, 0]])
    assert torch.equal(wide["first.weight"], learned["first.weight"])


def test_a_model_of_the_run_stays_as_it_is(tmp_path: Path) -> None:
    before = made(tmp_path / "before", [WIDE])
    start = stored(tmp_path / "before", before)
    after = made(tmp_path / "after", [WIDE], parts=start)
    assert after["shared"]["manifest"] == before["shared"]["manifest"]
    assert Path(after["shared"]["path"]).read_bytes() == Path(before["shared"]["path"]).read_bytes()


def test_what_is_neither_is_refused_by_tensor(tmp_path: Path) -> None:
    start = stored(tmp_path / "other", made(tmp_path / "other", [], hidden=20))
    with pytest.raises(InvalidInput, match=r"tensor first.weight has the shape \[20, 8\] where"):
        made(tmp_path / "out", [WIDE], parts=start)


def test_a_run_that_goes_on_from_a_round_widens_its_head_and_leaves_its_map(
    tmp_path: Path,
) -> None:
    bench = Workbench(tmp_path, config=f'[tasks.blobs]\nsource = "{BLOBS}"\n')
    bench.enrol("north")
    bench.run_tasks_here()

    def run(name: str, start: str, strategy: str) -> Any:
        text = f'name = "{name}"\nrounds = 1\ntask = {{ name = "blobs" }}\ninit = {{ from = "{start}" }}\n'
        row = launch(bench.engine, text + strategy, "", b"")
        first(bench.engine, bench.ledger.run(row.id))
        return bench.ledger.round(row.id, 0)

    learned = run("old", "task", "strategy = []\n")
    maps = {"temperature": {"temperature": 1.5}}
    summary = {"frozen": learned.summary["frozen"], "calibration": maps}
    bench.commit(learned.run, 1, learned.model, summary=summary)
    widen = '[[strategy]]\nname = "alife"\nnew = 2\n'
    wider = run("wider", "old@1", widen)
    assert bench.tensors(wider.model)["second.weight"].shape == (5, 12)
    assert "calibration" not in wider.summary
    same = run("same", "old@1", "strategy = []\n")
    assert (same.model, same.summary["calibration"]) == (learned.model, maps)
    again = run("again", "wider@0", widen)
    assert again.model == wider.model

    bench.engine.config = parse_daemon("")
    assert run("elsewhere", "old@1", widen).model == learned.model, "sites will say what differs"
    bench.close()
