"""The ledger's code on PostgreSQL, where one and its driver are installed: what is portable stays so."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from orchestrator.ledger import ContributionRow, Ledger, PlanRow, RoundRow, RunRow, tables
from protos.digest import digest
from protos.errors import Conflict, NotFound, TokenUsed, Unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def program(name: str) -> str | None:
    places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private server on a socket of its own; its URL."""
    pytest.importorskip("psycopg")
    initdb, postgres = program("initdb"), program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed")
    user = None
    if os.geteuid() == 0:  # it refuses to run as root
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("there is no user for PostgreSQL to run as")
    # pytest's own folder is closed to that user, and too long for a socket's name.
    home = Path("/tmp") / f"pg-{os.getpid()}"
    home.mkdir(mode=0o700)
    if user:
        shutil.chown(home, user)
    data = home / "data"
    subprocess.run(
        [initdb, "-D", data, "-U", "ledger", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True, capture_output=True, user=user, cwd=home,
    )  # fmt: skip
    options = [
        "-c",
        "listen_addresses=",
        "-c",
        f"unix_socket_directories={home}",
        "-c",
        "fsync=off",
    ]
    process = subprocess.Popen(
        [postgres, "-D", data, *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user, cwd=home,
    )  # fmt: skip
    try:
        url = f"postgresql://ledger@/postgres?host={home}"
        for _ in range(600):
            if (home / ".s.PGSQL.5432").exists():
                try:
                    Ledger.open(url).close()
                    break
                except Unavailable:
                    pass  # "the database system is starting up"
            assert process.poll() is None, "PostgreSQL ended"
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # "fast shutdown"
        process.wait()
        shutil.rmtree(home)


def contribution(of: PlanRow) -> ContributionRow:
    header = f"{of.id} {of.site}".encode()
    return ContributionRow(
        digest(header), of.id, of.run, of.round, of.attempt, of.kind, of.site, of.work_digest,
        header, b"signature", "f" * 64, digest(b"i"), digest(b"m"), 1 << 40, 0.5, 1.0,
    )  # fmt: skip


def test_the_ledger_on_postgresql(server: str) -> None:
    with closing(Ledger.open(server)) as ledger:
        with ledger._reading() as db:
            context = MigrationContext.configure(db, opts={"compare_type": True})
            assert compare_metadata(context, tables.metadata) == []

        ledger.set_meta("key", "first")
        ledger.set_meta("key", "second")
        assert ledger.get_meta("key") == "second"

        ledger.invite("north", "token", expires=time.time() + 100)
        expires = time.time() + 1000
        ledger.use_token("token", fingerprint="a", certificate_pem=b"pem", expires=expires)
        with pytest.raises(TokenUsed):
            ledger.use_token("token", fingerprint="b", certificate_pem=b"pem", expires=expires)
        assert ledger.allowed("a") == "north"
        ledger.renew("north", "a", "b", b"pem", expires)
        ledger.revoke("north")
        assert ledger.allowed("b") is None

        row = RunRow("r", "run", {"a": [1, None]}, digest(b"config"), 2, 1.25, reason="z\0ero")
        ledger.create_run(row)
        with pytest.raises(Conflict):
            ledger.create_run(replace(row, id="r2"))
        assert ledger.run("run") == replace(row, reason="zero")
        with pytest.raises(NotFound, match="Did you mean run"):
            ledger.run("runn")

        sites = ["a-b", "B", "a", "_"]  # a database orders text as its locale says
        for attempt in (1, 2):
            plans = [PlanRow("r", 1, attempt, "train", s, b"plan", digest(b"w")) for s in sites]
            ledger.plan_round(RoundRow("r", 1, attempt, started=1.0), plans, abandoning="again")
            for plan in plans[:3] if attempt == 1 else []:
                assert ledger.accept(contribution(plan)).verdict == "counted"
        assert len(ledger.carry_over("r", 1, 2)) == 3
        assert [plan.site for plan in ledger.open_plans("_")] == ["_"]
        last = contribution(PlanRow("r", 1, 1, "train", "_", b"", digest(b"w")))
        answer = ledger.accept(last)
        assert (answer.verdict, answer.plan_id) == ("counted", "r/1/2/train")
        assert ledger.accept(last).again
        closed = ledger.close_round("r", 1, 2, None, "all answered")
        names = [ledger.contribution(one).site for one in closed.closed_set]
        assert names == sorted(sites)
        late = PlanRow("r", 1, 2, "assess", "a", b"plan", digest(b"x"))
        ledger.open_exchange("r", 1, 2, "assess", [late])
        ledger.close_exchange("r", 1, 2, "assess")
        assert ledger.accept(contribution(late)).verdict == "late"
        done = ledger.commit_round("r", 1, 2, model="m" * 64, memos={"nan": float("inf")})
        assert ledger.history("r") == [done]
        assert ledger.last_counted("r", "a") == closed.closed_set[names.index("a")]
        with pytest.raises(Conflict):
            ledger.commit_round("r", 1, 2, model="n" * 64)
        with pytest.raises(Conflict), ledger._writing() as db:
            db.execute(sa.update(tables.rounds).values(state="committed"))
        chain = ledger.verify_entries("r")
    with closing(Ledger.open(server)) as ledger:
        assert ledger.verify_entries("r") == chain
        assert ledger.run("r").model == "m" * 64


def test_a_server_that_is_away_says_so(server: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        Ledger.open(f"postgresql://ledger@/postgres?host={tmp_path}")
