"""What a run of the demo came to, as a row of its closing table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from rich.table import Table

from orchestrator import views
from orchestrator.cli.tables import duration, number, percent, score, size


class Result(NamedTuple):
    """One row.

    Attributes:
        title: What was trained.
        accuracy: On test images, in [0, 1], as all other scores are.
        nll: Negative log-likelihood.
        ece: Expected calibration error, 15 bins.
        ece_after: The same after the temperature that was fitted to validation images.
        epochs: Local epochs in all.
        wire_bytes: Payload over the wire, both ways.
        seconds: From the first round to the last.
    """

    title: str
    accuracy: float
    nll: float
    ece: float
    ece_after: float
    epochs: float
    wire_bytes: float
    seconds: float


def result_of(title: str, run: views.Run, epochs: float) -> Result:
    """The row of a run that ended."""

    def get(name: str, calibrated: bool = False) -> float:
        value = score(run.scores, name, calibrated)
        return float("nan") if value is None else value

    return Result(
        title=title,
        accuracy=get("accuracy"),
        nll=get("nll"),
        ece=get("ece"),
        ece_after=get("ece", calibrated=True),
        epochs=epochs,
        wire_bytes=run.wire_bytes,
        seconds=(run.ended or 0.0) - (run.started or 0.0),
    )


def mean(title: str, results: Sequence[Result]) -> Result:
    """The mean of several rows."""
    values = zip(*(result[1:] for result in results), strict=True)
    return Result(title, *(fmean(column) for column in values))


def result_table(results: Sequence[Result]) -> Table:
    """The closing table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("on test images")
    for title in ("accuracy", "NLL", "ECE", "after temperature", "epochs", "sent", "time"):
        table.add_column(title, justify="right")
    for row in results:
        table.add_row(
            row.title,
            percent(row.accuracy),
            number(row.nll),
            percent(row.ece),
            percent(row.ece_after),
            f"{row.epochs:g}",
            size(row.wire_bytes),
            duration(row.seconds),
        )
    return table
