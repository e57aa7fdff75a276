"""All randomness at a site: functions of (run seed, site, round, epoch, step)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from protos.plan import Plan
from strategies.context import seeded
from strategies.task import seed_everything


def seed_model(seed: int) -> None:
    """Before a model is built: a function of the run's seed alone, so that all sites agree."""
    _seed_libraries(seed_everything(seed, "model"))


def seed_epoch(plan: Plan, epoch: int) -> None:
    """Before an epoch: dropout, and whatever a task draws from torch, numpy or random.

    The attempt is not among the parts: the same work gives the same bits in the next attempt.
    """
    _seed_libraries(seed_everything(plan.seed, plan.site, plan.round, "epoch", epoch))


def _seed_libraries(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def shuffled(plan: Plan, epoch: int, length: int) -> torch.Tensor:
    """The order of the samples in an epoch, (length,) int64."""
    generator = seeded(plan.seed, plan.site, plan.round, "shuffle", epoch)
    return torch.randperm(length, generator=generator)


def step_generator(plan: Plan, step: int) -> Generator:
    """The generator that strategies see in a step."""
    return seeded(plan.seed, plan.site, plan.round, "step", step)


def round_generator(plan: Plan) -> Generator:
    """The generator that strategies see when a round's update is encoded."""
    return seeded(plan.seed, plan.site, plan.round, "round")


def random_state(device: torch.device) -> tuple[dict[str, Tensor], list[Any]]:
    """Where torch's generators are, and those of numpy and random as JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state()
    return states, [random.getstate(), [kind, np.asarray(keys).tolist(), *rest]]


def restore_random(device: torch.device, states: dict[str, Tensor], others: list[Any]) -> None:
    """Put all generators where `random_state` found them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    (version, words, spare), (kind, keys, *rest) = others
    random.setstate((version, tuple(words), spare))
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
