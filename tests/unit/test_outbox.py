"""A contribution is in the outbox whole, or not at all, wherever the power fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protos import spares as spares_module
from protos.chunks import IndexWriter
from protos.contribution import Header
from protos.digest import digest
from protos.errors import DataCorrupt
from protos.identity import new_key
from protos.manifest import Index
from protos.spares import Spares
from site_agent.home import Home, HomeLock
from site_agent.link import outbox as outbox_module
from site_agent.link.outbox import Outbox

KEY = new_key()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


def make(
    home: Home, number: int = 1, run: str = "r", kind: str = "train"
) -> tuple[Path, Header, Index]:
    """What the trainer leaves."""
    folder = home.work / f"job-{number}"
    folder.mkdir()
    writer = IndexWriter(folder / "payload")
    writer.write(b"x" * (100 + number))
    index = writer.finish("0" * 64)
    header = Header(
        plan_id=f"{run}/{number}/1/train", work_digest=digest(f"{run}{number}".encode()),
        site="north", kind=kind, manifest="0" * 64, index=index.digest, examples=1,
    )  # fmt: skip
    if kind == "train":
        (folder / "state.safetensors").write_bytes(b"state")
    return folder, header, index


def test_admitted_is_found_again_after_a_restart(home: Home) -> None:
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)
    assert entry.digest == digest(header.encode()) == entry.folder.name
    (again,) = Outbox(home).waiting()
    assert (again.encoded, again.signature) == (entry.encoded, entry.signature)
    assert Outbox(home).of_work(header.work_digest) is not None
    assert Outbox(home).of_work("1" * 64) is None


class PowerCut(Exception):
    pass


STEPS = ("sync_tree", "rename")


@pytest.mark.parametrize("after", range(len(STEPS)))
def test_a_power_cut_before_the_rename_leaves_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    box = Outbox(home)
    made, header, index = make(home)
    done = 0

    def counted(real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal done
            if done == after:
                raise PowerCut
            done += 1
            return real(*args, **kwargs)  # type: ignore[operator]

        return call

    for name in ("sync_tree", "sync_folder"):
        monkeypatch.setattr(outbox_module, name, counted(getattr(outbox_module, name)))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    with pytest.raises(PowerCut):
        box.admit(made, header, index, KEY)
    monkeypatch.undo()

    again = Outbox(home)
    assert again.waiting() == []
    assert again.damaged == []
    assert list(home.contributions.iterdir()) == []
    assert list(home.work.iterdir()) == []


def test_an_answer_takes_the_payload_and_leaves_the_state(home: Home) -> None:
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)
    box.answer(entry, "counted")
    assert not entry.payload.exists()
    assert box.waiting() == []
    for outbox in (box, Outbox(home)):
        assert outbox.state(entry.digest, "r") == entry.folder
        assert (entry.folder / "state.safetensors").read_bytes() == b"state"
        assert outbox.waiting() == []
        assert outbox.damaged == []


def test_a_power_cut_may_take_an_answer_back(home: Home) -> None:
    """It is not synced: the contribution is offered again, or known to have been answered."""
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)
    payload = entry.payload.read_bytes()
    box.answer(entry, "late")
    (entry.folder / "late").rename(entry.folder / "waiting")
    again = Outbox(home)
    assert again.damaged == []
    assert again.waiting() == []
    assert again.state(entry.digest, "r") == entry.folder
    entry.payload.write_bytes(payload)
    (waiting,) = Outbox(home).waiting()
    assert waiting.digest == entry.digest
    assert not waiting.fresh


def test_an_answer_is_synced_before_its_payload_is_written_over(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "LEAST_BYTES", 1)
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)
    steps: list[str] = []
    real = outbox_module.sync_folder
    monkeypatch.setattr(
        outbox_module, "sync_folder", lambda path: (steps.append(path.name), real(path))
    )
    monkeypatch.setattr(Spares, "give", lambda *_: steps.append("spare"))
    box.answer(entry, "counted")
    assert steps == [entry.digest, "spare"]


def test_a_cut_between_the_answer_and_the_payload_is_an_answer(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)

    def cut(*_: object, **__: object) -> None:
        raise PowerCut

    monkeypatch.setattr(Spares, "give", cut)
    with pytest.raises(PowerCut):
        box.answer(entry, "counted")
    monkeypatch.undo()
    again = Outbox(home)
    assert again.waiting() == []
    assert again.state(entry.digest, "r") is not None


def test_what_is_admitted_was_synced_whole(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    box = Outbox(home)
    made, header, index = make(home)
    monkeypatch.setattr(os, "fsync", fsync)
    entry = box.admit(made, header, index, KEY)
    files = {path.name for path in entry.folder.rglob("*")}
    assert files == {"payload", "waiting", "state.safetensors"}
    assert sorted(synced) == sorted([*files, made.name, "contributions"])  # each of them once


def test_an_answered_payload_is_written_over_by_the_next(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares_module, "LEAST_BYTES", 1)
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)
    node = entry.payload.stat().st_ino
    box.answer(entry, "counted")
    assert home.spares().take(home.root / "next", 1)
    assert (home.root / "next").stat().st_ino == node


def test_a_run_that_is_forgotten_leaves_no_spare(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares_module, "LEAST_BYTES", 1)
    box = Outbox(home)
    made, header, index = make(home)
    box.answer(box.admit(made, header, index, KEY), "counted")
    box.forget_run("r")
    assert not home.spares().take(home.root / "next", 1)


def test_what_has_no_state_goes_with_its_answer(home: Home) -> None:
    box = Outbox(home)
    made, header, index = make(home, kind="assess")
    box.answer(box.admit(made, header, index, KEY), "counted")
    assert list(home.contributions.iterdir()) == []
    assert list(home.work.iterdir()) == []


def test_late_ones_do_not_push_out_the_last_counted(home: Home) -> None:
    box = Outbox(home, keep=2)
    digests = []
    for number in range(1, 8):
        made, header, index = make(home, number)
        entry = box.admit(made, header, index, KEY)
        digests.append(entry.digest)
        box.answer(entry, "counted" if number <= 3 else "late")
    kept = {f.name for f in home.contributions.iterdir()}
    assert kept == {*digests[1:3], *digests[-2:]}


def test_the_state_that_plans_name_is_kept(home: Home) -> None:
    box = Outbox(home, keep=1)
    made, header, index = make(home, 1)
    first = box.admit(made, header, index, KEY)
    box.answer(first, "counted")
    assert box.state(first.digest, "r") is not None
    for number in (2, 3):
        made, header, index = make(home, number)
        box.answer(box.admit(made, header, index, KEY), "counted")
    assert box.state(first.digest, "r") is not None


def test_runs_do_not_push_each_other_out_and_can_be_forgotten(home: Home) -> None:
    box = Outbox(home, keep=1)
    for number, run in enumerate(["a", "b"]):
        made, header, index = make(home, number, run)
        box.answer(box.admit(made, header, index, KEY), "counted")
    assert len(list(home.contributions.iterdir())) == 2
    assert box.forget_run("a") == 1
    assert len(list(home.contributions.iterdir())) == 1


def test_a_damaged_one_is_left_aside(home: Home) -> None:
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)
    entry.payload.write_bytes(b"cut")
    box = Outbox(home)
    assert box.waiting() == []
    assert box.damaged == [entry.digest]


def test_a_payload_that_is_not_the_headers_is_refused(home: Home) -> None:
    box = Outbox(home)
    made, header, index = make(home)
    (made / "payload").write_bytes(b"other")
    with pytest.raises(DataCorrupt):
        box.admit(made, header, index, KEY)


def test_an_answer_is_found_by_contribution_or_by_plan(home: Home) -> None:
    box = Outbox(home)
    made, header, index = make(home)
    entry = box.admit(made, header, index, KEY)
    assert box.find(entry.digest, "") is entry
    assert box.find("", header.plan_id) is entry
    assert box.find("1" * 64, header.plan_id) is None
    box.answer(entry, "late")
    assert box.find(entry.digest, "") is None
    assert (entry.folder / "late").exists()


def test_one_agent_a_home(home: Home) -> None:
    from protos.errors import HomeLocked

    with HomeLock(home), pytest.raises(HomeLocked, match="another agent"):
        HomeLock(home)
    HomeLock(home).release()
