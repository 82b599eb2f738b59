"""The command line: parse, call one function, print."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile import __version__
from mess_compile.console import Group, fail, print_json, print_next, print_table, progress_bar, quoted
from mess_compile.runtime.errors import InputError

if TYPE_CHECKING:
    from mess_compile.workspace import Workspace

_HW = click.option("--input", "input_hw", default="180x240", show_default=True, help="Input size, HEIGHTxWIDTH.")
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
_BUNDLE = click.Path(path_type=Path)
_PRECISION = click.option("--precision", default="fp32", show_default=True, help="fp32, fp16 or int8.")
_PRECISIONS = click.option(
    "--precision", default="fp32", show_default=True, help="One or more of fp32, fp16, int8: fp32,fp16."
)
_JUDGED = click.option(
    "--data", type=_FOLDER, help="Images that fp16 and int8 are judged on; the workspace's by default."
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-C", "folder", type=_FOLDER, default=".", help="The workspace: the current folder by default.")
@click.version_option(__version__)
@click.pass_context
def main(ctx: click.Context, folder: Path) -> None:
    """Compile multi-exit segmentation networks for a device.

    \b
    mess-compile export                     cut the candidate network into graphs
    mess-compile profile --device host      measure them on the device
    mess-compile search --max-err 1%        choose exits, heads and thresholds
    mess-compile bundle                     write what the device runs
    """
    from mess_compile.workspace import Workspace

    if not folder.is_dir():
        raise InputError(f"workspace {folder} does not exist: create the folder or name another with -C DIR")
    ctx.obj = Workspace(folder)


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


def _print_inspection(found: Any) -> None:
    for table in found.tables:
        print_table(table.title, table.header, table.rows)
    for note in found.notes:
        click.echo(click.wrap_text(note, width=100))


def _size(text: str) -> tuple[int, int]:
    from mess_compile.candidates import MAX_SIDE

    height, separator, width = text.lower().partition("x")
    if not separator or not height.isdecimal() or not width.isdecimal() or min(int(height), int(width)) < 32:
        raise InputError(f"size {text!r} is not HEIGHTxWIDTH of at least 32x32, such as 360x480")
    if max(int(height), int(width)) > MAX_SIDE:
        raise InputError(f"size {text!r} is more than {MAX_SIDE}x{MAX_SIDE}")
    return int(height), int(width)


def _rates(rates: Any) -> str:
    return " ".join(f"{rate:.0%}" for rate in rates)


@main.command()
@click.argument("folder", type=_FOLDER, default="demo")
def demo(folder: Path) -> None:
    """The whole flow on generated street scenes: train, export, profile, search, bundle, run, bench."""
    from mess_compile import demo as demonstration

    demonstration.run_demo(folder, main)


def _train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `train` takes beside data and workspace, grouped as in its help: network, schedule, losses, machines."""
    options = (
        click.option(
            "--backbone", type=click.Choice(["mobilenetv2", "resnet50"]), default="mobilenetv2", show_default=True
        ),
        _HW,
        click.option("--output-stride", type=click.Choice(["8", "16"]), default="8", show_default=True),
        click.option("--width", default=1.0, show_default=True, help="Width multiplier of mobilenetv2."),
        click.option("--exits", default="6", show_default=True, help="Number of exits, or block names: features.6,..."),
        click.option(
            "--heads",
            default="fcn-crm1-b0,fcn-crm1-b1,fcn-crm1-b2-rdi,fcn-crm1-b3-rdi,fcn-crm2-b3-rdi",
            show_default=True,
            help="Heads at every early exit, or exitN.NAME at one; `grid` is the paper's space.",
        ),
        click.option("--weights", type=_FILE, help="torchvision ImageNet weights (.pth, .safetensors)."),
        click.option("--from", "source", type=_FOLDER, help="Start stage 2 from this candidate: --epochs 0 N."),
        click.option("--teacher", type=_FOLDER, help="Another candidate, whose final exit teaches in stage 2."),
        click.option("--baseline", is_flag=True, help="Train the single-exit network alone, for as many epochs."),
        click.option("--epochs", nargs=2, type=int, default=(60, 20), show_default=True, help="Of stage 1 and 2."),
        click.option("--batch", default=8, show_default=True, help="Images of a step, over all processes."),
        click.option("--learning-rate", default=2e-3, show_default=True),
        click.option("--crop", help="Size of the training crops, such as 240x320; the input size by default."),
        click.option("--full-size-epochs", default=0, show_default=True, help="Last epochs of stage 1, at input size."),
        click.option("--no-augment", is_flag=True, help="Whole frames at input size instead of random crops."),
        click.option(
            "--order",
            type=click.Choice(["round-robin", "joint", "final"]),
            default="round-robin",
            show_default=True,
            help="Exits that a step of stage 1 trains.",
        ),
        click.option("--stage1-head", default="fcn-crm1-b0", show_default=True, help="Early heads of stage 1."),
        click.option("--exit-weight", default=1.0, show_default=True, help="An early exit's loss beside the final's."),
        click.option("--ema", default=0.0, show_default=True, help="Decay per step of a moving average in stage 1."),
        click.option("--lovasz", default=0.0, show_default=True, help="Weight of Lovasz-softmax beside cross-entropy."),
        click.option("--class-power", default=0.5, show_default=True, help="0: all classes weigh alike."),
        click.option(
            "--loss-resolution",
            type=click.Choice(["labels", "cells"]),
            default="labels",
            show_default=True,
            help="Losses at the labels' resolution, or at the head's.",
        ),
        click.option("--distillation", type=click.Choice(["pfd", "kd", "none"]), default="pfd", show_default=True),
        click.option("--alpha", default=0.5, show_default=True, help="Weight of the teacher against the labels."),
        click.option("--temperature", default=1.0, show_default=True, help="Temperature of the teacher."),
        click.option("--head-memory", default=4096, show_default=True, help="MiB for heads that train in one pass."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--accelerator", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--devices", default=1, show_default=True, help="Processes (GPUs) on each machine."),
        click.option("--nodes", default=1, show_default=True, help="Machines; torchrun and SLURM set both themselves."),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True),
        click.option("--accumulate", default=1, show_default=True, help="Pieces of a batch, one after the other."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.option("--data", type=_FOLDER, required=True, help="CamVid, Cityscapes, VOC, COCO, or a folder of your own.")
@_train_options
@_json_option
@click.pass_obj
def train(workspace: Workspace, /, data: Path, as_json: bool, **options: Any) -> None:
    """Train a candidate network in two stages; the same command continues an interrupted training."""
    from mess_compile import extras, inspection, steps

    recipes, parallel = extras.torch_module("training.recipe"), extras.torch_module("training.parallel")
    exits = options["exits"]
    choice = steps.NetworkChoice(
        backbone=options["backbone"],
        input_hw=_size(options["input_hw"]),
        exits=int(exits) if exits.isdecimal() else tuple(exits.split(",")),
        heads=tuple(options["heads"].split(",")),
        output_stride=int(options["output_stride"]),
        width=options["width"],
    )
    recipe = recipes.Recipe(
        crop_hw=_size(options["crop"]) if options["crop"] else None,
        augment=not options["no_augment"],
        distillation=recipes.Distillation(options["distillation"], options["alpha"], options["temperature"]),
        head_memory_mib=options["head_memory"],
        **_picked(options, "epochs batch learning_rate full_size_epochs order stage1_head exit_weight ema lovasz"),
        **_picked(options, "class_power loss_resolution seed"),
    )
    machines = parallel.Machines(**_picked(options, "accelerator devices nodes precision accumulate"))
    report = partial(click.echo, err=as_json)
    arguments = (workspace, data, choice, recipe, report, options["weights"], machines)
    if options["baseline"] and (options["source"] or options["teacher"]):
        raise InputError("--baseline trains a whole network for the sum of --epochs: it has no --from or --teacher")
    if options["baseline"]:
        folder, candidate = workspace.baseline, steps.train_baseline(*arguments)
    else:
        folder, candidate = workspace.candidate, steps.train(*arguments, options["source"], options["teacher"])
    if candidate is None:  # one of many processes; the first one speaks
        return None
    if as_json:
        return print_json({"folder": str(folder), **inspection.inspect_candidate(candidate).content})
    click.echo(f"{'baseline' if options['baseline'] else 'candidate network'} in {folder}")
    return print_next("export")


def _picked(options: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: options[name] for name in names.split()}


@main.command()
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--exits", type=_FILE, help="TOML that names another framework's tensors; with MODEL.onnx.")
@click.option("--confidence", type=click.Choice(["top1", "margin", "entropy"]), default="top1", show_default=True)
@click.option("--plain", is_flag=True, help="Leave the edge-aware step (Eq. 2-3) of the gate out.")
@_json_option
@click.pass_obj
def export(
    workspace: Workspace, source: Path | None, exits: Path | None, confidence: str, plain: bool, as_json: bool
) -> None:
    """Cut a candidate network (or a multi-exit ONNX) into checked graphs."""
    from mess_compile import inspection, steps
    from mess_compile.candidates import Gate

    with progress_bar(as_json) as progress:
        graph_set = steps.export(workspace, source, Gate(confidence, not plain), progress, exits)
    candidate = graph_set.candidate
    if as_json:
        return print_json(inspection.inspect_graphs(graph_set).content)
    weights = sum(path.stat().st_size for path in (workspace.graphs / "weights").glob("*"))
    click.echo(
        f"{len(graph_set.graphs)} graphs in {workspace.graphs}: {len(candidate.segments())} segments, "
        f"{len(candidate.heads)} heads; weights {weights / 2**20:.1f} MiB; all agree with the whole network"
    )
    if graph_set.baseline_alone is not None:
        click.echo(f"{' and '.join(graph_set.baselines)}: plans are held against the better one in mIoU")
    return print_next("profile --device host")


@main.command()
@click.option("--data", type=_FOLDER, help="Labelled images; remembered.")
@click.option("--split", help="val by default; val[:50] takes the first 50 files. Remembered.")
@click.option("--device", help="Run the engines of this device instead of ONNX Runtime here.")
@click.option("--host", help="Where the device is: ssh://user@host[:port]; the one that it was profiled at by default.")
@_PRECISION
@click.option("--accelerator", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--devices", default=1, show_default=True, help="Processes (GPUs) on each machine that share the images.")
@click.option("--nodes", default=1, show_default=True, help="Machines; torchrun and SLURM set both themselves.")
@_json_option
@click.pass_obj
def evaluate(workspace: Workspace, /, data: Path | None, split: str | None, as_json: bool, **options: Any) -> None:
    """Record how sure and how right every head is on labelled images."""
    from mess_compile import inspection, steps

    with progress_bar(as_json) as progress:
        found = steps.evaluate(workspace, data, split, progress, **options)
    if found is None:  # one of many processes; the first one speaks
        return None
    described = inspection.inspect_statistics(found)
    if as_json:
        return print_json(described.content)
    _print_inspection(described)
    return print_next("search --max-err 1%")


@main.command()
@click.option("--device", help="A known device (see `mess-compile devices`); the one profiled last by default.")
@_PRECISIONS
@_JUDGED
@click.option("--jobs", type=click.IntRange(1), help="Processes that build at once; one on each core by default.")
@click.option("--host", help="Build on the device itself: ssh://user@host[:port]; remembered.")
@_json_option
@click.pass_obj
def build(
    workspace: Workspace,
    device: str | None,
    precision: str,
    data: Path | None,
    jobs: int | None,
    host: str | None,
    as_json: bool,
) -> None:
    """Build the device's engines of every graph, here or there; what is there and unchanged is kept.

    A build that was broken off continues with the same command.
    """
    from mess_compile import steps

    precisions, tell = tuple(precision.split(",")), partial(click.echo, err=True)
    with progress_bar(as_json) as progress:
        builds = steps.build(workspace, device, precisions, data, jobs, progress, host, tell)
    if as_json:
        told = [
            {"engines": asdict(e.engines), "fallbacks": [asdict(f) for f in e.fallbacks], "place": e.place}
            for e in builds
        ]
        print_json({"builds": told})
    for each in () if as_json else builds:
        _print_engines(each.engines, each.place)
        for fallen in each.fallbacks:
            click.echo(f"{fallen.graph} is {fallen.used}, not {fallen.wanted}: {fallen.reason}")
    if all(len(each.engines.failed) == len(each.engines.entries) for each in builds):
        fail(f"no graph builds for {builds[0].engines.device}")
    return None if as_json else print_next(f"profile --device {builds[0].engines.device}")


def _print_engines(engines: Any, place: str) -> None:
    made = [entry for entry in engines.entries if entry.error is None]
    click.echo(
        f"{len(made)} engines of {len(engines.entries)} graphs in {engines.recipe} for {engines.device} "
        f"({engines.library} {engines.library_version}) in {place}, {engines.built} of them built now, "
        f"{sum(entry.bytes for entry in made) / 2**20:.1f} MiB"
    )
    for name in dict.fromkeys(name for entry in made for name in entry.rewrites):
        count = sum(name in entry.rewrites for entry in made)
        click.echo(f"rewritten for this target, outputs alike: {count} graphs, {name}")
    for entry in engines.failed:
        click.echo(f"FAILED  {entry.graph} ({entry.precision}): {entry.error}")


@main.command()
@click.option("--device", help="A known device (see `mess-compile devices`); remembered.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    help="Where the device is: ssh://user@host[:port], or a name of ~/.ssh/config; remembered. Of several devices of "
    "one kind that share the work the first is the one that plans are for.",
)
@click.option("--all", "everything", is_flag=True, help="Every graph; over SSH not only what could change the answer.")
@click.option(
    "--for",
    "wishes",
    multiple=True,
    help='Only what could change the answer to this, such as "--max-err 1%", the default over SSH.',
)
@click.option("--budget", help="The time that it may take, such as 30min; what is left then is estimated.")
@click.option("--seconds", type=float, help="The time that a graph which never is steady may take; 5 by default.")
@click.option(
    "--lock-clocks", is_flag=True, help="Hold the clocks while measuring; they are put back whatever happens."
)
@click.option("--estimate", is_flag=True, help="Without the device: what was not measured is estimated, and marked.")
@_PRECISIONS
@_JUDGED
@_json_option
@click.pass_obj
def profile(
    workspace: Workspace,
    device: str | None,
    hosts: tuple[str, ...],
    everything: bool,
    wishes: tuple[str, ...],
    budget: str | None,
    seconds: float | None,
    lock_clocks: bool,
    estimate: bool,
    precision: str,
    data: Path | None,
    as_json: bool,
) -> None:
    """Measure the graphs on the device: all of them here, over SSH what could change the answer, unless told otherwise.

    A measurement that was broken off continues with the same command.
    """
    from mess_compile import inspection, steps
    from mess_compile.runtime import profile as measuring

    if seconds is not None and not 0 < seconds <= 3600:
        raise InputError(f"--seconds {seconds:g} is not between 0 and 3600")
    measured_by = {"--host": hosts, "--all": everything, "--for": wishes, "--budget": budget, "--seconds": seconds}
    asked = [option for option, value in {**measured_by, "--lock-clocks": lock_clocks}.items() if value]
    if estimate and asked:
        raise click.UsageError(f"--estimate goes without the device: drop {', '.join(asked)}, or measure there.")
    if everything and (wishes or budget):
        raise click.UsageError("--all measures everything: drop --for and --budget.")
    thrift = None if everything else _thrift(wishes, budget)
    precisions, tell = tuple(precision.split(",")), partial(click.echo, err=True)
    with progress_bar(as_json) as progress:
        if estimate:
            table = steps.estimate(workspace, device, progress, precisions, data)
        else:
            effort = None if seconds is None else replace(measuring.Effort(), max_s=seconds)
            table = steps.profile(
                workspace, device, progress, precisions, data, effort, hosts or None, thrift, tell, lock_clocks
            )
    if as_json:
        return print_json(inspection.inspect_latency(table).content)
    _print_table_made(table)
    return print_next("search --max-err 1%")


def _print_table_made(table: Any) -> None:
    told = table.environment
    estimated = [entry for entry in table.entries.values() if entry.source == "estimated"]
    if estimated:
        widest = max(entry.error for entry in estimated)
        click.echo(
            f"{len(estimated)} of {len(table.entries)} entries for {table.device} ESTIMATED from "
            f"{told.get('estimated_from', 'those that were measured')}: each may be wrong by a factor, up to "
            f"{widest:.1f} (`inspect latency`)"
        )
    if "coverage" in told:
        click.echo(told["coverage"])
    if len(estimated) == len(table.entries):
        return
    baselines = [entry for (graph, _), entry in table.entries.items() if graph == "baseline"]
    figures = ", ".join(f"{e.mean_ms:.2f} ms in {e.precision} (p99 {e.p99_ms:.2f})" for e in baselines)
    click.echo(
        f"{len(table.entries) - len(estimated)} entries measured on {table.device} ({table.library} "
        f"{table.library_version}, {told['cpu']}, {told['cores']} cores): baseline {figures or 'not among them'}"
    )
    if "protocol" in told:
        click.echo(f"protocol: {told['protocol']}")
    if "beside" in told:
        click.echo(f"beside {told['host']}, apart from this table: {told['beside']}")
    for failure in table.failed.values():
        click.echo(f"FAILED  {failure.graph} ({failure.precision}), not in any plan: {failure.error}")
    spread, unsteady = float(told["reference_spread"]), float(told["unsteady"])
    click.echo(
        f"{told['verdict']}: the reference moved by {spread:.1%} between rounds, {unsteady:.0%} of the graphs did not "
        "settle"
    )
    if told["verdict"] == "unstable":
        click.echo(f"likely cause: {told['likely_cause']}; profile again when that is gone")


@main.command()
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
@_json_option
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
        _print_inspection(inspection.Inspection({}, (inspection.points_table(result.plan),)))
        for reason in reasons[i : i + 1]:
            _print_inspection(reason)
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


def _thrift(wishes: tuple[str, ...], budget: str | None) -> Any:
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


@main.command()
@click.argument("plan", type=_FILE, required=False)
@click.option("-o", "--output", type=_FILE, help="DEVICE.mess in the workspace by default.")
@click.option("--letterbox", is_flag=True, help="Frames of another shape keep their proportions; stretched otherwise.")
@click.option("--sign", type=_FILE, metavar="KEY", help="An OpenSSH private key, such as ~/.ssh/id_ed25519.")
@click.option("--engines", is_flag=True, help="Take built engines along; used where the bundle is signed.")
@click.option("--single-file", type=_FILE, metavar="MODEL.onnx", help="Also one ONNX with If, for ONNX Runtime alone.")
@_json_option
@click.pass_obj
def bundle(
    workspace: Workspace,
    plan: Path | None,
    output: Path | None,
    letterbox: bool,
    sign: Path | None,
    engines: bool,
    single_file: Path | None,
    as_json: bool,
) -> None:
    """Write the chosen plan, its graphs and the runtime as one file for the device."""
    from mess_compile import steps

    options = steps.BundleOptions("letterbox" if letterbox else "stretch", sign, engines, single_file)
    with progress_bar(as_json) as progress:
        path, manifest = steps.bundle(workspace, plan, output, options, progress)
    size = path.stat().st_size
    if as_json:
        return print_json({"bundle": str(path), "bytes": size, "files": len(manifest.files)})
    click.echo(f"{path}: {size / 2**20:.2f} MiB, {len(manifest.files)} files, {len(manifest.golden)} golden frames")
    return print_next(f"run {quoted(path)} IMAGE...", f"bench {quoted(path)} --data DIR")


@main.command()
@click.argument("bundle", type=_BUNDLE)
@click.argument("images", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=_FOLDER, default="predictions", show_default=True)
@click.option("--progressive", is_flag=True, help="Also a strip: the input, and every exit's labels.")
@click.option("--truth", type=_FOLDER, help="Folder of label PNGs to show at the end of the strip.")
@click.option("--deadline", help="Refine as long as the next exit's p99 fits, such as 20ms.")
@click.option("--operating-point", help="The name of other thresholds that the bundle holds; see `inspect BUNDLE`.")
@_json_option
def run(
    bundle: Path,
    images: tuple[Path, ...],
    output: Path,
    progressive: bool,
    truth: Path | None,
    deadline: str | None,
    operating_point: str | None,
    as_json: bool,
) -> None:
    """Segment images: a palette PNG of the labels and an overlay for each."""
    from mess_compile import steps
    from mess_compile.search.requirement import parse_milliseconds

    deadline_ms = None if deadline is None else parse_milliseconds(deadline)
    if deadline is not None and operating_point is not None:
        raise click.UsageError("--deadline decides by time, --operating-point by confidence: give one of them.")

    if truth is not None and not progressive:
        raise click.UsageError("--truth is shown in the strip of --progressive; add it.")

    def tell(result: steps.ImageResult) -> None:
        if not as_json:
            click.echo(
                f"{result.image}: exit {result.exit}, confidence {result.confidence:.3f}, {result.latency_ms:.2f} ms "
                f"-> {', '.join(str(path) for path in result.pictures)}"
            )

    results = steps.run(bundle, images, output, progressive, truth, tell, deadline_ms, operating_point)
    if as_json:
        return print_json({"images": [asdict(result) for result in results]})
    return print_next(f"bench {quoted(bundle)} --data DIR")


@main.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--data", type=_FOLDER, help="Labelled images; the workspace's by default.")
@click.option("--split", default="val", show_default=True, help="Report on images that nothing was tuned on.")
@click.option("--passes", default=3, show_default=True, help="How often every image is measured.")
@click.option("--deadline", help="Refine every image until then, such as 20ms: what is there, and how often too late.")
@_json_option
@click.pass_obj
def bench(
    workspace: Workspace, bundle: Path, data: Path | None, split: str, passes: int, deadline: str | None, as_json: bool
) -> None:
    """Measured against predicted, and against the better single-exit baseline in the same run."""
    from mess_compile import steps

    if deadline is not None:
        return _bench_deadline(workspace, bundle, data, split, passes, deadline, as_json)
    with progress_bar(as_json) as progress:
        result = steps.bench(workspace, bundle, data, split, passes, progress)
    if as_json:
        return print_json(asdict(result))
    columns = {result.baseline_name: result.baseline}
    columns |= {name: getattr(result, name) for name in ("predicted", "replayed", "measured")}
    rows = [
        [name, f"{c.miou:.2f}", f"{c.latency_ms:.2f}", f"{c.gmacs:.3f}", _rates(c.exit_rates)]
        for name, c in columns.items()
    ]
    print_table(
        f"{result.images} images of {result.split}, {result.passes} passes",
        ["", "mIoU %", "latency ms", "GMACs", "exits"],
        rows,
    )
    for other in result.other_baselines:
        click.echo(f"{result.baseline_name} is the better baseline here: {other.name} has {other.miou:.2f} % mIoU")
    low, high = result.latency_ratio_range
    click.echo(
        f"measured against {result.baseline_name} in the same run: {result.latency_ratio:.2f}x in latency (passes "
        f"{low:.2f} to {high:.2f}), {result.workload_ratio:.2f}x in workload, {result.miou_difference:+.2f} pp of mIoU"
    )
    if result.tuned_on:
        click.echo(
            f"the plan was chosen on {result.tuned_on} of these {result.images} images: a result from tuning data; "
            "--split names others"
        )
    for near in result.disagreements:
        click.echo(
            f"{near.image}: replayed exit {near.replayed_exit}, measured {near.measured_exit}, "
            f"{near.counts_from_cut} counts from the cut"
        )
    return print_next("search --max-err 0.1%", f"verify {quoted(bundle)}")


def _bench_deadline(
    workspace: Workspace, bundle: Path, data: Path | None, split: str, passes: int, deadline: str, as_json: bool
) -> None:
    from mess_compile import steps
    from mess_compile.search.requirement import parse_milliseconds

    deadline_ms = parse_milliseconds(deadline)
    with progress_bar(as_json) as progress:
        found = steps.bench_deadline(workspace, bundle, data, split, passes, deadline_ms, progress)
    if as_json:
        return print_json(asdict(found))
    click.echo(
        f"{found.images} images of {found.split}, {found.passes} passes, at {found.deadline_ms:g} ms: "
        f"{found.miou:.2f} % mIoU, {found.confidence:.0%} of the cells sure; last exits {_rates(found.exit_rates)}"
    )
    click.echo(
        f"misses: {found.missed_later:.2%} of the images had a later result too late, {found.missed_first:.2%} "
        f"even the first; the last result came after {found.p50_ms:.2f} ms (median), {found.p99_ms:.2f} ms (p99)"
    )
    return print_next(f"run {quoted(bundle)} IMAGE... --deadline {deadline_ms:g}ms")


_REMEDIES = {
    "power mode": "set the power mode back, or profile again",
    "latency": "see what else runs and how warm it is, profile again, or allow more by --latency-factor",
    "signature": "get it from somebody whom you know, or sign it by `bundle --sign KEY`",
}


@main.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--allowed-signers", type=_FILE, help="Whose signature counts: NAME and public key, one a line.")
@click.option("--identity", help="Which of the allowed signers; any by default.")
@click.option("--require-signature", is_flag=True, help="A bundle without a signature fails; nothing of it runs.")
@click.option(
    "--latency-factor",
    type=click.FloatRange(min=0, min_open=True),
    help="What golden frames may take, in multiples of the plan's latency; 1.25 by default.",
)
@_json_option
def verify(
    bundle: Path,
    allowed_signers: Path | None,
    identity: str | None,
    require_signature: bool,
    latency_factor: float | None,
    as_json: bool,
) -> None:
    """Hashes, signature, golden frames, latency: does this machine compute what was evaluated?"""
    from mess_compile.runtime.signature import Signers
    from mess_compile.runtime.verify import LATENCY_FACTOR, Demands, verify_bundle

    if allowed_signers is None and (require_signature or identity is not None):
        raise click.UsageError("a signature is checked by --allowed-signers FILE; add it.")
    signers = None if allowed_signers is None else Signers(allowed_signers, identity)
    checks = verify_bundle(bundle, demands=Demands(signers, require_signature, latency_factor or LATENCY_FACTOR))
    good = all(check.passed for check in checks)
    if as_json:
        print_json({"passed": good, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            click.echo(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    if not good:
        failed = [check.name for check in checks if not check.passed]
        remedy = _REMEDIES.get(failed[0], "write it again on this machine")
        fail(f"{bundle} is not here what it was made to be ({', '.join(failed)}): {remedy}")
    if not as_json:
        print_next(f"run {quoted(bundle)} IMAGE...")


@main.command()
@_json_option
@click.pass_obj
def devices(workspace: Workspace, as_json: bool) -> None:
    """Known targets, ours and the workspace's own, and which of them this machine is."""
    from mess_compile import targets
    from mess_compile.runtime import machine as machines

    machine = machines.this_machine()
    known = targets.known_targets(workspace.root).values()
    here = targets.targets_here(known, machine)
    if as_json:
        found = [{**asdict(t), "here": t in here, "differences": targets.differences(t, machine)} for t in known]
        return print_json({"devices": found, "machine": asdict(machine)})
    rows = [["yes" if target in here else "", *targets.in_cells(target)] for target in known]
    header = ["device", "here", "library", "precisions", "capability", "peak TFLOP/s, TOP/s", "GB/s", "description"]
    print_table("", header, [[name, mark, *rest] for mark, name, *rest in rows])
    click.echo(f"this machine: {machines.in_words(machine)}")
    return print_next(f"profile --device {here[0].name if here else 'NAME'}")


@main.command()
@_json_option
@click.pass_obj
def doctor(workspace: Workspace, as_json: bool) -> None:
    """What this machine can train, build and run."""
    from mess_compile.doctor import examine

    findings = examine(workspace.root)
    if as_json:
        return print_json({"findings": [asdict(finding) for finding in findings]})
    for finding in findings:
        click.echo(f"{'yes' if finding.possible else 'no '}  {finding.what}: {finding.detail}")
    return print_next("demo", "train --data DIR")


@main.command()
@click.argument("thing")
@click.option(
    "--classes", type=click.IntRange(2, 255), default=21, show_default=True, help="Classes, when THING is a backbone."
)
@click.option("--input", "input_hw", default="512x512", show_default=True, help="Input size, when THING is a backbone.")
@click.option("--exits", default=6, show_default=True, help="Exit points, when THING is a backbone.")
@_json_option
@click.pass_obj
def inspect(workspace: Workspace, thing: str, classes: int, input_hw: str, exits: int, as_json: bool) -> None:
    """What is in a backbone (resnet50, mobilenetv2), bundle, or the workspace's graphs, statistics, latency or plan."""
    from mess_compile import inspection

    found = inspection.inspect(workspace, thing, classes, _size(input_hw), exits)
    if as_json:
        return print_json(found.content)
    _print_inspection(found)
    return print_next(_after_inspection(thing))


def _after_inspection(thing: str) -> str:
    if thing in ("resnet50", "mobilenetv2"):
        return f"train --data DIR --backbone {thing}"
    after = {"graphs": "profile --device host", "plan": "bundle"}
    after |= dict.fromkeys(("statistics", "latency"), "search --max-err 1%")
    return after.get(thing, f"run {quoted(Path(thing))} IMAGE...")
