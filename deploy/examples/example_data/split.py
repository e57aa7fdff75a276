"""Which image belongs to whom: a pure function of labels and seed, the same at every site.

Sites never agree on a split by talking. Each computes the whole division from the run's parameters
and keeps its own part, so the parts fit together only if every site draws the same numbers. Hence
``numpy.random.RandomState``: its streams are frozen for good, where those of ``default_rng`` may
change with a numpy release, and two sites with different releases would share images.

Images are given by index into the training set. From front to back::

    balanced order   [ subset: divided into parts, of each a little is val | unused | proxy ]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

Indices = NDArray[np.int64]

LEAST_PER_PART = 10  # so that every site can train and validate, however skewed the labels
SMALLEST_ALPHA = 1e-6
_ORDER, _PARTS, _VAL = 0, 1, 2  # one random stream for each purpose, none disturbs another


class SplitError(ValueError):
    """The images do not suffice for what is asked, or a parameter is out of range."""


class Pool(NamedTuple):
    """The training images, divided in two.

    Attributes:
        shared: Indices of the images that the sites divide among themselves.
        proxy: Indices of the images held back from all sites, for use without their labels.
    """

    shared: Indices
    proxy: Indices


def pool(labels: Indices, *, subset: int, proxy: int, seed: int) -> Pool:
    """Sets aside the proxy images and picks those that the sites share.

    Both have the class proportions of the whole. A smaller `subset` is contained in a larger one.

    Args:
        labels: (n,) class of each training image.
        subset: How many images all sites train and validate on together; 0 means all that
            `proxy` leaves.
        proxy: How many images no site gets.
        seed: In [0, 2**32).

    Raises:
        SplitError: More images asked for than there are.
    """
    n = len(labels)
    subset = subset or n - proxy
    if subset < 1 or proxy < 0 or subset + proxy > n:
        raise SplitError(
            f"subset ({subset}) and proxy ({proxy}) together must fit into the {n} training images"
        )
    order = balanced_order(labels, RandomState([seed, _ORDER]))
    return Pool(order[:subset], order[n - proxy :])


def divide(labels: Indices, *, parts: int, alpha: float | None, seed: int) -> list[Indices]:
    """Divides images over sites; every image is in exactly one part, and no part is empty.

    With `alpha`, each class is dealt out in proportions drawn from a symmetric Dirichlet
    distribution (Hsu, Qi, Brown, arXiv 1909.06335): 100 is nearly even, 0.5 skewed, 0.05 leaves
    most sites with two or three classes. A part that would end below ``LEAST_PER_PART`` images
    (fewer, if there are not that many to go round) takes from the largest.

    Args:
        labels: (n,) class of each image to divide.
        parts: Number of sites, at least 1.
        alpha: Concentration, at least 1e-6; None or 0 deals the images out evenly at random
            (IID), part sizes then differ by at most one.
        seed: In [0, 2**32).

    Returns:
        For each part the positions of its images in `labels`, ascending.

    Raises:
        SplitError: Fewer than two images a part, or a parameter is out of range.
    """
    if parts < 1 or len(labels) < 2 * parts:
        raise SplitError(f"{len(labels)} images can't be divided into {parts} part(s)")
    random = RandomState([seed, _PARTS])
    if not alpha:
        shuffled = random.permutation(len(labels)).astype(np.int64)
        return [np.sort(part) for part in np.array_split(shuffled, parts)]
    if not alpha >= SMALLEST_ALPHA:
        raise SplitError(f"alpha is {alpha}; it must be 0 (IID) or at least {SMALLEST_ALPHA}")
    dealt: list[list[Indices]] = [[] for _ in range(parts)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label)).astype(np.int64)
        counts = _whole(_dirichlet(random, alpha, parts) * len(members))
        for part, block in enumerate(np.split(members, np.cumsum(counts)[:-1])):
            dealt[part].append(block)
    filled = [random.permutation(np.concatenate(blocks)).astype(np.int64) for blocks in dealt]
    return [np.sort(part) for part in _top_up(filled, min(LEAST_PER_PART, len(labels) // parts))]


def carve(labels: Indices, *, fraction: float, part: int, seed: int) -> tuple[Indices, Indices]:
    """Carves the validation images out of one part, with the class proportions of that part.

    Args:
        labels: (n,) class of each image of the part, n at least 2.
        fraction: Share to validate on, in (0, 1); at least one image on either side.
        part: Which part this is.
        seed: In [0, 2**32).

    Returns:
        Positions in `labels` of the images to train on, and of those to validate on, ascending.
    """
    n = len(labels)
    count = min(max(round(fraction * n), 1), n - 1)
    order = balanced_order(labels, RandomState([seed, _VAL, part]))
    return np.sort(order[count:]), np.sort(order[:count])


def balanced_order(labels: Indices, random: RandomState) -> Indices:
    """Shuffles so that each stretch from either end has nearly the class proportions of the whole.

    The r-th image of a class of m goes to a random place in the r-th m-th of the sequence.

    Args:
        labels: (n,) class of each image.
        random: Where the chance comes from.

    Returns:
        (n,) a permutation of 0..n-1. With C classes, each class of m images is among the first k
        of the sequence k·m/n times, give or take 1 + C·m/n.
    """
    places = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + random.random_sample(len(members))) / len(
            members
        )
    return np.argsort(places, kind="stable").astype(np.int64)


def _dirichlet(random: RandomState, alpha: float, parts: int) -> NDArray[np.float64]:
    """Draws from a symmetric Dirichlet distribution, by way of logarithms.

    ``RandomState.dirichlet`` divides zero by zero when a small `alpha` makes all its gamma draws
    underflow. Here G(alpha) = G(alpha + 1) · U^(1/alpha), whose logarithm always exists.
    """
    log_gamma = np.log(random.standard_gamma(alpha + 1, parts))
    log_gamma += np.log1p(-random.random_sample(parts)) / alpha
    shares = np.exp(log_gamma - log_gamma.max())
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def _whole(amounts: NDArray[np.float64]) -> Indices:
    """Rounds to whole numbers with the same sum: down, then up where most was lost."""
    # Rounded first: where the C libraries of two sites differ in the last bit of a logarithm,
    # both must still round alike.
    amounts = np.round(amounts, 6)
    counts = np.floor(amounts).astype(np.int64)
    missing = round(float(amounts.sum())) - int(counts.sum())
    counts[np.argsort(counts - amounts, kind="stable")[:missing]] += 1
    return counts


def _top_up(parts: list[Indices], least: int) -> list[Indices]:
    parts = list(parts)
    for needy in range(len(parts)):
        while (lack := least - len(parts[needy])) > 0:
            rich = max(range(len(parts)), key=lambda part: len(parts[part]))
            gift = min(lack, len(parts[rich]) - least)
            parts[needy] = np.concatenate([parts[needy], parts[rich][-gift:]])
            parts[rich] = parts[rich][:-gift]
    return parts
