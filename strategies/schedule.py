"""The learning rate inside one round, as arithmetic on `protos.plan.Schedule`.

Co-learning's cycle (CLR) is this function: it starts anew at every round. The trainer asks for
the rate of every step; the orchestrator draws the same curve.
"""

from __future__ import annotations

import math

from protos.plan import Schedule


def learning_rate(schedule: Schedule, progress: float) -> float:
    """The learning rate when the fraction ``progress`` of a round is done.

    With peak ``lr``, lowest rate ``floor = lr * decay`` and ``u = progress``::

        exp         lr * decay ** u
        cosine      floor + (lr - floor) * (1 + cos(pi * u)) / 2
        triangular  floor + (lr - floor) * (1 - |2u - 1|)
        constant    lr

    ``exp`` and ``cosine`` fall from ``lr`` to ``floor``; ``triangular`` climbs from ``floor`` to
    ``lr`` at the middle of the round and falls again. ``decay = 1`` makes every shape constant.

    Args:
        schedule: Shape, peak rate and decay.
        progress: Done part of the round; values outside [0, 1], which occur where the length of
            a round is an estimate, are moved to the nearer end.

    Returns:
        The rate, in [lr * decay, lr].
    """
    u = min(max(progress, 0.0), 1.0)
    lr, floor = schedule.lr, schedule.lr * schedule.decay
    match schedule.shape:
        case "exp":
            return lr * math.pow(schedule.decay, u)
        case "cosine":
            return floor + (lr - floor) * (1.0 + math.cos(math.pi * u)) / 2.0
        case "triangular":
            return floor + (lr - floor) * (1.0 - abs(2.0 * u - 1.0))
        case "constant":
            return lr


def progress_at(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The part of a round that counts as done before a step, by the schedule's granularity.

    Args:
        schedule: Its ``granularity`` decides.
        step: Number of the step, from 0.
        total_steps: Steps of the round, >= 1.
        steps_per_epoch: Steps of one pass over the data, >= 1.

    Returns:
        ``step / total_steps``; with the granularity "epoch" the same for the first step of
        the epoch, so that the rate is constant within an epoch.
    """
    if schedule.granularity == "epoch":
        step -= step % steps_per_epoch
    return step / max(total_steps, 1)
