"""What would fail in round 7 is refused when the run is launched, and nothing is queued."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import parse_daemon
from orchestrator.launching import committed_round, launch
from orchestrator.ledger import RunRow
from orchestrator.run_config import RunConfig
from protos.digest import digest
from protos.errors import ConfigInvalid, FarflungError, NotFound
from tests.support.workbench import Workbench

TASKS = '[tasks.t]\nsource = "tasks/t.py:T"\n'
LEAST = 'name = "first"\nrounds = 2\n[task]\nname = "t"\n'


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path, config=TASKS)
    bench.enrol("north", "south")
    yield bench
    bench.close()


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Workbench]:
    """An orchestrator without any task."""
    bench = Workbench(tmp_path / "bare")
    bench.enrol("north")
    yield bench
    bench.close()


def go(
    bench: Workbench, text: str = LEAST, start_from: str = "", start_file: bytes = b""
) -> RunRow:
    return launch(bench.engine, text, start_from, start_file)


def test_a_run_is_queued_with_its_resolved_configuration(bench: Workbench) -> None:
    row = go(bench)
    stored = bench.ledger.run("first")
    assert stored == row
    assert (stored.state, stored.rounds, stored.parent) == ("queued", 2, None)
    assert re.fullmatch(r"first-[0-9a-f]{6}", stored.id)
    assert bench.ledger.next_queued() == stored
    config = RunConfig.from_resolved(stored.config)
    assert config.digest == stored.config_digest
    # With every hyperparameter written out: a later release may have other defaults.
    (co_learning,) = config.stack
    assert co_learning.name == "co_learning"
    assert co_learning.params["epsilon"] > 0


def test_ids_are_made_of_the_name(bench: Workbench) -> None:
    assert re.fullmatch(r"my-run-1-[0-9a-f]{6}", go(bench, LEAST.replace("first", "My_Run.1")).id)


def test_a_name_that_is_taken_gets_a_number(bench: Workbench) -> None:
    assert [go(bench).name for _ in range(3)] == ["first", "first-2", "first-3"]
    assert [r.name for r in bench.ledger.runs()] == ["first", "first-2", "first-3"]


REFUSALS: list[tuple[str, type[FarflungError], str, dict[str, Any]]] = [
    (
        LEAST + "[cohort]\nquorum = 1\nstale = 1\n[[strategy]]\nname = 'feature_replay'\n",
        ConfigInvalid,
        "what feature_replay sends beside its weights belongs to the model of its round",
        {"key": "cohort.stale"},
    ),
    ("rounds = 2", ConfigInvalid, r"run\.toml: name: ", {"key": "name"}),
    (LEAST.replace("2", "0"), ConfigInvalid, r"run\.toml: rounds: ", {"key": "rounds"}),
    (
        LEAST + '[cohort]\nsites = ["north", "west"]',
        NotFound,
        "no site west is enrolled; enrolled are north, south",
        {"key": "cohort.sites", "site": "west"},
    ),
    (
        LEAST + "[cohort]\nquorum = 3",
        ConfigInvalid,
        "3 sites are needed, 2 are enrolled",
        {"key": "cohort.quorum"},
    ),
    (
        LEAST + "[[strategy]]\nname = 'fedproxx'",
        NotFound,
        "there is no fedproxx; did you mean fedprox",
        {},
    ),
    (
        LEAST + "[[strategy]]\nname = 'fedprox'\nmoo = 1",
        ConfigInvalid,
        "strategy fedprox: moo: ",
        {},
    ),
    (
        LEAST + "[[strategy]]\nname = 'fedprox'\n[[strategy]]\nname = 'fedprox'",
        ConfigInvalid,
        "fedprox stands twice",
        {},
    ),
    (
        LEAST + "[[strategy]]\nname = 'focal'\n[[strategy]]\nname = 'mixup'",
        ConfigInvalid,
        "only one may own the loss, but focal and mixup do; remove one",
        {},
    ),
    (
        LEAST + "[[strategy]]\nname = 'rank_mixup'\n[[strategy]]\nname = 'mixup'",
        ConfigInvalid,
        "mixup blends the labels that rank_mixup would read; remove one",
        {},
    ),
    (
        'init = { from = "site:west" }\n' + LEAST,
        NotFound,
        "init.from: no site west is enrolled",
        {"key": "init.from"},
    ),
    (
        'init = { from = "nowhere.safetensors" }\n' + LEAST,
        ConfigInvalid,
        '"nowhere.safetensors" is not "task"',
        {"key": "init.from"},
    ),
    ('init = { from = "other@1" }\n' + LEAST, NotFound, "other", {}),
]


@pytest.mark.parametrize(("text", "error", "what", "facts"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_refusals(
    bench: Workbench, text: str, error: type[FarflungError], what: str, facts: dict[str, Any]
) -> None:
    with pytest.raises(error, match=what) as caught:
        go(bench, text)
    assert type(caught.value) is error
    assert facts.items() <= caught.value.facts.items()
    assert bench.ledger.runs() == []
    # A person reads it: neither where in our code, nor in which process.
    assert "at item" not in caught.value.message
    assert ".py:" not in caught.value.message


def test_nobody_enrolled(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, config=TASKS)
    bench.ledger.invite("north", "t", 4e9)
    with pytest.raises(ConfigInvalid, match="no site is enrolled yet; `farflung invite SITE`"):
        go(bench)
    bench.close()


def test_a_revoked_site_is_not_enrolled(bench: Workbench) -> None:
    bench.ledger.revoke("south")
    with pytest.raises(NotFound, match="no site south is enrolled; enrolled are north"):
        go(bench, LEAST + '[cohort]\nsites = ["north", "south"]\nquorum = 1')


def test_what_needs_the_task_is_refused_where_it_is_not(bare: Workbench) -> None:
    with pytest.raises(
        ConfigInvalid, match=r"this orchestrator does not have it; add \[tasks\.t\]"
    ):
        go(bare)
    with pytest.raises(ConfigInvalid, match=r"proxy data needed.*does not have the task t"):
        go(bare, 'init = { from = "site:north" }\n' + LEAST + "[[strategy]]\nname = 'feddf'")
    with pytest.raises(ConfigInvalid, match=r"assess\.holdout: its data is needed.* not have"):
        go(bare, 'init = { from = "site:north" }\n' + LEAST + "[assess]\nholdout = true")
    assert bare.ledger.runs() == []
    assert go(bare, 'init = { from = "site:north" }\n' + LEAST).state == "queued"


def test_what_a_task_lacks_is_said_at_launch(bench: Workbench) -> None:
    bench.run_tasks_here()
    source = bench.home.path / "tasks" / "t.py"
    source.parent.mkdir(exist_ok=True)
    source.write_text(
        "from torch import nn\nfrom farflung import Task\n"
        "class T(Task):\n    def model(self):\n        return nn.Linear(2, 2)\n"
    )
    with pytest.raises(
        ConfigInvalid, match=r"^run\.toml: task t: strategy feddf: it needs proxy data, which the t"
    ):
        go(bench, LEAST + "[[strategy]]\nname = 'feddf'")
    with pytest.raises(ConfigInvalid, match=r"assess\.holdout: .* neither val_data nor test_data"):
        go(bench, LEAST + "[assess]\nholdout = true")
    with pytest.raises(ConfigInvalid, match=r'strategy one: the model has no module "nowhere"'):
        go(bench, LEAST + "[[strategy]]\nname = 'one'\ntail = 'nowhere'")
    source.with_name("broken.py").write_text("raise ModuleNotFoundError('numpie')")
    bench.engine.config = parse_daemon('[tasks.t]\nsource = "tasks/broken.py:T"\n')
    with pytest.raises(ConfigInvalid, match=r"task t: whether it has .* can't be said: .*numpie"):
        go(bench, LEAST + "[[strategy]]\nname = 'fedprox'")
    assert bench.ledger.runs() == []


def test_a_file_is_kept_with_the_run(bare: Workbench) -> None:
    """And needs no task here."""
    row = go(bare, 'init = { from = "m.safetensors" }\n' + LEAST, start_file=b"weights")
    init = RunConfig.from_resolved(row.config).init
    assert (init.start, init.digest) == ("m.safetensors", digest(b"weights"))
    assert bare.store.get_bytes(init.digest) == b"weights"
    assert RunConfig.from_resolved(row.config).digest == row.config_digest


def test_a_file_that_is_too_large_is_refused(
    bare: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.launching.MAX_START_BYTES", 3)
    with pytest.raises(FarflungError, match="7 bytes exceed 3"):
        go(bare, 'init = { from = "m.safetensors" }\n' + LEAST, start_file=b"weights")


# -- starting from another run ----------------------------------------------------------------------


@pytest.fixture
def old(bench: Workbench) -> Workbench:
    bench.run("old")
    bench.commit("old", 0)
    for number, accuracy in ((1, 0.75), (2, 0.5)):
        bench.commit("old", number, summary={"scores": {"val.accuracy": accuracy}})
    return bench


@pytest.mark.parametrize(("start", "number"), [("old@2", 2), ("old@0", 0), ("old@best", 1)])
def test_a_run_starts_from_a_round(old: Workbench, start: str, number: int) -> None:
    assert go(old, f'init = {{ from = "{start}" }}\n' + LEAST).parent == ("old", number)
    # What the command line says comes before what the file says.
    row = go(old, 'init = { from = "old@1" }\n' + LEAST, start_from=start)
    assert row.parent == ("old", number)
    assert row.config["init"]["from"] == start


@pytest.mark.parametrize("start", ["old@3", "old@01", "none@1"])
def test_a_round_that_is_not_there(old: Workbench, start: str) -> None:
    with pytest.raises(NotFound):
        go(old, start_from=start)
    assert [r.name for r in old.ledger.runs()] == ["old"]


def test_committed_rounds_by_name(old: Workbench) -> None:
    run = old.ledger.run("old")
    assert committed_round(old.engine, run, "").round == 2
    assert committed_round(old.engine, run, "best").round == 1
    assert committed_round(old.engine, run, "0").round == 0
    with pytest.raises(NotFound, match=r"no committed round 9; committed are rounds 0 to 2"):
        committed_round(old.engine, run, "9")
    empty = old.run("empty")
    for which in ("", "best", "0"):
        with pytest.raises(NotFound, match="committed are none yet"):
            committed_round(old.engine, empty, which)
