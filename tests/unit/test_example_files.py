"""The configuration files of the examples: what the README shows must load and fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import parse_daemon
from orchestrator.run_config import parse_run
from site_agent.config import SiteConfig
from strategies.loading import load_task
from strategies.registry import make

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/run.toml"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def run_of(folder):
    return parse_run((folder / "run.toml").read_text(), str(folder / "run.toml"))


def site_of(folder):
    return SiteConfig.load(folder / "site.toml")


def test_there_are_three():
    assert [folder.name for folder in FOLDERS] == ["digits", "fashion-mnist", "lora"]


def test_the_site_has_the_task_of_the_run_and_takes_its_parameters(folder):
    run, site = run_of(folder), site_of(folder)
    mine = site.tasks[run.task.name]
    made = load_task(run.task.name, mine.source, run.task.params, mine.settings, folder)
    assert made.settings.part == 0
    assert made.settings.parts == 3
    assert made.model() is not None


def test_the_site_accepts_the_run(folder):
    run, policy = run_of(folder), site_of(folder).policy
    assert {choice.name for choice in run.stack} == set(policy.strategies)
    assert run.local.work.epochs <= policy.max_epochs
    for choice in run.stack:
        if choice.name == "co_learning":
            assert choice.params.get("max_epochs", policy.max_epochs) <= policy.max_epochs


def test_the_orchestrator_has_the_task_of_the_run(folder):
    run, daemon = run_of(folder), parse_daemon((EXAMPLES / "farflung.toml").read_text())
    there = daemon.tasks[run.task.name]
    # The same class as at the site, wherever the home is; and no part of the data.
    assert there.source.rpartition(":")[2] == site_of(folder).sources(folder)[run.task.name].cls
    assert Path(there.source.rpartition(":")[0]).name == "images.py"
    assert "part" not in there.settings


def test_the_strategies_take_their_hyperparameters(folder):
    for choice in run_of(folder).stack:
        assert make(choice.name, choice.params).name == choice.name
