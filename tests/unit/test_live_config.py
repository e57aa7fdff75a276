"""site.toml is edited while the agent runs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from site_agent.config import SiteConfig
from site_agent.link.journal import Journal
from site_agent.link.live_config import LiveConfig

BEFORE = "[network]\nup_mbit_per_s = 20\n[policy]\nmax_epochs = 3\n[trainer]\nthreads = 2\n"


class Site:
    def __init__(self, folder: Path) -> None:
        self.file, self._log = folder / "site.toml", folder / "agent.log"
        self.file.write_text(BEFORE)
        self._writes = 0
        config = SiteConfig.load(self.file)
        self.live = LiveConfig(self.file, config, Journal(self._log, "north"))

    def write(self, text: str) -> None:
        self._writes += 1
        self.file.write_text(text)
        os.utime(self.file, ns=(0, self._writes))  # file systems tell time coarsely

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_may_change_does_and_the_rest_is_named(site: Site) -> None:
    assert not site.live.look()
    site.write(
        "[network]\nup_mbit_per_s = 5\naddress = 'other:1'\n[policy]\nmax_epochs = 9\n"
        "[trainer]\nthreads = 4\n[tasks.new]\nsource = 'x:Y'\n"
    )
    assert [site.live.look() for _ in range(3)] == [False, True, False]
    config = site.live.config
    assert (config.network.up_mbit_per_s, config.policy.max_epochs) == (5, 9)
    assert (config.network.address, config.trainer.threads, config.tasks) == ("", 2, {})
    (line,) = site.log()
    assert line["in_force"] == ["policy.max_epochs", "network.up_mbit_per_s"]
    assert line["needs_a_restart"] == ["tasks.new", "trainer.threads", "network.address"]


def test_a_file_that_is_being_written_is_not_read(site: Site) -> None:
    site.write("[network]\n")
    assert not site.live.look()
    site.write("[network]\nup_mbit_per_s = 7\n")
    assert not site.live.look()
    assert site.live.look()
    assert site.live.config.network.up_mbit_per_s == 7


def test_an_empty_file_changes_nothing(site: Site) -> None:
    """Somebody has cut it and is slow to write it: the caps stay meanwhile."""
    before = site.live.config
    site.write("")
    assert [site.live.look() for _ in range(3)] == [False] * 3
    assert site.live.config == before
    (line,) = site.log()
    assert "it is empty" in line["reason"]


@pytest.mark.parametrize("text", ["[network]\nup_mbit_per_s = -5\n", "[network\n", "[netwrk]\n"])
def test_a_wrong_file_changes_nothing(site: Site, text: str) -> None:
    site.write(text)
    assert not any(site.live.look() for _ in range(3))
    assert site.live.config == SiteConfig.parse(BEFORE)
    (line,) = site.log()
    assert line["level"] == "error"
    assert str(site.file) in line["reason"]
    site.write(BEFORE.replace("20", "30"))
    assert [site.live.look() for _ in range(2)] == [False, True]


def test_a_file_that_is_gone_changes_nothing(site: Site) -> None:
    site.file.unlink()
    assert not any(site.live.look() for _ in range(3))
    assert site.live.config.network.up_mbit_per_s == 20
    assert "not there" in site.log()[0]["reason"]


def test_asked_by_a_signal_it_reads_at_once(site: Site) -> None:
    site.write("[network]\nup_mbit_per_s = 1\n")
    site.live.ask()
    assert site.live.look()
    assert site.live.config.network.up_mbit_per_s == 1
