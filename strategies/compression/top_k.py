"""Top-k: of each piece the largest few, with their positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from protos.tensors import from_bytes
from strategies.compression.codec import Codec, rows

PIECE = 1 << 16
"""Neighbours among which the largest are sought: a position takes 16 bits. A divisor of a tile."""

Sizes = npt.NDArray[np.int32]
Places = npt.NDArray[np.intp]


class TopK(Codec):
    """Of each piece of 65,536 neighbours the k largest magnitudes; the others wait at the site.

    With p the update plus the residual e, and d the number of elements of a piece (a tensor's last
    piece is shorter)::

        k = ceil(fraction * d)
        C(p) = p at the k positions with the largest |p|, 0 elsewhere      e <- p - C(p)

    Of equal magnitudes those that come first are sent. On the wire a piece takes 6 bytes for each of
    its k values, fp32 and a 16-bit position: 66 times fewer than fp32 with a fraction of 0.01. At the
    site the residual takes 4 bytes a parameter, on disk and while encoding.

    A parameter that is never large comes every 1 / fraction rounds or so, and then with the sum of
    what it missed: count on that many rounds, and on local work that does not overshoot by it.

    Degenerate case: ``fraction = 1`` sends every value as it is, in fp32.

    Departures: the paper takes the k largest of a whole vector; by pieces a site needs no second
    pass and the orchestrator decodes any tile by itself.

    Attributes:
        error_feedback: Whether what is not sent is added to the next update. Without it, what is
            never among the largest is never learned.
        min_elements: Parameters with fewer elements travel as they are, in fp32 or wider.
        fraction: Share of the values that is sent, in (0, 1].
    """

    name: ClassVar[str] = "top_k"
    summary: ClassVar[str] = "Only the largest values of an update; the rest waits, fed back."
    paper: ClassVar[str] = (
        "Stich, Cordonnier, Jaggi: Sparsified SGD with Memory, NeurIPS 2018, arXiv:1809.07599"
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"fraction": 1.0}

    fraction: float = Field(0.01, gt=0, le=1)

    def kept(self, elements: int) -> int:
        """How many values of a piece are sent."""
        exact = round(self.fraction * elements, 6)  # 0.07 * 100 is 7.000000000000001
        return max(1, math.ceil(exact))

    def nbytes(self, elements: int) -> int:
        """Six bytes for each value that is sent."""
        return 6 * self._sent(elements)

    def pack(self, values: Tensor, spare: Tensor, block: Tensor) -> None:
        """Values in the order of their positions, then the positions."""
        # Magnitudes have the order of their bits, with NaN above infinity.
        sizes = torch.abs(values, out=spare[0]).view(torch.int32)
        start, found = 0, []
        for part, work in zip(
            rows(sizes, PIECE), rows(spare[1].view(torch.int32), PIECE), strict=True
        ):
            k = self.kept(part.shape[1])
            found.append(start + _largest(part.numpy(), work.copy_(part).numpy(), k))
            start += part.numel()
        chosen = np.concatenate(found)
        exact, packed = values.numpy(), block.numpy()
        packed[: 4 * len(chosen)].view(np.float32)[:] = exact[chosen]
        packed[4 * len(chosen) :].view(np.uint16)[:] = chosen % PIECE
        exact[chosen] = 0.0

    def unpack(self, block: memoryview, out: Tensor) -> None:
        """Zeros, and the values at their positions."""
        count = self._sent(len(out))
        at = np.frombuffer(block[4 * count :], dtype=np.uint16).astype(np.int64)
        start = done = 0
        for part in rows(out, PIECE):
            k = len(part) * self.kept(part.shape[1])
            places = at[done : done + k].reshape(len(part), -1)
            if (np.diff(places) <= 0).any() or places[-1, -1] >= part.shape[1]:
                raise ValueError("positions that don't rise, or lie beyond the tile")
            places += start + PIECE * np.arange(len(part))[:, None]
            start, done = start + part.numel(), done + k
        values = from_bytes(block[: 4 * count], "float32", (count,))
        out.zero_()[torch.from_numpy(at)] = values

    def _sent(self, elements: int) -> int:
        whole, rest = divmod(elements, PIECE)
        return whole * self.kept(PIECE) + (self.kept(rest) if rest else 0)


def _largest(sizes: Sizes, work: Sizes, k: int) -> Places:
    """Where the k largest of each row are, counted over all rows; of equal ones the first.

    Args:
        sizes: (n, d).
        work: A copy of it, to be disordered.
        k: At most d.

    Returns:
        (n * k,) in rising order.
    """
    least_at = work.shape[1] - k
    work.partition(least_at, axis=1)
    least = work[:, least_at, None]
    chosen = sizes >= least
    found = np.flatnonzero(chosen)
    if len(found) > k * len(sizes):
        for row in range(len(sizes)):
            equal = np.flatnonzero(sizes[row] == least[row])
            surplus = np.count_nonzero(chosen[row]) - k
            chosen[row, equal[len(equal) - surplus :]] = False
        found = np.flatnonzero(chosen)
    return found
