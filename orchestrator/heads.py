"""Heads of contributions: everything that can be checked before a byte of the payload moves."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.doorkeeper import Caller
from orchestrator.ledger import Ledger, PlanRow
from orchestrator.run_config import RunConfig
from orchestrator.store import Store
from protos.contribution import Header
from protos.digest import digest
from protos.errors import ContributionRefused, NotFound
from protos.identity import verify_header
from protos.manifest import MAX_BYTES, Index, Manifest
from protos.plan import Plan
from protos.v1 import site_pb2

MAX_SIDE_BYTES = 256 << 20
"""Side payloads of one contribution, together (init and assess carry everything in them)."""


@dataclass
class Announced:
    """A head that was checked.

    Attributes:
        header: The header.
        digest: Its digest, the contribution's name.
        encoded: Its bytes as carried.
        signature: Over them.
        index: Of the payload.
        plan: The plan that it answers.
        row: The plan's row.
    """

    header: Header
    digest: str
    encoded: bytes
    signature: bytes
    index: Index
    plan: Plan
    row: PlanRow


class Heads:
    """Checks heads.

    Args:
        ledger: Knows the plans.
        store: Has the manifests.
    """

    def __init__(self, ledger: Ledger, store: Store) -> None:
        self._ledger, self._store = ledger, store
        # The newest: all sites of a round ask for the same.
        self._covered: tuple[tuple[str, tuple[str, ...] | None], Manifest] | None = None

    def announce(self, caller: Caller, head: site_pb2.ContributionHead) -> Announced:
        """Check everything that can be checked before a byte of the payload moves.

        Raises:
            ContributionRefused: Something in the head does not fit; says what and for which site.
            ManifestInvalid: The header or the index breaks a bound.
            NotFound: The site has no such plan.
        """
        site = caller.identity.name
        header = Header.decode(head.header)
        if header.site != site:
            raise ContributionRefused(
                f"site {site}: the header speaks for {header.site}", site=site, key="site"
            )
        if not verify_header(caller.certificate, head.signature, head.header, header.plan_id, site):
            raise ContributionRefused(
                f"site {site}: the signature does not hold for this header and plan", site=site
            )
        row = self._ledger.plan(header.plan_id, site)
        if row is None:
            raise NotFound(f"site {site}: no plan {header.plan_id} was given to it", site=site)
        plan = Plan.decode(row.plan)
        index = Index.decode(head.index)
        self._check_head(site, header, plan, row.work_digest, index)
        name = digest(head.header)  # it has one form: decoding has seen to that
        return Announced(header, name, head.header, head.signature, index, plan, row)

    def _check_head(
        self, site: str, header: Header, plan: Plan, work_digest: str, index: Index
    ) -> None:
        def refuse(what: str, key: str) -> None:
            raise ContributionRefused(
                f"site {site}, plan {header.plan_id}: {what}", site=site, key=key
            )

        if header.work_digest != work_digest:
            refuse("it answers other work than the plan asks for", "work_digest")
        if header.kind != plan.kind:
            refuse(f"it is a {header.kind} contribution to a {plan.kind} plan", "kind")
        if index.digest != header.index:
            refuse("the index is not the one that the header names", "index")
        if index.manifest != header.manifest:
            refuse("index and header name different manifests", "manifest")
        if header.partial and not (plan.kind == "train" and self._takes_partial(plan.run)):
            refuse("it is partial work, which the run does not take", "partial")
        if plan.kind != "init" and header.base != plan.base:
            refuse(
                f"it was trained from the base {header.base[:12] or '(none)'}, "
                f"the plan accepts {plan.base[:12]}",
                "base",
            )
        side = sum(p.nbytes for p in header.payloads)
        if side > (MAX_BYTES if plan.kind == "init" else MAX_SIDE_BYTES):
            refuse(f"{side} bytes of side payloads", "payloads")
        if plan.kind == "init":
            if "init/manifest" not in header.payload_names:
                refuse("it carries no manifest", "payloads")
            return
        covered = self.covered(plan)
        if plan.kind == "train" and header.manifest != covered.digest:
            refuse(
                "its tensors are not those of the plan: their names, shapes or dtypes differ",
                "manifest",
            )
        expected = header.expected_nbytes(covered)
        if index.nbytes != expected:
            refuse(
                f"{index.nbytes} bytes are announced where header and manifest make {expected}",
                "nbytes",
            )

    def _takes_partial(self, run: str) -> bool:
        config = RunConfig.from_resolved(self._ledger.run(run).config)
        return config.cohort.partial

    def covered(self, plan: Plan) -> Manifest:
        """The manifest of the tensors that a plan covers."""
        if not plan.manifest:
            return Manifest(())
        key = (plan.manifest, plan.groups)
        known = self._covered
        if known is None or known[0] != key:
            known = self._covered = (key, self._store.manifest(plan.manifest).covering(plan.groups))
        return known[1]
