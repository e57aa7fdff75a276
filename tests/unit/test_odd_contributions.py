"""What an operator is told of a contribution that counts all the same."""

from __future__ import annotations

from orchestrator.ledger import ContributionRow
from orchestrator.rounds.gather import odd
from protos.contribution import Header


def told(trained_on: str, device: str, norm: float = 1.0) -> list[str]:
    header = Header(
        plan_id="r/3/1/train",
        work_digest="0" * 64,
        site="east",
        kind="train",
        base="1" * 64,
        manifest="2" * 64,
        index="3" * 64,
        examples=1,
        packages={"device": device},
    )
    row = ContributionRow(
        digest=header.digest,
        plan_id=header.plan_id,
        run="r",
        round=3,
        attempt=1,
        kind="train",
        site="east",
        work_digest=header.work_digest,
        header=header.encode(),
        signature=b"",
        fingerprint="",
        index=header.index,
        manifest=header.manifest,
        nbytes=4,
        norm=norm,
        received=0.0,
    )
    return odd(row, header, trained_on)


def test_a_site_whose_gpu_is_gone_is_named() -> None:
    (text,) = told("cuda", "cpu")
    assert "site east: it trained round 3 on cpu, and cuda before" in text
    assert 'device = "cuda"' in text


def test_the_same_device_and_a_first_round_are_nothing_odd() -> None:
    assert told("cpu", "cpu") == told("", "cuda") == []


def test_an_update_of_zero_is_named() -> None:
    (text,) = told("cpu", "cpu", norm=0.0)
    assert "site east: its update in round 3 is zero" in text
