"""A run's chain with everything that proves it, as one document that needs no database.

JSON Lines, each line canonical JSON and a line feed, so that there is one way to write it and no byte
that nothing covers::

    {"format", "federation", "run", "certificates"}     DER in hexadecimal, by fingerprint
    {"number", "kind", "time", "document", "previous", "digest", …}     every entry, in order
    {"seal": {"entries", "digest", "time", "certificate", "signature"}}     of all lines before

Beside its document an entry has what the document only names: ``created`` the configuration,
``planned`` and ``opened`` the plans as they went out, ``accepted`` the header as it was carried and
the site's signature, ``committed`` the summary and the orchestrator's signature. It holds names of
sites and their scores, and no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from orchestrator.ledger.database import to_json
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.rows import Entry, SignatureRow
from protos.digest import canonical, digest, hasher
from protos.identity import load_certificate

FORMAT = "farflung ledger 1"
NAME = "ledger.jsonl"
"""What an export calls it."""


def transcript(ledger: Ledger, run: str) -> Iterator[bytes]:
    """The lines of a run's transcript, sealed now.

    Raises:
        NotFound: There is no such run.
        Conflict: The ledger has no key to seal it with.
    """
    row, federation = ledger.run(run), ledger.federation()
    chain = ledger.entries(row.id)
    signed = {n: s for n, s in ledger.signatures(row.id).items() if n <= len(chain)}
    head = {
        "format": FORMAT,
        "federation": federation,
        "run": row.id,
        "certificates": _certificates(ledger, chain, signed),
    }
    all_of_it = hasher()
    for document in (head, *_entries(ledger, row.config, chain, signed)):
        data = line(document)
        all_of_it.update(data)
        yield data
    made = ledger.seal(seal_statement(row.id, len(chain), all_of_it.hexdigest()))
    seal = {
        "entries": len(chain),
        "digest": all_of_it.hexdigest(),
        "time": made.time,
        "certificate": _der(made.pem),
        "signature": made.value.hex(),
    }
    yield line({"seal": seal})


def seal_statement(run: str, entries: int, digest_of_lines: str) -> dict[str, object]:
    """What the seal of a transcript is over."""
    return {"run": run, "entries": entries, "digest": digest_of_lines}


def line(document: dict[str, Any]) -> bytes:
    """A document as a line."""
    return canonical(document) + b"\n"


def _entries(
    ledger: Ledger, config: dict[str, Any], chain: list[Entry], signed: dict[int, SignatureRow]
) -> Iterator[dict[str, Any]]:
    plans: dict[tuple[int, int], dict[str, bytes]] = {}
    for entry in chain:
        document = json.loads(entry.document)
        more: dict[str, Any] = {}
        if entry.kind == "created":
            more["config"] = config
        elif entry.kind in ("planned", "opened"):
            key = (document["round"], document["attempt"])
            if entry.kind == "planned":
                plans = {}
            if key not in plans:
                rows = ledger.plans(entry.run, *key)
                plans[key] = {digest(plan.plan): plan.plan for plan in rows}
            known = plans[key]
            more["plans"] = [known[name].decode() for name in document["plans"] if name in known]
        elif entry.kind == "accepted":
            found = ledger.contribution(document["contribution"])
            more = {"header": found.header.decode(), "signature": found.signature.hex()}
        elif entry.kind == "committed":
            row = ledger.round(entry.run, document["round"], document["attempt"])
            more["summary"] = to_json(row.summary)
            if entry.number in signed:
                made = signed[entry.number]
                more["signed"] = {
                    "time": made.time,
                    "certificate": made.fingerprint,
                    "signature": made.value.hex(),
                }
        yield {
            "number": entry.number,
            "kind": entry.kind,
            "time": entry.time,
            "document": document,
            "previous": entry.previous,
            "digest": entry.digest,
            **more,
        }


def _certificates(ledger: Ledger, chain: list[Entry], signed: dict[int, SignatureRow]) -> list[str]:
    """Every certificate that an entry names, by fingerprint."""
    pems = {made.fingerprint: made.pem for made in signed.values()}
    for entry in chain:
        if entry.kind == "accepted":
            name = json.loads(entry.document).get("certificate", "")
            if name not in pems and (known := ledger.certificate(name)) is not None:
                pems[name] = known.pem
    return [_der(pems[name]) for name in sorted(pems)]


def _der(pem: bytes) -> str:
    return load_certificate(pem).public_bytes(Encoding.DER).hex()
