"""What a strategy is: a frozen, typed value whose hooks change one thing each.

Its **fields are the hyperparameters, its hooks are what the paper changes, its state is passed in
and out.** Both halves of a method, site and orchestrator, are in one class in one file. Every hook
has a default that changes nothing. Hooks marked *tile* are pure and see one tile of the flat model
(at most `protos.manifest.TILE_ELEMENTS` elements), never a whole model.

The update is **base - local**: what has to be subtracted from the base (a pseudo-gradient).

Order in a stack: hooks run in the order of the run file, ``decode`` in reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from protos.manifest import Placement, Tile
from protos.plan import Plan
from strategies.context import (
    Calibration,
    Cohort,
    Draft,
    Memo,
    Moment,
    Refinement,
    RoundSummary,
    SidePayload,
    Step,
    Tensors,
    Update,
)
from strategies.task import Task

__all__ = [
    "HOOKS", "Calibration", "Cohort", "Draft", "Family", "Memo", "Moment", "Need", "Refinement",
    "RoundSummary", "SidePayload", "Step", "Strategy", "Tensors", "Update",
]  # fmt: skip

Need = Literal[
    "labels",  # targets are class indices
    "logits",  # outputs are logits (batch, classes)
    "site id",  # tells sites apart
    "proxy data",  # Task.proxy_data at the orchestrator
    "student",  # Task.student at the orchestrator: a smaller model for deployment
    "teacher",  # Task.teacher: a frozen model that embeds inputs
    "orchestrator task",  # the task stands in [tasks] of the orchestrator's configuration
    "our training loop",  # the task does not own its loop
    "individual updates",  # sees single contributions: conflicts with secure aggregation
    "val data",  # Task.val_data at the sites
    "embedding",  # Task.embedding names the layer whose output embeds a sample
    "norms",  # reduction pass 1: norms of the updates
    "gram",  # reduction pass 1: the (n, n) Gram matrix of the updates
]

Family = Literal[
    "averaging", "outer", "local", "robust", "compression", "privacy", "calibration",
    "distillation", "recipes", "layers", "metric", "trees", "augmentation", "labels",
    "adaptation", "condensation", "compaction", "search", "architectures",
]  # fmt: skip


class Strategy(BaseModel):
    """Base of all strategies. See the module's page for the rules.

    Class attributes:
        name: Key in run files; lower case with underscores.
        family: The folder whose question it answers.
        summary: One line.
        paper: Authors, title, year, identifier; empty if there is none.
        needs: What it reads or requires; checked at launch where the orchestrator has the task,
            else before a site trains. `needed` says it of one instance.
        warning: What an operator has to weigh before it is used; said at launch.
        degenerate: Hyperparameters with which it changes nothing, to the bit, so that it equals
            the stack without it.
        wire_codec: Whether it sets ``Update.blocks`` and has ``decode`` (at most one per stack).
        absolute_weights: The sum of the weights that its ``weigh`` gives means something (a
            step that is longer or shorter than the mean), so they are used as they are.
        blends_labels: After its ``batch`` a sample belongs to several classes, so that
            ``step.targets`` alone is no longer the truth: nothing that reads labels while it
            trains may stand in one stack with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    family: ClassVar[Family]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    warning: ClassVar[str] = ""
    degenerate: ClassVar[Mapping[str, Any] | None] = None
    wire_codec: ClassVar[bool] = False
    absolute_weights: ClassVar[bool] = False
    blends_labels: ClassVar[bool] = False

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
        """What of the base is taken. ``base`` holds the shared tensors that will be loaded.

        The dictionary that it gives may also name tensors placed at the site: they replace what
        the site had stored (a counter is reset, a copy follows the base).
        """
        return base, state

    def batch(self, step: Step) -> None:
        """Change ``step.inputs`` and ``step.targets`` (augmentation)."""

    def loss(self, step: Step) -> Tensor:
        """The loss of the outputs against the targets, in place of the task's; at most one per stack.

        What only adds a term to the loss, whichever it is, does so in ``objective``.
        """
        return step.task.loss(step.outputs, step.targets)

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """The local loss: what comes before it, and a term of its own; ``step.outputs`` is there."""
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
        """The wire: compression, clipping, masks, side payloads.

        A wire codec sets ``update.blocks`` and may take what it encoded out of ``update.tensors``;
        a strategy that wants to see the tensors stands before it. Tensors of the state may be
        changed in place: what is given back replaces them, and after an error nothing is kept.
        """
        return update, state

    # -- orchestrator, reduction ---------------------------------------------------------------

    def decode(self, block: bytes, tile: Tile) -> Tensor:
        """*tile*: the inverse of a wire codec: (tile elements,) fp32. Bounded by the tile's size."""
        raise NotImplementedError

    def weigh(self, weights: Tensor, cohort: Cohort) -> Tensor:
        """(n,) float64 -> (n,) or (n, groups) float64, >= 0.

        They need not sum to one: they are normalised, unless ``absolute_weights``. The first of
        a stack gets the example counts divided by their sum.
        """
        return weights

    def reduce(self, stack: Tensor, weights: Tensor, tile: Tile) -> Tensor:
        """*tile*: (n, elements), (n,) -> (elements,). At most one per stack; default weighted mean."""
        raise NotImplementedError

    def step(
        self, delta: Tensor, base: Tensor, state: dict[str, Tensor], tile: Tile, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """*tile*: outer optimizer, noise. Gives what is subtracted from the base, and the next state.

        The result has the dtype of ``delta``, and a state the dtype that ``init_state`` gave it.
        """
        return delta, state

    # -- orchestrator, after the reduction -------------------------------------------------------

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Change ``refinement.model`` in place (distillation, search); gives numbers to report."""
        raise NotImplementedError

    # -- assess ---------------------------------------------------------------------------------

    def evaluate(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Site: extra statistics of some val samples, (n, classes) and (n,) -> name to tensor.

        Sums over the samples: those of all batches of all sites are added. A strategy that has
        ``rate`` sees samples of val and of test, and outputs after the stack's calibration map.
        """
        return {}

    def release(self, sums: Tensors) -> Tensors:
        """Site: what leaves of the sums of an assessment, all sets' and strategies' by name."""
        return sums

    def calibrate(self, sums: Tensors) -> Calibration | None:
        """Orchestrator: a calibration map from the pooled sums of ``evaluate`` over val.

        ``sums["sites"]`` is the number of sites that have sent some.
        """
        return None

    def transform(self, outputs: Tensor, parameters: Memo) -> Tensor:
        """Either: outputs after the calibration map, (n, classes)."""
        return outputs

    def rate(self, sums: Tensors, parameters: Memo) -> dict[str, float]:
        """Orchestrator: scores of a set of samples, from the sums of ``evaluate`` over it.

        For a strategy whose map tells something of the outputs without changing them (sets that
        hold the right class): asked for val and test, pooled and per site, with the parameters of
        its map of this round.
        """
        return {}

    # -- export ---------------------------------------------------------------------------------

    def export(self, model: nn.Module) -> nn.Module:
        """What is deployed, of a model that holds a committed round; asked by ``farflung export``.

        In evaluation mode its outputs have to be those of the model as it was: scores and
        calibration map are theirs. Runs in a child process, like ``refine``.
        """
        return model

    # -- helpers --------------------------------------------------------------------------------

    @property
    def needed(self) -> frozenset[Need]:
        """``needs`` with these hyperparameters, some of which may make one needless."""
        return self.needs

    @property
    def lasts(self) -> bool:
        """Whether what ``encode`` gives can be added to a newer model than the one that it was made of.

        A difference to its own base can; what describes the site's model cannot. Where not, a run with
        ``[cohort] stale`` is refused at launch. Override it where ``encode`` sends nothing beside the
        update.
        """
        return self.wire_codec or not self.overrides("encode")

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
    "loss", "objective", "after_step", "local_step", "encode", "decode", "weigh", "reduce", "step",
    "refine", "evaluate", "release", "calibrate", "transform", "rate", "export",
)  # fmt: skip
"""All hooks, in the order in which a round meets them."""
