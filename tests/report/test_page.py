"""The report in a real browser: it must draw without a complaint, obey the slider and the keys, and be legible."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.commands import done
from tests.report.browser import CHROMIUM, Browser, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")

CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
PLACE = """(() => {
  const host = document.getElementById("front-chart"), first = data.front.stops[0].predicted;
  host.scrollIntoView({ block: "center", behavior: "instant" });
  const { xaxis, yaxis } = host._fullLayout, box = host.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.c2p(first.latency_ms), box.top + yaxis._offset + yaxis.c2p(first.miou)];
})()"""
"""Where on the screen the first plan of the front is drawn."""


@pytest.fixture(scope="module")
def benched(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with everything that a report can show."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("report") / "workspace"))
    done("-C", folder, "bench", folder / "host.mess", "--split", "test", "--passes", "1")
    done("-C", folder, "report")
    return folder


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@pytest.fixture
def page(window: Browser, benched: Path) -> Browser:
    """The report, freshly loaded."""
    window.complaints.clear()
    window.asked_for.clear()
    window.show(benched / "report.html")
    return window


def stops(benched: Path) -> list[dict[str, Any]]:
    """Every point of the front as the plan file has it, and the chosen plan, the most accurate first."""
    content = json.loads((benched / "plans" / "host.json").read_text())
    chosen = {name: content["plan"][name] for name in ("stages", "precision", "predicted")}
    points = [{name: point[name] for name in chosen} for point in content["front"]]
    if chosen not in points:
        points.append(chosen)
    return sorted(points, key=lambda point: (-point["predicted"]["miou"], point["predicted"]["latency_ms"]))


def tiles(page: Browser) -> str:
    text = page.value("document.getElementById('tiles').innerText")
    assert isinstance(text, str)
    return text


class TestTheReport:
    def test_draws_without_a_complaint_and_asks_for_nothing(self, page: Browser) -> None:
        assert page.complaints == []
        assert {re.split(r"[:,;]", address)[0] for address in page.asked_for} <= {"file", "data", "blob"}
        assert len([address for address in page.asked_for if address.startswith("file:")]) == 1
        drawn = page.value("[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('svg path').length)")
        assert len(drawn) >= 7
        assert min(drawn) > 0

    def test_every_image_decodes(self, page: Browser) -> None:
        sizes = page.value(
            "Promise.all([...document.images].map("
            "(i) => i.decode().then(() => [i.naturalWidth, i.width, i.alt.length])))"
        )
        assert len(sizes) >= 9
        assert all(min(size) > 0 for size in sizes)

    def test_the_slider_holds_every_point_of_the_front_and_shows_its_figures(
        self, page: Browser, benched: Path
    ) -> None:
        expected = stops(benched)
        assert page.value("document.getElementById('stop').max") == str(len(expected) - 1)
        held = page.value(
            "data.front.stops.map((s) => [s.precision, s.predicted, s.stages.map((t) => [t.head, t.cut])])"
        )
        for (precision, predicted, stages), point in zip(held, expected, strict=True):
            assert precision == point["precision"]
            assert predicted == point["predicted"]
            assert stages == [[stage["head"], stage["cut"]] for stage in point["stages"]]
        for index, point in enumerate(expected):
            page.value(
                f"(() => {{ const s = document.getElementById('stop'); s.value = {index}; "
                "s.dispatchEvent(new Event('input', { bubbles: true })); })()"
            )
            assert f"{point['predicted']['miou']:.2f} %" in tiles(page)
            heads = page.value("[...document.querySelectorAll('#stages h3')].map((h) => h.textContent)")
            assert heads == [
                f"Stage {i} = network exit {stage['head'][4]}: {stage['head']}"
                for i, stage in enumerate(point["stages"], start=1)
            ]
        assert page.complaints == []

    def test_keys_move_the_slider_and_the_plan_with_it(self, page: Browser) -> None:
        last = int(page.value("document.getElementById('stop').max"))
        assert last >= 1, "the front should have more than one plan"
        focused = []
        for _ in range(30):
            page.press("Tab", 9)
            focused.append(page.value("document.activeElement.id"))
            if focused[-1] == "stop":
                break
        assert focused[-1] == "stop", focused
        page.press("Home", 36)
        first = tiles(page), page.value("document.getElementById('shown').textContent")
        page.press("ArrowRight", 39)
        assert (tiles(page), page.value("document.getElementById('shown').textContent")) != first
        page.press("End", 35)
        assert page.value("document.getElementById('stop').value") == str(last)
        assert "% mIoU" in page.value("document.getElementById('stop').getAttribute('aria-valuetext')")
        ring = page.value("document.getElementById('front-chart').data.at(-1).x[0]")
        assert ring == page.value("data.front.stops.at(-1).predicted.latency_ms")

    def test_a_click_on_a_point_or_a_row_shows_its_plan(self, page: Browser) -> None:
        page.value("show(data.front.stops.length - 1)")
        x, y = page.value(PLACE)
        page.click(x, y)
        assert page.value("document.getElementById('stop').value") == "0"
        page.value("document.querySelector('#front-table button[data-stop=\"1\"]').click()")
        assert page.value("document.getElementById('stop').value") == "1"
        assert page.value("document.querySelector('#front-table [aria-current]').dataset.stop") == "1"

    def test_what_a_screen_reader_is_told_has_names(self, page: Browser) -> None:
        page.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        told = page.names()
        for role in ("slider", "image", "img", "button", "link", "region", "navigation", "table"):
            names = [name for kind, name in told if kind == role]
            assert all(name.strip() for name in names), (role, names)
        assert next(name for kind, name in told if kind == "slider").startswith("--max-err:")
        assert sum(kind in ("image", "img") and "mIoU" in name for kind, name in told) >= 1
        assert [kind for kind, _ in told if kind in ("main", "banner", "contentinfo")] == [
            "banner",
            "main",
            "contentinfo",
        ]
        levels = page.value("[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))

    @pytest.mark.parametrize("dark", [False, True])
    def test_text_has_the_contrast_of_wcag_aa(self, window: Browser, benched: Path, dark: bool) -> None:
        window.show(benched / "report.html", dark=dark)
        window.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert window.value("getComputedStyle(document.body).backgroundColor") == (
            "rgb(16, 21, 26)" if dark else "rgb(255, 255, 255)"
        )
        assert window.value(CONTRAST) == []

    def test_nothing_sticks_out_on_a_phone(self, window: Browser, benched: Path) -> None:
        window.show(benched / "report.html", width=360, height=740)
        assert window.value("document.documentElement.scrollWidth") == 360
        wide = window.value(
            "Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.getBoundingClientRect().right))"
        )
        assert wide <= 360

    def test_prints_in_light_colours_within_the_sheet(self, window: Browser, benched: Path) -> None:
        window.complaints.clear()
        window.show(benched / "report.html", dark=True)
        assert window.printed().startswith(b"%PDF")
        window.value("dispatchEvent(new Event('beforeprint'))")
        assert window.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert window.value("document.querySelector('#front-chart .main-svg').getBoundingClientRect().width") <= 704
        window.value("dispatchEvent(new Event('afterprint'))")
        assert window.value("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 26)"
        assert window.complaints == []


def test_estimates_are_told_apart_on_sight(window: Browser, benched: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(benched, tmp_path / "workspace"))
    table = folder / "latency" / "host.json"
    content = json.loads(table.read_text())
    for entry in content["entries"]:
        if entry["graph"] in ("segment-0-1", "head-exit1.fcn-crm1-b0"):
            entry.update(source="estimated", error=1.5)
    table.write_text(json.dumps(content))
    done("-C", folder, "report")
    window.complaints.clear()
    window.show(folder / "report.html")
    cells = window.value("document.getElementById('segments-chart').data[0].text.flat().filter(Boolean)")
    assert [cell.startswith("≈") for cell in cells] == [True] + [False] * (len(cells) - 1)
    assert window.value("document.getElementById('segments-chart').layout.shapes.length") == 1
    patterns = window.value("document.getElementById('heads-chart').data[0].marker.pattern.shape")
    assert patterns.count("/") == 1
    assert "estimated, off by a factor of up to 1.50" in window.value(
        "document.getElementById('costs-table').textContent"
    )
    assert window.complaints == []


def test_a_plan_without_early_exits_shows_no_threshold(page: Browser) -> None:
    single = page.value("front.stops.findIndex((stop) => stop.stages.length === 1)")
    assert single >= 0, "the front should have a plan of one exit"
    page.value(f"show({single})")
    sure = page.value("document.getElementById('sure').innerText")
    assert "no image is compared with a threshold" in sure
    assert "confidence threshold" not in sure
    assert page.value("document.querySelectorAll('#sure .chart').length") == 0
    page.value("show(front.stops.findIndex((stop) => stop.stages.length > 1))")
    assert "confidence threshold" in page.value("document.getElementById('sure').innerText")
    assert page.complaints == []


def test_a_report_of_latencies_alone_and_a_comparison_draw_without_a_complaint(
    window: Browser, benched: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(benched, tmp_path / "workspace"))
    shutil.rmtree(folder / "plans")
    done("-C", folder, "report")
    bundle, page = benched / "host.mess", tmp_path / "compare.html"
    done("-C", benched, "compare", "host", bundle, "-o", page)
    window.complaints.clear()
    window.show(folder / "report.html")
    window.show(page)
    assert window.complaints == []
    plan = json.loads((benched / "plans" / "host.json").read_text())["plan"]
    cells = window.value("document.getElementById('figures').innerText")
    assert cells.count(f"{plan['predicted']['latency_ms']:.2f} measured") == 2
    assert window.value("document.querySelectorAll('#fronts .scatterlayer .trace').length") == 6
    assert window.value(CONTRAST) == []
