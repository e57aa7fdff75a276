"""The trainer as a child process: started by a command, talked to in lines, mourned by its cause."""

from __future__ import annotations

import fnmatch
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from protos import __version__
from protos.errors import DataCorrupt
from protos.faults import reach
from site_agent import pipe
from site_agent.config import SiteConfig
from site_agent.home import Home
from site_agent.link.death import cause, oom_kills

LOG_BYTES = 20 << 20
LAST_WORDS_BYTES = 64 << 10
GRACE_S = 2.0

ENVIRONMENT = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "CUDA_*", "NVIDIA_*", "NCCL_*", "HIP_*", "ROCR_*",
    "TORCH*", "PYTORCH_*", "OMP_*", "MKL_*", "OPENBLAS_*", "KMP_*", "SLURM_*", "XDG_CACHE_HOME",
    "HF_*", "FARFLUNG_FEDERATION", "FARFLUNG_FAULTS",
)  # fmt: skip
"""Variables that the trainer may see; ``trainer.environment`` adds to them."""


@dataclass(frozen=True)
class Died:
    """The trainer ended.

    Attributes:
        cause: End of a sentence that begins with "the trainer".
        returncode: As `subprocess` gives it.
    """

    cause: str
    returncode: int

    @property
    def from_outside(self) -> bool:
        """Whether somebody killed it who was neither the task nor short of memory."""
        return self.returncode == -signal.SIGKILL and "memory" not in self.cause


Heard = pipe.Started | pipe.Ready | pipe.Progress | pipe.Done | pipe.Cancelled | pipe.Failed | Died


class TrainerProcess:
    """One trainer.

    It must be made by a thread that lives as long as the link: the kernel ends the trainer when
    that thread does.

    Args:
        site: Name of the site.
        home: Its folder; the trainer's working folder.
        config: [site] and [trainer].
        hear: Called with this object and each line, from a thread of its own.

    Attributes:
        device: Where it trains, once it said so.
        problem: Why it could not begin, if it said so.
        packages: Versions that decide the bits, once it said so.
        digests: Of the source of each task that it has loaded.

    Raises:
        OSError: The command can't be started.
    """

    def __init__(
        self,
        site: str,
        home: Home,
        config: SiteConfig,
        hear: Callable[[TrainerProcess, Heard], None],
    ) -> None:
        self._hear, self._log_path = hear, home.trainer_log
        self._kills = oom_kills()
        self._ending = False
        self.device = self.problem = ""
        self.packages: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        with _open_log(home.trainer_log) as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command_of(site, config),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=home.root,
                env=environment_of(config),
                start_new_session=True,  # Ctrl-C is the link's to handle
            )
        reach("trainer.spawned")
        threading.Thread(target=self._read, name="trainer", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def ending(self) -> bool:
        """Whether it was told to end."""
        return self._ending

    def send(self, line: pipe.Line) -> None:
        """Send an order. A trainer that is gone is heard of as `Died`."""
        stdin = self._process.stdin
        if stdin is None:
            return
        try:
            stdin.write(line.encode())
            stdin.flush()
            reach("trainer.told")
        except (BrokenPipeError, ValueError):
            pass

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End it, politely at first."""
        self._ending = True
        self.send(pipe.Quit())
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                self._signal(number)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                continue
            break
        # Loader processes and wrapped commands go with it.
        self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """End it at once."""
        self._ending = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def _read(self) -> None:
        out: IO[bytes] | None = self._process.stdout
        if out is None:
            return
        with out:
            while line := out.readline(pipe.MAX_LINE_BYTES):
                try:
                    event = pipe.read_event(line)
                except DataCorrupt:
                    continue  # a wrapper that prints
                if isinstance(event, pipe.Started):
                    self.device, self.packages = event.device, event.packages
                if isinstance(event, pipe.Failed) and not event.job:
                    self.problem = event.message
                    continue
                self._hear(self, event)
        code = self._process.wait()
        why = cause(code, self._last_words(), self._kills, oom_kills())
        self._hear(self, Died(why, code))

    def _last_words(self) -> str:
        try:
            with self._log_path.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, log.tell() - LAST_WORDS_BYTES))
                return log.read().decode(errors="replace")
        except (OSError, ValueError):
            return ""


def command_of(site: str, config: SiteConfig) -> list[str]:
    """The command that starts the trainer, with its arguments."""
    trainer = config.trainer
    command = list(trainer.command) or [sys.executable, "-m", "site_agent.trainer"]
    command += ["--link-version", __version__]
    command += ["--site", site, "--device", config.site.device, "--precision", trainer.precision]
    if trainer.threads:
        command += ["--threads", str(trainer.threads)]
    if trainer.loader_workers:
        command += ["--loader-workers", str(trainer.loader_workers)]
    if trainer.memory_bytes:
        command += ["--memory-bytes", str(trainer.memory_bytes)]
    return command


def environment_of(config: SiteConfig) -> dict[str, str]:
    """The variables that the trainer sees."""
    patterns = (*ENVIRONMENT, *config.trainer.environment)
    chosen = {
        name: value
        for name, value in os.environ.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    # What a task prints is in the log before it crashes.
    chosen.setdefault("PYTHONUNBUFFERED", "1")
    return chosen


def _open_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab")
