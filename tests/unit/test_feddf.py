from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from protos.errors import TaskFailed
from protos.plan import StrategyChoice
from strategies.context import Update
from strategies.distillation.feddf import FedDF
from strategies.distillation.softened import divergence
from tests.support.little_federation import LittleFederation
from tests.support.refinements import SITES, Proxy, refinement, site_state


class Bare(Proxy):
    """The same inputs, not in tuples."""

    def proxy_data(self) -> Dataset[Any] | None:
        return [row for (row,) in TensorDataset(*super().proxy_data().tensors)]  # type: ignore[union-attr]


class Without(Proxy):
    def proxy_data(self) -> Dataset[Any] | None:
        return None


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
    params = {"steps": 1, "teacher": teacher, "temperature": 2.0, "balance": False}
    strategy = FedDF.model_validate(params)
    report = strategy.refine(at)
    assert report["kl_before"] == pytest.approx(expected, abs=1e-6)
    assert (report["kl_before"] < 1e-6) == (teacher == "uniform")
    assert [report[f"teacher.{site}"] for site in SITES] == pytest.approx(shares)


def test_teachers_weighed_by_calibration_speak_softer_and_count_by_what_they_know() -> None:
    """p = I / sum, z / T: by hand, for I = 1, 0.5, 0.5 nats and T = 1, 2, 4."""
    said = {"east": (1.0, 1.0), "north": (2.0, 0.5), "south": (4.0, 0.5)}
    sent = {site: {"feddf/calibration": torch.tensor(own).double()} for site, own in said.items()}
    at = refinement(site_payloads=sent)
    inputs = Proxy().proxy_data().tensors[0]  # type: ignore[union-attr]
    mean = torch.zeros(40, 3)
    for share, site in zip((0.5, 0.25, 0.25), said, strict=True):
        state = site_state(site)
        mean += share / said[site][0] * (inputs @ state["weight"].T + state["bias"])
    with torch.no_grad():
        expected = float(divergence(mean, at.model(inputs), 1.0))
    report = FedDF(steps=1, teacher="calibration", balance=False).refine(at)
    assert report["kl_before"] == pytest.approx(expected, abs=1e-6)
    assert [report[f"teacher.{site}"] for site in said] == pytest.approx([0.5, 0.25, 0.25])
    assert [report[f"temperature.{site}"] for site in said] == pytest.approx([1, 2, 4])


def test_a_teacher_that_knows_nothing_of_its_classes_hardly_counts() -> None:
    sent = {s: {"feddf/calibration": torch.tensor([1.0, -0.3]).double()} for s in SITES}
    sent["north"] = {"feddf/calibration": torch.tensor([1.0, 0.7]).double()}
    report = FedDF(steps=1, teacher="calibration").refine(refinement(site_payloads=sent))
    assert report["teacher.north"] == pytest.approx(1, abs=1e-5)
    assert report["teacher.east"] > 0


def test_what_a_site_says_is_the_entropy_of_its_classes_less_its_likelihood() -> None:
    """A model without a clue has the likelihood of a uniform guess: ln 3 of three even classes."""

    class Even(Proxy):
        def val_data(self) -> Dataset[Any] | None:
            return TensorDataset(torch.randn(30, 4), torch.arange(30) % 3)

    class One(Even):
        def val_data(self) -> Dataset[Any] | None:
            return TensorDataset(torch.randn(30, 4), torch.zeros(30, dtype=torch.int64))

    clueless = nn.Linear(4, 3)
    nn.init.zeros_(clueless.weight)
    nn.init.zeros_(clueless.bias)
    for task, expected in ((Even(), 0.0), (One(), -math.log(3))):
        update = Update({}, examples=1, steps=1, epochs=1.0, model=clueless, task=task)
        FedDF(teacher="calibration").say_calibration(update)
        told = update.payloads["feddf/calibration"].tensor
        assert float(told[1]) == pytest.approx(expected, abs=1e-6)


def test_balance_takes_a_teachers_own_class_frequencies_away() -> None:
    """By hand; the frequencies that are put back are those of all sites together, by their weights."""
    inputs = Proxy().proxy_data().tensors[0]  # type: ignore[union-attr]
    mean, together = torch.zeros(40, 3), torch.zeros(3)
    for site, weight in zip(SITES, (0.1, 0.2, 0.7), strict=True):
        state = site_state(site)
        z = inputs @ state["weight"].T + state["bias"]
        found = z.softmax(dim=1).mean(dim=0)
        mean, together = mean + (z - found.log()) / 3, together + weight * found
    at = refinement()
    with torch.no_grad():
        expected = float(divergence(mean + together.log(), at.model(inputs), 1.0))
    report = FedDF(steps=1, teacher="uniform").refine(at)
    assert report["kl_before"] == pytest.approx(expected, abs=1e-6)

    plain = refinement()
    report = FedDF(steps=1, teacher="uniform", balance=False).refine(plain)
    assert abs(report["kl_before"] - expected) > 1e-3


def test_balance_leaves_teachers_that_agree_as_they_are() -> None:
    def alike(site: str) -> dict[str, Tensor]:
        return site_state("north")

    kl = []
    for balance in (True, False):
        at = replace(refinement(), load_site=alike)
        kl.append(FedDF(steps=1, balance=balance).refine(at)["kl_before"])
    assert kl[0] == pytest.approx(kl[1], abs=1e-6)


def test_a_site_that_says_nothing_of_its_calibration_is_named() -> None:
    with pytest.raises(TaskFailed, match="site east did not say how calibrated"):
        FedDF(steps=1, teacher="calibration").refine(refinement())


def test_sites_say_how_calibrated_they_are_only_if_asked() -> None:
    choice = {"steps": 2, "teacher": "calibration"}
    asked = LittleFederation([StrategyChoice(name="feddf", params=choice)]).run(1)
    for own in asked.payloads.values():
        assert own["feddf/calibration"].merge == "keep per site"
        temperature, known = own["feddf/calibration"].tensor.tolist()
        assert temperature >= 1
        assert -2 < known < math.log(3)
    weights = [asked.reports["feddf"][f"teacher.{site}"] for site in asked.tasks]
    assert sum(weights) == pytest.approx(1)
    assert len(set(weights)) == 3
    silent = LittleFederation([StrategyChoice(name="feddf", params={"steps": 2})]).run(1)
    assert not any(silent.payloads.values())


def test_patience_ends_what_no_longer_gains_at_its_best() -> None:
    """The target is the student itself: nothing can be gained, so the second look is the last."""
    at = refinement()
    before = {k: v.clone() for k, v in at.model.state_dict().items()}
    plain = FedDF(steps=1000, patience=100, learning_rate=0.5, teacher="uniform", balance=False)
    report = plain.refine(at)
    assert report["steps"] < 1000
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in at.model.state_dict().items())


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
