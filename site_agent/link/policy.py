"""Whether this site accepts a plan, and whether it lets a contribution out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from protos.contribution import Header
from protos.errors import PolicyRefused
from protos.plan import Plan
from site_agent.config import PolicySection
from site_agent.task_source import TaskSource

CONDENSED = (
    "examples condensed from this site's data, which may resemble single samples and carry no "
    "privacy guarantee; they stay here unless the site's own people allow it"
)


def condenses(plan: Plan) -> bool:
    """Whether a strategy says in the plan that it will send condensed examples.

    It spares a site the training. What decides is the merge rule in the header, when the
    contribution is to leave.
    """
    asked = plan.payload.values()
    return any(isinstance(own, Mapping) and bool(own.get("condensed")) for own in asked)


class Policy:
    """[policy] of site.toml, and the tasks that the site has.

    Args:
        site: Name of the site.
        section: The table.
        sources: Where each task's code is.
    """

    def __init__(
        self, site: str, section: PolicySection, sources: Mapping[str, TaskSource]
    ) -> None:
        self._site, self._section, self._sources = site, section, sources

    def apply(self, section: PolicySection) -> None:
        """Another policy counts from now on; plans that were accepted stay so."""
        self._section = section

    def check_plan(self, plan: Plan, now: datetime | None = None) -> None:
        """Accept a plan.

        Raises:
            PolicyRefused: This site does not; says why, and which key of site.toml decides.
        """
        section = self._section
        if plan.site != self._site:
            self._refuse(f"the plan is addressed to {plan.site}", "site")
        self._check_task(plan.task.name)
        if section.strategies != "all":
            for choice in plan.stack:
                if choice.name not in section.strategies:
                    self._refuse(f"strategy {choice.name} is not allowed", "strategies")
        if plan.kind == "init" and not section.init:
            self._refuse("it does not give first bases", "init")
        if plan.kind == "train":
            most = getattr(section, f"max_{plan.work.unit}")
            if most is not None and plan.work.amount > most:
                self._refuse(
                    f"{plan.work.amount:g} {plan.work.unit} of local work exceed {most:g}",
                    f"max_{plan.work.unit}",
                )
            if not section.condensed_data and condenses(plan):
                self._refuse(f"the plan asks for {CONDENSED}", "condensed_data")
        local = (now or datetime.now().astimezone()).time()
        if not section.open_at(local):
            self._refuse(f"plans are accepted at {section.hours} only", "hours")

    def _check_task(self, name: str) -> None:
        if name not in self._sources:
            have = ", ".join(sorted(self._sources)) or "none"
            self._refuse(f"it has no task {name} (it has: {have})", "tasks")
        if self._sources[name].file is None:
            self._refuse(f"the code of task {name} is not where site.toml says", "tasks")

    def check_size(self, nbytes: int, what: str) -> None:
        """Accept a transfer of that size.

        Raises:
            PolicyRefused: It is larger than this site allows.
        """
        most = self._section.max_bytes
        if most is not None and nbytes > most:
            self._refuse(f"{what} of {nbytes} bytes exceeds {most}", "max_bytes")

    def check_contribution(self, header: Header, nbytes: int) -> None:
        """Let a finished contribution out.

        Raises:
            PolicyRefused: One of its side payloads may not leave, or it is too large.
        """
        self.check_size(nbytes, "a contribution")
        if header.kind == "init":
            return  # allowed or not as a whole, by `init`
        for payload in header.payloads:
            if payload.merge == "condensed":
                if not self._section.condensed_data:
                    self._refuse(f"side payload {payload.name}: {CONDENSED}", "condensed_data")
            elif payload.merge not in self._section.side_payloads:
                self._refuse(
                    f'side payload {payload.name} ("{payload.merge}") may not leave',
                    "side_payloads",
                )

    def _refuse(self, what: str, key: str) -> None:
        key = key if key in ("site", "tasks") else f"policy.{key}"
        raise PolicyRefused(
            f"site {self._site}: {what} ({key} in its site.toml)", site=self._site, key=key
        )
