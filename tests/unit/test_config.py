"""Run files and the daemon's file: defaults, and errors that name the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import parse_daemon
from orchestrator.run_config import RunConfig, parse_run
from protos.errors import ConfigInvalid

LEAST = 'name = "r"\nrounds = 2\n[task]\nname = "t"\n'

FULL = """
name = "fashion"
rounds = 12
seed = 7
on_error = "hold"
task = { name = "fashion_mnist", params = { width = 32 } }
init = { from = "site:north" }

[cohort]
sites = ["north", "south", "east"]
quorum = 2
deadline_s = 60
attempts = 2

[local]
work = { steps = 50 }
batch_size = 32
lr = 0.05
gradient_clip = 1.0
optimizer = { name = "sgd", momentum = 0.5, weight_decay = 1e-4 }

[assess]
every = 2

[[strategy]]
name = "co_learning"
decay = 0.25

[[strategy]]
name = "fedprox"
rounds = [3, 8]
mu = 0.1
"""


def test_defaults() -> None:
    config = parse_run(LEAST)
    assert config.cohort.sites == "all"
    assert config.cohort.quorum == "all"
    assert config.local.work.epochs == 5
    assert config.init.start == "task"
    assert config.assess.every == 1
    assert [c.name for c in config.stack] == ["co_learning"]
    assert config.stack[0].params == {}


def test_no_strategy_is_co_learning_and_an_empty_list_is_fedavg() -> None:
    assert [c.name for c in parse_run("strategy = []\n" + LEAST).stack] == []
    assert [c.name for c in parse_run('strategy = ["fedprox"]\n' + LEAST).stack] == ["fedprox"]


def test_every_key_is_read() -> None:
    config = parse_run(FULL)
    assert config.task.params == {"width": 32}
    assert config.init.start == "site:north"
    assert config.cohort.sites == ("north", "south", "east")
    assert (config.cohort.quorum, config.cohort.deadline_s, config.cohort.attempts) == (2, 60, 2)
    assert (config.local.work.unit, config.local.work.amount) == ("steps", 50)
    assert config.local.optimizer.momentum == 0.5
    assert config.local.gradient_clip == 1.0
    assert config.on_error == "hold"
    first, second = config.stack
    assert (first.params, first.rounds) == ({"decay": 0.25}, None)
    assert (second.params, second.rounds) == ({"mu": 0.1}, (3, 8))


@pytest.mark.parametrize("text", [LEAST, FULL, "strategy = []\n" + LEAST])
def test_resolved_configuration_comes_back_with_its_digest(text: str) -> None:
    config = parse_run(text)
    stored = json.loads(json.dumps(config.resolved))
    again = RunConfig.from_resolved(stored)
    assert again.digest == config.digest
    assert again.stack == config.stack
    assert again.resolved == config.resolved


def test_digest_is_of_the_meaning() -> None:
    written_out = 'rounds = 2\nname = "r"\nseed = 0\n[task]\nparams = {}\nname = "t"\n'
    assert parse_run(written_out).digest == parse_run(LEAST).digest
    assert parse_run(LEAST.replace("2", "3")).digest != parse_run(LEAST).digest


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "name"),
        ('name = "r"\n[task]\nname = "t"', "rounds"),
        ('name = "r"\nrounds = 1', "task"),
        (LEAST.replace('"r"', '"a b"'), "name"),
        (LEAST.replace("2", "0"), "rounds"),
        (LEAST.replace("2", '"2 rounds"'), "rounds"),
        (LEAST.replace('"t"', '"../t"'), "task.name"),
        ("colour = 1\n" + LEAST, "colour"),
        ("seed = -1\n" + LEAST, "seed"),
        ('on_error = "cry"\n' + LEAST, "on_error"),
        ("init = { from = '' }\n" + LEAST, "init.from"),
        ("init = { form = 'task' }\n" + LEAST, "init.form"),
        (LEAST + "[cohort]\nquorum = 0", "cohort.quorum"),
        (LEAST + "[cohort]\nquorum = 'most'", "cohort.quorum"),
        (LEAST + "[cohort]\nsites = []", "cohort"),
        (LEAST + "[cohort]\nsites = ['a', 'a']", "cohort"),
        (LEAST + "[cohort]\nsites = ['a']\nquorum = 2", "cohort"),
        (LEAST + "[cohort]\nsites = ['a/b']", "cohort.sites"),
        (LEAST + "[cohort]\ndeadline_s = 0", "cohort.deadline_s"),
        (LEAST + "[cohort]\ndeadline_s = nan", "cohort.deadline_s"),
        (LEAST + "[cohort]\ndeadline_s = inf", "cohort.deadline_s"),
        (LEAST + "[cohort]\ndeadline = 5", "cohort.deadline"),
        (LEAST + "[local]\nlr = 0", "local.lr"),
        (LEAST + "[local]\nwork = { epochs = 1, steps = 1 }", "local.work"),
        (LEAST + "[local]\nwork = {}", "local.work"),
        (LEAST + "[local]\nwork = { hours = 1 }", "local.work.hours"),
        (LEAST + "[local]\noptimizer = { name = 'lion' }", "local.optimizer.name"),
        (LEAST + "[local]\noptimizer = { momentum = 1.0 }", "local.optimizer.momentum"),
        (LEAST + "[assess]\nevery = -1", "assess.every"),
        (LEAST + "[[strategy]]\nmu = 1", "strategy.0.name"),
        (LEAST + "[[strategy]]\nname = 'a'\n[[strategy]]\nname = 'a b'", "strategy.1.name"),
        (LEAST + "[[strategy]]\nname = 'a'\nparams = {}\nmu = 1", "strategy.0.mu"),
        (LEAST + "[[strategy]]\nname = 'a'\nrounds = [1, 2, 3]", "strategy.0.rounds"),
        (LEAST + "[[strategy]]\nname = 'a'\nrounds = [8, 3]", "strategy.0"),
        (LEAST + "[[strategy]]\nname = 'a'\nrounds = [-1, 3]", "strategy.0"),
        ("strategy = 'fedprox'\n" + LEAST, "strategy"),
        # What has no JSON form can be neither digested nor sent.
        (LEAST + "[task.params]\nx = nan", "task.params"),
        (LEAST + "[task.params]\nx = [{ y = inf }]", "task.params"),
        (LEAST + "[[strategy]]\nname = 'a'\nmu = nan", "strategy.0.params"),
    ],
)
def test_error_names_the_key(text: str, key: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_run(text, "my.toml")
    found = str(caught.value.facts["key"])
    assert found == key or found.startswith(f"{key}."), (found, caught.value.message)
    assert caught.value.message.startswith(f"my.toml: {key}")


def test_dates_of_a_run_file_are_text() -> None:
    config = parse_run(LEAST + "[task.params]\nday = 2026-01-02")
    assert config.resolved["task"]["params"] == {"day": "2026-01-02"}
    assert RunConfig.from_resolved(config.resolved).digest == config.digest


@pytest.mark.parametrize("text", ["name = ", "a = 1\na = 2", "\0"])
def test_what_is_not_toml_is_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"my.toml: not TOML: "):
        parse_run(text, "my.toml")


# -- the daemon -------------------------------------------------------------------------------------


def test_daemons_defaults_are_safe() -> None:
    config = parse_daemon("")
    assert config.listen.bind == "127.0.0.1:8470"
    assert config.dashboard.host == "127.0.0.1"
    assert config.ray.private_networks == ()
    assert config.tasks == {}
    # The grace is longer than the silence after which a site counts as gone.
    assert config.sites.heartbeat_s < config.sites.gone_s < config.sites.grace_s


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[lisen]\n", "lisen"),
        ("[listen]\nport = 1", "listen.port"),
        ("[listen]\nbind = 8470", "listen.bind"),
        ("[dashboard]\nport = 65536", "dashboard.port"),
        ("[dashboard]\nport = -2", "dashboard.port"),
        ("[ray]\ncpus = -1", "ray.cpus"),
        ("[ray]\nobject_store_bytes = 1", "ray.object_store_bytes"),
        ("[plugins]\nseconds = 0", "plugins.seconds"),
        ("[plugins]\nmemory_bytes = 1", "plugins.memory_bytes"),
        ("[retention]\nmodels = 'some'", "retention.models"),
        ("[retention]\nmodels = -1", "retention.models"),
        ("[retention]\ncontributions = -1", "retention.contributions"),
        ("[sites]\nheartbeat_s = 0", "sites.heartbeat_s"),
        ("[sites]\ntoken_valid_s = -1", "sites.token_valid_s"),
        ("[tasks.digits]\nsettings = {}", "tasks.digits.source"),
        ("[tasks.'a b']\nsource = 'x'", "tasks.a b"),
    ],
)
def test_error_of_the_daemons_file_names_the_key(text: str, key: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_daemon(text, "farflung.toml")
    found = str(caught.value.facts["key"])
    assert found == key or found.startswith(f"{key}."), (found, caught.value.message)
    assert caught.value.message.startswith(f"farflung.toml: {key}")


def test_configurations_do_not_change() -> None:
    config: Any = parse_run(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3
    with pytest.raises(ValueError, match="frozen"):
        config.cohort.quorum = 1


def test_home_of_the_examples_is_read(tmp_path: Path) -> None:
    text = Path("deploy/examples/farflung.toml").read_text()
    assert parse_daemon(text).tasks
