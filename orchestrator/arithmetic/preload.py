"""What Ray's workers import ahead of the first task; torch alone takes over a second."""

from orchestrator.arithmetic import assessment, planning, reduction
from strategies.registry import catalogue

catalogue()

__all__ = ["assessment", "planning", "reduction"]
