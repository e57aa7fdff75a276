"""Sending one model to many sites: what one of them was just sent, the others are sent again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

from protos.bulk import chunk_message
from protos.chunks import read_chunk_of
from protos.errors import ManifestInvalid
from protos.manifest import Index

FRAMES = 32
"""Messages of 1 MiB that are kept: sites that were told of a round at once read close together."""


class Fanout:
    """Framed chunks of the models that are on their way, the newest of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def frames(
        self, path: Path, index: Index, ranges: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, bytes]]:
        """Chunks of a file in messages, with the bytes of payload in each.

        Args:
            path: The file.
            index: Of its bytes.
            ranges: Half-open ranges of chunk numbers; none: all.

        Raises:
            ManifestInvalid: A range is out of bounds.
        """
        with path.open("rb", buffering=0) as file:  # once: the path may go before the stream ends
            for first, end in list(ranges) or [(0, len(index.chunks))]:
                if not 0 <= first <= end <= len(index.chunks):
                    raise ManifestInvalid(f"chunks {first} to {end} of {len(index.chunks)}")
                for number in range(first, end):
                    start, stop = index.span(number)
                    yield stop - start, self._frame(file.fileno(), index, number)

    def _frame(self, fd: int, index: Index, number: int) -> bytes:
        key = (index.digest, number)
        with self._lock:
            frame = self._frames.get(key)
        if frame is None:
            frame = chunk_message(number, read_chunk_of(fd, index, number))
            with self._lock:
                self._frames[key] = frame
                while len(self._frames) > FRAMES:
                    self._frames.popitem(last=False)
        return frame
