"""Whether a payload's numbers are finite: which tensor is not, and the sum of squares of those that count."""

import math
from pathlib import Path

import numpy as np
import pytest

from orchestrator.finiteness import BLOCK_BYTES, Span, first_bad

LARGE = BLOCK_BYTES // 4 + 3  # numbers: more than a block
LAYOUT = (
    ("a", "float32", 5, True, 0),
    ("b", "float32", LARGE, True, 0),
    ("empty", "float32", 0, True, 0),
    ("c", "float32", 7, True, 0),
    ("other dtype", "float64", 3, True, 0),
    ("not counted", "float64", 4, False, 0),
    ("narrow", "bfloat16", 6, True, 0),
    ("narrow too", "bfloat16", 6, True, 0),
    ("behind a gap", "float32", 2, True, 11),
)
"""Tensor, dtype, numbers, whether it counts, bytes of something else before it."""
WIDTH = {"float32": 4, "float64": 8, "bfloat16": 2}


def write(path: Path, bad: str = "", value: float = math.nan) -> tuple[list[Span], float]:
    """A payload, with a value that is not finite as the last one of a tensor."""
    random, data, spans, square = np.random.default_rng(0), bytearray(), [], 0.0
    for name, dtype, count, counts, gap in LAYOUT:
        data += b"\xff" * gap  # read as numbers they would be NaN
        values = random.standard_normal(count)
        if name == bad:
            values[-1] = value
        start = len(data)
        if dtype == "bfloat16":
            data += (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            data += values.astype(dtype).tobytes()
            square += float(values @ values) if counts else 0.0
        spans.append((name, dtype, start, len(data), counts))
    path.write_bytes(data)
    return spans, square


def test_the_sum_of_squares_is_of_what_counts(tmp_path: Path) -> None:
    spans, square = write(tmp_path / "payload")
    with (tmp_path / "payload").open("rb", buffering=0) as file:
        found, bad = first_bad(file, spans)
    assert bad == ""
    assert found == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [name for name, _, count, _, _ in LAYOUT if count])
def test_the_tensor_is_named(tmp_path: Path, bad: str, value: float) -> None:
    spans, _ = write(tmp_path / "payload", bad, value)
    with (tmp_path / "payload").open("rb", buffering=0) as file:
        assert first_bad(file, spans)[1] == bad


def test_the_first_tensor_that_a_file_lacks_is_named(tmp_path: Path) -> None:
    spans, _ = write(tmp_path / "payload")
    (tmp_path / "payload").write_bytes((tmp_path / "payload").read_bytes()[: spans[1][3] - 1])
    with (tmp_path / "payload").open("rb", buffering=0) as file:
        assert first_bad(file, spans)[1] == "b"
