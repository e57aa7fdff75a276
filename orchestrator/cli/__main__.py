"""``python -m orchestrator.cli``: the same as the command `farflung`."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
