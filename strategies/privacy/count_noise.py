"""Noise on the counts of an assessment, added at the site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.random import Generator, default_rng
from pydantic import Field
from torch import Tensor

from strategies.context import Tensors
from strategies.protocol import Family, Strategy

COUNTED = {
    "n": 0.0,
    "correct": 1.0,
    "bins": 6.0,
    "histogram_binning/counts": 4.0,
    "isotonic/counts": 4.0,
    "conformal/own": 2.0,
    "conformal/n": 0.0,
}
"""What leaves, and by how much one sample replaced by another changes it at most (L1)."""


class CountNoise(Strategy):
    """Each cell of the counts gets noise of its own; what is not a count stays at the site.

    A count x of the site's validation or test samples leaves as::

        round(x) + noise,    P(noise = k) proportional to exp(-|k| / scale)    (discrete Laplace)

    or with noise = round(scale * normal). Only sums that one sample changes by a bounded amount can
    be protected so. They are, with what one sample that is replaced by another changes them by (L1):
    ``correct`` 1, ``bins`` 6, ``histogram_binning/counts`` and ``isotonic/counts`` 4,
    ``conformal/own`` 2. With S the sum of those that a run sends, one exchange is
    S / scale-differentially private for each sample (Laplace): scores alone S = 7, so ``scale = 7``
    is epsilon = 1 for the first exchange of one round. A map's second exchange and every further
    round add theirs. The number of samples is not protected: it stands in every header.

    All other sums are withheld, among them loss, NLL, Brier score, AECE's and the class-wise ones:
    their scores are missing. So is what `temperature` and `vector_scaling` are fitted to: they fit
    nothing behind this. Sets of `conformal` have coverage and no size.

    What it costs: a bin's gap gets noise of deviation about 2 scale at each site, so for K sites
    and n samples ECE rises by about 25 scale sqrt(K) / n where it was near zero: 5.6 points for five
    sites, 1,000 samples and scale 1. Cells may fall below zero. Where they are summed up (ECE,
    coverage) that is right as it is, since clipping would add a bias; where an order or a share is
    read off (bins of equal mass, isotonic steps, quantiles) a negative cell counts as none, which
    draws sparse ends a little together. A bin that is below zero has no place in a reliability
    diagram.

    Noise comes from the system's source of randomness, not from the run's seed, which the orchestrator
    knows. It is drawn in floating point and is not hardened against attacks on its last bits.

    Degenerate case: ``scale = 0`` sends everything as it is.

    Departures: the mechanism alone; nothing here adds up what a run spends.

    Attributes:
        scale: Of the noise, in samples.
        noise: Which distribution.
        seed: Makes noise repeatable, and so worthless against whoever knows it: for tests.
    """

    name: ClassVar[str] = "count_noise"
    family: ClassVar[Family] = "privacy"
    summary: ClassVar[str] = "Noise on the counts of an assessment; other sums stay at the site."
    paper: ClassVar[str] = (
        "Ghosh, Roughgarden, Sundararajan: Universally utility-maximizing privacy mechanisms, SIAM J. "
        "Computing 2012, arXiv:0811.2841"
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    scale: float = Field(1.0, ge=0, le=1e6)
    noise: Literal["laplace", "gaussian"] = "laplace"
    seed: int | None = Field(None, ge=0)

    def release(self, sums: Tensors) -> dict[str, Tensor]:
        """The counts with noise; everything else is left out."""
        if self.scale == 0:
            return dict(sums)
        random = default_rng(self.seed)
        out = {}
        for name, value in sums.items():
            moved = COUNTED.get(_plain(name))
            if moved is not None:
                out[name] = value if moved == 0 else self._noised(value, random)
        return out

    def _noised(self, value: Tensor, random: Generator) -> Tensor:
        shape = tuple(value.shape)
        if self.noise == "gaussian":
            drawn = np.rint(self.scale * random.standard_normal(shape))
        else:
            # The difference of two geometric variables.
            p = -math.expm1(-1 / self.scale)
            drawn = (random.geometric(p, shape) - random.geometric(p, shape)).astype(np.float64)
        # Digits behind the point would tell what the noise hides.
        noised = value.double().round() + torch.from_numpy(np.asarray(drawn))
        return noised.to(value.dtype)


def _plain(name: str) -> str:
    """A sum's name without its set: "val/bins" as "bins", "conformal/test/own" as "conformal/own"."""
    sets = ("val", "test", "val_calibrated", "test_calibrated")
    return "/".join(part for part in name.split("/") if part not in sets)
