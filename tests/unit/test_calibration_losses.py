"""Losses that keep confidence honest while a site trains, and mixup."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protos.errors import TaskFailed
from protos.plan import Plan, Schedule, TaskChoice, Work
from strategies.augmentation.mixing import Mixture, draw
from strategies.augmentation.mixup import Mixup
from strategies.calibration.acls import ACLS
from strategies.calibration.focal import Focal
from strategies.calibration.label_smoothing import LabelSmoothing
from strategies.calibration.mbls import MbLS
from strategies.calibration.rank_mixup import RankMixup
from strategies.context import Step
from strategies.protocol import Strategy
from strategies.task import Task

# The vectors of algorithms.md, sections 5 and 6.
F3 = torch.tensor([[12, 0.5, -3], [2, 13.5, 1], [1, 0, -1]], dtype=torch.float64)
Y3 = torch.tensor([0, 2, 0])
MIXED = torch.tensor([[[6, 5, -1], [1, 4, 3.9], [0.5, 0.4, -0.2]]], dtype=torch.float64)
RAW2 = torch.tensor([[4, 1, 0], [0.5, 2.5, 0]], dtype=torch.float64)
MIXED2 = torch.tensor(
    [[[2, 1.5, 0], [1, 1.2, 0.1]], [[1, 0.9, 0.2], [0.4, 2.2, 0.3]]], dtype=torch.float64
)
IDEAL2 = torch.tensor([[0.7, 0.7], [0.55, 0.55]], dtype=torch.float64)


class Identity(Task):
    """A model that gives its inputs, so that a test chooses the logits."""

    def model(self) -> nn.Module:
        return nn.Identity()


def at(inputs: Tensor, targets: Any, **changes: Any) -> Step:
    task = changes.pop("task", None) or Identity()
    model = changes.pop("model", None) or task.model()
    fields: dict[str, Any] = {
        "plan": Plan(
            run="r", round=1, attempt=1, site="north", task=TaskChoice(name="t"),
            work=Work(epochs=1), schedule=Schedule(lr=0.1),
        ),
        "task": task,
        "model": model,
        "base": {},
        "optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1),
        "index": 0,
        "total": 1,
        "epoch": 0,
        "learning_rate": 0.1,
        "generator": torch.Generator().manual_seed(1),
        "inputs": inputs,
        "targets": targets,
        "outputs": task.forward(model, inputs),
    }  # fmt: skip
    return Step(**{**fields, **changes})


def whole(strategy: Strategy, step: Step) -> float:
    """The loss of a stack of one."""
    return float(strategy.objective(strategy.loss(step), step, {}).detach())


# ------------------------------------------------------------------------------- the vectors


@pytest.mark.parametrize(
    ("strategy", "loss"),
    [
        (ACLS(weight=0), "4.302543"),  # cross-entropy
        (ACLS(), "4.903793"),
        (ACLS(positive="range"), "5.403793"),
        (MbLS(), "4.419210"),
        (LabelSmoothing(alpha=0.1), "4.480321"),
        (LabelSmoothing(alpha=0), "4.302543"),
        (Focal(gamma=0), "4.302543"),
    ],
)
def test_vectors_of_the_losses(strategy: Strategy, loss: str) -> None:
    assert f"{whole(strategy, at(F3, Y3)):.6f}" == loss


def test_vector_of_the_terms_of_acls() -> None:
    for weights, value in (((1, 0), "5.416667"), ((0, 1), "5.958333"), ((1, 0.1), "6.012500")):
        strategy = ACLS(positive_weight=weights[0], negative_weight=weights[1])
        assert f"{float(strategy.penalty(F3)):.6f}" == value
    assert f"{float(ACLS(positive='range').penalty(F3)):.6f}" == "11.012500"
    assert (
        f"{(whole(MbLS(), at(F3, Y3)) - whole(MbLS(weight=0), at(F3, Y3))) / 0.1:.6f}" == "1.166667"
    )


def test_vector_of_mrl() -> None:
    differ = torch.zeros(1, 3, dtype=torch.bool)
    assert float(RankMixup().mrl(F3, MIXED, differ)) == 0.5
    assert float(RankMixup().mrl(F3[2:], MIXED[:, 2:], differ[:, 2:])) == 1.5


def test_vector_of_m_ndcg() -> None:
    found = RankMixup(form="m_ndcg").m_ndcg(RAW2, MIXED2, IDEAL2)
    assert f"{float(found):.6f}" == "0.124529"
    for k, ndcg in enumerate((0.880111, 0.870831)):
        one = RankMixup(form="m_ndcg").m_ndcg(
            RAW2[k : k + 1], MIXED2[:, k : k + 1], IDEAL2[:, k : k + 1]
        )
        assert f"{1 - float(one):.6f}" == f"{ndcg:.6f}"


def test_focal_by_hand() -> None:
    """p_y = 0.9: (1 - 0.9)^2 * 0.105361; and certainty gives neither loss nor NaN."""
    logits = torch.log(torch.tensor([[0.9, 0.1]], dtype=torch.float64))
    assert whole(Focal(gamma=2), at(logits, torch.tensor([0]))) == pytest.approx(0.00105360516)
    for gamma in (0.5, 1.0, 3.0):
        z = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
        Focal(gamma=gamma).loss(at(z, torch.tensor([0, 0]))).backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert z.grad[0].abs().max() == 0
        assert float(z.grad[1, 0]) == pytest.approx(-0.5, rel=1e-5)


# ------------------------------------------------------------------------------- the gradients


def test_the_negative_term_of_acls_moves_only_what_lies_too_low() -> None:
    z = F3.clone().requires_grad_(True)
    ACLS(positive_weight=0, negative_weight=1).penalty(z).backward()
    assert z.grad is not None
    # Rows 0 and 1: distances 11.5, 15 and 11.5, 12.5 against the margin of 10; row 2 is within it.
    by_hand = torch.tensor([[0, -1.5, -5], [-1.5, 0, -2.5], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(z.grad, by_hand * 2 / 6)


def test_the_positive_term_of_acls_moves_only_the_predicted_class() -> None:
    z = F3.clone().requires_grad_(True)
    ACLS(negative_weight=0).penalty(z).backward()
    assert z.grad is not None
    by_hand = torch.tensor([[2, 0, 0], [0, 3.5, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(z.grad, by_hand * 2 / 3)
    tied = torch.full((1, 3), 20.0, requires_grad=True)
    ACLS().penalty(tied).backward()
    assert tied.grad is not None
    assert int((tied.grad != 0).sum()) == 1


def test_within_the_margin_nothing_is_smoothed() -> None:
    z = torch.tensor([[9.0, 0.0, -0.9], [3.0, 2.0, 1.0]], requires_grad=True)
    for strategy in (ACLS(), ACLS(positive="range"), MbLS()):
        found = strategy.objective(torch.zeros(()), at(z, Y3[:2]), {})
        assert float(found.detach()) == 0


def test_mrl_lowers_the_mixture_and_lifts_the_sample() -> None:
    raw, mixed = F3.clone().requires_grad_(True), MIXED.clone().requires_grad_(True)
    RankMixup().mrl(raw, mixed, torch.zeros(1, 3, dtype=torch.bool)).backward()
    assert raw.grad is not None
    assert mixed.grad is not None
    assert raw.grad.nonzero().tolist() == [[2, 0]]
    assert mixed.grad.nonzero().tolist() == [[0, 2, 0]]
    assert float(raw.grad[2, 0]) == pytest.approx(-1 / 3)
    assert float(mixed.grad[0, 2, 0]) == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------- pairs of one class


def test_pairs_of_one_class_are_skipped_or_scale_the_mean_as_released() -> None:
    same = torch.tensor([[False, False, True]])
    assert float(RankMixup().mrl(F3, MIXED, same)) == 0  # the only pair that had a loss
    assert float(RankMixup(same_class="scale").mrl(F3, MIXED, same)) == pytest.approx(0.5 * 2 / 3)


def test_mrl_on_confidences() -> None:
    found = RankMixup(on="confidence", margin=0.1).mrl(
        RAW2, MIXED2[:1], torch.zeros(1, 2, dtype=torch.bool)
    )
    gaps = MIXED2[0].softmax(1).amax(1) - RAW2.softmax(1).amax(1) + 0.1
    assert float(found) == pytest.approx(float(gaps.clamp_min(0).mean()))


def test_rank_mixup_makes_its_mixtures_from_the_batch() -> None:
    """Against the formula, with the draws of the same generator."""
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    model = nn.Linear(3, 3)
    for strategy, count in ((RankMixup(margin=1.0), 1), (RankMixup(form="m_ndcg"), 3)):
        twin = at(inputs, targets, model=model)
        mixtures = [draw("x", strategy.beta, twin) for _ in range(count)]
        mixed = torch.stack([model(m.of(inputs)) for m in mixtures])
        same = torch.stack([targets[m.partner] == targets for m in mixtures])
        step = at(inputs, targets, model=model)
        found = strategy.objective(torch.zeros(()), step, {})
        if strategy.form == "mrl":
            expected = strategy.mrl(step.outputs, mixed, same)
        else:
            shares = torch.tensor([[max(m.share, 1 - m.share)] for m in mixtures])
            ideal = torch.where(same, torch.ones(()), shares)
            expected = strategy.m_ndcg(step.outputs, mixed, ideal)
        torch.testing.assert_close(found, 0.1 * expected)
        assert torch.equal(step.inputs, inputs)  # the raw samples are what is trained on
        assert torch.equal(step.targets, targets)


# --------------------------------------------------------------------------- tasks of other shapes


@pytest.mark.parametrize(
    "strategy",
    [
        ACLS(margin=0.5),
        ACLS(margin=0.5, positive="range"),
        MbLS(margin=0.5),
        LabelSmoothing(alpha=0.1),
        Focal(),
    ],
)
def test_positions_are_samples_and_ignored_ones_are_left_out(strategy: Strategy) -> None:
    class Pixels(Identity):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets, ignore_index=-1)

    maps = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(-1, 4, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    kept = truth >= 0
    flat, labels = maps.movedim(1, -1)[kept], truth[kept]
    assert 0 < len(flat) < 30
    assert whole(strategy, at(maps, truth, task=Pixels())) == pytest.approx(
        whole(strategy, at(flat, labels)), rel=1e-6
    )


@pytest.mark.parametrize("form", ["mrl", "m_ndcg"])
def test_rank_mixup_counts_a_position_where_both_have_a_label(form: Any) -> None:
    maps = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(3, (4, 2, 2), generator=torch.Generator().manual_seed(1))
    strategy = RankMixup(form=form, margin=5.0)
    half = truth.clone()
    half[:, 0] = -1  # in every picture the same row: so it is as if pictures had one row less
    whole_row = strategy.objective(torch.zeros(()), at(maps, half), {})
    one_row = strategy.objective(torch.zeros(()), at(maps[:, :, 1:], truth[:, 1:]), {})
    torch.testing.assert_close(whole_row, one_row)
    nowhere = strategy.objective(torch.zeros(()), at(maps, torch.full_like(truth, -1)), {})
    assert float(nowhere) == 0


def test_tasks_with_logits_but_no_classes_are_smoothed_too() -> None:
    class LogitsOnly(Identity):
        features = frozenset({"logits"})

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.square().mean()

    step = at(F3, torch.zeros(3, 7), task=LogitsOnly())
    assert whole(ACLS(), step) == pytest.approx(float(F3.square().mean()) + 0.60125)


# ---------------------------------------------------------------------------------------- mixup


def test_mixup_is_cross_entropy_against_the_blended_labels() -> None:
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    strategy, step = Mixup(alpha=1.0), at(inputs, targets)
    mixture = draw("mixup", 1.0, at(inputs, targets))
    strategy.batch(step)
    blended = mixture.share * inputs + (1 - mixture.share) * inputs[mixture.partner]
    torch.testing.assert_close(step.inputs, blended)
    assert 0 < mixture.share < 1
    step.outputs = step.task.forward(step.model, step.inputs)
    one_hot = F.one_hot(targets, 3).float()
    soft = mixture.share * one_hot + (1 - mixture.share) * one_hot[mixture.partner]
    torch.testing.assert_close(strategy.loss(step), F.cross_entropy(step.outputs, soft))


def test_mixup_of_a_regression() -> None:
    class Regression(Identity):
        features = frozenset()

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs - targets).square().mean()

    step = at(
        torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0]]), task=Regression()
    )
    Mixup(alpha=2.0).batch(step)
    mixture: Mixture = step.scratch["mixup"]
    step.outputs = step.inputs
    parts = [step.task.loss(step.outputs, t) for t in (step.targets, step.targets[mixture.partner])]
    expected = mixture.share * parts[0] + (1 - mixture.share) * parts[1]
    torch.testing.assert_close(Mixup(alpha=2.0).loss(step), expected)


def test_shares_follow_their_distribution_and_the_generator() -> None:
    step = at(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))
    shares = torch.tensor([draw("mixup", 2.0, step).share for _ in range(4000)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(shares.var()) == pytest.approx(1 / 20, abs=0.004)  # of Beta(2, 2)
    twins = [draw("mixup", 0.4, at(step.inputs, step.targets)) for _ in range(2)]
    assert twins[0].share == twins[1].share
    assert torch.equal(twins[0].partner, twins[1].partner)
    assert sorted(twins[0].partner.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("inputs", "targets", "why"),
    [
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]), "its inputs are torch.int64"),
        (torch.zeros(2, 3), [0, 1], "its targets are a list"),
    ],
)
def test_what_can_not_be_blended_is_named(inputs: Tensor, targets: Any, why: str) -> None:
    step = at(inputs, targets)
    with pytest.raises(TaskFailed, match=f"strategy mixup: .* but of this task {why}"):
        Mixup().batch(step)
    with pytest.raises(TaskFailed, match=f"strategy rank_mixup: .* {why}"):
        RankMixup().objective(torch.zeros(()), step, {})
