"""The example tasks: who gets which pictures, and what the models are."""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "examples"))

import images
from example_data import pictures

TRAIN, TEST = 400, 50
# Sites of two releases must have the same base, so a change of this digest is a change of task.
FROZEN_BASE = "50ed24d32fa263631d57f8e054b4a31c582da1d9014a4652c78a92d7bd5d22d6"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A folder in Fashion-MNIST's format, whose pictures carry their own number in two pixels."""
    folder = tmp_path_factory.mktemp("numbered")
    first = 0
    for stem, count in (("train", TRAIN), ("t10k", TEST)):
        numbers = np.arange(first, first + count)
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 0, 0], pixels[:, 0, 1] = numbers % 256, numbers // 256
        labels = (numbers % 10).astype(np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            path = folder / f"{stem}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(content + values.tobytes()))
        first += count
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Such small models are slower on several threads, and tests run beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(task, params=None, **settings):
    return task(task.Params(**(params or {})), task.Settings(**settings))


def numbers(task, data) -> list[int]:
    """The numbers of the pictures in a data set of the numbered folder."""
    pixels = data.tensors[0][:, 0, 0, :2] * task.deviation + task.mean
    low, high = (pixels * 255).round().int().T
    return (low + 256 * high).tolist()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_train_val_proxy_and_test_share_no_picture(numbered, alpha):
    params = {"alpha": alpha, "subset": 300, "proxy": 40, "split_seed": 5, "val_fraction": 0.2}
    seen: list[int] = []
    for part in range(3):
        site = make(images.FashionMnist, params, root=numbered, verify=False, part=part, parts=3)
        train, val = numbers(site, site.train_data()), numbers(site, site.val_data())
        assert len(val) == pytest.approx(0.2 * (len(train) + len(val)), abs=1)
        for data in (site.train_data(), site.val_data(), site.test_data()):
            assert data.tensors[1].tolist() == [n % 10 for n in numbers(site, data)]
        assert numbers(site, site.test_data()) == list(range(TRAIN, TRAIN + TEST))
        seen += train + val
    assert len(seen) == len(set(seen)) == 300
    center = make(images.FashionMnist, params, root=numbered, verify=False)
    proxy = numbers(center, center.proxy_data())
    assert len(set(proxy)) == 40
    assert not set(proxy) & set(seen)
    assert max(seen + proxy) < TRAIN
    assert len(center.proxy_data().tensors) == 1  # no labels


def test_the_orchestrator_has_no_part(numbered):
    center = make(images.FashionMnist, root=numbered, verify=False)
    assert center.val_data() is None
    assert center.proxy_data() is None
    assert len(center.test_data()) == TEST
    with pytest.raises(images.PartMissingError, match="part = None"):
        center.train_data()
    with pytest.raises(images.PartMissingError, match=r"0 \.\.\. 2"):
        make(images.FashionMnist, root=numbered, verify=False, part=3, parts=3).train_data()


def test_a_picture_has_the_same_noise_at_whichever_site():
    params = {"noise": 0.3}
    alone = make(images.Digits, params, part=0, parts=1)
    pair = [make(images.Digits, params, part=part, parts=2) for part in range(2)]
    whole, shares = (
        {
            tuple(row.tolist())
            for task in tasks
            for data in (task.train_data(), task.val_data())
            for row in data.tensors[0]
        }
        for tasks in ([alone], pair)
    )
    assert whole == shares
    assert len(whole) == 1197


def test_noise_has_the_deviation_asked_for():
    clean, noisy = (
        make(images.Digits, {"noise": noise}).test_data().tensors[0] for noise in (0.0, 0.25)
    )
    noise = noisy - clean
    assert noise.std().item() == pytest.approx(0.25, rel=0.02)
    assert abs(noise.mean().item()) < 0.01
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize(
    ("params", "key"),
    [
        ({"alpha": -1}, "alpha"),
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"hidden": [0]}, "hidden"),
        ({"widht": 3}, "widht"),
    ],
)
def test_parameters_are_checked(params, key):
    with pytest.raises(ValidationError, match=key):
        images.Digits.Params(**params)


# ---------------------------------------------------------------------------------------- models


def n_values(model, *, trainable):
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trainable)


@pytest.mark.parametrize(
    ("task", "shape", "shared", "frozen"),
    [
        (images.FashionMnist, (1, 28, 28), 10_442, 0),
        (images.Digits, (64,), 4_810, 0),
        (images.DigitsLora, (64,), 5_898, 82_432),
    ],
)
def test_models_have_the_size_that_their_pages_say(task, shape, shared, frozen):
    model = make(task).model()
    assert n_values(model, trainable=True) == shared
    assert n_values(model, trainable=False) == frozen
    assert not list(model.buffers())
    assert model(torch.zeros(3, *shape)).shape == (3, 10)
    assert f"{shared:,}" in task.__doc__


def test_digits_take_other_widths():
    model = make(images.Digits, {"hidden": [128, 32]}).model()
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [
        (128, 64),
        (32, 128),
        (10, 32),
    ]


def frozen_digest(model) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def test_the_frozen_base_follows_from_its_seed_alone():
    task = make(images.DigitsLora)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert frozen_digest(task.model()) == FROZEN_BASE
    assert frozen_digest(make(images.DigitsLora, {"base_seed": 1}).model()) != FROZEN_BASE


def test_an_untrained_adapter_changes_nothing():
    layer = make(images.DigitsLora).model()[0]
    x = torch.rand(5, 64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        layer.up.fill_(0.5)
    expected = F.linear(x, layer.weight + layer.up @ layer.down, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def train(task, epochs, lr, batch_size=32):
    """Accuracy on the test set after some epochs of plain SGD."""
    torch.manual_seed(0)
    model = task.model()
    inputs, targets = task.train_data().tensors
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(batch_size):
            optimizer.zero_grad()
            task.loss(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
    inputs, targets = task.test_data().tensors
    with torch.no_grad():
        return model, (model(inputs).argmax(1) == targets).float().mean().item()


def test_digits_are_learnt():
    _, accuracy = train(make(images.Digits, part=0, parts=1), epochs=12, lr=0.1)
    assert accuracy > 0.9


def test_adapters_learn_and_the_base_stays():
    model, accuracy = train(make(images.DigitsLora, part=0, parts=1), epochs=6, lr=0.1)
    assert accuracy > 0.9
    assert frozen_digest(model) == FROZEN_BASE


@pytest.mark.skipif(
    not pictures.fashion_mnist_installed(),
    reason=f"Fashion-MNIST is not installed (Debian package {pictures.FASHION_MNIST_PACKAGE})",
)
def test_fashion_mnist_is_learnt():
    _, accuracy = train(
        make(images.FashionMnist, {"subset": 2000}, part=0, parts=1), epochs=4, lr=0.05
    )
    assert accuracy > 0.7
