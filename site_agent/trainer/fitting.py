"""Local training: one round's work at a site, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from protos.errors import TaskFailed
from protos.faults import reach
from protos.plan import Plan
from site_agent.pipe import Progress
from site_agent.trainer.batches import Batches
from site_agent.trainer.checkpoint import Checkpoint, Checkpoints
from site_agent.trainer.device import widened
from site_agent.trainer.inner_optimizer import make_optimizer, restore, saved, set_rate
from site_agent.trainer.pace import Pace
from site_agent.trainer.randomness import (
    random_state,
    restore_random,
    seed_epoch,
    step_generator,
)
from site_agent.trainer.watch import Watch
from site_agent.trainer.workload import Workload
from strategies.context import Step
from strategies.schedule import learning_rate
from strategies.stack import State
from strategies.task import Training


@dataclass
class Fitted:
    """What a round of local training gives besides the model.

    Attributes:
        state: State of the strategies.
        optimizer: The inner optimizer, with its state.
        examples: Training examples at the site; of partial work, its share of them (`share_of`).
        steps: Steps made.
        epochs: Passes made over the data.
        losses: Mean loss of the first and of the last pass (the whole round if it is shorter).
        partial: It was cut before all of the work was done.
    """

    state: State
    optimizer: Optimizer
    examples: int
    steps: int
    epochs: float
    losses: tuple[float, float]
    partial: bool = False


def share_of(examples: int, progress: float) -> int:
    """The weight of partial work: the examples times the part of the work that was done, 1 at least.

    Nothing done would weigh nothing, as if the site were missing; all of it weighs what it always does.
    """
    return max(1, round(examples * min(1.0, progress)))


@dataclass
class Losses:
    """The losses of a round; they stay on the device until somebody looks.

    Attributes:
        site: For the error.
        values: One a step, as far as they were looked at.
    """

    site: str
    values: list[float] = field(default_factory=list)
    _unread: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor) -> None:
        """The loss of a step."""
        self._unread.append(loss.detach())

    def look(self) -> None:
        """Fetch what was added.

        Raises:
            TaskFailed: One is not a finite number; says which.
        """
        if not self._unread:
            return
        fetched = torch.stack([v.reshape(()).float() for v in self._unread]).tolist()
        self._unread.clear()
        for value in fetched:
            if not math.isfinite(value):
                step = len(self.values) + 1
                raise TaskFailed(
                    f"site {self.site}: the loss became {value} at step {step} of the round; a "
                    "lower learning rate, or local.gradient_clip, may help",
                    site=self.site,
                    step=step,
                )
            self.values.append(value)

    def mean(self, first: int, end: int) -> float:
        """Mean over some steps."""
        part = self.values[first:end]
        return math.fsum(part) / len(part)


def fit(
    work: Workload,
    plan: Plan,
    base: dict[str, Tensor],
    state: State,
    optimizer_state: dict[str, Tensor],
    watch: Watch,
    clock: Callable[[], float] = monotonic,
    checkpoints: Checkpoints | None = None,
) -> Fitted:
    """Train the loaded model as a plan says.

    With checkpoints it goes on where the same work was saved half-way, to the same bits on a CPU.
    A task's own loop begins anew. If the link has had enough (`Watch.enough`) it ends behind a step, with
    what is done, but not before the first one.

    Args:
        work: Task and model; the model holds what was adopted of the base.
        plan: How much, how fast, in which stack.
        base: Shared tensors of the base, on the CPU.
        state: State of the strategies.
        optimizer_state: Of the last round, where the plan keeps it.
        watch: The line to the link.
        clock: Seconds.
        checkpoints: Where training is saved half-way; None for nowhere.

    Raises:
        TaskFailed: The loss became NaN or infinite, or there is no data.
        JobCancelled: The link does not want it any more.
    """
    if work.task.owns_loop():
        return _by_task(work, plan, state, watch)
    batches = work.batches("train", plan.batch_size)
    if batches is None:
        raise TaskFailed(f"site {work.site}: the task has no training data")
    pace = Pace(plan.work, plan.schedule, batches.per_epoch, clock)
    on_device = {name: value.to(work.device.torch) for name, value in base.items()}
    own = {t.name: work.state()[t.name].clone() for t in work.own}
    optimizer = make_optimizer(plan.optimizer, work.model, plan.schedule.lr)
    if plan.optimizer.keep_state:
        restore(optimizer, work.model, optimizer_state)
    owned = bool(work.stack.having("local_step"))
    losses, scratch = Losses(work.site), dict[str, Any]()
    examples, resumed = 0, checkpoints.read() if checkpoints is not None else None
    if resumed is not None:
        state, examples = _resume(work, batches, pace, optimizer, losses, resumed)
        reach("train.resumed")
    started, before = clock(), examples

    def save(epoch_ended: bool) -> None:
        if checkpoints is None or pace.finished() or not checkpoints.due(epoch_ended):
            return
        losses.look()
        random, others = random_state(work.device.torch)
        about = {
            "pace": pace.saved(),
            "losses": losses.values,
            "random": others,
            "examples": examples,
            "data": [batches.examples, batches.per_epoch],
        }
        checkpoints.write(
            Checkpoint(work.trained(), saved(optimizer, work.model), state, random, about)
        )

    def report() -> None:
        losses.look()
        elapsed = clock() - started
        recent = losses.values[-(batches.per_epoch or 100) :]
        watch.tell(
            Progress(
                job=watch.job,
                state="TRAINING",
                done=pace.done,
                planned=pace.planned,
                unit=pace.unit,
                loss=math.fsum(recent) / len(recent) if recent else None,
                learning_rate=pace.current,
                examples_per_s=(examples - before) / elapsed if elapsed > 0 else 0.0,
            )
        )

    work.model.train()
    report()

    def ends() -> bool:
        return pace.finished() or (watch.enough and pace.steps > 0)

    while not ends():
        seed_epoch(plan, pace.epoch)
        reach("train.epoch.begun")
        steps_before = pace.steps - pace.in_epoch
        for batch in _rest(work, batches.epoch(plan, pace.epoch), pace.in_epoch, resumed):
            watch.check()
            rate = pace.rate()
            set_rate(optimizer, rate)
            inputs, targets = work.task.unpack(batch)
            step = Step(
                plan=plan,
                task=work.task,
                model=work.model,
                base=on_device,
                optimizer=optimizer,
                index=pace.steps,
                total=pace.total,
                epoch=pace.epoch,
                learning_rate=rate,
                generator=step_generator(plan, pace.steps),
                inputs=inputs,
                targets=targets,
                base_model_factory=lambda: work.base_copy(base, own),
                scratch=scratch,
            )
            work.stack.batch(step)
            if owned:
                loss, state = work.stack.local_step(step, state)
            else:
                loss = _step(work, plan, step, state)
            state = work.stack.after_step(step, state)
            losses.add(loss)
            examples += _count(targets)
            pace.step(work.task.tokens(targets) if plan.work.tokens else 0)
            reach("train.stepped")
            if watch.due:
                report()
            if ends():
                break
            save(epoch_ended=False)
        else:
            pace.end_epoch(batches.per_epoch)
            if pace.steps == steps_before:
                raise TaskFailed(f"site {work.site}: the task's training data gave no batch")
            reach("train.epoch.ended")
            save(epoch_ended=True)
        resumed = None
    partial, progress = not pace.finished(), pace.progress
    work.device.synchronize()
    losses.look()
    report()
    if batches.examples is not None:  # else it is a stream, and what was seen of it is counted
        examples = share_of(batches.examples, progress) if partial else batches.examples
    passed = min(batches.per_epoch or pace.steps, pace.steps)
    return Fitted(
        state=state,
        optimizer=optimizer,
        examples=examples,
        steps=pace.steps,
        epochs=pace.epochs,
        losses=(losses.mean(0, passed), losses.mean(pace.steps - passed, pace.steps)),
        partial=partial,
    )


def _resume(
    work: Workload,
    batches: Batches,
    pace: Pace,
    optimizer: Optimizer,
    losses: Losses,
    resumed: Checkpoint,
) -> tuple[State, int]:
    """Put everything where a checkpoint has it; gives the strategies' state and the samples seen."""
    work.retrain(resumed.model)
    optimizer.state.clear()
    restore(optimizer, work.model, resumed.optimizer)
    pace.restore(resumed.about["pace"])
    losses.values[:] = resumed.about["losses"]
    batches.examples, batches.per_epoch = resumed.about["data"]
    return resumed.strategies, int(resumed.about["examples"])


def _rest(
    work: Workload, batches: Iterator[Any], passed: int, resumed: Checkpoint | None
) -> Iterator[Any]:
    """The batches of an epoch after those that were trained on before the trainer was killed."""
    for _ in range(passed):
        next(batches, None)
    if passed and resumed is not None:
        restore_random(work.device.torch, resumed.random, resumed.about["random"])
    yield from batches


def _by_task(work: Workload, plan: Plan, state: State, watch: Watch) -> Fitted:
    """The task's own loop, within the same cycle, seeds and report."""
    data = work.loaded.dataset("train")
    if data is None:
        raise TaskFailed(f"site {work.site}: the task has no training data")
    told, progress = False, 0.0

    def enough() -> bool:
        nonlocal told
        told = told or watch.enough
        return told

    def report(done: float, loss: float) -> None:
        nonlocal progress
        watch.check()
        progress = done / plan.work.amount
        if not math.isfinite(loss):
            raise TaskFailed(f"site {work.site}: the loss became {loss}", site=work.site)
        if watch.due:
            watch.tell(
                Progress(
                    job=watch.job,
                    state="TRAINING",
                    done=done,
                    planned=plan.work.amount,
                    unit=plan.work.unit,
                    loss=loss,
                    learning_rate=learning_rate(plan.schedule, min(1.0, progress)),
                )
            )

    seed_epoch(plan, 0)
    work.model.train()
    trained = work.task.fit(
        Training(
            plan=plan,
            model=work.model,
            data=data,
            device=work.device.torch,
            rate=lambda u: learning_rate(plan.schedule, u),
            report=report,
            enough=enough,
        )
    )
    work.device.synchronize()
    partial = told and progress < 1.0
    return Fitted(
        state=state,
        optimizer=make_optimizer(plan.optimizer, work.model, plan.schedule.lr),
        examples=share_of(trained.examples, progress) if partial else trained.examples,
        steps=trained.steps,
        epochs=trained.epochs,
        losses=(trained.loss, trained.loss),
        partial=partial,
    )


def _step(work: Workload, plan: Plan, step: Step, state: State) -> Tensor:
    """Forward, loss, objective, backward, clip, optimizer."""
    with work.device.autocast():
        step.outputs = work.task.forward(work.model, step.inputs)
    step.outputs = widened(step.outputs)
    loss = work.stack.objective(work.stack.loss(step), step, state)
    for group in step.optimizer.param_groups:  # as zero_grad does, without what torch wraps it in
        for parameter in group["params"]:
            parameter.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    if plan.gradient_clip is not None:
        torch.nn.utils.clip_grad_norm_(work.model.parameters(), plan.gradient_clip)
    step.optimizer.step()
    return loss


def _count(targets: Any) -> int:
    if isinstance(targets, Tensor):
        return len(targets) if targets.dim() else 1
    try:
        return len(targets)
    except TypeError:
        return 1
