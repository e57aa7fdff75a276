"""Tasks of the rows that measure more than a score, and where programs write what they measured."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from benchmarks.tasks.m5 import M5
from benchmarks.tasks.m5blends import LEVELS, M5BLENDS
from benchmarks.tasks.pictures import FASHION_MNIST, Data, pictures
from strategies import scores
from strategies.row import Row, rows


def test_blends_are_no_samples_and_have_two_classes() -> None:
    task = M5BLENDS(M5BLENDS.Params(seed=3, train=100, test=300))
    pictures, targets = task.test_data().tensors
    plain, labels = M5(M5.Params(seed=3, train=100, test=300)).test_data().tensors
    assert torch.equal(pictures[:, 0], plain)
    assert torch.equal(targets[:, 0], labels)
    level = -1 - targets[:, 1]
    assert sorted(set(level.tolist())) == list(range(LEVELS))
    share = 0.5 + 0.5 * level / LEVELS
    other = (pictures[:, 1] - share[:, None] * plain) / (1 - share)[:, None]
    found = torch.cdist(other, plain).argmin(dim=1)
    assert torch.cdist(other, plain).amin(dim=1).max() < 0.05
    assert (labels[found] != labels).all()
    assert sorted(found.tolist()) == list(range(300))

    model = task.model()
    outputs = task.forward(model, pictures)
    assert outputs.shape == (300, 10, 2)
    torch.testing.assert_close(outputs[..., 0], model(plain))
    whole = scores.scores(scores.sums_of(task, outputs, targets))
    alone = scores.scores(scores.sums_of(M5(), model(plain), labels))
    assert {name: whole[name] for name in alone} == pytest.approx(alone, rel=1e-4)


installed = pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed"
)


@installed
@pytest.mark.parametrize("row", rows().values(), ids=lambda row: row.method)
def test_every_row_runs_on_clothes_as_well(row: Row) -> None:
    kind = getattr(importlib.import_module(f"benchmarks.tasks.{row.task}"), row.task.upper())
    params, settings = row.run["task"].get("params", {}), kind.Settings(**row.sites[0].settings)
    own = kind(kind.Params(**params), settings)
    clothes = kind(kind.Params(**{**params, "data": "fashion-mnist"}), settings)
    assert len(clothes.train_data()) == pytest.approx(len(own.train_data()), rel=0.2)
    (pictures, labels), (others, theirs) = own.test_data()[:], clothes.test_data()[:]
    assert others.dtype == pictures.dtype
    assert others.std() == pytest.approx(pictures.std(), rel=0.6)
    assert theirs.unique().tolist() == labels.unique().tolist()
    with torch.no_grad():
        shapes = [
            task.forward(task.model(), x[:2]).shape
            for task, x in ((own, pictures), (clothes, others))
        ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("data", ["digits", pytest.param("fashion-mnist", marks=installed)])
def test_five_hundred_pictures_of_each_class(data: Data) -> None:
    pixels, labels = pictures(data)
    assert pixels.shape == (5000, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10
    assert len(np.unique(pixels.reshape(5000, -1), axis=0)) > 4900
    task = M5(M5.Params(data=data, train=30, test=300))
    assert task.test_data().tensors[0].shape == (300, 196)


def test_the_order_of_confidences_is_measured() -> None:
    task = M5BLENDS()
    level = torch.tensor([0, 3, 7, 19])
    targets = torch.stack([torch.tensor([1, 2, 3, 4]), -1 - level], dim=1)
    outputs = torch.zeros(4, 10, 2)
    outputs[:, 0, 0] = torch.tensor([3.0, 5.0, 1.0, 9.0])  # above the blend's by 2, 3, -2, 4.5
    outputs[:, 5, 1] = torch.tensor([1.0, 2.0, 3.0, 4.5])
    found = task.metrics(outputs, targets)
    assert float(found["rank_correlation"]) == 4.0
    assert float(found["above_blend"]) == 3.0
    swapped = task.metrics(outputs.flip(0), targets)
    assert float(swapped["rank_correlation"]) == -4.0
    assert task.metrics(outputs[..., 0], targets[:, 0]) == {}


def test_each_program_writes_between_marks_of_its_own() -> None:
    """Two with one number would overwrite each other's part of docs/evidence.md."""
    names = ("calibration", "co_learning", "compression", "distillation")
    programs = [importlib.import_module(f"benchmarks.{name}") for name in names]
    marks = [n for p in programs for name, n in vars(p).items() if name.endswith("MARK")]
    assert len(marks) >= len(names)
    assert len(set(marks)) == len(marks)
    assert not set(marks) & set(rows())
