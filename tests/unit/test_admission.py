"""Large transfers take turns, in order, and only while their lines are not the limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from orchestrator.admission import LARGE_BYTES, Admission, Processors
from protos.errors import Unavailable


class Transfer(threading.Thread):
    """A transfer that runs until it is told to end."""

    def __init__(self, admission: Admission, nbytes: int = LARGE_BYTES, fast: bool = False) -> None:
        super().__init__(daemon=True)
        self._admission, self._nbytes, self._fast = admission, nbytes, fast
        self.gone, self.begun, self.over = (threading.Event() for _ in range(3))
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._admission.place(self._nbytes, lambda: not self.gone.is_set()) as carried:
                self.begun.set()
                while self._fast and not self.over.is_set():
                    carried(1 << 20)
                self.over.wait()
        except Unavailable as error:
            self.error = error


@pytest.fixture
def transfers() -> Iterator[list[Transfer]]:
    out: list[Transfer] = []
    yield out
    for transfer in out:
        transfer.gone.set()
        transfer.over.set()
        transfer.join()


def test_fast_transfers_wait_for_a_place_and_get_it_in_order(transfers: list[Transfer]) -> None:
    admission = Admission(at_once=1, look_s=0.05, idle=lambda: 0.0)
    transfers.append(Transfer(admission, fast=True))
    assert transfers[0].begun.wait(10)
    transfers.append(Transfer(admission, fast=True))
    assert not transfers[1].begun.wait(0.5)  # ten looks, all of them at a busy machine
    transfers.append(Transfer(admission, fast=True))
    assert not transfers[2].begun.wait(0.1)
    transfers[0].over.set()
    assert transfers[1].begun.wait(10)
    assert not transfers[2].begun.wait(0.2)
    transfers[1].over.set()
    assert transfers[2].begun.wait(10)


def test_transfers_over_slow_lines_all_run(transfers: list[Transfer]) -> None:
    admission = Admission(at_once=1, look_s=0.02, idle=lambda: 0.0)
    transfers += [Transfer(admission) for _ in range(20)]
    assert all(transfer.begun.wait(10) for transfer in transfers)


def test_fast_transfers_that_leave_processors_idle_all_run(transfers: list[Transfer]) -> None:
    admission = Admission(at_once=1, look_s=0.02, idle=lambda: 0.5)
    transfers += [Transfer(admission, fast=True) for _ in range(5)]
    assert all(transfer.begun.wait(10) for transfer in transfers)


def test_a_machine_is_never_less_than_idle_nor_more_than_busy() -> None:
    processors = Processors()
    assert 0 <= processors.idle() <= 1


def test_after_slow_ones_fast_ones_take_turns_again(transfers: list[Transfer]) -> None:
    admission = Admission(at_once=1, look_s=0.05, idle=lambda: 0.0)
    transfers += [Transfer(admission) for _ in range(4)]
    assert all(transfer.begun.wait(10) for transfer in transfers)
    for transfer in transfers:
        transfer.over.set()
        transfer.join()
    transfers += [Transfer(admission, fast=True) for _ in range(3)]
    assert not all(transfer.begun.wait(0.2) for transfer in transfers[4:])


def test_a_small_one_never_waits(transfers: list[Transfer]) -> None:
    admission = Admission(at_once=1, look_s=3600)
    transfers.append(Transfer(admission))
    assert transfers[0].begun.wait(10)
    transfers.append(Transfer(admission, LARGE_BYTES - 1))
    assert transfers[1].begun.wait(10)


def test_one_that_goes_away_while_it_waits_gives_its_place_in_the_queue_to_the_next(
    transfers: list[Transfer],
) -> None:
    admission = Admission(at_once=1, look_s=0.05, idle=lambda: 0.0)
    transfers += [Transfer(admission, fast=True)]
    assert transfers[0].begun.wait(10)
    transfers += [Transfer(admission, fast=True)]
    assert not transfers[1].begun.wait(0.1)
    transfers += [Transfer(admission, fast=True)]
    transfers[1].gone.set()
    transfers[1].join(10)
    assert transfers[1].error is not None
    transfers[0].over.set()
    assert transfers[2].begun.wait(10)


def test_a_transfer_that_fails_leaves_its_place(transfers: list[Transfer]) -> None:
    admission = Admission(at_once=1, look_s=3600)
    with pytest.raises(ValueError, match="torn"), admission.place(LARGE_BYTES, lambda: True):
        raise ValueError("torn")
    transfers.append(Transfer(admission))
    assert transfers[0].begun.wait(10)
