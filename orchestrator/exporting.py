"""An export: everything that somebody needs to use a committed model without us."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.launching import committed_round
from orchestrator.ledger import RoundRow, RunRow
from orchestrator.ledger.transcript import NAME, transcript
from orchestrator.rounds.engine import Engine, Model
from orchestrator.run_config import RunConfig
from protos import __version__
from protos.digest import canonical
from protos.errors import ConfigInvalid, NotFound


@contextmanager
def exported(
    engine: Engine,
    name: str,
    which: str,
    of: str = "",
    stored: bool = False,
    ledger: bool = False,
) -> Iterator[list[Path]]:
    """The files of an export, in a folder that is gone afterwards.

    model.safetensors (with the manifest in its metadata), manifest.json, calibration.json,
    config.json and MODEL_CARD.md. The model is what is deployed: the ``export`` hooks of the run's
    strategies have taken away what only training needs (docs/adr/0018).

    Args:
        engine: The daemon's parts.
        name: The run.
        which: A round, "best", or empty for the last.
        of: A strategy whose files are wanted instead; empty for the model.
        stored: Whether the model is wanted as it is stored, with everything that training needs.
        ledger: Whether the run's ledger is wanted instead, for `farflung verify` elsewhere.

    Raises:
        NotFound: There is no such run or round, or the strategy kept no file there.
        ConfigInvalid: A strategy changes what is exported, and this orchestrator has no such task.
    """
    run = engine.ledger.run(name)
    if ledger:
        with engine.scratch(f"export-{run.id}") as folder:
            with (folder / NAME).open("wb") as file:
                file.writelines(transcript(engine.ledger, run.id))
            yield [folder / NAME]
        return
    row = committed_round(engine, run, which)
    if of:
        with engine.scratch(f"export-{run.id}-{row.round}") as folder:
            yield _kept(engine, row, of, folder)
        return
    model = Model.of(row)
    with engine.scratch(f"export-{run.id}-{row.round}") as folder:
        out = folder / "out"
        out.mkdir()
        changed_by = [] if stored else _exporters(engine, run)
        parts = engine.part_args(folder, model)
        metadata = {
            "farflung.run": run.id,
            "farflung.round": str(row.round),
            "farflung.model": model.shared,
            "farflung.version": __version__,
        }
        args = {"out": str(out / "model.safetensors"), "metadata": metadata}
        if changed_by:
            metadata["farflung.exported_by"] = ", ".join(changed_by)
            facts = engine.isolated(
                "deploy", {**_built_by(engine, run, row), **args, "parts": parts}
            )
            _write(out / "manifest.json", json.loads(facts["manifest"]))
        else:
            facts = engine.ask("to_safetensors", {**args, "parts": list(parts.values())})
            manifest = engine.store.manifest(engine.store.index(model.shared).manifest)
            _write(out / "manifest.json", json.loads(manifest.encoded))
        facts["changed_by"] = changed_by
        _write(
            out / "calibration.json",
            {
                "run": run.id,
                "round": row.round,
                "model": model.shared,
                "maps": row.summary.get("calibration", {}),
            },
        )
        _write(out / "config.json", run.config)
        (out / "MODEL_CARD.md").write_text(card(engine, run, row, model, facts))
        yield sorted(out.iterdir())


def _exporters(engine: Engine, run: RunRow) -> list[str]:
    """The strategies of a run that change what is exported."""
    config = RunConfig.from_resolved(run.config)
    hooks = engine.stack_facts([c.model_dump(mode="json") for c in config.stack])["hooks"]
    names = [name for name, own in hooks.items() if "export" in own]
    if names and config.task.name not in engine.config.tasks:
        raise ConfigInvalid(
            f"run {run.name}: {' and '.join(names)} would take away what only training needs, but "
            f"this orchestrator does not have the task {config.task.name}; add "
            f"[tasks.{config.task.name}] to {engine.home.config_file}, or ask for the model as it is "
            "stored (--stored)",
            key="tasks",
        )
    return names


def _built_by(engine: Engine, run: RunRow, row: RoundRow) -> dict[str, Any]:
    config = RunConfig.from_resolved(run.config)
    return {
        "task": engine.task(config),
        "stack": [c.model_dump(mode="json") for c in config.stack],
        "seed": config.seed,
        "round": row.round,
    }


def _kept(engine: Engine, row: RoundRow, strategy: str, folder: Path) -> list[Path]:
    """What a strategy keeps beside the model of a round, as files."""
    files: dict[str, Any] = row.summary.get("files", {})
    owners = sorted({key.split("/")[0] for key in files})
    if strategy not in owners:
        raise NotFound(
            f"round {row.round}: strategy {strategy} keeps no files there; "
            f"those that do: {', '.join(owners) or 'none'}",
            strategy=strategy,
        )
    out = []
    for key, spec in sorted(files.items()):
        owner, _, name = key.partition("/")
        if owner == strategy:
            path = folder / name
            path.write_bytes(engine.store.get_bytes(spec["object"]))
            out.append(path)
    return out


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _in_a_cell(text: str) -> str:
    """What somebody else wrote, so that it can't break the table or the page."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _map(parameters: dict[str, Any]) -> str:
    text = canonical(parameters).decode()
    return f"`{text}`" if len(text) <= 200 else f"({len(text)} characters)"


def card(engine: Engine, run: RunRow, row: RoundRow, model: Model, facts: dict[str, Any]) -> str:
    """The model card: what it is, how it was made, how good it is, what not to believe."""
    summary = row.summary
    scores = summary.get("scores", {})
    lines = [
        f"# {run.name}, round {row.round}",
        "",
        (
            f"{facts['parameters']:,} parameters in {facts['tensors']} tensors, averaged over "
            f"{len(summary.get('counted', []))} data centers by Farflung {__version__}. "
            "No training data left the sites."
        ),
        "",
        "| | |",
        "| --- | --- |",
        f"| run | `{run.id}` |",
        f"| model | `{model.shared}` |",
        f"| configuration | `{run.config_digest}` (config.json) |",
        f"| task | {run.config['task']['name']} `{canonical(run.config['task']['params']).decode()}` |",
        f"| strategies | {', '.join(s['name'] for s in run.config['strategy']) or 'FedAvg'} |",
        f"| rounds | {row.round} of {run.rounds} |",
        f"| sites in this round | {', '.join(summary.get('counted', [])) or 'none'} |",
    ]
    if facts["changed_by"]:
        names = ", ".join(f"`{name}`" for name in facts["changed_by"])
        lines.append(
            f"| deployed | {facts['parameters']:,} of the {facts['stored']:,} parameters that were "
            f"trained; {names} took the others away |"
        )
    if facts.get("at_sites"):
        lines.append(f"| not here, each site has its own | {', '.join(facts['at_sites'])} |")
    for site, why in sorted(summary.get("missing", {}).items()):
        lines.append(f"| not in this round | {site}: {_in_a_cell(why)} |")
    lines += ["", "## Scores", ""]
    if scores:
        lines += ["Pooled over the sites from sums; `val` data steered, `test` data did not.", ""]
        lines += ["| score | value |", "| --- | ---: |"]
        lines += [f"| {name} | {value:.4f} |" for name, value in sorted(scores.items())]
    else:
        lines.append("This round was not assessed: nothing is known of its quality.")
    maps = summary.get("calibration", {})
    lines += ["", "## Calibration", ""]
    if maps:
        lines += [
            (
                "These maps (calibration.json) were fitted to the outputs of this very model. "
                "`farflung strategies NAME` says what each does; one that changes outputs comes "
                "before they are read as probabilities."
            ),
            "",
            *(f"- `{name}` {_map(parameters)}" for name, parameters in sorted(maps.items())),
        ]
    else:
        lines.append("No calibration map was fitted; confidences are as the model gives them.")
    skipped = [p for p in summary.get("plugins", []) if p["state"] == "skipped"]
    if skipped:
        lines += ["", "## Skipped", ""]
        lines += [f"- {p['name']}: {_in_a_cell(p['reason'])}" for p in skipped]
    lines += [
        "",
        "## Limits",
        "",
        (
            "The scores are of the sites' own data. The orchestrator has not seen that data and "
            "can't say how the model does elsewhere."
        ),
        "",
    ]
    return "\n".join(lines)
