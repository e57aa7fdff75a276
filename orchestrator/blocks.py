"""Encoded contributions: decoded once on arrival, in the compute process, to see what is in them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.compute.errors import FunctionFailed
from orchestrator.ledger import PlanRow
from orchestrator.rounds.engine import Engine
from protos.contribution import Header
from protos.errors import ContributionRefused
from protos.plan import Plan


class Blocks:
    """Checks the blocks of a wire codec; the daemon itself holds neither tensors nor codecs.

    Args:
        engine: The daemon's parts.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self, row: PlanRow, header: Header, header_file: Path, payload: Path
    ) -> tuple[float | None, str]:
        """The norm over parameters, and the first tensor that holds NaN or infinity.

        Raises:
            ContributionRefused: A block can't be decoded.
        """
        plan = Plan.decode(row.plan)
        with self._engine.scratch("check") as folder:
            try:
                value = self._engine.ask(
                    "check_blocks",
                    {
                        "manifest": str(self._engine.manifest_file(folder, plan.manifest)),
                        "covered": None if plan.groups is None else list(plan.groups),
                        "stack": [c.model_dump(mode="json") for c in plan.stack],
                        "header": str(header_file),
                        "payload": str(payload),
                        "site": header.site,
                    },
                )
            except FunctionFailed as error:  # the codec did: the same bytes will never do better
                raise ContributionRefused(
                    f"site {header.site}: its blocks can't be decoded: {error.message}",
                    site=header.site,
                ) from error
        return value["norm"], value["bad"]
