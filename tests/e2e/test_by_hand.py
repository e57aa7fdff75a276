"""As a new user would: three terminals, every command of the manual, one run after another."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.child import Child, program
from orchestrator.port import free_port
from orchestrator.toml_text import document
from tests.support.blobs import Blobs

BLOBS = f"{Path(__file__).parents[1] / 'support' / 'blobs.py'}:Blobs"

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(240)]


class Terminals:
    """A folder, and commands that are run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.environment = {
            **os.environ,
            "FARFLUNG_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        }
        self._children: list[Child] = []

    def farflung(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [*program("farflung", "orchestrator.cli"), *words],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def site(self, name: str, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [*program("farflung-site", "site_agent.cli"), *words, "--home", str(self.root / name)],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def stays(self, name: str, *command: str) -> Child:
        child = Child(name, command, self.root / "log" / f"{name}.log", self.environment)
        self._children.append(child)
        return child

    def close(self) -> None:
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.join(20)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    opened = Terminals(tmp_path)
    try:
        yield opened
    finally:
        opened.close()


def test_by_hand(terminals: Terminals) -> None:
    t = terminals
    port = free_port()
    t.farflung("init", "--address", f"localhost:{port}")
    settings = t.home / "farflung.toml"
    text = settings.read_text().replace("port = 8471", "port = 0")
    settings.write_text(text + document({"tasks": {"blobs": {"source": BLOBS}}}))
    assert "holds a federation already" in t.farflung("init", code=75)
    assert "farflung serve" in t.farflung("runs", code=69)

    serve = t.stays("serve", *program("farflung", "orchestrator.cli"), "serve")
    assert f"sites: localhost:{port} · page: http://127.0.0.1:" in serve.first_line(60)

    for part, name in enumerate(("north", "south")):
        token = t.farflung("invite", name).strip()
        assert name in t.site(name, "join", token)
        assert "token" in t.site(f"{name}-again", "join", token, code=77)
        tasks = {"blobs": {"source": BLOBS, "settings": {"part": part}}}
        (t.root / name / "site.toml").write_text(document({"tasks": tasks}))
        t.stays(
            name, *program("farflung-site", "site_agent.cli"), "run", "--home", str(t.root / name)
        )

    run_file = t.root / "run.toml"
    run_file.write_text(
        document(
            {
                "name": "first",
                "rounds": 2,
                "task": {"name": "blobs"},
                "cohort": {"sites": ["north", "south"], "quorum": "all"},
                "local": {"work": {"epochs": 2}, "batch_size": 20, "lr": 0.1},
                "strategy": [{"name": "co_learning"}, {"name": "temperature"}],
            }
        )
    )
    said = t.farflung("launch", "run.toml", "--follow")
    assert "round 2 of 2 is committed" in said
    assert "Run first finished: 2 of 2 rounds" in said

    watched = [json.loads(line) for line in t.farflung("watch", "first", "--json").splitlines()]
    states = [event["data"]["state"] for event in watched if event["kind"] == "run"]
    assert states[0] in ("queued", "running")
    assert states[-1] == "finished"
    assert {s["name"]: s["state"] for s in json.loads(t.farflung("sites", "--json"))} == {
        "north": "attached",
        "south": "attached",
    }
    rounds = json.loads(t.farflung("rounds", "first", "--json"))
    assert [r["round"] for r in rounds] == [1, 2]
    assert "2 epochs" in t.farflung("rounds", "first")

    t.farflung("export", "first", "model", "--round", "best")
    assert scores_of(t.root / "model" / "model.safetensors") == pytest.approx(
        scored(t, "first", rounds), rel=1e-6
    )

    t.farflung("launch", "run.toml", "--follow", "--from", "first@best")
    first, second = json.loads(t.farflung("runs", "--json"))
    best = rounds[first["best"] - 1]
    assert json.loads(t.farflung("rounds", second["id"], "--json"))[0]["base"] == best["model"]

    assert json.loads(t.farflung("extend", "first", "--rounds", "3", "--json"))["rounds"] == 3
    t.farflung("watch", "first")
    assert json.loads(t.farflung("runs", "--json"))[0]["committed"] == 3
    assert json.loads(t.farflung("gc", "--dry-run", "--json"))["dry_run"]
    assert "ok" in t.farflung("doctor")
    assert "south is revoked" in t.farflung("revoke", "south")


def scored(t: Terminals, run: str, rounds: list[dict[str, Any]]) -> float:
    best = json.loads(t.farflung("runs", "--json"))[0]["best"]
    return float(rounds[best - 1]["scores"]["test.nll"])


def scores_of(file: Path) -> float:
    """The exported file, opened without anything of ours but the model's class."""
    task = Blobs()
    model = task.model()
    model.load_state_dict(load_file(file))
    model.eval()
    inputs, targets = task.test_data().tensors
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(inputs).double(), targets).item()


def test_serve_says_where_it_is_as_json_and_ends_on_sigterm(terminals: Terminals) -> None:
    terminals.farflung("init")
    settings = terminals.home / "farflung.toml"
    settings.write_text(
        settings.read_text().replace("port = 8471", "port = 0").replace(":8470", ":0")
    )
    serve = terminals.stays("serve", sys.executable, "-m", "orchestrator.cli", "serve", "--json")
    ready = json.loads(serve.first_line(60))
    assert ready["event"] == "ready"
    assert ready["pid"] == serve.pid
    assert "in use by process" in terminals.farflung("serve", code=75)
    serve.terminate()
    assert serve.join(30) == 0
