"""The command `farflung-site`."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point of `farflung-site`."""
    from site_agent.cli.app import run

    run()
