"""Whoever works in Python or a notebook can do what the commands do, and sees what they print."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mess_compile import runtime, steps
from mess_compile.cli import main
from mess_compile.data import scenes
from mess_compile.latency.table import read_latency_table
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.images.notebook import labels_html, table_html
from mess_compile.search.plan import read_result
from tests.commands import printed_json

WITHOUT = {"demo": "plays the other commands in turn", "completion": "prints a shell's script"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


class Page(HTMLParser):
    """Tags that are open, the cells' texts, and the pictures; anything that does not fit together fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.pictures.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("command", sorted(set(main.commands) - set(WITHOUT)))
def test_every_command_has_its_function(command: str) -> None:
    assert command in steps.__all__
    function = getattr(steps, command)
    assert inspect.getdoc(function)
    assert re.search(rf"`{command}[`( ]", DOCUMENT.read_text())


@pytest.mark.parametrize("name", sorted(steps.__all__))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(steps, name))
    assert re.search(rf"`{name}[`(]", DOCUMENT.read_text()), f"docs/api.md says nothing of {name}"


@pytest.mark.parametrize("name", sorted(name for name in steps.__all__ if name.islower()))
def test_a_notebook_need_not_say_what_a_command_need_not(name: str) -> None:
    """Only what a command asks for, too, has no default: data, what to train, a bundle, images, a plan, places."""
    known = {"workspace", "data", "choice", "recipe", "bundle", "images", "things", "thing", "path", "deadline_ms"}
    known |= {"split", "passes", "progress", "results", "source", "sources", "places", "text"}
    asked = {p.name for p in inspect.signature(getattr(steps, name)).parameters.values() if p.default is p.empty}
    assert asked <= known
    if name != "bench_deadline":
        assert not asked & {"progress", "split", "passes"}


def test_what_functions_tell_is_what_commands_print(finished: Path) -> None:
    workspace = steps.open_workspace(str(finished))
    told = {each.target.name: each.here for each in steps.devices(workspace)}
    assert told == {each["name"]: each["here"] for each in printed_json("-C", finished, "devices")["devices"]}
    findings = [finding.what for finding in steps.doctor(workspace)]
    assert findings == [finding["what"] for finding in printed_json("-C", finished, "doctor")["findings"]]
    content = json.loads(json.dumps(steps.inspect(workspace, "plan").content))
    assert content == printed_json("-C", finished, "inspect", "plan")
    (compared,), page = steps.compare(workspace, ["host"])
    assert page is None
    assert compared.device == "host"


def test_the_program_in_the_documents_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief_profile: None
) -> None:
    shutil.copytree(finished, tmp_path / "demo", copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    program = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert program is not None
    left: dict[str, Any] = {"frame": scenes.make_scene(1, (64, 96), 0.5).frame}
    exec(program[1], left)
    assert left["result"].plan.predicted.miou >= left["result"].plan.baseline.miou - 1
    assert left["prediction"].labels.shape == (64, 96)


def test_a_workspace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone does not exist"):
        steps.open_workspace(tmp_path / "gone")


def test_a_search_shows_its_plan_in_a_notebook(finished: Path) -> None:
    result = read_result(finished / "plans" / "host.json")
    page = Page(result._repr_html_())
    for stage in result.plan.stages:
        assert stage.head in page.texts
    assert f"{result.plan.predicted.miou:.2f}" in page.texts
    assert f"{result.plan.baseline.latency_ms:.2f}" in page.texts
    assert any(f"{result.certificate.space:,} plans" in text for text in page.texts)
    assert Page(result.plan._repr_html_()).texts == page.texts[:-1]
    ended = replace(result, certificate=replace(result.certificate, gap=0.25))
    assert any("not proved optimal (gap 0.25)" in text for text in Page(ended._repr_html_()).texts)


def test_a_latency_table_shows_estimates_as_such(finished: Path) -> None:
    table = read_latency_table(finished / "latency" / "host.json")
    key, entry = next(iter(table.entries.items()))
    guess = replace(entry, source="estimated", error=1.5)
    page = Page(replace(table, entries={**table.entries, key: guess})._repr_html_())
    assert page.texts.count("estimated, x1.5") == 1
    assert page.texts.count("measured") == len(table.entries) - 1
    assert f"{entry.mean_ms:.3f}" in page.texts


def test_a_prediction_shows_its_labels_in_the_networks_colours(finished: Path) -> None:
    frame = scenes.make_scene(3, (64, 96), 0.2).frame
    with runtime.load(finished / "host.mess") as cascade:
        prediction = cascade(frame)
        colours = np.array(cascade.manifest.network.colours, np.uint8)
        names = cascade.manifest.network.classes
    page = Page(prediction._repr_html_())
    (picture,) = page.pictures
    with Image.open(BytesIO(b64decode((picture["src"] or "").removeprefix("data:image/png;base64,")))) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), colours[prediction.labels])
    most = names[int(np.bincount(prediction.labels.ravel()).argmax())]
    assert any(text.startswith(most) for text in page.texts)
    assert "colours" not in repr(prediction)


def test_a_large_prediction_stays_small_and_an_unknown_label_is_black() -> None:
    labels = np.zeros((2000, 3000), np.uint8)
    labels[:, 1500:] = 9
    page = Page(labels_html(labels, [("road", (10, 20, 30))]))
    (picture,) = page.pictures
    with Image.open(BytesIO(b64decode((picture["src"] or "").partition(",")[2]))) as image:
        assert max(image.size) <= 480
        pixels = np.asarray(image.convert("RGB"))
    assert {tuple(map(int, row[0])) for row in pixels} == {(10, 20, 30)}
    assert {tuple(map(int, row[-1])) for row in pixels} == {(0, 0, 0)}
    assert "road 50%, label 9 50%" in page.texts


def test_names_cannot_bring_markup_into_a_notebook() -> None:
    evil = '<img src=x onerror="alert(1)">&'
    html = table_html(evil, (evil, "b"), [(evil, evil)]) + labels_html(
        np.zeros((2, 2), np.uint8), [('"><script>alert(1)</script>', (1, 2, 3))]
    )
    page = Page(html)
    assert page.texts.count(evil) == 4
    assert "script" not in page.tags
    assert len(page.pictures) == 1
    assert set(page.pictures[0]) == {"alt", "src"}
