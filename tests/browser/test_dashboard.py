"""The page as a person sees it: every chart drawn, nothing said on the console."""

from __future__ import annotations

import csv
import json
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from orchestrator.dashboard.app import serve
from tests.browser.conftest import PHONE, Look, Show
from tests.browser.drawing import (
    chart,
    expect_drawn,
    hover,
    no_overlaps,
    no_sideways_scroll,
    settle,
)
from tests.support.recorded_operator import RecordedOperator
from tests.support.recorded_run import Recording

FIRST_SCREEN = ("convergence", "loss", "nll", "ece", "spread", "change", "seconds", "now")
MULTIPLES = ("loss", "nll", "ece", "spread", "change", "seconds")
OTHERS = {
    "rounds": ("every-round", "timeline"),
    "sites": ("drift", "weight", "speed", "duration"),
    "calibration": ("reliability", "calibration-ece"),
    "strategies": (),
}


@pytest.fixture
def operator() -> RecordedOperator:
    return RecordedOperator(Recording())


@pytest.fixture
def url(operator: RecordedOperator, show: Show) -> Iterator[str]:
    with show(operator) as dashboard:
        yield dashboard.url


def opened(page: Page) -> Page:
    expect(page.locator("#link")).to_have_attribute("data-live", "true")
    expect(page.locator("#view > *").first).to_be_attached()
    return page


# ---------------------------------------------------------------------------------- a real run


def test_every_chart_is_drawn_from_a_real_run(finished_run: Any, look: Look) -> None:
    page = opened(look(f"{finished_run.dashboard_url}#/{finished_run.run}"))
    with urllib.request.urlopen(f"{finished_run.dashboard_url}api/runs/{finished_run.run}") as got:
        run = json.load(got)
    expect(page.locator("#headline")).to_have_text(run["headline"])
    for name in FIRST_SCREEN:
        expect_drawn(chart(page, name))
    for view, names in OTHERS.items():
        page.get_by_role("link", name=view.capitalize(), exact=True).click()
        for name in names:
            expect_drawn(chart(page, name))
        no_overlaps(page)
    for name in run["strategies"]:
        expect(page.locator(f'[data-strategy="{name}"]')).to_be_visible()


def test_a_real_run_is_readable_on_a_phone_in_the_dark(finished_run: Any, look: Look) -> None:
    url = f"{finished_run.dashboard_url}#/{finished_run.run}"
    page = opened(look(url, dark=True, viewport=PHONE))
    for name in FIRST_SCREEN:
        expect_drawn(chart(page, name))
    no_sideways_scroll(page)
    no_overlaps(page)


# ------------------------------------------------------------------------------- the recording


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_first_screen(look: Look, url: str, operator: RecordedOperator, dark: bool) -> None:
    page = opened(look(url, dark=dark))
    expect(page.locator("#headline")).to_have_text(operator.run("fashion").headline)
    expect(page.locator("#diagnosis")).to_contain_text("feddf was skipped in round 7")
    for name in FIRST_SCREEN:
        expect_drawn(chart(page, name))
    no_overlaps(page)
    paper = "rgb(20, 23, 26)" if dark else "rgb(253, 253, 252)"
    expect(page.locator("html")).to_have_css("background-color", paper)


@pytest.mark.parametrize("view", OTHERS)
def test_other_views(look: Look, url: str, view: str) -> None:
    page = opened(look(f"{url}#//{view}"))
    for name in OTHERS[view]:
        expect_drawn(chart(page, name))
    no_overlaps(page)


def test_strategies_report_numbers_and_reasons(look: Look, url: str) -> None:
    page = opened(look(f"{url}#//strategies"))
    for name in ("temperature.temperature", "feddf.kl_after", "self_distillation.kl"):
        expect_drawn(chart(page, name))
    expect(page.locator('[data-strategy="feddf"]')).to_contain_text(
        "Skipped in round 7: ran longer"
    )


def test_calibration_before_and_after_together_and_per_site(look: Look, url: str) -> None:
    page = opened(look(f"{url}#//calibration"))
    expect_drawn(chart(page, "calibration-coverage"))
    expect(chart(page, "reliability").locator(".diagrams svg")).to_have_count(2)
    table = page.locator('[data-table="judgement"]')
    for words in ("ECE", "AECE", "Class-wise ECE", "Coverage", "Set size"):
        expect(table.locator("thead")).to_contain_text(words)
    last = Recording().done[-1].scores
    before, after = (f"{100 * last[f'{name}.ece']:.1f}" for name in ("test", "test_calibrated"))
    expect(table.locator("tbody tr").first).to_contain_text(f"{before}\u202f% → {after}\u202f%")
    expect(table.locator("tbody tr")).to_have_count(4)
    expect(chart(page, "reliability")).to_contain_text("conformal quantile 0.83")
    expect(chart(page, "reliability")).not_to_contain_text("cell")


def test_teachers_share_a_chart_and_what_is_kept_is_drawn(
    look: Look, url: str, tmp_path: Path
) -> None:
    page = opened(look(f"{url}#//strategies"))
    teachers = chart(page, "feddf.teacher")
    expect_drawn(teachers)
    for site in ("north", "south", "east"):
        expect(teachers.locator(".readout")).to_contain_text(site)
    expect(page.locator('[data-strategy="feddf"]')).to_contain_text("CPU 5.2")
    tree = chart(page, "tree")
    expect(tree).to_contain_text("of 93.1\u202f% of inputs that it has not seen")
    expect(tree.locator("svg text", has_text="sends it right")).to_be_visible()
    assert tree.locator("svg path").count() > 60
    examples = chart(page, "examples")
    expect(examples).to_contain_text("sent in round 1: 10 from east, 10 from north, 10 from south")
    expect(examples).to_contain_text("may resemble single samples")
    expect(examples.locator("svg text", has_text="class 9")).to_be_visible()
    with page.expect_download() as started:
        tree.get_by_role("button", name="CSV:").click()
    started.value.save_as(tmp_path / "tree.csv")
    with (tmp_path / "tree.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 32
    assert rows[0]["path"] == "LLLLL"
    assert sum(float(row["share of samples"]) for row in rows) == pytest.approx(1)


@pytest.mark.parametrize("width", [360, 768, 1180])
def test_narrow_windows(look: Look, url: str, width: int) -> None:
    page = opened(look(url, viewport={"width": width, "height": 800}))
    for view in ("overview", *OTHERS):
        page.get_by_role("link", name=view.capitalize(), exact=True).click()
        expect(page.locator(".tabs [aria-current]")).to_have_text(view.capitalize())
        settle(page)
        no_sideways_scroll(page)
        no_overlaps(page)


def test_crosshair_is_shared_and_shows_all_values(look: Look, url: str) -> None:
    page = opened(look(url))
    expect_drawn(chart(page, "convergence"))
    hover(chart(page, "convergence"), 7 / 12.5)
    readout = chart(page, "convergence").locator(".readout")
    for words in ("round 7", "global", "north", "south", "east", "5 epochs"):
        expect(readout).to_contain_text(words)
    for name in MULTIPLES:
        expect(chart(page, name).locator(".readout")).to_contain_text("round 7")
    hover(chart(page, "nll"), 4 / 12.5)
    expect(readout).to_contain_text("round 4")


def test_crosshair_by_keyboard(look: Look, url: str) -> None:
    page = opened(look(url))
    expect_drawn(chart(page, "convergence"))
    plot = chart(page, "convergence").locator(".plot")
    plot.focus()
    plot.press("ArrowLeft")
    expect(chart(page, "convergence").locator(".readout")).to_contain_text("round 9")
    plot.press("ArrowLeft")
    expect(chart(page, "convergence").locator(".readout")).to_contain_text("round 8")
    expect(chart(page, "ece").locator(".readout")).to_contain_text("round 8")


def test_brush_zooms_every_chart_and_double_click_resets(look: Look, url: str) -> None:
    page = opened(look(url))
    figure = chart(page, "convergence")
    expect_drawn(figure)
    hover(figure, 5.6 / 12.5)
    page.mouse.down()
    hover(figure, 8.5 / 12.5)
    page.mouse.up()
    for name in ("convergence", "loss"):
        hover(chart(page, name), 0.16)
        expect(chart(page, name).locator(".readout")).to_contain_text("round 6")
    hover(figure, 0.5)
    figure.locator(".u-over").dblclick()
    hover(figure, 0.08)
    expect(figure.locator(".readout")).to_contain_text("round 1")


def test_axis_and_score_are_chosen_and_stand_in_the_address(look: Look, url: str) -> None:
    page = opened(look(url))
    page.get_by_role("button", name="bytes").click()
    page.get_by_label("Score", exact=True).select_option("val.nll")
    expect(page).to_have_url(f"{url}#/?x=bytes&metric=val.nll")
    expect_drawn(chart(page, "convergence"))
    last = Recording().done[-1].scores["val.nll"]
    expect(chart(page, "convergence").locator(".readout")).to_contain_text(f"global {last:.3f}")


def test_files_hold_the_numbers(look: Look, url: str, tmp_path: Path) -> None:
    page = opened(look(url))
    figure = chart(page, "convergence")
    expect_drawn(figure)
    for word in ("CSV", "SVG", "PNG"):
        with page.expect_download() as started:
            figure.get_by_role("button", name=f"{word}:").click()
        started.value.save_as(tmp_path / started.value.suggested_filename)
    with (tmp_path / "convergence.csv").open() as file:
        rows = list(csv.DictReader(file))
    done = Recording().done
    assert [row["round"] for row in rows] == [str(r.round) for r in done]
    assert [float(row["global"]) for row in rows] == [r.scores["test.accuracy"] for r in done]
    assert rows[3]["east"] == ""  # it was refused
    picture = ET.parse(tmp_path / "convergence.svg").getroot()
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}path")) > 10
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_round_appears_by_itself(look: Look, url: str, operator: RecordedOperator) -> None:
    page = opened(look(url))
    figure = chart(page, "convergence")
    figure.get_by_role("button", name="Table").click()
    rows = figure.locator(".numbers tbody tr")
    expect(rows).to_have_count(9)
    operator.commit()
    expect(rows).to_have_count(10)
    expect(page.locator("#headline")).to_contain_text("Round 11 of 12")
    expect(chart(page, "now")).to_contain_text("Round 11, now")
    expect_drawn(figure)


def test_a_refused_site_is_named_with_its_reason(look: Look, url: str) -> None:
    page = opened(look(f"{url}#//rounds/4"))
    row = chart(page, "timeline").locator('.row[data-site="east"]')
    expect(row).to_have_attribute("data-state", "refused")
    expect(row).to_contain_text("east sent NaN in conv2.weight")
    expect(row.get_by_role("button", name="copy")).to_be_visible()
    chart(page, "every-round").locator(".matrix").press("ArrowRight")
    expect(page.locator("h2.big")).to_have_text("Round 5 of 12 · committed")


def test_a_site_that_waits_for_its_window_says_until_when(
    look: Look, show: Show, operator: RecordedOperator
) -> None:
    with show(operator) as dashboard:
        page = opened(look(dashboard.url))
        current = operator.rounds("fashion")[-1]
        site, *others = current.sites
        waiting = site.model_copy(update={"state": "sending", "waits_until": time.time() + 3600})
        told = current.model_copy(update={"sites": (waiting, *others)})
        operator.tell(
            kind="round", run=told.run, round=told.round, data=told.model_dump(mode="json")
        )
        row = chart(page, "now").locator(f'.row[data-site="{site.site}"]')
        expect(row).to_contain_text("paused until")


def test_partial_late_and_unevaluated_work_and_a_release_are_told_apart(
    look: Look, show: Show, operator: RecordedOperator
) -> None:
    assert operator.recording is not None
    done = operator.recording.done
    north, south, east = done[-1].sites
    sites = (
        north.model_copy(update={"partial": True, "done": 3.4}),
        south.model_copy(update={"from_round": 8}),
        east.model_copy(update={"scores": {}}),
    )
    told = {"sites": sites, "unassessed": {"east": "its disk is full"}, "held": "worse than before"}
    done[-1] = done[-1].model_copy(update=told)
    with show(operator) as dashboard:
        page = opened(look(f"{dashboard.url}#//rounds/9"))
        expect(page.locator("#view")).to_contain_text(
            "Released after it was held: worse than before"
        )
        for site, words in (
            ("north", "partial: 3.4 of 10 epochs"),
            ("south", "10 epochs for round 8"),
            ("east", "did not evaluate the model: its disk is full"),
        ):
            row = chart(page, "timeline").locator(f'.row[data-site="{site}"]')
            expect(row).to_contain_text(words)
            expect(row).to_have_attribute("data-state", "counted")


def test_slider_goes_through_the_rounds(look: Look, url: str) -> None:
    page = opened(look(f"{url}#//calibration/3"))
    title = chart(page, "reliability").locator("h2")
    expect(title).to_have_text("Reliability after round 3")
    page.get_by_role("slider").press("ArrowRight")
    expect(title).to_have_text("Reliability after round 4")
    expect_drawn(chart(page, "reliability"))


def test_only_what_needs_someone_is_red(look: Look, show: Show, operator: RecordedOperator) -> None:
    with show(operator) as dashboard:
        page = opened(look(dashboard.url))
        headline = page.locator("#headline")
        expect(headline).to_have_css("color", "rgb(27, 29, 32)")
        run = operator.run("fashion").model_copy(
            update={"state": "paused", "needs_action": True, "headline": "Paused after round 9"}
        )
        operator.tell(kind="run", run=run.id, data=run.model_dump(mode="json"))
        expect(headline).to_have_text("Paused after round 9")
        expect(headline).to_have_css("color", "rgb(179, 38, 30)")


def test_empty_pages_teach(look: Look, show: Show) -> None:
    operator = RecordedOperator(None)
    with show(operator) as dashboard:
        page = opened(look(dashboard.url))
        for command in ("farflung invite north", "farflung-site join TOKEN", "farflung launch"):
            expect(page.locator("#view")).to_contain_text(command)
        no_overlaps(page)
        # The run that is launched now is shown without a reload.
        operator.recording = Recording(committed=0)
        run = operator.recording.run()
        operator.tell(kind="run", run=run.id, data=run.model_dump(mode="json"))
        expect(page.locator("#headline")).to_have_text(run.headline)
        expect(chart(page, "now")).to_contain_text("Round 1, now")
        expect(page.locator("#view")).to_contain_text("The charts begin when round 1 is committed")
        operator.commit()
        expect_drawn(chart(page, "convergence"))


def test_a_run_that_is_not_there_and_a_daemon_that_stops(look: Look) -> None:
    with serve(RecordedOperator(Recording())) as dashboard:
        page = opened(look(f"{dashboard.url}#/nothing-of-this-name"))
        expect(page.locator("#run-select")).to_have_value(Recording().id)
    # The browser reports refused connections on its console; here that is what is looked at.
    expect(page.locator("#link")).to_contain_text("not connected since")
    page.close()
    look.said[:] = [said for said in look.said if "ERR_CONNECTION_REFUSED" not in said]


@pytest.mark.timeout(240)
def test_64_sites_and_500_rounds(look: Look, show: Show) -> None:
    operator = RecordedOperator(Recording(500, 499, 64))
    with show(operator) as dashboard:
        page = look(dashboard.url)
        expect(chart(page, "seconds").locator("canvas")).to_be_visible(timeout=60_000)
        for name in FIRST_SCREEN:
            expect_drawn(chart(page, name))
        hover(chart(page, "convergence"), 0.5)
        readout = chart(page, "convergence").locator(".readout")
        expect(readout).to_contain_text("round 2")
        expect(readout.locator(".value")).to_have_count(3)  # the model, the lowest, the highest
        page.get_by_role("link", name="Rounds", exact=True).click()
        expect_drawn(chart(page, "every-round"))
        expect(chart(page, "timeline").locator(".row[data-site]")).to_have_count(64)
