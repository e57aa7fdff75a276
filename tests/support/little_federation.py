"""A federation in one process, small enough to read: what a stack means, hook by hook.

No files, no network, no processes: site and orchestrator are functions. It is the oracle of the
battery, not a way to run anything.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from protos.manifest import Manifest, Tile
from protos.plan import OptimizerChoice, Plan, Schedule, StrategyChoice, TaskChoice, Work
from strategies import scores
from strategies.context import (
    Calibration,
    Cohort,
    Draft,
    Memo,
    Moment,
    Refinement,
    RoundSummary,
    SidePayload,
    Step,
    Update,
    seeded,
)
from strategies.schedule import learning_rate
from strategies.stack import Stack, State
from strategies.task import Task, seed_everything

CLASSES, FEATURES, BATCH = 3, 6, 8


def samples(seed: int, n: int, skew: int = 0) -> TensorDataset:
    """Three overlapping clouds in six dimensions, of which some classes are rare."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.ones(CLASSES)
    p[skew % CLASSES] = 3.0
    targets = torch.multinomial(p, n, replacement=True, generator=generator)
    centres = 2 * torch.eye(FEATURES)[:CLASSES]
    return TensorDataset(centres[targets] + torch.randn(n, FEATURES, generator=generator), targets)


class LittleTask(Task):
    """Each site has its own cloud; the model has parameters, statistics and a counter."""

    embedding = "1"

    def __init__(self, site: int = 0) -> None:
        super().__init__()
        self.site = site

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def teacher(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 12), nn.BatchNorm1d(12))

    def student(self) -> nn.Module:
        return nn.Linear(FEATURES, CLASSES)

    def train_data(self) -> Dataset[Any]:
        return samples(100 + self.site, 16 + 8 * self.site, self.site)

    def val_data(self) -> Dataset[Any]:
        return samples(200 + self.site, 20, self.site)

    def proxy_data(self) -> Dataset[Any]:
        return TensorDataset(samples(300, 24).tensors[0])


class LittleFederation:
    """Three sites and an orchestrator.

    Attributes:
        model: All tensors of the shared model, by name.
        memos: Of the strategies.
        outer: Outer state of each tile.
        state: Site state of the strategies, by site.
        placed: Site-placed tensors, by site.
        summary: What the next plan may know.
        calibrations: Maps of the last round.
        contributions: What the sites sent in the last round, decoded, by site.
        payloads: Their side payloads, unmerged.
        files: What strategies keep beside the model.
    """

    def __init__(self, choices: Sequence[StrategyChoice], seed: int = 0, rounds: int = 4) -> None:
        self.stack = Stack(choices)
        self.seed, self.rounds = seed, rounds
        self.tasks = {f"site{k}": LittleTask(k) for k in range(3)}
        first = self.build()
        self.manifest: Manifest = self.stack.manifest(first, LittleTask())
        everything = {k: v.detach().clone() for k, v in first.state_dict().items()}
        self.placed = {
            site: {t.name: everything[t.name].clone() for t in self.manifest.of("site")}
            for site in self.tasks
        }
        kept = self.manifest.of("shared", "orchestrator", "frozen")
        self.model = {t.name: everything[t.name] for t in kept}
        self.shared = self.manifest.of("shared")
        self.outer = [self.stack.init_state(tile) for tile in self.shared.tiles]
        self.memos: dict[str, Memo] = {}
        self.state: dict[str, State] = {site: {} for site in self.tasks}
        self.summary = RoundSummary()
        self.calibrations: dict[str, Calibration] = {}
        self.contributions: dict[str, dict[str, Tensor]] = {}
        self.payloads: dict[str, dict[str, SidePayload]] = {}
        self.plans: list[Draft] = []
        self.files: dict[str, bytes] = {}
        self.reports: dict[str, dict[str, float]] = {}

    def build(self) -> nn.Module:
        seed_everything(self.seed, "build")
        return self.stack.build(LittleTask())

    def run(self, rounds: int) -> LittleFederation:
        for _ in range(rounds):
            self.round(self.summary.round + 1)
        return self

    def round(self, number: int) -> None:
        draft = Draft(
            round=number,
            rounds=self.rounds,
            last=self.summary,
            cohort=tuple(self.tasks),
            work=Work(epochs=1),
            schedule=Schedule(lr=0.05),
            optimizer=OptimizerChoice(),
            batch_size=BATCH,
        )
        draft, self.memos = self.stack.plan(draft, self.memos)
        self.plans.append(draft)
        stack = Stack(self.stack.active(number))
        updates = {site: self.contribute(stack, draft, site) for site in draft.cohort}
        self.contributions = {s: self.decode(stack, u) for s, u in updates.items()}
        self.payloads = {site: update.payloads for site, update in updates.items()}
        self.reduce(stack, number, updates)
        for strategy in stack.having("refine"):
            self.refine(strategy.name, number, {s: float(u.examples) for s, u in updates.items()})
        self.assess(stack)

    # -- a site ---------------------------------------------------------------------------------

    def contribute(self, stack: Stack, draft: Draft, site: str) -> Update:
        task = self.tasks[site]
        plan = Plan(
            run="little",
            round=draft.round,
            attempt=1,
            site=site,
            task=TaskChoice(name="little"),
            stack=stack.choices,
            payload=dict(draft.payload),
            work=draft.work,
            schedule=draft.schedule,
            optimizer=draft.optimizer,
            batch_size=draft.batch_size,
            seed=self.seed,
        )
        base = {t.name: self.model[t.name].clone() for t in self.shared}
        adopted, state = stack.adopt(dict(base), self.state[site], plan)
        model = self.build()
        frozen = {t.name: self.model[t.name] for t in self.manifest.of("frozen", "orchestrator")}
        model.load_state_dict({**frozen, **self.placed[site], **adopted})
        steps, state = self.fit(stack, plan, task, model, base, state)
        local = {k: v.detach().clone() for k, v in model.state_dict().items()}
        tensors = {
            t.name: base[t.name] - local[t.name] if t.kind == "parameter" else local[t.name]
            for t in self.shared
        }
        update = Update(
            tensors,
            examples=len(task.train_data()),  # type: ignore[arg-type]
            steps=steps,
            epochs=float(plan.work.epochs or 0),
            model=model.eval(),
            task=task,
            generator=seeded(self.seed, site, draft.round),
        )
        update, self.state[site] = stack.encode(update, plan, state)
        self.placed[site] = {t.name: local[t.name] for t in self.manifest.of("site")}
        return update

    def fit(
        self,
        stack: Stack,
        plan: Plan,
        task: Task,
        model: nn.Module,
        base: dict[str, Tensor],
        state: State,
    ) -> tuple[int, State]:
        inputs, targets = task.train_data().tensors  # type: ignore[attr-defined]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=plan.schedule.lr, momentum=plan.optimizer.momentum)

        def base_model() -> nn.Module:
            frozen = copy.deepcopy(model)
            frozen.load_state_dict(base, strict=False)
            return frozen

        order = seeded(self.seed, plan.site, plan.round, "order")
        epochs = int(plan.work.epochs or 1)
        batches = [
            (epoch, rows)
            for epoch in range(epochs)
            for rows in torch.randperm(len(inputs), generator=order).split(plan.batch_size)
            if len(rows) > 1
        ]
        scratch: dict[str, Any] = {}
        for index, (epoch, rows) in enumerate(batches):
            model.train()
            rate = learning_rate(plan.schedule, index / len(batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            step = Step(
                plan=plan,
                task=task,
                model=model,
                base=base,
                optimizer=optimizer,
                index=index,
                total=len(batches),
                epoch=epoch,
                learning_rate=rate,
                generator=seeded(self.seed, plan.site, plan.round, index),
                inputs=inputs[rows],
                targets=targets[rows],
                base_model_factory=base_model,
                scratch=scratch,
            )
            stack.batch(step)
            if stack.owner("local_step"):
                _, state = stack.local_step(step, state)
            else:
                step.outputs = task.forward(model, step.inputs)
                loss = stack.objective(stack.loss(step), step, state)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            state = stack.after_step(step, state)
        return len(batches), state

    # -- the orchestrator -----------------------------------------------------------------------

    def decode(self, stack: Stack, update: Update) -> dict[str, Tensor]:
        if update.blocks is None:
            return update.tensors
        out = {}
        tiles: dict[str, list[Tile]] = {}
        for tile in self.shared.tiles:
            tiles.setdefault(tile.spec.name, []).append(tile)
        for spec in self.shared:
            if spec.name in update.blocks:
                pairs = zip(update.blocks[spec.name], tiles[spec.name], strict=True)
                parts = [stack.decode(bytes(block), tile) for block, tile in pairs]
                out[spec.name] = torch.cat(parts).reshape(spec.shape)
            else:
                out[spec.name] = update.tensors[spec.name]
        return out

    def reduce(self, stack: Stack, number: int, updates: dict[str, Update]) -> None:
        sites = sorted(updates)
        parameters = [t.name for t in self.shared if t.kind == "parameter"]
        flat = torch.stack(
            [torch.cat([self.contributions[s][n].flatten() for n in parameters]) for s in sites]
        ).double()
        groups = tuple(sorted({t.group for t in self.shared}))
        names = sorted({n for u in updates.values() for n in u.payloads})
        cohort = Cohort(
            sites=tuple(sites),
            examples=torch.tensor([float(updates[s].examples) for s in sites]).double(),
            losses=torch.full((len(sites),), torch.nan).double(),
            staleness=torch.zeros(len(sites), dtype=torch.int64),
            payloads={
                n: torch.stack([updates[s].payloads[n].tensor for s in sites])
                for n in names
                if updates[sites[0]].payloads[n].merge == "keep per site"
            },
            groups=groups,
            norms=flat.norm(dim=1) if "norms" in stack.needs else None,
            gram=flat @ flat.T if "gram" in stack.needs else None,
        )
        weights = stack.weigh(cohort)
        moment = Moment(round=number, seed=self.seed, sites=len(sites))
        model = {name: tensor.clone() for name, tensor in self.model.items()}
        moved, size = 0.0, 0.0
        for position, tile in enumerate(self.shared.tiles):
            span, spec = slice(tile.start, tile.stop), tile.spec
            rows = torch.stack([self.contributions[s][spec.name].flatten()[span] for s in sites])
            base = self.model[spec.name].flatten()[span]
            own = weights[:, groups.index(spec.group)]
            if spec.kind == "counter":
                new = rows.max(dim=0).values
            elif spec.kind == "statistic":
                new = sum(
                    (w * r.double() for w, r in zip(own, rows, strict=True)), 0 * base.double()
                )
            else:
                delta = stack.reduce(rows, own, tile).to(torch.float32)
                moved += float(delta.double().square().sum())
                size += float(base.double().square().sum())
                delta, self.outer[position] = stack.step(
                    delta, base, self.outer[position], tile, moment
                )
                new = base - delta
            model[spec.name].view(-1)[span] = new.to(base.dtype)
        self.model = model
        self.summary = RoundSummary(
            round=number,
            relative_change=(moved / size) ** 0.5,
            payloads={n: merge([updates[s].payloads[n] for s in sites], cohort) for n in names},
            sites=tuple(sites),
        )

    def refine(self, name: str, number: int, weights: dict[str, float]) -> None:
        strategy = next(s for s in self.stack.strategies if s.name == name)
        model = self.build()
        model.load_state_dict(self.model, strict=False)
        before = dict(self.model)

        def load_site(site: str) -> dict[str, Tensor]:
            sent = self.contributions[site]
            return {
                t.name: before[t.name] - sent[t.name] if t.kind == "parameter" else sent[t.name]
                for t in self.shared
            }

        refinement = Refinement(
            number, self.seed, LittleTask(), model, weights, load_site,
            dict(self.summary.payloads),
            {s: {n: p.tensor for n, p in own.items()} for s, own in self.payloads.items()},
            memo=self.memos[name], files=self.files,
        )  # fmt: skip
        self.reports[name] = strategy.refine(refinement)
        self.memos[name] = refinement.memo
        self.model = {n: model.state_dict()[n].detach().clone() for n in self.model}

    def assess(self, stack: Stack) -> None:
        answers = [self.answer(site) for site in self.tasks]
        parts = [
            scores.sums_of(self.tasks[s], *a) for s, a in zip(self.tasks, answers, strict=True)
        ]
        maps = stack.calibrate(scores.add(*(stack.evaluate(*a) for a in answers)), len(answers))
        known = {name: m.parameters for name, m in maps.items()}
        seen = scores.add(*(stack.observe(stack.transform(z, known), y, "val") for z, y in answers))
        settled = stack.settle(seen, len(answers))
        self.calibrations = maps | settled
        found = {f"val.{k}": v for k, v in scores.pool(parts).items()}
        found |= stack.rate(seen, {name: m.parameters for name, m in settled.items()})
        self.summary = RoundSummary(
            self.summary.round,
            self.summary.relative_change,
            found,
            self.summary.payloads,
            self.summary.sites,
        )

    @torch.no_grad()
    def answer(self, site: str) -> tuple[Tensor, Tensor]:
        """Outputs of the model for a site's val samples, and their classes."""
        model = self.build()
        model.load_state_dict({**self.model, **self.placed[site]})
        inputs, targets = self.tasks[site].val_data().tensors  # type: ignore[union-attr]
        return model.eval()(inputs), targets


def merge(payloads: Sequence[SidePayload], cohort: Cohort) -> Tensor:
    """The merge rules of side payloads, in site order."""
    tensors = [p.tensor for p in payloads]
    match payloads[0].merge:
        case "sum":
            return torch.stack(tensors).sum(dim=0)
        case "mean by count":
            shares = (cohort.examples / cohort.examples.sum()).tolist()
            return torch.stack([w * t for w, t in zip(shares, tensors, strict=True)]).sum(dim=0)
        case "concatenate" | "condensed":
            return torch.cat(tensors)
        case "keep per site":
            return torch.stack(tensors)
