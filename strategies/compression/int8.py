"""int8: a byte for each parameter, and a scale for each bucket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from protos.tensors import from_bytes
from strategies.compression.buckets import buckets, quantise, restore
from strategies.compression.codec import Codec

LEVELS = 127


class Int8(Codec):
    """Updates as 8-bit integers under one scale for each bucket of neighbours.

    With p the update plus the residual e, and m the largest magnitude of a bucket of p::

        scale = m / 127      code = round(p * 127 / m)      C(p) = code * scale
        e <- p - C(p)

    On the wire a parameter takes ``1 + 4 / bucket`` bytes: 3.94 times fewer than fp32 with buckets
    of 256. Ties round to even. A bucket whose m is below 127 * 2^-126 is sent as zeros and stays in
    the residual. At the site the residual takes 4 bytes a parameter, on disk and while encoding.

    Degenerate case: ``min_elements`` above the largest tensor sends every parameter as it is.

    Departures: the paper takes a bucket's norm as its scale and rounds at random, which needs no
    memory; here the scale is the largest magnitude and rounding is to the nearest, with what is
    lost fed back (Karimireddy et al., 2019, arXiv:1901.09847).

    Attributes:
        error_feedback: Whether what is lost is added to the next update.
        min_elements: Parameters with fewer elements travel as they are, in fp32 or wider.
        bucket: Neighbours that share a scale, in [16, 65536].
    """

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "Updates as 8-bit integers with error feedback: 4 times fewer bytes."
    paper: ClassVar[str] = (
        "Alistarh, Grubic, Li, Tomioka, Vojnovic: QSGD: Communication-Efficient SGD via Gradient "
        "Quantization and Encoding, NeurIPS 2017, arXiv:1610.02132"
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"min_elements": 1 << 44}

    bucket: int = Field(256, ge=16, le=65536)

    def nbytes(self, elements: int) -> int:
        """A scale for each bucket, then a byte for each element."""
        return 4 * buckets(elements, self.bucket) + elements

    def pack(self, values: Tensor, spare: Tensor, block: Tensor) -> None:
        """Scales, then codes."""
        head = 4 * buckets(len(values), self.bucket)
        scales, codes = block[:head].view(torch.float32), block[head:].view(torch.int8)
        quantise(values, spare[0], self.bucket, LEVELS, scales, codes)

    def unpack(self, block: memoryview, out: Tensor) -> None:
        """Codes times scales."""
        count = buckets(len(out), self.bucket)
        scales = from_bytes(block[: 4 * count], "float32", (count,))
        codes = from_bytes(block[4 * count :], "int8", (len(out),))
        restore(scales, codes, self.bucket, out)
