"""What a strategy is: a frozen, typed value whose hooks change one thing each.

Its **fields are the hyperparameters, its hooks are what the paper changes, its state is passed in
and out.** Both halves of a method, site and orchestrator, are in one class in one file. Every hook
has a default that changes nothing. Hooks marked *tile* are pure and see one tile of the flat model
(at most `protos.manifest.TILE_ELEMENTS` elements), never a whole model.

The update is **base - local**: what has to be subtracted from the base (a pseudo-gradient).

Order in a stack: hooks run in the order of the run file, ``decode`` in reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from protos.contribution import Merge
from protos.manifest import Placement, Tile
from protos.plan import OptimizerChoice, Plan, Schedule, Work
from strategies.task import Task

Tensors = Mapping[str, Tensor]
"""Name to tensor."""

Memo = dict[str, Any]
"""A strategy's small memory at the orchestrator: JSON, saved with every committed round."""

Need = Literal[
    "labels",  # targets are class indices
    "logits",  # outputs are logits (batch, classes)
    "site id",  # tells sites apart
    "proxy data",  # Task.proxy_data at the orchestrator
    "orchestrator task",  # the task stands in [tasks] of the orchestrator's configuration
    "our training loop",  # the task does not own its loop
    "individual updates",  # sees single contributions: conflicts with secure aggregation
    "val data",  # Task.val_data at the sites
    "norms",  # reduction pass 1: norms of the updates
    "gram",  # reduction pass 1: the (n, n) Gram matrix of the updates
]

Family = Literal[
    "averaging", "outer", "local", "robust", "compression", "privacy", "calibration",
    "distillation", "recipes", "layers", "metric", "trees", "augmentation", "labels",
    "adaptation", "condensation", "compaction", "search", "architectures",
]  # fmt: skip


@dataclass(frozen=True)
class RoundSummary:
    """What ``plan`` may know of the last committed round.

    Attributes:
        round: Its number; 0 if there is none.
        relative_change: ||reduced delta|| / ||base|| over parameters, before outer step and refine.
        scores: Pooled scores of the assessment by name ("val.accuracy", "test.ece", …).
        payloads: Merged side payloads, by "strategy/name".
        sites: The sites that were counted.
    """

    round: int = 0
    relative_change: float = float("nan")
    scores: Mapping[str, float] = field(default_factory=dict)
    payloads: Tensors = field(default_factory=dict)
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A plan in the making, the same for all sites of the cohort; ``plan`` hooks replace fields.

    Attributes:
        round: The round that is planned, 1, 2, ….
        rounds: Rounds of the whole run.
        last: The last committed round.
        cohort: Sites that will be asked.
        work: Local work.
        schedule: Learning rate inside the round.
        optimizer: Inner optimizer.
        batch_size: Samples of a step.
        payload: What strategies give to their site halves, by strategy name (JSON).
    """

    round: int
    rounds: int
    last: RoundSummary
    cohort: tuple[str, ...]
    work: Work
    schedule: Schedule
    optimizer: OptimizerChoice
    batch_size: int
    payload: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Draft:
        """A copy with some fields replaced."""
        return replace(self, **changes)


@dataclass
class Step:
    """One optimizer step at a site, as ``batch``, ``objective``, ``after_step`` see it.

    Attributes:
        plan: The plan.
        task: The task.
        model: The model in training.
        base: The shared tensors of the base, on the model's device, detached.
        optimizer: The inner optimizer.
        index: Number of the step in this round, from 0.
        total: Planned steps of the round (an estimate where work is in tokens or seconds).
        epoch: Epoch of the round, from 0.
        learning_rate: Of this step.
        generator: Seeded by (run seed, site, round, step); on the CPU.
        inputs: Inputs of the batch (after ``batch`` hooks).
        targets: Targets of the batch.
        outputs: Outputs of the model, once there are any.
    """

    plan: Plan
    task: Task
    model: nn.Module
    base: Tensors
    optimizer: Optimizer
    index: int
    total: int
    epoch: int
    learning_rate: float
    generator: Generator
    inputs: Any = None
    targets: Any = None
    outputs: Any = None
    base_model_factory: Callable[[], nn.Module] | None = None

    @cached_property
    def _base_model(self) -> nn.Module:
        if self.base_model_factory is None:
            raise LookupError("this step has no base model")
        return self.base_model_factory()

    def base_outputs(self) -> Any:
        """Outputs of the frozen base model (evaluation mode, no gradient) for this batch."""
        import torch

        with torch.no_grad():
            return self.task.forward(self._base_model, self.inputs)


@dataclass
class SidePayload:
    """A named tensor beside the update, with its merge rule."""

    tensor: Tensor
    merge: Merge = "sum"


@dataclass
class Update:
    """What a site is about to send.

    Attributes:
        tensors: By name: for parameters **base - local** in fp32 or wider; for statistics and
            counters the local value. CPU tensors.
        examples: Training examples at the site.
        steps: Optimizer steps made.
        epochs: Passes over the data made.
        payloads: Side payloads by "strategy/name".
        blocks: Set by a wire codec: for each parameter its encoded tiles, in order.
    """

    tensors: dict[str, Tensor]
    examples: int
    steps: int
    epochs: float
    payloads: dict[str, SidePayload] = field(default_factory=dict)
    blocks: dict[str, list[bytes]] | None = None


@dataclass(frozen=True)
class Cohort:
    """The closed set of a round, as ``weigh`` sees it; rows are in site-id order.

    Attributes:
        sites: Site names, n of them.
        examples: Training examples, (n,) float64.
        losses: Mean training loss, (n,) float64, NaN where a site's policy hides it.
        staleness: Rounds between the contribution's base and this round's, (n,) int64.
        payloads: Unmerged side payloads with merge rule "keep per site": name to (n, …).
        groups: Names of the weight groups of the manifest.
        norms: L2 norms of the updates over parameters, (n,) float64, if needed.
        gram: Inner products of the updates, (n, n) float64, if needed.
    """

    sites: tuple[str, ...]
    examples: Tensor
    losses: Tensor
    staleness: Tensor
    payloads: Tensors = field(default_factory=dict)
    groups: tuple[str, ...] = ("all",)
    norms: Tensor | None = None
    gram: Tensor | None = None


@dataclass
class Refinement:
    """What ``refine`` gets, in a child process without keys or network.

    Attributes:
        round: Number of the round.
        seed: Of the run.
        task: The orchestrator's own instance of the task.
        model: A model that holds the candidate.
        weights: Weight of each site in the average, by site.
        load_site: Gives one site's full state (base - its update), one site at a time, mapped.
        payloads: Merged side payloads.
        device: Where to compute.
    """

    round: int
    seed: int
    task: Task
    model: nn.Module
    weights: Mapping[str, float]
    load_site: Callable[[str], dict[str, Tensor]]
    payloads: Tensors = field(default_factory=dict)
    device: str = "cpu"
    scratch: Path | None = None

    def site_models(self) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
        """(site, weight, state) of one site after the other."""
        for site, weight in self.weights.items():
            yield site, weight, self.load_site(site)


@dataclass(frozen=True)
class Calibration:
    """A fitted calibration map: versioned, exported and rolled back with its model.

    Attributes:
        parameters: JSON; what ``transform`` needs.
        report: Numbers for ledger, table and page.
    """

    parameters: Memo
    report: Mapping[str, float] = field(default_factory=dict)


class Strategy(BaseModel):
    """Base of all strategies. See the module's page for the rules.

    Class attributes:
        name: Key in run files; lower case with underscores.
        family: The folder whose question it answers.
        summary: One line.
        paper: Authors, title, year, identifier; empty if there is none.
        needs: What it reads or requires; checked at launch.
        wire_codec: Whether it sets ``Update.blocks`` and has ``decode`` (at most one per stack).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    family: ClassVar[Family]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    wire_codec: ClassVar[bool] = False

    # -- orchestrator, once ------------------------------------------------------------------

    def init_state(self, tile: Tile) -> dict[str, Tensor]:
        """*tile*: what the method remembers per parameter: name to a tensor of the tile's size."""
        return {}

    def init_memo(self) -> Memo:
        """The small memory that ``plan`` starts from."""
        return {}

    # -- orchestrator, before a round ---------------------------------------------------------

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Change what the sites are asked. Pure: called again for the same round, it gives the same."""
        return draft, memo

    # -- either end ----------------------------------------------------------------------------

    def build(self, model: nn.Module, task: Task) -> nn.Module:
        """Change the architecture; both ends must reach the same manifest."""
        return model

    def placement(self) -> Mapping[str, Placement]:
        """Where tensors live, by name pattern (fnmatch); the last match of the stack wins."""
        return {}

    def groups(self) -> Mapping[str, str]:
        """Weight group of tensors, by name pattern (fnmatch); unmatched ones are in "all"."""
        return {}

    # -- site ---------------------------------------------------------------------------------

    def adopt(
        self, base: dict[str, Tensor], state: dict[str, Tensor], plan: Plan
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What of the base is taken. ``base`` holds the shared tensors that will be loaded."""
        return base, state

    def batch(self, step: Step) -> None:
        """Change ``step.inputs`` and ``step.targets`` (augmentation)."""

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """The local loss; ``step.outputs`` is there."""
        return loss

    def after_step(self, step: Step, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradient or weight surgery after the optimizer's step; gives the next state."""
        return state

    def local_step(self, step: Step, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Own the whole step (several optimizers, no single loss); at most one per stack.

        Gives the loss to report and the next state.
        """
        raise NotImplementedError

    def encode(
        self, update: Update, plan: Plan, state: dict[str, Tensor]
    ) -> tuple[Update, dict[str, Tensor]]:
        """The wire: compression, clipping, masks, side payloads."""
        return update, state

    # -- orchestrator, reduction ---------------------------------------------------------------

    def decode(self, block: bytes, tile: Tile) -> Tensor:
        """*tile*: the inverse of a wire codec: (tile elements,) fp32. Bounded by the tile's size."""
        raise NotImplementedError

    def weigh(self, weights: Tensor, cohort: Cohort) -> Tensor:
        """(n,) float64 -> (n,) or (n, groups) float64. They need not sum to one: they are normalised."""
        return weights

    def reduce(self, stack: Tensor, weights: Tensor, tile: Tile) -> Tensor:
        """*tile*: (n, elements), (n,) -> (elements,). At most one per stack; default weighted mean."""
        raise NotImplementedError

    def step(
        self, delta: Tensor, base: Tensor, state: dict[str, Tensor], tile: Tile
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """*tile*: outer optimizer, noise. Gives what is subtracted from the base, and the next state."""
        return delta, state

    # -- orchestrator, after the reduction -------------------------------------------------------

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Change ``refinement.model`` in place (distillation, search); gives numbers to report."""
        raise NotImplementedError

    # -- assess ---------------------------------------------------------------------------------

    def evaluate(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Site: extra statistics of all val samples as sums (n, classes), (n,) -> name to tensor."""
        return {}

    def calibrate(self, sums: Tensors) -> Calibration | None:
        """Orchestrator: a calibration map from the pooled sums of ``evaluate``."""
        return None

    def transform(self, outputs: Tensor, parameters: Memo) -> Tensor:
        """Either: outputs after the calibration map, (n, classes)."""
        return outputs

    # -- export ---------------------------------------------------------------------------------

    def export(self, model: nn.Module) -> nn.Module:
        """What is deployed."""
        return model

    # -- helpers --------------------------------------------------------------------------------

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether this class has a hook of its own."""
        return getattr(cls, hook) is not getattr(Strategy, hook)

    @classmethod
    def hooks(cls) -> tuple[str, ...]:
        """Names of the hooks that this class changes, in the order of a round."""
        return tuple(h for h in HOOKS if cls.overrides(h))


HOOKS = (
    "init_state", "init_memo", "plan", "build", "placement", "groups", "adopt", "batch",
    "objective", "after_step", "local_step", "encode", "decode", "weigh", "reduce", "step",
    "refine", "evaluate", "calibrate", "transform", "export",
)  # fmt: skip
"""All hooks, in the order in which a round meets them."""
