"""A report or a comparison as one HTML page that needs no network: scripts, styles and pictures are in it."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import asdict
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup, escape

from mess_compile import __version__
from mess_compile.report.comparison import Compared, notes, rows, warnings
from mess_compile.report.model import Benched, Missing, Picture, Report, SearchFound
from mess_compile.report.published import paper_rows
from mess_compile.report.views import Classes, GraphCosts, PlanView
from mess_compile.runtime.bundle.manifest import LABELS, against
from mess_compile.search.display import interval_sentence, network_label, sentences_of, speed
from mess_compile.search.plan import Plan, SearchResult

_COMMAND = re.compile(r"`([^`]+)`")


def report_page(report: Report) -> str:
    """The page of `mess-compile report`."""
    found = report.search.result if isinstance(report.search, SearchFound) else None
    sentences = () if found is None else _sentences(found)
    sentences = tuple(filter(None, sentences))
    return _rendered("report.html.j2", report=report, sentences=sentences, data=report_data(report))


def _sentences(found: SearchResult) -> tuple[str, ...]:
    """What stands above the charts."""
    interval = interval_sentence(found.plan.expected, found.without_expected)
    return (*_truth(found.plan), *sentences_of(found.plan), found.what_would_cut, interval)


def _truth(plan: Plan) -> tuple[str, ...]:
    """What all mIoU of the plan is against, where that is not labels, and how much it changes."""
    if plan.truth == LABELS:
        return ()
    change = plan.predicted.change
    changed = "" if change is None else f"; the plan labels {change:.2f} % of the pixels otherwise"
    return (f"every mIoU of the plan is against {plan.truth}{changed}",)


def compare_page(compared: tuple[Compared, ...]) -> str:
    """The page of `mess-compile compare`."""
    content = {"plans": [asdict(each) for each in compared]}
    remarks = (*notes(compared), *warnings(compared))
    return _rendered("compare.html.j2", compared=compared, rows=rows(compared), notes=remarks, data=content)


def _rendered(template: str, **content: Any) -> str:
    loader = jinja2.PackageLoader("mess_compile.report")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["verbatim"] = lambda name: Markup(loader.get_source(environment, name)[0])
    environment.filters.update(commands=_commands, data_uri=_data_uri, json=_json, max_err=max_err_text)
    environment.filters.update(speed=speed, network=_network, capital=lambda text: text[:1].upper() + text[1:])
    environment.filters["against"] = against
    environment.filters["interval"] = lambda found: interval_sentence(found.expected, found.without_expected)
    environment.tests["missing"] = lambda part: isinstance(part, Missing)
    plotting = Markup(plotly.offline.get_plotlyjs())
    return environment.get_template(template).render(version=__version__, plotting=plotting, **content)


def _network(found: Any) -> str:
    """What a plan or a bench calls its baseline."""
    return network_label(found.baseline_name, found.retrained)


def _commands(text: str) -> Markup:
    """Text between backticks becomes code."""
    return Markup(_COMMAND.sub(r"<code>\1</code>", str(escape(text))))


def _data_uri(picture: Picture) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}"


def _json(content: Any) -> Markup:
    """JSON for a script element, without characters that could end the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def max_err_text(max_err_pp: float) -> str:
    """A `--max-err` that allows a plan which needs `max_err_pp`: rounded up, and at least 0."""
    return f"{max(0.0, math.ceil(max_err_pp * 1000) / 1000):g}%"


def report_data(report: Report) -> dict[str, Any]:
    """The data that the page's script draws."""
    content: dict[str, Any] = {"front": None, "classes": None, "costs": None, "bench": None}
    if isinstance(report.search, SearchFound):
        content["front"] = _front_data(report.search)
    if isinstance(report.classes, Classes):
        content["classes"] = asdict(report.classes)
    if isinstance(report.costs, GraphCosts):
        content["costs"] = asdict(report.costs)
    if isinstance(report.bench, Benched):
        bench = report.bench.bench
        columns = [{"name": name, **asdict(column)} for name, column in bench.columns.items()]
        content["bench"] = {"baseline_name": _network(bench.found), "columns": columns}
    return content


def _front_data(found: SearchFound) -> dict[str, Any]:
    plan = found.result.plan
    return {
        "setting": plan.setting,
        "baseline": {"name": _network(plan), **asdict(plan.baseline)},
        "stops": [_stop_data(view) for view in found.views],
        "paper": [asdict(row) for row in paper_rows()],
    }


def _stop_data(view: PlanView) -> dict[str, Any]:
    """Figures as in the plan file; those derived from them in six digits, since a front may have hundreds of plans."""
    content = asdict(view)
    names = ("latency_ms", "p95_ms", "miou", "exit_rates")
    return {
        **content,
        "stages": _rounded(content["stages"]),
        "iou": _rounded(content["iou"]),
        "operating_points": [
            {"name": point["name"], "predicted": {name: point["predicted"][name] for name in names}}
            for point in content["operating_points"]
        ],
        "heads": view.heads,
        "max_err": max_err_text(view.max_err_pp),
    }


def _rounded(content: Any) -> Any:
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, dict):
        return {name: _rounded(value) for name, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, list | tuple) else content
