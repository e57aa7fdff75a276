"""Order statistics over sites: every coordinate's values sorted, many coordinates at once.

A sorting network compares and exchanges whole rows, which is one vector instruction for many
coordinates: twenty times as fast here as sorting each column of 16 by itself.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 1 << 14
"""Coordinates sorted at a time: 16 rows of them stay in a core's cache."""

SITE_BITS = 16


@lru_cache(maxsize=64)
def network(n: int) -> tuple[tuple[int, int], ...]:
    """Pairs of rows to compare, in order, after which n rows are sorted.

    Source: K. E. Batcher, Sorting networks and their applications, AFIPS 1968 (odd-even merge sort,
    here for any n as in Knuth, The Art of Computer Programming, vol. 3, 5.2.2, algorithm M).
    """
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                pairs += [
                    (i, i + k)
                    for i in range(j, j + min(k, n - j - k))
                    if i // (2 * p) == (i + k) // (2 * p)
                ]
            k //= 2
        p *= 2
    return tuple(pairs)


def sort_rows(rows: Tensor) -> list[Tensor]:
    """Each column of (n, m) sorted, as n rows; the memory of ``rows`` is used up."""
    out, spare = list(rows), torch.empty_like(rows[0])
    for low, high in network(len(out)):
        torch.minimum(out[low], out[high], out=spare)
        torch.maximum(out[low], out[high], out=out[high])
        out[low], spare = spare, out[low]
    return out


def sort_with_rows(rows: Tensor, first: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """The values of rank ``first`` to before ``end`` of each column, with the row of each.

    Args:
        rows: (n, m) fp32 or fp64, finite, n <= 65,536.
        first: Lowest rank, from 0.
        end: One past the highest.

    Returns:
        For each rank the values, (m,), and the numbers of their rows, (m,) int64. Equal values
        are in the order of their rows (a zero of negative sign counts as smaller in fp32).
    """
    if rows.dtype != torch.float32:
        order = torch.sort(rows, dim=0, stable=True)
        return [(order.values[k], order.indices[k]) for k in range(first, end)]
    # One integer holds a value, with its bits turned so that they are in the order of the values,
    # and behind it the row.
    bits = rows.view(torch.int32)
    turned = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << SITE_BITS
    turned |= torch.arange(len(rows))[:, None]
    out = []
    for key in sort_rows(turned)[first:end]:
        bits = (key >> SITE_BITS).to(torch.int32)
        values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
        out.append((values, key & ((1 << SITE_BITS) - 1)))
    return out
