"""Large files go to the disk while they are written, not when they are synced.

The kernel would begin after some seconds, or when the sync at the end asks it to, and whoever syncs
waits for all of it then.
"""

from __future__ import annotations

import ctypes

STRETCH_BYTES = 8 << 20
"""What the disk is given at a time."""

_WRITE = 2  # SYNC_FILE_RANGE_WRITE, fs.h

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def write_behind(fd: int, start: int, stop: int) -> None:
    """Hand the stretches that a write has ended to the disk, without waiting for it.

    Nothing is durable by this, and it does not fail: whoever needs the bytes syncs the file.

    Args:
        fd: The file.
        start: First byte of what was written last, behind what was written before.
        stop: One past its last.
    """
    begun, ended = start // STRETCH_BYTES, stop // STRETCH_BYTES
    if begun < ended and _sync_file_range is not None:
        _sync_file_range(fd, begun * STRETCH_BYTES, (ended - begun) * STRETCH_BYTES, _WRITE)
