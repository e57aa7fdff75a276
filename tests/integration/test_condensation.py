"""FYI in a real federation: who may condense, what arrives, who sent it, and what learns from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from safetensors.torch import load

from orchestrator.ledger import ContributionRow, Ledger
from orchestrator.views import Plugin, Round
from protos.contribution import Header
from tests.support.blobs import CLASSES, FEATURES
from tests.support.field import SITES, Field

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("condensation"), pytest.mark.timeout(300)]

WILLING, UNWILLING = ("north", "south"), "east"
EXAMPLES = 2
FYI = {"name": "fyi", "per_class": EXAMPLES, "flip": False, "iterations": 30, "image_rate": 0.3}
IDLE = {"work": {"steps": 1}, "batch_size": 20, "lr": 1e-9}  # what is learned, is learned elsewhere


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Three sites; the policy of two allows condensed examples."""
    field = Field(tmp_path_factory.mktemp("field"))
    for site in WILLING:
        field.federation.sites[site]["policy"] = {"condensed_data": True}
    with field.federation:
        yield field


def config(
    field: Field, name: str, sites: tuple[str, ...], strategy: list[dict[str, Any]], rounds: int = 1
) -> dict[str, Any]:
    cohort = {"sites": list(sites), "quorum": "all", "deadline_s": 120}
    return field.config(name, rounds=rounds, cohort=cohort, strategy=strategy, local=IDLE)


def complete(field: Field, config: dict[str, Any]) -> list[Round]:
    view = field.federation.run(config, 200)
    assert view.state == "finished", view.reason
    return field.federation.rounds(view.id)


def plugin(round: Round, name: str) -> Plugin:
    found = next(p for p in round.plugins if p.name == name)
    assert found.state == "done", found.reason
    return found


def contributions(field: Field, round: Round) -> list[ContributionRow]:
    with closing(Ledger.open(field.federation.home.ledger)) as ledger:
        return ledger.contributions(round.run, round.round, round.attempt, "train")


def test_a_site_whose_policy_is_silent_refuses_and_says_why(field: Field) -> None:
    federation = field.federation
    run = federation.launch(config(field, "unwilling", SITES, [FYI]))
    view = federation.wait(run, 120)
    assert view.state == "paused"
    assert f"missing {UNWILLING}" in view.reason
    assert "condensed from this site's data" in view.reason
    assert "condensed_data" in view.reason
    (round,) = federation.rounds(run)
    assert not contributions(field, round)
    # The same site takes part in a run that asks for nothing of the kind.
    assert not complete(field, config(field, "plain", SITES, []))[0].missing


def test_examples_arrive_are_accounted_for_and_teach(field: Field) -> None:
    stack = [FYI, {"name": "feddf", "proxy": "condensed", "steps": 20}]
    first, second = complete(field, config(field, "condensed", WILLING, stack, rounds=2))

    each = float(CLASSES * EXAMPLES)
    report = plugin(first, "fyi").report
    assert {site: report[f"examples.{site}"] for site in WILLING} == dict.fromkeys(WILLING, each)
    assert plugin(first, "feddf").report["samples"] == 2 * each
    assert "examples.north" not in plugin(second, "fyi").report  # they are sent once
    assert plugin(second, "feddf").report["samples"] == 2 * each  # and kept

    kept = field.federation.client.kept(first.run, 2, "fyi")
    pool = load(kept["condensed.safetensors"])
    assert tuple(pool["inputs"].shape) == (2 * CLASSES * EXAMPLES, FEATURES)
    facts = json.loads(kept["condensed.json"])
    counts = {str(label): EXAMPLES for label in range(CLASSES)}
    assert (facts["round"], facts["sites"]) == (1, dict.fromkeys(WILLING, counts))

    # Provenance: what each site signed names the examples, and the ledger has it.
    rows = contributions(field, first)
    assert [row.site for row in rows] == sorted(WILLING)
    for row in rows:
        sent = {p.name: p for p in Header.decode(row.header).payloads}
        assert sent["fyi/inputs"].merge == sent["fyi/targets"].merge == "condensed"
        assert tuple(sent["fyi/inputs"].shape) == (CLASSES * EXAMPLES, FEATURES)
    for row in contributions(field, second):
        assert not any(p.name.startswith("fyi/") for p in Header.decode(row.header).payloads)


def test_a_newcomer_is_warmed_up_by_them(field: Field) -> None:
    """Sites do not train, so what the committed model knows comes from the examples."""
    (cold,) = complete(field, config(field, "cold", WILLING, [FYI]))
    warm_up = {**FYI, "use": "warm up", "steps": 200, "learning_rate": 0.02}
    (warm,) = complete(field, config(field, "warm", WILLING, [warm_up]))
    gained = warm.scores["test.accuracy"] - cold.scores["test.accuracy"]
    assert warm.scores["test.accuracy"] > 0.7, (cold.scores, warm.scores)
    assert gained > 0.1, (cold.scores, warm.scores)
    # A run that begins with it begins with what it knows.
    start = {"init": {"from": f"{warm.run}@1"}}
    (begun,) = complete(field, config(field, "begun", SITES, []) | start)
    assert begun.scores["test.accuracy"] == pytest.approx(warm.scores["test.accuracy"], abs=0.03)
