"""bf16: the upper half of each number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from protos.tensors import from_bytes
from strategies.compression.codec import Codec


class Bf16(Codec):
    """Updates in bfloat16: fp32's range with 8 significant bits.

    With p the update plus the residual e::

        C(p) = p rounded to bf16, ties to even      e <- p - C(p)

    On the wire a parameter takes 2 bytes. At the site the residual takes 4 bytes a parameter, on disk
    and while encoding.

    Degenerate case: ``min_elements`` above the largest tensor sends every parameter as it is.

    Attributes:
        error_feedback: Whether what is lost is added to the next update.
        min_elements: Parameters with fewer elements travel as they are, in fp32 or wider.
    """

    name: ClassVar[str] = "bf16"
    summary: ClassVar[str] = "Updates in bfloat16 with error feedback: half the bytes."
    degenerate: ClassVar[Mapping[str, Any]] = {"min_elements": 1 << 44}

    def nbytes(self, elements: int) -> int:
        """Two bytes for each element."""
        return 2 * elements

    def pack(self, values: Tensor, spare: Tensor, block: Tensor) -> None:
        """Round, and keep the rest."""
        sent = block.view(torch.bfloat16).copy_(values)
        values.sub_(spare[0].copy_(sent))  # widened first: arithmetic of mixed dtypes is slow

    def unpack(self, block: memoryview, out: Tensor) -> None:
        """Widen."""
        out.copy_(from_bytes(block, "bfloat16", (len(out),)))
