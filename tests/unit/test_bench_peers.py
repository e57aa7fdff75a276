"""The comparison with other systems: what is read from their notes, and the table with its bars."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers.case import TENSORS, Case, Figures
from benchmarks.peers.ruler import beginnings
from benchmarks.peers.table import BEGIN, END, OURS, Result, Results, part, replaced, shortfalls
from protos.errors import ComputeFailed, DataCorrupt, InvalidInput

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "benchmarks/peers"
STEP = 0.25


def note(number: int, at: float, value: float) -> str:
    return json.dumps({"round": number, "at": at, "value": value}) + "\n"


def test_a_round_begins_when_its_first_site_says_so() -> None:
    text = note(0, 10.0, 1.0) + note(0, 11.0, 1.0) + note(1, 21.5, 1.25) + note(1, 20.0, 1.25)
    assert beginnings(text + note(2, 31.0, 1.5), rounds=2, step=STEP) == [10.0, 20.0, 31.0]


def test_rounds_that_were_not_asked_for_do_not_count() -> None:
    text = "".join(note(n, float(n), STEP * n) for n in range(1, 6))
    assert beginnings(text, rounds=2, step=STEP) == [1.0, 2.0, 3.0]


def test_a_line_that_is_being_written_is_not_read_yet() -> None:
    text = note(1, 1.0, 0.0) + note(2, 2.0, STEP) + note(3, 3.0, 2 * STEP)[:-5]
    with pytest.raises(ComputeFailed, match="2 beginnings of rounds instead of 3"):
        beginnings(text, rounds=2, step=STEP)


def test_a_round_that_left_a_site_out_is_no_measurement() -> None:
    text = note(1, 1.0, 0.0) + note(2, 2.0, STEP) + note(3, 3.0, STEP + 0.2)
    with pytest.raises(DataCorrupt, match=r"in round 2 .* rose by 0\.2.* is 0\.25"):
        beginnings(text, rounds=2, step=STEP)


def test_a_case_is_equal_tensors_and_a_constant_for_each_site(tmp_path: Path) -> None:
    case = Case(4, 10_000_000, 3, tmp_path, tmp_path)
    assert (case.elements, case.elements * 4 * TENSORS) == (125_000, 10_000_000)
    assert case.names == ["site-1", "site-2", "site-3", "site-4"]
    assert case.step == 2.5 * 2**-10


def figures(cpu_s: float, server: float, ray: float = 0.0) -> Figures:
    return Figures(
        [2.0, 8.0, 3.0], [cpu_s, 9 * cpu_s, cpu_s], 0.25, int(server * 1e6), int(ray * 1e6), 10**8
    )


def results(*extra: Result, flare_cpu_s: float = 6.0, server: float = 4000.0) -> Results:
    told = [
        Result(OURS, "0.1.0", 400_000_000, figures(2.0, 400, ray=600)),
        Result("Flower", "1.41.0", 400_000_000, figures(20.0, server)),
        Result("NVIDIA FLARE", "2.9.0", 400_000_000, figures(flare_cpu_s, 5000)),
    ]
    return Results("2026-11-22", {"cores": "2"}, 4, 4, [*told, *extra])


def test_the_table_has_medians_and_says_how_many_times_more() -> None:
    text = part(results())
    lines = [re.sub(r" +", " ", line) for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == (
        "| model | | Farflung | Flower | NVIDIA FLARE | Flower ÷ Farflung | NVIDIA FLARE ÷ Farflung |"
    )
    assert (
        lines[2]
        == "| 400 MB | CPU seconds a round, all processes | 2.0 | 20.0 | 6.0 | 10.0 | 3.0 |"
    )
    assert lines[4].endswith("daemon), peak MB | 400 | 4,000 | 5,000 | 10.0 | 12.5 |")
    assert lines[5].endswith("Ray), at most MB | 1,000 | 4,000 | 5,000 | 4.0 | 5.0 |")
    assert lines[7] == "| | cores busy with other work | 0.25 | 0.25 | 0.25 | | |"
    assert "Flower 1.41.0" in text
    assert "cores 2." in " ".join(text.split())
    assert "All hold." in text


@pytest.mark.parametrize(
    ("told", "missed"),
    [
        (results(), []),
        (results(flare_cpu_s=5.8), ["CPU against NVIDIA FLARE at 400 MB: 2.9 times less, the bar is 3"]),
        (
            results(server=3960.0),
            ["daemon memory against Flower at 400 MB: 9.9 times less, the bar is 10"],
        ),
        (
            results(Result(OURS, "0.1.0", 10_000_000, figures(1.0, 100))),
            [
                "CPU against Flower at 10 MB: not measured",
                "CPU against NVIDIA FLARE at 10 MB: not measured",
            ],
        ),
    ],
)  # fmt: skip
def test_bars(told: Results, missed: list[str]) -> None:
    assert shortfalls(told) == missed
    shown = " ".join(part(told).split())
    assert ("All hold." in shown) == (not missed)
    for line in missed:
        assert line in shown


def test_a_system_that_failed_is_shown_as_such() -> None:
    lost = Result("Flower", "", 800_000_000, error="given up: under 1.5 GB of memory left")
    text = part(results(lost))
    assert "Flower at 800 MB: given up: under 1.5 GB of memory left" in text
    assert "| 800 MB | CPU seconds a round, all processes | – | – | – |" in re.sub(r" +", " ", text)


def test_results_survive_their_file() -> None:
    lost = Result("Flower", "", 800_000_000, error="no memory")
    told = results(lost)
    again = Results.from_json(json.loads(json.dumps(told.to_json())))
    assert again == told
    assert part(again) == part(told)


@pytest.mark.parametrize(
    "tables", [{}, {"results": [{"figures": {"wall_s": []}}]}, {"results": [], "x": 1}]
)
def test_other_files_are_no_results(tables: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="not results of this benchmark"):
        Results.from_json(tables)


@pytest.mark.parametrize(("flare_cpu_s", "code"), [(6.0, 0), (5.8, 1)])
def test_the_readme_can_be_written_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flare_cpu_s: float, code: int
) -> None:
    told = results(flare_cpu_s=flare_cpu_s)
    file, readme = tmp_path / "peers.json", tmp_path / "README.md"
    file.write_text(json.dumps(told.to_json()))
    readme.write_text(f"# Top\n{BEGIN}\n{END}\n")
    monkeypatch.setattr(command, "README", readme)
    assert command.main(["--from", str(file)]) == code
    assert readme.read_text() == f"# Top\n{BEGIN}\n{END}\n"
    assert command.main(["--from", str(file), "--readme"]) == code
    assert readme.read_text() == f"# Top\n{BEGIN}\n{part(told)}\n{END}\n"


def test_what_is_there_is_in_the_file_though_a_system_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def works(case: Case) -> tuple[str, Figures]:
        assert (case.sites, case.rounds) == (3, 2)
        assert list(case.folder.iterdir()) == []
        return "1.0", figures(2.0, 400)

    def fails(case: Case) -> tuple[str, Figures]:
        raise ComputeFailed("it did not start\nits log")

    systems = {OURS: (works, tmp_path), "Flower": (fails, tmp_path)}
    monkeypatch.setattr(command, "SYSTEMS", systems)
    file = tmp_path / "peers.json"
    told = command.measure_all(3, [400_000_000], 2, file)
    assert told == Results.from_json(json.loads(file.read_text()))
    assert [(r.version, r.error) for r in told.results] == [("1.0", ""), ("", "it did not start")]
    assert "its log" in capsys.readouterr().err


def test_only_what_is_between_the_marks_is_replaced() -> None:
    document = f"# Top\n\n{BEGIN}\nold\ntable\n{END}\n\nbelow\n"
    once = replaced(document, "new")
    assert once == f"# Top\n\n{BEGIN}\nnew\n{END}\n\nbelow\n"
    assert replaced(once, "new") == once


@pytest.mark.parametrize(
    "document", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"]
)
def test_a_document_without_both_marks_is_left_alone(document: str) -> None:
    with pytest.raises(InvalidInput, match="once each, in order"):
        replaced(document, "new")


def test_the_readme_has_a_place_for_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert part(results()) in replaced(readme, part(results()))


@pytest.mark.parametrize("peer", ["flower", "flare"])
def test_environments_are_exact_and_share_the_arithmetic(peer: str) -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
        return dict(line.split("==") for line in lines)

    ours, theirs = pins(ROOT / "constraints.txt"), pins(PEERS / f"{peer}.txt")
    assert {name: theirs[name] for name in ("torch", "numpy", "grpcio")} == {
        name: ours[name] for name in ("torch", "numpy", "grpcio")
    }
