"""Large uploads take turns, in order, and only while their lines are not the limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from orchestrator.admission import LARGE_BYTES, Admission, Processors
from protos.bulk import Chunk
from protos.errors import Unavailable

HUGE = Chunk(0, memoryview(bytes(1 << 20)))


class Upload(threading.Thread):
    """An upload that runs until it is told to end."""

    def __init__(self, admission: Admission, nbytes: int = LARGE_BYTES, fast: bool = False) -> None:
        super().__init__(daemon=True)
        self._admission, self._nbytes, self._fast = admission, nbytes, fast
        self.gone, self.begun, self.over = (threading.Event() for _ in range(3))
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        def sent() -> Iterator[Chunk]:
            while not self.over.is_set():
                if self._fast:
                    yield HUGE
                else:
                    self.over.wait()

        try:
            with self._admission.place(self._nbytes, lambda: not self.gone.is_set()) as counted:
                self.begun.set()
                for _ in counted(sent()):
                    pass
        except Unavailable as error:
            self.error = error


@pytest.fixture
def uploads() -> Iterator[list[Upload]]:
    out: list[Upload] = []
    yield out
    for upload in out:
        upload.gone.set()
        upload.over.set()
        upload.join()


def test_fast_uploads_wait_for_a_place_and_get_it_in_order(uploads: list[Upload]) -> None:
    admission = Admission(at_once=1, look_s=0.05, idle=lambda: 0.0)
    uploads.append(Upload(admission, fast=True))
    assert uploads[0].begun.wait(10)
    uploads.append(Upload(admission, fast=True))
    assert not uploads[1].begun.wait(0.5)  # ten looks, all of them at a busy machine
    uploads.append(Upload(admission, fast=True))
    assert not uploads[2].begun.wait(0.1)
    uploads[0].over.set()
    assert uploads[1].begun.wait(10)
    assert not uploads[2].begun.wait(0.2)
    uploads[1].over.set()
    assert uploads[2].begun.wait(10)


def test_uploads_over_slow_lines_all_run(uploads: list[Upload]) -> None:
    admission = Admission(at_once=1, look_s=0.02, idle=lambda: 0.0)
    uploads += [Upload(admission) for _ in range(20)]
    assert all(upload.begun.wait(10) for upload in uploads)


def test_fast_uploads_that_leave_processors_idle_all_run(uploads: list[Upload]) -> None:
    admission = Admission(at_once=1, look_s=0.02, idle=lambda: 0.5)
    uploads += [Upload(admission, fast=True) for _ in range(5)]
    assert all(upload.begun.wait(10) for upload in uploads)


def test_a_machine_is_never_less_than_idle_nor_more_than_busy() -> None:
    processors = Processors()
    assert 0 <= processors.idle() <= 1


def test_after_slow_ones_fast_ones_take_turns_again(uploads: list[Upload]) -> None:
    admission = Admission(at_once=1, look_s=0.05, idle=lambda: 0.0)
    uploads += [Upload(admission) for _ in range(4)]
    assert all(upload.begun.wait(10) for upload in uploads)
    for upload in uploads:
        upload.over.set()
        upload.join()
    uploads += [Upload(admission, fast=True) for _ in range(3)]
    assert not all(upload.begun.wait(0.2) for upload in uploads[4:])


def test_a_small_one_never_waits(uploads: list[Upload]) -> None:
    admission = Admission(at_once=1, look_s=3600)
    uploads.append(Upload(admission))
    assert uploads[0].begun.wait(10)
    uploads.append(Upload(admission, LARGE_BYTES - 1))
    assert uploads[1].begun.wait(10)


def test_one_that_goes_away_while_it_waits_gives_its_place_in_the_queue_to_the_next(
    uploads: list[Upload],
) -> None:
    admission = Admission(at_once=1, look_s=0.05, idle=lambda: 0.0)
    uploads += [Upload(admission, fast=True)]
    assert uploads[0].begun.wait(10)
    uploads += [Upload(admission, fast=True)]
    assert not uploads[1].begun.wait(0.1)
    uploads += [Upload(admission, fast=True)]
    uploads[1].gone.set()
    uploads[1].join(10)
    assert uploads[1].error is not None
    uploads[0].over.set()
    assert uploads[2].begun.wait(10)


def test_an_upload_that_fails_leaves_its_place(uploads: list[Upload]) -> None:
    admission = Admission(at_once=1, look_s=3600)
    with pytest.raises(ValueError, match="torn"), admission.place(LARGE_BYTES, lambda: True):
        raise ValueError("torn")
    uploads.append(Upload(admission))
    assert uploads[0].begun.wait(10)
