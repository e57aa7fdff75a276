"""What arrives from elsewhere is a value or an error of ours, whatever the bytes are."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from protos.errors import InvalidInput
from tests.support.decoders import DECODERS, GROWTH_BYTES, examine, seeds

SEEDS = seeds()
WRONG = {"join token inside"}
"""Seeds that lead to a branch, and are refused in it."""


@pytest.mark.parametrize(("name", "data"), SEEDS, ids=[name for name, _ in SEEDS])
def test_what_is_right_is_taken(name: str, data: bytes) -> None:
    if name in WRONG:
        with pytest.raises(InvalidInput):
            DECODERS[name](data)
    else:
        assert DECODERS[name](data) is not None


def test_what_is_changed_is_refused_or_right() -> None:
    rng = random.Random(11)
    for name, data in SEEDS * 60:
        bytes_ = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(bytes_) or 1)
            match rng.randrange(4):
                case 0:
                    bytes_[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    bytes_[at : at + rng.randrange(9)] = rng.choice((b"", b"9" * 400, b"\xff" * 5))
                case 2:
                    del bytes_[at:]
                    bytes_ += b"]"
                case _:
                    bytes_[at:at] = bytes_[: rng.randrange(len(bytes_) + 1)]
        assert examine(DECODERS[name], bytes(bytes_)) == "", (name, bytes(bytes_))


def test_the_looking_itself() -> None:
    kept: list[bytes] = []

    def mute(data: bytes) -> object:
        raise InvalidInput("")

    assert examine(lambda data: data[5], b"") == "IndexError: index out of range"
    assert examine(mute, b"") == "an error without a message"
    assert "bytes more in memory" in examine(
        lambda data: kept.append(b"x" * (GROWTH_BYTES * 2)), b""
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_minute_of_inputs_that_look_for_branches(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.fuzz", "--seconds", "60"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done " in done.stderr
