"""`farflung doctor` finds what was broken on purpose."""

from pathlib import Path

import pytest

from orchestrator import doctor
from orchestrator.cli.app import code_of
from orchestrator.doctor import Finding, examine
from orchestrator.home import Home
from orchestrator.port import free_port


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home.create(tmp_path / "home", bind=f"127.0.0.1:{free_port()}", dashboard_port=-1)
    made.lock().close()
    return made


def found(home: Home) -> dict[str, Finding]:
    return {finding.about: finding for finding in examine(home.path)}


def test_a_fresh_home_is_well(home: Home) -> None:
    findings = found(home)
    assert [f for f in findings.values() if f.state == "failed"] == []
    assert "farflung serve" in findings["daemon"].message
    assert "valid until" in findings["authority"].message
    assert "is free" in findings["port"].message


def test_no_home_is_a_hint(tmp_path: Path) -> None:
    assert "farflung init" in found(Home(tmp_path / "nothing"))["home"].message


def test_keys_that_others_may_read(home: Home) -> None:
    home.keys.chmod(0o755)
    finding = found(home)["permissions"]
    assert finding.state == "failed"
    assert f"chmod 700 {home.keys}" in finding.message
    home.keys.chmod(0o700)
    (home.keys / "ca.key").chmod(0o644)
    assert "chmod 600" in found(home)["permissions"].message


def test_a_port_that_is_taken(home: Home) -> None:
    from socket import create_server

    host, port = home.config.listen.bind.split(":")
    with create_server((host, int(port))):
        assert "can't be bound" in found(home)["port"].message


def test_a_broken_configuration(home: Home) -> None:
    home.config_file.write_text("[listen]\nbnid = 1\n")
    assert any(f.state == "failed" and "bnid" in f.message for f in examine(home.path))


def test_a_lock_without_an_answer(home: Home) -> None:
    held = home.lock()
    try:
        finding = found(home)["daemon"]
    finally:
        held.close()
    assert finding.state == "failed"
    assert "does not answer" in finding.message


def test_something_missing_makes_the_exit_code(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(["doctor", "--home", str(home.path)]) == 0
    assert "ok" in capsys.readouterr().out
    monkeypatch.setattr(
        doctor, "version", lambda name: (_ for _ in ()).throw(doctor.PackageNotFoundError(name))
    )
    assert code_of(["doctor", "--home", str(home.path), "--json"]) == 78
