"""Caps and windows on the wire: a real agent and a counting proxy, over mutual TLS."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import pytest

from protos.manifest import CHUNK_BYTES
from protos.plan import Plan, Work
from protos.v1 import site_pb2
from tests.support.proxy import Direction, Proxy
from tests.support.sites import RunningAgent, ask, base_of, plan_of, site_command, write_config
from tests.support.tiny_orchestrator import TinyOrchestrator

pytestmark = pytest.mark.timeout(240)

BYTES_A_UNIT = 44
"""Bytes of the model of the task Clouds for each of its hidden units."""


class Site:
    """A site whose line to the orchestrator is a proxy."""

    def __init__(self, folder: Path) -> None:
        self.orchestrator = TinyOrchestrator(folder / "orchestrator")
        self.orchestrator.start()
        self.proxy = Proxy(self.orchestrator.address)
        self.proxy.__enter__()
        self.home = folder / "north"
        self._plans = 0
        self.network()
        ask(self.home, "join", self.orchestrator.invite("north"))
        self.agent = RunningAgent(self.home)
        self.orchestrator.attached()

    def network(self, up: float = 0, down: float = 0, windows: str = "") -> None:
        """Write site.toml, as its owner would while the agent runs."""
        table = f'[network]\naddress = "{self.proxy.address}"\n'
        table += f"up_mbit_per_s = {up}\ndown_mbit_per_s = {down}\n{windows}"
        self.mark()
        write_config(self.home, ("Clouds",), "[trainer]\nthreads = 1\n" + table)

    def write(self, text: str) -> None:
        """Write site.toml as a careful editor does: a file cut short is never to be seen."""
        new = self.home / "site.toml.new"
        new.write_text(text)
        new.replace(self.home / "site.toml")

    def in_force(self, event: str = "site.toml changed", **facts: Any) -> None:
        """Wait until the agent says, after the last mark, that it took the file up.

        Of a list it may say more: what the test before this one changed back.
        """

        def holds(found: Any, wanted: Any) -> bool:
            return (
                set(wanted) <= set(found or ())
                if isinstance(wanted, list)
                else bool(found == wanted)
            )

        def said(line: dict[str, Any]) -> bool:
            return line["event"] == event and all(holds(line.get(k), v) for k, v in facts.items())

        self.until(lambda: any(map(said, self.agent.events()[self._seen :])))

    def mark(self) -> None:
        """What the agent has logged so far is no longer looked at."""
        log = self.home / "log/agent.log"
        self._seen = len(log.read_text().splitlines()) if log.exists() else 0

    def until(self, done: Callable[[], Any], seconds: float = 60.0) -> None:
        """The agent's log and the proxy's figures wake nobody."""
        deadline, pause = monotonic() + seconds, Event()
        while not done():
            assert monotonic() < deadline, self.agent.events()[-5:]
            pause.wait(0.05)

    def plan(self, model_bytes: float) -> Plan:
        self._plans += 1
        params = {"hidden": int(model_bytes / BYTES_A_UNIT)}
        plan = plan_of(run=f"r{self._plans}", work=Work(steps=1), params=params)
        path, manifest, index = base_of(self.orchestrator.folder, plan)
        base = self.orchestrator.publish(path, manifest, index)
        return plan.model_copy(update={"base": base, "manifest": manifest.digest})

    def progress(self, plan: Plan) -> list[site_pb2.Progress]:
        said = [m.progress for m in self.orchestrator.said if m.HasField("progress")]
        return [p for p in said if p.plan_id == plan.id]

    def beats(self) -> int:
        return sum(m.HasField("heartbeat") for m in self.orchestrator.said)

    def close(self) -> None:
        self.agent.stop()
        self.orchestrator.stop()
        self.proxy.__exit__()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("polite"))
    yield site
    site.close()


@pytest.fixture
def site(running: Site) -> Site:
    """The module's site, with nothing said or moved yet."""
    tiny = running.orchestrator
    for memory in (tiny.said, tiny.fetches, tiny.uploads, tiny.contributions):
        memory.clear()  # type: ignore[attr-defined]
    return running


def busy(direction: Direction, since: float, rate: float) -> list[tuple[float, int]]:
    """What a direction carried while it was full: without what buffers took at first, and the end."""
    moments = [m for m in list(direction.moments) if m[0] >= since]
    total, gone, out = sum(n for _, n in moments), 0, []
    for moment, nbytes in moments:
        gone += nbytes
        if rate * 0.6 <= gone <= total - rate * 0.1:
            out.append((moment, nbytes))
    return out


def share(direction: Direction, since: float, mbit_per_s: float) -> float:
    """How much of its cap a direction used while it was full."""
    rate = mbit_per_s * 1e6 / 8
    moments = busy(direction, since, rate)
    return sum(n for _, n in moments[1:]) / rate / (moments[-1][0] - moments[0][0])


def closed() -> str:
    """A window that does not open within the next hours."""
    now = datetime.now().astimezone()
    begin, end = now + timedelta(hours=6), now + timedelta(hours=7)
    return f'[[network.windows]]\nhours = "{begin:%H:%M}-{end:%H:%M}"\n'


def a_round_under_caps(site: Site, up: float, down: float, model_bytes: float) -> float:
    """One plan, whole; when it began."""
    os.sync()  # or who writes waits for the disk to take in what other tests have written
    site.network(up, down)
    site.in_force("caps or windows are others now", up_mbit_per_s=up, down_mbit_per_s=down)
    plan = site.plan(model_bytes)
    began = monotonic()
    site.orchestrator.offer(plan)
    header, _, index, payload = site.orchestrator.contribution(plan)
    assert payload.stat().st_size == index.nbytes
    assert header.base == plan.base
    return began


def test_caps_hold_in_both_directions(site: Site) -> None:
    began = a_round_under_caps(site, 12, 16, 10e6)
    assert share(site.proxy.down, began, 16) == pytest.approx(1, abs=0.05)
    assert share(site.proxy.up, began, 12) == pytest.approx(1, abs=0.05)
    assert site.orchestrator.fetches == site.orchestrator.uploads == [list(range(10))]
    site.network()


@pytest.mark.slow
def test_a_cap_holds_over_every_ten_seconds(site: Site) -> None:
    began = a_round_under_caps(site, 20, 20, 60e6)
    for direction in (site.proxy.down, site.proxy.up):
        moments = busy(direction, began, 20e6 / 8)
        windows = direction.windows(10.0, moments[0][0], moments[-1][0])
        assert len(windows) > 10
        shares = [n / (10 * 20e6 / 8) for n in windows]
        assert min(shares) >= 0.95
        assert max(shares) <= 1.05
    site.network()


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_window_that_closes_pauses_and_loses_nothing(site: Site, way: str) -> None:
    site.network(**{way: 12})
    site.in_force("caps or windows are others now", **{f"{way}_mbit_per_s": 12.0})
    direction = getattr(site.proxy, way)
    plan = site.plan(5e6)
    before = direction.nbytes
    site.orchestrator.offer(plan)
    site.until(lambda: direction.nbytes > before + 1.5e6)

    site.network(**{way: 12}, windows=closed())
    site.orchestrator.until(lambda: any(p.waits_until for p in site.progress(plan)), "the pause")
    waiting = next(p for p in site.progress(plan) if p.waits_until)
    state = {"down": site_pb2.Progress.FETCHING, "up": site_pb2.Progress.SENDING}[way]
    assert waiting.state == state
    words = site_command("status", "--home", str(site.home))
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "no window is open, models and contributions wait until" in said
    status = ask(site.home, "status")
    assert status["attached"]
    assert not status["network"]["open"]
    assert datetime.fromisoformat(status["network"]["changes"]).timestamp() == waiting.waits_until

    site.until(lambda: len(site.proxy.open) == 1)  # control is all that is left
    moved, beats, streams_before = direction.nbytes, site.beats(), len(site.orchestrator.streams)
    site.orchestrator.until(lambda: site.beats() >= beats + 10, "heartbeats")
    assert direction.nbytes - moved < 50_000
    assert len(site.orchestrator.streams) == streams_before
    assert not site.orchestrator.contributions

    site.network()
    site.orchestrator.contribution(plan)
    assert [p.waits_until for p in site.progress(plan)][-1] == 0
    streams = {"down": site.orchestrator.fetches, "up": site.orchestrator.uploads}[way]
    assert len(streams) == 2
    assert {number for stream in streams for number in stream} == set(range(5))
    # Twice on the wire: at most the chunk that was cut, and what was on its way behind it.
    again = direction.nbytes - before - site.orchestrator.models[plan.base][2].nbytes
    assert again < CHUNK_BYTES + 700_000


def test_what_site_toml_says_is_taken_up_by_a_running_agent(site: Site) -> None:
    plan = site.plan(1e5)
    text = (site.home / "site.toml").read_text()
    site.mark()
    site.write(text + "[policy]\nmax_steps = 0\n")
    site.in_force("site.toml is wrong; what was in force stays")
    site.orchestrator.offer(plan)
    site.orchestrator.contribution(plan)

    strict = text + "[policy]\nmax_bytes = 1000\n[site]\nkeep_states = 9\n"
    site.write(strict)
    site.agent.process.send_signal(signal.SIGHUP)
    site.in_force(in_force=["policy.max_bytes"], needs_a_restart=["site.keep_states"])
    other = site.plan(2e5)
    site.orchestrator.offer(other)
    outcome = site.orchestrator.outcome(other)
    assert outcome.error == "PolicyRefused"
    assert "policy.max_bytes" in outcome.message
