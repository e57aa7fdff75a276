"""A plan: what the orchestrator asks one site to do in one attempt of one round.

A plan is frozen, written to the ledger before it goes out, and identified by (run, round,
attempt). Its ``work_digest`` covers only what decides the result, so that work finished for an
abandoned attempt counts in the next one without training again.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from protos.digest import canonical, digest
from protos.errors import ManifestInvalid

MAX_PLAN_BYTES = 4 << 20

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _finite(value: Any) -> Any:
    """The value, if no number in it is NaN or infinite: such a one has no canonical form."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no meaning here; numbers must be finite")
    for inner in value.values() if isinstance(value, dict) else ():
        _finite(inner)
    for inner in value if isinstance(value, list | tuple) else ():
        _finite(inner)
    return value


Parameters = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Free parameters: whatever JSON has a form for."""


class Frozen(BaseModel):
    """Base of the documents on the wire: frozen, unknown keys refused, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def encode(self) -> bytes:
        """Canonical JSON."""
        return canonical(self.model_dump(mode="json"))


class Work(Frozen):
    """How much a site trains: exactly one of the four.

    Attributes:
        epochs: Passes over the site's training data, > 0; a fraction ends within an epoch.
        steps: Optimizer steps, >= 1.
        tokens: Elements of the targets seen, >= 1.
        seconds: Wall seconds of training, > 0 (the result then depends on the machine).
    """

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Work:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of epochs, steps, tokens, seconds")
        return self

    @property
    def unit(self) -> str:
        """Which of the four it is."""
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def amount(self) -> float:
        """How much, in ``unit``."""
        return float(next(iter(self.model_dump(exclude_none=True).values())))


class Schedule(Frozen):
    """The learning rate inside one round, restarted at every round (CLR).

    With u in [0, 1) the part of the round that is done (algorithms: exp ``lr * decay**u``;
    cosine ``floor + (lr - floor)(1 + cos(pi u))/2`` with ``floor = lr * decay``; triangular
    ``lr * decay`` up to ``lr`` at u = 1/2 and down again; constant ``lr``).

    Attributes:
        shape: exp, cosine, triangular or constant.
        lr: Peak learning rate, > 0.
        decay: Ratio of the lowest to the peak rate, in (0, 1].
        granularity: Whether u moves with every step or every epoch.
    """

    shape: Literal["exp", "cosine", "triangular", "constant"] = "constant"
    lr: float = Field(gt=0)
    decay: float = Field(1.0, gt=0, le=1)
    granularity: Literal["step", "epoch"] = "step"


class OptimizerChoice(Frozen):
    """The inner optimizer: a name and its options.

    Attributes:
        name: sgd, adam or adamw.
        momentum: SGD's momentum, in [0, 1).
        nesterov: SGD with Nesterov's momentum.
        weight_decay: >= 0.
        betas: Adam's decay rates.
        keep_state: Keep the optimizer's state at the site between rounds.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    keep_state: bool = False


class TaskChoice(Frozen):
    """Which task, and its parameters of the run; the code is the site's own.

    Attributes:
        name: As the sites' configuration has it.
        params: Fields of the task's ``Params``.
    """

    name: Name
    params: Parameters = {}


class StrategyChoice(Frozen):
    """One strategy of the stack.

    Attributes:
        name: As `farflung strategies` lists it.
        params: Its hyperparameters; in a run file they stand beside the name.
        rounds: [a, b): the rounds from a on in which it acts, up to b, or to the end without b; none
            for all.
    """

    name: Name
    params: Parameters = {}
    rounds: tuple[int, int | None] | None = None

    @field_validator("rounds")
    @classmethod
    def _in_order(cls, value: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
        if value is not None and not 0 <= value[0] < (math.inf if value[1] is None else value[1]):
            raise ValueError("rounds = [a, b) needs 0 <= a < b")
        return value


class Plan(Frozen):
    """What one site is asked to do.

    Attributes:
        run: Id of the run.
        round: 1, 2, …; 0 for the exchange that makes the first base.
        attempt: 1, 2, …
        kind: train: fetch, train, contribute. init: build the task's model and contribute its
            weights as they are. assess: evaluate a candidate and contribute sums. baseline: the same
            for the average before plug-ins changed it. reassess: the same with the calibration maps
            that were fitted to the first sums.
        site: To whom it is addressed.
        base: Digest of the model's index; empty for init.
        manifest: Digest of the shared part's manifest; empty for init.
        accepts: Digests of bases, the round's own first, then older ones: work that the site was asked
            for in an earlier round counts for this plan, in place of its own, if it came from one of
            them (`takes`).
        frozen: Digest of the index of the frozen part; empty if there is none.
        groups: Tensor groups covered; None for all.
        task: Which task.
        stack: The strategies that are active in this round, in the order of the run file.
        payload: What each strategy's ``plan`` hook gives its site half, by strategy name.
        work: How much to train.
        schedule: Learning rate inside the round.
        optimizer: Inner optimizer.
        batch_size: Samples of a step, >= 1.
        seed: Of the run; all randomness at a site is a function of it, the site, the round and the step.
        gradient_clip: Largest global norm of a gradient; None for no clipping.
        last_counted: Digest of the site's last contribution in the history of the base; the
            site starts from the state that it stored under it. Empty: from scratch.
        deadline_s: Seconds from the offer to the deadline; informs, the orchestrator's clock decides.
        calibration: Maps fitted so far (assess), by strategy name.
    """

    run: Name
    round: int = Field(ge=0)
    attempt: int = Field(ge=1)
    kind: Literal["train", "init", "assess", "baseline", "reassess"] = "train"
    site: Name
    base: Digest | Literal[""] = ""
    manifest: Digest | Literal[""] = ""
    accepts: tuple[Digest, ...] = ()
    frozen: Digest | Literal[""] = ""
    groups: tuple[str, ...] | None = None
    task: TaskChoice
    stack: tuple[StrategyChoice, ...] = ()
    payload: Parameters = {}
    work: Work
    schedule: Schedule
    optimizer: OptimizerChoice = OptimizerChoice()
    batch_size: int = Field(64, ge=1)
    seed: int = Field(0, ge=0, lt=1 << 63)
    gradient_clip: float | None = Field(None, gt=0)
    last_counted: Digest | Literal[""] = ""
    deadline_s: float = Field(3600.0, gt=0)
    calibration: Parameters = {}

    @property
    def id(self) -> str:
        """(run, round, attempt, kind) as text; with the site it names one piece of work."""
        return f"{self.run}/{self.round}/{self.attempt}/{self.kind}"

    @property
    def work_digest(self) -> str:
        """Digest of what decides the result; equal for attempts that ask for the same work."""
        decides = self.model_dump(mode="json", exclude={"attempt", "deadline_s", "accepts"})
        return digest(canonical(decides))

    def takes(self, base: str) -> bool:
        """Whether work for an earlier round, done from that base, counts for this plan."""
        return len(self.accepts) > 1 and base in self.accepts

    @classmethod
    def decode(cls, data: bytes) -> Plan:
        """The plan of some received bytes.

        Raises:
            ManifestInvalid: Too large, not canonical, or a key is missing, unknown or out of range.
        """
        if len(data) > MAX_PLAN_BYTES:
            raise ManifestInvalid(f"plan of {len(data)} bytes exceeds {MAX_PLAN_BYTES}")
        try:
            plan = cls.model_validate_json(data)
        except ValidationError as error:
            raise ManifestInvalid(f"plan: {first_problem(error)}") from None
        if plan.encode() != data:
            raise ManifestInvalid("plan: not in canonical form")
        return plan


def round_of(plan_id: str) -> int:
    """Which round a plan is of; -1 where the text names none."""
    parts = plan_id.split("/")
    return int(parts[1]) if len(parts) == 4 and parts[1].isdecimal() else -1


_TAG = re.compile(r"int|.*\[.*", re.DOTALL)
"""Parts of a place that are pydantic's, for the alternatives of a union, and no keys."""


def problem_key(error: ValidationError) -> str:
    """The path of the key of a validation's first problem; empty for the document itself."""
    place = error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"]
    return ".".join(str(part) for part in place if not _TAG.fullmatch(str(part)))


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation: the key's path, and what is wrong with it."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    what = problem["msg"].removeprefix("Value error, ")
    more = error.error_count() - 1
    where = problem_key(error) or "(top)"
    return f"{where}: {what}" + (f" (and {more} more)" if more else "")
