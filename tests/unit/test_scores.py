import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from strategies import scores
from strategies.task import Task


def logits_of(confidence: list[float]) -> torch.Tensor:
    """Two-class logits whose class 0 has these probabilities."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).clamp_min(1e-300).log()], dim=1)


def direct_ece(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """The definition, bin by bin, as an oracle."""
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)
    total = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            total += float(inside.double().mean() * gap.abs())
    return total


def direct_classwise(p: torch.Tensor, targets: torch.Tensor) -> float:
    """The mean over classes of the one-against-the-rest calibration error of p_c."""
    per_class = [direct_ece(p[:, c], (targets == c).double()) for c in range(p.shape[1])]
    return sum(per_class) / len(per_class)


def direct_aece(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Edges of equal mass from the sorted samples, as Park et al. find them."""
    n, ordered = len(confidence), confidence.sort().values.numpy()
    edges = np.interp(np.linspace(0, n, 16), np.arange(n), ordered)
    index = np.searchsorted(edges[1:-1], confidence.numpy(), side="left")
    gaps = np.bincount(index, (confidence - correct).numpy(), minlength=15)
    return float(np.abs(gaps).sum() / n)


# algorithms.md section 5
CONFIDENCE = [0.95, 0.92, 0.81, 0.66, 0.55, 0.34, 0.99, 1.0]
CORRECT = [1, 0, 1, 1, 0, 0, 1, 1]


def test_vector_of_the_calibration_error() -> None:
    bins = scores.binned(torch.tensor(CONFIDENCE), torch.tensor(CORRECT, dtype=torch.float64))
    pooled = {"n": torch.tensor(8.0), "bins": bins}
    assert f"{scores.scores(pooled)['ece']:.4f}" == "0.3000"


@pytest.mark.parametrize("cut", range(9))
def test_vector_pooled_from_two_sites(cut: int) -> None:
    """Averaging local calibration errors would not give it; adding the sums does."""
    parts = []
    for a, b in ((0, cut), (cut, 8)):
        confidence = torch.tensor(CONFIDENCE[a:b], dtype=torch.float64)
        correct = torch.tensor(CORRECT[a:b], dtype=torch.float64)
        parts.append({"n": torch.tensor(float(b - a)), "bins": scores.binned(confidence, correct)})
    assert scores.pool(parts)["ece"] == pytest.approx(0.3, abs=1e-12)


def test_bins_are_closed_above() -> None:
    edges = scores.EDGES[1:]
    bins = scores.binned(edges, torch.zeros(15, dtype=torch.float64))
    assert bins[0].tolist() == [1.0] * 15
    just_above = torch.nextafter(scores.EDGES[1:-1], torch.ones(14, dtype=torch.float64))
    assert (
        scores.binned(just_above, torch.zeros(14, dtype=torch.float64))[0].tolist()
        == [0] + [1] * 14
    )


@settings(max_examples=50)
@given(data=st.data())
def test_pooled_scores_are_those_of_the_union(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    classes = data.draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    outputs = 4 * torch.randn(n, classes, generator=generator)
    targets = torch.randint(0, classes, (n,), generator=generator)
    site = torch.randint(0, 4, (n,), generator=generator)
    parts = [scores.sums(outputs[site == k], targets[site == k]) for k in range(4)]
    pooled = scores.pool(parts)
    p = outputs.double().softmax(1)
    confidence, predicted = p.max(1)
    correct = (predicted == targets).double()
    assert pooled["ece"] == pytest.approx(direct_ece(confidence, correct), abs=1e-12)
    assert pooled["accuracy"] == pytest.approx(float(correct.mean()), abs=1e-12)
    assert pooled["nll"] == pytest.approx(
        float(F.cross_entropy(outputs.double(), targets)), abs=1e-12
    )
    onehot = F.one_hot(targets, classes).double()
    assert pooled["brier"] == pytest.approx(float((p - onehot).square().sum(1).mean()), abs=1e-12)
    assert pooled["classwise_ece"] == pytest.approx(direct_classwise(p, targets), abs=1e-12)
    together = scores.pool([scores.sums(outputs, targets)])
    assert pooled["aece"] == pytest.approx(together["aece"], abs=1e-12)


def test_the_mean_of_local_calibration_errors_is_another_number() -> None:
    """One site too sure, one too modest, by as much: together they are right."""
    confidence = torch.full((10,), 0.7, dtype=torch.float64)
    parts = []
    for right in (5, 9):
        correct = (torch.arange(10) < right).double()
        parts.append({"n": torch.tensor(10.0), "bins": scores.binned(confidence, correct)})
    local = [scores.pool([part])["ece"] for part in parts]
    assert local == pytest.approx([0.2, 0.2])
    assert scores.pool(parts)["ece"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("scale", "truth"), [(1.0, 1.0), (2.0, 0.6), (3.0, 1.5), (8.0, 3.0), (15.0, 1.2)]
)
@pytest.mark.parametrize("n", [3000, 10_000])
def test_equal_mass_bins_from_narrow_ones(n: int, scale: float, truth: float) -> None:
    generator = torch.Generator().manual_seed(n)
    outputs = scale * torch.randn(n, 10, generator=generator)
    p = (outputs / truth).softmax(dim=1)
    targets = torch.multinomial(p, 1, generator=generator).squeeze(1)
    confidence, predicted = outputs.double().softmax(1).max(1)
    sent = [scores.narrowed(scores.sums(outputs[k::5], targets[k::5])) for k in range(5)]
    expected = direct_aece(confidence, (predicted == targets).double())
    assert scores.pool(sent)["aece"] == pytest.approx(expected, abs=1e-3)


def test_what_a_set_costs_is_bounded() -> None:
    for classes, bound in ((10, 10_000), (100, 21_000), (1000, 9_000)):
        found = scores.narrowed(scores.sums(torch.randn(4, classes), torch.arange(4)))
        assert sum(v.numel() * v.element_size() for v in found.values()) < bound
        assert ("classwise_ece" in scores.scores(found)) == (classes <= 100)


def test_reliability_diagram() -> None:
    outputs = logits_of(CONFIDENCE[:5])
    targets = torch.tensor([1 - c for c in CORRECT[:5]])
    diagram = scores.reliability(scores.sums(outputs, targets))
    assert len(diagram) == 15
    assert sum(bar.samples for bar in diagram) == 5
    top = diagram[-1]
    assert (top.samples, top.confidence, top.accuracy) == (1, pytest.approx(0.95), 1.0)
    assert math.isnan(diagram[0].accuracy)


def test_positions_are_samples_and_negative_targets_are_left_out() -> None:
    outputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, -100, 2], [-100, 1, 1, 0]])
    found = scores.scores(scores.sums(outputs, targets))
    assert found["nll"] == pytest.approx(float(F.cross_entropy(outputs.double(), targets)))
    assert float(scores.sums(outputs, targets)["n"]) == 6


class Regression(Task):
    features = frozenset()

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).square().mean()

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"absolute error": (outputs - targets).abs().sum()}


def test_a_task_without_classes_has_its_loss_and_metrics() -> None:
    task = Regression()
    a = scores.sums_of(task, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    b = scores.sums_of(task, torch.tensor([3.0]), torch.tensor([0.0]))
    assert scores.pool([a, b]) == pytest.approx({"loss": 13 / 3, "absolute error": 5 / 3})


def test_a_classifier_has_both() -> None:
    outputs, targets = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = scores.pool([scores.sums_of(Task(), outputs, targets)])
    assert sorted(found) == ["accuracy", "aece", "brier", "classwise_ece", "ece", "loss", "nll"]
    assert found["loss"] == pytest.approx(found["nll"], rel=1e-6)


def test_nothing_has_no_scores() -> None:
    assert scores.pool([]) == {}
    assert scores.scores(scores.sums(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))) == {}
    assert scores.reliability({}) == []
