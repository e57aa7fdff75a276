"""The dashboard's server: what it answers, to whom, and how a stream goes on."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import TypeAdapter

from orchestrator.dashboard import app as dashboard_app
from orchestrator.dashboard import stream as dashboard_stream
from orchestrator.dashboard.app import Dashboard, serve
from orchestrator.views import Daemon, Event, Round, Run, Site
from protos.errors import ConfigInvalid
from tests.support.recorded_operator import RecordedOperator
from tests.support.recorded_run import Recording

STATIC = Path(dashboard_app.__file__).parent / "static"
VENDORED = STATIC / "vendor" / "uplot"


@pytest.fixture
def operator() -> RecordedOperator:
    return RecordedOperator(Recording(committed=5))


@pytest.fixture
def dashboard(operator: RecordedOperator) -> Iterator[Dashboard]:
    with serve(operator) as served:
        yield served


class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes


def asked(
    dashboard: Dashboard, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(dashboard.host, dashboard.port, timeout=20)
    connection.request(method, path, headers=headers or {})
    return connection, connection.getresponse()


def get(
    dashboard: Dashboard, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> Answer:
    connection, response = asked(dashboard, path, headers, method)
    with contextlib.closing(connection), response:
        return Answer(response.status, response.headers, response.read())


@pytest.fixture
def streams() -> Iterator[contextlib.ExitStack]:
    """Closes the streams of a test."""
    with contextlib.ExitStack() as stack:
        yield stack


class Stream:
    """A viewer's stream, read event by event."""

    def __init__(
        self,
        streams: contextlib.ExitStack,
        dashboard: Dashboard,
        query: str = "",
        last: int | None = None,
    ) -> None:
        headers = {} if last is None else {"last-event-id": str(last)}
        self.connection, self.response = asked(dashboard, f"/api/events{query}", headers)
        streams.callback(self.close)
        assert self.response.status == 200
        assert self.response.headers["content-type"].startswith("text/event-stream")

    def block(self) -> dict[str, str]:
        """The next block: its fields, a comment under the key ``""``."""
        fields: dict[str, str] = {}
        while line := self.response.readline().decode().rstrip("\n"):
            key, _, value = line.partition(": ")
            fields["" if key.startswith(":") else key] = value or key
        return fields

    def event(self) -> Event:
        """The next event."""
        while "data" not in (fields := self.block()) or fields["data"] == "{}":
            pass
        event = Event.model_validate_json(fields["data"])
        assert fields["id"] == str(event.number)
        assert fields["event"] == event.kind
        return event

    def close(self) -> None:
        self.response.close()
        self.connection.close()


# -------------------------------------------------------------------------------------- answers


def test_json_is_the_views(dashboard: Dashboard, operator: RecordedOperator) -> None:
    expected: dict[str, tuple[Any, Any]] = {
        "/api/status": (Daemon, operator.status()),
        "/api/sites": (list[Site], list(operator.sites())),
        "/api/runs": (list[Run], list(operator.runs())),
        "/api/runs/fashion": (Run, operator.run("fashion")),
        f"/api/runs/{operator.run('fashion').id}": (Run, operator.run("fashion")),
        "/api/runs/fashion/rounds": (list[Round], list(operator.rounds("fashion"))),
    }
    for path, (view, value) in expected.items():
        answer = get(dashboard, path)
        assert answer.status == 200
        assert answer.headers["cache-control"] == "no-store"
        body = answer.body
        assert TypeAdapter(view).validate_json(body) == value
        # Every field is there, as in `--json`: nothing is left out for being a default.
        assert json.loads(body) == json.loads(TypeAdapter(view).dump_json(value))


def test_errors_say_what_and_what_to_do(dashboard: Dashboard) -> None:
    answer = get(dashboard, "/api/runs/nothing")
    body = json.loads(answer.body)
    assert answer.status == 404
    assert body["error"] == "NotFound"
    assert "farflung runs" in body["message"]
    assert body["facts"] == {"run": "nothing"}
    assert get(dashboard, "/api/nothing").status == 404
    assert get(dashboard, "/api/events?run=nothing").status == 404
    assert get(dashboard, "/api/status", method="POST").status == 405


def test_pages_and_modules_are_served_and_revalidated(dashboard: Dashboard) -> None:
    answer = get(dashboard, "/")
    page = answer.body
    assert answer.headers["content-type"].startswith("text/html")
    assert page == (STATIC / "index.html").read_bytes()
    module = get(dashboard, "/static/js/main.js")
    assert module.headers["content-type"].startswith("text/javascript")
    assert module.headers["cache-control"] == "no-cache"
    again = get(dashboard, "/static/js/main.js", {"if-none-match": module.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/", "/static/nothing.js"):
        assert get(dashboard, path).status == 404


# ------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("path", ["/", "/static/js/main.js", "/api/status", "/nothing"])
def test_every_answer_has_the_policy(dashboard: Dashboard, path: str) -> None:
    answer = get(dashboard, path)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert "data:" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answer.headers


def test_the_page_has_nothing_that_the_policy_would_have_to_except() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert "style=" not in page
    assert "<style" not in page
    assert " on" not in {
        page[at : at + 3] for at in range(len(page)) if page[at + 3 : at + 4] == "="
    }
    assert "http" not in page
    for module in (STATIC / "js").glob("*.js"):
        text = module.read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert 'setAttribute("style"' not in text
        assert "eval(" not in text


def test_every_module_is_preloaded() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    modules = {path.name for path in (STATIC / "js").glob("*.js")}
    assert {name for name in modules if f"/static/js/{name}" not in page} == set()


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "192.0.2.1", ""]
)
def test_other_names_are_refused(dashboard: Dashboard, host: str) -> None:
    for path in ("/", "/api/status", "/static/js/main.js"):
        answer = get(dashboard, path, {"host": host})
        assert answer.status == 421
        assert b"ssh -L" in answer.body
        assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:80", "[::1]:4711"])
def test_names_of_loopback_are_accepted(dashboard: Dashboard, host: str) -> None:
    assert get(dashboard, "/api/status", {"host": host}).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_only_loopback_is_bound(operator: RecordedOperator, host: str) -> None:
    with pytest.raises(ConfigInvalid, match="no credentials") as caught:
        serve(operator, host)
    assert caught.value.facts["key"] == "dashboard.host"


def test_a_port_in_use_is_named(dashboard: Dashboard, operator: RecordedOperator) -> None:
    with pytest.raises(ConfigInvalid, match=str(dashboard.port)):
        serve(operator, port=dashboard.port)


def test_a_port_is_free_again_after_stop(
    streams: contextlib.ExitStack, operator: RecordedOperator
) -> None:
    with serve(operator) as first:
        port = first.port
        stream = Stream(streams, first)
        stream.block()
    with serve(operator, "localhost", port) as second:
        assert second.url == f"http://127.0.0.1:{port}/"
        assert get(second, "/api/status").status == 200


# --------------------------------------------------------------------------------------- events


def test_a_new_viewer_sees_what_happens_from_now_on(
    streams: contextlib.ExitStack, dashboard: Dashboard, operator: RecordedOperator
) -> None:
    earlier = operator.tell(kind="log", text="before")
    # The event is on its way through the shared watch: a viewer that waits for it is up to date.
    waiting = Stream(streams, dashboard, last=0)
    assert waiting.event() == earlier
    stream = Stream(streams, dashboard)
    first = stream.block()
    assert first["event"] == "hello"
    assert first["id"] == "1"
    now = operator.tell(kind="log", text="now")
    assert stream.event() == now


def test_a_viewer_that_comes_back_misses_nothing(
    streams: contextlib.ExitStack, dashboard: Dashboard, operator: RecordedOperator
) -> None:
    told = [operator.tell(kind="log", text=f"line {n}") for n in range(5)]
    first = Stream(streams, dashboard, last=0)
    assert [first.event() for _ in told] == told
    first.close()
    told += [operator.tell(kind="log", text=f"line {n}") for n in range(5, 9)]
    ahead = Stream(streams, dashboard, last=0)
    assert [ahead.event() for _ in told] == told
    again = Stream(streams, dashboard, last=told[4].number)
    assert [again.event() for _ in told[5:]] == told[5:]
    live = operator.tell(kind="log", text="live")
    assert again.event() == live
    assert ahead.event() == live


def test_a_viewer_sees_its_run_and_what_has_none(
    streams: contextlib.ExitStack, dashboard: Dashboard, operator: RecordedOperator
) -> None:
    run = operator.run("fashion")
    stream = Stream(streams, dashboard, "?run=fashion")
    stream.block()
    operator.tell(kind="round", run="another", round=1)
    mine = operator.tell(kind="round", run=run.id, round=1)
    site = operator.tell(kind="site", site="north")
    other = operator.tell(kind="run", run="another")  # the list of runs is on every page
    assert [stream.event() for _ in range(3)] == [mine, site, other]


@pytest.mark.parametrize("last", [999, 1])
def test_who_is_too_far_behind_starts_anew(
    streams: contextlib.ExitStack,
    operator: RecordedOperator,
    monkeypatch: pytest.MonkeyPatch,
    last: int,
) -> None:
    monkeypatch.setattr(dashboard_stream, "MOST_MISSED", 3)
    for n in range(10):
        operator.tell(kind="log", text=f"line {n}")
    with serve(operator) as dashboard:
        stream = Stream(streams, dashboard, last=last)
        first = stream.block()
        assert first["event"] == "reset"
        assert first["id"] == "10"
        live = operator.tell(kind="log", text="live")
        assert stream.event() == live


def test_a_silent_stream_says_that_it_is_there(
    streams: contextlib.ExitStack, operator: RecordedOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_stream, "KEEPALIVE_S", 0.05)
    with serve(operator) as dashboard:
        stream = Stream(streams, dashboard)
        assert stream.block()["event"] == "hello"
        assert "" in stream.block()


def test_too_many_viewers_are_told_so(
    streams: contextlib.ExitStack, operator: RecordedOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_stream, "MOST_VIEWERS", 1)
    with serve(operator) as dashboard:
        stream = Stream(streams, dashboard)
        stream.block()
        answer = get(dashboard, "/api/events")
        assert answer.status == 503
        assert b"close one" in answer.body


def test_the_stream_goes_on_when_the_watch_breaks(
    streams: contextlib.ExitStack, operator: RecordedOperator
) -> None:
    class Breaking(RecordedOperator):
        """Its first followed watch ends with an error."""

        broken = False

        def watch(self, run: str, after: int, follow: bool) -> Any:
            if follow and not self.broken:
                self.broken = True
                raise ConnectionError("the daemon went away")
            return super().watch(run, after, follow)

    breaking = Breaking(operator.recording)
    with serve(breaking) as dashboard:
        stream = Stream(streams, dashboard)
        stream.block()
        told = breaking.tell(kind="log", text="after the break")
        assert stream.event() == told


# ------------------------------------------------------------------------------------- vendored


def test_vendored_files_are_the_published_ones() -> None:
    lines = (VENDORED / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split() for line in lines)}
    files = {path.name for path in VENDORED.iterdir()} - {"SHA256SUMS"}
    assert set(sums) == files
    for name, digest in sums.items():
        assert hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() == digest, name
    assert (VENDORED / "LICENSE").read_text(encoding="utf-8").startswith("The MIT License")


def test_no_file_of_the_page_is_long() -> None:
    own = [p for p in STATIC.rglob("*") if p.is_file() and VENDORED not in p.parents]
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in own}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
