"""`farflung demo` and `farflung bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Json

bench = typer.Typer(
    help="Measure this system with real processes, beside what the machine can do at best.",
    no_args_is_help=True,
)


@bench.callback()
def _bench() -> None: ...


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave daemon, sites and page running at the end.")
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, help="Rounds of each run.", show_default=False),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option("--home", help="Folder for everything; a new one if empty.", file_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train one model across three data centers on this machine, and compare.

    Example: `farflung demo --keep`
    """
    from orchestrator.demo import run_demo

    raise typer.Exit(run_demo(home, rounds=rounds, keep=keep, as_json=as_json))


@bench.command()
def exchange(
    sites: Annotated[int, typer.Option("--sites", min=1, help="Site agents.")] = 4,
    model_mb: Annotated[
        float, typer.Option("--model-mb", min=0.01, help="Size of the model, 10^6 bytes.")
    ] = 100.0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=2, help="Rounds; the first is not counted.")
    ] = 5,
    gateways: Annotated[
        int, typer.Option("--gateways", min=0, help="Processes that carry the weights; 0: none.")
    ] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here.", dir_okay=False),
    ] = None,
) -> None:
    """Measure the exchange: weights down to all sites and up again, nothing is trained.

    Real processes over mutual TLS on loopback, with spool, outbox, base cache, fsync and
    signatures; and the same bytes over bare gRPC with TLS as the floor.

    Example: `farflung bench exchange --sites 4 --model-mb 100 --rounds 5 --json exchange.json`
    """
    from orchestrator.bench.exchange import run_exchange

    run_exchange(sites, round(model_mb * 1e6), rounds, json_file, gateways)


@bench.command()
def rounds(
    sites: Annotated[int, typer.Option("--sites", min=1, help="Site agents.")] = 4,
    rounds: Annotated[
        int, typer.Option("--rounds", min=3, help="Rounds; the first is not counted.")
    ] = 26,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here.", dir_okay=False),
    ] = None,
) -> None:
    """Measure the cost of a round itself: a 40 KB model, nothing is trained.

    Real processes over mutual TLS on loopback, with spool, outbox, ledger, fsync and signatures;
    and bare gRPC with TLS and the synced writes that a round can't do without as the floor. From
    16 sites on their trainers are forked from one process, so that they fit into memory.

    Example: `farflung bench rounds --sites 4 --json rounds.json`
    """
    from orchestrator.bench.rounds import run_rounds

    run_rounds(sites, rounds, json_file)


@bench.command()
def codec(
    model_mb: Annotated[
        float, typer.Option("--model-mb", min=0.01, help="Size of the update, 10^6 bytes of fp32.")
    ] = 200.0,
    runs: Annotated[int, typer.Option("--runs", min=2, help="Runs; the first is not counted.")] = 6,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here.", dir_okay=False),
    ] = None,
) -> None:
    """Measure the wire codecs: what one core encodes and decodes in a second, and what is saved.

    Every codec of the catalogue with error feedback, beside a plain copy of the same tensor.

    Example: `farflung bench codec --model-mb 200 --json codec.json`
    """
    from orchestrator.bench.codec import run_codec

    run_codec(round(model_mb * 1e6), runs, json_file)


@bench.command()
def reduce(
    rules: Annotated[
        str, typer.Option("--rules", help="Names with commas: mean, trimmed_mean, median, fedavgm.")
    ] = "",
    sites: Annotated[str, typer.Option("--sites", help="Numbers of sites, with commas.")] = "4",
    model_mb: Annotated[
        str, typer.Option("--model-mb", help="Sizes of the model, 10^6 bytes, with commas.")
    ] = "40",
    engines: Annotated[
        str,
        typer.Option(
            "--engines", help="Who reduces: floor, in-process, ray:WORKERS, nodes:N (a cluster)."
        ),
    ] = "floor,in-process,ray:1,ray:2",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Of each; one more is not counted.")
    ] = 3,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures here.", dir_okay=False),
    ] = None,
) -> None:
    """Measure the reduction: what sites sent to the next model, in the store.

    Over Ray and in one process, and one thread that only reads, adds, writes and hashes as the
    floor. Without --rules: the mean of 4 x 400 MB and of 4 x 40 KB, trimmed mean and median of
    16 x 40 MB.

    Example: `farflung bench reduce --rules mean,median --sites 4,16 --model-mb 100`
    """
    from orchestrator.bench.reduce import CASES, Case, run_reduce

    try:
        counts, sizes = [int(n) for n in sites.split(",")], [float(x) for x in model_mb.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--sites and --model-mb take numbers: {error}") from None
    cases = [
        Case(rule, n, round(size * 1e6))
        for rule in filter(None, rules.split(","))
        for n in counts
        for size in sizes
    ]
    run_reduce(cases or CASES, engines.split(","), repeats, json_file)
