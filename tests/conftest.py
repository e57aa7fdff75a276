"""What all tests share."""

import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

# Tensors in tests are small: handing them to a second thread costs ten times what it saves
# (measured with tests/unit/test_scores.py on two busy cores: 6.0 s against 0.5 s).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# pytest-xdist sets it; what goes into a pipe is then as narrow as the terminal of whoever looks on.
os.environ.pop("COLUMNS", None)

# Whoever starts the tests in the background of a shell makes them ignore Ctrl-C, and what they start
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings  # noqa: E402

# A machine that does other work makes an example slow, never wrong.
settings.register_profile("farflung", deadline=None)
settings.load_profile("farflung")

import pytest  # noqa: E402

from tests.support.field import Field  # noqa: E402
from tests.support.object_store import ObjectStore, serving  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a Ray run in one worker, so that there is one Ray of each kind."""
    for item in items:
        if {"real", "compute"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """The one federation of a test run: a daemon with its Ray, and three sites."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Fails in the second worker that gets here: its tests are not in the group.
        (tmp_path_factory.getbasetemp().parent / "real").mkdir()
    field = Field(tmp_path_factory.mktemp("field"))
    with field.federation:
        yield field


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The one S3-compatible server of a test run; each test takes a prefix of its own."""
    with serving(tmp_path_factory.mktemp("s3")) as store:
        yield store


class FinishedRun(NamedTuple):
    """A real run, and where its page is."""

    run: str
    dashboard_url: str


@pytest.fixture(scope="session")
def finished_run(real: Field) -> FinishedRun:
    """Four rounds with co-learning, distillation and calibration."""
    strategy = [{"name": "co_learning"}, {"name": "self_distillation"}, {"name": "temperature"}]
    # A state that is over within a tenth of a second is not told, and with it how fast a site is.
    local = {"work": {"epochs": 8}, "batch_size": 5, "lr": 0.05}
    config = real.config("watched", rounds=4, strategy=strategy, local=local)
    run = real.federation.run(config, 200)
    assert run.state == "finished", run.reason
    return FinishedRun(run.id, real.federation.client.status().dashboard)
