"""What hooks are given: views of a round, from its plan to its calibration.

Values that go through a stack are frozen and replaced (`Draft.but`); what a site or the
orchestrator works on (`Step`, `Update`, `Refinement`) is changed in place by whoever owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from protos.contribution import Merge
from protos.digest import Bytes, canonical, digest
from protos.manifest import Tile
from protos.plan import OptimizerChoice, Plan, Schedule, Work
from strategies.task import Task

Tensors = Mapping[str, Tensor]
"""Name to tensor."""

Memo = dict[str, Any]
"""A strategy's small memory at the orchestrator: JSON, saved with every committed round."""


def seeded(*parts: object) -> Generator:
    """A generator on the CPU, seeded by a digest of ``parts`` (63 bits)."""
    seed = int(digest(canonical([str(part) for part in parts]))[:16], 16) >> 1
    return Generator().manual_seed(seed)


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
        base_model_factory: Gives a frozen model that holds the base, on the model's device.
        scratch: Objects that live as long as the round at this site (further optimizers, caches
            of logits): one dictionary for all steps of the round. Keys start with the strategy's
            name. Lost when the trainer dies, and training then goes on in mid-round: what can't be
            made again at any step belongs in the state.
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
    scratch: dict[str, Any] = field(default_factory=dict)

    def base_model(self) -> nn.Module:
        """The frozen base model in evaluation mode; made once a round."""
        if "base model" not in self.scratch:
            if self.base_model_factory is None:
                raise LookupError("this step has no base model")
            model = self.base_model_factory()
            self.scratch["base model"] = model.eval().requires_grad_(False)
        return cast(nn.Module, self.scratch["base model"])

    def base_outputs(self) -> Any:
        """Outputs of the frozen base model (evaluation mode, no gradient) for this batch."""
        with torch.no_grad():
            return self.task.forward(self.base_model(), self.inputs)


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
            counters the local value. CPU tensors. Each is computed when it is first asked for and
            stays until it is popped.
        examples: Training examples at the site.
        steps: Optimizer steps made.
        epochs: Passes over the data made.
        payloads: Side payloads by "strategy/name".
        blocks: Set by a wire codec: for each parameter its encoded tiles, in order.
        model: The trained model, in evaluation mode, for statistics over the site's data (class
            sums, feature moments, scores of candidates). Not to be changed.
        task: The task, for its data.
        generator: Seeded by (run seed, site, round); on the CPU.
    """

    tensors: MutableMapping[str, Tensor]
    examples: int
    steps: int
    epochs: float
    payloads: dict[str, SidePayload] = field(default_factory=dict)
    blocks: dict[str, list[Bytes]] | None = None
    model: nn.Module | None = None
    task: Task | None = None
    generator: Generator | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that are parameters of the model, in order."""
        if self.model is None:
            raise LookupError("this update has no model")
        own = dict(self.model.named_parameters(remove_duplicate=False))
        return tuple(n for n in self.tensors if n in own and own[n].is_floating_point())


@dataclass(frozen=True)
class Cohort:
    """The closed set of a round, as ``weigh`` sees it; rows are in site-id order.

    Attributes:
        sites: Site names, n of them.
        examples: Training examples, (n,) float64.
        losses: Mean training loss, (n,) float64, NaN where a site's policy hides it.
        staleness: Models that were made between the contribution's base and this round's, (n,) int64.
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


@dataclass(frozen=True)
class Moment:
    """When a reduction happens, as ``step`` sees it; the same for all tiles of a round.

    Attributes:
        round: Number of the round, from 1.
        seed: Of the run.
        sites: Contributions that were counted.
    """

    round: int
    seed: int
    sites: int

    def generator(self, name: str, tile: Tile) -> Generator:
        """Randomness of one strategy for one tile of this round; on the CPU."""
        return seeded(self.seed, self.round, name, tile.index)


@dataclass
class Refinement:
    """What ``refine`` gets, in a child process without keys or network.

    Attributes:
        round: Number of the round.
        seed: Of the run.
        task: The orchestrator's own instance of the task.
        model: A model that holds the candidate and the tensors placed at the orchestrator, which
            may be changed too: they are kept with the round.
        weights: Weight of each site in the average, by site.
        load_site: Gives one site's full state (base - its update), one site at a time, mapped.
        payloads: Merged side payloads.
        site_payloads: The same as each site sent them: by site, then by name. What a site did not
            send is not there.
        device: Where to compute.
        scratch: A folder for temporary files.
        memo: The strategy's memo as ``plan`` left it; changes are saved with the round.
        files: Files beside the model, by "strategy/name", as the last round left them. A strategy
            may read all of them; what it puts under its own name is kept with the round, given
            out by ``farflung export --of``, and drawn by the page if the page knows it.
    """

    round: int
    seed: int
    task: Task
    model: nn.Module
    weights: Mapping[str, float]
    load_site: Callable[[str], dict[str, Tensor]]
    payloads: Tensors = field(default_factory=dict)
    site_payloads: Mapping[str, Tensors] = field(default_factory=dict)
    device: str = "cpu"
    scratch: Path | None = None
    memo: Memo = field(default_factory=dict)
    files: MutableMapping[str, bytes] = field(default_factory=dict)

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
