"""What Ray's workers and zygotes import ahead of the first task; torch alone takes over a second."""

from orchestrator.arithmetic import assessment, holdout, planning, reduction, refining
from strategies.registry import catalogue

catalogue()

__all__ = ["assessment", "holdout", "planning", "reduction", "refining"]
