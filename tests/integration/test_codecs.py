"""Wire codecs in a real federation: fewer bytes, and a residual that survives a restart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.views import Round
from tests.support.field import SITES, Field

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(240)]

PARAMETERS = 8 * 12 + 12 + 12 * 3 + 3 + 2
RAW = 4 * PARAMETERS

# top_k keeps 1 of 8 * 12, 12, 12 * 3, 3 and 2 values; the others hold in buckets of 256.
SENT = {"bf16": 2 * PARAMETERS, "int8": PARAMETERS + 20, "int4": 75 + 20, "top_k": 5 * 6}


@pytest.fixture
def field(real: Field) -> Iterator[Field]:
    yield real
    real.clear()
    real.federation.await_sites(SITES)


def rounds_of(field: Field, run: str, count: int) -> list[Round]:
    view = field.federation.wait(run, 180)
    assert view.state == "finished", view.reason
    rounds = field.federation.rounds(run)
    assert [len(r.missing) for r in rounds] == [0] * count
    return rounds


def config(field: Field, name: str, codec: str, rounds: int, **params: Any) -> dict[str, Any]:
    return field.config(
        name,
        rounds=rounds,
        cohort={"quorum": "all", "deadline_s": 120},
        strategy=[{"name": codec, **params}],
    )


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "top_k"])
def test_what_a_site_still_owes_survives_its_restart(field: Field, codec: str) -> None:
    """Round 2: the bits are those of a run without a restart, and not those without feedback."""
    federation = field.federation
    straight = federation.launch(config(field, f"{codec}-straight", codec, 2))
    forgetful = federation.launch(
        config(field, f"{codec}-forgetful", codec, 2, error_feedback=False)
    )
    expected = [r.model for r in rounds_of(field, straight, 2)]
    without = [r.model for r in rounds_of(field, forgetful, 2)]

    run = federation.launch(config(field, f"{codec}-restarted", codec, 1))
    rounds_of(field, run, 1)
    for site, restart in (("north", federation.stop_site), ("south", federation.kill)):
        restart(site)
        federation.start_site(site)
    federation.client.extend(run, 2)
    rounds = rounds_of(field, run, 2)
    assert [r.model for r in rounds] == expected
    assert expected[0] == without[0]
    assert expected[1] != without[1]


@pytest.mark.slow
def test_only_encoded_bytes_travel(field: Field) -> None:
    raw = field.federation.launch(field.config("raw", rounds=1))
    packed = {
        codec: field.federation.launch(config(field, f"packed-{codec}", codec, 1)) for codec in SENT
    }
    (before,) = rounds_of(field, raw, 1)
    for codec, run in packed.items():
        (after,) = rounds_of(field, run, 1)
        for plain, coded in zip(before.sites, after.sites, strict=True):
            assert plain.sent_bytes - coded.sent_bytes == RAW - SENT[codec], codec


def test_what_is_not_finite_is_refused_through_a_codec(field: Field) -> None:
    (field.switches["south"] / "fault").write_text("nan")
    run = field.federation.launch(field.config("nan-int8", rounds=1, strategy=[{"name": "int8"}]))
    assert field.federation.wait(run, 180).state == "finished"
    (round,) = field.federation.rounds(run)
    row = next(r for r in round.sites if r.site == "south")
    assert (row.state, row.error) == ("refused", "ContributionRefused")
    assert "site south, tensor unseen" in row.reason
