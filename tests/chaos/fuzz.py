"""Everything that decodes received bytes, against inputs that grow towards every branch (Atheris).

python -m tests.chaos.fuzz [--runs N] [--seconds N] [--seed N] [--only DECODER]

It ends at the first input that a decoder should have refused and did not, or answered with an
error that is not one of ours, or took too long or too much memory for; that input is then in
``build/fuzz``, where also the inputs stay from which the next call goes on. The decoders, and what
each must never do, are in ``tests/support/decoders.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["protos", "strategies.compression"]):
    from tests.support.decoders import DECODERS, examine, seeds

FOLDER = Path("build/fuzz")
"""What was found, and the inputs from which the next call goes on."""

LONGEST = 1 << 20
HANG_S = 5
RSS_MB = 1500


def main() -> None:
    """Fuzz until the runs or the time are over."""
    # libFuzzer bounds the peak of its memory, and over exec a process inherits that of who started it.
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    torch.set_num_threads(1)  # blocks are small: a second thread only waits for its turn
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=-1, help="inputs in all")
    parser.add_argument("--seconds", type=int, default=0, help="at most; 0 for no bound")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(DECODERS))
    chosen = parser.parse_args()
    names = [chosen.only] if chosen.only else list(DECODERS)

    def one(data: bytes) -> None:
        """The first byte says which decoder the others are for."""
        if not data:
            return
        name = names[data[0] % len(names)]
        problem = examine(DECODERS[name], data[1:])
        if problem:
            raise AssertionError(f"{name}: {problem}")

    corpus = FOLDER / (chosen.only or "every decoder")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, (name, data) in enumerate(seeds()):
        if name in names:
            (corpus / f"seed-{number}").write_bytes(bytes([names.index(name)]) + data)
    bounds = [f"-runs={chosen.runs}", f"-max_total_time={chosen.seconds}", f"-seed={chosen.seed}"]
    limits = [f"-max_len={LONGEST}", f"-timeout={HANG_S}", f"-rss_limit_mb={RSS_MB}"]
    found = f"-artifact_prefix={FOLDER}/"
    atheris.Setup([sys.argv[0], *bounds, *limits, found, str(corpus)], one)
    atheris.Fuzz()  # and ends the process


if __name__ == "__main__":
    main()
