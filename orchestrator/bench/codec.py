"""`farflung bench codec`: how fast one core encodes and decodes, beside how fast it copies.

Every wire codec of the catalogue with its defaults, error feedback included, through the hooks that
site and orchestrator call, tile by tile, with one torch thread. Speed is bytes of fp32 for each
second of processor time; medians over the runs, of which the first is left out:

    encode_gb_per_s     a site's half: add the residual, pack, keep what is lost
    decode_gb_per_s     the orchestrator's half
    floor_gb_per_s      one core copies the same tensor, tile by tile
    encode_ratio        processor time of encoding over that of the copy beside it; decode_ratio too
    bytes_per_element   on the wire; times_fewer is fp32 over it
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from orchestrator.bench.trial import machine
from protos.chunks import write_durably
from protos.manifest import TILE_ELEMENTS, Manifest, TensorSpec
from protos.plan import Plan, Schedule, TaskChoice, Work
from strategies.context import Update
from strategies.protocol import Strategy
from strategies.registry import catalogue

NAME = "w"


def run_codec(model_bytes: int, runs: int, file: Path | None) -> dict[str, Any]:
    """Measure, print, and write the figures into a file.

    Args:
        model_bytes: Size of the fp32 tensor.
        runs: At least 2; the first is left out.
        file: JSON file to write, if any.
    """
    elements = max(1, model_bytes // 4)
    Console(stderr=True).print(f"{4 * elements / 1e6:g} MB of fp32, {runs} runs on one core …")
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(elements, generator=draw)
    codecs = {n: cls() for n, cls in catalogue().items() if cls.wire_codec}
    measured = {name: measure(codec, tensor, runs) for name, codec in codecs.items()}
    figures = {
        "model_bytes": 4 * elements,
        "runs": runs,
        "floor_gb_per_s": median(m["floor_gb_per_s"] for m in measured.values()),
        "codecs": measured,
        "machine": {**machine(), "cpu_capability": torch.backends.cpu.get_cpu_capability()},
    }
    if file is not None:
        write_durably(file.absolute(), (json.dumps(figures, indent=2) + "\n").encode())
    _print(figures)
    return figures


def measure(codec: Strategy, tensor: Tensor, runs: int) -> dict[str, Any]:
    """The figures of one codec; see the module's page.

    Args:
        codec: With its hyperparameters.
        tensor: (elements,) fp32: the update of every run.
        runs: At least 2.
    """
    size = tensor.numel()
    model = nn.Module()
    model.register_parameter(NAME, nn.Parameter(torch.empty(size, device="meta")))
    tiles = Manifest((TensorSpec(NAME, (size,), "float32"),)).tiles
    plan = Plan(
        run="bench", round=1, attempt=1, site="bench", task=TaskChoice(name="bench"),
        work=Work(steps=1), schedule=Schedule(lr=1.0),
    )  # fmt: skip
    copy, blocks = torch.empty_like(tensor), list[bytes]()
    state: dict[str, Tensor] = {}

    def copied() -> None:
        for start in range(0, size, TILE_ELEMENTS):
            copy[start : start + TILE_ELEMENTS].copy_(tensor[start : start + TILE_ELEMENTS])

    def encoded() -> None:
        nonlocal state, blocks
        update = Update({NAME: tensor}, examples=1, steps=1, epochs=1.0, model=model)
        update, state = codec.encode(update, plan, state)
        blocks = [*(update.blocks or {})[NAME]]  # type: ignore[list-item]

    def decoded() -> None:
        for block, tile in zip(blocks, tiles, strict=True):
            codec.decode(block, tile)

    works = (copied, encoded, decoded)
    seconds = [[_seconds(work) for work in works] for _ in range(runs)][1:]
    floor, encode, decode = zip(*seconds, strict=True)
    sent = sum(map(len, blocks))
    return {
        "encode_gb_per_s": 4e-9 * size / median(encode),
        "decode_gb_per_s": 4e-9 * size / median(decode),
        "floor_gb_per_s": 4e-9 * size / median(floor),
        "encode_ratio": median(e / f for e, f in zip(encode, floor, strict=True)),
        "decode_ratio": median(d / f for d, f in zip(decode, floor, strict=True)),
        "bytes_per_element": sent / size,
        "times_fewer": 4 * size / sent,
        "encode_cpu_s": encode,
        "decode_cpu_s": decode,
        "floor_cpu_s": floor,
    }


def _seconds(work: Callable[[], None]) -> float:
    began = process_time()
    work()
    return process_time() - began


def _print(figures: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    titles = ("codec", "encode GB/s", "× copy", "decode GB/s", "× copy", "bytes", "times fewer")
    for title in titles:
        table.add_column(title, justify="left" if title == "codec" else "right")
    for name, row in figures["codecs"].items():
        table.add_row(
            name,
            f"{row['encode_gb_per_s']:.2f}",
            f"{row['encode_ratio']:.1f}",
            f"{row['decode_gb_per_s']:.2f}",
            f"{row['decode_ratio']:.1f}",
            f"{row['bytes_per_element']:.3f}",
            f"{row['times_fewer']:.2f}",
        )
    table.add_row("(a copy)", f"{figures['floor_gb_per_s']:.2f}", "1.0")
    Console().print(table)
