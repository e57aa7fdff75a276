"""ALIFE: the published arithmetic, what a widened head believes, and who gets a gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from protos.errors import ConfigInvalid
from protos.plan import StrategyChoice
from strategies.labels.alife import Alife, cayley, distillation, regulariser, rotation_loss
from strategies.stack import describe
from strategies.task import Task
from tests.support.little_federation import LittleFederation

Z = torch.tensor([[0.3, 1.2, -0.5, 2.0]], dtype=torch.float64)
Z_OLD = torch.tensor([[0.1, 1.0, -0.4]], dtype=torch.float64)


def test_the_published_vectors() -> None:
    assert regulariser(Z, Z_OLD).item() == pytest.approx(1.813810, abs=5e-7)
    assert distillation(Z, Z_OLD).item() == pytest.approx(0.312729, abs=5e-7)
    b = torch.zeros(3, 3, dtype=torch.float64)
    b[0, 1], b[0, 2], b[1, 2] = 0.4, -0.2, 0.6
    expected = torch.tensor(
        [
            [0.912281, -0.298246, 0.280702],
            [0.403509, 0.77193, -0.491228],
            [-0.070175, 0.561404, 0.824561],
        ],
        dtype=torch.float64,
    )
    rotation = cayley(b)
    assert torch.allclose(rotation, expected, atol=5e-7)
    assert torch.linalg.det(rotation).item() == pytest.approx(1, abs=1e-12)


def test_the_regularisers_gradient_is_belief_minus_teacher() -> None:
    z, z_old = Z.clone().requires_grad_(), Z_OLD.clone().requires_grad_()
    regulariser(z, z_old).sum().backward()
    p = torch.cat([Z_OLD.softmax(1), torch.zeros(1, 1, dtype=torch.float64)], dim=1)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, Z.softmax(1) - p)
    assert z_old.grad is None
    distillation(z, z_old).sum().backward()
    assert z_old.grad is None


def test_a_learnt_rotation_stays_one_and_carries_features_along() -> None:
    """Features that were rotated come back; a shift of the mean alone does not bring them."""
    generator = torch.Generator().manual_seed(0)
    classes, d = 4, 8
    truth = cayley(torch.randn(classes, d, d, generator=generator))
    before = torch.randn(classes, d, generator=generator)
    now = (truth @ before[..., None]).squeeze(-1)
    head = torch.randn(5, d, generator=generator)
    labels = torch.arange(classes)
    b = torch.zeros(classes, d, d, requires_grad=True)
    optimizer = torch.optim.Adam([b], lr=1e-2)
    for _ in range(400):
        logits = (cayley(b) @ before[..., None]).squeeze(-1) @ head.T
        loss = rotation_loss(b, before, now, logits, labels).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        r = cayley(b.detach())
        assert torch.allclose(r @ r.mT, torch.eye(d).expand(classes, d, d), atol=1e-5)
    rotated = (cayley(b.detach()) @ before[..., None]).squeeze(-1)
    cosine = torch.cosine_similarity(rotated, now, dim=1).min()
    stale = torch.cosine_similarity(before, now, dim=1).max()
    assert cosine > 0.98
    assert cosine > stale + 0.03


@pytest.mark.parametrize("new", [1, 3])
def test_a_widened_head_believes_what_the_old_one_did(new: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    x = torch.randn(5, 4)
    before = model(x).softmax(1)
    wide = Alife(new=new, background=2).build(model, Task())
    after = wide(x).softmax(1)
    assert after.shape == (5, 6 + new)
    others = [c for c in range(6) if c != 2]
    torch.testing.assert_close(after[:, others], before[:, others])
    shared = after[:, [2, *range(6, 6 + new)]]
    torch.testing.assert_close(shared.sum(1), before[:, 2])
    torch.testing.assert_close(shared, shared[:, :1].expand(-1, 1 + new))
    assert describe(wide, (), ())["2.weight"].shape == (6 + new, 8)
    # What it takes for the old model is the old model.
    z_old = Alife(new=new, background=2)._as_it_was(wide(x), 6)
    torch.testing.assert_close(z_old.softmax(1), before)


def test_a_head_that_is_not_there_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with pytest.raises(ConfigInvalid, match='strategy alife: the model has no layer "7"'):
        Alife(head="7").build(model, Task())
    with pytest.raises(ConfigInvalid, match="the head 1 has 3 outputs, and none of them is 3"):
        Alife(background=3).build(model, Task())
    kept = Alife(head="0", new=2).build(model, Task())
    assert kept.get_submodule("0").weight.shape == (10, 4)
    image = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert Alife(head="0", new=2).build(image, Task())(torch.zeros(1, 3, 2, 2)).shape == (
        1,
        6,
        2,
        2,
    )


@pytest.mark.parametrize("keep", ["ali", "mib", "kd", "none"])
def test_every_way_to_keep_trains(keep: str) -> None:
    federation = LittleFederation([StrategyChoice(name="alife", params={"keep": keep})]).run(2)
    assert all(v.isfinite().all() for v in federation.model.values())
    assert federation.model["2.weight"].shape == (4, 8)


# -- classes that a later plan announces ------------------------------------------------------------


def later(*since: int) -> StrategyChoice:
    return StrategyChoice(name="alife", params={"new": len(since), "since": since})


def outputs(federation: LittleFederation) -> torch.Tensor:
    model = federation.build()
    model.load_state_dict(federation.model)
    with torch.no_grad():
        return model.eval()(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))


def test_a_later_plan_opens_the_outputs_that_it_announces() -> None:
    federation = LittleFederation([later(2, 4)]).run(1)
    plain = LittleFederation([]).run(1)
    assert torch.equal(outputs(federation)[:, :3], outputs(plain)), "nothing has arrived"
    arrived = [federation.model["2.alife_arrived"].item()]
    open_outputs = []
    for _ in range(4):
        open_outputs.append(int((outputs(federation).softmax(1) > 0).all(dim=0).sum()))
        federation.run(1)
        arrived.append(federation.model["2.alife_arrived"].item())
    assert arrived == [0, 1, 1, 2, 2]
    assert open_outputs == [3, 4, 4, 5]
    known = [plan.payload["alife"] for plan in federation.plans]
    assert known[0] == {"arrived": 0, "known": 0}
    assert known[1] == known[2] == {"arrived": 1, "known": 0}
    assert known[3] == {"arrived": 2, "known": 1}, "what came before is an old class by then"


def test_what_is_announced_starts_with_what_the_background_has_learned() -> None:
    federation = LittleFederation([later(1, 2, 2)]).run(1)
    before = outputs(federation).softmax(1)
    strategy = federation.stack.strategies[0]
    plan: Any = SimpleNamespace(payload={"alife": {"arrived": 3, "known": 1}})
    adopted, _ = strategy.adopt(dict(federation.model), {}, plan)
    assert torch.equal(federation.model["2.alife_arrived"], torch.tensor(1)), (
        "the base is as it was"
    )
    federation.model = adopted
    after = outputs(federation).softmax(1)
    torch.testing.assert_close(after[:, [1, 2, 3]], before[:, [1, 2, 3]])
    torch.testing.assert_close(after[:, [0, 4, 5]], before[:, :1].expand(-1, 3) / 3)


def test_all_in_the_first_round_is_what_a_head_is_that_was_widened_at_once() -> None:
    at_once = LittleFederation([StrategyChoice(name="alife", params={"new": 2})]).run(2)
    announced = LittleFederation([later(1, 1)]).run(2)
    for name, value in at_once.model.items():
        torch.testing.assert_close(announced.model[name], value, atol=1e-5, rtol=1e-4)


def test_an_export_has_no_output_that_never_was_announced() -> None:
    federation = LittleFederation([later(1, 9)]).run(1)
    model = federation.build()
    model.load_state_dict(federation.model)
    x = torch.randn(5, 6)
    whole = model.eval()(x)
    exported = federation.stack.export(model)
    assert torch.equal(exported(x), whole[:, :4])
    assert "2.alife_arrived" not in exported.state_dict()
    assert exported.state_dict()["2.weight"].shape == (4, 8)


@pytest.mark.parametrize("since", [(1,), (3, 2), (0, 1)])
def test_a_round_for_each_class_in_the_order_of_time(since: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="since"):
        Alife(new=2, since=since)
