"""What a site of most rows knows of itself: which part of the public data is its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from farflung import Options


class Part(Options):
    """This site's part.

    Attributes:
        part: From 0 to parts - 1.
        parts: Of how many.
    """

    part: int = Field(0, ge=0)
    parts: int = Field(3, ge=1)

    def of(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part's positions, where all parts together are ``order``, nearly even."""
        return np.array_split(order, self.parts)[self.part]
