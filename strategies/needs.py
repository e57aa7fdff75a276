"""What strategies need of a task, and whether it is there: asked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from protos.errors import ConfigInvalid
from strategies.protocol import Need, Strategy
from strategies.task import Task


class Met(NamedTuple):
    """How to tell whether a task meets a need.

    Attributes:
        by: Whether a task does.
        remedy: What to do with one that does not.
    """

    by: Callable[[Task], bool]
    remedy: str


AT_BOTH_ENDS: Mapping[Need, Met] = {
    "labels": Met(
        lambda task: "classification" in task.features,
        'its targets have to be class indices; say "classification" in Task.features if they are',
    ),
    "logits": Met(
        lambda task: bool({"classification", "logits"} & task.features),
        'its outputs have to be logits; say "logits" in Task.features if they are',
    ),
    "embedding": Met(
        lambda task: bool(task.embedding),
        "name the layer whose output embeds a sample in Task.embedding",
    ),
    "teacher": Met(lambda task: _has(task, "teacher"), "let Task.teacher give a frozen model"),
    "val data": Met(
        lambda task: _has(task, "val_data"), "let Task.val_data give some at the sites"
    ),
    "our training loop": Met(
        lambda task: not task.owns_loop(),
        "it owns its training loop; take Task.fit out of it",
    ),
}
"""Needs that both ends can look for: whether a task meets one, and what to do if it does not."""

AT_THE_ORCHESTRATOR: Mapping[Need, Met] = {
    **AT_BOTH_ENDS,
    "proxy data": Met(
        lambda task: task.proxy_data() is not None,
        "let Task.proxy_data give some at the orchestrator (parameters of the run, or settings in "
        '[tasks], may have to ask for it), or choose proxy = "folder:/PATH", "condensed" or '
        '"generated"',
    ),
    "student": Met(
        lambda task: task.student() is not None, "let Task.student give a smaller model"
    ),
}
"""The same at the orchestrator, which alone has a proxy and a student."""


def check_needs(
    strategies: Sequence[Strategy],
    task: Task,
    known: Mapping[Need, Met],
) -> None:
    """See that a task has what strategies need.

    Args:
        strategies: Those of the run.
        task: An instance at one of the ends.
        known: Which needs can be looked for there.

    Raises:
        ConfigInvalid: It lacks something; says what, for which strategy, and what to do.
    """
    for strategy in strategies:
        lacking = [n for n in sorted(strategy.needed & known.keys()) if not known[n].by(task)]
        if lacking:
            features = ", ".join(sorted(task.features)) or "none"
            raise ConfigInvalid(
                f"strategy {strategy.name}: it needs {' and '.join(lacking)}, which the task "
                f"{type(task).__name__} does not have (its features: {features}); remove the "
                f"strategy, or change the task: {'; '.join(known[n].remedy for n in lacking)}",
                key="strategy",
                name=strategy.name,
            )


def _has(task: Task, hook: str) -> bool:
    return getattr(type(task), hook) is not getattr(Task, hook)
