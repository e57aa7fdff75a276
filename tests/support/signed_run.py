"""A run whose every signature is real: what a federation writes into its ledger, without the federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.ledger import ContributionRow, PlanKind, PlanRow, RoundRow, Signer
from orchestrator.rounds.plan import plan_row
from protos.identity import certificate_pem, fingerprint, key_pem, sign_header
from protos.manifest import Manifest
from protos.plan import Plan, Schedule, TaskChoice, Work
from tests.support.authority import Authority
from tests.support.workbench import Workbench, of_spec

SITES = ("east", "north", "south")
MODEL = Manifest((of_spec("w", (3,)), of_spec("b", (2,))))
RUN = "r"


class SignedRun:
    """A workbench with a federation's keys and one run.

    Args:
        root: An empty folder.
        config: Of the daemon, TOML.
        stale: From how many rounds back work counts.

    Attributes:
        bench: The workbench.
        authority: Who signed everybody's certificate.
        keys: The sites' keys and certificates.
    """

    def __init__(self, root: Path, config: str = "", stale: int = 0) -> None:
        self.bench = Workbench(root, config=config)
        self.ledger = self.bench.ledger
        self.authority = Authority("f-signed")
        keys = self.bench.home.keys
        keys.mkdir(exist_ok=True)
        (keys / "ca.key").write_bytes(key_pem(self.authority.key))
        (keys / "ca.pem").write_bytes(self.authority.pem)
        self.ledger.sign_with(
            Signer((self.authority.key, self.authority.certificate), self.authority.federation)
        )
        self.keys = {site: self.authority.leaf(site) for site in SITES}
        for site, (_, certificate) in self.keys.items():
            later = certificate.not_valid_after_utc.timestamp()
            self.ledger.invite(site, f"token-{site}", later)
            self.ledger.use_token(
                f"token-{site}",
                fingerprint=fingerprint(certificate),
                certificate_pem=certificate_pem(certificate),
                expires=later,
            )
        self.stale = stale
        more = {"cohort": f"{{ quorum = 1, stale = {stale} }}"} if stale else {}
        self.bench.run(RUN, rounds=9, **more)
        self.bench.commit(RUN, 0, self.model(0.0))

    def model(self, value: float) -> str:
        """A stored model."""
        return self.bench.put_model(
            MODEL, {"w": torch.full((3,), float(value)), "b": torch.full((2,), -float(value))}
        )

    def plans(self, number: int, attempt: int, kind: PlanKind, base: str) -> list[PlanRow]:
        """What the three sites are asked."""
        return [
            plan_row(
                Plan(
                    run=RUN,
                    round=number,
                    attempt=attempt,
                    kind=kind,
                    site=site,
                    base=base,
                    manifest=MODEL.digest,
                    accepts=(base, *(self.older_bases() if kind == "train" else ())),
                    task=TaskChoice(name="t"),
                    work=Work(steps=1),
                    schedule=Schedule(lr=0.1),
                )
            )
            for site in SITES
        ]

    def older_bases(self) -> list[str]:
        """From which a new round takes work for earlier ones."""
        return [row.base for row in self.ledger.newest(RUN, self.stale) if row.round > 0]

    def sent(self, plan: PlanRow, base: str, more: float = 0.0) -> ContributionRow:
        """What a site sends for a plan, signed; with ``more`` something else."""
        seed = float(plan.round * 10 + SITES.index(plan.site)) + more
        key, certificate = self.keys[plan.site]
        row = self.bench.contribution(
            plan.site,
            MODEL if plan.kind == "train" else Manifest(()),
            {"w": torch.full((3,), seed), "b": torch.full((2,), seed)},
            base=base,
            run=RUN,
            round=plan.round,
            attempt=plan.attempt,
            kind=plan.kind,
            work_digest=plan.work_digest,
            payloads={"s/x": (torch.tensor([seed]), "sum")},
        )
        signature = sign_header(key, row.header, row.plan_id, row.site)
        return replace(row, signature=signature, fingerprint=fingerprint(certificate))

    def plan(self, number: int, attempt: int = 1, **more: Any) -> list[PlanRow]:
        """Plan a round."""
        base = self.ledger.run(RUN).model
        plans = self.plans(number, attempt, "train", base)
        self.ledger.plan_round(RoundRow(RUN, number, attempt, base=base), plans, **more)
        return plans

    def count(self, plans: Sequence[PlanRow], base: str, sites: Sequence[str] = SITES) -> None:
        """Have contributions of sites counted."""
        for plan in plans:
            if plan.site in sites:
                assert self.ledger.accept(self.sent(plan, base)).verdict == "counted"

    def round(
        self, number: int, sites: Sequence[str] = SITES, attempt: int = 1, assess: bool = True
    ) -> RoundRow:
        """A whole round."""
        base = self.ledger.run(RUN).model
        self.count(self.plan(number, attempt), base, sites)
        return self.finish(number, attempt, assess=assess)

    def finish(
        self, number: int, attempt: int = 1, held: bool = False, assess: bool = True
    ) -> RoundRow:
        """Close, assess and commit a planned round."""
        ledger, model = self.ledger, self.model(number + attempt / 8)
        ledger.close_round(RUN, number, attempt, None, "every site answered")
        asked = self.plans(number, attempt, "assess", model) if assess else []
        if assess:
            ledger.open_exchange(RUN, number, attempt, "assess", asked)
        self.count(asked, model)
        summary = {"counted": list(SITES), "scores": {"val.accuracy": 0.5 + number / 20}}
        memos = {"co_learning": {"epochs": 5}}
        if held:
            ledger.hold_round(RUN, number, attempt, "it got worse", model=model)
        return ledger.commit_round(
            RUN, number, attempt, model=model, outer_state="", memos=memos, summary=summary
        )


def eventful(root: Path) -> SignedRun:
    """A run in which everything happened that a ledger can tell of."""
    run = SignedRun(root)
    ledger = run.ledger
    run.round(1, assess=False)
    base = ledger.run(RUN).model
    run.count(run.plan(2), base, ("north", "south"))
    again = run.plan(2, 2, abandoning="below the quorum")
    assert [row.site for row in ledger.carry_over(RUN, 2, 2)] == ["north", "south"]
    run.count(again, base, ("east",))
    run.finish(2, 2)
    run.round(3, ("north",), assess=False)
    ledger.set_run(RUN, state="stopped")
    ledger.roll_back(RUN, 2, "rolled back to round 2")
    base = ledger.run(RUN).model
    run.count(run.plan(3, 2), base)
    run.finish(3, 2, held=True, assess=False)
    ledger.extend_run(RUN, 12)
    run.plan(4)
    ledger.abandon_round(RUN, 4, 1, "the run was stopped")
    return run
