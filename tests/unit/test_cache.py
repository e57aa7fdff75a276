"""The cache of a bucket, as a daemon and its gateways use it at once."""

import os
from pathlib import Path

import pytest

from orchestrator.store.cache import Cache

DATA = b"base" * 1000


def test_two_processes_that_fetch_the_same_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Cache(tmp_path, 1 << 20), Cache(tmp_path, 1 << 20)

    def fetch(path: Path) -> None:
        with path.open("wb") as file:
            file.write(DATA[:100])
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                assert theirs.file("a.data", lambda p: bool(p.write_bytes(DATA))).exists()
            file.write(DATA[100:])

    assert ours.file("a.data", fetch).read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["a.data"]
    assert theirs.file("a.data", lambda _: pytest.fail("it is here")).read_bytes() == DATA


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)
    part = tmp_path / "a.data.4711.part"
    part.write_bytes(DATA)
    assert cache.clear() == 0
    assert part.exists()
    assert cache.clear(unfinished=True) == len(DATA)
    assert not part.exists()


def test_a_file_that_another_process_removed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = Cache(tmp_path, 1 << 20), Path.stat
    gone = tmp_path / "gone.data"
    gone.write_bytes(DATA)

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path == gone:
            gone.unlink(missing_ok=True)
        return real(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat)
    assert cache.clear() == 0
