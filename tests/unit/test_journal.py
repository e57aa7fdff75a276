"""The agent's log: a line is there when it was written, wherever the file has gone meanwhile."""

import json
from pathlib import Path

import pytest

from site_agent.link import journal as journal_module
from site_agent.link.journal import LineFile


def lines(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_lines_are_appended_also_to_what_another_process_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text('{"n": 0}\n')
    first, second = LineFile(path), LineFile(path)
    first.write({"n": 1})
    second.write({"n": 2})
    first.write({"n": 3})
    assert lines(path) == [0, 1, 2, 3]


def test_a_file_that_was_moved_or_removed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    file = LineFile(path)
    file.write({"n": 1})
    path.rename(tmp_path / "kept")
    file.write({"n": 2})
    path.unlink()
    file.write({"n": 3})
    assert lines(tmp_path / "kept") == [1]
    assert lines(path) == [3]


def test_a_full_file_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "ROTATE_BYTES", 20)
    path = tmp_path / "a.log"
    file = LineFile(path)
    for n in range(1, 5):  # lines of nine bytes
        file.write({"n": n})
    assert lines(tmp_path / "a.log.1") == [1, 2, 3]
    assert lines(path) == [4]


def test_what_can_t_be_written_does_not_end_the_agent(tmp_path: Path) -> None:
    LineFile(tmp_path / "gone" / "a.log").write({"n": 1})
