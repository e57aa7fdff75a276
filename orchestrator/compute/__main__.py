"""Entry point of ``python -m orchestrator.compute PARENT_PID CONFIG``: the confined driver."""

from __future__ import annotations

import os
import sys

from orchestrator.compute.config import ComputeConfig, Level
from orchestrator.compute.namespaces import CAP_DAC_OVERRIDE, CAP_SETFCAP
from orchestrator.compute.supervise import Jail, supervise

_LOGS_BYTES = 64 * 2**20


def main() -> None:
    """Closes itself off, then starts Ray inside."""
    parent_pid, config = int(sys.argv[1]), ComputeConfig.from_json(sys.argv[2])
    jail = Jail(
        # A driver of a cluster needs its network; what may be there must still not see the keys.
        levels=(Level.MOUNTS, Level.NONE) if config.address else config.levels,
        hidden=config.hidden,
        private=config.temp_dir,
        private_bytes=config.object_store_memory_bytes + _LOGS_BYTES,
        # A root daemon may write where others own the folder; and it takes CAP_SETFCAP to map
        # root into a plug-in's user namespace (user_namespaces(7), Linux 5.12).
        keep=frozenset({CAP_DAC_OVERRIDE, CAP_SETFCAP}),
    )

    def body(level: Level) -> int:
        # The protocol's pipes move away from 0 and 1, so that a stray print can't corrupt it.
        reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)

        from orchestrator.compute.driver import serve

        return serve(config, level, reader, writer)

    supervise(jail, parent_pid, body)


if __name__ == "__main__":
    main()
