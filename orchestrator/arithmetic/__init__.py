"""What needs torch: planning, reduction, assessment, refinement, export.

Pure functions from JSON to JSON (large data as paths of files), run by the compute process in
Ray's workers, or by its in-process twin. The daemon never imports this package, so that it never
holds a model, a task's code, or torch.
"""

FUNCTIONS: dict[str, str] = {
    "check_stack": "orchestrator.arithmetic.planning:check_stack",
    "plan_round": "orchestrator.arithmetic.planning:plan_round",
    "prepare": "orchestrator.arithmetic.reduction:prepare",
    "measure_run": "orchestrator.arithmetic.reduction:measure_run",
    "weigh": "orchestrator.arithmetic.reduction:weigh",
    "reduce_run": "orchestrator.arithmetic.reduction:reduce_run",
    "reduce_at_once": "orchestrator.arithmetic.reduction:reduce_at_once",
    "check_blocks": "orchestrator.arithmetic.reduction:check_blocks",
    "pool": "orchestrator.arithmetic.assessment:pool",
    "assess": "orchestrator.arithmetic.assessment:assess",
    "check_task": "orchestrator.arithmetic.models:check_task",
    "first_model": "orchestrator.arithmetic.models:first_model",
    "from_safetensors": "orchestrator.arithmetic.models:from_safetensors",
    "to_safetensors": "orchestrator.arithmetic.models:to_safetensors",
    "deploy": "orchestrator.arithmetic.models:deploy",
    "refine": "orchestrator.arithmetic.refining:refine",
    "holdout": "orchestrator.arithmetic.holdout:holdout",
}
"""What the daemon may ask the compute process to run."""
