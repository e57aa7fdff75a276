"""The home folder: keys that nobody else reads, one daemon, a configuration that parses."""

import multiprocessing
import os
import stat
import tomllib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from orchestrator.config import DaemonConfig
from orchestrator.home import Home, split_address
from protos.errors import ConfigInvalid, Conflict, HomeLocked, InvalidInput, NotFound
from protos.identity import identity_of, load_certificate, load_key


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_nobody_else_reads_a_home(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "deep" / "home")
    for folder in (home.path, home.keys, home.run, home.store, home.spool, home.work, home.log):
        assert mode(folder) == 0o700, folder
    assert mode(home.keys / "ca.key") == 0o600


@pytest.mark.usefixtures("open_umask")
def test_a_folder_that_was_there_is_closed_too(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    assert mode(Home.create(tmp_path / "home").path) == 0o700


def test_a_home_is_made_once(home: Home) -> None:
    before = (home.keys / "ca.key").read_bytes()
    with pytest.raises(Conflict, match="holds a federation already"):
        Home.create(home.path)
    home.config_file.unlink()
    with pytest.raises(Conflict):
        Home.create(home.path)
    assert (home.keys / "ca.key").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"address": "nowhere"}, InvalidInput),
        ({"bind": "127.0.0.1:port"}, InvalidInput),
        ({"dashboard_port": 70_000}, ConfigInvalid),
        ({"hosts": ('a"b',)}, ConfigInvalid),
    ],
    ids=str,
)
def test_a_slip_leaves_nothing_behind(
    arguments: dict[str, object], error: type[Exception], tmp_path: Path
) -> None:
    """So that the same command, put right, works."""
    with pytest.raises(error):
        Home.create(tmp_path / "home", **arguments)  # type: ignore[arg-type]
    Home.create(tmp_path / "home")


def test_authority_is_one_pair_and_the_federations_own(home: Home, tmp_path: Path) -> None:
    key, certificate = home.authority()
    assert key.public_key() == certificate.public_key()
    other = Home.create(tmp_path / "other")
    assert other.federation != home.federation
    assert other.authority()[1] != certificate


def test_server_certificate_is_for_its_hosts(home: Home) -> None:
    key, pem = home.server_certificate(("o.example", "10.0.0.7"))
    certificate = load_certificate(pem)
    certificate.verify_directly_issued_by(home.authority()[1])
    assert load_key(key).public_key() == certificate.public_key()
    assert identity_of(certificate).role == "orchestrator"
    assert identity_of(certificate).federation == home.federation


# -- configuration --------------------------------------------------------------------------------


def test_template_says_the_defaults(home: Home) -> None:
    config = home.config
    plain = DaemonConfig()
    assert config.model_copy(update={"listen": plain.listen}) == plain
    assert config.listen.bind == plain.listen.bind
    assert {"localhost", "127.0.0.1"} <= set(config.listen.hosts)


def test_what_the_template_comments_out_is_right_too(home: Home) -> None:
    text = home.config_file.read_text()
    tail = text[text.index("# [tasks.digits]") :]
    shown = tomllib.loads("\n".join(line.removeprefix("# ") for line in tail.splitlines()))
    assert DaemonConfig.model_validate(shown).tasks["digits"].source == "tasks/digits.py:Digits"


def test_address_is_listened_for_on_every_interface_and_certified(tmp_path: Path) -> None:
    config = Home.create(
        tmp_path / "home", address="o.example:9000", hosts=("second.example",), dashboard_port=0
    ).config
    assert config.listen.bind == "0.0.0.0:9000"
    assert config.listen.address == "o.example:9000"
    assert {"o.example", "second.example"} <= set(config.listen.hosts)
    assert config.dashboard.port == 0


def test_error_in_the_configuration_names_file_and_key(home: Home) -> None:
    home.config_file.write_text("[sites]\nheartbeat_s = 'often'\n")
    with pytest.raises(ConfigInvalid, match=r"farflung\.toml: sites\.heartbeat_s") as caught:
        _ = home.config
    assert caught.value.facts["key"] == "sites.heartbeat_s"


def test_a_folder_that_is_no_home_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"{tmp_path} is not a home"):
        Home(tmp_path).require()


def test_restored_home_gets_its_folders(home: Home) -> None:
    home.spool.rmdir()
    home.run.rmdir()
    home.make_folders()
    assert home.spool.is_dir()
    assert mode(home.run) == 0o700


# -- the lock -------------------------------------------------------------------------------------


def holder(path: Path, told: Connection) -> None:
    with Home(path).lock():
        told.send(os.getpid())
        told.recv()


def test_second_daemon_is_refused_by_name(home: Home) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=holder, args=(home.path, theirs), daemon=True
    )
    process.start()
    pid = ours.recv()
    with pytest.raises(HomeLocked, match=f"in use by process {pid}") as caught:
        home.lock()
    assert caught.value.facts["process"] == str(pid)
    # A second refusal says the same: the first one did not spoil the file.
    with pytest.raises(HomeLocked, match=f"in use by process {pid}"):
        home.lock()
    process.kill()
    process.join()
    # However it ended, the next one may have it.
    with home.lock() as file:
        file.seek(0)
        assert file.read() == str(os.getpid())


def test_lock_ends_with_its_file(home: Home) -> None:
    home.lock().close()
    home.lock().close()


# -- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("o.example:8470", ("o.example", 8470)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "host", ":80", "host:", "host:port", "host:-1", "host:65536", "host:²", "[]:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not host:port"):
        split_address(text)
