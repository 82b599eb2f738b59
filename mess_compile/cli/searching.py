"""The command `search`, and requirements as its options say them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli.options import json_option, print_inspection
from mess_compile.console import print_json, print_next, print_table, progress_bar, quoted
from mess_compile.runtime.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@click.command()
@click.option(
    "--device", "devices", multiple=True, help="The device profiled last by default; once for each of several."
)
@click.option("--split", help="The statistics to choose on; the last evaluated by default.")
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
@click.option("--max-exits", type=click.IntRange(0, 2), default=2, show_default=True, help="Early exits at most.")
@click.option("--precision", help="Recipes to search, of those profiled: fp32,fp16. All of them by default.")
@click.option("--front", default="latency,miou", show_default=True, help="latency,miou,memory: memory counts too.")
@click.option("--time-limit", help="Such as 60s: the best plan found by then, and what a better one could still gain.")
@click.option("--confidence", help="Such as 95%: certify that --max-err holds on unseen images of the same kind.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the images that --confidence certifies on.")
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
    confidence: str | None,
    seed: int,
    explain: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose exits, heads and thresholds that satisfy a requirement, and prove the choice."""
    from mess_compile import inspection, steps
    from mess_compile.search.guarantees import parse_confidence
    from mess_compile.search.plan import result_to_json
    from mess_compile.search.requirement import parse_front, parse_seconds

    requirement = _requirement(options)
    recipes = None if precision is None else tuple(precision.split(","))
    how = steps.SearchOptions(
        precisions=recipes,
        front_by=parse_front(front),
        time_limit_s=None if time_limit is None else parse_seconds(time_limit, "--time-limit"),
        confidence=None if confidence is None else parse_confidence(confidence),
        seed=seed,
    )
    with progress_bar(as_json) as progress:
        results = steps.search(workspace, devices, split, requirement, progress, how)
        reasons = [
            inspection.inspect_explanation(
                steps.explain(workspace, found.plan.device, split, requirement, found.plan, progress, recipes)
            )
            for found in (results if explain else ())
        ]
    common = steps.shared(workspace, results) if len(results) > 1 else None
    if as_json:
        contents = {result.plan.device: result_to_json(result) for result in results}
        for content, reason in zip(contents.values(), reasons, strict=False):
            content["explanation"] = reason.content
        single = next(iter(contents.values()))
        return print_json(single if common is None else {"results": contents, "shared": asdict(common)})
    for i, result in enumerate(results):
        _print_plan(result.plan)
        print_inspection(inspection.Inspection({}, (inspection.points_table(result.plan),)))
        for reason in reasons[i : i + 1]:
            print_inspection(reason)
        _print_proof(result)
    if common is None:
        return print_next("bundle")
    _print_shared(common, len(results))
    return print_next(*(f"bundle {quoted(workspace.plan(result.plan.device))}" for result in results))


def _print_proof(result: Any) -> None:
    certificate, plan = result.certificate, result.plan
    if certificate.gap > 0:
        click.echo(
            f"best found of {certificate.space:,} plans; not proved the best: a better one could gain up to "
            f"{certificate.gap:g} in the objective; front of {len(result.front)} plans"
        )
    else:
        click.echo(
            f"best of {certificate.space:,} plans ({certificate.evaluated:,} evaluated, the others "
            f"{'duplicates of these' if certificate.exhaustive else 'put away by bounds'}), gap {certificate.gap:g}; "
            f"front of {len(result.front)} plans"
        )
    if plan.absent_classes:
        absent = ", ".join(plan.absent_classes)
        click.echo(f"no image has a labelled pixel of {absent}: mIoU is over the other classes")
    click.echo(
        f"chosen on the images of {plan.predicted.split}, as {plan.tuned_by} sees them: a result from tuning data"
    )
    if plan.optimism is not None:
        told = plan.optimism
        click.echo(
            f"expect about {max(0.0, told.miou_pp):.2f} pp less mIoU on other images of this kind (spread over folds "
            f"{told.spread_pp:.2f} pp) and {told.latency_percent:+.1f} % in latency: {told.method}"
        )
    if plan.guarantee is not None:
        told = plan.guarantee
        click.echo(
            f"certified at {100 * told.confidence:g} % on {told.images_certified} images ({told.groups} independent "
            f"ones) that it was not chosen on: pixel error at most {told.risk_limit_pp:g} pp above the baseline's "
            f"(bound {told.risk_bound_pp:.2f} pp, {told.risk_method}); mIoU at most {told.miou_drop_limit_pp:g} pp "
            f"below (bound {told.miou_drop_bound_pp:.2f} pp, {told.miou_method}); {told.assumption}"
        )


def _print_shared(common: Any, plans: int) -> None:
    def mib(size: int) -> str:
        return f"{size / 2**20:.2f}"

    graphs = ", ".join(common.graphs) or "none"
    click.echo(f"graphs that all {plans} plans run: {graphs}")
    click.echo(
        f"weights: {mib(common.shared_bytes)} MiB shared by all, {mib(common.together_bytes)} MiB together, "
        f"{mib(common.apart_bytes)} MiB if each plan brought its own"
    )


def thrift_of(wishes: tuple[str, ...], budget: str | None) -> Any:
    from mess_compile import steps
    from mess_compile.search.requirement import parse_seconds

    if not wishes and budget is None:
        return steps.Thrift(by_default=True)
    thrift = steps.Thrift() if budget is None else steps.Thrift(budget_s=parse_seconds(budget))
    return replace(thrift, requirements=tuple(map(_wish, wishes))) if wishes else thrift


def _wish(text: str) -> Any:
    """A requirement as the options of `search` say it."""
    known = {"devices", "split", "precision", "front", "time_limit", "explain", "as_json"}
    try:
        options = search.make_context("profile --for", shlex.split(text)).params
    except (click.UsageError, ValueError) as error:
        raise InputError(
            f'--for {text!r}: {error}; it takes the options of `search`, such as "--max-err 1%"'
        ) from error
    return _requirement({name: value for name, value in options.items() if name not in known})


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
        max_exits=options["max_exits"],
        deadline_ms=parsed("deadline", parsing.parse_milliseconds),
    )


def _print_plan(plan: Any) -> None:
    rows = []
    for number, (stage, rate) in enumerate(zip(plan.stages, plan.predicted.exit_rates, strict=True), start=1):
        threshold = f"{plan.gate.thresholds[stage.row]:.2f}"
        cut = "-" if stage.cut is None else str(stage.cut)
        rows.append([f"exit {number}", stage.head, threshold, cut, f"{rate:.0%}"])
    print_table(
        f"plan for {plan.device}, {plan.setting}, {plan.precision}",
        ["", "head", "pixels sure at", "leaves at count", "images"],
        rows,
    )
    names = ["", "mIoU %", "latency ms", "p95 ms", "worst ms", "GMACs", "memory MiB"]
    if plan.predicted.energy_mj is not None:
        names.append("mJ")
    figures = [[plan.baseline_name, *_figures(plan.baseline)], ["plan", *_figures(plan.predicted)]]
    print_table(
        f"{plan.predicted.source} latency, {plan.predicted.images} images of {plan.predicted.split}", names, figures
    )
    latency, workload = (
        plan.baseline.latency_ms / plan.predicted.latency_ms,
        plan.baseline.gmacs / plan.predicted.gmacs,
    )
    click.echo(f"predicted {latency:.2f}x in latency, {workload:.2f}x in workload")
    for graph in plan.graphs:
        if graph.precision != graph.wanted:
            click.echo(f"{graph.name} runs in {graph.precision}: in {graph.wanted} it lost too much")


def _figures(figures: Any) -> list[str]:
    return [
        f"{figures.miou:.2f}",
        f"{figures.latency_ms:.2f}",
        f"{figures.p95_ms:.2f}",
        f"{figures.worst_ms:.2f}",
        f"{figures.gmacs:.3f}",
        f"{figures.memory_bytes / 2**20:.1f}",
        *([] if figures.energy_mj is None else [f"{figures.energy_mj:.1f}"]),
    ]
