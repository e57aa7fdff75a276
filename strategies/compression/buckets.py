"""Integers under one scale per bucket: what int8 and int4 have in common."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from strategies.compression.codec import rows

SMALLEST = np.finfo(np.float32).tiny
"""Smallest normal number. A scale below it has lost bits, and its inverse may be infinite."""


def buckets(elements: int, size: int) -> int:
    """Number of buckets of a tile; the last may be shorter."""
    return -(-elements // size)


def quantise(
    values: Tensor, spare: Tensor, size: int, levels: int, scales: Tensor, codes: Tensor
) -> None:
    """Scales and codes of a tile; in ``values`` stays what they lose.

    With m the largest magnitude of a bucket::

        scale = m / levels      code = round(value * levels / m)      in [-levels, levels]

    in fp32, ties to even. A bucket with NaN or infinity gets a scale that is not finite; one whose
    scale would be below the smallest normal number is sent as zeros.

    Args:
        values: (elements,) fp32.
        spare: Of the same size; overwritten.
        size: Of a bucket.
        levels: Of each sign, at most 127.
        scales: Where the scales go, (buckets,) fp32.
        codes: Where the codes go, (elements,) int8.
    """
    first = 0
    for part, work, code in zip(
        *(rows(flat, size) for flat in (values, spare, codes)), strict=True
    ):
        largest = torch.amax(torch.abs(part, out=work), dim=1).numpy()
        scale = scales[first : first + len(part)]
        first += len(part)
        scale.numpy()[:] = steps = largest / np.float32(levels)
        held = steps >= SMALLEST  # not so for NaN: its scale says enough
        scale.numpy()[steps < SMALLEST] = 0
        inverse = np.divide(np.float32(levels), largest, out=np.zeros_like(largest), where=held)
        torch.mul(part, torch.from_numpy(inverse).unsqueeze(1), out=work)
        code.copy_(work.round_())
        # Rounded as the other end rounds it, so that nothing is lost unnoticed.
        part.sub_(work.mul_(scale.unsqueeze(1)))


def restore(scales: Tensor, codes: Tensor, size: int, out: Tensor) -> None:
    """Values of a tile: code * scale, into ``out``, (elements,) fp32."""
    first = 0
    for code, part in zip(rows(codes, size), rows(out, size), strict=True):
        torch.mul(code, scales[first : first + len(part)].unsqueeze(1), out=part)
        first += len(part)
