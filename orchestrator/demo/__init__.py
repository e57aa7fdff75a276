"""`farflung demo`: one model across three data centers on this machine, and what it is worth."""

from orchestrator.demo.demonstration import run_demo

__all__ = ["run_demo"]
