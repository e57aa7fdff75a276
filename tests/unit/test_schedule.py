import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.plan import Schedule
from strategies.schedule import learning_rate, progress_at


def schedule(
    shape: str, lr: float = 0.4, decay: float = 0.25, granularity: str = "step"
) -> Schedule:
    return Schedule.model_validate(
        {"shape": shape, "lr": lr, "decay": decay, "granularity": granularity}
    )


@pytest.mark.parametrize("shape", ["exp", "cosine"])
def test_starts_at_the_peak_and_ends_at_its_decayed_value(shape: str) -> None:
    assert learning_rate(schedule(shape), 0.0) == 0.4
    assert learning_rate(schedule(shape), 1.0) == pytest.approx(0.1, abs=1e-15)


def test_half_way_down() -> None:
    assert learning_rate(schedule("exp"), 0.5) == pytest.approx(0.2, abs=1e-15)
    assert learning_rate(schedule("cosine"), 0.5) == pytest.approx(0.25, abs=1e-15)


def test_triangle_peaks_in_the_middle() -> None:
    triangle = schedule("triangular")
    assert [learning_rate(triangle, u) for u in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.4, 0.1])
    assert learning_rate(triangle, 0.25) == pytest.approx(learning_rate(triangle, 0.75))


@given(
    shape=st.sampled_from(["exp", "cosine", "triangular", "constant"]),
    lr=st.floats(1e-6, 10),
    decay=st.floats(1e-3, 1),
    progress=st.floats(-1, 2),
)
def test_stays_between_floor_and_peak(shape: str, lr: float, decay: float, progress: float) -> None:
    rate = learning_rate(schedule(shape, lr, decay), progress)
    assert lr * decay * (1 - 1e-12) <= rate <= lr * (1 + 1e-12)
    assert rate == learning_rate(schedule(shape, lr, decay), min(max(progress, 0.0), 1.0))


@given(shape=st.sampled_from(["exp", "cosine"]), u=st.floats(0, 1), v=st.floats(0, 1))
def test_falls_monotonically(shape: str, u: float, v: float) -> None:
    low, high = sorted((u, v))
    falling = schedule(shape)
    assert learning_rate(falling, low) >= learning_rate(falling, high)


@pytest.mark.parametrize("shape", ["exp", "cosine", "triangular", "constant"])
def test_without_decay_every_shape_is_constant(shape: str) -> None:
    assert {learning_rate(schedule(shape, decay=1.0), u / 7) for u in range(8)} == {0.4}


def test_granularity() -> None:
    by_step, by_epoch = schedule("exp"), schedule("exp", granularity="epoch")
    assert [progress_at(by_step, s, 8, 4) for s in range(8)] == [s / 8 for s in range(8)]
    assert [progress_at(by_epoch, s, 8, 4) for s in range(8)] == [0.0] * 4 + [0.5] * 4
    assert progress_at(by_step, 0, 0, 1) == 0.0
