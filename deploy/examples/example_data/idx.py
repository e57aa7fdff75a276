"""The IDX file format of the MNIST family, read with bounds.

An IDX file is a header (two zero bytes, a type code, the number of dimensions, then each dimension
as a big-endian 32-bit integer) followed by the values. Everything that the header claims is checked
before memory is set aside for it, so a damaged or hostile file costs little.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 0x08
MAX_VALUES = 1 << 28  # 256 MiB: five times the largest file of the family


class IdxError(ValueError):
    """A file is not the IDX file that it should be."""


def read_idx(
    path: Path,
    shape: tuple[int | None, ...],
    *,
    sha256: str | None = None,
    max_values: int = MAX_VALUES,
) -> NDArray[np.uint8]:
    """Reads a gzip-compressed IDX file of unsigned bytes.

    Args:
        path: The ``.gz`` file.
        shape: The dimensions that the file must have; None leaves one of them open.
        sha256: Digest that the *uncompressed* file must have, in hexadecimal. Over the uncompressed
            bytes, because distributions compress the same file anew. None accepts any content.
        max_values: Most values (bytes) to accept, whatever the header says.

    Returns:
        The values, uint8, with the dimensions that the header gives, writable.

    Raises:
        IdxError: Not gzip, not IDX, another shape, too large, cut short, longer than its header
            says, or another digest.
        OSError: The file can't be opened or read.
    """
    digest = hashlib.sha256()
    try:
        with gzip.open(path, "rb") as stream:
            dims, header = _read_header(stream, path, len(shape))
            digest.update(header)
            _check_dims(path, dims, shape, max_values)
            values = bytearray(math.prod(dims))
            _fill(stream, values, path)
            if stream.read(1):
                raise IdxError(f"{path}: more bytes than its header announces; fetch it again")
    except (gzip.BadGzipFile, zlib.error) as error:
        raise IdxError(f"{path}: not an intact gzip file ({error}); fetch it again") from error
    except EOFError as error:
        raise IdxError(f"{path}: the compressed file is cut short; fetch it again") from error
    digest.update(values)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise IdxError(
            f"{path}: well formed, but not the published file (sha256 of the uncompressed content "
            f"is {digest.hexdigest()}, expected {sha256}). Fetch it again; to use data of your own "
            f"in the same format, set `verify = false` in the task's settings."
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(dims)


def _read_header(stream: gzip.GzipFile, path: Path, n_dims: int) -> tuple[tuple[int, ...], bytes]:
    magic, expected = _exactly(stream, 4, path), bytes([0, 0, UNSIGNED_BYTE, n_dims])
    if magic != expected:
        raise IdxError(
            f"{path}: begins with {magic.hex()}, where an IDX file of unsigned bytes in {n_dims} "
            f"dimension(s) begins with {expected.hex()}; are images and labels exchanged?"
        )
    sizes = _exactly(stream, 4 * n_dims, path)
    dims = tuple(int.from_bytes(sizes[4 * i : 4 * i + 4], "big") for i in range(n_dims))
    return dims, magic + sizes


def _check_dims(
    path: Path, dims: tuple[int, ...], shape: tuple[int | None, ...], most: int
) -> None:
    if any(want is not None and want != dim for want, dim in zip(shape, dims, strict=True)):
        wanted = tuple("any" if want is None else want for want in shape)
        raise IdxError(f"{path}: its header says {dims}, expected {wanted}")
    if math.prod(dims) == 0:
        raise IdxError(f"{path}: its header says {dims}: it holds nothing")
    if math.prod(dims) > most:
        raise IdxError(f"{path}: its header says {dims}, over the bound of {most} values")


def _exactly(stream: gzip.GzipFile, n_bytes: int, path: Path) -> bytes:
    got = bytearray(n_bytes)
    _fill(stream, got, path)
    return bytes(got)


def _fill(stream: gzip.GzipFile, target: bytearray, path: Path) -> None:
    view, filled = memoryview(target), 0
    while filled < len(target):
        block = stream.read(min(len(target) - filled, 1 << 20))
        if not block:
            raise IdxError(
                f"{path}: ends after {filled} of {len(target)} bytes; the file is cut short"
            )
        view[filled : filled + len(block)] = block
        filled += len(block)
