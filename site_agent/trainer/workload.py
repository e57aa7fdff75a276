"""A task with its model and data: what stays loaded between rounds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from protos.digest import canonical, digest
from protos.errors import DataCorrupt, ManifestInvalid
from protos.manifest import Index, Manifest
from protos.plan import Plan
from protos.tensors import ArtefactFile, iterate_bytes, map_file
from site_agent.pipe import Prepare
from site_agent.task_source import TaskSource
from site_agent.trainer.artefact import index_of
from site_agent.trainer.batches import Batches, batches_of
from site_agent.trainer.device import Device
from site_agent.trainer.randomness import seed_model
from strategies.loading import load_task
from strategies.stack import Stack


class LoadedTask:
    """A task's instance.

    Args:
        order: Which plan, which source.
    """

    def __init__(self, order: Prepare) -> None:
        self.source = TaskSource.parse(order.source, Path())
        self.digest = self.source.digest
        self.key = self.key_of(order)
        choice = order.plan.task
        self.task = load_task(choice.name, order.source, choice.params, order.settings, Path())
        self._datasets: dict[str, Dataset[Any] | None] = {}

    def dataset(self, which: str) -> Dataset[Any] | None:
        """One of the task's data sets (train, val, test), read once; None if the site has none."""
        if which not in self._datasets:
            self._datasets[which] = getattr(self.task, f"{which}_data")()
        return self._datasets[which]

    def load(self, kind: str) -> None:
        """Read the data that a kind of plan needs: a site that reads them is still preparing."""
        which = {"train": ("train",), "init": ()}.get(kind, ("val", "test"))
        for name in which:
            self.dataset(name)

    @staticmethod
    def key_of(order: Prepare) -> str:
        """Equal for orders that the same instance serves: source, parameters and settings.

        Not the source's bytes: the link starts another trainer when they change.
        """
        return digest(canonical([order.source, order.plan.task.model_dump(), order.settings]))


class Workload:
    """A model built for a plan's stack, and the data of its task.

    Args:
        site: Name of this site, for errors.
        loaded: The task.
        plan: Its stack and seed.
        device: Where the model lives.
        loader_workers: See `batches_of`.
    """

    def __init__(
        self, site: str, loaded: LoadedTask, plan: Plan, device: Device, loader_workers: int = 0
    ) -> None:
        self.site, self.device = site, device
        self.key = self.key_of(loaded, plan)
        self.loaded, self.task = loaded, loaded.task
        self.task_digest = loaded.digest
        self._workers = loader_workers
        self.stack = Stack(plan.stack)
        seed_model(plan.seed)
        self.model: nn.Module = self.stack.build(self.task).to(device.torch)
        self.manifest: Manifest = self.stack.manifest(self.model, self.task)
        self.shared = self.manifest.of("shared")
        self.own = self.manifest.of("site")
        self.frozen = self.manifest.of("frozen")
        for name, parameter in self.model.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)
        self._initial = self._snapshot()
        self._frozen_digest: str | None = None
        # By run, round, attempt, base and split: what `assessing` keeps between its two exchanges.
        self.outputs: dict[tuple[str, int, int, str, str], list[tuple[Tensor, Tensor]]] = {}

    @staticmethod
    def key_of(loaded: LoadedTask, plan: Plan) -> str:
        """Equal for plans that the same model serves."""
        stack = [(c.name, c.params) for c in plan.stack]
        return digest(canonical([loaded.key, stack, plan.seed]))

    # -- model -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The model's tensors by name, not copied."""
        return {k: v for k, v in self.model.state_dict().items() if isinstance(v, Tensor)}

    def values(self, manifest: Manifest) -> dict[str, Tensor]:
        """The tensors of a manifest as they are now, on the CPU; copies."""
        state = self.state() if len(manifest) else {}
        return {t.name: state[t.name].detach().to("cpu", copy=True) for t in manifest}

    def reset(self) -> None:
        """Give everything that no base sets the value that it had when the model was built.

        A warm trainer thereby starts each round as a fresh one would.
        """
        self.load(self._initial[0])
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, value in self._initial[1].items():
                buffers[name].copy_(value)
        self.model.zero_grad(set_to_none=True)

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        stored = self.state()
        mine = [t.name for t in self.manifest.of("site", "orchestrator")]
        # Training changes buffers in every forward pass, frozen ones too.
        mine += [t.name for t in self.frozen if t.kind != "parameter"]
        kept = {name: stored[name].clone() for name in mine}
        volatile = {n: b.clone() for n, b in self.model.named_buffers() if n not in stored}
        return kept, volatile

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set tensors of the model.

        Raises:
            ManifestInvalid: One is unknown to the model, or has another shape; names it.
        """
        if not tensors:
            return
        state = self.state()
        with torch.no_grad():
            for name, value in tensors.items():
                target = state.get(name)
                if target is None or target.shape != value.shape:
                    have = "does not have it" if target is None else f"has {list(target.shape)}"
                    raise ManifestInvalid(
                        f"site {self.site}: tensor {name} is {list(value.shape)}, but the model "
                        f"{have}",
                        site=self.site,
                        tensor=name,
                    )
                target.copy_(value)

    def trained(self) -> dict[str, Tensor]:
        """What training changes of the model, not copied: all but its frozen parameters."""
        state = self.state()
        fixed = {t.name for t in self.frozen if t.kind == "parameter"}
        others = {n: b for n, b in self.model.named_buffers() if n not in state}
        return {n: v for n, v in (state | others).items() if n not in fixed}

    def retrain(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the model what `trained` had."""
        mine = self.trained()
        with torch.no_grad():
            for name, value in tensors.items():
                mine[name].copy_(value)

    def base_copy(self, base: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> nn.Module:
        """Another model of the same kind that holds a base and this site's own tensors."""
        model = copy.deepcopy(self.model)
        model.zero_grad(set_to_none=True)
        state = model.state_dict()
        with torch.no_grad():
            for source in (base, own):
                for name, value in source.items():
                    state[name].copy_(value)
        return model

    # -- what comes from elsewhere --------------------------------------------------------------

    def read_base(self, path: Path, manifest: str) -> ArtefactFile:
        """A fetched base.

        Args:
            path: The file; manifests lie beside it, under their digests.
            manifest: Digest of its manifest.

        Raises:
            ManifestInvalid: It is not a base of this model; names the first tensor that differs.
        """
        if manifest != self.shared.digest:
            theirs = Manifest.decode(path.with_name(f"{manifest}.manifest").read_bytes())
            raise ManifestInvalid(self._difference(theirs), site=self.site)
        return ArtefactFile(path, self.shared)

    def fill(self, base: ArtefactFile) -> None:
        """Read a base of this model straight into the model's own memory, where that can be."""
        state = self.state()
        with torch.no_grad():
            for spec in base.manifest:
                target = state[spec.name].detach()
                if target.device.type == "cpu" and target.is_contiguous():
                    base.read_into(spec.name, 0, target)
                else:
                    target.copy_(base[spec.name])

    def _difference(self, theirs: Manifest) -> str:
        start = f"site {self.site}: the model of this site's task is not the one of the base: "
        for spec in theirs:
            if spec.name not in self.shared:
                return start + f"tensor {spec.name} of the base is not shared here"
            if (mine := self.shared[spec.name]) != spec:
                return start + (
                    f"tensor {spec.name} is {mine.dtype} {list(mine.shape)} ({mine.kind}, group "
                    f"{mine.group}) here and {spec.dtype} {list(spec.shape)} ({spec.kind}, group "
                    f"{spec.group}) there"
                )
        for spec in self.shared:
            if spec.name not in theirs:
                return start + f"the base has no tensor {spec.name}"
        return start + "the order of its tensors differs"

    def frozen_index(self) -> Index:
        """The index of this site's own frozen part."""
        return index_of(iterate_bytes(self.frozen, self.state()), self.frozen.digest)

    def has_frozen(self, wanted: str) -> bool:
        """Whether the frozen part is the one of that digest (always, if none is wanted)."""
        if not wanted:
            return True
        self.reset()
        if self._frozen_digest is None:
            self._frozen_digest = self.frozen_index().digest
        return self._frozen_digest == wanted

    def read_frozen(self, path: Path, wanted: str) -> None:
        """Load a fetched frozen part.

        Raises:
            ManifestInvalid: It is not of this model.
            DataCorrupt: After loading it, the model's bits are not the wanted ones.
        """
        if path.stat().st_size != self.frozen.nbytes:
            raise ManifestInvalid(
                f"site {self.site}: the fetched frozen part is not of this model", site=self.site
            )
        # If its manifest is another one, so is the digest of what is loaded.
        self.load(map_file(path, self.frozen))
        self._initial = self._snapshot()
        self._frozen_digest = None
        if not self.has_frozen(wanted):
            raise DataCorrupt(f"site {self.site}: the frozen part differs after it was loaded")

    # -- data ------------------------------------------------------------------------------------

    def batches(self, which: str, batch_size: int) -> Batches | None:
        """One of the task's data sets (train, val, test); None if the site has none."""
        dataset = self.loaded.dataset(which)
        if dataset is None:
            return None
        return batches_of(dataset, self.task, batch_size, self.device, self._workers)
