"""The command `farflung`."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point of `farflung`."""
    from orchestrator.cli.app import run

    run()
