"""What is grafted into a model and learns beside it at a site: ONE, CLSA, SEED."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protos.errors import ConfigInvalid
from protos.plan import StrategyChoice
from strategies.distillation.clsa import CLSA, levels_of
from strategies.distillation.one import ONE, ensemble_of, mixed, opened, ramp_up
from strategies.distillation.seed import SEED, enqueue, normalised, similarity_loss, student_of
from strategies.distillation.softened import divergence
from strategies.stack import Stack
from tests.support.distilling import Deep, built, step_of, went
from tests.support.little_federation import LittleFederation, LittleTask

# The vector of algorithms.md section 3: three branches, and the gate before its ReLU.
Z = torch.tensor([[[2, 0, -1.0], [1, 1, 0.0], [0, 2, 0.0]]], dtype=torch.float64)
GATE = torch.tensor([[0.2, -0.5, 1.0]], dtype=torch.float64)
LABEL = torch.tensor([0])


# ------------------------------------------------------------------------------------------ ONE


def test_vector_of_the_native_ensemble() -> None:
    g = opened(GATE)
    assert [f"{v:.6f}" for v in g[0].tolist()] == ["0.247263", "0.202442", "0.550295"]
    teacher = mixed(Z, g)
    assert [f"{v:.6f}" for v in teacher[0].tolist()] == ["0.696969", "1.303031", "-0.247263"]
    truths = [F.cross_entropy(z, LABEL) for z in (*Z.unbind(1), teacher)]
    learned = float(sum(truths))
    taught = sum(float(divergence(teacher, z, 3.0)) for z in Z.unbind(1))
    assert f"{learned:.6f}" == "4.441443"
    assert f"{taught:.6f}" == "0.921597"
    assert f"{learned + taught:.6f}" == "5.363040"
    assert [f"{ramp_up(t, 80):.6f}" for t in (0, 40, 80, 200)] == [
        "0.006738", "0.286505", "1.000000", "1.000000",
    ]  # fmt: skip
    assert ramp_up(0, 0) == 1


def test_the_objective_of_one_is_the_formula() -> None:
    strategy = ONE(tail="3", ramp=4, weight=0.5)
    step = step_of("one", built(strategy), tail="3", ramp=4, weight=0.5)
    found = went(strategy, step)
    module = ensemble_of(step.model)
    features = step.model[2](step.model[1](step.model[0](step.inputs)))  # type: ignore[index]
    logits = [branch(features) for branch in module.native_branches]
    h = module.gate[0](features.flatten(2).mean(2))
    g = ((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()).relu().softmax(1)
    teacher = sum((g[:, [i]] * z for i, z in enumerate(logits)), torch.zeros(8, 3))
    expected = sum(F.cross_entropy(z, step.targets) for z in (*logits, teacher))
    taught = sum(
        9 * F.kl_div((z / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
        for z in logits
    )
    expected = expected + 0.5 * ramp_up(1, 4) * taught
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(step.outputs, logits[0])


def test_no_gradient_of_the_divergence_reaches_gate_and_teacher() -> None:
    """With the divergence the gate's gradient is the one without it; the branches' is another."""
    gradients = []
    for weight in (0.0, 100.0):
        strategy = ONE(tail="3", ramp=0, weight=weight)
        step = step_of("one", built(strategy), tail="3", ramp=0, weight=weight)
        went(strategy, step).backward()
        module = ensemble_of(step.model)
        gradients.append(
            (module.gate[0].weight.grad, module.native_branches[1][2].weight.grad)  # type: ignore[index]
        )
    assert gradients[0][0].abs().max() > 0
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1])


def test_branches_start_apart_and_the_first_is_the_tasks() -> None:
    torch.manual_seed(0)
    plain = Deep().model()
    module = ensemble_of(built(ONE(tail="3")))
    first, *others = [branch[2].weight for branch in module.native_branches]  # type: ignore[index]
    assert torch.equal(first, plain[5].weight)  # type: ignore[index]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(others[0], others[1])


@pytest.mark.parametrize(
    ("exchange", "own"),
    [("whole", []), ("personal", [2]), ("deployed", [1, 2]), ("trunk", [0, 1, 2])],
)
def test_what_of_the_ensemble_leaves_a_site(exchange: str, own: list[int]) -> None:
    choice = StrategyChoice(name="one", params={"exchange": exchange, "ramp": 0.0})
    federation = LittleFederation([choice]).run(2)
    for sent in federation.contributions.values():
        kept = {k for k in range(3) if f"2.native_branches.{k}.weight" not in sent}
        assert kept == set(own)
        assert {"2.gate.0.weight", "0.weight"} <= sent.keys()
    for k in own:
        values = [placed[f"2.native_branches.{k}.weight"] for placed in federation.placed.values()]
        assert not torch.equal(values[0], values[1]), "a branch of one's own is one's own"


@pytest.mark.parametrize("deploy", ["branch", "ensemble"])
def test_evaluation_and_export_of_one(deploy: Any) -> None:
    strategy = ONE(tail="3", deploy=deploy)
    model = built(strategy).eval()
    inputs = torch.randn(5, 1, 8, 8)
    expected = model(inputs)
    module = ensemble_of(model)
    features = model[2](model[1](model[0](inputs)))  # type: ignore[index]
    logits = torch.stack([branch(features) for branch in module.native_branches], dim=1)
    by_hand = logits[:, 0] if deploy == "branch" else mixed(logits, module.weights(features))
    torch.testing.assert_close(expected, by_hand)
    deployed = strategy.export(model)
    torch.testing.assert_close(deployed(inputs), expected)
    assert any("native" in name for name in deployed.state_dict()) == (deploy == "ensemble")


def test_a_tail_that_is_not_there_and_a_layer_that_can_not_be_drawn() -> None:
    with pytest.raises(ConfigInvalid, match=r'no module "fc"; it has 0, 1, 2'):
        built(ONE(tail="fc"))

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(6))

    with pytest.raises(ConfigInvalid, match="Scale has parameters but no reset_parameters"):
        ONE(tail="1").build(nn.Sequential(nn.Linear(2, 6), Scale()), Deep())
    with pytest.raises(ConfigInvalid, match="says how wide"):
        ONE(tail="1").build(nn.Sequential(nn.Linear(2, 6), nn.Identity()), Deep())


def test_a_pass_of_somebody_else_in_the_same_step_is_not_mistaken_for_the_steps_own() -> None:
    strategy = ONE(tail="3", ramp=0)
    quiet, loud = (step_of("one", built(strategy), tail="3", ramp=0) for _ in range(2))
    expected = went(strategy, quiet)
    strategy.batch(loud)
    loud.outputs = loud.task.forward(loud.model, loud.inputs)
    loss = loud.task.loss(loud.outputs, loud.targets)
    loud.model(torch.randn(8, 1, 8, 8))
    copy.deepcopy(loud.model)  # as a base model is made, while a graph is alive
    torch.testing.assert_close(strategy.objective(loss, loud, {}), expected)


def test_the_loss_of_further_outputs_is_that_of_its_owner() -> None:
    strategy = ONE(tail="3", weight=0)
    plain, smooth = (step_of("one", built(strategy), tail="3") for _ in range(2))
    smooth.plan = smooth.plan.model_copy(
        update={"stack": (StrategyChoice(name="label_smoothing", params={"alpha": 0.3}),)}
    )
    assert float(went(strategy, plain).detach()) != float(went(strategy, smooth).detach())


# ----------------------------------------------------------------------------------------- CLSA


def test_the_objective_of_clsa_is_the_formula() -> None:
    strategy = CLSA(levels=("0", "2"), weight=0.5)
    step = step_of("clsa", built(strategy), levels=["0", "2"])
    found = went(strategy, step)
    low, high = levels_of(step.model)
    h = low.body(step.inputs)
    logits = [low.level_head(h.flatten(2).mean(2))]
    logits.append(high.level_head(high.body(h.relu()).flatten(2).mean(2)))
    expected = F.cross_entropy(step.outputs, step.targets)
    for z in logits:
        taught = F.kl_div(
            (z / 3).log_softmax(1), (step.outputs / 3).softmax(1), reduction="batchmean"
        )
        expected = expected + F.cross_entropy(z, step.targets) + 0.5 * 9 * taught
    torch.testing.assert_close(found, expected)


def test_no_gradient_of_the_divergence_reaches_the_top() -> None:
    """The top layer's gradient is that of its own loss; the level's head feels the divergence."""
    gradients = []
    for weight in (0.0, 10.0):
        strategy = CLSA(levels=("0",), weight=weight)
        step = step_of("clsa", built(strategy), levels=["0"])
        went(strategy, step).backward()
        top, head = step.model[5].weight, levels_of(step.model)[0].level_head.weight  # type: ignore[index]
        gradients.append((top.grad, head.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1])


def test_heads_of_levels_may_stay_home_and_are_not_deployed() -> None:
    choice = StrategyChoice(name="clsa", params={"levels": ["0"], "own": True})
    federation = LittleFederation([choice]).run(2)
    for sent in federation.contributions.values():
        assert not any("level_head" in name for name in sent)
    heads = [placed["0.level_head.weight"] for placed in federation.placed.values()]
    assert not torch.equal(heads[0], heads[1])
    torch.manual_seed(0)
    plain = Deep().model()
    deployed = CLSA(levels=("0", "2")).export(built(CLSA(levels=("0", "2"))))
    assert deployed.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(deployed(inputs), plain(inputs))


# ----------------------------------------------------------------------------------------- SEED


def units(*rows: list[float]) -> Tensor:
    return normalised(torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize(
    ("tau_t", "loss"), [(1e-4, "0.260104"), (1e-2, "0.260104"), (0.07, "0.283118")]
)
def test_vector_of_seed(tau_t: float, loss: str) -> None:
    z_s, z_t = units([1, 0.2, 0]), units([1, 0, 0.3])
    queue = units([0, 1, 0], [0.5, 0.5, 0.5])
    assert f"{float(similarity_loss(z_s, z_t, queue, 0.2, tau_t)):.6f}" == loss


def test_vector_of_the_teachers_distribution() -> None:
    z_t, queue = units([1, 0, 0.3]), units([0, 1, 0], [0.5, 0.5, 0.5])
    p = (torch.cat([torch.ones(1, 1), z_t @ queue.T], dim=1) / 0.07).softmax(1)
    assert [f"{v:.6f}" for v in p[0].tolist()] == ["0.982288", "0.000001", "0.017711"]


def test_only_the_student_gets_a_gradient_and_it_leads_to_the_teacher() -> None:
    z_t, queue = units([1, 0, 0.3]).requires_grad_(), units([0, 1, 0]).requires_grad_()
    z_s = units([0.2, 1, 0.1]).requires_grad_()
    similarity_loss(z_s, z_t, queue, 0.2, 0.01).backward()
    assert z_t.grad is None
    assert queue.grad is None
    assert float((z_s.grad * z_t.detach()).sum()) < 0, "closer to the teacher is less loss"
    angles = [
        similarity_loss(units([c, (1 - c * c) ** 0.5, 0]), units([1, 0, 0]), queue, 0.2, 0.01)
        for c in (0.0, 0.5, 0.9, 1.0)
    ]
    assert angles == sorted(angles, reverse=True)


def test_the_queue_is_a_ring() -> None:
    rows = torch.arange(10.0).reshape(5, 2)
    state = {"queue": torch.zeros(3, 2), "next": torch.tensor(0)}
    state = enqueue(state, rows[:2])
    assert state["queue"].tolist() == [[0, 1], [2, 3], [0, 0]]
    state = enqueue(state, rows[2:4].requires_grad_())
    assert state["queue"].tolist() == [[6, 7], [2, 3], [4, 5]]
    assert not state["queue"].requires_grad
    state = enqueue(state, rows)
    assert state["queue"].tolist() == [[4, 5], [6, 7], [8, 9]]
    assert int(state["next"]) == 0


class Taught(Deep):
    """With a teacher whose normalisation would move if it were ever in training mode."""

    def teacher(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5))


def test_a_step_of_seed() -> None:
    strategy = SEED(queue=16)
    model = built(strategy, Taught())
    step = replace(step_of("seed", model, queue=16), task=Taught())
    teacher = student_of(model).seed_teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    z_t = normalised(teacher(step.inputs))
    assert not teacher.training
    found = went(strategy, step)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert step.model[0].weight.grad.abs().max() > 0  # type: ignore[index]
    assert step.model[5].weight.grad is None, "no label was read"  # type: ignore[index]
    state = strategy.after_step(step, {})
    torch.testing.assert_close(state["queue"][:8], z_t)
    torch.testing.assert_close(state["queue"].norm(dim=1), torch.ones(16))
    assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())
    # The queue that the loss saw was the noise, which the state did not hold yet.
    mixed_in = SEED(queue=16, weight=0.25)
    again = went(mixed_in, step)
    loss = step.task.loss(step.outputs, step.targets)
    torch.testing.assert_close(again, 0.75 * loss + 0.25 * found)


def test_teacher_and_queue_never_leave_and_the_queue_goes_on() -> None:
    federation = LittleFederation([StrategyChoice(name="seed", params={"queue": 32})])
    teacher = {k: v.clone() for k, v in federation.model.items() if "seed_teacher" in k}
    assert teacher
    assert {federation.manifest[name].placement for name in teacher} == {"frozen"}
    federation.run(2)
    for site, sent in federation.contributions.items():
        assert not any("teacher" in name or "queue" in name for name in sent)
        assert not federation.payloads[site]
        seen = 2 * (len(federation.tasks[site].train_data()) // 8 * 8)  # type: ignore[arg-type]
        assert int(federation.state[site]["seed"]["next"]) == seen % 32
    assert all(torch.equal(federation.model[k], v) for k, v in teacher.items())


def test_seed_wants_a_teacher_and_deploys_the_student_alone() -> None:
    with pytest.raises(ConfigInvalid, match=r"teacher\(\) gives none"):
        built(SEED())
    deployed = SEED(queue=4).export(built(SEED(queue=4), Taught()))
    assert deployed.state_dict().keys() == Deep().model().state_dict().keys()


# ---------------------------------------------------------------------------------- all of them


def test_grafts_pass_through_the_stack_of_a_site() -> None:
    """What the trainer asks: the same manifest at both ends, and a copy as a base model."""
    choices = [
        StrategyChoice(name="one", params={"tail": "2"}),
        StrategyChoice(name="clsa", params={"levels": ["0"]}),
        StrategyChoice(name="seed", params={"queue": 8, "weight": 0.5}),
        StrategyChoice(name="self_distillation", params={"start": 1, "ramp": 1}),
        StrategyChoice(name="srdl"),
    ]
    stack = Stack(choices)
    ends = [stack.manifest(stack.build(LittleTask()), LittleTask()) for _ in range(2)]
    assert ends[0].digest == ends[1].digest
    federation = LittleFederation(choices).run(3)
    assert all(value.isfinite().all() for value in federation.model.values())
