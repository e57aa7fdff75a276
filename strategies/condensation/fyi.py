"""FYI: sites condense their data to a few synthetic examples, matched with their mirror images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from protos.errors import TaskFailed
from protos.plan import Plan
from strategies.context import Draft, Memo, Refinement, SidePayload, Update, seeded
from strategies.distillation.proxy import CONDENSED
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean
from strategies.task import Task

FACTS = "fyi/condensed.json"
MAX_DRAWN = 200
"""Examples in the drawing."""


class FYI(Strategy):
    """Dataset condensation at the sites by distribution matching, with flips inside the loss.

    For each class c of a site, R_c are its samples, S_c the synthetic ones, phi a network with
    random weights, drawn anew in every step, and S~_c the synthetic ones with their mirror images.
    S follows, by SGD with momentum::

        S~_c = [S_c; flip(S_c)]
        min_S  sum_c || mean phi(R_c) - mean phi(S~_c) ||^2

    so S does not spend half of itself on showing the same thing the other way round. The site
    sends S as side payload with the merge rule "condensed", which **its policy has to allow**
    (``condensed_data`` of site.toml; off by default), and the orchestrator keeps the examples of
    all sites with the round: as files ``condensed.safetensors`` and ``condensed.json`` (which site
    sent how many of which class in which round), for other strategies as proxy data, and as::

        use = "keep"      nothing is trained
        use = "distil"    the average goes on learning from them: cross-entropy, both flips
        use = "warm up"   a newcomer: a model with new weights learns from them and takes the
                          place of the average, as a base that knows something from the start

    **Privacy**: condensed examples stand in for the data. They may resemble single samples, above
    all of classes with few; they carry no guarantee, differential or other; what has left can't be
    called back. They begin as noise, never as samples, and classes with fewer than ``least``
    samples at a site are left out.

    Degenerate case: ``per_class = 0`` condenses nothing. ``flip = False`` is distribution matching.

    Departures: the paper plugs into four condensation methods and starts from real samples; here
    it is distribution matching (Zhao, Bilen, arXiv:2110.04181) without its augmentation, from noise
    around the class mean. phi is the task's own model up to its `Task.embedding`.

    Attributes:
        per_class: Examples of each class that a site sends, >= 0.
        every: They are sent in round 1 and in every so manieth round after it; 0 is once.
        iterations: Steps of SGD, >= 1.
        image_rate: Its learning rate, > 0.
        real: Samples of a class that are embedded in a step, >= 1.
        flip: Whether mirror images (along the last axis) stand beside the examples in the loss.
        least: Classes with fewer samples at a site are left out, >= 1.
        use: What the orchestrator does with them.
        steps: Adam's steps of "distil" and "warm up", >= 1.
        learning_rate: Adam's at the first of them, > 0; it falls to 0 along a cosine.
    """

    name: ClassVar[str] = "fyi"
    family: ClassVar[Family] = "condensation"
    summary: ClassVar[str] = "Sites send a few synthetic examples, condensed from their data."
    paper: ClassVar[str] = (
        "Son, Oh, Baek, Ham: FYI: Flip Your Images for Dataset Distillation, ECCV 2024, "
        "arXiv:2407.08113"
    )
    needs: ClassVar[frozenset[Need]] = frozenset(
        {"labels", "logits", "embedding", "orchestrator task"}
    )
    warning: ClassVar[str] = (
        "sites send examples condensed from their data. They may resemble single samples, carry no "
        "privacy guarantee, and can't be called back. Sites whose site.toml does not say "
        "condensed_data = true refuse the plan"
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"per_class": 0}

    per_class: int = Field(1, ge=0, le=1000)
    every: int = Field(0, ge=0)
    iterations: int = Field(500, ge=1)
    image_rate: float = Field(1.0, gt=0)
    real: int = Field(32, ge=1)
    flip: bool = True
    least: int = Field(16, ge=1)
    use: Literal["keep", "distil", "warm up"] = "keep"
    steps: int = Field(500, ge=1)
    learning_rate: float = Field(1e-3, gt=0)

    # -- the plan ---------------------------------------------------------------------------------

    def asked_in(self, round_number: int) -> bool:
        """Whether the sites condense in a round."""
        since = round_number - 1
        return self.per_class > 0 and (since % self.every == 0 if self.every else since == 0)

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Say in the plan that condensed examples are wanted: a site that refuses need not train."""
        if self.asked_in(draft.round):
            draft = draft.but(payload={**draft.payload, self.name: {"condensed": True}})
        return draft, memo

    # -- a site -----------------------------------------------------------------------------------

    def encode(
        self, update: Update, plan: Plan, state: dict[str, Tensor]
    ) -> tuple[Update, dict[str, Tensor]]:
        """Condense, and add ``inputs`` (n, …) float16 and ``targets`` (n,) to the update."""
        if not self.asked_in(plan.round):
            return update, state
        if update.task is None or update.generator is None:
            raise LookupError("fyi: the update has no task or generator")
        with torch.enable_grad():
            inputs, targets = self.condense(update.task, update.generator)
        update.payloads[f"{self.name}/inputs"] = SidePayload(inputs.half(), "condensed")
        update.payloads[f"{self.name}/targets"] = SidePayload(targets, "condensed")
        return update, state

    def condense(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Synthetic inputs (n, …) float32 and their classes (n,), class by class.

        Raises:
            TaskFailed: Inputs are no floating tensors, can't be flipped, or no class has ``least``
                samples.
        """
        classes = {
            label: rows for label, rows in _by_class(task).items() if len(rows) >= self.least
        }
        if not classes:
            raise TaskFailed(
                f"fyi: no class has {self.least} samples at this site, so nothing is condensed",
                strategy=self.name,
            )
        if self.flip and next(iter(classes.values()))[0].ndim < 2:
            raise TaskFailed(
                "fyi: these inputs have no axis to flip along; set flip = false",
                strategy=self.name,
            )
        starts = []
        for rows in classes.values():
            shape = (self.per_class, *rows.shape[1:])
            noise = torch.randn(shape, generator=generator)
            starts.append(rows.mean(dim=0) + rows.std() * noise)
        synthetic = torch.stack(starts).requires_grad_()  # (classes, per_class, …)
        optimizer = torch.optim.SGD([synthetic], lr=self.image_rate, momentum=0.5)
        for _ in range(self.iterations):
            embed = _random_embedding(task, generator)
            with torch.no_grad():
                drawn = [
                    rows[torch.randint(len(rows), (self.real,), generator=generator)]
                    for rows in classes.values()
                ]
                truth = embed(torch.cat(drawn)).unflatten(0, (len(classes), -1)).mean(dim=1)
            both = torch.cat([synthetic, synthetic.flip(-1)], 1) if self.flip else synthetic
            made = embed(both.flatten(0, 1)).unflatten(0, (len(classes), -1)).mean(dim=1)
            loss = (made - truth).square().sum()
            if not math.isfinite(loss.item()):
                raise TaskFailed(
                    "fyi: the loss is not finite; lower image_rate", strategy=self.name
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        targets = torch.tensor(list(classes)).repeat_interleave(self.per_class)
        return synthetic.detach().flatten(0, 1), targets

    # -- the orchestrator -------------------------------------------------------------------------

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Keep what the sites sent, and learn from it.

        Returns:
            ``examples`` that are kept, ``examples.SITE`` of those that came in this round, and
            ``loss`` of the last step of a training.
        """
        report: dict[str, float] = {}
        came = f"{self.name}/inputs" in refinement.payloads
        if came:
            report = self._keep(refinement)
        stored = refinement.files.get(CONDENSED)
        if stored is None:
            return report
        pool = load(stored)
        report["examples"] = float(len(pool["targets"]))
        if self.use == "distil":
            report["loss"] = self._train(refinement, refinement.model, pool)
        elif self.use == "warm up" and came:
            with _seeded_weights(seeded(refinement.seed, refinement.round, self.name, "newcomer")):
                newcomer = refinement.task.model()
            frozen = {n: p for n, p in refinement.model.named_parameters() if not p.requires_grad}
            newcomer.load_state_dict(frozen, strict=False)  # those are known by digest, and stay
            report["loss"] = self._train(refinement, newcomer, pool)
            refinement.model.load_state_dict(newcomer.state_dict(), strict=False)
        return report

    def _keep(self, refinement: Refinement) -> dict[str, float]:
        inputs = refinement.payloads[f"{self.name}/inputs"].half()
        targets = refinement.payloads[f"{self.name}/targets"].long()
        pool = {"inputs": inputs.contiguous(), "targets": targets.contiguous()}
        refinement.files[CONDENSED] = save(pool)
        sites: dict[str, dict[str, int]] = {}
        for site, sent in sorted(refinement.site_payloads.items()):
            own = sent.get(f"{self.name}/targets")
            if own is not None:
                labels, counts = torch.unique(own, return_counts=True)
                pairs = zip(labels.tolist(), counts.tolist(), strict=True)
                sites[site] = {str(label): count for label, count in pairs}
        facts = {"round": refinement.round, "sites": sites, **pictures(inputs, targets)}
        refinement.files[FACTS] = json.dumps(facts, separators=(",", ":")).encode()
        return {f"examples.{site}": float(sum(own.values())) for site, own in sites.items()}

    def _train(self, refinement: Refinement, model: nn.Module, pool: Mapping[str, Tensor]) -> float:
        return learn(
            refinement.task,
            model.to(refinement.device),
            pool["inputs"].float().to(refinement.device),
            pool["targets"].to(refinement.device),
            flip=self.flip,
            steps=self.steps,
            learning_rate=self.learning_rate,
            generator=seeded(refinement.seed, refinement.round, self.name),
        )


def learn(
    task: Task,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    flip: bool,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
) -> float:
    """Train a model on a few labelled examples; gives the loss of the last step.

    Args:
        task: Runs the model.
        model: Changed in place; in evaluation mode.
        inputs: (n, …).
        targets: (n,).
        flip: Whether mirror images are seen as well.
        steps: Adam's steps, of at most 128 examples.
        learning_rate: At the first one; it falls to 0 along a cosine.
        generator: Draws the batches.

    Raises:
        TaskFailed: The loss is not finite.
    """
    if flip:
        inputs, targets = torch.cat([inputs, inputs.flip(-1)]), targets.repeat(2)
    optimizer = torch.optim.Adam(
        [p for p in model.eval().parameters() if p.requires_grad], lr=learning_rate
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    value = math.nan
    for _ in range(steps):
        rows = torch.randperm(len(inputs), generator=generator)[:128].to(inputs.device)
        loss = F.cross_entropy(task.forward(model, inputs[rows]), targets[rows])
        value = loss.item()
        if not math.isfinite(value):
            raise TaskFailed("fyi: the loss is not finite; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return value


def pictures(inputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """What the page needs to draw examples: the first ones, as bytes from darkest to brightest.

    Returns:
        JSON: ``shape`` (channels, rows, columns), ``pixels`` (one list an example), ``classes``;
        without examples where inputs are no pictures.
    """
    shape = tuple(inputs.shape[1:])
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        return {"shape": [], "pixels": [], "classes": []}
    shown = inputs[:MAX_DRAWN].float().flatten(1)
    low, high = shown.amin(dim=1, keepdim=True), shown.amax(dim=1, keepdim=True)
    scaled = (255 * (shown - low) / (high - low).clamp_min(1e-12)).round().to(torch.int64)
    return {
        "shape": list(shape),
        "pixels": scaled.tolist(),
        "classes": targets[:MAX_DRAWN].tolist(),
    }


def _by_class(task: Task) -> dict[int, Tensor]:
    """The training inputs of each class, in the order of the classes."""
    data: Any = task.train_data()
    inputs, targets = task.unpack(task.collate([data[i] for i in range(len(data))]))
    if not isinstance(inputs, Tensor) or not inputs.dtype.is_floating_point:
        raise TaskFailed("fyi: inputs must be single floating tensors")
    flat = targets.flatten()
    if len(flat) != len(inputs):
        raise TaskFailed("fyi: each input must have one class")
    return {label: inputs[flat == label].float() for label in torch.unique(flat).tolist()}


@contextmanager
def _seeded_weights(generator: torch.Generator) -> Iterator[None]:
    """Weights that a model draws inside follow from the generator; nothing outside changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def _random_embedding(task: Task, generator: torch.Generator) -> nn.Module:
    """A network with new random weights that gives what `Task.embedding` names."""
    with _seeded_weights(generator):
        model = task.model()
    return Embedding(task, model.eval().requires_grad_(False))


class Embedding(nn.Module):
    """A model up to its embedding.

    Args:
        task: Runs the model and names the layer.
        model: The model.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model
        self.seen: Tensor | None = None
        model.get_submodule(task.embedding).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen = output

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, …) → (n, features)."""
        self.task.forward(self.model, inputs)
        if self.seen is None:
            raise TaskFailed("fyi: the model did not pass through its embedding")
        return self.seen.flatten(1)


def _arm(per_class: int, flip: bool) -> dict[str, Any]:
    own = {"name": "fyi", "per_class": per_class, "flip": flip}
    return {"strategy": [{**own, "use": "warm up", "steps": 200, "learning_rate": 0.01}]}


def _holds(seeds: Sequence[Seed]) -> list[str]:
    out: list[str] = []
    for per_class in (1, 5):
        fyi, dm, real = (100 * mean(seeds, f"{arm}-{per_class}") for arm in ("fyi", "dm", "real"))
        out += at_least(f"{per_class} a class: over matching without flips", fyi - dm, 1.5)
        out += at_least(f"{per_class} a class: over real patches", fyi - real, 1.0)
    return out


ROW = Row(
    number=42,
    method="fyi",
    claim="Mirror images inside the matching loss make condensed examples worth more.",
    control="distribution matching without flips, as many real patches drawn at random",
    data="P10, 16 x 16; each site has photographs that no other has",
    task="patches",
    sites=tuple(Site(f"site{k}", {"part": k, "parts": 3}) for k in range(3)),
    run={
        "task": {"name": "patches"},
        "rounds": 1,
        "init": {"from": "site:site0"},
        "cohort": {"sites": [f"site{k}" for k in range(3)], "quorum": "all", "deadline_s": 900.0},
        "local": {
            "work": {"steps": 1},  # the newcomer takes the place of what is trained here
            "batch_size": 32,
            "lr": 0.01,
            "optimizer": {"name": "sgd"},
        },
    },
    arms={
        f"{name}-{per_class}": _arm(per_class, flip)
        for per_class in (1, 5)
        for name, flip in (("fyi", True), ("dm", False))
    },
    holds=_holds,
    reproduced="yes",
    beside=("real-1", "real-5"),
    policy={"condensed_data": True},
)
