"""A ledger that can be checked: whatever is changed in an export of it is rejected and named."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import Encoding

from orchestrator.ledger import Entry, Signer, tables
from orchestrator.ledger.chain import entry_digest
from orchestrator.ledger.signatures import ENTRY_DOMAIN, SEAL_DOMAIN, entry_statement
from orchestrator.ledger.transcript import line, seal_statement, transcript
from orchestrator.ledger.verification import verify
from orchestrator.retention import collect
from orchestrator.verifying import verify_file, verify_run
from orchestrator.views import Finding, Verification
from protos.contribution import Header
from protos.digest import canonical, digest
from protos.errors import Conflict, InvalidInput, NotFound
from protos.identity import load_certificate, sign_header
from tests.support.authority import Authority
from tests.support.signed_run import RUN, SITES, SignedRun, eventful

Lines = list[bytes]
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SignedRun]:
    made = eventful(tmp_path_factory.mktemp("eventful"))
    yield made
    made.bench.close()


@pytest.fixture(scope="module")
def lines(run: SignedRun) -> Lines:
    return list(transcript(run.ledger, RUN))


def found(lines: Lines, run: SignedRun) -> Verification:
    return verify(lines, run.authority.certificate)[0]


# -- what is as it was ------------------------------------------------------------------------------


def test_an_export_of_a_good_ledger_is_good(run: SignedRun, lines: Lines) -> None:
    result = found(lines, run)
    assert result.problems == ()
    assert result.entries == len(run.ledger.entries(RUN)) == len(lines) - 2
    assert result.digest == run.ledger.verify_entries(RUN)
    assert result.committed == 4  # rounds 0 to 3; the first try at round 3 was taken back
    kinds = {json.loads(one)["kind"] for one in lines[1:-1]}
    assert kinds == {
        "created", "extended", "planned", "opened", "accepted", "carried", "closed", "held",
        "committed", "abandoned", "rolled_back",
    }  # fmt: skip


def test_it_says_nothing_that_the_ledger_does_not(run: SignedRun, lines: Lines) -> None:
    """One document for one ledger: written again it differs by its seal alone."""
    again = list(transcript(run.ledger, RUN))
    assert again[:-1] == lines[:-1]
    assert all(line(json.loads(one)) == one for one in lines)


def test_a_file_is_checked_without_a_daemon(run: SignedRun, lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "ca.pem").write_bytes(run.authority.pem)
    assert verify_file(tmp_path, tmp_path / "ca.pem").problems == ()
    (tmp_path / "other.pem").write_bytes(Authority("f-signed").pem)
    foreign = verify_file(tmp_path / "ledger.jsonl", tmp_path / "other.pem")
    assert any("did not sign it" in one.text for one in foreign.problems)
    with pytest.raises(NotFound, match="--authority"):
        verify_file(tmp_path, tmp_path / "nothing.pem")
    with pytest.raises(InvalidInput, match="not an export of a ledger"):
        verify_file(tmp_path / "ca.pem", tmp_path / "ca.pem")


def test_a_ledger_without_a_key_is_not_sealed(tmp_path: Path) -> None:
    from tests.support.workbench import Workbench

    bench = Workbench(tmp_path)
    bench.run("r")
    with pytest.raises(Conflict, match="without a key"):
        list(transcript(bench.ledger, "r"))
    bench.close()


# -- what was changed -------------------------------------------------------------------------------


class Forger:
    """Changes an export, by chance but repeatably, and says which line it changed."""

    def __init__(self, run: SignedRun, lines: Lines, seed: int) -> None:
        self.run, self.lines = run, lines
        self.documents = [json.loads(one) for one in lines]
        self.random = random.Random(seed)
        self.stranger = Authority(run.authority.federation)
        pair = (self.stranger.key, self.stranger.certificate)
        self.foreign = Signer(pair, run.authority.federation)
        self.ways: list[Callable[[], tuple[Lines, set[int]]]] = [
            *[self.byte] * 4, *[self.swap] * 2, *[self.omit] * 2, *[self.double] * 2,
            self.cut, self.signed_by_another_site, self.other_form_of_a_signature,
            self.committed_by_a_stranger, self.rewritten, self.sealed_by_a_stranger, self.shouted,
            self.another_plan,
        ]  # fmt: skip

    def change(self) -> tuple[str, Lines, set[int]]:
        """The way, the forgery, and the numbers of the entries of which one has to be named."""
        way = self.random.choice(self.ways)
        while True:
            made, entries = way()
            if made != self.lines:
                return way.__name__, made, entries

    def of_kind(self, *kinds: str) -> int:
        return self.random.choice(
            [n for n, one in enumerate(self.documents) if one.get("kind") in kinds]
        )

    def with_document(self, number: int, document: dict[str, Any]) -> Lines:
        return [*self.lines[:number], line(document), *self.lines[number + 1 :]]

    def byte(self) -> tuple[Lines, set[int]]:
        number = self.random.randrange(len(self.lines))
        data = bytearray(self.lines[number])
        data[self.random.randrange(len(data))] ^= self.random.randrange(1, 256)
        text = b"".join([*self.lines[:number], bytes(data), *self.lines[number + 1 :]])
        return text.splitlines(keepends=True), {number, number + 1}

    def swap(self) -> tuple[Lines, set[int]]:
        a, b = sorted(self.random.sample(range(1, len(self.lines)), 2))
        made = list(self.lines)
        made[a], made[b] = made[b], made[a]
        return made, {a, b}

    def omit(self) -> tuple[Lines, set[int]]:
        number = self.random.randrange(1, len(self.lines))
        return self.lines[:number] + self.lines[number + 1 :], {number, number + 1}

    def double(self) -> tuple[Lines, set[int]]:
        number = self.random.randrange(1, len(self.lines))
        at = self.random.randrange(number, len(self.lines))
        return [*self.lines[: at + 1], self.lines[number], *self.lines[at + 1 :]], {
            number, at + 1, len(self.lines) - 1,
        }  # fmt: skip

    def cut(self) -> tuple[Lines, set[int]]:
        number = self.random.randrange(2, len(self.lines))
        return self.lines[:number], {number}

    def signed_by_another_site(self) -> tuple[Lines, set[int]]:
        number = self.of_kind("accepted")
        document = dict(self.documents[number])
        header = json.loads(document["header"])
        other = self.random.choice([site for site in SITES if site != header["site"]])
        key = self.run.keys[other][0]
        text = document["header"].encode()
        document["signature"] = sign_header(key, text, header["plan_id"], header["site"]).hex()
        return self.with_document(number, document), {number}

    def other_form_of_a_signature(self) -> tuple[Lines, set[int]]:
        """(r, n - s) is as valid as (r, s)."""
        number = self.of_kind("accepted")
        document = dict(self.documents[number])
        r, s = decode_dss_signature(bytes.fromhex(document["signature"]))
        document["signature"] = encode_dss_signature(r, P256_ORDER - s).hex()
        return self.with_document(number, document), {number}

    def shouted(self) -> tuple[Lines, set[int]]:
        """Hexadecimal digits in capitals are the same bytes."""
        number = self.of_kind("accepted")
        document = dict(self.documents[number])
        document["signature"] = document["signature"].upper()
        return self.with_document(number, document), {number}

    def another_plan(self) -> tuple[Lines, set[int]]:
        number = self.of_kind("planned", "opened")
        document = dict(self.documents[number])
        if document["plans"]:
            left = self.random.randrange(len(document["plans"]))
            document["plans"] = [p for k, p in enumerate(document["plans"]) if k != left]
        return self.with_document(number, document), {number}

    def committed_by_a_stranger(self) -> tuple[Lines, set[int]]:
        """A round signed again, by a key whose certificate says all the right things."""
        number = self.of_kind("committed")
        documents = [dict(one) for one in self.documents]
        self._sign(documents, number)
        return [line(one) for one in documents], {number}

    def rewritten(self) -> tuple[Lines, set[int]]:
        """A contribution is taken out of a round, and all digests and signatures are made to fit."""
        number = self.of_kind("committed")
        documents = json.loads(json.dumps(self.documents))
        documents[number]["document"]["model"] = digest(b"another model")
        self._chain(documents, number)
        for later in range(number, len(documents) - 1):
            if documents[later]["kind"] == "committed":
                self._sign(documents, later)
        self._seal(documents)
        return [line(one) for one in documents], {number}

    def sealed_by_a_stranger(self) -> tuple[Lines, set[int]]:
        """The end is cut off, and what is left is sealed anew."""
        number = self.random.randrange(2, len(self.lines))
        documents = [dict(one) for one in self.documents[:number]] + [{"seal": {}}]
        self._seal(documents)
        return [line(one) for one in documents], {number}

    def _chain(self, documents: list[dict[str, Any]], first: int) -> None:
        previous = documents[first - 1]["digest"] if first > 1 else ""
        for one in documents[first:-1]:
            text = canonical(one["document"]).decode()
            one["previous"] = previous
            one["digest"] = previous = entry_digest(
                RUN, one["number"], one["kind"], one["time"], text, previous
            )

    def _sign(self, documents: list[dict[str, Any]], number: int) -> None:
        one = documents[number]
        entry = Entry(RUN, one["number"], one["kind"], one["time"], "", "", one["digest"])
        made = self.foreign.sign(ENTRY_DOMAIN, entry_statement(entry), entry.time)
        der = load_certificate(made.pem).public_bytes(Encoding.DER).hex()
        one["signed"] = {
            "time": made.time, "certificate": made.fingerprint, "signature": made.value.hex(),
        }  # fmt: skip
        certificates = {*documents[0]["certificates"], der}
        by_name = {load_der(text): text for text in certificates}
        documents[0] = {**documents[0], "certificates": [by_name[k] for k in sorted(by_name)]}

    def _seal(self, documents: list[dict[str, Any]]) -> None:
        name = digest(b"".join(line(one) for one in documents[:-1]))
        count = documents[-2]["number"]
        made = self.foreign.sign(SEAL_DOMAIN, seal_statement(RUN, count, name), 2e9)
        documents[-1] = {
            "seal": {
                "entries": count,
                "digest": name,
                "time": made.time,
                "certificate": load_certificate(made.pem).public_bytes(Encoding.DER).hex(),
                "signature": made.value.hex(),
            }
        }


def load_der(text: str) -> str:
    from protos.identity import fingerprint

    return fingerprint(x509.load_der_x509_certificate(bytes.fromhex(text)))


def check_forgeries(run: SignedRun, lines: Lines, count: int, seed: int) -> None:
    forger = Forger(run, lines, seed)
    for k in range(count):
        way, forged, entries = forger.change()
        try:
            problems = found(forged, run).problems
        except InvalidInput as error:  # the first line: no export at all
            problems = (Finding(text=error.message, entry=0),)
        assert problems, f"{way} {k} of seed {seed} was not noticed"
        named = {one.entry for one in problems}
        assert entries & named or 0 in entries, f"{way} {k} of seed {seed}: {problems}"


def test_a_changed_export_is_rejected_and_the_entry_named(run: SignedRun, lines: Lines) -> None:
    seed = int(os.environ.get("SEED", "5"))
    check_forgeries(run, lines, 60, seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_changed_exports_are_rejected_and_named(
    run: SignedRun, lines: Lines, part: int
) -> None:
    check_forgeries(run, lines, 2_500, 17 + part)


def test_each_way_to_forge_is_named_with_what_is_wrong(run: SignedRun, lines: Lines) -> None:
    forger = Forger(run, lines, 1)
    for way, words in (
        (forger.signed_by_another_site, "the signature is not the one that came with"),
        (forger.other_form_of_a_signature, "the signature is not the one that came with"),
        (forger.committed_by_a_stranger, "this federation's authority did not sign it"),
        (forger.rewritten, "this federation's authority did not sign it"),
        (forger.sealed_by_a_stranger, "the seal: certificate: this federation's authority"),
        (forger.cut, "the seal is missing"),
    ):
        made, _ = way()
        texts = [one.text for one in found(made, run).problems]
        assert any(words in text for text in texts), (way.__name__, texts)


# -- the ledger itself ------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[SignedRun]:
    made = SignedRun(tmp_path, config="[retention]\nmodels = 0\ncontributions = 1")
    made.round(1)
    made.round(2)
    yield made
    made.bench.close()


def texts(findings: tuple[Finding, ...]) -> list[str]:
    return [one.text for one in findings]


def test_a_good_ledger_and_its_store(fresh: SignedRun) -> None:
    result = verify_run(fresh.bench.engine, RUN)
    assert result.problems == result.erased == ()


def test_partial_work_in_a_run_that_takes_none_is_found_out(fresh: SignedRun) -> None:
    plan = fresh.plan(3)[0]
    row = fresh.sent(plan, fresh.ledger.run(RUN).model)
    header = Header.decode(row.header).model_copy(update={"partial": True})
    signature = sign_header(fresh.keys[plan.site][0], header.encode(), row.plan_id, row.site)
    cut = replace(row, digest=header.digest, header=header.encode(), signature=signature)
    assert fresh.ledger.accept(cut).verdict == "counted"
    (text,) = texts(verify_run(fresh.bench.engine, RUN).problems)
    assert "site east" in text
    assert "it is partial work, which the run does not take" in text


def test_an_eventful_run_is_good(run: SignedRun) -> None:
    assert verify_run(run.bench.engine, RUN).problems == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            sa.update(tables.rounds).where(tables.rounds.c.round == 2).values(memos="{}"),
            "round 2, attempt 1: its memos is not what was written",
        ),
        (
            sa.update(tables.plans)
            .where(tables.plans.c.site == "east", tables.plans.c.round == 1)
            .where(tables.plans.c.kind == "train")
            .values(contribution=None),
            "round 1, attempt 1: the acknowledged contribution of site east does not count",
        ),
        (
            sa.update(tables.contributions)
            .where(tables.contributions.c.site == "east", tables.contributions.c.round == 1)
            .values(signature=b"\x30\x00"),
            "site east): the signature is not the one that came with the contribution",
        ),
        (
            sa.delete(tables.signatures),
            "(committed, round 2): its model is not signed by the orchestrator",
        ),
        (sa.update(tables.runs).values(model="0" * 64), "the run's model is not that of round 2"),
    ],
)
def test_rows_that_say_something_else_are_named(
    fresh: SignedRun, change: sa.Executable, words: str
) -> None:
    with fresh.ledger._writing() as db:
        db.execute(change)
    result = verify_run(fresh.bench.engine, RUN)
    assert any(words in text for text in texts(result.problems)), result.problems


def test_lost_bytes_are_named_and_erased_ones_are_no_damage(fresh: SignedRun) -> None:
    engine, store = fresh.bench.engine, fresh.bench.store
    model = fresh.ledger.round(RUN, 2).model
    east = next(c for c in fresh.ledger.contributions(RUN, 2, 1, "train") if c.site == "east")
    for name in (model, east.index):
        path = store.path(name)
        path.chmod(0o600)
        path.write_bytes(bytes(len(path.read_bytes())))
    found = texts(verify_run(engine, RUN).problems)
    assert any(t.startswith("round 2: its model: artefact") for t in found), found
    assert any(t.startswith("round 2: contribution of site east: artefact") for t in found), found
    assert len(found) == 2
    store.path(east.index).unlink()
    found = texts(verify_run(engine, RUN).problems)
    assert any("site east" in t and "nothing says that it was removed" in t for t in found), found


def test_what_retention_removed_is_reported_as_erased(fresh: SignedRun) -> None:
    for path in fresh.bench.home.store.rglob("*"):
        if path.is_file():
            os.utime(path, (1.0, 1.0))
    fresh.round(3)
    for path in fresh.bench.home.store.rglob("*"):
        if path.is_file():
            os.utime(path, (1.0, 1.0))
    # Round 2 is not the best, not the first and not the newest.
    collect(fresh.bench.engine, dry_run=False)
    result = verify_run(fresh.bench.engine, RUN)
    assert result.problems == ()
    erased = texts(result.erased)
    assert any("round 1: the contributions of east, north, south were removed" in t for t in erased)
    assert any(t.startswith("round 2: its model was erased: collected") for t in erased), erased
    retired = fresh.ledger.only_of_round(RUN, 3)
    assert not any("round 3" in text for text in erased)
    fresh.bench.store.retire(retired, before=3e9)  # as if it were lost: the newest has to be there
    assert any("round 3" in text for text in texts(verify_run(fresh.bench.engine, RUN).problems))
