"""One step of a task in this process, without an orchestrator: does it work here?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protos.errors import NotFound, TaskFailed
from protos.plan import OptimizerChoice, Plan, Schedule, TaskChoice, Work
from site_agent.config import SiteConfig
from site_agent.home import Home
from site_agent.pipe import Prepare


def try_task(
    home: Home, config: SiteConfig, name: str, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Import a task, load its data and train one step.

    Args:
        home: The site's folder; relative sources start there.
        config: ``site.toml``.
        name: A task of it.
        params: Parameters of the run.

    Returns:
        Digest, sizes, the loss, and seconds, as JSON.

    Raises:
        NotFound: ``site.toml`` has no such task.
        TaskFailed: The task raised; the cause is in the message.
    """
    if name not in config.tasks:
        have = ", ".join(sorted(config.tasks)) or "none"
        raise NotFound(f"{home.config}: it has no task {name} (it has: {have})", name=name)
    plan = Plan(
        run="trial",
        round=1,
        attempt=1,
        site="here",
        task=TaskChoice(name=name, params=dict(params)),
        work=Work(steps=1),
        schedule=Schedule(lr=1e-3),
        optimizer=OptimizerChoice(momentum=0.0),
    )
    order = Prepare(
        job=1,
        plan=plan,
        source=config.sources(home.root)[name].text,
        settings=config.tasks[name].settings,
    )
    from site_agent.trainer.failures import describe

    try:
        return _try(order, config)
    except Exception as error:
        failed = describe(1, error)
        if failed.ours:
            raise
        where = f" at {failed.where}" if failed.where else ""
        raise TaskFailed(f"task {name}: {failed.cause}{where}: {failed.message}") from error


def _try(order: Prepare, config: SiteConfig) -> dict[str, Any]:
    from site_agent.trainer.device import Device
    from site_agent.trainer.exchange import Clock
    from site_agent.trainer.fitting import fit
    from site_agent.trainer.watch import Watch
    from site_agent.trainer.workload import LoadedTask, Workload

    clock = Clock()
    device = Device.choose(config.site.device, config.trainer.precision)
    with clock.phase("preparing"):
        loaded = LoadedTask(order)
        work = Workload("here", loaded, order.plan, device)
    base = work.values(work.shared)
    with clock.phase("training"):
        fitted = fit(work, order.plan, base, {}, {}, Watch(1, lambda _: None))
    sets = {which: work.batches(which, 512) for which in ("val", "test")}
    parameters = [t for t in work.manifest if t.kind == "parameter"]
    return {
        "task": order.plan.task.name,
        "digest": loaded.digest,
        "manifest": work.shared.digest,
        "tensors": len(work.manifest),
        "parameters": sum(t.elements for t in parameters),
        "bytes_shared": sum(t.nbytes for t in work.shared),
        "examples": fitted.examples,
        **{which: (b.examples or 0) if b else 0 for which, b in sets.items()},
        "loss": fitted.losses[0],
        "device": str(device.torch),
        "packages": device.packages(),
        "seconds": clock.seconds,
    }
