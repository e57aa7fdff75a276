"""Inputs made of noise by asking the sites' models: proxy data where there is none."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from protos.errors import TaskFailed
from strategies.context import Refinement, seeded

STEPS = 60
RATE = 0.1
SHRINK = 0.05
"""Weight of the mean square of an input: models are made for inputs of about unit variance."""


def generate(refinement: Refinement, samples: int, strategy: str) -> Tensor:
    """Inputs that a site's model takes for samples of a class, as many of each class.

    Model inversion: with z the logits of site k's model, y a class, every site gets an equal share
    of the samples, and x begins as white noise and follows (Adam, 60 steps of 0.1)::

        min_x  CE(z(x), y) + 0.05 mean(x^2)

    after Yin et al., Dreaming to Distill via Data-Free Knowledge Transfer (DeepInversion), CVPR
    2020, arXiv:1912.08795, without its priors on normalisation statistics and smoothness: models of
    data centers need not have such layers. One site's model is loaded at a time.

    Args:
        refinement: Whose sites and task; the task says ``input_shape``.
        samples: How many; 2,048 at most.
        strategy: Who asks, for errors.

    Returns:
        (samples, *input_shape) float32.

    Raises:
        TaskFailed: The task does not say ``input_shape``.
    """
    shape = tuple(refinement.task.input_shape)
    if not shape:
        raise TaskFailed(
            f"{strategy}: inputs can only be generated if the task says input_shape",
            strategy=strategy,
        )
    samples = min(samples, 2048)
    generator = seeded(refinement.seed, refinement.round, "generated")
    noise = torch.randn(samples, *shape, generator=generator)
    reader = copy.deepcopy(refinement.model).to(refinement.device).eval().requires_grad_(False)
    shares = noise.tensor_split(len(refinement.weights))
    out = []
    for share, (_, _, state) in zip(shares, refinement.site_models(), strict=True):
        reader.load_state_dict(state, strict=False)
        out.append(_invert(refinement, reader, share))
    return torch.cat(out)


def _invert(refinement: Refinement, model: torch.nn.Module, noise: Tensor) -> Tensor:
    if not len(noise):
        return noise
    x = noise.to(refinement.device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=RATE)
    for _ in range(STEPS):
        z = refinement.task.forward(model, x)
        classes = torch.arange(len(x), device=z.device) % z.shape[1]
        loss = F.cross_entropy(z, classes) + SHRINK * x.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return x.detach().cpu()
