"""What a stack adds to its strategies: order, phases, weights, what stays where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from protos.errors import ComputeFailed, ConfigInvalid
from protos.manifest import Manifest, TensorSpec
from protos.plan import StrategyChoice
from strategies import registry
from strategies.context import Cohort, Moment, SidePayload
from strategies.needs import AT_THE_ORCHESTRATOR, check_needs
from strategies.protocol import Strategy
from strategies.stack import Stack
from strategies.task import Task
from tests.support import strategies_for_tests
from tests.support.little_federation import LittleFederation, LittleTask, merge


class Tilted(Strategy):
    """Test: weights that are whatever it is told."""

    name = "test_tilted"
    family = "averaging"
    summary = "Test: given weights."

    weights: tuple[float, ...] = (1.0, 2.0, 5.0)

    def weigh(self, weights: torch.Tensor, cohort: Cohort) -> torch.Tensor:
        return weights * torch.tensor(self.weights, dtype=torch.float64)


CATALOGUE = {
    **registry.catalogue(),
    **{cls.name: cls for cls in (*strategies_for_tests.ALL, Tilted)},
}


@pytest.fixture(autouse=True)
def test_strategies_in_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: CATALOGUE)


def choice(
    name: str, rounds: tuple[int, int | None] | None = None, **params: Any
) -> StrategyChoice:
    return StrategyChoice(name=name, params=params, rounds=rounds)


def cohort(n: int = 3, groups: tuple[str, ...] = ("all",), **fields: Any) -> Cohort:
    return Cohort(
        sites=tuple(f"site{k}" for k in range(n)),
        examples=fields.pop("examples", torch.tensor([10.0, 30.0, 60.0]).double()),
        losses=torch.full((n,), torch.nan).double(),
        staleness=torch.zeros(n, dtype=torch.int64),
        groups=groups,
        **fields,
    )


# ------------------------------------------------------------------------------------ weights


def test_weights_are_example_counts() -> None:
    assert Stack([]).weigh(cohort()).squeeze(1).tolist() == pytest.approx([0.1, 0.3, 0.6])


def test_without_any_examples_all_weigh_alike() -> None:
    found = Stack([]).weigh(cohort(examples=torch.zeros(3).double()))
    assert found.squeeze(1).tolist() == pytest.approx([1 / 3] * 3)


def test_weights_are_normalised() -> None:
    found = Stack([choice("test_tilted")]).weigh(cohort()).squeeze(1).tolist()
    assert found == pytest.approx([0.1 / 3.7, 0.6 / 3.7, 3.0 / 3.7])


def test_absolute_weights_are_not() -> None:
    norms = torch.tensor([0.1, 0.2, 0.4]).double()
    found = Stack([choice("test_close_ones", limit=0.1)]).weigh(
        cohort(norms=norms, gram=norms[:, None] * norms[None, :])
    )
    assert found.squeeze(1).tolist() == pytest.approx([0.1, 0.15, 0.15])


def test_weights_by_group() -> None:
    stack = Stack([choice("test_by_group"), choice("test_tilted")])
    found = stack.weigh(cohort(groups=("all", "head", "idle")))
    assert found.T.tolist() == [
        pytest.approx([0.1 / 3.7, 0.6 / 3.7, 3.0 / 3.7]),
        [1, 0, 0],
        [0, 0, 0],
    ]


@pytest.mark.parametrize("wrong", [(-1.0, 1.0, 1.0), (1.0, float("inf"), 1.0)])
def test_wrong_weights_name_their_strategy(wrong: tuple[float, ...]) -> None:
    stack = Stack([])
    stack.strategies = (Tilted.model_construct(weights=wrong),)
    with pytest.raises(ComputeFailed, match="test_tilted"):
        stack.weigh(cohort())


# ------------------------------------------------------------------------------------- phases


def test_a_phase_begins_and_ends() -> None:
    stack = Stack([choice("fedprox", rounds=(2, 4)), choice("fedavgm", rounds=(3, None))])
    names = [[c.name for c in stack.active(number)] for number in range(1, 6)]
    assert names == [[], ["fedprox"], ["fedprox", "fedavgm"], ["fedavgm"], ["fedavgm"]]


def test_out_of_its_phase_it_is_not_there() -> None:
    phased = LittleFederation([choice("fedprox", rounds=(3, None), mu=1.0)]).run(2)
    plain = LittleFederation([]).run(2)
    assert all(torch.equal(v, phased.model[k]) for k, v in plain.model.items())
    assert not torch.equal(phased.run(1).model["0.weight"], plain.run(1).model["0.weight"])


def test_states_and_memos_rest_out_of_their_phase() -> None:
    federation = LittleFederation(
        [
            choice("fedavgm", rounds=(1, 2)),
            choice("test_small_ones_vanish", rounds=(1, 2)),
            choice("test_disagreement", rounds=(1, 2)),
        ]
    ).run(1)
    velocity = federation.outer[0]["fedavgm.velocity"].clone()
    cut = {site: state["test_small_ones_vanish"]["cut"] for site, state in federation.state.items()}
    federation.run(2)
    assert torch.equal(federation.outer[0]["fedavgm.velocity"], velocity)
    assert federation.memos["test_disagreement"] == {"plans": 1}
    for site, state in federation.state.items():
        assert torch.equal(state["test_small_ones_vanish"]["cut"], cut[site])


def test_what_decides_the_manifest_has_no_phase() -> None:
    with pytest.raises(ConfigInvalid, match=r"can't be switched on and off; remove rounds"):
        Stack([choice("test_by_group", rounds=(2, None))])


# -------------------------------------------------------------------------------------- owners


def test_one_owner_each() -> None:
    with pytest.raises(ConfigInvalid, match="stands twice"):
        Stack([choice("fedavgm"), choice("fedavgm")])
    stack = Stack([choice("fedprox"), choice("trimmed_mean", trim=0.5)])
    assert stack.owner("reduce") is stack.strategies[1]
    assert stack.owner("local_step") is None
    assert stack.needs == {"our training loop", "individual updates"}
    with pytest.raises(ConfigInvalid, match="no wire codec"):
        stack.decode(b"", Manifest((TensorSpec("w", (1,), "float32"),)).tiles[0])


@pytest.mark.parametrize("other", ["label_smoothing", "mixup", "test_two_optimizers"])
def test_one_owner_of_the_loss(other: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"only one may own the loss, but focal and {other} do"):
        Stack([choice("focal"), choice(other)])


def test_what_reads_labels_does_not_stand_beside_what_blends_them() -> None:
    for names in (("mixup", "rank_mixup"), ("rank_mixup", "mixup")):
        with pytest.raises(
            ConfigInvalid, match="mixup blends the labels that rank_mixup would read"
        ):
            Stack([choice(name) for name in names])
    # Labels are read after the training, or not at all.
    Stack([choice("mixup"), choice("acls"), choice("mbls"), choice("temperature")])


def test_what_nobody_would_ask_for_does_not_stand_beside_who_owns_the_step() -> None:
    for names in (("test_two_optimizers", "acls"), ("acls", "test_two_optimizers")):
        with pytest.raises(
            ConfigInvalid, match="test_two_optimizers owns the whole training step, so what acls"
        ):
            Stack([choice(name) for name in names])
    # What changes batches or weights is asked whoever owns the step.
    Stack([choice("test_two_optimizers"), choice("test_small_ones_vanish")])


def test_terms_are_added_to_the_loss_that_is_owned_wherever_they_stand() -> None:
    found = []
    for names in (("label_smoothing", "acls"), ("acls", "label_smoothing")):
        stack = Stack([choice(n, **({"margin": 0.1} if n == "acls" else {})) for n in names])
        step: Any = SimpleNamespace(
            task=LittleTask(),
            outputs=torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]]),
            targets=torch.tensor([0, 2]),
        )
        found.append(stack.objective(stack.loss(step), step, {}))
    owned = F.cross_entropy(step.outputs, step.targets, label_smoothing=0.05)
    penalty = stack.strategies[0].penalty(step.outputs)  # type: ignore[attr-defined]
    assert float(penalty) > 0
    torch.testing.assert_close(found, [owned + 0.1 * penalty] * 2)


class Regression(LittleTask):
    features = frozenset()


class LogitsOnly(LittleTask):
    features = frozenset({"logits"})
    embedding = ""


class Untaught(LittleTask):
    teacher = Task.teacher
    val_data = Task.val_data
    student = Task.student
    proxy_data = Task.proxy_data


@pytest.mark.parametrize(
    ("task", "name", "lacking"),
    [(Regression, "focal", "labels and logits"), (Regression, "acls", "logits"),
     (LogitsOnly, "focal", "labels"), (LogitsOnly, "test_disagreement", "embedding and labels"),
     (Untaught, "seed", "teacher"), (Untaught, "temperature", "val data")],
)  # fmt: skip
def test_a_task_that_lacks_what_a_strategy_needs(
    task: type[LittleTask], name: str, lacking: str
) -> None:
    with pytest.raises(ConfigInvalid, match=f"strategy {name}: it needs {lacking}, which the task"):
        Stack([choice(name)]).build(task())
    Stack([choice("mixup"), choice("fedprox")]).build(task())


@pytest.mark.parametrize(
    ("chosen", "lacking"),
    [
        (choice("feddf"), "proxy data"),
        (choice("student"), "proxy data and student"),
        (choice("soft_tree", proxy="generated"), ""),
        (choice("student", proxy="folder:/x"), "student"),
    ],
)
def test_only_the_orchestrator_is_asked_for_proxies_and_a_student(
    chosen: StrategyChoice, lacking: str
) -> None:
    stack, task = Stack([chosen]), Untaught()
    stack.build(task)  # as a site does
    if lacking:
        words = f"strategy {chosen.name}: it needs {lacking}, which"
        with pytest.raises(ConfigInvalid, match=words):
            check_needs(stack.strategies, task, AT_THE_ORCHESTRATOR)
    else:
        check_needs(stack.strategies, task, AT_THE_ORCHESTRATOR)


def test_the_order_is_that_of_the_run_file() -> None:
    tile = Manifest((TensorSpec("w", (2,), "float32"),)).tiles[0]
    moment = Moment(round=1, seed=0, sites=2)
    noise = choice("test_outer_noise", deviation=1.0)
    outer = choice("fedavgm", learning_rate=10.0, momentum=0.0)
    found = []
    for choices in ([noise, outer], [outer, noise]):
        stack = Stack(choices)
        delta, _ = stack.step(torch.ones(2), torch.zeros(2), stack.init_state(tile), tile, moment)
        found.append(delta)
    drawn = torch.randn(2, generator=moment.generator("test_outer_noise", tile)) / 2
    torch.testing.assert_close(found[0], 10 * (1 + drawn))
    torch.testing.assert_close(found[1], 10 + drawn)


# ---------------------------------------------------------------------------------- placement


def test_what_is_placed_at_a_site_is_never_sent() -> None:
    federation = LittleFederation([choice("test_own_normalisation")]).run(2)
    for sent in federation.contributions.values():
        assert sent
        assert not any(name.startswith("1.") for name in sent)
    own = [federation.placed[site]["1.running_mean"] for site in federation.placed]
    assert not torch.equal(own[0], own[1])
    assert all(int(placed["1.num_batches_tracked"]) < 8 for placed in federation.placed.values())
    assert all(int(s["test_own_normalisation"]["rounds"]) == 2 for s in federation.state.values())


def test_frozen_and_orchestrators_own_are_never_sent_either() -> None:
    federation = LittleFederation([choice("test_frozen_and_shadow")])
    assert {t.name: t.placement for t in federation.manifest if t.placement != "shared"} == {
        "anchor": "frozen",
        "shadow": "orchestrator",
    }
    start = federation.model["shadow"].clone()
    federation.run(2)
    assert all({"anchor", "shadow"}.isdisjoint(sent) for sent in federation.contributions.values())
    assert not torch.equal(federation.model["shadow"], start)
    assert federation.memos["test_frozen_and_shadow"] == {"rounds": [1, 2]}
    model = federation.build()
    model.load_state_dict(federation.model)
    exported = federation.stack.export(model)
    assert torch.equal(exported.get_parameter("2.weight"), federation.model["shadow"])


# ------------------------------------------------------------------------------ side payloads


def test_a_sum_is_the_statistic_of_the_union() -> None:
    federation = LittleFederation([choice("test_four_payloads")]).run(1)
    merged = federation.summary.payloads
    data = [LittleTask(k).train_data().tensors for k in range(3)]  # type: ignore[attr-defined]
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    for label in range(3):
        own = inputs[targets == label].double()
        found = merged["test_four_payloads/class_sums"][label]
        torch.testing.assert_close(found[:-1], own.sum(dim=0), rtol=1e-12, atol=1e-12)
        assert found[-1] == len(own)
    torch.testing.assert_close(
        merged["test_four_payloads/mean"], inputs.double().mean(dim=0), rtol=1e-12, atol=1e-12
    )
    assert merged["test_four_payloads/rows"].shape == (6, 6)
    assert merged["test_four_payloads/examples"].flatten().tolist() == [16, 24, 32]


def test_what_was_merged_is_in_the_next_plan() -> None:
    federation = LittleFederation([choice("test_four_payloads")]).run(2)
    sums = federation.summary.payloads["test_four_payloads/class_sums"]
    planned = federation.plans[-1].payload["test_four_payloads"]["centres"]
    assert planned == (sums[:, :-1] / sums[:, -1:]).tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sum", [4.0, 6.0]),
        ("mean by count", [2.5, 3.5]),
        ("concatenate", [1.0, 2.0, 3.0, 4.0]),
        ("keep per site", [[1.0, 2.0], [3.0, 4.0]]),
    ],
)
def test_merge_rules(rule: Any, expected: list[Any]) -> None:
    payloads = [SidePayload(torch.tensor([a, a + 1.0]), rule) for a in (1.0, 3.0)]
    two = cohort(2, examples=torch.tensor([1.0, 3.0]).double())
    assert merge(payloads, two).tolist() == expected


# ---------------------------------------------------------------------------------- wire codec


def test_what_a_codec_loses_comes_with_the_next_contribution() -> None:
    """Error feedback: over rounds the sums of what was meant and of what was sent stay close."""
    federation = LittleFederation([choice("test_half_precision")])
    exact = LittleFederation([])
    federation.run(1)
    exact.run(1)
    for site, sent in federation.contributions.items():
        residual = federation.state[site]["test_half_precision"]
        meant = exact.contributions[site]
        for name, tensor in residual.items():
            torch.testing.assert_close(
                sent[name] + tensor.reshape(sent[name].shape), meant[name], rtol=0, atol=1e-9
            )


def test_a_codec_refuses_mangled_blocks() -> None:
    tile = Manifest((TensorSpec("w", (3,), "float32"),)).tiles[0]
    stack = Stack([choice("test_half_precision")])
    block = b"\x01\x03\x00\x00\x00" + bytes(6)
    assert stack.decode(block, tile).tolist() == [0, 0, 0]
    for wrong in (b"", block[:4], block[:-1], block + b"x", b"\x01\x04" + block[2:]):
        with pytest.raises(ValueError, match="block"):
            stack.decode(wrong, tile)
