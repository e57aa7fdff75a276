"""Configuration of a run: a run file, ``run.toml``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from orchestrator.config import Section, parse
from protos.digest import canonical, digest
from protos.plan import Name, OptimizerChoice, StrategyChoice, TaskChoice, Work


class Init(Section):
    """Where the first base comes from.

    Attributes:
        start: "task" (the orchestrator builds it; needs the task in [tasks]), "site:NAME",
            "FILE.safetensors", "RUN@ROUND" or "RUN@best". Key ``from`` in the file.
        digest: Of the file's bytes in the store; set at launch, not by people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    start: str = Field("task", alias="from", min_length=1)
    digest: str = ""


class CohortSection(Section):
    """Who takes part.

    Attributes:
        sites: Names, or "all" sites enrolled when a round is planned.
        quorum: Contributions without which a round isn't closed, or "all".
        deadline_s: The only time-out that a user sets; > 0. What a site spends preparing (its trainer
            starts, the task loads) does not run against it, up to as long again.
        partial: Whether a site that is still training shortly before the deadline contributes what it
            has done by then. It weighs its examples times the part of the work that was done.
        stale: From how many rounds back work still counts. A site that is not done when a round is closed
            goes on, and what it has then counts in the round that is open when it comes, in place of its
            work for that one, with its weight divided by the root of one plus the models that were made
            meanwhile. 0: it is too late. Needs a quorum below "all", or no round closes without a site.
        attempts: Attempts of one round before the run is paused.
    """

    sites: tuple[Name, ...] | Literal["all"] = "all"
    quorum: int | Literal["all"] = "all"
    deadline_s: float = Field(3600.0, gt=0)
    partial: bool = False
    stale: int = Field(0, ge=0, le=100)
    attempts: int = Field(3, ge=1, le=100)

    @field_validator("quorum")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError('quorum must be at least 1, or "all"')
        return value

    @model_validator(mode="after")
    def _reachable(self) -> CohortSection:
        if self.stale and self.quorum == "all":
            raise ValueError(
                'stale needs a quorum below "all": with "all" no round is closed without a site'
            )
        if self.sites != "all":
            if len(set(self.sites)) != len(self.sites) or not self.sites:
                raise ValueError("sites must be different names, at least one")
            if isinstance(self.quorum, int) and self.quorum > len(self.sites):
                raise ValueError(
                    f"quorum {self.quorum} can't be reached by {len(self.sites)} sites"
                )
        return self


class LocalSection(Section):
    """What a site does in a round, before strategies change it.

    Attributes:
        work: epochs, steps, tokens or seconds.
        batch_size: Samples of a step.
        lr: Peak learning rate.
        optimizer: Inner optimizer.
        gradient_clip: Largest global gradient norm.
    """

    work: Work = Work(epochs=5)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(0.1, gt=0)
    optimizer: OptimizerChoice = OptimizerChoice()
    gradient_clip: float | None = Field(None, gt=0)


class AssessSection(Section):
    """Whether candidates are evaluated, and by whom.

    Attributes:
        every: Assess every n-th round (and the last one) at the sites; 0: never.
        holdout: Evaluate what they assess on the orchestrator's own data too: ``val_data`` and
            ``test_data`` of its task. Tensors that are placed at the sites are not theirs there.
    """

    every: int = Field(1, ge=0)
    holdout: bool = False


class GateSection(Section):
    """When a round's model is held instead of committed, and what becomes of it then.

    A held round keeps its candidate and its closed set: neither decision trains anything again.

    Attributes:
        tolerance: How much worse a round's model may be, on the sites' validation data or on the
            orchestrator's (``assess.holdout``), than the last one that was assessed there: the
            accuracy lost, as a share (0.01 is one point), or, of a task without accuracy, the share
            by which the loss grows. None: it is not judged.
        norm: A contribution whose update's norm is more than this many times the median of its
            cohort (of three or more) is an outlier.
        cosine: One whose update has a smaller cosine than this to the sum of the others' is an
            outlier (cohorts of three or more; costs a pass over all contributions).
        on_hold: "reject": the round is dropped, and the next one starts from the last good model.
            "release": it is committed all the same, and its reason noted. "wait": the run is
            paused until `farflung release` or `farflung reject`. After three held rounds in a row
            the run waits in any case. Rounds held by ``on_error`` are treated alike.
    """

    tolerance: float | None = Field(None, ge=0)
    norm: float | None = Field(None, gt=1)
    cosine: float | None = Field(None, ge=-1, lt=1)
    on_hold: Literal["reject", "release", "wait"] = "reject"


class RunConfig(Section):
    """A run file.

    Attributes:
        name: Of the run; its id is made of it.
        rounds: How many.
        seed: Of all randomness of the run, at every site.
        on_error: Whether a round goes on without a plug-in that fails, or is held.
        tolerance: How much worse plug-ins may make the average at the sites' validation data: the
            accuracy lost, as a share (0.01 is one point), or, of a task without accuracy, the share
            by which the loss grows. One that costs more counts as failed. None: nobody judges.
        references: Scores to draw beside the run's own, such as ``centralised = 0.881`` (accuracy)
            or ``"centralised.test.nll" = 0.36``; nothing depends on them.
    """

    name: Name
    rounds: int = Field(ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, lt=1 << 62)
    task: TaskChoice
    init: Init = Init()
    cohort: CohortSection = CohortSection()
    local: LocalSection = LocalSection()
    assess: AssessSection = AssessSection()
    strategy: tuple[StrategyChoice, ...] | None = None
    on_error: Literal["skip", "hold"] = "skip"
    tolerance: float | None = Field(None, ge=0)
    gate: GateSection = GateSection()
    references: dict[str, float] = Field({})

    @field_validator("strategy", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """[[strategy]] tables carry name, rounds, and the hyperparameters beside them."""
        if not isinstance(value, list):
            return value
        out = []
        for row in value:
            if isinstance(row, str):
                row = {"name": row}
            if isinstance(row, dict) and "params" not in row:
                params = {k: v for k, v in row.items() if k not in ("name", "rounds")}
                kept = {k: v for k, v in row.items() if k in ("name", "rounds")}
                row = {**kept, "params": params}
            out.append(row)
        return out

    @model_validator(mode="after")
    def _judged(self) -> RunConfig:
        if self.gate.tolerance is not None and self.assess.every == 0:
            raise ValueError("gate.tolerance needs assessed rounds: assess.every must not be 0")
        if self.assess.holdout and self.assess.every == 0:
            raise ValueError("assess.holdout needs assessed rounds: assess.every must not be 0")
        return self

    @property
    def stack(self) -> tuple[StrategyChoice, ...]:
        """The strategies: co-learning where the file says nothing, FedAvg for an empty list."""
        if self.strategy is None:
            return (StrategyChoice(name="co_learning"),)
        return self.strategy

    @property
    def digest(self) -> str:
        """Digest of the resolved configuration."""
        return digest(canonical(self.resolved))

    @property
    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as JSON."""
        out = self.model_dump(mode="json", by_alias=True)
        out["strategy"] = [c.model_dump(mode="json") for c in self.stack]
        return out

    @classmethod
    def from_resolved(cls, document: dict[str, Any]) -> RunConfig:
        """The configuration that a ledger's entry holds."""
        return cls.model_validate(document)


def parse_run(text: str, where: str = "run.toml") -> RunConfig:
    """The run configuration of a TOML document.

    Raises:
        ConfigInvalid: Not TOML, or a key is missing, unknown or out of range.
    """
    return parse(RunConfig, text, where)
