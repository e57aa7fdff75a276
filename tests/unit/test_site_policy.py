"""What a site accepts, and what it lets out."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from protos.contribution import Header, PayloadSpec
from protos.errors import ManifestInvalid, PolicyRefused
from protos.plan import Work
from site_agent.config import PolicySection
from site_agent.link.death import cause, crash_place
from site_agent.link.disclosure import Disclosure
from site_agent.link.policy import Policy
from site_agent.pipe import Failed
from site_agent.task_source import TaskSource
from tests.support.sites import TASKS, plan_of

NOON = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def policy(**fields: object) -> Policy:
    sources = {
        "Clouds": TaskSource(str(TASKS), "Clouds"),
        "Gone": TaskSource(str(TASKS.with_name("gone.py")), "Gone"),
    }
    return Policy("north", PolicySection.model_validate(fields), sources)


@pytest.mark.parametrize(
    ("fields", "changes", "key"),
    [
        ({}, {"site": "south"}, "site"),
        ({}, {"task": "Other"}, "tasks"),
        ({}, {"task": "Gone"}, "tasks"),
        ({"strategies": ["fedprox"]}, {"stack": ("co_learning",)}, "policy.strategies"),
        ({"max_epochs": 2}, {"work": Work(epochs=2.5)}, "policy.max_epochs"),
        ({"max_steps": 3}, {}, "policy.max_steps"),
        ({"max_seconds": 1}, {"work": Work(seconds=2)}, "policy.max_seconds"),
        ({"max_tokens": 1}, {"work": Work(tokens=2)}, "policy.max_tokens"),
        ({"hours": "22:00-06:00"}, {}, "policy.hours"),
        ({"init": False}, {"kind": "init"}, "policy.init"),
    ],
)
def test_what_is_refused_names_the_key(
    fields: dict[str, object], changes: dict[str, object], key: str
) -> None:
    with pytest.raises(PolicyRefused, match=r"^site north: ") as caught:
        policy(**fields).check_plan(plan_of(**changes), NOON)
    assert caught.value.facts["key"] == key
    assert key in caught.value.message


def test_what_is_allowed_passes() -> None:
    policy(strategies=["fedprox"], max_steps=4).check_plan(plan_of(stack=("fedprox",)), NOON)
    # Assessing trains nothing, so no bound on work applies.
    policy(max_steps=1).check_plan(plan_of(kind="assess"), NOON)


def header(merge: str, kind: str = "train") -> Header:
    return Header.model_validate(
        {
            "plan_id": "r/1/1/train", "work_digest": "0" * 64, "site": "north", "kind": kind,
            "manifest": "0" * 64, "index": "0" * 64, "examples": 1,
            "payloads": [PayloadSpec(name="s/x", shape=(1,), dtype="float32", merge=merge)],
        }
    )  # fmt: skip


def test_side_payloads_leave_by_their_merge_rule() -> None:
    policy().check_contribution(header("sum"), 10)
    policy().check_contribution(header("keep per site", "init"), 10)
    with pytest.raises(PolicyRefused, match=r"side payload s/x \(\"concatenate\"\)"):
        policy().check_contribution(header("concatenate"), 10)
    policy(side_payloads=["concatenate"]).check_contribution(header("concatenate"), 10)


def test_condensed_examples_stay_unless_the_site_says_so() -> None:
    """Whatever side payloads may leave; and a plan that asks for them costs no training."""
    asking = plan_of(payload={"fyi": {"condensed": True}})
    everything = ["sum", "mean by count", "concatenate", "keep per site"]
    for closed in (policy(), policy(side_payloads=everything)):
        with pytest.raises(PolicyRefused, match="may resemble single samples") as caught:
            closed.check_plan(asking, NOON)
        assert caught.value.facts["key"] == "policy.condensed_data"
        with pytest.raises(PolicyRefused, match="may resemble single samples"):
            closed.check_contribution(header("condensed"), 10)
    allowed = policy(condensed_data=True, side_payloads=[])
    allowed.check_plan(asking, NOON)
    allowed.check_contribution(header("condensed"), 10)
    policy().check_plan(plan_of(payload={"fyi": {"condensed": False}}), NOON)


def test_size() -> None:
    with pytest.raises(PolicyRefused, match="a model of 11 bytes exceeds 10"):
        policy(max_bytes=10).check_size(11, "a model")


# -- disclosure ----------------------------------------------------------------------------------


FAILED = Failed(
    job=1, error="TaskFailed", cause="KeyError", where="task.py:31", message="'patient 4711'"
)


def disclosure(folder: Path, **fields: object) -> Disclosure:
    return Disclosure("north", PolicySection.model_validate(fields), folder / "sent.log")


def test_by_default_an_error_is_its_class_and_place(tmp_path: Path) -> None:
    text = disclosure(tmp_path).failure(FAILED)
    assert text == "site north: the task failed: KeyError at task.py:31"


def test_the_message_leaves_only_if_the_site_says_so(tmp_path: Path) -> None:
    assert "patient 4711" in disclosure(tmp_path, error_text="full").failure(FAILED)


def test_our_own_messages_leave(tmp_path: Path) -> None:
    ours = FAILED.model_copy(update={"ours": True, "message": "site north: tensor w is wrong"})
    assert disclosure(tmp_path).failure(ours) == "site north: tensor w is wrong"
    error = ManifestInvalid("tensor w is wrong")
    assert disclosure(tmp_path).own(error) == "site north: tensor w is wrong"


def test_long_texts_are_cut(tmp_path: Path) -> None:
    long = FAILED.model_copy(update={"ours": True, "message": "x" * 10_000})
    assert len(disclosure(tmp_path).failure(long)) < 1100


def test_metrics_leave_by_name_and_must_be_numbers(tmp_path: Path) -> None:
    metrics = {"train_loss": 0.5, "train_loss_first": 1.0, "ages": 41.0, "bad": math.nan}
    assert disclosure(tmp_path).metrics(metrics) == {
        "train_loss": 0.5, "train_loss_first": 1.0, "ages": 41.0,
    }  # fmt: skip
    some = disclosure(tmp_path, metrics=["train_*"])
    assert some.metrics(metrics) == {"train_loss": 0.5, "train_loss_first": 1.0}
    assert some.loss(0.5) == 0.5
    none = disclosure(tmp_path, metrics=[])
    assert none.metrics(metrics) == {}
    assert math.isnan(none.loss(0.5))
    assert math.isnan(some.loss(None))


def test_what_left_is_noted(tmp_path: Path) -> None:
    disclosure(tmp_path).sent("outcome", message="x")
    (line,) = (tmp_path / "sent.log").read_text().splitlines()
    assert json.loads(line)["sent"] == "outcome"


# -- death ---------------------------------------------------------------------------------------

TRACE = """
Fatal Python error: Segmentation fault

Current thread 0x1 (most recent call first):
  File "/usr/lib/python3.11/ctypes/__init__.py", line 517 in string_at
  File "/opt/site-packages/torch/nn/modules/module.py", line 1 in _call
  File "/data/tasks/mine.py", line 31 in loss
  File "/x/site_agent/trainer/fitting.py", line 9 in fit
"""


@pytest.mark.parametrize(
    ("code", "words", "kills", "expected"),
    [
        (-11, TRACE, (0, 0), "was killed by SIGSEGV at mine.py:31"),
        (-11, "", (0, 0), "was killed by SIGSEGV"),
        (139, "", (0, 0), "was killed by SIGSEGV"),
        (-9, "", (4, 4), "was killed by SIGKILL"),
        (-9, "", (4, 5), "ran out of memory: the kernel killed it (SIGKILL)"),
        (-6, "terminate called … 'std::bad_alloc'", (0, 0), "ran out of memory (SIGABRT)"),
        (-6, "assertion", (0, 0), "was killed by SIGABRT"),
        (1, "MemoryError", (0, 0), "ran out of memory (exit code 1)"),
        (3, "", (0, 0), "ended with exit code 3"),
        (0, "out of memory, said a book", (0, 0), "ended with exit code 0"),
        (-64, "", (0, 0), "was killed by SIGRTMAX"),
    ],
)
def test_the_cause_of_death(code: int, words: str, kills: tuple[int, int], expected: str) -> None:
    assert cause(code, words, *kills) == expected


def test_only_a_fault_handlers_trace_is_a_place() -> None:
    assert crash_place('Traceback:\n  File "/data/mine.py", line 3 in f') == ""
