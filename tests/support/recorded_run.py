"""A run that never was, as views: what the page is drawn from where no run is at hand.

Seeded and deterministic; shaped like a run of co-learning with self-distillation, ensemble
distillation and federated temperature. Round 4 refused one site, round 6 needed a second
attempt, and the ensemble distillation of round 7 ran out of time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache

from orchestrator.views import (
    Daemon,
    Plugin,
    Reliability,
    Round,
    RoundState,
    Run,
    RunState,
    Site,
    SitePhase,
    SiteWork,
    WorkState,
)

NAMES = ("north", "south", "east")
STRATEGIES = (
    "co_learning", "self_distillation", "feddf", "student", "soft_tree", "fyi", "temperature",
    "conformal",
)  # fmt: skip
EPSILON = 0.05
ROUND_S = 42.0
NAN = (
    "east sent NaN in conv2.weight (1 of 18 496 values), so its contribution of round 4 was not "
    "counted; look at its log with `farflung-site logs --round 4` and lower local.lr if it recurs"
)
TIMED_OUT = "ran longer than its 30 s; raise `seconds` of feddf, or its proxy data is too large"


def digest(*parts: object) -> str:
    """Looks like a digest, and is the same for the same parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).hexdigest()


class Recording:
    """Views of one run.

    Args:
        rounds: Planned rounds.
        committed: Rounds that are done.
        sites: Number of sites.
        now: Seconds since the epoch at which the recording ends.
        live: Whether a round is under way after the committed ones.
        accidents: Whether the run has its accidents (the refused site, the second attempt, …).
    """

    def __init__(
        self,
        rounds: int = 12,
        committed: int = 9,
        sites: int = 3,
        *,
        now: float = 1_790_000_000.0,
        live: bool = True,
        accidents: bool = True,
        seed: int = 11,
    ) -> None:
        self.name, self.id = "fashion", digest("run", seed)[:12]
        self.planned, self.now, self.live, self.accidents = rounds, now, live, accidents
        self.seed = seed
        self.names = NAMES if sites == 3 else tuple(f"site-{k:02d}" for k in range(1, sites + 1))
        self.started = now - ROUND_S * committed - (23.0 if live else 0.0)
        self.epochs = self._epochs(committed + 1)
        self.done = [self.round(n) for n in range(1, committed + 1)]

    # ------------------------------------------------------------------------- one number each

    def noise(self, *parts: object) -> float:
        """In [-1, 1], by name."""
        drawn = hashlib.blake2b(repr((self.seed, *parts)).encode(), digest_size=4).digest()
        return int.from_bytes(drawn, "big") / 2**31 - 1

    def change(self, n: int) -> float:
        """||delta|| / ||base|| of a round."""
        return 0.34 * math.exp(-n / 3.1) + 0.028 + 0.006 * self.noise("change", n)

    def _epochs(self, rounds: int) -> list[float]:
        epochs = [5.0]
        for n in range(1, rounds):
            epochs.append(min(20.0, epochs[-1] * (2 if self.change(n) <= EPSILON else 1)))
        return epochs

    def accuracy(self, n: int) -> float:
        """Of the committed model on pooled validation data."""
        lost = 0.008 if self.accidents and n == 4 else 0.0
        slow = 2.6 * self.planned / 12
        return 0.886 - 0.42 * math.exp(-n / slow) - lost + 0.003 * self.noise("accuracy", n)

    def scores(self, n: int) -> dict[str, float]:
        """Pooled scores of a round."""
        accuracy = self.accuracy(n)
        raw = 0.034 + 0.032 * (1 - math.exp(-n / 4)) + 0.003 * self.noise("ece", n)
        nll = 0.30 + 1.1 * (0.9 - accuracy) / 0.45 + 0.006 * self.noise("nll", n)
        found = {"val.accuracy": accuracy, "val.nll": nll, "val.ece": raw}
        test = {"accuracy": accuracy - 0.006, "nll": nll + 0.014, "ece": raw + 0.002}
        test |= {"aece": raw + 0.001, "classwise_ece": raw / 4}
        test |= {
            "coverage": 0.9 + 0.006 * self.noise("coverage", n),
            "set_size": 3.2 - 2 * accuracy,
        }
        found |= {f"test.{key}": value for key, value in test.items()}
        found["test_calibrated.accuracy"] = test["accuracy"]
        found["test_calibrated.nll"] = test["nll"] * 0.94
        found["test_calibrated.ece"] = 0.011 + 0.002 * self.noise("ece2", n)
        found["test_calibrated.aece"] = 0.012 + 0.002 * self.noise("aece2", n)
        found["test_calibrated.classwise_ece"] = 0.004
        return {key: round(value, 5) for key, value in found.items()}

    # ---------------------------------------------------------------------------------- a round

    def round(self, n: int) -> Round:
        """A committed round."""
        start = self.started + ROUND_S * (n - 1)
        names = self.names
        refused = self.refused(n)
        work = tuple(self.work(n, name, start, refused=name == refused) for name in names)
        closed = max(p.end or 0.0 for w in work for p in w.phases)
        seconds: dict[str, float] = {}
        for w in work:
            for p in w.phases:
                if p.end is not None:
                    mean = (p.end - p.start) / len(names)
                    seconds[p.state] = seconds.get(p.state, 0.0) + mean
        seconds |= {"reducing": 1.1, "refining": 3.4, "assessing": 2.2, "committing": 0.2}
        return self._round(
            n,
            "committed",
            start,
            work,
            assessed=True,
            closed=closed,
            committed=closed + 6.9,
            scores=self.scores(n),
            seconds={key: round(value, 3) for key, value in seconds.items()},
            relative_change=round(self.change(n), 5),
            model=digest("model", n),
            plugins=self.plugins(n),
            calibration={
                "temperature": {"temperature": round(1.2 + 0.04 * n, 3)},
                "conformal": {"alpha": 0.1, "cell": 600, "quantile": 0.83, "score": "lac"},
            },
            reliability=self.reliability(n),
            missing={refused: NAN} if refused else {},
        )

    def _round(
        self, n: int, state: RoundState, start: float, work: tuple[SiteWork, ...], **more: object
    ) -> Round:
        second = self.accidents and n == 6
        base: dict[str, object] = {
            "run": self.id,
            "round": n,
            "attempt": 2 if second else 1,
            "state": state,
            "started": start,
            "deadline": start + 3600,
            "quorum": max(1, len(self.names) - 1),
            "base": digest("model", n - 1),
            "work": {"epochs": self.epochs[n - 1]},
            "learning_rate": (0.1, 0.025),
            "wire_bytes": sum(w.received_bytes + w.sent_bytes for w in work),
            "sites": work,
            "reason": "attempt 1 was abandoned: one site of a quorum of two at the deadline"
            if second
            else "",
        }
        return Round.model_validate(base | more)

    def work(self, n: int, site: str, start: float, *, refused: bool = False) -> SiteWork:
        """What one site did in a round that is done."""
        pace = 1 + 0.22 * self.noise("pace", site) + 0.05 * self.noise("pace", site, n)
        stretch = (self.epochs[n - 1] / 5) ** 0.3
        lengths: list[tuple[WorkState, float]] = [
            ("asked", 0.2),
            ("waiting", 0.6 + 0.4 * abs(self.noise("wait", site, n))),
            ("preparing", 1.2 if n > 1 else 4.5),
            ("fetching", 2.1 * pace),
            ("training", 14.0 * pace * stretch),
            ("encoding", 0.9),
            ("sending", 2.6 * pace),
        ]
        phases, at = [], start
        for state, seconds in lengths:
            phases.append(SitePhase(state=state, start=at, end=at + seconds))
            at += seconds
        phases.append(SitePhase(state="refused" if refused else "counted", start=at))
        drift = 0.012 * self.noise("skew", site) + 0.006 * self.noise("score", site, n)
        scores = {
            key: round(
                value
                - (0.016 - drift if key.endswith(("accuracy", "coverage")) else -0.05 + drift),
                5,
            )
            for key, value in self.scores(n).items()
        }
        examples = self.examples(site)
        loss = 0.22 + 0.9 * math.exp(-n / 3) + 0.05 * self.noise("loss", site)
        return SiteWork(
            site=site,
            state="refused" if refused else "counted",
            error="ContributionRefused" if refused else "",
            reason=NAN if refused else "",
            phases=tuple(phases),
            done=self.epochs[n - 1],
            planned=self.epochs[n - 1],
            unit="epochs",
            loss=None if refused else round(loss + 0.02 * self.noise("loss", site, n), 5),
            learning_rate=0.025,
            examples=examples,
            examples_per_s=round(examples * self.epochs[n - 1] / lengths[4][1], 1),
            received_bytes=848_000,
            sent_bytes=851_000,
            norm=None if refused else round(9.4 * self.change(n) * pace, 4),
            weight=None if refused else round(examples / self.examples_counted(n), 4),
            scores={} if refused else scores,
        )

    def examples(self, site: str) -> int:
        """Examples that a site trains on."""
        return int(4000 * (1 + 0.4 * self.noise("examples", site)))

    def refused(self, n: int) -> str:
        """The site that was refused in a round, or nothing."""
        return "east" if self.accidents and n == 4 and "east" in self.names else ""

    @cache  # noqa: B019 - a recording lives as long as its test
    def examples_counted(self, n: int) -> int:
        """Examples of the sites that count in a round."""
        return sum(self.examples(name) for name in self.names if name != self.refused(n))

    def current(self) -> Round:
        """The round under way: every site in another phase."""
        n = len(self.done) + 1
        start = self.now - 23.0
        rows = []
        for k, name in enumerate(self.names):
            full = self.work(n, name, start)
            until = self.now - 3.0 * (k % 3)
            kept = [p for p in full.phases if p.start < until]
            last = kept[-1]
            share = (until - last.start) / ((last.end or until) - last.start)
            kept[-1] = last.model_copy(update={"end": None})
            training = last.state == "training"
            planned = self.epochs[n - 1]
            rows.append(
                full.model_copy(
                    update={
                        "state": last.state,
                        "phases": tuple(kept),
                        "done": round(planned * share, 2) if training else planned,
                        "eta_s": round(full.phases[4].end - until, 1)  # type: ignore[operator]
                        if training
                        else None,
                        "sent_bytes": 0,
                        "norm": None,
                        "weight": None,
                        "scores": {},
                    }
                )
            )
        return self._round(n, "planned", start, tuple(rows))

    def plugins(self, n: int) -> tuple[Plugin, ...]:
        """What the strategies report of a round."""
        kl = 0.4 * math.exp(-n / 5)
        late = self.accidents and n == 7
        reports: dict[str, dict[str, float]] = {
            "co_learning": {"epochs": self.epochs[n - 1], "relative_change": self.change(n)},
            "self_distillation": {"kl": kl + 0.03, "agreement": 0.97 - kl / 2},
            "feddf": {
                "kl_before": kl + 0.2,
                "kl_after": kl + 0.06,
                "steps": 120,
                **{f"teacher.{site}": weight for site, weight in self.teachers(n).items()},
            },
            "student": {"share": 0.21, "agreement": 0.97 - kl / 3, "kl": kl / 2},
            "soft_tree": {"fidelity": 0.94 - kl / 4, "accuracy": self.accuracy(n) - 0.04},
            "fyi": {"examples": 30.0},
            "temperature": {"temperature": 1.2 + 0.04 * n, "iterations": 7},
        }
        return tuple(
            Plugin(
                name=name,
                state="skipped" if late and name == "feddf" else "done",
                reason=TIMED_OUT if late and name == "feddf" else "",
                seconds={"feddf": 3.1, "student": 4.2, "temperature": 0.3}.get(name),
                cpu_seconds={"feddf": 5.2, "student": 6.0}.get(name),
                files=self.files(name, n),
                report={}
                if late and name == "feddf"
                else {key: round(value, 4) for key, value in report.items()},
            )
            for name, report in reports.items()
        )

    def teachers(self, n: int) -> dict[str, float]:
        """Weights of the sites' models in the ensemble."""
        raw = {site: 1 + 0.4 * self.noise("teacher", site, n // 3) for site in self.names}
        return {site: value / sum(raw.values()) for site, value in raw.items()}

    def files(self, strategy: str, n: int) -> dict[str, str]:
        """Digests of what a strategy made in a round."""
        names = {"soft_tree": ["tree.json"], "fyi": ["condensed.json"] if n == 1 else []}
        return {name: digest(strategy, name, n) for name in names.get(strategy, [])}

    def kept(self, strategy: str, n: int) -> dict[str, bytes]:
        """What a strategy keeps beside the model of a round."""
        made = {"soft_tree": self._tree, "fyi": self._condensed}
        return made[strategy](n) if strategy in made else {}

    def _tree(self, n: int) -> dict[str, bytes]:
        depth, side = 5, 8
        inner = 2**depth - 1
        reached = [1.0] + [0.0] * (2 * inner)
        for k in range(1, 2 * inner + 1):
            right = 0.5 + 0.35 * self.noise("right", (k - 1) // 2)
            reached[k] = reached[(k - 1) // 2] * (1 - right if k % 2 else right)

        def filter_of(k: int) -> list[int]:
            x, y = (3.5 + 2.5 * self.noise(axis, k) for axis in "xy")
            turn = 3 * self.noise("turn", k)
            return [
                round(100 * math.cos(turn + (i - x) * 0.9) * math.exp(-((j - y) ** 2) / 6))
                for j in range(side)
                for i in range(side)
            ]

        def leaf(k: int) -> list[int]:
            best = int(abs(self.noise("leaf", k)) * 10) % 10
            sure = round(75 + 20 * self.noise("sure", k))
            return [sure if c == best else round((100 - sure) / 9) for c in range(10)]

        tree = {
            "depth": depth,
            "shape": [side, side],
            "inner": [
                {"filter": filter_of(k), "bias": 0.0, "reached": reached[k]} for k in range(inner)
            ],
            "leaves": [{"p": leaf(k), "reached": reached[inner + k]} for k in range(inner + 1)],
            "report": {"fidelity": 0.9312, "accuracy": 0.8444},
        }
        return {"tree.json": json.dumps(tree).encode(), "tree.safetensors": b"weights"}

    def _condensed(self, n: int) -> dict[str, bytes]:
        side, classes = 12, 10

        def pixels(site: str, c: int) -> list[int]:
            x, y = (5.5 + 2 * self.noise("blob", axis, c) for axis in "xy")
            size = 6 + 4 * abs(self.noise("size", site, c))
            near = [
                math.exp(-((i - x) ** 2 + (j - y) ** 2) / size)
                for j in range(side)
                for i in range(side)
            ]
            return [
                max(0, min(255, round(220 * v + 30 * self.noise(site, c, k))))
                for k, v in enumerate(near)
            ]

        names = sorted(self.names)
        facts = {
            "round": n,
            "sites": {site: {str(c): 1 for c in range(classes)} for site in names},
            "shape": [1, side, side],
            "pixels": [pixels(site, c) for site in names for c in range(classes)],
            "classes": [c for _ in names for c in range(classes)],
        }
        return {"condensed.json": json.dumps(facts).encode()}

    def reliability(self, n: int) -> dict[str, Reliability]:
        """Ten bins, before and after the temperature."""
        found = {}
        for name, gap in (
            ("test", 0.03 + 0.09 * (1 - math.exp(-n / 4))),
            ("test_calibrated", 0.015),
        ):
            centres = [0.05 + 0.1 * k for k in range(10)]
            count = [0.0, 0.0] + [round(900 * math.exp((c - 1) * 4.5)) for c in centres[2:]]
            found[name] = Reliability(
                count=tuple(count),
                confidence=tuple(
                    None if not n_ else c for n_, c in zip(count, centres, strict=True)
                ),
                accuracy=tuple(
                    None
                    if not n_
                    else round(c - gap * 4 * c * (1.05 - c) + 0.02 * self.noise(name, n, c), 4)
                    for n_, c in zip(count, centres, strict=True)
                ),
            )
        return found

    # ------------------------------------------------------------------------------ the outside

    def rounds(self) -> list[Round]:
        """All of them, the one under way last."""
        return [*self.done, *([self.current()] if self.live else [])]

    def run(self) -> Run:
        """The run."""
        best = max(self.done, key=lambda r: r.scores["val.accuracy"]) if self.done else None
        scores = self.done[-1].scores if self.done else {}
        state: RunState = "running" if self.live else "finished"
        left = (self.planned - len(self.done)) * ROUND_S - 23.0 if self.live else None
        sent = sum(r.wire_bytes for r in self.done)
        return Run(
            id=self.id,
            name=self.name,
            state=state,
            headline=self.headline(scores, left, sent),
            diagnosis=self.diagnosis(),
            rounds=self.planned,
            committed=len(self.done),
            current=len(self.done) + 1 if self.live else None,
            best=best.round if best else None,
            created=self.started - 4,
            started=self.started,
            ended=None if self.live else self.now,
            eta_s=left,
            strategies=STRATEGIES,
            sites=self.names,
            epsilon=EPSILON,
            scores=scores,
            references={"centralised": 0.891, "mean isolated site": 0.823},
            wire_bytes=sent,
            config_digest=digest("config"),
            model=digest("model", len(self.done)),
        )

    def headline(self, scores: dict[str, float], left: float | None, sent: int) -> str:
        """The status line in words."""
        n = len(self.names)
        words = [
            f"Round {len(self.done) + 1} of {self.planned} · learning"
            if self.live
            else f"Finished after {len(self.done)} rounds"
        ]
        if scores:
            words.append(
                f"{scores['test.accuracy']:.1%} (centralised reference 89.1 %)".replace(
                    "%", " %", 1
                )
            )
            words.append(f"ECE {100 * scores['test_calibrated.ece']:.1f} %")
        words.append(f"{n} of {n} sites")
        if left is not None:
            words.append(f"{max(1, round(left / 60))} min left")
        words.append(f"{sent / 1e9:.1f} GB sent" if sent > 1e9 else f"{sent / 1e6:.1f} MB sent")
        return " · ".join(words)

    def diagnosis(self) -> str:
        """The newest finding."""
        if self.accidents and len(self.done) >= 7:
            return (
                "feddf was skipped in round 7: it ran longer than its 30 s. "
                "Later rounds were not affected."
            )
        return ""

    def sites(self) -> Sequence[Site]:
        """Every site of the federation."""
        return [
            Site(
                name=name,
                state="attached",
                since=self.started - 60,
                certificate_expires=self.now + 86_400 * 89,
                version="0.1.0",
                device="cpu (2 cores)" if k % 2 else "cuda (1 × 16 GB)",
                tasks={"fashion_mnist": digest("task")},
                packages={"torch": "2.13.0", "python": "3.11.2"},
                invited=True,
            )
            for k, name in enumerate(self.names)
        ]

    def status(self) -> Daemon:
        """The daemon."""
        return Daemon(
            federation="demo",
            version="0.1.0",
            address="127.0.0.1:7443",
            dashboard="",
            home="~/.farflung",
            compute="ready",
            started=self.started - 120,
            sites=len(self.names),
            attached=len(self.names),
            queued=0,
            running=self.id if self.live else None,
        )
