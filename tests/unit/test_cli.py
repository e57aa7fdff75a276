"""The command line: help, words in, sentences and exit codes out."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from orchestrator import views
from orchestrator.cli import options
from orchestrator.cli.app import app, code_of
from orchestrator.cli.follow import Screen, verdict
from protos.errors import ERRORS, ComputeFailed, ConfigInvalid, DeadlineExceeded, TaskFailed
from tests.unit.fake_operator import FakeOperator, a_round, a_run, fake_daemon

RUN_FILE = 'name = "fashion"\nrounds = 3\n[task]\nname = "digits"\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def operator(home: Path) -> Iterator[FakeOperator]:
    with fake_daemon(home) as running:
        yield running


@pytest.fixture
def farflung(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FARFLUNG_HOME", str(home))
    return lambda *words: code_of([str(word) for word in words])


def commands() -> Iterator[tuple[str, Any]]:
    root: Any = get_command(app)
    for name, command in root.commands.items():
        for sub, inner in getattr(command, "commands", {}).items():
            yield f"{name} {sub}", inner
        if not hasattr(command, "commands"):
            yield name, command


def test_every_command_of_the_manual_is_there() -> None:
    assert {name for name, _ in commands()} == {
        "init", "serve", "invite", "revoke", "sites", "launch", "runs", "rounds", "watch", "stop",
        "extend", "release", "reject", "export", "gc", "strategies", "doctor", "demo",
        "bench exchange", "bench rounds", "bench codec", "bench reduce", "compare",
        "verify", "replay", "rollback",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_helps_with_an_example_and_speaks_json(name: str, command: Any) -> None:
    assert f"Example: `farflung {name}" in command.help
    assert "--json" in {option for p in command.params for option in p.opts}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{name} {parameter.name}"


def test_help_and_usage(farflung: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert farflung("--help") == 0
    assert "farflung invite north" in capsys.readouterr().out
    assert farflung() == 2
    assert farflung("fly") == 2
    said = capsys.readouterr()
    assert "No such command 'fly'. See `farflung --help`." in said.err
    assert farflung("extend", "x") == 2
    assert "--rounds" in capsys.readouterr().err
    assert farflung("--version") == 0
    assert capsys.readouterr().out.startswith("farflung ")


def test_no_daemon_is_one_sentence(
    farflung: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run").mkdir(parents=True)
    assert farflung("runs") == 69
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"farflung: no daemon runs on {home}; start it with `farflung serve`\n"
    assert farflung("runs", "--json") == 69
    told = json.loads(capsys.readouterr().err)
    assert told["error"] == "Unavailable"
    assert told["facts"] == {"home": str(home)}


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sites"], ["north", "attached", "digits@abababab", "gone"]),
        (["runs"], ["fashion", "digits", "2/3", "81.2 %"]),
        (["rounds", "fashion"], ["committed", "5 epochs", "2/2", "75.0 %", "0.0312", "2 MB"]),
        (["extend", "fashion", "--rounds", 2], ["5 rounds"]),
        (["release", "fashion"], ["the held round is committed", "queued"]),
        (["reject", "fashion"], ["the held round is dropped", "queued"]),
        (["rollback", "fashion", 1], ["goes on from round 1 of 3; it is queued"]),
        (["verify", "fashion"], ["9 entries", "were removed", "nothing is wrong", "ab" * 32]),
        (["replay", "fashion", 2], ["from east, north", "the same, aaa", "feddf had no part"]),
        (["gc", "--dry-run"], ["would remove 3 files, 300 B; 7 stay"]),
        (["revoke", "north"], ["north is revoked"]),
        (["invite", "north"], ["farflung-join-1.x\n"]),
    ],
)
def test_words_for_people_and_json_for_programs(
    farflung: Any, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    assert farflung(*words) == 0
    out = capsys.readouterr().out
    for word in expected:
        assert word in out
    assert farflung(*words, "--json") == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("operator")
def test_what_the_daemon_refuses_has_its_exit_code(
    farflung: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert farflung("stop", "fashion") == 75
    assert capsys.readouterr().err == "farflung: run fashion: it has ended already\n"
    assert farflung("watch", "nothing") == 66
    assert "there is no nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("operator")
def test_what_is_wrong_is_said_and_ends_in_an_exit_code(
    farflung: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert farflung("verify", "digits") == 74
    assert "(accepted, round 2, site north): lost" in capsys.readouterr().out
    assert farflung("replay", "fashion", 3) == 74
    said = capsys.readouterr().out
    assert "they differ, in first.weight" in said
    assert "It is not what was committed." in said
    assert farflung("replay", "fashion", 3, "--json") == 74
    assert not json.loads(capsys.readouterr().out)["identical"]


def test_launch_checks_the_file_before_it_asks(
    farflung: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    assert farflung("launch", file) == 66
    file.write_text(RUN_FILE + "wrong = 1\n")
    assert farflung("launch", file) == ERRORS[ConfigInvalid].exit_code
    said = capsys.readouterr().err
    assert f"{file}: task.wrong" in said


def test_launch_sends_the_weights_it_starts_from(
    farflung: Any, operator: FakeOperator, tmp_path: Path
) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE + '[init]\nfrom = "w.safetensors"\n')
    assert farflung("launch", file) == 0
    assert farflung("launch", file, "--from", "fashion@best") == 0
    assert farflung("launch", file, "--from", tmp_path / "none.safetensors") == 66
    first, second = operator.asked
    assert (first.start_from, first.start_file) == ("", b"weights")
    assert (second.start_from, second.start_file) == ("fashion@best", b"")
    assert first.config == file.read_text()


def test_export_says_what_it_wrote(
    farflung: Any, operator: FakeOperator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operator.files = [("model.safetensors", b"abc")]
    assert farflung("export", "fashion", tmp_path / "out", "--round", "best", "--json") == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["model.safetensors"]
    assert farflung("export", "fashion", tmp_path / "out", "--round", "worst") == 65


# -- following -------------------------------------------------------------------------------------


def events(*items: views.View) -> list[views.Event]:
    return [
        views.Event(
            number=i,
            time=100.0 + i,
            kind="run" if isinstance(item, views.Run) else "round",
            text=f"event {i}",
            data=item.model_dump(mode="json"),
        )
        for i, item in enumerate(items, 1)
    ]


def test_watch_goes_on_past_an_end_that_was_undone(
    farflung: Any, operator: FakeOperator, capsys: pytest.CaptureFixture[str]
) -> None:
    """The history of an extended run holds an end in its middle."""
    ended = a_run(state="finished", committed=3, ended=9.0, started=1.0)
    operator.events = events(a_run(), ended, a_run(rounds=5))
    threading.Thread(target=ends_while_followed, args=[operator]).start()
    assert farflung("watch", "fashion") == 0
    out = capsys.readouterr().out
    assert "event 4" in out
    assert "Run fashion finished: 3 of 3 rounds" in out


def ends_while_followed(operator: FakeOperator) -> None:
    for _ in ("at the beginning", "at the end in its history"):
        operator.looked.get(timeout=10)
    end = a_run(state="finished", committed=3, ended=9.0, started=1.0)
    operator.run_views[0] = end
    operator.live.put(events(end)[0].model_copy(update={"number": 4, "text": "event 4"}))


def test_a_round_without_a_site_is_no_success(
    farflung: Any, operator: FakeOperator, capsys: pytest.CaptureFixture[str]
) -> None:
    operator.run_views[0] = a_run(state="finished", committed=2, current=None)
    gone = {"south": "gone for 10 s"}
    operator.round_views[1] = a_round(2, missing=gone, unassessed={"east": "its disk is full"})
    operator.events = events(operator.run_views[0])
    assert farflung("watch", "fashion") == 75
    said = capsys.readouterr()
    assert "round 2 went on without south: gone for 10 s" in said.err
    assert "round 2 was assessed without east: its disk is full" in said.err
    assert "without south; not evaluated by east" in said.out


def test_watch_json_is_one_event_a_line(
    farflung: Any, operator: FakeOperator, capsys: pytest.CaptureFixture[str]
) -> None:
    operator.run_views[0] = a_run(state="finished", committed=3, current=None)
    operator.events = events(a_round(1), operator.run_views[0])
    assert farflung("watch", "fashion", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2]


def test_ctrl_c_ends_following_only(home: Path, operator: FakeOperator) -> None:
    operator.events = events(a_run())
    command = [sys.executable, "-m", "orchestrator.cli", "watch", "fashion", "--home", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching:
        assert operator.following.wait(30)
        assert watching.stdout is not None
        assert b"event 1" in watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert b"run fashion goes on" in errors
    assert [type(a).__name__ for a in operator.asked] == ["WatchRequest"]


@pytest.mark.parametrize(
    ("run", "rounds", "code", "words"),
    [
        (a_run(state="finished"), [a_round(1)], 0, []),
        (a_run(state="stopped"), [a_round(1)], 0, []),
        (
            a_run(state="failed", reason="it broke"),
            [a_round(1, missing={"north": "late"})],
            ERRORS[TaskFailed].exit_code,
            ["run fashion failed: it broke", "round 1 went on without north: late"],
        ),
        (
            a_run(state="paused", reason="below the quorum"),
            [],
            ERRORS[DeadlineExceeded].exit_code,
            ["run fashion is paused: below the quorum"],
        ),
        (
            a_run(state="finished"),
            [a_round(2, plugins=(views.Plugin(name="feddf", state="skipped", reason="memory"),))],
            ERRORS[ComputeFailed].exit_code,
            ["round 2: feddf was skipped: memory"],
        ),
    ],
)
def test_what_an_end_means(
    run: views.Run, rounds: list[views.Round], code: int, words: list[str]
) -> None:
    assert verdict(run, rounds) == (code, words)


def test_the_live_picture_shows_who_does_what() -> None:
    from rich.console import Console

    screen = Screen(a_run(headline="Round 3 of 3 · learning"), [a_round(1), a_round(2)])
    north = views.SiteWork(
        site="north", state="training", done=2.5, planned=5, unit="epochs", loss=0.25
    )
    south = views.SiteWork(site="south", state="refused", reason="tensor fc.weight: not finite")
    now = a_round(3, state="planned", committed=None, scores={}, sites=(north, south))
    for event in events(now):
        screen.take(event)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(screen.draw())
    console.file.close()
    text = console.export_text()
    for word in ("Round 3 of 3", "2.5/5 epochs", "0.250", "tensor fc.weight: not finite", "75.0 %"):
        assert word in text


# -- completion ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("operator")
def test_the_shell_completes_names_from_the_daemon(home: Path) -> None:
    context: Any = typer.Context(get_command(app))
    context.params = {"home": home}
    assert options.complete_run(context, "") == ["fashion", "digits"]
    assert options.complete_site(context, "so") == ["south"]
    assert options.complete_start(context, "fa") == ["fashion@best"]
    context.params = {"home": home / "nothing"}
    assert options.complete_run(context, "") == []


def test_a_strategy_is_explained_with_what_was_measured(
    farflung: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from strategies import row
    from strategies.averaging.co_learning import ROW

    monkeypatch.setattr(row.Measured.read.__func__, "__defaults__", (tmp_path,))
    assert farflung("strategies", "co_learning") == 0
    said = capsys.readouterr().out
    for words in (
        "lr(u) = lr * decay ** u", "arXiv:1810.06877", "hooks: plan",
        "switched off, to the bit, by: decay = 1.0, factor = 1.0",
        "Averaging works for deep nets", "Control: a rate decayed over the run",
        "Reproduced: partly; no figures of this row", "make evidence-seeds ROWS=5",
        "epsilon = 0.01   # >= 0",
    ):  # fmt: skip
        assert words in said
    scores = {"test.accuracy": 0.925, "test.ece": 0.0312, "seconds": 3.0}
    seeds = [dict.fromkeys(ROW.arms, scores), dict.fromkeys(ROW.arms, scores)]
    row.Measured.of(ROW, seeds, ["CLR over ELR: 0 < 0.5"]).write(5, tmp_path)
    assert farflung("strategies", "co_learning") == 0
    said = capsys.readouterr().out
    assert "Data: M5, 2 seeds." in said
    assert "92.50 ± 0.00" in said
    assert "Fell short: CLR over ELR: 0 < 0.5" in said
    assert farflung("strategies", "co_learning", "--json") == 0
    check = json.loads(capsys.readouterr().out)["check"]
    assert check["measured"]["arms"]["iid-clr"]["test.accuracy"] == [0.925, 0.0]


def test_completion_offers_the_strategies_and_nothing_else() -> None:
    from orchestrator.cli.catalogue import complete_strategy
    from strategies.registry import catalogue

    assert complete_strategy("") == sorted(catalogue())
    assert complete_strategy("int") == ["int4", "int8"]
