"""FYI: what sites condense, what is sent, and what the orchestrator makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from protos.errors import TaskFailed
from protos.plan import StrategyChoice
from strategies.condensation.fyi import FACTS, FYI, pictures
from strategies.distillation.proxy import CONDENSED
from strategies.task import Task
from tests.support.little_federation import LittleFederation
from tests.support.refinements import refinement


class Bars(Task):
    """Pictures of 1 x 4 x 4: class 0 is bright on one side, either; class 1 is bright below."""

    embedding = "0"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(5)
        inputs = 0.1 * torch.randn(80, 1, 4, 4, generator=generator)
        targets = torch.arange(80) % 2
        inputs[0::4, :, :, :2] += 1
        inputs[2::4, :, :, 2:] += 1
        inputs[1::2, :, 2:] += 1
        return TensorDataset(inputs, targets)


def test_examples_meet_the_means_of_their_class() -> None:
    """The embedding is the input itself here, so the loss is the distance of the class means."""
    task, strategy = Bars(), FYI(iterations=60, image_rate=0.3, real=40, flip=False)
    inputs, targets = strategy.condense(task, torch.Generator().manual_seed(1))
    assert inputs.shape == (2, 1, 4, 4)
    assert targets.tolist() == [0, 1]
    real, labels = task.train_data().tensors
    for label, made in zip((0, 1), inputs, strict=True):
        assert (made - real[labels == label].mean(dim=0)).abs().mean() < 0.1


def test_an_example_need_not_show_both_sides_if_its_mirror_image_counts() -> None:
    """The mean of x and its mirror image must meet the class mean; x itself need not."""
    strategy = FYI(iterations=60, image_rate=0.3, real=40)
    inputs, _ = strategy.condense(Bars(), torch.Generator().manual_seed(1))
    real, labels = Bars().train_data().tensors
    for label, made in zip((0, 1), inputs, strict=True):
        mean = real[labels == label].mean(dim=0)
        assert ((made + made.flip(-1)) / 2 - mean).abs().mean() < 0.1
        assert (made - made.flip(-1)).abs().mean() > 0.2, "noise that no loss has taken away"


def test_small_classes_stay_and_what_cannot_be_flipped_is_named() -> None:
    class Uneven(Bars):
        def train_data(self) -> TensorDataset:
            inputs = super().train_data().tensors[0]
            return TensorDataset(inputs[:20], (torch.arange(20) >= 17).long())

    strategy = FYI(iterations=1)
    _, targets = strategy.condense(Uneven(), torch.Generator())
    assert targets.tolist() == [0]
    with pytest.raises(TaskFailed, match="no class has 30 samples"):
        FYI(iterations=1, least=30).condense(Uneven(), torch.Generator())

    class Flat(Bars):
        def train_data(self) -> TensorDataset:
            inputs, targets = super().train_data().tensors
            return TensorDataset(inputs.flatten(1), targets)

    with pytest.raises(TaskFailed, match="no axis to flip along"):
        strategy.condense(Flat(), torch.Generator())


def test_sites_send_when_the_plan_asks_and_with_the_rule_that_their_policy_knows() -> None:
    params = {"iterations": 2, "least": 1, "flip": False, "every": 2}
    federation = LittleFederation([StrategyChoice(name="fyi", params=params)])
    for number in (1, 2, 3):
        federation.round(number)
        asked = number in (1, 3)
        assert dict(federation.plans[-1].payload) == ({"fyi": {"condensed": True}} if asked else {})
        for own in federation.payloads.values():
            assert set(own) == ({"fyi/inputs", "fyi/targets"} if asked else set())
            assert {p.merge for p in own.values()} <= {"condensed"}
    assert json.loads(federation.files[FACTS])["round"] == 3
    assert federation.reports["fyi"]["examples"] == 9
    assert once(1)
    assert not once(2)


def once(round_number: int) -> bool:
    return FYI().asked_in(round_number)


def sent() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return {
        site: {
            "fyi/inputs": torch.randn(count, 1, 4, 4, generator=generator).half(),
            "fyi/targets": torch.arange(count) % 2,
        }
        for site, count in (("east", 3), ("south", 2))
    }


def came(use: str, **more: Any) -> Any:
    own = sent()
    merged = {
        name: torch.cat([own[site][name] for site in ("east", "south")])
        for name in ("fyi/inputs", "fyi/targets")
    }
    at = refinement(Bars(), payloads=merged, site_payloads=own, **more)
    return at, FYI(use=use, steps=60, learning_rate=0.05).refine(at)  # type: ignore[arg-type]


def test_what_came_is_kept_with_where_it_came_from() -> None:
    at, report = came("keep")
    pool = load(at.files[CONDENSED])
    assert pool["inputs"].shape == (5, 1, 4, 4)
    assert pool["targets"].tolist() == [0, 1, 0, 0, 1]
    facts = json.loads(at.files[FACTS])
    assert facts["sites"] == {"east": {"0": 2, "1": 1}, "south": {"0": 1, "1": 1}}
    assert facts["shape"] == [1, 4, 4]
    assert len(facts["pixels"]) == 5
    assert report == {"examples.east": 3.0, "examples.south": 2.0, "examples": 5.0}


def test_the_average_or_a_newcomer_learns_from_them() -> None:
    for use in ("distil", "warm up"):
        at, report = came(use)
        pool = load(at.files[CONDENSED])
        with torch.no_grad():
            said = at.model(pool["inputs"].float()).argmax(dim=1)
        assert torch.equal(said, pool["targets"]), use
        assert report["loss"] < 0.2
    idle = refinement(Bars(), files=dict(at.files))
    before = {k: v.clone() for k, v in idle.model.state_dict().items()}
    assert FYI(use="warm up").refine(idle) == {"examples": 5.0}
    assert all(torch.equal(v, before[k]) for k, v in idle.model.state_dict().items())


def test_what_is_no_picture_is_not_drawn() -> None:
    assert pictures(torch.zeros(2, 7), torch.zeros(2))["pixels"] == []
    drawn = pictures(torch.tensor([[[0.0, 0.5], [1.0, 0.25]]]), torch.tensor([3]))
    assert drawn == {"shape": [1, 2, 2], "pixels": [[0, 128, 255, 64]], "classes": [3]}
