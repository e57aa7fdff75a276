"""What the wire codecs share: a block for each tile, and error feedback.

How long a block is follows from the tile's size alone, so it is checked before anything is
allocated, and the orchestrator decodes any tile by itself.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from protos.digest import Bytes
from protos.errors import ContributionRefused, ManifestInvalid
from protos.manifest import TILE_ELEMENTS, Tile
from protos.plan import Plan
from protos.tensors import from_bytes, view_bytes
from strategies.context import Update
from strategies.protocol import Family, Strategy


class Codec(Strategy):
    """Packs parameters tile by tile; statistics and counters travel as they are.

    With error feedback a site packs p = update + residual and keeps what is lost for its next
    contribution. The residual is site state: fp32, one number for each parameter, stored with the
    contribution that it belongs to, and so found again under the plan's ``last_counted``: a
    contribution that was late or refused takes nothing of it along.

    Attributes:
        error_feedback: Whether what is lost is added to the next update.
        min_elements: Parameters with fewer elements travel as they are, in fp32 or wider.
    """

    family: ClassVar[Family] = "compression"
    wire_codec: ClassVar[bool] = True

    error_feedback: bool = True
    min_elements: int = Field(0, ge=0)

    # -- what a codec is -------------------------------------------------------------------------

    def nbytes(self, elements: int) -> int:
        """Bytes of the block of a tile of so many elements."""
        raise NotImplementedError

    def pack(self, values: Tensor, spare: Tensor, block: Tensor) -> None:
        """Pack a tile, and leave in ``values`` what is lost by it.

        NaN and infinity must not become finite: the orchestrator refuses them by name.

        Args:
            values: (elements,) fp32.
            spare: (2, elements) fp32, to be overwritten: fresh memory costs more than arithmetic.
            block: Where the packed tile goes, (nbytes(elements),) uint8.
        """
        raise NotImplementedError

    def unpack(self, block: memoryview, out: Tensor) -> None:
        """The inverse, into ``out``, (elements,) fp32; ``block`` has the right length.

        Raises:
            ValueError: The bytes are none that ``pack`` gives.
        """
        raise NotImplementedError

    # -- the two hooks ---------------------------------------------------------------------------

    def encode(
        self, update: Update, plan: Plan, state: dict[str, Tensor]
    ) -> tuple[Update, dict[str, Tensor]]:
        """Pack all parameters and take them out of ``update.tensors``, one after the other.

        What is held at once is the residuals, the blocks and one parameter. Residuals that are
        there are changed in place.

        Raises:
            ManifestInvalid: A parameter has another size than its residual; names site and tensor.
        """
        update.blocks, residuals = {}, dict(state)
        work = torch.empty(3, TILE_ELEMENTS)
        for name in update.parameters:
            # In a call of its own, so that one parameter is gone before the next one comes to be.
            blocks, kept = self._packed(name, update.tensors.pop(name), state, plan, work)
            update.blocks[name] = blocks
            if kept is not None:
                residuals[name] = kept
        return update, residuals

    def _packed(
        self, name: str, tensor: Tensor, state: dict[str, Tensor], plan: Plan, work: Tensor
    ) -> tuple[list[Bytes], Tensor | None]:
        flat = tensor.detach().reshape(-1)
        starts = range(0, len(flat), TILE_ELEMENTS)
        tiles = [flat[start : start + TILE_ELEMENTS] for start in starts]
        if len(flat) < self.min_elements:
            return [bytes(view_bytes(tile)) for tile in tiles], None
        if not self.error_feedback:
            return [self._block(work[0, : len(t)].copy_(t), work[1:]) for t in tiles], None
        kept = _residual(state, name, len(flat), plan)
        blocks = [
            self._block(kept[start : start + len(tile)].add_(tile), work[1:])
            for start, tile in zip(starts, tiles, strict=True)
        ]
        return blocks, kept

    def decode(self, block: bytes, tile: Tile) -> Tensor:
        """The values of a tile, (elements,), fp32 or wider.

        Raises:
            ContributionRefused: The block is not one that this codec makes of such a tile.
        """
        raw = tile.spec.elements < self.min_elements
        expected = tile.wire_nbytes if raw else self.nbytes(tile.elements)
        if len(block) != expected:
            raise self._refused(tile, f"{len(block)} bytes where {expected} belong")
        if raw:
            return from_bytes(block, tile.spec.wire_dtype, (tile.elements,))
        out = torch.empty(tile.elements)
        try:
            self.unpack(memoryview(block), out)
        except ValueError as error:
            raise self._refused(tile, str(error)) from None
        return out

    def _block(self, values: Tensor, spare: Tensor) -> Bytes:
        block = torch.empty(self.nbytes(len(values)), dtype=torch.uint8)
        self.pack(values, spare[:, : len(values)], block)
        return view_bytes(block)

    def _refused(self, tile: Tile, what: str) -> ContributionRefused:
        name = tile.spec.name
        return ContributionRefused(
            f"tensor {name}, elements {tile.start} to {tile.stop}: no block of {self.name}: {what}",
            tensor=name,
        )


def _residual(state: dict[str, Tensor], name: str, elements: int, plan: Plan) -> Tensor:
    kept = state.get(name)
    if kept is None:
        return torch.zeros(elements)
    if kept.shape != (elements,):
        raise ManifestInvalid(
            f"site {plan.site}: tensor {name} has {elements} elements, but the residual that is "
            f"remembered for it has {kept.numel()}",
            site=plan.site,
            tensor=name,
        )
    return kept


def rows(flat: Tensor, size: int) -> list[Tensor]:
    """(elements,) as matrices with rows of ``size``: the whole rows, then the shorter one."""
    whole = len(flat) // size * size
    parts = (flat[:whole].view(-1, size), flat[whole:].unsqueeze(0))
    return [part for part in parts if part.numel()]
