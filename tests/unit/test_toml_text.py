"""TOML that programs write is what tomllib reads."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.run_config import RunConfig, parse_run
from orchestrator.toml_text import document

KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_what_is_written_is_read(values: dict[str, Any]) -> None:
    assert tomllib.loads(document(values)) == values


def test_nan_and_none_and_paths() -> None:
    text = document({"a": math.nan, "b": None, "c": {"d": None, "e": Path("/x y")}})
    read = tomllib.loads(text)
    assert math.isnan(read["a"])
    assert read["c"] == {"e": "/x y"}
    assert "b" not in read


def test_what_toml_does_not_know_is_said() -> None:
    with pytest.raises(TypeError, match="complex"):
        document({"a": 1j})


def test_a_run_file_comes_back_the_same() -> None:
    config = RunConfig.model_validate(
        {
            "name": "x",
            "rounds": 3,
            "task": {"name": "digits", "params": {"hidden": [64], "alpha": 0.5}},
            "strategy": [{"name": "co_learning", "epsilon": 1e-05}, "temperature"],
        }
    )
    tables = config.resolved
    tables["strategy"] = [{"name": c["name"], **c["params"]} for c in tables["strategy"]]
    assert parse_run(document(tables)).resolved == config.resolved
