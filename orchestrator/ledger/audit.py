"""A run's chain, replayed: does every entry follow from those before it, and who signed what?

`Audit` is given the entries of a transcript one after the other and knows afterwards what they tell
(`attempts`, `accepted`, `history`) and what is wrong with them (`problems`). It opens no file and asks
no database: whoever has one compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.ledger.chain import entry_digest
from orchestrator.ledger.notary import Notary, Wrong, from_hex
from orchestrator.ledger.rows import Entry
from orchestrator.ledger.told import CLOSED_IN, Accepted, Attempt
from orchestrator.views import Finding
from protos.contribution import Header
from protos.digest import canonical, digest
from protos.errors import FarflungError
from protos.plan import Plan, round_of

UNDER_WAY = ("planned", "closed", "held")
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, OSError)

FIELDS = {"number", "kind", "time", "document", "previous", "digest"}
EVIDENCE = {
    "created": {"config"},
    "planned": {"plans"},
    "opened": {"plans"},
    "accepted": {"header", "signature"},
    "committed": {"summary", "signed"},
}


class Audit:
    """See the module.

    Args:
        run: Id of the run.
        notary: Knows whose signatures are whose.

    Attributes:
        notary: As given.
        problems: In the order in which they were met.
        attempts: By round and attempt.
        accepted: By digest of the contribution.
        history: The attempts that the run's model comes from, oldest first.
        number: Of the newest entry.
        digest: Of the newest entry.
    """

    def __init__(self, run: str, notary: Notary) -> None:
        self._run, self.notary = run, notary
        self.problems: list[Finding] = []
        self.attempts: dict[tuple[int, int], Attempt] = {}
        self.accepted: dict[str, Accepted] = {}
        self.history: list[Attempt] = []
        self.number, self.digest = 0, ""
        self._config, self._first, self._rounds = "", "", 0
        self._cohort: dict[str, Any] = {}  # of the run's configuration
        self._reopened: set[tuple[int, int, str]] = set()
        self._lacking: dict[tuple[int, int, str], tuple[int, int]] = {}

    def entry(self, line: dict[str, Any]) -> None:
        """Look at the next entry, with its evidence."""
        number, kind, round, site = self.number + 1, "entry", None, ""
        try:
            number, kind, document = line["number"], line["kind"], line["document"]
            if set(line) - FIELDS - EVIDENCE.get(kind, set()) or not set(line) >= FIELDS:
                raise Wrong("it has fields that such an entry has not, or lacks one")
            round = _round_of(document)
            made = self._linked(line, round)
            step = getattr(self, f"_{kind}", None) if kind in STEPS else None
            if step is None:
                raise Wrong("no such entry is known; a newer version may know it")
            step(made, document, line)
            return
        except Wrong as wrong:
            text, site = str(wrong), wrong.site
        except FarflungError as error:
            text = error.message
        except MALFORMED:
            text = "it is not of the form that such an entry has"
        self.say(text, number, kind, round, site)

    def done(self) -> None:
        """There are no more entries."""
        for key, (number, count) in self._lacking.items():
            if key not in self._reopened:
                text = f"{count} of the plans that it names are missing"
                self.say(text, number, "opened", key[0])

    def say(
        self,
        text: str,
        number: int | None,
        kind: str = "",
        round: int | None = None,
        site: str = "",
    ) -> None:
        """Something is wrong with an entry."""
        where = [
            kind,
            f"round {round}" if round is not None else "",
            f"site {site}" if site else "",
        ]
        about = ", ".join(part for part in where if part)
        self.problems.append(
            Finding(
                text=f"entry {number}" + (f" ({about}): " if about else ": ") + text,
                entry=number if isinstance(number, int) else None,
                round=round,
                site=site,
            )
        )

    # -- the chain --------------------------------------------------------------------------------

    def _linked(self, line: dict[str, Any], round: int | None) -> Entry:
        """The entry, after a look at its place in the chain."""
        number, kind = line["number"], line["kind"]
        text = canonical(line["document"]).decode()
        made = Entry(self._run, number, kind, line["time"], text, line["previous"], line["digest"])
        if not isinstance(number, int) or isinstance(number, bool):
            raise Wrong("it has no number")
        expected = self.number + 1
        if number > expected:
            lost = f"entry {expected} is" if number == expected + 1 else (
                f"entries {expected} to {number - 1} are"
            )  # fmt: skip
            self.say(f"before it {lost} missing", number, kind, round)
        elif number < expected:
            self.say(f"it stands after entry {self.number}: doubled, or out of order", number, kind)
        elif made.previous != self.digest:
            self.say("it does not follow from the entry before it", number, kind, round)
        right = entry_digest(self._run, number, kind, made.time, text, made.previous)
        if made.digest != right:
            self.say("it is not what was written", number, kind, round)
        self.number, self.digest = max(number, self.number), made.digest
        return made

    # -- what entries tell ------------------------------------------------------------------------

    def _created(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        if entry.number != 1:
            raise Wrong("a run is created once, by its first entry")
        self._config, self._rounds = document["config"], document["rounds"]
        self._first = document.get("model", "")
        self._cohort = line["config"].get("cohort", {})
        if digest(canonical(line["config"])) != self._config:
            raise Wrong("the configuration beside it is another one")

    def _extended(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        if document["rounds"] <= self._rounds:
            raise Wrong(f"the run had {self._rounds} rounds already")
        self._rounds = document["rounds"]

    def _planned(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        number, attempt = document["round"], document["attempt"]
        before = [a for a in self.attempts.values() if a.state in UNDER_WAY]
        if (number, attempt) in self.attempts:
            raise Wrong(f"attempt {attempt} was planned before")
        self.attempts[number, attempt] = one = Attempt(
            number, attempt, document["base"], document["draft"]
        )
        self._give_out(entry, one, ("train", "init"), document, line)
        if before:
            raise Wrong(f"attempt {before[0].attempt} of round {before[0].round} is under way")
        newest = self.history[-1] if self.history else None
        if newest is not None and number <= newest.round:
            raise Wrong(f"round {newest.round} is committed, and what is committed stays")
        base = newest.model if newest is not None else self._first
        if number > 0 and one.base != base:
            raise Wrong(f"it starts from {one.base[:12]}, the last model is {base[:12] or 'none'}")

    def _opened(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        one, kind = self._attempt(document, ("closed",)), document["kind"]
        if kind in one.opened:
            self._reopened.add((one.round, one.attempt, kind))
        one.opened.add(kind)
        self._give_out(entry, one, (kind,), document, line)

    def _give_out(
        self,
        entry: Entry,
        one: Attempt,
        kinds: Sequence[str],
        document: dict[str, Any],
        line: dict[str, Any],
    ) -> None:
        """Take up the plans of an exchange."""
        names: list[str] = document["plans"]
        found = []
        for text in line["plans"]:
            plan = Plan.decode(text.encode())
            found.append(digest(text.encode()))
            if found[-1] not in names:
                raise Wrong("this plan is not one that it names", plan.site)
            if plan.id != f"{self._run}/{one.round}/{one.attempt}/{plan.kind}":
                raise Wrong(f"its plan is for {plan.id}", plan.site)
            if plan.kind not in kinds or (plan.kind != "init" and not plan.base):
                raise Wrong(f"its plan is to {plan.kind}", plan.site)
            one.plans.setdefault((plan.kind, plan.site), {})[plan.work_digest] = plan
            if plan.kind == "train" and not {*plan.accepts} <= {plan.base, *self._older_bases()}:
                raise Wrong(
                    "its plan takes work from a base that the run does not allow", plan.site
                )
        if found != [name for name in names if name in found] or len(set(names)) != len(names):
            raise Wrong("its plans stand in another order")
        if len(found) != len(names):
            if entry.kind == "planned":
                raise Wrong(f"{len(names) - len(found)} of the plans that it names are missing")
            # Those of an exchange that was opened again may have been replaced.
            key = (one.round, one.attempt, kinds[0])
            self._lacking.setdefault(key, (entry.number, len(names) - len(found)))

    def _accepted(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        name = document["contribution"]
        carried = line["header"].encode()
        header = Header.decode(carried)
        site = header.site
        if digest(carried) != name:
            raise Wrong("the header beside it is another contribution's", site)
        if name in self.accepted:
            raise Wrong("this contribution was counted before", site)
        if header.partial and not self._cohort.get("partial", False):
            raise Wrong("it is partial work, which the run does not take", site)
        one, kind = self._plan_of(document["plan"])
        older = round_of(header.plan_id) < one.round
        if older and any(
            (a.site, a.plan_id) == (site, header.plan_id) for a in self.accepted.values()
        ):
            raise Wrong("another contribution to the same plan was counted", site)
        self.accepted[name] = Accepted(
            site, kind, one.round, header.work_digest, header.index, header.plan_id, header.base
        )
        signature = from_hex(line["signature"])
        self.notary.site(header, carried, signature, document, entry.time)
        self._count(one, kind, name)

    def _carried(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        name = document["contribution"]
        if name not in self.accepted:
            raise Wrong("the contribution was never accepted")
        one, kind = self._plan_of(document["plan"])
        before = self.accepted[name]
        if (before.round, before.kind) != (one.round, kind):
            raise Wrong(f"it was accepted for round {before.round}, {before.kind}", before.site)
        self._count(one, kind, name)

    def _count(self, one: Attempt, kind: str, name: str) -> None:
        """Let a contribution count for the plan that asked its site for that work, or takes it."""
        accepted = self.accepted[name]
        site, work, base = accepted.site, accepted.work_digest, accepted.base
        given = one.plans.get((kind, site), {})
        if round_of(accepted.plan_id) < one.round:
            work, base = self._of_earlier(accepted, given)
        if one.state != ("planned" if kind in CLOSED_IN else "closed"):
            raise Wrong(f"it was counted when the round was {one.state}", site)
        # Of an exchange that was opened again, the plans that were replaced are not here any more.
        exchange = (one.round, one.attempt, kind)
        if work not in given and exchange not in self._reopened and exchange not in self._lacking:
            raise Wrong("the site was not asked for this work", site)
        if work in given and kind != "init" and base != given[work].base:
            raise Wrong(f"it comes from the base {base[:12]}, which its plan does not accept", site)
        if (kind, site, work) in one.counted and exchange not in self._reopened:
            raise Wrong("another contribution counts for the same plan", site)
        one.counted[kind, site, work] = name

    def _of_earlier(self, accepted: Accepted, given: dict[str, Plan]) -> tuple[str, str]:
        """Work and base of the plan for which work for an earlier round counts."""
        site = accepted.site
        asked, kind = self._plan_of(accepted.plan_id)
        work = asked.plans.get((kind, site), {}).get(accepted.work_digest)
        if kind != "train" or work is None or work.base != accepted.base:
            raise Wrong(f"the site was not asked for this work in round {asked.round}", site)
        for name, plan in given.items():
            if plan.takes(accepted.base):
                return name, plan.base
        base = accepted.base[:12]
        raise Wrong(
            f"it is work for round {asked.round}, from a base {base} that is not taken", site
        )

    def _older_bases(self) -> list[str]:
        """From which a new round may take work for earlier ones."""
        count = self._cohort.get("stale", 0)
        return [one.base for one in self.history[-count:] if one.round > 0] if count else []

    def _closed(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        one = self._attempt(document, ("planned",))
        one.state, one.closed_set = "closed", tuple(document["closed_set"])
        acknowledged = one.closes_in()
        for name in acknowledged:
            if name not in one.closed_set:
                raise Wrong(
                    f"contribution {name[:12]} was acknowledged as counted and is not closed in",
                    self.accepted[name].site,
                )
        for name in one.closed_set:
            if name not in acknowledged:
                known = self.accepted.get(name)
                raise Wrong(
                    f"contribution {name[:12]} is closed in and was never acknowledged",
                    known.site if known else "",
                )
        if list(one.closed_set) != acknowledged:
            raise Wrong("the closed set is not in the order of sites, or holds one twice")

    def _held(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        one = self._attempt(document, ("closed",))
        one.state, one.model, one.outer_state = "held", document["model"], document["outer_state"]
        one.memos, one.summary = document["memos"], document["summary"]

    def _abandoned(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        self._attempt(document, UNDER_WAY).state = "abandoned"

    def _committed(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        one = self._attempt(document, ("closed", "held"))
        one.state, one.model, one.outer_state = (
            "committed",
            document["model"],
            document["outer_state"],
        )
        one.memos, one.summary = document["memos"], document["summary"]
        self.history.append(one)
        if digest(line["summary"].encode()) != one.summary:
            raise Wrong("the summary beside it is another one")
        if tuple(document["closed_set"]) != one.closed_set:
            raise Wrong("it commits another closed set than was closed")
        if document.get("base", one.base) != one.base:
            raise Wrong("it names another base than was planned")
        if document.get("config", self._config) != self._config:
            raise Wrong("it names another configuration than the run's")
        if "signed" not in line:
            raise Wrong("its model is not signed by the orchestrator")
        self.notary.committed(entry, line["signed"])

    def _rolled_back(self, entry: Entry, document: dict[str, Any], line: dict[str, Any]) -> None:
        if any(one.state in UNDER_WAY for one in self.attempts.values()):
            raise Wrong("an attempt was under way")
        target = next((one for one in self.history if one.round == document["round"]), None)
        if target is None:
            raise Wrong("it goes back to a round that is not committed")
        later = [one for one in self.history if one.round > target.round]
        rejected = [
            one
            for one in self.attempts.values()
            if one.state == "abandoned" and one.model and one.round > target.round
        ]
        for one in (*later, *rejected):
            one.state = "superseded"
        self.history = [one for one in self.history if one.round <= target.round]
        taken = sorted([one.round, one.attempt] for one in (*later, *rejected))
        if document["superseded"] != taken:
            raise Wrong("the rounds that it takes back are not those that came after")
        if (document["model"], document["outer_state"]) != (target.model, target.outer_state):
            raise Wrong("its model is not that round's")

    # -- looking things up ------------------------------------------------------------------------

    def _attempt(self, document: dict[str, Any], states: Sequence[str]) -> Attempt:
        key = (document["round"], document["attempt"])
        if key not in self.attempts:
            raise Wrong(f"attempt {key[1]} was never planned")
        one = self.attempts[key]
        if one.state not in states:
            raise Wrong(f"the attempt was {one.state}")
        return one

    def _plan_of(self, plan_id: str) -> tuple[Attempt, str]:
        run, number, attempt, kind = plan_id.split("/")
        key = (int(number), int(attempt))
        if run != self._run or key not in self.attempts:
            raise Wrong(f"there is no plan {plan_id}")
        return self.attempts[key], kind


STEPS = (
    "created", "extended", "planned", "opened", "accepted", "carried", "closed", "held",
    "committed", "abandoned", "rolled_back",
)  # fmt: skip


def _round_of(document: dict[str, Any]) -> int | None:
    """The round that an entry is about."""
    if "plan" in document:
        return int(document["plan"].split("/")[1])
    found = document.get("round")
    return found if isinstance(found, int) else None
