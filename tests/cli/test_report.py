"""`peftkit report` and the page that it writes, opened in a real browser where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftkit.report import write_report
from tests.conftest import Result
from tests.report_runs import EVIL, write_comparison, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Page

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of one run, of three, and of a comparison."""
    root = tmp_path_factory.mktemp("reports")
    runs = [write_run(root / f"run{number}", accuracy=0.9 - 0.1 * number) for number in range(2)]
    runs.append(write_run(root / "run2", rate=0.5, losses={1: 50.0}, accuracy=0.6))
    failed = write_run(root / "run3", status={"state": "failed", "step": 3, "error": EVIL, "exit_code": 5})
    sources = {"one": runs[:1], "several": [*runs, failed], "compare": [write_comparison(root / "compare")]}
    return {name: write_report(folders, root / f"{name}.html") for name, folders in sources.items()}


@pytest.fixture
def show(open_page: Callable[..., Page], pages: dict[str, Path]) -> Open:
    """Open a report by name; no request may leave the page."""

    def opened(name: str, width: int = 1200, **options: Any) -> Page:
        address = pages[name].as_uri()
        return open_page(
            address,
            lambda url: url == address or url.startswith("data:"),
            viewport={"width": width, "height": 800},
            **options,
        )

    return opened


@pytest.mark.parametrize("name", ["one", "several", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_phone_and_has_headings_in_order(show: Open, name: str, scheme: str) -> None:
    page = show(name, 360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    levels = [int(level) for level in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName[1])")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.locator("main").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_stands_on(show: Open, scheme: str) -> None:
    page = show("several", color_scheme=scheme)
    for selector in (
        "body",
        ".quiet",
        ".remark.odd b",
        ".remark.bad b",
        ".remark.good b",
        "a[href]",
        ".plot .y span",
        "summary",
    ):
        ink, paper = page.locator(selector).first.evaluate(
            """element => {
                const inks = getComputedStyle(element).color;
                while (getComputedStyle(element).backgroundColor.endsWith(', 0)')) element = element.parentElement;
                return [inks, getComputedStyle(element).backgroundColor];
            }"""
        )
        assert contrast(ink, paper) >= 4.5, selector


def contrast(one: str, other: str) -> float:
    """Contrast of two CSS colours, as WCAG 2.2 (relative luminance) defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_run_is_switched_off_in_all_charts_and_the_axes_follow(show: Open) -> None:
    page = show("several")
    lines, ticks = page.locator("g[data-key=run2]"), page.locator("[data-chart=loss] .y")
    assert lines.count() > 3
    assert "40" in ticks.inner_text()
    page.locator("button[data-key=run2]").click()
    assert page.locator("button[data-key=run2]").get_attribute("aria-pressed") == "false"
    assert page.locator("g[data-key=run2]:visible").count() == 0
    assert ticks.inner_text().split() == ["0", "0.5", "1", "1.5", "2"]
    page.locator("button[data-key=run2]").click()
    assert page.locator("g[data-key=run2].is-off").count() == 0
    assert "40" in ticks.inner_text()


def test_runs_are_sorted_by_any_column_either_way_and_filtered(show: Open) -> None:
    page = show("several")
    table = page.locator("table[data-filter=Runs]")
    header = table.locator("th", has_text="Accuracy, validation")
    names = table.locator("tbody tr:visible th")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert names.first.inner_text().strip() == "run2"
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert names.first.inner_text().strip() == "run0"
    page.get_by_label("Filter runs").fill("fail")
    assert [text.strip() for text in names.all_inner_texts()] == ["run3"]
    assert page.locator("output").first.inner_text() == "1 of 4 rows"


def test_a_chart_is_smoothed_put_on_a_log_scale_and_read_by_keyboard(show: Open) -> None:
    page = show("one")
    loss = page.locator("[data-chart=loss]")
    line = loss.locator("g[data-key=train] .line:not(.raw)")
    drawn = [line.get_attribute("d")]
    loss.get_by_role("button", name="Log scale").click()
    drawn.append(line.get_attribute("d"))
    loss.get_by_label("Smoothing").fill("0.8")
    drawn.append(line.get_attribute("d"))
    assert len(set(drawn)) == 3
    assert loss.locator(".raw").count() == 2
    area = loss.locator(".area")
    area.focus()
    area.press("End")
    assert str(area.get_attribute("aria-valuetext")).startswith("step 40: validation 1.2, training 0.05")
    loss.locator("button[data-key=train]").click()
    area.press("Home")
    assert area.get_attribute("aria-valuetext") == "step 0: validation 2"


def test_the_pointer_reads_values_off_a_chart(show: Open) -> None:
    page = show("one")
    area = page.locator("[data-chart=accuracy] .area")
    area.scroll_into_view_if_needed()
    area.hover(position={"x": 5, "y": 50})
    assert "step 0" in area.locator(".tip").inner_text()
    page.mouse.move(0, 0)
    assert area.locator(".tip").is_hidden()


def test_every_chart_has_a_table_and_nothing_is_hidden_in_print(show: Open) -> None:
    page = show("one")
    assert page.locator("figure.chart").count() == page.locator("figure.chart table").count() == 6
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".settings:visible, .filter:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"


def test_the_labels_of_a_pareto_chart_do_not_overlap(show: Open) -> None:
    for width in (360, 1200):
        page = show("compare", width)
        boxes = [label.bounding_box() for label in page.locator(".point b").all()]
        assert len(boxes) == 8
        for number, one in enumerate(boxes):
            for other in boxes[:number]:
                assert one is not None
                assert other is not None
                apart = [
                    abs(one[axis] - other[axis]) >= min(one[size], other[size]) - 1
                    for axis, size in (("x", "width"), ("y", "height"))
                ]
                assert any(apart), (width, one, other)


def test_the_page_is_whole_without_script(show: Open) -> None:
    page = show("several", java_script_enabled=False)
    assert page.locator("g .line").first.is_visible()
    assert page.locator("table").first.is_visible()
    assert page.locator("input").count() == 0


def test_the_command_tells_where_it_wrote_and_what_it_found(tmp_path: Path, cli: Callable[..., Result]) -> None:
    run = write_run(tmp_path / "run")
    result = cli("report", run, "--json", "--png", tmp_path / "pictures").json
    assert result["report"] == str(run / "report.html")
    assert result["runs"][0]["metrics"]["validation"]["accuracy"] == 0.75
    assert (tmp_path / "pictures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = cli("report", run, write_run(tmp_path / "other"), "--output", tmp_path / "both.html").out
    assert "good: Trained and certified" in said
    assert "both.html (" in said


def test_what_cannot_be_reported_is_refused_before_a_file_is_written(tmp_path: Path, cli: Callable[..., Result]) -> None:
    run = write_run(tmp_path / "run")
    assert cli("report", tmp_path / "nothing").code == 7
    assert cli("report", run, "--output", tmp_path).code == 2
    assert cli("report", run, run).code == 2
    (tmp_path / "file").write_text("")
    assert cli("report", run, "--png", tmp_path / "file").code == 4
    assert not (run / "report.html").exists()


def test_train_ends_with_a_report(cls_run: Path) -> None:
    html = (cls_run / "report.html").read_text(encoding="utf-8")
    for part in ("Trained and certified", "Parameters by module", "Rows by split", "Confusion matrix"):
        assert part in html


def test_a_report_that_cannot_be_written_does_not_fail_a_run_that_is_trained(
    cls_recipe: dict[str, Any],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(sources: list[Path], output: Path) -> Path:
        raise OSError("no room")

    monkeypatch.setattr("peftkit.commands.train.write_report", fail)
    result = cli("train", write_recipe(cls_recipe), "--output", tmp_path / "run")
    assert result.code == 0
    assert "note: the report could not be written: OSError: no room" in result.err
    assert re.search(r"^loss: \S+ [▁-█]{6} \S+$", result.out, re.MULTILINE)
    assert "report:" not in result.out
