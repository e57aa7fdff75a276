from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from protos.chunks import IndexWriter
from protos.manifest import CHUNK_BYTES
from site_agent.trainer.artefact import index_of
from site_agent.trainer.batches import MapBatches, TensorBatches, batches_of, cuts
from strategies.task import Task
from tests.support.sites import CPU, plan_of


@given(st.integers(1, 300), st.integers(1, 70))
def test_cuts_cover_everything_once_and_leave_no_batch_of_one(examples: int, size: int) -> None:
    found = cuts(examples, size)
    assert [i for start, stop in found for i in range(start, stop)] == list(range(examples))
    sizes = [stop - start for start, stop in found]
    assert all(n <= size + 1 for n in sizes)
    if examples > 1 and size > 1:
        assert min(sizes) > 1
    assert all(n == size for n in sizes[:-1])


class Plain(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.data[index]


@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 3))
def test_the_fast_path_gives_the_batches_of_the_slow_one(n: int, size: int, epoch: int) -> None:
    data = TensorDataset(torch.arange(n * 2.0).view(n, 2), torch.arange(n))
    fast, slow = (batches_of(d, Task(), size, CPU) for d in (data, Plain(data)))
    assert isinstance(fast, TensorBatches)
    assert isinstance(slow, MapBatches)
    plan = plan_of()
    for left, right in zip(fast.epoch(plan, epoch), slow.epoch(plan, epoch), strict=True):
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b)
    seen = torch.cat([targets for _, targets in fast.epoch(plan, epoch)])
    assert sorted(seen.tolist()) == list(range(n))


@given(st.lists(st.integers(0, CHUNK_BYTES + 3), max_size=4))
def test_an_index_without_a_file_is_that_of_the_file(sizes: list[int]) -> None:
    parts = [bytes([k % 251]) * size for k, size in enumerate(sizes)]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        writer = IndexWriter(Path(folder) / "x")
        for part in parts:
            writer.write(part)
        assert writer.finish("0" * 64) == index_of(parts, "0" * 64)
