"""One pass over a data set in batches, the same order for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from protos.errors import TaskFailed
from protos.plan import Plan
from site_agent.trainer.device import Device
from site_agent.trainer.randomness import shuffled
from strategies.context import seeded
from strategies.task import Task

RESIDENT_SHARE = 0.25
"""A data set of plain tensors moves to the GPU if it takes at most this share of what is free."""


class Batches(Protocol):
    """A data set, cut into batches.

    Attributes:
        examples: Samples; None while that is unknown (a stream before its first end).
        per_epoch: Batches of one pass; None while that is unknown.
    """

    examples: int | None
    per_epoch: int | None

    def epoch(self, plan: Plan | None, epoch: int) -> Iterator[Any]:
        """The batches of one pass; shuffled by the plan's seed, or in order without a plan."""
        ...


def cuts(examples: int, batch_size: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions, one for each batch.

    A last batch of one sample is joined to the batch before it: batch normalisation can't train on
    one sample, and dropping it would ignore data.
    """
    starts = list(range(0, examples, batch_size))
    if len(starts) > 1 and examples - starts[-1] == 1 < batch_size:
        starts.pop()
    return list(zip(starts, [*starts[1:], examples], strict=True))


class TensorBatches:
    """A data set of plain tensors: batches are gathered, no sample is touched in Python.

    Args:
        tensors: With equal first sizes.
        batch_size: Samples of a batch.
        device: Where batches go.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, device: Device) -> None:
        self._tensors, self._device = tensors, device
        self._cuts = cuts(len(tensors[0]), batch_size)
        self.examples: int | None = len(tensors[0])
        self.per_epoch: int | None = len(self._cuts)

    def epoch(self, plan: Plan | None, epoch: int) -> Iterator[Any]:
        """See `Batches`."""
        count = len(self._tensors[0])
        if plan is None:
            for start, stop in self._cuts:
                yield self._device.take([t[start:stop] for t in self._tensors])
            return
        order = shuffled(plan, epoch, count).to(self._tensors[0].device)
        for start, stop in self._cuts:
            chosen = order[start:stop]
            yield self._device.take([t.index_select(0, chosen) for t in self._tensors])


class MapBatches:
    """A data set with a length and an item for each index.

    Args:
        dataset: The data set.
        task: For its ``collate``.
        batch_size: Samples of a batch.
        device: Where batches go.
        workers: Processes that load; 0 loads in this one.
    """

    def __init__(
        self, dataset: Dataset[Any], task: Task, batch_size: int, device: Device, workers: int
    ) -> None:
        self._dataset, self._task, self._device = dataset, task, device
        self._workers = workers
        self.examples: int | None = len(cast(Sized, dataset))
        self._cuts = cuts(self.examples, batch_size)
        self.per_epoch: int | None = len(self._cuts)

    def epoch(self, plan: Plan | None, epoch: int) -> Iterator[Any]:
        """See `Batches`."""
        count = self.examples or 0
        order = list(range(count)) if plan is None else shuffled(plan, epoch, count).tolist()
        seed = (plan.seed, plan.site, plan.round) if plan else (0,)
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=[order[start:stop] for start, stop in self._cuts],
            collate_fn=self._task.collate,
            num_workers=self._workers,
            generator=seeded(*seed, "loader", epoch),
        )
        for batch in loader:
            yield self._device.take(batch)


class StreamBatches:
    """An iterable data set: its own order, a length that is known after the first pass.

    Args:
        dataset: The data set; ``set_epoch`` is called on it if it has that.
        task: For its ``collate``.
        batch_size: Samples of a batch.
        device: Where batches go.
    """

    def __init__(
        self, dataset: IterableDataset[Any], task: Task, batch_size: int, device: Device
    ) -> None:
        self._dataset, self._task, self._device = dataset, task, device
        self._batch_size = batch_size
        self.examples: int | None = None
        self.per_epoch: int | None = None
        if hasattr(dataset, "__len__"):
            self.examples = len(cast(Sized, dataset))
            self.per_epoch = -(-self.examples // batch_size)

    def epoch(self, plan: Plan | None, epoch: int) -> Iterator[Any]:
        """See `Batches`."""
        if callable(set_epoch := getattr(self._dataset, "set_epoch", None)):
            set_epoch(epoch)
        samples: list[Any] = []
        batches = seen = 0
        for sample in self._dataset:
            samples.append(sample)
            if len(samples) == self._batch_size:
                batches, seen = batches + 1, seen + len(samples)
                yield self._device.take(self._task.collate(samples))
                samples = []
        if samples:
            batches, seen = batches + 1, seen + len(samples)
            yield self._device.take(self._task.collate(samples))
        self.examples, self.per_epoch = seen, batches


def batches_of(
    dataset: Dataset[Any], task: Task, batch_size: int, device: Device, workers: int = 0
) -> Batches:
    """A task's data set in batches, by the fastest way that gives the same samples.

    Raises:
        TaskFailed: The data set is empty, or is no data set.
    """
    if isinstance(dataset, IterableDataset):
        return StreamBatches(dataset, task, batch_size, device)
    if not hasattr(dataset, "__len__"):
        raise TaskFailed(
            f"task {type(task).__name__}: its data set ({type(dataset).__name__}) has no length; "
            "give it __len__, or make it an IterableDataset"
        )
    if len(cast(Sized, dataset)) == 0:
        raise TaskFailed(f"task {type(task).__name__}: its data set is empty")
    if (
        isinstance(dataset, TensorDataset)
        and type(dataset).__getitem__ is TensorDataset.__getitem__
        and type(task).collate is Task.collate
    ):
        return TensorBatches(_resident(dataset.tensors, device), batch_size, device)
    return MapBatches(dataset, task, batch_size, device, workers)


def _resident(tensors: tuple[Tensor, ...], device: Device) -> tuple[Tensor, ...]:
    if device.torch.type != "cuda":
        return tensors
    free, _ = torch.cuda.mem_get_info(device.torch)
    if sum(t.nbytes for t in tensors) > RESIDENT_SHARE * free:
        return tensors
    return tuple(t.to(device.torch) for t in tensors)
