from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import arithmetic
from orchestrator.compute import ComputeClient, ComputeConfig, InProcessCompute
from tests.integration import compute_functions

FUNCTIONS = {**arithmetic.FUNCTIONS, **compute_functions.FUNCTIONS}
START_S = 90.0  # Ray came up in 3 to 11 s; the rest is for a busy host


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "authority.pem").write_text("secret")
    return folder


@pytest.fixture(scope="session")
def compute_config(keys: Path) -> ComputeConfig:
    return ComputeConfig(num_cpus=2, functions=FUNCTIONS, hidden=(str(keys),))


@pytest.fixture(scope="session")
def compute(compute_config: ComputeConfig) -> Iterator[ComputeClient]:
    """The one Ray of a test run: it costs seconds to start and 0.45 GB to have."""
    with ComputeClient(compute_config) as client:
        yield client


@pytest.fixture(scope="session")
def twin(compute_config: ComputeConfig) -> InProcessCompute:
    return InProcessCompute(compute_config)
