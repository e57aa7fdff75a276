"""An export: a file that anybody can open, with exactly what is stored, and a card that hides nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.arithmetic.models import MANIFEST_KEY, from_safetensors, read_safetensors
from orchestrator.config import parse_daemon
from orchestrator.exporting import exported
from orchestrator.launching import launch
from orchestrator.rounds.first import first
from protos.errors import ConfigInvalid, InvalidInput, NotFound
from protos.manifest import Manifest
from tests.support.field import BLOBS
from tests.support.workbench import Workbench, of_spec

SHARED = Manifest(
    (
        of_spec("w", (3, 5), ties=("decoder.w",)),
        of_spec("half", (4,), "bfloat16"),
        of_spec("eight", (4,), "float8_e4m3fn"),
        of_spec("mean", (2,), kind="statistic"),
        of_spec("n", (), "int64"),
        of_spec("mask", (3,), "bool"),
        of_spec("nothing", (0, 2)),
    )
)
FROZEN = Manifest((of_spec("anchor", (6,), placement="frozen"),))
VALUES = {
    "w": torch.arange(15.0).view(3, 5),
    "half": torch.tensor([1.0, -2, 0.5, 3]).bfloat16(),
    "eight": torch.tensor([1.0, -2, 0.5, 3]).to(torch.float8_e4m3fn),
    "mean": torch.tensor([0.1, 0.2]),
    "n": torch.tensor(2**40),
    "mask": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 2),
    "anchor": torch.arange(6.0),
}
SUMMARY: dict[str, Any] = {
    "counted": ["east", "north"],
    "missing": {"south": "site south, tensor w: it holds NaN"},
    "scores": {"val.accuracy": 0.5, "test.accuracy": 0.61239, "test.ece": 0.04},
    "calibration": {"temperature": {"t": 1.5}},
    "plugins": [
        {"name": "feddf", "state": "skipped", "reason": "out of memory"},
        {"name": "temperature", "state": "done"},
    ],
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path)
    bench.run("r", rounds=4)
    bench.commit("r", 0)
    model, frozen = bench.put_model(SHARED, VALUES), bench.put_model(FROZEN, VALUES)
    bench.commit("r", 1, model, summary={**SUMMARY, "frozen": frozen})
    bench.commit("r", 2, summary={"counted": ["east"], "scores": {"val.accuracy": 0.25}})
    yield bench
    bench.close()


@pytest.fixture
def files(bench: Workbench, tmp_path: Path) -> Path:
    """The export of round 1, copied as a client would have it."""
    out = tmp_path / "out"
    out.mkdir()
    with exported(bench.engine, "r", "1") as found:
        for path in found:
            (out / path.name).write_bytes(path.read_bytes())
    return out


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.double(), expected.double())


def test_five_files(files: Path) -> None:
    assert sorted(p.name for p in files.iterdir()) == [
        "MODEL_CARD.md",
        "calibration.json",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_the_file_holds_what_is_stored_frozen_parts_and_tied_names_too(files: Path) -> None:
    found = load_file(files / "model.safetensors")
    assert set(found) == {*VALUES, "decoder.w"}
    for name, tensor in VALUES.items():
        assert same(found[name], tensor), name
    assert same(found["decoder.w"], VALUES["w"])


def test_the_file_says_what_it_is(bench: Workbench, files: Path) -> None:
    with safe_open(str(files / "model.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["farflung.run"] == "r"
    assert metadata["farflung.round"] == "1"
    assert metadata["farflung.model"] == bench.ledger.round("r", 1).model
    assert Manifest.decode(metadata[MANIFEST_KEY].encode()).tensors == (
        *SHARED.tensors,
        *FROZEN.tensors,
    )


def test_the_other_documents(bench: Workbench, files: Path) -> None:
    calibration = json.loads((files / "calibration.json").read_text())
    assert calibration == {
        "run": "r",
        "round": 1,
        "model": bench.ledger.round("r", 1).model,
        "maps": {"temperature": {"t": 1.5}},
    }
    assert json.loads((files / "config.json").read_text()) == bench.ledger.run("r").config
    names = [t["name"] for t in json.loads((files / "manifest.json").read_text())["tensors"]]
    assert names == [t.name for t in SHARED]


def test_a_run_that_goes_back_to_a_round_has_its_map(bench: Workbench) -> None:
    bench.enrol("north")
    child = launch(
        bench.engine,
        'name = "child"\nrounds = 1\ninit = { from = "r@1" }\ntask = { name = "t" }',
        "",
        b"",
    )
    first(bench.engine, bench.ledger.run(child.id))
    with exported(bench.engine, "child", "") as found:
        documents = {path.name: path for path in found}
        calibration = json.loads(documents["calibration.json"].read_text())
    assert calibration["maps"] == {"temperature": {"t": 1.5}}
    assert calibration["model"] == bench.ledger.round("r", 1).model
    assert (calibration["run"], calibration["round"]) == (child.id, 0)


def test_each_round_has_its_own_map(bench: Workbench) -> None:
    with exported(bench.engine, "r", "2") as found:
        path = next(p for p in found if p.name == "calibration.json")
        assert json.loads(path.read_text())["maps"] == {}


def test_the_card_says_who_was_missing_and_what_was_skipped(files: Path) -> None:
    card = (files / "MODEL_CARD.md").read_text()
    assert card.startswith("# r, round 1\n")
    assert "averaged over 2 data centers" in card
    assert "| sites in this round | east, north |" in card
    assert "| not in this round | south: site south, tensor w: it holds NaN |" in card
    assert "| test.accuracy | 0.6124 |" in card
    assert '- `temperature` `{"t":1.5}`' in card
    assert "- feddf: out of memory" in card
    assert "temperature:" not in card
    assert "| rounds | 1 of 4 |" in card
    # 15 + 4 + 4 of the shared part and 6 that are frozen.
    assert "29 parameters in 8 tensors" in card


def test_what_a_site_wrote_does_not_break_the_card(bench: Workbench) -> None:
    said = "died | here\n\n# Scores <script>"
    bench.commit("r", 3, summary={"counted": ["east"], "missing": {"south": said}})
    assert "| not in this round | south: died \\| here # Scores &lt;script> |\n" in card_of(
        bench, "3"
    )


def card_of(bench: Workbench, which: str) -> str:
    with exported(bench.engine, "r", which) as found:
        return next(p for p in found if p.name == "MODEL_CARD.md").read_text()


def test_the_last_and_the_best_round(bench: Workbench) -> None:
    assert card_of(bench, "").startswith("# r, round 2\n")
    assert card_of(bench, "best").startswith("# r, round 1\n")
    with pytest.raises(NotFound, match="no committed round 7"):
        card_of(bench, "7")


def test_a_first_base_has_no_scores_and_the_card_says_so(bench: Workbench) -> None:
    card = card_of(bench, "0")
    assert "not assessed: nothing is known of its quality" in card
    assert "No calibration map was fitted" in card
    assert "| sites in this round | none |" in card


def test_nothing_is_left_of_it(bench: Workbench) -> None:
    with exported(bench.engine, "r", "1") as found:
        assert all(path.exists() for path in found)
    assert list(bench.home.work.iterdir()) == []


def test_an_export_is_a_start(bench: Workbench, files: Path, tmp_path: Path) -> None:
    """Its manifest comes along, so that kinds, ties and placements are those of the run."""
    out = tmp_path / "parts"
    out.mkdir()
    parts = from_safetensors({"start": str(files / "model.safetensors"), "out": str(out)})
    model = bench.engine.adopt_parts(parts)
    row = bench.ledger.round("r", 1)
    assert (model.shared, model.frozen) == (row.model, row.summary["frozen"])


def test_what_a_strategy_keeps_is_given_out_instead(bench: Workbench) -> None:
    files = {
        name: {"object": bench.store.put_bytes(data), "nbytes": len(data)}
        for name, data in (("student/s.json", b"{}"), ("student/s", b"1"), ("other/s", b"2"))
    }
    bench.commit("r", 3, summary={"files": files})
    with exported(bench.engine, "r", "3", of="student") as found:
        assert {path.name: path.read_bytes() for path in found} == {"s": b"1", "s.json": b"{}"}
    with (
        pytest.raises(NotFound, match="soft_tree keeps no files there; those that do: other, st"),
        exported(bench.engine, "r", "3", of="soft_tree"),
    ):
        pass


def test_what_lives_at_the_sites_is_not_made_up_and_needs_the_task(tmp_path: Path) -> None:
    bench = Workbench(tmp_path / "bench", config=f'[tasks.blobs]\nsource = "{BLOBS}"\n')
    bench.run_tasks_here()
    bench.enrol("north")
    strategy = '[[strategy]]\nname = "one"\ntail = "second"\nexchange = "trunk"\n'
    row = launch(
        bench.engine, f'name = "r"\nrounds = 1\ntask = {{ name = "blobs" }}\n{strategy}', "", b""
    )
    first(bench.engine, bench.ledger.run(row.id))
    with exported(bench.engine, "r", "0") as found:
        paths = {path.name: path for path in found}
        tensors = load_file(paths["model.safetensors"])
        card = paths["MODEL_CARD.md"].read_text()
    assert "first.weight" in tensors
    assert not [name for name in tensors if name.startswith("second.")]
    assert "| not here, each site has its own | second.weight, second.bias |" in card

    bench.engine.config = parse_daemon("")
    with (
        pytest.raises(ConfigInvalid, match=r"one would take away .* not have the task blobs; add"),
        exported(bench.engine, "r", "0"),
    ):
        pass
    with exported(bench.engine, "r", "0", stored=True) as found:
        stored = load_file(next(p for p in found if p.name == "model.safetensors"))
    assert "second.gate.0.weight" in stored
    bench.close()


def test_a_foreign_file_is_a_start_too(bench: Workbench, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"b": torch.ones(2), "n": torch.tensor([3])}, tmp_path / "x.safetensors")
    tensors, manifest = read_safetensors(tmp_path / "x.safetensors")
    assert manifest is None
    assert set(tensors) == {"b", "n"}
    parts = from_safetensors({"start": str(tmp_path / "x.safetensors"), "out": str(tmp_path)})
    found = Manifest.decode(parts["shared"]["manifest"].encode())
    assert {t.name: t.kind for t in found} == {"b": "parameter", "n": "counter"}


@pytest.mark.parametrize("data", [b"", b"junk", b"\x08" + bytes(7) + b'{"a":1}', b"\xff" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        read_safetensors(tmp_path / "x")
