"""A task for tests: three Gaussian blobs, a small net, and faults that a test can switch on.

``Settings.switches`` is a folder of the test's. A file ``fault`` in it names what goes wrong in the
next step of training, at a site or of a plug-in at the orchestrator; a file ``gate`` holds training
until it is gone (``reached`` says that it waits); a file ``slow`` says how many seconds a step takes
more, one ``loading`` how many the task does; every training step adds a line to ``steps``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from farflung import Options, Task

CLASSES, FEATURES = 3, 8


class Net(nn.Module):
    """Two layers over a frozen one, a buffer of each kind, and a tied weight."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, FEATURES)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)
        self.first = nn.Linear(FEATURES, hidden)
        self.second = nn.Linear(hidden, CLASSES)
        self.unseen = nn.Parameter(torch.zeros(2))  # no loss sees it, so no trainer notices a NaN
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.second(torch.relu(self.first(x + self.frozen(x)))) * self.scale


class OneByOne(Dataset[Any]):
    """The same samples, as if each were a file."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Blobs(Task):
    """See the module."""

    class Params(Options):
        hidden: int = 12
        samples: int = 120
        one_by_one: bool = False

    class Settings(Options):
        part: int = 0
        switches: str = ""
        hidden: int = 0

    embedding = "first"

    def model(self) -> nn.Module:
        return Net(self.settings.hidden or self.params.hidden)

    def teacher(self) -> nn.Module:
        """Another one at every site, so that only what is fetched makes them agree."""
        teacher = nn.Linear(FEATURES, 6)
        draw = torch.Generator().manual_seed(self.settings.part)
        with torch.no_grad():
            teacher.weight.copy_(torch.randn(6, FEATURES, generator=draw))
        return teacher

    def student(self) -> nn.Module:
        return nn.Linear(FEATURES, CLASSES)

    def _data(self, seed: int, count: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(seed)
        targets = torch.randint(CLASSES, (count,), generator=draw)
        centres = torch.eye(CLASSES, FEATURES) * 2
        inputs = centres[targets] + torch.randn(count, FEATURES, generator=draw)
        return TensorDataset(inputs, targets)

    def train_data(self) -> Dataset[Any]:
        loading = Path(self.settings.switches) / "loading"
        if self.settings.switches and loading.exists():
            time.sleep(float(loading.read_text()))
        data = self._data(10 + self.settings.part, self.params.samples)
        return OneByOne(data) if self.params.one_by_one else data

    def val_data(self) -> TensorDataset:
        if self._fault() == "holdout":
            raise ValueError("the labelled images are gone")
        return self._data(100 + self.settings.part, 60)

    def test_data(self) -> TensorDataset:
        return self._data(1000, 90)

    def proxy_data(self) -> TensorDataset:
        if self._fault() == "proxy":
            raise ValueError("the proxy images are gone")
        return TensorDataset(self._data(2000, 80).tensors[0])

    def _fault(self) -> str:
        fault = Path(self.settings.switches) / "fault"
        return fault.read_text() if self.settings.switches and fault.exists() else ""

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        if torch.is_grad_enabled() and self.settings.switches:
            switches = Path(self.settings.switches)
            _obey(switches, model)
            if fault_of(switches) == "zero":
                return model(inputs).detach() + 0 * model.second.weight.sum()  # type: ignore[operator, union-attr]
        return model(inputs)


def fault_of(switches: Path) -> str:
    """What is switched on."""
    fault = switches / "fault"
    return fault.read_text() if fault.exists() else ""


def _obey(switches: Path, model: nn.Module) -> None:
    with (switches / "steps").open("a") as steps:
        steps.write(".\n")
    if (switches / "gate").exists():
        (switches / "reached").touch()
        while (switches / "gate").exists():
            time.sleep(0.02)  # what a slow site does; the test waits for `reached`
    if (slow := switches / "slow").exists():
        time.sleep(float(slow.read_text()))
    what = fault_of(switches)
    if what == "segfault":
        ctypes.string_at(0)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "memory":
        hoard = [bytearray(64 << 20) for _ in range(10_000)]
        del hoard
    elif what == "loop":
        while True:
            pass
    elif what.startswith("connect "):
        host, _, port = what.removeprefix("connect ").rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
    elif what.startswith("read "):
        Path(what.removeprefix("read ")).read_bytes()
    elif what == "spoil":
        with torch.no_grad():
            model.second.weight.zero_()  # type: ignore[operator, union-attr]
    elif what == "raise once":
        (switches / "fault").unlink()
        raise ValueError("a sample of patient 4712 is broken")
    elif what == "raise":
        raise ValueError("a sample of patient 4711 is broken")
    elif what in ("nan", "nan once", "inf"):
        if what == "nan once":
            (switches / "fault").unlink()
        with torch.no_grad():
            model.unseen[1] = float(what.split()[0])  # type: ignore[operator]
    elif what == "explode":
        with torch.no_grad():
            model.first.weight.mul_(1.5)  # type: ignore[operator, union-attr]
    elif what == "device":
        # What torch raises once a device has failed.
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    elif what == "no data":
        Path("/data/of/patient-4711").read_bytes()
