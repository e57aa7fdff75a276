"""Proxy data: where inputs come from at the orchestrator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save, save_file
from torch.nn import functional as F

from protos.errors import TaskFailed
from strategies.distillation.feddf import FedDF
from strategies.distillation.generated import generate
from strategies.distillation.proxy import CONDENSED, arrays, proxy_of
from tests.support.refinements import SITES, Proxy, refinement, site_state


def test_a_folder_gives_its_arrays_in_the_order_of_their_names(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.full((2, 4), 2.0))
    save_file({"inputs": torch.ones(3, 4)}, tmp_path / "a.safetensors")
    (tmp_path / "notes.txt").write_text("not an array")
    found = arrays(tmp_path, "feddf")
    assert found is not None
    assert found.tolist() == [[1.0] * 4] * 3 + [[2.0] * 4] * 2
    assert FedDF(steps=1, proxy=f"folder:{tmp_path}").refine(refinement())["samples"] == 5


def test_a_folder_that_holds_no_arrays_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match=r"there is no \.npy or"):
        proxy_of(refinement(), f"folder:{tmp_path}", 10, 4, "feddf")
    with pytest.raises(TaskFailed, match="no folder that can be read"):
        arrays(tmp_path / "gone", "feddf")
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(TaskFailed, match=r"x\.npy holds no array of inputs"):
        arrays(tmp_path, "feddf")


def test_condensed_examples_are_those_that_sites_sent() -> None:
    with pytest.raises(TaskFailed, match="no site has sent condensed examples"):
        proxy_of(refinement(), "condensed", 10, 4, "feddf")
    stored = save({"inputs": torch.ones(6, 4).half(), "targets": torch.zeros(6).long()})
    proxy = proxy_of(refinement(files={CONDENSED: stored}), "condensed", 5, 4, "feddf")
    assert proxy.size == 5
    assert proxy.inputs(torch.tensor([0, 4])).tolist() == [[1.0] * 4] * 2


def test_generated_inputs_are_what_a_site_takes_for_their_class() -> None:
    at = refinement()
    inputs = generate(at, 30, "feddf")
    assert inputs.shape == (30, 4)
    assert torch.equal(inputs, generate(refinement(), 30, "feddf"))
    losses = []
    for site, share in zip(SITES, inputs.tensor_split(3), strict=True):
        state = site_state(site)
        z = share @ state["weight"].T + state["bias"]
        losses.append(F.cross_entropy(z, torch.arange(10) % 3).item())
    assert max(losses) < 0.3, "noise would have more than 1"


def test_inputs_of_no_known_shape_cannot_be_generated() -> None:
    class Vague(Proxy):
        input_shape = ()

    with pytest.raises(TaskFailed, match="input_shape"):
        generate(refinement(Vague()), 3, "feddf")


@pytest.mark.parametrize("source", ["", "folder:", "folder:relative", "web", "task:x"])
def test_other_sources_are_refused(source: str) -> None:
    with pytest.raises(ValidationError):
        FedDF(proxy=source)
