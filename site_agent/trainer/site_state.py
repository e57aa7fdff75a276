"""What a site remembers between rounds: tensors placed here, states of strategies, the optimizer.

One safetensors file beside the payload of the contribution that made it; none if there is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from site_agent.trainer import sealed
from strategies.stack import State

STATE = "state.safetensors"
OWN, OPTIMIZER, STRATEGY = "own/", "optimizer/", "strategy/"
"""What the names of tensors in the file begin with; a strategy's go on with its name and a slash."""


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
        """The state in a folder.

        Raises:
            DataCorrupt: It is not what was written.
        """
        state = cls()
        try:
            tensors, _ = sealed.read(folder / STATE)
        except FileNotFoundError:
            return state
        for name, tensor in tensors.items():
            if name.startswith(OWN):
                state.own[name.removeprefix(OWN)] = tensor
            elif name.startswith(OPTIMIZER):
                state.optimizer[name.removeprefix(OPTIMIZER)] = tensor
            elif name.startswith(STRATEGY):
                strategy, _, key = name.removeprefix(STRATEGY).partition("/")
                state.strategies.setdefault(strategy, {})[key] = tensor
        return state

    def write(self, folder: Path, about: dict[str, str]) -> None:
        """Write it into a folder, if there is anything; whoever names it for good syncs it first.

        Args:
            folder: Where it is not yet.
            about: What a person who looks into the file wants to know.
        """
        tensors = {OWN + name: value for name, value in self.own.items()}
        tensors |= {OPTIMIZER + name: value for name, value in self.optimizer.items()}
        for strategy, state in self.strategies.items():
            tensors |= {f"{STRATEGY}{strategy}/{key}": value for key, value in state.items()}
        if tensors:
            sealed.write(tensors, folder / STATE, about)
