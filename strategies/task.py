"""The Task protocol: what a data center's own people write.

A task's code never travels. A plan names it, with typed parameters; the site's own ``site.toml``
says which file it is and gives settings that never leave the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from protos.plan import Plan


class Options(BaseModel):
    """Base of ``Params`` and ``Settings``: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass
class Training:
    """One round's local training, for a task that owns its loop (see `Task.fit`).

    Attributes:
        plan: What is asked: work, schedule, optimizer, batch size, seed.
        model: Holds what was adopted of the base; train it in place.
        data: This site's training data.
        device: Where the model is.
        rate: Learning rate at a part u in [0, 1] of the round (the cycle, restarted every round).
        report: To be called now and then with (done, loss), done in the unit of ``plan.work``; it
            raises when the round was given up, and the exception must pass through.
        enough: Whether to end behind this step: the deadline is near, and the run takes partial work.
            What was reported last is then what counts as done. A loop that does not ask trains on.
    """

    plan: Plan
    model: nn.Module
    data: Dataset[Any]
    device: torch.device
    rate: Callable[[float], float]
    report: Callable[[float, float], None]
    enough: Callable[[], bool]


class Trained(NamedTuple):
    """What a loop of a task's own did.

    Attributes:
        examples: Training examples at the site: the weight of an average.
        steps: Optimizer steps.
        epochs: Passes over the data.
        loss: Mean loss of the last pass.
    """

    examples: int
    steps: int
    epochs: float
    loss: float


class Task:
    """A workload: a model, this site's data, a loss.

    Subclasses give ``model`` and ``train_data`` at least. An instance is made once per trainer
    process and kept warm between rounds, so data may be cached on it.

    Attributes:
        Params: Typed parameters of a run (backbone, image size). They come with the plan.
        Settings: Typed settings of this site (data root). They are never sent.
        features: What a strategy may rely on: "classification" (``forward`` gives logits of
            shape (batch, classes) and targets are class indices), "logits", …
        embedding: Name of the submodule whose output embeds a sample, (batch, features);
            empty if there is none.
        input_shape: Shape of one input, where inputs are single floating tensors; empty where they
            are not, or vary. May be a property. Needed where inputs are generated.

    Args:
        params: Parameters of the run.
        settings: Settings of the site.
    """

    Params: ClassVar[type[Options]] = Options
    Settings: ClassVar[type[Options]] = Options
    features: ClassVar[frozenset[str]] = frozenset({"classification"})
    embedding: ClassVar[str] = ""
    input_shape: tuple[int, ...] = ()

    def __init__(self, params: Any = None, settings: Any = None) -> None:
        self.params = params if params is not None else self.Params()
        self.settings = settings if settings is not None else self.Settings()

    def model(self) -> nn.Module:
        """A new model with random weights drawn from torch's global generator.

        Tensors that don't require a gradient are placed ``frozen``: known by digest, never sent.
        """
        raise NotImplementedError

    def student(self) -> nn.Module | None:
        """A smaller model of the same inputs and outputs, for deployment, with random weights.

        None: there is none. Only the orchestrator asks for it (strategy ``student``).
        """
        return None

    def train_data(self) -> Dataset[Any]:
        """This site's own training data; it never leaves. Asked for once, while the site is preparing."""
        raise NotImplementedError

    def val_data(self) -> Dataset[Any] | None:
        """Data that steers: gates, temperature, epsilon. None: this site has none."""
        return None

    def test_data(self) -> Dataset[Any] | None:
        """Data that is only reported. None: this site has none."""
        return None

    def proxy_data(self) -> Dataset[Any] | None:
        """Unlabelled inputs that the orchestrator may use for distillation. None: there are none.

        A sample is one input, bare or as a tuple of one; ``collate`` joins them.
        """
        return None

    def teacher(self) -> nn.Module | None:
        """A frozen model that maps inputs to embeddings (batch, features), for SEED. None: there is none.

        Its weights count where the first base comes from; elsewhere any of the same shapes will do.
        """
        return None

    def placement(self) -> Mapping[str, str]:
        """Where tensors live, by name pattern (fnmatch): shared, site, orchestrator or frozen."""
        return {}

    def collate(self, samples: Sequence[Any]) -> Any:
        """One batch of some samples; by default torch's."""
        return default_collate(list(samples))

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and targets of a batch; by default its two halves."""
        inputs, targets = batch
        return inputs, targets

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The model's outputs; by default ``model(inputs)``."""
        return model(inputs)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss to minimise, a scalar; by default cross-entropy, mean over the batch."""
        return F.cross_entropy(outputs, targets)

    def fit(self, training: Training) -> Trained:
        """Own the whole training loop: for trainers that exist already, or don't fit steps.

        Strategies that change single steps (needs "our training loop") are then refused.
        """
        raise NotImplementedError

    def owns_loop(self) -> bool:
        """Whether ``fit`` is the task's own."""
        return type(self).fit is not Task.fit

    def tokens(self, targets: Any) -> int:
        """How many tokens a batch counts for, where work is given in tokens."""
        return int(targets.numel()) if isinstance(targets, Tensor) else len(targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Further metrics of a batch as sums over its samples, by name.

        A metric ``name`` is reported as the sum divided by the number of samples.
        """
        return {}


def seed_everything(*parts: object) -> int:
    """Seed torch's global generator with a function of ``parts``; gives the seed (63 bits)."""
    from protos.digest import canonical, digest

    seed = int(digest(canonical([str(p) for p in parts]))[:16], 16) >> 1
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # What torch.manual_seed does first, for accelerators that might come, costs more than the rest,
        # and is remembered once more at every call.
        torch.default_generator.manual_seed(seed)
    return seed
