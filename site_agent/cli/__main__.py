"""``python -m site_agent.cli``: the command where it isn't on the path."""

from site_agent.cli import main

if __name__ == "__main__":
    main()
