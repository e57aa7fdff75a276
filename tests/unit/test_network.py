"""Caps and windows of [network], by the clock on the wall."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from protos.errors import ConfigInvalid
from site_agent.config import NetworkSection, SiteConfig
from site_agent.link.network import Network, facts_of, in_words

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)

NIGHTS = """
[network]
up_mbit_per_s = 20
down_mbit_per_s = 100
[[network.windows]]
days = ["mon", "fri"]
hours = "20:00-06:00"
up_mbit_per_s = 200
[[network.windows]]
hours = "12:00-13:00"
down_mbit_per_s = 0
"""


def section(text: str) -> NetworkSection:
    return SiteConfig.parse(text).network


def at(day: int, hour: int, minute: int = 0) -> datetime:
    return MONDAY + timedelta(days=day, hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("when", "is_open", "up", "changes"),
    [
        (at(0, 19, 59), False, 20, at(0, 20)),
        (at(0, 20), True, 200, at(1, 6)),
        (at(1, 0), True, 200, at(1, 6)),  # past midnight it is still Monday's
        (at(1, 5, 59), True, 200, at(1, 6)),
        (at(1, 6), False, 20, at(1, 12)),
        (at(1, 12, 30), True, 20, at(1, 13)),
        (at(1, 20), False, 20, at(2, 12)),  # Tuesday has no night
        (at(4, 23), True, 200, at(5, 6)),
        (at(5, 1), True, 200, at(5, 6)),
        (at(6, 23), False, 20, at(7, 12)),
    ],
)
def test_a_window_opens_and_closes(
    when: datetime, is_open: bool, up: float, changes: datetime
) -> None:
    found = section(NIGHTS).at(when)
    assert (found.is_open, found.up_mbit_per_s) == (is_open, up)
    assert found.changes == changes.replace(tzinfo=None)


def test_the_first_open_window_s_caps_count_and_zero_is_no_cap() -> None:
    both = section(NIGHTS.replace("12:00-13:00", "19:00-21:00"))
    assert both.at(at(0, 20, 30)).up_mbit_per_s == 200
    assert both.at(at(0, 20, 30)).down_mbit_per_s == 100
    assert both.at(at(0, 19, 30)).down_mbit_per_s == 0


def test_without_windows_it_is_always_open() -> None:
    found = section("[network]\nup_mbit_per_s = 2.5\n").at(MONDAY)
    assert (found.is_open, found.up_mbit_per_s, found.changes) == (True, 2.5, None)


def test_a_week_ahead_is_found() -> None:
    text = '[[network.windows]]\ndays = ["mon"]\nhours = "00:00-24:00"\n'
    assert section(text).at(at(1, 0)).changes == at(7, 0).replace(tzinfo=None)
    assert section(text).at(at(0, 23, 59)).changes == at(1, 0).replace(tzinfo=None)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[network]\nup_mbit_per_s = -1\n", "network.up_mbit_per_s"),
        ("[network]\ndown_mbit_per_s = 0.01\n", "network.down_mbit_per_s"),
        ("[network]\nup_mbit = 1\n", "network.up_mbit"),
        ('[[network.windows]]\ndays = ["mon"]\n', "network.windows.0.hours"),
        ('[[network.windows]]\nhours = "08:00-08:00"\n', "network.windows.0.hours"),
        ('[[network.windows]]\nhours = "20-6"\n', "network.windows.0.hours"),
        (
            '[[network.windows]]\ndays = ["monday"]\nhours = "20:00-06:00"\n',
            "network.windows.0.days.0",
        ),
    ],
)
def test_a_wrong_key_is_named_with_its_path(text: str, key: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        SiteConfig.parse(text)
    assert caught.value.facts["key"] == key


def test_the_network_follows_the_clock() -> None:
    zone = timezone(timedelta(hours=9))
    now = [at(0, 19, 59).replace(tzinfo=zone)]
    network = Network(section(NIGHTS), lambda: now[0])
    assert not network.is_open
    assert network.up.bytes_per_s == 20e6 / 8
    before, after = network.look()
    assert before.rules == after.rules

    now[0] += timedelta(minutes=1)
    before, after = network.look()
    assert (before.is_open, after.is_open, network.opens) == (False, True, 0.0)
    assert network.up.bytes_per_s == 200e6 / 8
    assert network.down.bytes_per_s == 100e6 / 8

    network.apply(section(""))
    assert network.look()[1].is_open
    assert not network.is_paced
    assert network.up.bytes_per_s == network.down.bytes_per_s == 0


def test_it_says_what_is_allowed() -> None:
    closed, opened = (facts_of(section(NIGHTS).at(t)) for t in (at(1, 6), at(1, 12)))
    assert closed["open"] is False
    assert datetime.fromisoformat(closed["changes"]).tzinfo is not None
    assert "up 20 Mbit/s" in in_words(closed)
    assert "wait until Tue 12:00" in in_words(closed)
    assert "down without a cap" in in_words(opened)
    assert "Tue 13:00" in in_words(opened)
