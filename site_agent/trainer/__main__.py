"""``python -m site_agent.trainer``: started by the link, which talks to it on stdin and stdout."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import resource
import signal
import sys

from protos import __version__

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the link until it says quit or is gone."""
    parser = argparse.ArgumentParser(prog="site_agent.trainer", description=__doc__)
    parser.add_argument("--site", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--memory-bytes", type=int, default=0)
    parser.add_argument("--link-version", default=__version__)
    chosen = parser.parse_args()

    # The pipe is moved away from 0 and 1 before anything of the task's runs: what it prints goes
    # to stderr, which is the trainer's log, and can't be taken for an event.
    orders, events = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    faulthandler.enable()
    _die_with_parent()
    if chosen.memory_bytes:
        # Counts what is allocated, not what is mapped: libraries are large and cost nothing.
        resource.setrlimit(resource.RLIMIT_DATA, (chosen.memory_bytes, chosen.memory_bytes))

    from protos import faults
    from protos.errors import FarflungError, TaskFailed, row
    from site_agent.trainer.device import Device
    from site_agent.trainer.failures import describe
    from site_agent.trainer.server import Server

    faults.enter("trainer")
    if chosen.threads:
        import torch

        torch.set_num_threads(chosen.threads)
    try:
        if chosen.link_version != __version__:
            raise TaskFailed(
                f"it is Farflung {__version__}, but the agent that started it is still "
                f"{chosen.link_version}: restart the agent, or let [trainer] command start the same"
            )
        device = Device.choose(chosen.device, chosen.precision)
    except FarflungError as error:
        os.write(events, describe(0, error).encode())
        raise SystemExit(row(error).exit_code) from error
    Server(orders, events, chosen.site, device, chosen.loader_workers).run()


def _die_with_parent() -> None:
    # Where the parent is a wrapper, or already gone, the end of stdin does the same.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
