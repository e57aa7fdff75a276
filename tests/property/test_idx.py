"""A damaged IDX file is refused by name, or reads as what was written; nothing else happens."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "examples"))

from example_data.idx import IdxError, read_idx

VALUES = np.random.RandomState(0).randint(0, 256, (5, 4, 3)).astype(np.uint8)
CONTENT = bytes([0, 0, 8, 3]) + np.array(VALUES.shape, ">u4").tobytes() + VALUES.tobytes()
PACKED = gzip.compress(CONTENT, mtime=0)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SHAPE = (None, None, None)


def read(path: Path, packed: bytes) -> np.ndarray | IdxError:
    path.write_bytes(packed)
    try:
        return read_idx(path, SHAPE, sha256=DIGEST)
    except IdxError as error:
        return error


def refused(path: Path, packed: bytes) -> bool:
    answer = read(path, packed)
    return isinstance(answer, IdxError) and str(path) in str(answer)


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_is_noticed(tmp_path_factory, at, change):
    packed = bytearray(PACKED)
    packed[at] ^= change
    path = tmp_path_factory.getbasetemp() / "changed.gz"
    if not refused(path, bytes(packed)):
        assert np.array_equal(read(path, bytes(packed)), VALUES)
        assert at < 10  # the gzip header has bytes of no consequence, like the time


@given(st.integers(0, len(PACKED) - 1))
@settings(max_examples=len(PACKED), deadline=None)
def test_a_file_cut_short_is_refused(tmp_path_factory, length):
    assert refused(tmp_path_factory.getbasetemp() / "short.gz", PACKED[:length])


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_other_content_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "other.gz"
    assert refused(path, gzip.compress(content))
    assert refused(path, content)
