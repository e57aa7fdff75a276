"""The runner of the rows, with a harness that answers from a table."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks import evidence_seeds
from strategies.averaging.co_learning import ROW
from strategies.row import Measured, merged

# What the catalogue's prototype measured, so that the bars are known to be reachable.
PROTOTYPE = {
    "centralised": 92.8, "iid-clr": 92.1, "iid-clr-1": 91.9, "iid-ile": 91.8, "iid-elr": 91.0,
    "iid-constant": 92.3, "iid-hot-clr": 91.8, "iid-hot-constant": 65.4, "iid-alone": 85.8,
    "skew-clr": 91.2, "skew-elr": 90.4, "skew-constant": 91.6, "skew-alone": 68.5,
}  # fmt: skip


class Answers:
    """A federation that gives every arm the accuracy of a table."""

    table = PROTOTYPE
    asked: list[str] = []  # noqa: RUF012
    data: list[str] = []  # noqa: RUF012

    def __init__(self, **given: Any) -> None:
        assert set(given) == {"sites", "tasks", "settings", "policy"}
        assert given["sites"] == list(given["settings"])
        (source,) = given["tasks"].values()
        assert Path(source.rpartition(":")[0]).exists()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, config: dict[str, Any]) -> Any:
        arm = config["name"].removeprefix("row-5-").rpartition("-seed-")[0]
        self.asked.append(config["name"])
        self.data.append(config["task"]["params"].get("data", ""))
        return SimpleNamespace(
            rounds=[SimpleNamespace(plugins=())] * config["rounds"],
            scores={"test.accuracy": self.table[arm] / 100, "test.nll": 0.3},
            wire_bytes=1_000_000,
            seconds=2.0,
        )


def test_a_task_that_is_no_classifier_has_columns_of_its_own() -> None:
    costs = {"exchanges": 2.0, "wire_bytes": 3e6, "seconds": 4.0}
    found = {arm: {"test.map": 0.25, "test.loss": 1.0, **costs} for arm in ROW.arms}
    text = evidence_seeds.table(ROW, [found], [])
    assert "| arm | map % | exchanges | MB | seconds |" in text
    assert "| iid-clr | 25.00 | 2 | 3.00 | 4 |" in text


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("benchmarks.harness")
    module.Federation = Answers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.harness", module)
    monkeypatch.setattr(Answers, "asked", [])
    monkeypatch.setattr(Answers, "data", [])


def test_every_arm_of_every_seed_is_run_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evidence.md"
    assert evidence_seeds.main(["--rows", "5", "--seeds", "2", "--out", str(out)]) == 0
    assert len(Answers.asked) == len(set(Answers.asked)) == 2 * len(ROW.arms)
    assert capsys.readouterr().out.endswith("row 5 co_learning: holds\n")
    text = out.read_text()
    assert "| iid-clr | 92.10 | 0.300 | - | 8 | 1.00 | 2 |" in text
    assert "All bars hold." in text
    known = Measured.read(ROW, tmp_path / "measured")
    assert known is not None
    assert (known.seeds, known.short) == (2, [])
    assert known.arms["iid-clr"]["test.accuracy"] == [pytest.approx(0.921), 0.0]
    other = ROW._replace(run={**ROW.run, "rounds": 99})
    assert Measured.read(other, tmp_path / "measured") is None, "they are another row's figures"
    evidence_seeds.main(["--rows", "5", "--seeds", "1", "--out", str(out)])
    assert out.read_text().count("## Row 5") == 1


def test_a_row_that_falls_short_says_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "table", {**PROTOTYPE, "iid-elr": 92.5})
    assert (
        evidence_seeds.main(["--rows", "5", "--seeds", "1", "--out", str(tmp_path / "e.md")]) == 1
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "row 5 co_learning: fell short: CLR over ELR: -0.4 < 0.5"


def test_other_data_are_information_beside_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "evidence.md"
    evidence_seeds.main(["--rows", "5", "--seeds", "1", "--out", str(out)])
    own, known = out.read_text().strip(), Measured.read(ROW, tmp_path / "measured")
    assert set(Answers.data) == {""}
    monkeypatch.setattr(Answers, "data", [])
    monkeypatch.setattr(Answers, "table", {**PROTOTYPE, "iid-elr": 92.5})
    other = ["--rows", "5", "--seeds", "1", "--data", "fashion-mnist"]
    assert evidence_seeds.main([*other, "--out", str(out)]) == 0
    assert set(Answers.data) == {"fashion-mnist"}
    assert out.read_text().startswith(own)
    assert "### Row 5, co_learning, on fashion-mnist" in out.read_text()
    assert "By the bars of the row's own data: CLR over ELR: -0.4 < 0.5." in out.read_text()
    assert Measured.read(ROW, tmp_path / "measured") == known


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="there is no row 99"):
        evidence_seeds.main(["--rows", "99"])


def test_other_rows_are_left_as_they_are() -> None:
    document = evidence_seeds.written("# Evidence\n", "row 5", "five")
    document = evidence_seeds.written(document, "row 46", "forty-six")
    document = evidence_seeds.written(document, "row 5", "FIVE")
    assert [line for line in document.splitlines() if line] == [
        "# Evidence",
        "<!-- row 5 -->", "FIVE", "<!-- end of row 5 -->",
        "<!-- row 46 -->", "forty-six", "<!-- end of row 46 -->",
    ]  # fmt: skip


def test_configurations_are_laid_over_each_other() -> None:
    under = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert merged(under, {"a": {"c": [2]}, "e": 3}) == {"a": {"b": 1, "c": [2]}, "d": 2, "e": 3}
    assert under == {"a": {"b": 1, "c": [1]}, "d": 2}
