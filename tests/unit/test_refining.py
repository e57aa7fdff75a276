"""What a strategy keeps beside the model: which files it may read, and which it may write."""

from pathlib import Path

import pytest

from orchestrator.arithmetic.refining import MAX_FILE_BYTES, Files
from protos.errors import ComputeFailed


def test_a_strategy_reads_all_files_and_changes_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"theirs")
    (tmp_path / "b").write_bytes(b"before")
    files = Files({"fyi/a": str(tmp_path / "a"), "student/b": str(tmp_path / "b")}, "student")
    assert files["fyi/a"] == b"theirs"
    assert files.get("student/none") is None
    files["student/b"] = files["student/b"] + b" and after"
    files["student/c"] = b"new"
    assert list(files) == ["fyi/a", "student/b", "student/c"]
    assert files.new == {"student/b": b"before and after", "student/c": b"new"}
    del files["student/b"]
    assert list(files) == ["fyi/a", "student/c"]


@pytest.mark.parametrize("name", ["fyi/a", "student/../x", "student/", "student/a/b", "x"])
def test_other_names_are_refused(name: str) -> None:
    files = Files({}, "student")
    with pytest.raises(ComputeFailed, match="a strategy keeps files as"):
        files[name] = b""


def test_a_file_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_FILE_BYTES == 256 << 20
    monkeypatch.setattr("orchestrator.arithmetic.refining.MAX_FILE_BYTES", 3)
    with pytest.raises(ComputeFailed, match="4 bytes exceed the 3"):
        Files({}, "student")["student/a"] = b"1234"
