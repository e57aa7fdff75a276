"""Room on the disk, reserved before the work that needs it begins."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from protos.errors import OutOfSpace
from protos.faults import reach


class Reservation:
    """Room that was set aside.

    Attributes:
        nbytes: How much is still set aside.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def spend(self, nbytes: int) -> None:
        """Say that so much was written: the disk counts it now, the reservation no longer."""
        self.nbytes = max(0, self.nbytes - nbytes)


class Space:
    """What this process has set aside on one file system.

    Args:
        folder: A folder on it.
        make_room: Called when room is short; gives the bytes that it freed.
    """

    def __init__(self, folder: Path, make_room: Callable[[], int]) -> None:
        self._folder, self._make_room = folder, make_room
        self._lock = threading.Lock()
        self._open: set[Reservation] = set()

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[Reservation]:
        """Set room aside while the block runs.

        Raises:
            OutOfSpace: There is less, with what others set aside taken off.
        """
        with self._lock:
            free = shutil.disk_usage(self._folder).free
            reserved = sum(one.nbytes for one in self._open)
            if nbytes > free - reserved:
                free += self._make_room()
            if nbytes > free - reserved:
                raise OutOfSpace(
                    f"{self._folder}: {nbytes} bytes are needed, {free} are free and {reserved} of"
                    " them are set aside for other work. Make room (`farflung gc`), or move the"
                    " store to a larger disk.",
                    needed=nbytes,
                    free=free,
                    reserved=reserved,
                    folder=str(self._folder),
                )
            reservation = Reservation(nbytes)
            self._open.add(reservation)
            reach("room.reserved")
        try:
            yield reservation
        finally:
            with self._lock:
                self._open.discard(reservation)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Turns a full disk into an error of ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise OutOfSpace(
            f"{folder}: the disk is full ({free} bytes are free). Make room (`farflung gc`), or move"
            " the store to a larger disk.",
            free=free,
            folder=str(folder),
        ) from error
