"""What authors of tasks and strategies import: ``from farflung import Task, Strategy``."""

from protos.errors import FarflungError
from protos.manifest import Manifest, TensorSpec, Tile
from protos.plan import OptimizerChoice, Plan, Schedule, Work
from strategies.protocol import (
    Calibration,
    Cohort,
    Draft,
    Moment,
    Refinement,
    RoundSummary,
    SidePayload,
    Step,
    Strategy,
    Update,
)
from strategies.task import Options, Task, Trained, Training

__all__ = [
    "Calibration",
    "Cohort",
    "Draft",
    "FarflungError",
    "Manifest",
    "Moment",
    "OptimizerChoice",
    "Options",
    "Plan",
    "Refinement",
    "RoundSummary",
    "Schedule",
    "SidePayload",
    "Step",
    "Strategy",
    "Task",
    "TensorSpec",
    "Tile",
    "Trained",
    "Training",
    "Update",
    "Work",
]
