"""Methods of distillation and calibration: a site that is killed in mid-round changes no bit.

Each with tiny data through three sites and the real exchange, once undisturbed and once with
SIGKILL of a site's agent and trainer in the middle of an epoch of the second round, where it has a
state to lose and goes on from what was saved a step before. What lives at a site is in no contribution.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from orchestrator.views import Round
from protos.contribution import Header
from protos.faults import Fault
from protos.manifest import Manifest
from protos.plan import StrategyChoice
from strategies.stack import Stack
from tests.support.blobs import Blobs
from tests.support.field import SITES, Field

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("killed"), pytest.mark.timeout(600)]

VICTIM = "south"
METHODS: dict[str, list[dict[str, Any]]] = {
    "4 SRDL": [{"name": "srdl"}],
    "6 ONE": [{"name": "one", "tail": "second", "exchange": "personal"}],
    "7 CLSA": [{"name": "clsa", "levels": ["first"], "own": True}],
    "23 SEED": [{"name": "seed", "queue": 100, "weight": 0.5}],
    "30 bag of tricks": [{"name": "bag_of_tricks", "mixup": 0.2}],
    "38 soft tree": [{"name": "soft_tree", "depth": 2, "steps": 20}],
    "42 FYI": [{"name": "fyi", "per_class": 2, "iterations": 5, "every": 1, "use": "distil", "steps": 5,
                "flip": False}],
    "46 ACLS": [{"name": "acls", "margin": 1.0}, {"name": "temperature"}],
    "48 RankMixup": [{"name": "rank_mixup"}],
    "49 ALIFE": [
        {"name": "alife", "new": 1, "since": [2]},
        {"name": "feature_replay", "memory": 4, "steps": 5},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def open_sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Sites whose policy lets out what FYI and feature replay send."""
    rules = ["sum", "mean by count", "concatenate", "keep per site"]
    policy = {"side_payloads": rules, "condensed_data": True}
    saved = {"checkpoint": 0.001}  # after every step
    field = Field(tmp_path_factory.mktemp("field"), policy=policy, trainer=saved)
    with field.federation:
        yield field


@pytest.fixture
def field(open_sites: Field) -> Iterator[Field]:
    yield open_sites
    open_sites.clear()


def two_rounds(field: Field, name: str, strategy: list[dict[str, Any]], kill: bool) -> list[Round]:
    """A run of one round and another; in the second one a site may be killed."""
    federation = field.federation
    cohort = {"quorum": "all", "deadline_s": 300}
    config = field.config(name, rounds=1, strategy=strategy, cohort=cohort, seed=5)
    run = federation.launch(config)
    assert federation.wait(run, 200).state == "finished"
    if kill:  # after step 8 of 12, where the trainer is stopped, so that its agent can go with it
        fault = Fault("train.stepped", 8, do="stop", process="trainer")
        federation.fail(VICTIM, fault)
    federation.client.extend(run, 2)
    if kill:
        federation.await_fault(VICTIM, 100)
        federation.kill(VICTIM)
        federation.start_site(VICTIM)
    view = federation.wait(run, 200)
    assert view.state == "finished", view.reason
    rounds = federation.rounds(run)
    assert [(r.attempt, len(r.missing)) for r in rounds] == [(1, 0), (1, 0)]
    assert all(p.state == "done" for r in rounds for p in r.plugins), rounds[-1].plugins
    return rounds


def steps(field: Field) -> int:
    """Steps of training that the victim has made."""
    return field.federation.trace(VICTIM).count(("trainer", "train.stepped"))


def sent(field: Field, run: str) -> set[str]:
    """Names of all tensors in the contributions of a run."""
    home = field.federation.home
    with closing(sqlite3.connect(f"file:{home.ledger}?mode=ro", uri=True)) as ledger:
        rows = ledger.execute(
            "SELECT header FROM contributions WHERE run = ? AND kind = 'train'", (run,)
        ).fetchall()
    headers = [Header.decode(row[0]) for row in rows]
    assert len(headers) == 2 * len(SITES)
    names = {payload.name for header in headers for payload in header.payloads}
    for digest in {header.manifest for header in headers}:
        manifest = Manifest.decode((home.store / "manifests" / f"{digest}.json").read_bytes())
        names |= {name for spec in manifest for name in (spec.name, *spec.ties)}
    return names


@pytest.mark.parametrize("row", METHODS)
def test_a_kill_in_mid_round_changes_no_bit_and_what_is_a_sites_stays_there(
    field: Field, row: str
) -> None:
    strategy, name = METHODS[row], METHODS[row][0]["name"]
    began = steps(field)
    undisturbed = two_rounds(field, f"{name}-undisturbed", strategy, kill=False)
    planned = steps(field) - began
    killed = two_rounds(field, f"{name}-killed", strategy, kill=True)
    assert steps(field) - began == 2 * planned + 1  # the step that was not saved yet
    assert [r.model for r in killed] == [r.model for r in undisturbed]
    files = [{p.name: p.files for p in r.plugins} for r in undisturbed]
    assert [{p.name: p.files for p in r.plugins} for r in killed] == files

    choices = [
        StrategyChoice(name=s["name"], params={k: v for k, v in s.items() if k != "name"})
        for s in strategy
    ]
    stack, task = Stack(choices), Blobs()
    manifest = stack.manifest(stack.build(task), task)
    own = {spec.name for spec in manifest.of("site", "frozen")}
    assert bool({spec.name for spec in manifest.of("site")}) == (name in ("one", "clsa"))
    assert not own & sent(field, killed[0].run)
