"""Checks a run before it is queued: what would fail in round 7 is refused here."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import replace

from orchestrator.compute.errors import PluginNotIsolated
from orchestrator.ledger import RoundRow, RunRow
from orchestrator.rounds.engine import Engine
from orchestrator.rounds.first import parse_start
from orchestrator.run_config import RunConfig, parse_run
from orchestrator.viewing import best_round
from protos.errors import ConfigInvalid, Conflict, FarflungError, InvalidInput, NotFound

MAX_START_BYTES = 8 << 30

AT_THE_ORCHESTRATOR = frozenset({"proxy data", "orchestrator task"})
"""Needs that only the orchestrator's own task can meet."""


def launch(engine: Engine, text: str, start_from: str, start_file: bytes) -> RunRow:
    """Check a run file and put the run into the queue.

    Args:
        engine: The daemon's parts.
        text: The run file.
        start_from: Overrides ``[init] from``; empty for what the file says.
        start_file: Bytes of the safetensors file that the run starts from, if it is a file.

    Raises:
        ConfigInvalid: A key is wrong, or a strategy needs what is not there.
        NotFound: A site, run, round or strategy that is not there.
    """
    config = parse_run(text)
    if start_from:
        init = config.init.model_copy(update={"start": start_from})
        config = config.model_copy(update={"init": init})
    _check_sites(engine, config)
    config = _check_strategies(engine, config)
    parent, config = _check_start(engine, config, start_file)
    identity = (
        f"{re.sub(r'[^a-z0-9]+', '-', config.name.lower()).strip('-')[:24]}-{uuid.uuid4().hex[:6]}"
    )
    row = RunRow(
        id=identity,
        name=config.name,
        config=config.resolved,
        config_digest=config.digest,
        rounds=config.rounds,
        created=time.time(),
        parent=parent,
    )
    try:
        engine.ledger.create_run(row)
    except Conflict:
        row = replace(row, name=_free_name(engine, config.name))
        engine.ledger.create_run(row)
    stack = [c.model_dump(mode="json") for c in config.stack]
    for name, text in engine.stack_facts(stack)["warnings"].items():
        engine.note("warning", row.id, None, "", f"strategy {name}: {text}")
    return row


def _free_name(engine: Engine, name: str) -> str:
    taken = {r.name for r in engine.ledger.runs()}
    number = 2
    while f"{name}-{number}" in taken:
        number += 1
    return f"{name}-{number}"


def _check_sites(engine: Engine, config: RunConfig) -> None:
    known = {s.name for s in engine.ledger.sites() if s.state == "enrolled"}
    if config.cohort.sites == "all":
        if isinstance(config.cohort.quorum, int) and config.cohort.quorum > len(known):
            raise ConfigInvalid(
                f"run.toml: cohort.quorum: {config.cohort.quorum} sites are needed, "
                f"{len(known)} are enrolled",
                key="cohort.quorum",
            )
        if not known:
            raise ConfigInvalid(
                "run.toml: cohort.sites: no site is enrolled yet; `farflung invite SITE` makes a "
                "join token",
                key="cohort.sites",
            )
        return
    for site in config.cohort.sites:
        if site not in known:
            raise NotFound(
                f"run.toml: cohort.sites: no site {site} is enrolled; "
                f"enrolled are {', '.join(sorted(known)) or 'none'}",
                key="cohort.sites",
                site=site,
            )


def _check_strategies(engine: Engine, config: RunConfig) -> RunConfig:
    """The configuration with every hyperparameter written out."""
    checked = engine.ask(
        "check_stack", {"stack": [c.model_dump(mode="json") for c in config.stack]}
    )
    if config.cohort.stale and checked["passing"]:
        raise ConfigInvalid(
            f"run.toml: cohort.stale: what {' and '.join(checked['passing'])} sends beside its weights"
            " belongs to the model of its round and can't count in a later one; leave out one of them",
            key="cohort.stale",
        )
    missing = AT_THE_ORCHESTRATOR & set(checked["needs"])
    holdout, here = config.assess.holdout, config.task.name in engine.config.tasks
    if (missing or holdout) and not here:
        key, what = (
            ("strategy", sorted(missing)) if missing else ("assess.holdout", ["its data is"])
        )
        raise ConfigInvalid(
            f"run.toml: {key}: {' and '.join(what)} needed, but this orchestrator does "
            f"not have the task {config.task.name}; add [tasks.{config.task.name}] to "
            f"{engine.home.config_file}",
            key=key,
        )
    if (checked["asks_task"] or holdout) and here:
        _check_task(engine, config)
    stack = tuple(c.model_copy(update={"params": checked["fields"][c.name]}) for c in config.stack)
    return config.model_copy(update={"strategy": stack})


def _check_task(engine: Engine, config: RunConfig) -> None:
    """Have the orchestrator's own task asked for what the run needs of it.

    Where the orchestrator does not have it, the sites are asked before they train.
    """
    args = {
        "task": engine.task(config),
        "stack": [c.model_dump(mode="json") for c in config.stack],
        "seed": config.seed,
        "holdout": config.assess.holdout,
    }
    try:
        engine.isolated("check_task", args)
    except PluginNotIsolated:
        return  # whatever needs it will say so
    except ConfigInvalid as error:
        raise ConfigInvalid(
            f"run.toml: task {config.task.name}: {error.message}", key="strategy"
        ) from None
    except FarflungError as error:
        raise ConfigInvalid(
            f"run.toml: task {config.task.name}: whether it has what the strategies need can't be "
            f"said: {error.message}",
            key="task.name",
        ) from error


def _check_start(
    engine: Engine, config: RunConfig, start_file: bytes
) -> tuple[tuple[str, int] | None, RunConfig]:
    start = config.init.start
    parsed = parse_start(start)
    if parsed is not None:
        return _resolve(engine, *parsed), config
    if start == "task":
        engine.task(config)
        return None, config
    if start.startswith("site:"):
        site = start.removeprefix("site:")
        if site not in {s.name for s in engine.ledger.sites() if s.state == "enrolled"}:
            raise NotFound(f"run.toml: init.from: no site {site} is enrolled", key="init.from")
        return None, config
    if not start_file:
        raise ConfigInvalid(
            f'run.toml: init.from: "{start}" is not "task", "site:NAME", "RUN@ROUND", "RUN@best" '
            "or a file that can be read",
            key="init.from",
        )
    if len(start_file) > MAX_START_BYTES:
        raise InvalidInput(f"init.from: {len(start_file)} bytes exceed {MAX_START_BYTES}")
    digest = engine.store.put_bytes(start_file)
    init = config.init.model_copy(update={"digest": digest})
    return None, config.model_copy(update={"init": init})


def _resolve(engine: Engine, name: str, number: str) -> tuple[str, int]:
    run = engine.ledger.run(name)
    row = committed_round(engine, run, number)
    return run.id, row.round


def committed_round(engine: Engine, run: RunRow, which: str) -> RoundRow:
    """A committed round by number, "best", or empty for the last.

    Raises:
        NotFound: There is no such committed round; says which there are.
    """
    history = engine.ledger.history(run.id)
    later = [r for r in history if r.round > 0]
    if which == "best":
        row = best_round(later)
    elif which == "":
        row = history[-1] if history else None
    else:
        row = next((r for r in history if str(r.round) == which), None)
    if row is None:
        have = f"rounds 0 to {history[-1].round}" if history else "none yet"
        raise NotFound(
            f"run {run.name}: no committed round {which or 'at all'}; committed are {have}"
        )
    return row
