"""The compute process with a real Ray: what it does, and what nobody can do to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from orchestrator.compute import (
    Compute,
    ComputeClient,
    ComputeConfig,
    InProcessCompute,
    Level,
    Limits,
    errors,
    listeners,
)
from tests.integration.compute_functions import FUNCTIONS
from tests.integration.conftest import START_S

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
LIMITS = Limits(seconds=20, memory_bytes=256 * 2**20)


@pytest.fixture
def confined(compute: ComputeClient) -> ComputeClient:
    if compute.wait_ready(START_S)["level"] != Level.NAMESPACES:
        pytest.skip("this host grants no namespaces")
    return compute


@pytest.fixture(params=["ray", "in-process"])
def either(
    request: pytest.FixtureRequest, confined: ComputeClient, twin: InProcessCompute
) -> Compute:
    return confined if request.param == "ray" else twin


def gone(pids: list[int], within_s: float = 20.0) -> bool:
    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    # Where nobody reaps orphans (a container without an init) they stay as zombies.
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_it_gets_ready_and_says_how_it_runs(compute: ComputeClient) -> None:
    facts = compute.wait_ready(START_S)
    assert facts["engine"] == "ray"
    assert facts == compute.call("ping", {}, 10.0)
    assert all(where.startswith("127.0.0.1:") for where in facts["listeners"])
    assert len(facts["listeners"]) >= 4


def test_map_keeps_the_order_and_equals_the_twin(
    compute: ComputeClient, twin: InProcessCompute
) -> None:
    items = [{"x": i} for i in range(40)]
    assert compute.map("square", items, START_S) == twin.map("square", items, 10.0)


def test_torch_in_a_worker_has_one_thread_and_the_twins_bits(
    compute: ComputeClient, twin: InProcessCompute
) -> None:
    items = [{"seed": i} for i in range(3)]
    results = compute.map("norm", items, START_S)
    assert results == twin.map("norm", items, 60.0)
    assert {result["threads"] for result in results} == {1}


def test_a_function_that_raises_is_named(either: Compute) -> None:
    with pytest.raises(errors.FunctionFailed, match="ValueError at item 0 of 2") as caught:
        either.map("raises", [{"x": 1}, {"x": 2}], START_S)
    assert caught.value.facts["index"] == 0
    assert "compute_functions.py" in str(caught.value.facts["where"])


def test_only_functions_of_the_table_run(either: Compute) -> None:
    with pytest.raises(errors.ComputeRefused, match="no function 'os:system'"):
        either.map("os:system", [{}], 5.0)
    with pytest.raises(errors.ComputeRefused, match="no operation 'eval'"):
        either.call("eval", {}, 5.0)


def test_a_request_that_takes_too_long_is_cancelled(compute: ComputeClient) -> None:
    compute.wait_ready(START_S)
    with pytest.raises(errors.ComputeTimedOut):
        compute.map("slow", [{"seconds": 60.0}] * 4, 0.5)
    # Were they not cancelled, both CPUs would be taken for two minutes.
    assert compute.map("square", [{"x": 3}], 30.0)[0]["square"] == 9


def test_single_calls_meet_the_same_worker_until_it_is_lost(compute: ComputeClient) -> None:
    def at_work() -> int:
        return int(compute.map("where_am_i", [{}], START_S)[0]["pid"])

    first = at_work()
    assert at_work() == first
    with pytest.raises(errors.ComputeDied):  # twice: a worker that is lost is tried once more
        compute.map("leaves", [{}], START_S)
    second = at_work()
    assert second != first
    with pytest.raises(errors.ComputeTimedOut):
        compute.map("slow", [{"seconds": 600.0}], 0.5)
    assert at_work() != second


def test_single_calls_at_the_same_time_do_not_wait_for_each_other(
    compute: ComputeClient, tmp_path: Path
) -> None:
    compute.wait_ready(START_S)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(2) as pool:
        # Each end of a pipe is open only once the other is.
        items = [{"path": str(pipe), "mode": mode} for mode in ("rb", "wb")]
        calls = [pool.submit(compute.map, "opens", [item], START_S) for item in items]
        assert [call.result() for call in calls] == [[{}], [{}]]


def test_nothing_of_ray_listens_on_the_host(confined: ComputeClient) -> None:
    facts = confined.wait_ready(START_S)
    pids = confined.process_ids()
    assert len(pids) > 5
    assert listeners.listening(pids) == []
    ours = {listener.port for listener in listeners.listening()}
    for where in facts["listeners"]:
        port = int(where.rpartition(":")[2])
        if port not in ours:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=2)


def test_the_keys_are_empty_inside_and_stay_so(confined: ComputeClient, keys: Path) -> None:
    assert sorted(p.name for p in keys.iterdir()) == ["authority.pem"]
    path = {"path": str(keys)}
    assert confined.map("lists", [path], START_S) == [{"names": []}]
    result = confined.map("escapes", [path], START_S)[0]
    assert result["umount"] != 0
    assert result["umount_in_user_namespace"] != 0
    assert result["through_init"] == 0


def test_a_worker_sees_no_variable_of_the_daemon(confined: ComputeClient) -> None:
    names = confined.map("where_am_i", [{}], START_S)[0]["environment"]
    assert "PYTEST_CURRENT_TEST" not in names
    assert not [name for name in names if "AWS" in name or "SECRET" in name]


def test_a_plugin_returns_its_result_and_its_prints_do_no_harm(either: Compute) -> None:
    assert either.isolated("prints", {}, LIMITS) == {"value": "real"}


def test_a_plugin_has_an_empty_environment_and_no_network(
    either: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = either.isolated("where_am_i", {}, LIMITS)
    assert found["interfaces"] == ["lo"]
    allowed = {"PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LANG", "LC_CTYPE", "TZ"}
    allowed |= {"LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"}
    allowed |= {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert set(found["environment"]) <= allowed
    assert not found["torch"]


def test_a_plugin_that_raises(either: Compute) -> None:
    with pytest.raises(errors.PluginRaised, match="raises raised ValueError: item 7") as caught:
        either.isolated("raises", {"x": 7}, LIMITS)
    assert "compute_functions.py" in str(caught.value.facts["where"])


def test_a_plugin_that_loops_for_ever(either: Compute) -> None:
    began = time.monotonic()
    with pytest.raises(errors.PluginTimedOut, match=r"ran longer than its 1 s"):
        either.isolated("spins", {}, Limits(seconds=1, memory_bytes=2**28))
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("function", ["eats", "eats_shared"])
def test_a_plugin_that_eats_memory(either: Compute, function: str) -> None:
    with pytest.raises(errors.PluginOutOfMemory, match="more than its 256 MiB"):
        either.isolated(function, {}, LIMITS)


def test_a_plugin_that_opens_a_socket(either: Compute) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(errors.PluginRaised, match="Network is unreachable"):
            either.isolated("connects", {"port": port}, LIMITS)


def test_a_plugin_that_reads_a_key(either: Compute, keys: Path) -> None:
    with pytest.raises(errors.PluginRaised, match="FileNotFoundError"):
        either.isolated("reads", {"path": str(keys / "authority.pem")}, LIMITS)


def test_a_plugin_that_a_signal_kills(either: Compute) -> None:
    with pytest.raises(errors.PluginKilled, match="SIGSEGV") as caught:
        either.isolated("dies", {"signal": signal.SIGSEGV}, LIMITS)
    assert caught.value.facts["signal"] == "SIGSEGV"
    with pytest.raises(errors.PluginKilled, match="status 3 and no result"):
        either.isolated("leaves", {}, LIMITS)


def holders(path: Path) -> list[Path]:
    """Descriptors of any process that have ``path`` open."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if fd.readlink() == path:
                found.append(fd)
    return found


def test_a_plugin_leaves_no_process(either: Compute, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w"):
        assert len(holders(path)) == 1
    either.isolated("orphans", {"path": str(path)}, LIMITS)
    assert holders(path) == []


def test_a_plugin_finds_nothing_that_another_left_in_memory(either: Compute) -> None:
    assert [either.isolated("marks", {}, LIMITS)["found"] for _ in range(2)] == [["", "/"]] * 2


@pytest.fixture
def preloading() -> InProcessCompute:
    return InProcessCompute(
        ComputeConfig(functions=FUNCTIONS, preload=("tests.integration.preloaded",))
    )


def test_what_plugins_need_is_imported_once(preloading: InProcessCompute) -> None:
    first, second = (preloading.isolated("imported_by", {}, LIMITS) for _ in range(2))
    assert not first["here"]
    assert first == second


def test_torch_computes_with_more_threads_than_one_in_a_fork() -> None:
    config = ComputeConfig(functions=FUNCTIONS, preload=("torch",))
    limits = Limits(seconds=60, memory_bytes=2**30, threads=2)
    for _ in range(2):
        found = InProcessCompute(config).isolated("norm", {"seed": 1}, limits)
        assert found["threads"] == 2
        assert found["norm"] == pytest.approx(300_000**0.5, rel=0.01)


def test_a_module_that_is_not_to_be_had_stops_no_plugin_that_does_without() -> None:
    config = ComputeConfig(functions=FUNCTIONS, preload=("tests.integration.nowhere",))
    assert InProcessCompute(config).isolated("prints", {}, LIMITS) == {"value": "real"}


def test_with_its_zygote_a_plugin_ends_and_the_next_has_another(
    preloading: InProcessCompute, tmp_path: Path
) -> None:
    zygote = preloading.isolated("imported_by", {}, LIMITS)["pid"]
    os.mkfifo(tmp_path / "held")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(preloading.isolated, "holds", {"path": str(tmp_path / "held")}, LIMITS)
        with (tmp_path / "held").open() as file:
            os.kill(zygote, signal.SIGKILL)
            assert file.read() == ""  # when nobody has it open any more
        with pytest.raises(errors.PluginKilled, match="SIGKILL"):
            held.result()
    assert preloading.isolated("imported_by", {}, LIMITS)["pid"] != zygote


CALLER = """
import sys
from orchestrator.compute import ComputeConfig, InProcessCompute, Limits
from tests.integration.compute_functions import FUNCTIONS
limits = Limits(seconds=100, memory_bytes=2**28)
InProcessCompute(ComputeConfig(functions=FUNCTIONS)).isolated("holds", {"path": sys.argv[1]}, limits)
"""


def test_with_its_caller_a_plugin_ends_and_its_zygote(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "held")
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, str(tmp_path / "held")], cwd=ROOT
    ) as caller:
        with (tmp_path / "held").open() as file:
            pids = [child.pid for child in psutil.Process(caller.pid).children(recursive=True)]
            assert len(pids) > 2
            caller.kill()
            assert file.read() == ""
        assert gone(pids)


@pytest.mark.parametrize(
    "victim",
    [
        "supervisor",
        "driver",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("raylet", "gcs_server")),
    ],
)
def test_after_kill_9_nothing_is_left_and_it_starts_again(
    compute: ComputeClient, victim: str
) -> None:
    compute.wait_ready(START_S)
    pids, restarts = compute.process_ids(), compute.restarts
    supervisor = min(pids, key=lambda pid: psutil.Process(pid).create_time())
    children = psutil.Process(supervisor).children(recursive=True)
    named = [p.pid for p in children if p.name() == victim]  # Ray's own: its node, its head
    os.kill(supervisor if victim == "supervisor" else [*named, children[1].pid][0], signal.SIGKILL)
    assert gone(pids)
    # A call that comes while it starts again waits for it.
    try:
        done = compute.map("square", [{"x": 2}], START_S)
    except errors.ComputeDied:  # sent before the death was noticed; that happens once
        done = compute.map("square", [{"x": 2}], START_S)
    assert done[0]["square"] == 4
    assert compute.restarts == restarts + 1


DAEMON = """
import sys
from orchestrator.compute import ComputeClient, ComputeConfig
client = ComputeClient(ComputeConfig(num_cpus=1))
client.start()
client.wait_ready(90)
assert not {"ray", "torch"} & set(sys.modules), "the daemon must not import them"
print(*client.process_ids(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_daemon_that_is_killed_takes_everything_along(number: signal.Signals) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    with daemon:
        assert daemon.stdout
        pids = [int(pid) for pid in daemon.stdout.readline().split()]
        assert len(pids) > 5
        os.killpg(daemon.pid, number)
        assert gone([*pids])


def test_an_exposed_ray_is_refused() -> None:
    config = ComputeConfig(
        num_cpus=1,
        functions=FUNCTIONS,
        levels=(Level.NONE,),
        ray_environment={"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
    )
    if not listeners.host_addresses():
        pytest.skip("this host has no address but loopback")
    with ComputeClient(config) as client:
        with pytest.raises(errors.ComputeExposed, match="private_networks") as caught:
            client.wait_ready(START_S)
        assert "*:" in str(caught.value.facts["where"])
