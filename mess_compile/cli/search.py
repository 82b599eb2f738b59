"""The command `search`, and requirements as its options say them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_json, print_next, print_table, quoted, reporting, say
from mess_compile.cli.options import FILE, json_option, print_inspection
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command(short_help="Choose exits, heads and thresholds; prove the choice.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    shell_complete=completion.devices,
    help="The device profiled last by default; once for each of several.",
)
@click.option(
    "--split", shell_complete=completion.splits, help="The statistics to choose on; the last evaluated by default."
)
@click.option("--max-err", help="Percentage points of mIoU below the baseline, such as 1%.")
@click.option("--max-latency", help="Mean over images: 20ms, or 0.5x of the baseline.")
@click.option("--max-latency-p95", help="Of 95 % of the images: 25ms, or 0.5x of the baseline.")
@click.option("--max-latency-worst", help="Of the deepest path at p99: 30ms, or 0.5x of the baseline at p99.")
@click.option("--max-memory", help="Such as 64MiB.")
@click.option("--max-workload", help="GMACs such as 3.5, or 0.5x of the baseline.")
@click.option("--max-energy", help="Mean over images: 50mJ, or 0.5x of the baseline.")
@click.option("--baseline", help="Replaces the baseline's mIoU, such as 54.24%.")
@click.option(
    "--setting",
    type=click.Choice(["input-dependent", "budgeted", "anytime"]),
    default="input-dependent",
    show_default=True,
)
@click.option(
    "--optimise",
    type=click.Choice(["latency", "accuracy", "workload", "memory", "energy"]),
    help="latency by default.",
)
@click.option("--deadline", help="Anytime: optimise the mIoU at this time, such as 20ms, instead of the area under it.")
@click.option("--max-exits", type=click.IntRange(0, 3), help="Early exits at most; 2 by default, 3 take minutes.")
@click.option(
    "--precision",
    shell_complete=completion.precisions,
    help="Recipes to search, of those profiled: fp32,fp16. All of them by default.",
)
@click.option("--front", default="latency,miou", show_default=True, help="latency,miou,memory: memory counts too.")
@click.option("--time-limit", help="Such as 60s: the best plan found by then, and what a better one could still gain.")
@click.option(
    "--hold-out",
    help="Share of the images that only judge the plan, such as 33%, or none. By default a third where there are 60 or "
    "more: the last images of each sequence.",
)
@click.option("--confidence", help="Such as 95%: certify that --max-err holds on unseen images of the same kind.")
@click.option("--seed", type=click.IntRange(0), help="Of the images that --confidence certifies on; 0 by default.")
@click.option("-o", "--output", type=FILE, help="Where the plan goes; plans/DEVICE.json in the workspace by default.")
@click.option("--explain", is_flag=True, help="Also say why: what exits bring, requirements cost, and what would help.")
@json_option
@click.pass_obj
def search(
    workspace: Workspace,
    /,
    devices: tuple[str, ...],
    split: str | None,
    precision: str | None,
    front: str,
    time_limit: str | None,
    hold_out: str | None,
    confidence: str | None,
    seed: int | None,
    output: Path | None,
    explain: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose exits, heads and thresholds that satisfy a requirement, and prove the choice."""
    from mess_compile import steps
    from mess_compile.report import inspection
    from mess_compile.search.guarantees import parse_confidence
    from mess_compile.search.hold_out import parse_hold_out
    from mess_compile.search.plan import result_to_json
    from mess_compile.search.requirement import parse_front, parse_seconds

    beside = {"--seed": seed, "--time-limit": time_limit, "--explain": explain, "--hold-out": hold_out}
    _refuse_what_does_not_fit(options, confidence, beside)
    requirement = _requirement(options)
    how = steps.SearchOptions(
        precisions=None if precision is None else tuple(dict.fromkeys(precision.split(","))),
        front_by=parse_front(front),
        time_limit_s=None if time_limit is None else parse_seconds(time_limit, "--time-limit"),
        confidence=None if confidence is None else parse_confidence(confidence),
        seed=seed or 0,
        output=output,
        hold_out=None if hold_out is None else parse_hold_out(hold_out),
    )
    reasons: list[inspection.Inspection] = []
    with reporting(as_json) as reporter:
        if explain:
            explained = steps.search_and_explain(workspace, devices, split, requirement, how, reporter)
            results = tuple(result for result, _ in explained)
            reasons = [inspection.inspect_explanation(reason) for _, reason in explained]
        else:
            results = steps.search(workspace, devices, split, requirement, how, reporter)
    common = steps.shared(workspace, results) if len(results) > 1 else None
    if as_json:
        contents = {result.plan.device: result_to_json(result) for result in results}
        for content, reason in zip(contents.values(), reasons, strict=False):
            content["explanation"] = reason.content
        single = next(iter(contents.values()))
        return print_json(single if common is None else {"results": contents, "shared": asdict(common)})
    for i, result in enumerate(results):
        _print_plan(result.plan)
        if result.what_would_cut:
            say(result.what_would_cut)
        _print_held_out(result, requirement)
        _warn(result.plan, requirement)
        print_inspection(inspection.Inspection({}, inspection.points_tables(result.plan)))
        for reason in reasons[i : i + 1]:
            print_inspection(reason)
        _print_proof(result, requirement)
    if common is None:
        name = results[0].plan.device
        by_name = "bundle" if workspace.memory().device == name else f"bundle {name}"
        safer = _safer(results[0], requirement)
        again = [] if safer is None else [hints.search_for(name, f"{safer:.2g}%")]
        return print_next(*again, by_name if output is None else f"bundle {quoted(output)}")
    _print_shared(common, len(results))
    return print_next(*(f"bundle {result.plan.device}" for result in results))


def _safer(result: Any, requirement: Any) -> float | None:
    """The `--max-err` to try where more was lost on the images held out; None where its bound held, or is not alone."""
    from mess_compile.search.requirement import safer_max_err

    plan, asked = result.plan, requirement.max_err_pp
    if plan.hold_out is None or not asked or requirement != replace(type(requirement)(), max_err_pp=asked):
        return None
    lost = plan.offset_pp + plan.hold_out.baseline.miou - plan.hold_out.predicted.miou
    return None if lost <= asked else safer_max_err(asked, lost)


def _print_held_out(result: Any, requirement: Any) -> None:
    from mess_compile.search.hold_out import held_out_sentence, held_out_table

    if result.plan.hold_out is not None:
        print_table(*held_out_table(result.plan.hold_out, result.plan.baseline_name))
    say(held_out_sentence(result, requirement.max_err_pp))


def _warn(plan: Any, requirement: Any) -> None:
    """What makes the figures doubtful, or the plan another one than was meant."""
    for doubt in plan.doubts:
        say(f"mind: {doubt}")
    lost = plan.baseline.miou - plan.predicted.miou
    if requirement.max_err_pp is None and requirement.objective != "accuracy" and lost > 1:
        say(f"mind: no --max-err was asked for, and this plan loses {lost:.1f} pp of mIoU: add --max-err 1%")


def _refuse_what_does_not_fit(
    options: dict[str, Any], confidence: str | None, beside: dict[str, str | int | None]
) -> None:
    """Options that would change nothing, or not what they say."""
    if confidence is None and beside["--seed"] is not None:
        raise click.UsageError("--seed draws the images that --confidence certifies on: add it, or drop --seed.")
    if confidence is not None and beside["--hold-out"] is not None:
        raise click.UsageError("--confidence holds images out to certify on: drop --hold-out.")
    for name in ("--time-limit", "--explain"):
        if confidence is not None and beside[name]:
            raise click.UsageError(f"{name} is of the best plan, --confidence may certify another: give one of them.")
    if beside["--time-limit"] is not None and beside["--explain"]:
        raise click.UsageError("--explain compares plans that are proved the best: drop --time-limit.")
    if options["setting"] == "budgeted" and options["max_exits"] is not None:
        raise click.UsageError("the budgeted setting has no early exits: drop --max-exits.")


def _print_proof(result: Any, requirement: Any) -> None:
    from mess_compile.search.display import expected_on_new_images

    certificate, plan = result.certificate, result.plan
    front = (
        f"front of {len(result.front)} plans" if result.front_complete else f"{len(result.front)} plans of the front"
    )
    place = plan.guarantee.place if plan.guarantee else 1
    whose = "best" if place == 1 else "the best, not certified, is that"
    if certificate.gap > 0:
        say(
            f"best found of {certificate.space:,} plans; not proved the best: a better one could gain up to "
            f"{certificate.gap:.3g} {_unit(requirement)}; {front}"
        )
    else:
        say(
            f"{whose} of {certificate.space:,} plans ({certificate.evaluated:,} evaluated, the others "
            f"{'duplicates of these' if certificate.exhaustive else 'put away by bounds'}), gap {certificate.gap:g}; "
            f"{front}"
        )
    if place > 1:
        say(f"this one is number {place} of {plan.guarantee.candidates} that err ever less than the best")
    for point in plan.operating_points:
        if point.name == "refined":
            say(
                f"with cuts off the grid, not part of the proof (operating point {point.name}): "
                f"{point.predicted.latency_ms:.2f} ms, {point.predicted.miou:.2f} % mIoU"
            )
    if plan.absent_classes:
        absent = ", ".join(plan.absent_classes)
        say(f"no image has a labelled pixel of {absent}: mIoU is over the other classes")
    say(f"chosen on the images of {plan.predicted.split}, as {plan.tuned_by} sees them: a result from tuning data")
    if plan.optimism is not None and plan.hold_out is None:  # what was held out says it by itself
        say(f"on other images of this kind: {expected_on_new_images(plan.optimism)}")
    elif result.without_optimism:
        say(f"what to expect on other images is not told: {result.without_optimism}")
    if plan.guarantee is not None:
        told = plan.guarantee
        say(
            f"certified at {100 * told.confidence:g} % on {told.images_certified} images ({told.groups} independent "
            f"ones) that it was not chosen on: pixel error on average at most {told.risk_limit_pp:g} pp above the "
            f"baseline's (bound {told.risk_bound_pp:.2f} pp, {told.risk_method}); mIoU at most "
            f"{told.miou_drop_limit_pp:g} pp below (bound {told.miou_drop_bound_pp:.2f} pp, {told.miou_method}); "
            f"{told.assumption}"
        )


def _print_shared(common: Any, plans: int) -> None:
    def mib(size: int) -> str:
        return f"{size / 2**20:.2f}"

    graphs = ", ".join(common.graphs) or "none"
    say(f"graphs that all {plans} plans run: {graphs}")
    say(
        f"weights: {mib(common.shared_bytes)} MiB shared by all, {mib(common.together_bytes)} MiB together, "
        f"{mib(common.apart_bytes)} MiB if each plan brought its own"
    )


def subset_of(wishes: tuple[str, ...], budget: str | None) -> Any:
    from mess_compile import steps
    from mess_compile.search.requirement import parse_seconds

    if not wishes and budget is None:
        return steps.Subset(by_default=True)
    subset = steps.Subset() if budget is None else steps.Subset(budget_s=parse_seconds(budget))
    return replace(subset, requirements=tuple(map(_wish, wishes))) if wishes else subset


def _wish(text: str) -> Any:
    """A requirement as the options of `search` say it."""
    try:
        options = search.make_context("profile --for", shlex.split(text)).params
    except (click.UsageError, ValueError) as error:
        raise InputError(
            f'--for {text!r}: {error}; it takes the options of `search`, such as "--max-err 1%"'
        ) from error
    return _requirement(options)


def _requirement(options: dict[str, Any]) -> Any:
    from mess_compile.search import requirement as parsing

    def parsed(name: str, parse: Callable[[str], Any]) -> Any:
        return None if options[name] is None else parse(options[name])

    return parsing.Requirement(
        setting=options["setting"],
        objective=options["optimise"],
        max_err_pp=parsed("max_err", parsing.parse_max_err),
        max_latency=parsed("max_latency", parsing.parse_max_latency),
        max_latency_p95=parsed("max_latency_p95", partial(parsing.parse_max_latency, option="--max-latency-p95")),
        max_latency_worst=parsed("max_latency_worst", partial(parsing.parse_max_latency, option="--max-latency-worst")),
        max_energy=parsed("max_energy", parsing.parse_max_energy),
        max_memory_bytes=parsed("max_memory", parsing.parse_max_memory),
        max_workload=parsed("max_workload", parsing.parse_max_workload),
        baseline_miou=parsed("baseline", parsing.parse_baseline),
        max_exits=parsing.DEFAULT_EXITS if options["max_exits"] is None else options["max_exits"],
        deadline_ms=parsed("deadline", parsing.parse_milliseconds),
    )


def _print_plan(plan: Any) -> None:
    from mess_compile.search.display import FIGURES, exits_table, figures_row, sentences_of, speed, work

    print_table(f"plan for {plan.device}, {plan.setting}, {plan.precision}", *exits_table(plan))
    figures_of = {"plan": plan.predicted, plan.baseline_name: plan.baseline}
    estimated = [name for name, figures in figures_of.items() if figures.source == "estimated"]
    header = FIGURES if plan.predicted.energy_mj is None else [*FIGURES, "mJ"]
    rows = [
        [*figures_row(name, figures), *([] if figures.energy_mj is None else [f"{figures.energy_mj:.1f}"])]
        for name, figures in ((plan.baseline_name, plan.baseline), ("plan", plan.predicted))
    ]
    source = f"ESTIMATED latency of {' and '.join(estimated)}" if estimated else "measured latency"
    print_table(f"{source}, {plan.predicted.images} images of {plan.predicted.split}", header, rows)
    if plan.reference_miou is not None:
        say(f"error counted from {plan.reference_miou:.2f} % mIoU: given, or the best baseline of the recipes")
    for number, report in enumerate(plan.reports, start=1):
        say(f"exit {number} reports after {report.latency_ms:.2f} ms: {report.miou:.2f} % mIoU by then")
    latency, workload = _ratio(plan, "latency_ms"), _ratio(plan, "gmacs")
    say(f"predicted against {plan.baseline_name}: {speed(latency)}, {work(workload)}")
    for sentence in sentences_of(plan):
        say(sentence)
    for graph in plan.graphs:
        if graph.precision != graph.wanted:
            say(f"{graph.name} runs in {graph.precision}: in {graph.wanted} it lost too much")


def _ratio(plan: Any, figure: str) -> float:
    own = getattr(plan.predicted, figure)
    return float(getattr(plan.baseline, figure) / own) if own else math.inf


def _unit(requirement: Any) -> str:
    if requirement.setting == "anytime":
        return "pp of mIoU over time"
    units = {"accuracy": "pp of mIoU", "workload": "GMACs", "memory": "bytes", "energy": "mJ"}
    return units.get(requirement.objective or "latency", "ms")
