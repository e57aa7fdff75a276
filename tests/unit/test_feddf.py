from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from protos.errors import TaskFailed
from strategies.context import Refinement
from strategies.distillation.feddf import FedDF
from strategies.distillation.softened import divergence
from strategies.task import Task


class Proxy(Task):
    """A linear model and forty unlabelled inputs."""

    def model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def proxy_data(self) -> Dataset[Any] | None:
        generator = torch.Generator().manual_seed(7)
        return TensorDataset(torch.randn(40, 4, generator=generator))


class Bare(Proxy):
    """The same inputs, not in tuples."""

    def proxy_data(self) -> Dataset[Any] | None:
        return [row for (row,) in TensorDataset(*super().proxy_data().tensors)]  # type: ignore[union-attr]


class Without(Proxy):
    def proxy_data(self) -> Dataset[Any] | None:
        return None


SITES = ("east", "north", "south")


def site_state(site: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SITES.index(site))
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(3, generator=generator),
    }


def refinement(task: Task | None = None, loaded: list[str] | None = None) -> Refinement:
    task = task or Proxy()
    model = task.model()
    average = {
        name: sum((site_state(s)[name] for s in SITES), torch.zeros(1)) / 3
        for name in ("weight", "bias")
    }
    model.load_state_dict(average)

    def load(site: str) -> dict[str, Tensor]:
        if loaded is not None:
            loaded.append(site)
        return site_state(site)

    return Refinement(3, 1, task, model, dict(zip(SITES, (10.0, 20.0, 70.0), strict=True)), load)


def test_the_average_comes_closer_to_the_ensemble() -> None:
    class Curved(Proxy):
        """An average of models is no longer the average of their predictions."""

        def forward(self, model: nn.Module, inputs: Any) -> Any:
            return model(inputs).tanh() * 3

    at = refinement(Curved())
    report = FedDF(steps=60, learning_rate=0.02, batch_size=20).refine(at)
    assert report["samples"] == 40
    assert report["kl_after"] < 0.7 * report["kl_before"]


@pytest.mark.parametrize("teacher", ["uniform", "count"])
def test_the_teacher_is_the_mean_of_the_logits(teacher: str) -> None:
    """A linear student can equal it: then the divergence before is that of the average."""
    at = refinement()
    shares = {"uniform": [1 / 3] * 3, "count": [0.1, 0.2, 0.7]}[teacher]
    inputs = Proxy().proxy_data().tensors[0]  # type: ignore[union-attr]
    mean = torch.zeros(40, 3)
    for share, site in zip(shares, SITES, strict=True):
        state = site_state(site)
        mean += share * (inputs @ state["weight"].T + state["bias"])
    with torch.no_grad():
        expected = float(divergence(mean, at.model(inputs), 2.0))
    strategy = FedDF.model_validate({"steps": 1, "teacher": teacher, "temperature": 2.0})
    found = strategy.refine(at)["kl_before"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert (found < 1e-6) == (teacher == "uniform")


def test_one_site_after_the_other() -> None:
    loaded: list[str] = []
    FedDF(steps=1).refine(refinement(loaded=loaded))
    assert loaded == list(SITES)


def test_no_steps_touch_nothing() -> None:
    loaded: list[str] = []
    at = refinement(loaded=loaded)
    before = {k: v.clone() for k, v in at.model.state_dict().items()}
    assert FedDF(steps=0).refine(at) == {}
    assert loaded == []
    assert all(torch.equal(v, before[k]) for k, v in at.model.state_dict().items())


def test_same_seed_same_bits_whatever_the_global_generator_does() -> None:
    first, second = refinement(), refinement()
    FedDF(steps=5, batch_size=8).refine(first)
    torch.manual_seed(99)
    FedDF(steps=5, batch_size=8).refine(second)
    assert torch.equal(first.model.get_parameter("weight"), second.model.get_parameter("weight"))


def test_bare_inputs_do_as_well() -> None:
    tupled, bare = refinement(), refinement(Bare())
    FedDF(steps=2).refine(tupled)
    FedDF(steps=2).refine(bare)
    assert torch.equal(tupled.model.get_parameter("bias"), bare.model.get_parameter("bias"))


def test_says_what_is_missing() -> None:
    with pytest.raises(TaskFailed, match="no proxy_data"):
        FedDF(steps=1).refine(refinement(Without()))


def test_a_rate_that_is_too_high_is_named() -> None:
    class Exploding(Proxy):
        def forward(self, model: nn.Module, inputs: Any) -> Any:
            outputs = model(inputs)
            return outputs * float("inf") if outputs.requires_grad else outputs

    with pytest.raises(TaskFailed, match="lower learning_rate"):
        FedDF(steps=1).refine(refinement(Exploding()))
