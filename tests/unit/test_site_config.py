from datetime import time
from pathlib import Path

import pytest

from protos.digest import digest
from protos.errors import ConfigInvalid
from site_agent.config import TEMPLATE, PolicySection, SiteConfig
from site_agent.task_source import TaskSource


def test_an_empty_file_and_the_template_are_the_defaults() -> None:
    assert SiteConfig.parse("") == SiteConfig.parse(TEMPLATE) == SiteConfig()


def test_every_commented_key_of_the_template_is_one() -> None:
    lines = [line.removeprefix("# ") for line in TEMPLATE.splitlines()]
    kept = [line for line in lines if " = " in line or line.startswith("[")]
    assert SiteConfig.parse("\n".join(kept)).tasks["fashion_mnist"].settings


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[polcy]\n", "polcy"),
        ("[policy]\nmax_epoch = 3\n", "policy.max_epoch"),
        ("[policy]\nmax_epochs = -1\n", "policy.max_epochs"),
        ('[policy]\nhours = "25:00-26:00"\n', "policy.hours"),
        ('[policy]\nside_payloads = ["average"]\n', "policy.side_payloads.0"),
        ('[trainer]\nprecision = "fp8"\n', "trainer.precision"),
        ('[network]\naddress = "somewhere"\n', "network.address"),
        ('[tasks."a b"]\nsource = "x:Y"\n', "tasks.a b"),
    ],
)
def test_a_wrong_key_is_named_with_its_path(text: str, key: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        SiteConfig.parse(text, "here/site.toml")
    assert caught.value.message.startswith("here/site.toml: ")
    assert caught.value.facts["key"] == key
    assert key in caught.value.message


@pytest.mark.parametrize("source", ["task.py", "no colon", "a-b:C", ":C", "a:1"])
def test_a_source_has_one_of_two_forms(source: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"tasks\.x\.source"):
        SiteConfig.parse(f'[tasks.x]\nsource = "{source}"\n')


def test_not_toml() -> None:
    with pytest.raises(ConfigInvalid, match="not TOML"):
        SiteConfig.parse("a = = b")


@pytest.mark.parametrize(
    ("hours", "now", "inside"),
    [
        ("00:00-24:00", time(23, 59), True),
        ("09:00-17:00", time(8, 59), False),
        ("09:00-17:00", time(9, 0), True),
        ("09:00-17:00", time(17, 0), False),
        ("22:00-06:00", time(23, 0), True),
        ("22:00-06:00", time(5, 59), True),
        ("22:00-06:00", time(12, 0), False),
    ],
)
def test_hours_may_pass_midnight(hours: str, now: time, inside: bool) -> None:
    assert PolicySection(hours=hours).open_at(now) is inside


def test_a_relative_source_starts_at_the_folder_of_site_toml(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("x = 1\n")
    source = SiteConfig.parse('[tasks.t]\nsource = "task.py:T"\n').sources(tmp_path)["t"]
    assert source.file == tmp_path / "task.py"
    assert source.digest == digest(b"x = 1\n")
    (tmp_path / "task.py").write_text("x = 2\n")
    assert source.digest == digest(b"x = 2\n")


def test_a_module_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_package_of_a_site"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "task.py").write_text("y = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = TaskSource.parse("some_package_of_a_site.task:T", tmp_path)
    assert source.digest == digest(b"y = 1\n")
    assert TaskSource.parse("some_package_of_a_site.other:T", tmp_path).digest == ""
    assert TaskSource.parse("no_such_package.task:T", tmp_path).file is None
