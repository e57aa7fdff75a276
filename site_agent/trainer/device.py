"""Where the arithmetic happens, and how wide it is."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protos import __version__
from protos.errors import ConfigInvalid


@dataclass(frozen=True)
class Device:
    """A device and its precision.

    Attributes:
        torch: The device.
        bf16: Whether forward passes run under bf16 autocast. Weights, losses and updates are
            never narrower than the model's own dtype.
    """

    torch: torch.device
    bf16: bool = False

    @classmethod
    def choose(cls, name: str, precision: str) -> Device:
        """The device of a configuration.

        Args:
            name: auto, cpu, cuda or cuda:N.
            precision: auto, fp32 or bf16.

        Raises:
            ConfigInvalid: CUDA is asked for and not there.
        """
        cuda = torch.cuda.is_available()
        if name.startswith("cuda") and not cuda:
            raise ConfigInvalid(
                f'site.toml: site.device = "{name}", but torch {torch.__version__} sees no CUDA '
                'device; "auto" would use the CPU',
                key="site.device",
            )
        device = torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(device)
        # On CPUs bf16 is slower than fp32 where there is no AMX, so "auto" leaves it.
        bf16 = precision == "bf16" or (
            precision == "auto" and on_cuda and torch.cuda.is_bf16_supported()
        )
        return cls(device, bf16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around forward passes."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.torch.type, dtype=torch.bfloat16)

    def take(self, value: Any) -> Any:
        """A batch on this device: tensors, and tensors in tuples, lists and mappings."""
        if isinstance(value, Tensor):
            return value.to(self.torch, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self.take(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.take(item) for item in value))
        if isinstance(value, list | tuple):
            return type(value)(self.take(item) for item in value)
        return value

    def synchronize(self) -> None:
        """Wait for what was queued; for clocks."""
        if self.torch.type == "cuda":
            torch.cuda.synchronize(self.torch)

    def packages(self) -> dict[str, str]:
        """Names and versions that decide the bits of a contribution."""
        out = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
            "device": self.torch.type,
            "precision": "bf16" if self.bf16 else "fp32",
        }
        if self.torch.type == "cuda":
            out["device_name"] = torch.cuda.get_device_name(self.torch)
        out["farflung"] = __version__
        return out


def widened(value: Any) -> Any:
    """Outputs in fp32 where a forward pass under autocast gave them narrower."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    if isinstance(value, Mapping):
        return {key: widened(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(widened(item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(widened(item) for item in value)
    return value
