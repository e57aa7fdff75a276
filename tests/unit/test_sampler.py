"""Processor time and memory of process trees, of processes whose appetite is known."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.bench.sampler import Group, Sample, Sampler, machine_busy_s, read

BURN = """
import sys, time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
"""
PARENT = f"""{BURN}
import subprocess
burn(0.2)
for _ in range(2):
    subprocess.run([sys.executable, "-S", "-c", {BURN!r} + "burn(0.2)"])
print("burnt", flush=True)
sys.stdin.read()
"""
HOARD = """
import sys
hoard = bytearray(60_000_000)
for i in range(0, len(hoard), 4096): hoard[i] = 1
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_children_that_ended_are_counted_once(parent: subprocess.Popen[str]) -> None:
    with Sampler({"all": Group([parent.pid])}, every_s=0.01, rescan_s=0.02) as sampler:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "burnt\n"
    spent = sampler.samples[-1].cpu_s["all"]
    assert 0.6 <= spent < 1.2  # the interpreters' own start is in it
    values = [sample.cpu_s["all"] for sample in sampler.samples]
    assert values == sorted(values)


def test_a_root_that_ended_keeps_its_time(parent: subprocess.Popen[str]) -> None:
    group = Group([parent.pid])
    with Sampler({"all": group}, every_s=0.01, rescan_s=0.02) as sampler:
        assert parent.stdout is not None
        parent.stdout.readline()
        time.sleep(0.05)  # one more sample after the last of its work
        parent.kill()
        parent.wait()
    assert 0.6 <= sampler.samples[-1].cpu_s["all"] < 1.2
    assert sampler.samples[-1].rss_bytes["all"] == 0


def test_memory_is_the_sum_over_the_tree_and_a_part_can_stand_apart(tmp_path: Path) -> None:
    script = tmp_path / "apart_from_others.py"
    script.write_text(HOARD)
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-S', {str(script)!r}])"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", outer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        word = [script.name]
        # The outer command line names the script too, so the root is not searched for it.
        inner = next(
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and (r := read(int(p.name))) and r.parent == process.pid
        )
        groups = {
            "all": Group([process.pid]),
            "apart": Group([inner], only=word),
            "none": Group([inner], apart=word),
        }
        with Sampler(groups) as sampler:
            pass
        pss = groups["apart"].pss_bytes()
        process.kill()
        os.kill(inner, 9)
    assert sampler.peak_rss_bytes("all") > 65e6
    assert 60e6 < sampler.peak_rss_bytes("apart") < sampler.peak_rss_bytes("all")
    assert sampler.peak_rss_bytes("none") == 0
    assert 60e6 < pss < sampler.peak_rss_bytes("apart")  # what it shares with others is divided


def test_between_samples_it_interpolates() -> None:
    sampler = Sampler({})
    sampler.samples = [
        Sample(10.0, {"a": 1.0, "b": 0.0}, {}, 100.0),
        Sample(12.0, {"a": 2.0, "b": 1.0}, {}, 104.0),
    ]
    assert sampler.cpu_s(10.0, 11.0) == pytest.approx(1.0)
    assert sampler.cpu_s(0.0, 99.0) == pytest.approx(2.0)
    assert sampler.cpu_s(10.0, 11.0, "b") == pytest.approx(0.5)
    assert sampler.foreign_cores(10.0, 12.0) == pytest.approx(1.0)


def test_the_machine_is_busy() -> None:
    assert machine_busy_s() > 0
    assert read(os.getpid()) is not None
    assert read(2**22 + 1) is None
