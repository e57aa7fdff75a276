"""What a site remembers between rounds: tensors placed here, states of strategies, the optimizer.

One folder of safetensors files beside the contribution that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from protos.digest import canonical
from strategies.stack import State


@dataclass
class SiteState:
    """A site's memory.

    Attributes:
        own: Tensors placed at the site, by name.
        strategies: State of each strategy.
        optimizer: State of the inner optimizer, where the plan keeps it.
    """

    own: dict[str, Tensor] = field(default_factory=dict)
    strategies: State = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> SiteState:
        """The state of a folder."""
        state = cls()
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            if file.stem == "own":
                state.own = tensors
            elif file.stem == "optimizer":
                state.optimizer = tensors
            elif file.stem.startswith("strategy-"):
                state.strategies[file.stem.removeprefix("strategy-")] = tensors
        return state

    def write(self, folder: Path, about: Mapping[str, str | int]) -> None:
        """Write it into a new folder; whoever names it for good syncs it first.

        Args:
            folder: Must not exist.
            about: What a person who looks into the folder wants to know.
        """
        folder.mkdir(mode=0o700)
        parts = {"own": self.own, "optimizer": self.optimizer}
        parts |= {f"strategy-{name}": state for name, state in self.strategies.items()}
        for name, tensors in parts.items():
            if tensors:
                _save(folder / f"{name}.safetensors", tensors)
        (folder / "state.json").write_bytes(canonical(dict(about)))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Clones only where safetensors wants them, for tensors that share memory: a residual is as large
    # as the model.
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    save_file(apart, path)
