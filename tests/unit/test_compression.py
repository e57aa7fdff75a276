"""The wire codecs: worked vectors, what is lost and kept, and bytes that are none of theirs."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from protos.errors import ContributionRefused, ManifestInvalid
from protos.manifest import TILE_ELEMENTS, Manifest, TensorSpec, Tile
from protos.plan import Plan, Schedule, TaskChoice, Work
from strategies.compression.codec import Codec
from strategies.context import Update
from strategies.registry import make
from strategies.stack import describe

CODECS = ("bf16", "int8", "int4", "top_k")
PLAN = Plan(
    run="r", round=1, attempt=1, site="north", task=TaskChoice(name="t"), work=Work(epochs=1),
    schedule=Schedule(lr=0.1),
)  # fmt: skip
every = pytest.mark.parametrize("name", CODECS)


def codec(name: str, **params: Any) -> Codec:
    made = make(name, params)
    assert isinstance(made, Codec)
    return made


def tiles_of(elements: int, dtype: str = "float32") -> tuple[Tile, ...]:
    return Manifest((TensorSpec("w", (elements,), dtype),)).tiles


def model_of(tensor: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.empty(tensor.shape, dtype=dtype)))
    return model


def encoded(
    strategy: Codec, tensor: Tensor, state: dict[str, Tensor] | None = None
) -> tuple[list[bytes], dict[str, Tensor]]:
    """The blocks of one parameter, and the next state."""
    update = Update({"w": tensor}, 1, 1, 1.0, model=model_of(tensor))
    update, after = strategy.encode(update, PLAN, state or {})
    assert update.blocks is not None
    return [bytes(block) for block in update.blocks["w"]], after


def sent(strategy: Codec, blocks: list[bytes], elements: int) -> Tensor:
    """What the orchestrator makes of them."""
    tiles = tiles_of(elements)
    parts = [strategy.decode(b, t) for b, t in zip(blocks, tiles, strict=True)]
    return torch.cat(parts) if parts else torch.empty(0)


def random(elements: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(elements, generator=draw) * 10 ** torch.randn(elements, generator=draw)


# ------------------------------------------------------------------------------- worked vectors


def test_int8_by_hand() -> None:
    """m = 254, scale = 2: codes are halves, ties to even."""
    values = torch.tensor([254.0, -254.0, 3.0, 5.0, 0.9, -101.0])
    (block,), state = encoded(codec("int8"), values)
    assert block == struct.pack("<f6b", 2.0, 127, -127, 2, 2, 0, -50)
    assert sent(codec("int8"), [block], 6).tolist() == [254, -254, 4, 4, 0, -100]
    assert state["w"].tolist() == pytest.approx([0, 0, -1, 1, 0.9, -1])


def test_int4_by_hand() -> None:
    """m = 14, scale = 2; codes 7, -1, 2 in the low nibbles, 0 and -4 in the high ones, plus 8."""
    values = torch.tensor([14.0, -2.0, 3.0, 0.5, -7.0])
    (block,), state = encoded(codec("int4"), values)
    assert block == struct.pack("<f3B", 2.0, 15 | 8 << 4, 7 | 4 << 4, 10)
    assert sent(codec("int4"), [block], 5).tolist() == [14, -2, 4, 0, -8]
    assert state["w"].tolist() == [0, 0, -1, 0.5, 1]


def test_each_bucket_has_its_scale() -> None:
    values = torch.cat([torch.full((16,), 1e-6), torch.full((16,), 1e6), torch.tensor([127.0])])
    (block,), _ = encoded(codec("int8", bucket=16), values)
    assert len(block) == 3 * 4 + 33
    torch.testing.assert_close(
        sent(codec("int8", bucket=16), [block], 33), values, rtol=1e-6, atol=0
    )


def test_top_k_by_hand() -> None:
    """k = ceil(0.25 * 6) = 2; of the equal ones the first is sent."""
    values = torch.tensor([1.0, -3.0, 0.0, 3.0, 3.0, -4.0])
    (block,), state = encoded(codec("top_k", fraction=0.25), values)
    assert block == struct.pack("<2f2H", -3.0, -4.0, 1, 5)
    assert state["w"].tolist() == [1, 0, 0, 3, 3, 0]
    assert sent(codec("top_k", fraction=0.25), [block], 6).tolist() == [0, -3, 0, 0, 0, -4]


def test_top_k_is_torch_s_by_piece() -> None:
    """Two whole pieces and a third in one tile, a short second tile."""
    elements = TILE_ELEMENTS + 131_072 + 777
    values = random(elements)
    strategy = codec("top_k")
    blocks, _ = encoded(strategy, values)
    found = sent(strategy, blocks, elements)
    for start in range(0, elements, 65536):
        piece = values[start : start + 65536]
        k = math.ceil(0.01 * len(piece))
        at = piece.abs().topk(k).indices
        expected = torch.zeros(len(piece)).index_put_((at,), piece[at])
        assert torch.equal(found[start : start + 65536], expected)


def test_bf16_by_hand() -> None:
    """1 + 2^-8 is halfway between two neighbours; the even one is 1."""
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -2.0])
    (block,), state = encoded(codec("bf16"), values)
    assert block == struct.pack("<3H", 0x3F80, 0x3F82, 0xC000)
    assert state["w"].tolist() == [2**-8, -(2**-8), 0]


@pytest.mark.parametrize(
    ("name", "at_least"), [("bf16", 2), ("int8", 3.9), ("int4", 7.7), ("top_k", 60)]
)
def test_so_many_times_fewer_bytes(name: str, at_least: float) -> None:
    blocks, _ = encoded(codec(name), random(300_000))
    assert 4 * 300_000 / sum(map(len, blocks)) >= at_least


# ------------------------------------------------------------------------------- error feedback


@every
@given(elements=st.integers(1, 2000), seed=st.integers(0, 2**32))
def test_what_is_sent_and_what_is_kept_make_the_update(name: str, elements: int, seed: int) -> None:
    strategy, values = codec(name), random(elements, seed)
    blocks, state = encoded(strategy, values)
    found = sent(strategy, blocks, elements)
    assert torch.equal(state["w"], values - found)


@every
def test_the_residual_comes_with_the_next_update(name: str) -> None:
    """Over rounds the sum of what is sent follows the sum of what was meant; without feedback not."""
    meant, distances = random(5000), []
    for feedback in (True, False):
        strategy, state, total = codec(name, error_feedback=feedback), {}, torch.zeros(5000)
        for _ in range(20):
            blocks, state = encoded(strategy, meant.clone(), state)
            total += sent(strategy, blocks, 5000)
        distances.append(float((total - 20 * meant).norm()))
        if feedback:
            torch.testing.assert_close(total + state["w"], 20 * meant, rtol=1e-4, atol=1e-3)
        else:
            assert not state
    assert distances[0] < distances[1]


@every
def test_what_the_plan_does_not_cover_keeps_its_residual(name: str) -> None:
    _, state = encoded(codec(name), random(50), {"elsewhere": torch.ones(3)})
    assert state["elsewhere"].tolist() == [1, 1, 1]


@every
def test_another_size_than_the_residual_is_refused_by_name(name: str) -> None:
    with pytest.raises(ManifestInvalid, match=r"site north: tensor w has 50 elements.*has 3"):
        encoded(codec(name), random(50), {"w": torch.zeros(3)})


# ------------------------------------------------------------------------------- what there is


@every
def test_scalars_empty_tensors_and_odd_tiles(name: str) -> None:
    strategy = codec(name)
    assert encoded(strategy, torch.empty(0, 3))[0] == []
    for tensor in (torch.tensor(-2.0), torch.zeros(7), random(TILE_ELEMENTS + 1).view(1, -1)):
        blocks, state = encoded(strategy, tensor)
        elements = tensor.numel()
        assert [len(b) for b in blocks] == [strategy.nbytes(t.elements) for t in tiles_of(elements)]
        assert torch.equal(sent(strategy, blocks, elements) + state["w"], tensor.flatten())


@every
def test_only_parameters_are_packed(name: str) -> None:
    """Tied ones under the name that travels, half precision models in fp32; buffers stay."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
            self.tied = self.first
            self.norm = nn.BatchNorm1d(4)

    model = Net()
    manifest = describe(model, [], [])
    tensors = {t.name: torch.ones(t.shape) for t in manifest}
    update = Update(dict(tensors), 1, 1, 1.0, model=model)
    update, state = codec(name).encode(update, PLAN, {})
    packed = {t.name for t in manifest if t.kind == "parameter"}
    assert packed == {"first.weight", "first.bias", "norm.weight", "norm.bias"}
    assert set(update.blocks or {}) == set(state) == packed
    assert set(update.tensors) == set(tensors) - packed


@every
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_parameters_travel_as_they_are(name: str, dtype: str) -> None:
    strategy = codec(name, min_elements=11)
    values = random(10).to(getattr(torch, dtype))
    (block,), state = encoded(strategy, values)
    (tile,) = tiles_of(10, dtype)
    assert torch.equal(strategy.decode(block, tile), values)
    assert not state
    with pytest.raises(ContributionRefused, match="tensor w"):
        strategy.decode(block[:-1], tile)


@every
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 1e-37, 1e30, 3e38])
def test_any_magnitude_is_finite_and_nothing_is_lost(name: str, scale: float) -> None:
    values = torch.tensor([1.0, -0.3, 0.01, 0.0] * 5) * scale
    strategy = codec(name)
    (block,), state = encoded(strategy, values)
    found = sent(strategy, [block], 20)
    assert found.isfinite().all()
    assert torch.equal(state["w"], values - found)


@every
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 300_000])
def test_nan_and_infinity_arrive(name: str, poison: float, at: int) -> None:
    """Else the orchestrator would count what it has to refuse."""
    values = random(300_001)
    values[at] = poison
    blocks, _ = encoded(codec(name), values)
    assert not sent(codec(name), blocks, 300_001).isfinite().all()


@every
def test_fp64_beyond_fp32_is_not_hidden(name: str) -> None:
    (block,), _ = encoded(codec(name), torch.tensor([1e300, 1.0], dtype=torch.float64))
    assert not sent(codec(name), [block], 2).isfinite().all()


# ------------------------------------------------------------------------------- strange blocks


def damaged(block: bytes) -> Iterator[bytes]:
    yield b""
    yield block[:-1]
    yield block + b"\0"
    yield block * 1000


@every
def test_a_block_of_another_length_is_refused(name: str) -> None:
    strategy = codec(name)
    (block,), _ = encoded(strategy, random(500))
    (tile,) = tiles_of(500)
    for wrong in damaged(block):
        with pytest.raises(
            ContributionRefused, match=f"tensor w, elements 0 to 500: no block of {name}"
        ):
            strategy.decode(wrong, tile)


@every
@given(data=st.data())
def test_any_bytes_of_the_right_length_are_values_or_refused(
    name: str, data: st.DataObject
) -> None:
    strategy, (tile,) = codec(name), tiles_of(40)
    size = strategy.nbytes(40)
    block = data.draw(st.binary(min_size=size, max_size=size))
    with suppress(ContributionRefused):
        assert strategy.decode(block, tile).shape == (40,)


@pytest.mark.parametrize("positions", [(1, 1), (5, 1), (1, 6), (65535, 65535)])
def test_positions_that_make_no_sense_are_refused(positions: tuple[int, int]) -> None:
    block = struct.pack("<2f2H", 1.0, 2.0, *positions)
    with pytest.raises(ContributionRefused, match="positions"):
        codec("top_k", fraction=0.25).decode(block, tiles_of(6)[0])


# ------------------------------------------------------------------------------- the same bits


@every
def test_neither_the_update_nor_the_tiling_changes_the_bits(name: str) -> None:
    values = random(TILE_ELEMENTS + 70_000)
    kept = values.clone()
    whole, _ = encoded(codec(name), values)
    assert torch.equal(values, kept)
    first, _ = encoded(codec(name), values[:TILE_ELEMENTS])
    second, _ = encoded(codec(name), values[TILE_ELEMENTS:])
    assert whole == first + second
