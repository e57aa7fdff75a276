"""Proxy data: inputs at the orchestrator on which teachers are asked and students learn.

Labels are not needed, and not looked at. Where the inputs come from is a word in the run file:

* ``task``: the orchestrator's own `Task.proxy_data`;
* ``folder:PATH``: arrays of a folder of the orchestrator's machine;
* ``condensed``: the examples that sites have condensed of their data (`condensation.fyi`);
* ``generated``: made of noise by asking the sites' models (`distillation.generated`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from protos.errors import TaskFailed
from strategies.context import Refinement
from strategies.distillation.generated import generate
from strategies.protocol import Need
from strategies.task import Task

Source = Annotated[str, Field(pattern=r"^(task|generated|condensed|folder:/.+)$")]
"""Where proxy data comes from."""

CONDENSED = "fyi/condensed.safetensors"
"""The file in which `condensation.fyi` keeps what sites sent."""


class Proxy:
    """Inputs of a refinement, by position.

    Args:
        refinement: Its task joins samples to batches and runs models.
        data: Samples; each is an input, bare or as a tuple of one.
        samples: At most so many are used, the first ones.
        batch_size: Inputs that go through a model at once.
    """

    def __init__(
        self, refinement: Refinement, data: Sequence[Any], samples: int, batch_size: int
    ) -> None:
        self.data, self.task, self.device = data, refinement.task, refinement.device
        self.size = min(len(data), samples)
        self.batch_size = batch_size
        self._whole = self._at_once()

    def _at_once(self) -> Tensor | None:
        """All samples where they are one tensor already, and the task joins as everybody does.

        Sample by sample, joining took as long as a step of a small student.
        """
        found: Any = self.data
        if isinstance(found, TensorDataset) and len(found.tensors) == 1:
            found = found.tensors[0]
        plain = type(self.task).collate is Task.collate
        return found if plain and isinstance(found, Tensor) else None

    def inputs(self, positions: Tensor) -> Any:
        """The inputs of some samples, joined as the task joins them."""
        if self._whole is not None:
            return self._whole[positions].to(self.device)
        batch = self.task.collate([self.data[i] for i in positions.tolist()])
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            batch = batch[0]
        return batch.to(self.device) if isinstance(batch, Tensor) else batch

    def logits(self, model: nn.Module) -> Tensor:
        """Logits of all samples on the CPU, (samples, classes, …), in evaluation mode."""
        training = model.training
        model.eval()
        with torch.no_grad():
            parts = [
                self.task.forward(model, self.inputs(positions)).to("cpu", torch.float32)
                for positions in self.batches(torch.arange(self.size))
            ]
        model.train(training)
        return torch.cat(parts)

    def shuffled(self, positions: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Batches of positions, each once a pass, in a new order every pass, for ever."""
        while True:
            order = torch.randperm(len(positions), generator=generator)
            yield from self.batches(positions[order])

    def batches(self, positions: Tensor) -> list[Tensor]:
        """Some positions in parts of the batch size."""
        return list(torch.split(positions, self.batch_size))


def proxy_of(
    refinement: Refinement, source: str, samples: int, batch_size: int, strategy: str
) -> Proxy:
    """The proxy data of a refinement.

    Raises:
        TaskFailed: There is none at that source; says what to do.
    """
    kind, _, place = source.partition(":")
    data: Any
    match kind:
        case "task":
            data = refinement.task.proxy_data()
            why = (
                "the orchestrator's task has no proxy_data; the run's parameters of the task may "
                'have to ask for it, or proxy = "folder:/PATH", "condensed" or "generated"'
            )
        case "folder":
            data = arrays(Path(place), strategy)
            why = f"there is no .npy or .safetensors file in {place}"
        case "condensed":
            stored = refinement.files.get(CONDENSED)
            data = None if stored is None else load(stored)["inputs"].float()
            why = 'no site has sent condensed examples; put "fyi" before it in the run\'s stack'
        case _:
            data = generate(refinement, samples, strategy)
            why = "there are no site models"
    if data is None or len(data) == 0:
        raise TaskFailed(f"{strategy}: {why}", strategy=strategy)
    return Proxy(refinement, cast("Sequence[Any]", data), samples, batch_size)


def needed_of(needs: frozenset[Need], source: str) -> frozenset[Need]:
    """What a strategy needs with proxies of a source: a task's own only where they are its."""
    return needs if source == "task" else needs - {"proxy data"}


def arrays(folder: Path, strategy: str) -> Tensor | None:
    """The arrays of a folder, joined along their first axis in the order of their names.

    Args:
        folder: Holds ``*.npy`` (n, …) and ``*.safetensors`` with a tensor ``inputs`` (n, …), as the
            task's model takes them. Other files are passed over.
        strategy: Who asks, for errors.

    Returns:
        (n, …) float32; None where there is none.

    Raises:
        TaskFailed: The folder can't be read, or a file is not what its name says.
    """
    if not folder.is_dir():
        raise TaskFailed(f"{strategy}: {folder} is no folder that can be read", strategy=strategy)
    parts = []
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".npy":
                parts.append(torch.from_numpy(np.load(path, allow_pickle=False)).float())
            elif path.suffix == ".safetensors":
                parts.append(load_file(path)["inputs"].float())
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TaskFailed(
                f"{strategy}: {path.name} holds no array of inputs ({type(error).__name__}); "
                "give .npy files, or .safetensors with a tensor inputs",
                strategy=strategy,
            ) from None
    shapes = {tuple(p.shape[1:]) for p in parts}
    if len(shapes) > 1:
        raise TaskFailed(f"{strategy}: the files of {folder} hold inputs of shapes {shapes}")
    return torch.cat(parts) if parts else None
