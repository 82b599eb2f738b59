"""The command `search`, and requirements from its options."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import print_hint, print_json, print_table, quoted, reporting, say, warn
from mess_compile.cli.options import FILE, gathered, json_option, print_inspection, verbose_option
from mess_compile.runtime.base.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace


@dataclass(frozen=True)
class SearchArguments:
    """The options of `search`, as they were typed."""

    devices: tuple[str, ...]
    split: str | None
    max_err: str | None
    max_change: str | None
    max_class_err: tuple[str, ...]
    max_latency: str | None
    max_latency_p95: str | None
    max_latency_worst: str | None
    max_memory: str | None
    max_workload: str | None
    max_energy: str | None
    baseline: str | None
    setting: str
    optimise: str | None
    deadline: str | None
    max_exits: int | None
    precision: str | None
    front: str
    time_limit: str | None
    hold_out: str | None
    policy: str
    confidence: str | None
    safety: str | None
    group_by: str | None
    seed: int | None
    output: Path | None
    explain: bool
    verbose: bool
    as_json: bool


@click.command(short_help="Choose exits, heads and thresholds; prove the choice.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    shell_complete=completion.devices,
    help="The device to plan for, by default the one profiled last; repeat it for several.",
)
@click.option(
    "--split", shell_complete=completion.splits, help="The evaluated split to choose on; the last evaluated by default."
)
@click.option("--max-err", help="Most mIoU to lose against the baseline, in percentage points, such as 1%.")
@click.option(
    "--max-change",
    help="Most pixels that may be labelled otherwise than by the network itself, such as 3% (mean over images).",
)
@click.option(
    "--max-class-err",
    multiple=True,
    help="Most IoU to lose of one class against the baseline: crack=0.5%; repeat it for several classes.",
)
@click.option("--max-latency", help="Longest mean latency: 20ms, or 0.5x of the baseline's.")
@click.option("--max-latency-p95", help="Longest 95th percentile of latency: 25ms, or 0.5x of the baseline's.")
@click.option(
    "--max-latency-worst", help="Longest p99 latency of the deepest path: 30ms, or 0.5x of the baseline's p99."
)
@click.option("--max-memory", help="Most memory, such as 64MiB.")
@click.option("--max-workload", help="Most work in GMACs: 3.5, or 0.5x of the baseline's.")
@click.option("--max-energy", help="Most mean energy per image: 50mJ, or 0.5x of the baseline's.")
@click.option("--baseline", help="Count --max-err from this mIoU, such as 54.24%, instead of the baseline's.")
@click.option(
    "--setting",
    type=click.Choice(["input-dependent", "budgeted", "anytime"]),
    default="input-dependent",
    show_default=True,
    help="input-dependent: easy images exit early. budgeted: all exit at one place. anytime: every exit reports.",
)
@click.option(
    "--optimise",
    type=click.Choice(["latency", "accuracy", "workload", "memory", "energy"]),
    help="What to make best within the bounds; latency by default.",
)
@click.option(
    "--deadline", help="With --setting anytime: optimise mIoU at this time, such as 20ms, instead of mIoU over time."
)
@click.option("--max-exits", type=click.IntRange(0, 3), help="Most early exits; 2 by default. 3 take minutes.")
@click.option(
    "--precision",
    shell_complete=completion.precisions,
    help="Precisions to choose from, such as fp32,fp16; all profiled ones by default.",
)
@click.option(
    "--front",
    default="latency,miou",
    show_default=True,
    help="What plans are traded off by; latency,miou,memory includes memory.",
)
@click.option(
    "--time-limit",
    help="Stop after this time, such as 60s, with the best plan so far and the gain still possible.",
)
@click.option(
    "--hold-out",
    help="Share of the images to test the plan on instead of choosing it, such as 33%, or `none`. By default the last "
    "third of each sequence, if there are 60 images or more.",
)
@click.option(
    "--policy",
    default="plain",
    show_default=True,
    help="How a gate's counts become decisions: some of plain (one threshold), class (a threshold for each class), "
    "learned (by the last exit's accuracy on these images) and agreement (cells beside no other label), such as "
    "plain,class. Each multiplies the plans to search, and the more there are, the better they fit these images alone.",
)
@click.option(
    "--confidence",
    help="Certify with this confidence, such as 95%, that --max-err or --max-change holds on new images.",
)
@click.option(
    "--safety",
    help="Take the fastest plan that keeps --max-err or --max-change on new images with this probability, such as 90%; "
    "for sets that are too small for --confidence.",
)
@click.option(
    "--group-by",
    help="Regular expression that names the group of an image by its id, such as '^[0-9]+': images of one group belong "
    "together. Remembered; `none` uses the names of sequences.",
)
@click.option(
    "--seed", type=click.IntRange(0), help="Seed for drawing the images that --confidence certifies on; 0 by default."
)
@click.option("-o", "--output", type=FILE, help="File for the plan; plans/DEVICE.json in the workspace by default.")
@click.option(
    "--explain", is_flag=True, help="Explain the choice: what exits gain, what requirements cost, what would help."
)
@verbose_option
@json_option
@click.pass_obj
@gathered(SearchArguments)
def search(workspace: Workspace, /, arguments: SearchArguments) -> None:
    """Choose exits, heads and thresholds that satisfy a requirement, and prove that no other plan is better.

    `inspect plan` prints all details of the last plan again.
    """
    from mess_compile import steps
    from mess_compile.report import inspection
    from mess_compile.search.plan import result_to_json

    _refuse_contradictions(arguments)
    requirement = requirement_of(arguments)
    how = _search_options(arguments)
    devices, split, explain, as_json = arguments.devices, arguments.split, arguments.explain, arguments.as_json
    reasons: list[inspection.Inspection] = []
    with reporting(as_json) as reporter:
        if explain:
            explained = steps.search_and_explain(workspace, devices, split, requirement, how, reporter)
            results = tuple(result for result, _ in explained)
            reasons = [inspection.inspect_explanation(reason, each.plan.retrained) for each, reason in explained]
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
        _print_summary(result, requirement)
        if arguments.verbose:
            print_inspection(inspection.inspect_choice(result, inspection.cells_of_heads(workspace)))
        for reason in reasons[i : i + 1]:
            print_inspection(reason)
    if common is not None:
        _print_shared(common, len(results))
        return print_hint(*(f"bundle {result.plan.device}" for result in results))
    return print_hint(*_after_search(workspace, results[0], requirement, arguments.output))


def _search_options(arguments: SearchArguments) -> Any:
    from mess_compile import steps
    from mess_compile.evaluate.policies import parse_policies
    from mess_compile.search.groups import checked_pattern
    from mess_compile.search.guarantees import parse_confidence
    from mess_compile.search.hold_out import parse_hold_out
    from mess_compile.search.requirement import parse_front, parse_seconds
    from mess_compile.search.safety import parse_safety

    precision, time_limit, confidence = arguments.precision, arguments.time_limit, arguments.confidence
    return steps.SearchOptions(
        precisions=None if precision is None else tuple(dict.fromkeys(precision.split(","))),
        front_by=parse_front(arguments.front),
        time_limit_s=None if time_limit is None else parse_seconds(time_limit, "--time-limit"),
        confidence=None if confidence is None else parse_confidence(confidence),
        seed=arguments.seed or 0,
        output=arguments.output,
        hold_out=None if arguments.hold_out is None else parse_hold_out(arguments.hold_out),
        safety=None if arguments.safety is None else parse_safety(arguments.safety),
        group_by=None if arguments.group_by is None else checked_pattern(arguments.group_by),
        policies=parse_policies(arguments.policy),
    )


def _print_summary(result: Any, requirement: Any) -> None:
    from mess_compile.report import search_output
    from mess_compile.search.display import policies_sentence

    say(search_output.headline(result.plan))
    print_table(search_output.summary_title(result.plan), *search_output.summary_table(result.plan, requirement))
    policies = policies_sentence(result.plan)
    if policies is not None:
        say(policies)
    if result.plan.reports:
        say(search_output.reports_line(result.plan))
    say(f"{search_output.proof(result, requirement)} {search_output.expectation(result)}")
    if result.what_would_cut:
        say(result.what_would_cut)
    for warning in search_output.warnings_of_plan(result.plan, requirement):
        warn(warning)


def _after_search(workspace: Workspace, result: Any, requirement: Any, output: Path | None) -> list[str]:
    """A safer search where the images held out ask for one, and the bundle of this plan."""
    name, safer = result.plan.device, _safer(result, requirement)
    by_name = "bundle" if workspace.memory().device == name else f"bundle {name}"
    again = [] if safer is None else [f"{hints.for_device('search', name)} {safer}"]
    return [*again, by_name if output is None else f"bundle {quoted(output)}"]


def _safer(result: Any, requirement: Any) -> str | None:
    """The option to try where more was lost or changed on the images held out; None where the bound held, or is not
    alone."""
    from mess_compile.search.requirement import safer_max_err

    if result.plan.hold_out is None:
        return None
    own, baseline = result.plan.hold_out.predicted, result.plan.hold_out.baseline
    lost = {"max_err_pp": result.plan.offset_pp + baseline.miou - own.miou, "max_change": own.change or 0.0}
    for name, option in (("max_err_pp", "--max-err"), ("max_change", "--max-change")):
        asked = getattr(requirement, name)
        if asked and lost[name] > asked and requirement == replace(type(requirement)(), **{name: asked}):
            return f"{option} {safer_max_err(asked, lost[name]):.2g}%"
    return None


def _refuse_contradictions(arguments: SearchArguments) -> None:
    """Raise UsageError for options without effect, or with another than they seem to have."""
    certified = arguments.confidence is not None
    if not certified and arguments.seed is not None:
        raise click.UsageError("--seed draws the images that --confidence certifies on: add it, or drop --seed.")
    if certified and arguments.hold_out is not None:
        raise click.UsageError("--confidence holds images out to certify on: drop --hold-out.")
    if certified and arguments.time_limit is not None:
        raise click.UsageError("--time-limit cannot be combined with --confidence: drop one of them.")
    if certified and arguments.explain:
        raise click.UsageError("--explain cannot be combined with --confidence: drop one of them.")
    if certified and arguments.safety is not None:
        raise click.UsageError("--safety is for sets that are too small for --confidence: drop one of them.")
    if arguments.safety is not None and arguments.time_limit is not None:
        raise click.UsageError("--safety repeats the whole search in five folds: drop --time-limit.")
    if arguments.safety is not None and arguments.explain:
        raise click.UsageError("--explain cannot be combined with --safety: drop one of them.")
    if arguments.time_limit is not None and arguments.explain:
        raise click.UsageError("--explain compares plans that are proved optimal: drop --time-limit.")
    if arguments.setting == "budgeted" and arguments.max_exits is not None:
        raise click.UsageError("the budgeted setting has no early exits: drop --max-exits.")


def _print_shared(common: Any, plans: int) -> None:
    def mib(size: int) -> str:
        return f"{size / 2**20:.2f}"

    graphs = ", ".join(common.graphs) or "none"
    say(f"graphs that all {plans} plans run: {graphs}")
    say(
        f"weights: {mib(common.shared_bytes)} MiB shared by all, {mib(common.together_bytes)} MiB in one bundle, "
        f"{mib(common.apart_bytes)} MiB in separate ones"
    )


def subset_of(requirements: tuple[str, ...], budget: str | None) -> Any:
    """What `profile` measures: what matters to these requirements, within a time."""
    from mess_compile import steps
    from mess_compile.search.requirement import parse_seconds

    if not requirements and budget is None:
        return steps.Subset(by_default=True)
    subset = steps.Subset() if budget is None else steps.Subset(budget_s=parse_seconds(budget))
    return replace(subset, requirements=tuple(map(_parsed, requirements))) if requirements else subset


def _parsed(text: str) -> Any:
    """A requirement from the options of `search` in one text."""
    try:
        given = search.make_context("profile --requirement", shlex.split(text)).params
    except (click.UsageError, ValueError) as error:
        raise InputError(
            f'--requirement {text!r}: {error}; it takes the options of `search`, such as "--max-err 1%"'
        ) from error
    return requirement_of(SearchArguments(**given))


def requirement_of(arguments: SearchArguments) -> Any:
    """The Requirement that the options describe. Raises InputError."""
    from mess_compile.search import requirement

    def parsed(name: str, parse: Callable[[str], Any]) -> Any:
        value = getattr(arguments, name)
        return None if value is None else parse(value)

    return requirement.Requirement(
        setting=arguments.setting,
        objective=arguments.optimise,
        max_err_pp=parsed("max_err", requirement.parse_max_err),
        max_change=parsed("max_change", requirement.parse_max_change),
        max_class_err=tuple(map(requirement.parse_class_bound, arguments.max_class_err)),
        max_latency=parsed("max_latency", requirement.parse_max_latency),
        max_latency_p95=parsed("max_latency_p95", partial(requirement.parse_max_latency, option="--max-latency-p95")),
        max_latency_worst=parsed(
            "max_latency_worst", partial(requirement.parse_max_latency, option="--max-latency-worst")
        ),
        max_energy=parsed("max_energy", requirement.parse_max_energy),
        max_memory_bytes=parsed("max_memory", requirement.parse_max_memory),
        max_workload=parsed("max_workload", requirement.parse_max_workload),
        baseline_miou=parsed("baseline", requirement.parse_baseline),
        max_exits=requirement.DEFAULT_EXITS if arguments.max_exits is None else arguments.max_exits,
        deadline_ms=parsed("deadline", requirement.parse_milliseconds),
    )
