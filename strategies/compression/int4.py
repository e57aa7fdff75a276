"""int4: half a byte for each parameter, and a scale for each bucket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from protos.tensors import from_bytes
from strategies.compression.buckets import buckets, quantise, restore
from strategies.compression.codec import Codec

LEVELS = 7
OFFSET = 8
"""Added to a code, so that a nibble is unsigned: 1 to 15."""


class Int4(Codec):
    """Updates as 4-bit integers under one scale for each bucket of neighbours.

    With p the update plus the residual e, and m the largest magnitude of a bucket of p::

        scale = m / 7      code = round(p * 7 / m)      C(p) = code * scale
        e <- p - C(p)

    On the wire a parameter takes ``1/2 + 4 / bucket`` bytes: 7.76 times fewer than fp32 with buckets
    of 256. The first half of a tile is in the low nibbles, the second in the high ones. Ties round
    to even. At the site the residual takes 4 bytes a parameter, on disk and while encoding.

    Degenerate case: ``min_elements`` above the largest tensor sends every parameter as it is.

    Departures: as for `int8`.

    Attributes:
        error_feedback: Whether what is lost is added to the next update.
        min_elements: Parameters with fewer elements travel as they are, in fp32 or wider.
        bucket: Neighbours that share a scale, in [16, 65536].
    """

    name: ClassVar[str] = "int4"
    summary: ClassVar[str] = "Updates as 4-bit integers with error feedback: 8 times fewer bytes."
    paper: ClassVar[str] = (
        "Alistarh, Grubic, Li, Tomioka, Vojnovic: QSGD: Communication-Efficient SGD via Gradient "
        "Quantization and Encoding, NeurIPS 2017, arXiv:1610.02132"
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"min_elements": 1 << 44}

    bucket: int = Field(256, ge=16, le=65536)

    def nbytes(self, elements: int) -> int:
        """A scale for each bucket, then a byte for two elements."""
        return 4 * buckets(elements, self.bucket) + (elements + 1) // 2

    def pack(self, values: Tensor, spare: Tensor, block: Tensor) -> None:
        """Scales, then nibbles."""
        head, half = 4 * buckets(len(values), self.bucket), (len(values) + 1) // 2
        codes = spare[1].view(torch.int8)[: len(values)]
        quantise(values, spare[0], self.bucket, LEVELS, block[:head].view(torch.float32), codes)
        low, high = codes.add_(OFFSET).view(torch.uint8).tensor_split([half])
        block[head:].copy_(low)[: len(high)].add_(high, alpha=16)

    def unpack(self, block: memoryview, out: Tensor) -> None:
        """Codes times scales."""
        count, half = buckets(len(out), self.bucket), (len(out) + 1) // 2
        scales = from_bytes(block[: 4 * count], "float32", (count,))
        nibbles = from_bytes(block[4 * count :], "uint8", (half,))
        codes = torch.empty(len(out), dtype=torch.uint8)
        torch.bitwise_and(nibbles, 15, out=codes[:half])
        torch.bitwise_right_shift(nibbles[: len(out) - half], 4, out=codes[half:])
        restore(scales, codes.view(torch.int8).sub_(OFFSET), self.bucket, out)
