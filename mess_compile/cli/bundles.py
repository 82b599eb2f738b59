"""Commands around the bundle: bundle, run, bench, verify, inspect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import fail, print_json, print_next, print_table, progress_bar, quoted, say
from mess_compile.cli.options import (
    BUNDLE,
    FILE,
    FOLDER,
    data_options,
    dry_run_option,
    json_option,
    print_inspection,
    print_prospects,
    rates,
    size,
)
from mess_compile.data_folder import MOST_OFFSET, DataFolder

if TYPE_CHECKING:
    from mess_compile.bench.run import Bench
    from mess_compile.steps.run import ImageFailure, ImageResult, VideoResult
    from mess_compile.workspace import Workspace

_target_option = click.option(
    "--target",
    shell_complete=completion.targets,
    help="Which plan: a device, or device and precision such as xavier:fp16.",
)


@click.command(short_help="Write plan, graphs and runtime as one file.")
@click.argument("plans", nargs=-1, metavar="[PLAN|DEVICE]...", shell_complete=completion.plans)
@click.option("-o", "--output", type=FILE, help="DEVICE.mess in the workspace by default.")
@click.option("--letterbox", is_flag=True, help="Frames of another shape keep their proportions; stretched otherwise.")
@click.option("--sign", type=FILE, metavar="KEY", help="An OpenSSH private key, such as ~/.ssh/id_ed25519.")
@click.option("--engines", is_flag=True, help="Take built engines along; used where the bundle is signed.")
@click.option(
    "--single-file",
    type=FILE,
    metavar="MODEL.onnx",
    help="Also the first plan as one ONNX with If, for ONNX Runtime alone.",
)
@click.option("--release", type=click.IntRange(0, 999_999_999), help="A growing number: `ship` refuses an older one.")
@dry_run_option
@json_option
@click.pass_obj
def bundle(
    workspace: Workspace,
    plans: tuple[str, ...],
    output: Path | None,
    letterbox: bool,
    sign: Path | None,
    engines: bool,
    single_file: Path | None,
    release: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the chosen plan, its graphs and the runtime as one file for the device.

    A plan is named by the file that `search` wrote, or by its device; by default it is that of the device profiled
    last. Several make one bundle: for several devices, each of which takes its own plan, or for one in several
    precisions, of which the first runs and a safer one takes over where it fails.
    """
    from mess_compile import steps

    options = steps.BundleOptions("letterbox" if letterbox else "stretch", sign, engines, single_file, release)
    if dry_run:
        return print_prospects(steps.foresee_bundle(workspace, plans, output, options), as_json)
    with progress_bar(as_json) as progress:
        path, manifest = steps.bundle(workspace, plans, output, options, progress)
    size = path.stat().st_size
    doubts = list(dict.fromkeys(doubt for plan in manifest.plans for doubt in plan.doubts))
    if as_json:
        names = [plan.name for plan in manifest.plans]
        told = {"bundle": str(path), "bytes": size, "files": len(manifest.files), "plans": names, "doubts": doubts}
        return print_json(told)
    frames = len({golden.frame for golden in manifest.golden})
    say(f"{path}: {size / 2**20:.2f} MiB, {len(manifest.files)} files, {frames} golden frames")
    if len(manifest.plans) > 1:
        say(f"plans: {', '.join(plan.name for plan in manifest.plans)}; the first for a device runs there")
    _print_doubts(doubts)
    return hints.after_a_bundle(path, manifest.plans)


def _print_doubts(doubts: Iterable[str]) -> None:
    for doubt in doubts:
        say(f"mind: {doubt}")


@click.command(short_help="Segment images, folders, videos or a camera.")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@click.argument("sources", type=BUNDLE, nargs=-1, required=True, metavar="IMAGE|FOLDER|VIDEO|camera:N...")
@click.option("-o", "--output", type=FOLDER, default="predictions", show_default=True)
@click.option("--progressive", is_flag=True, help="Also a strip: the input, and every exit's labels.")
@click.option("--truth", type=FOLDER, help="Folder of label PNGs to show at the end of the strip.")
@click.option(
    "--label-offset",
    type=click.IntRange(0, MOST_OFFSET),
    default=0,
    metavar="N",
    help="The label value of the first class in --truth, 1 where 0 is unlabelled.",
)
@click.option("--deadline", help="Refine as long as the next exit's p99 fits, such as 20ms.")
@click.option(
    "--operating-point",
    shell_complete=completion.operating_points,
    help="The name of other thresholds that the bundle holds; see `inspect BUNDLE`.",
)
@click.option("--every", type=click.IntRange(1), default=1, show_default=True, help="Of a folder or video: each Nth.")
@click.option("--limit", type=click.IntRange(1), help="Of a folder, video or camera: so many at most.")
@click.option("--labels", "label_pictures", is_flag=True, help="Of a video or camera: also a label PNG of every frame.")
@_target_option
@json_option
def run(bundle: Path, sources: tuple[Path, ...], output: Path, as_json: bool, **options: Any) -> None:
    """Segment images, folders of them, videos or what a camera sees, until Ctrl-C.

    An image gets a palette PNG of its labels and an overlay, a video one with overlay, exit and latency on it.
    """
    from mess_compile import steps
    from mess_compile.runtime.images.confidence import LEGEND
    from mess_compile.search.requirement import parse_milliseconds
    from mess_compile.steps.run import is_moving

    deadline = options.pop("deadline")
    deadline_ms = None if deadline is None else parse_milliseconds(deadline)
    if deadline is not None and options["operating_point"] is not None:
        raise click.UsageError("--deadline decides by time, --operating-point by confidence: give one of them.")
    if options["truth"] is not None and not options["progressive"]:
        raise click.UsageError("--truth is shown in the strip of --progressive; add it.")
    if options["truth"] is None and options["label_offset"]:
        raise click.UsageError("--label-offset says how --truth is read; add it.")
    if options["progressive"] and any(map(is_moving, sources)):
        raise click.UsageError("--progressive makes a strip of an image: leave videos and cameras out.")

    def tell(result: steps.ImageResult | steps.VideoResult) -> None:
        if not as_json:
            say(_of_video(result) if isinstance(result, steps.VideoResult) else _of_image(result))

    def tell_failure(failure: steps.ImageFailure) -> None:
        failures.append(failure)
        if len(failures) > 1 or not _is_all(failures, sources):
            say(f"failed: {failure.error}", err=True)

    failures: list[steps.ImageFailure] = []
    words = ""
    with progress_bar(as_json) as progress:
        how = steps.RunOptions(deadline_ms=deadline_ms, **options)
        try:
            results = steps.run(bundle, sources, output, how, tell, progress, tell_failure, partial(say, err=as_json))
        except steps.RunError as error:
            results, words = error.results, str(error)
    if as_json:
        videos = [asdict(result) for result in results if isinstance(result, steps.VideoResult)]
        images = [asdict(result) for result in results if isinstance(result, steps.ImageResult)]
        print_json({"images": images, "videos": videos, "failed": [asdict(failure) for failure in failures]})
    if words:
        fail(words)
    if as_json:
        return None
    if any(isinstance(result, steps.ImageResult) and result.confidence is not None for result in results):
        say(f"{LEGEND} (`mess-compile inspect {quoted(bundle)}`)")
    return hints.print_known(hints.bench_on_data(bundle))


def _of_image(result: ImageResult) -> str:
    from mess_compile.runtime.images.confidence import exit_words

    return (
        f"{result.image}: {exit_words(result.exit, result.confidence)}, {result.latency_ms:.2f} ms "
        f"-> {', '.join(str(path) for path in result.pictures)}"
    )


def _is_all(failures: Sequence[ImageFailure], sources: Sequence[Path]) -> bool:
    """Whether what failed is the one image or video there is: the error at the end says it."""
    return len(sources) == 1 and [each.source for each in failures if not each.frames] == [str(sources[0])]


def _of_video(result: VideoResult) -> str:
    from mess_compile.steps.run import counts_frames

    written = [str(path) for path in (result.video, result.labels) if path is not None]
    told = (
        f"{result.source}: {result.frames} frames at {result.frames_per_s:.1f}/s, "
        f"exits {rates(count / result.frames for count in result.exits)}, {result.mean_latency_ms:.2f} ms a frame "
        f"-> {', '.join(written)}"
    )
    if result.unread and not counts_frames(result.source):
        told += f"\nmind: {result.source} announces {result.unread} more frames, which cannot be read"
    return told + "\nstopped there by Ctrl-C; what is written is whole" * result.stopped


@click.command(short_help="Measured against predicted, and against the baseline.")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@data_options("Labelled images; the workspace's by default.")
@click.option(
    "--split",
    default="val",
    show_default=True,
    shell_complete=completion.splits,
    help="Report on images that nothing was tuned on.",
)
@click.option("--passes", default=3, show_default=True, help="How often every image is measured.")
@click.option("--deadline", help="Refine every image until then, such as 20ms: what is there, and how often too late.")
@click.option("--strict", is_flag=True, help="End with exit code 3 where the plan's promise did not hold.")
@_target_option
@dry_run_option
@json_option
@click.pass_obj
def bench(
    workspace: Workspace,
    bundle: Path,
    data: DataFolder | None,
    split: str,
    passes: int,
    deadline: str | None,
    strict: bool,
    target: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measured against predicted, and against the better single-exit baseline in the same run.

    What the plan was asked to keep (`search --max-err 1%`) is held against the measurement: held, or MISSED.
    """
    from mess_compile import steps
    from mess_compile.search.display import speed, work
    from mess_compile.search.requirement import parse_milliseconds

    if strict and deadline is not None:
        raise click.UsageError("--strict is about the bounds that the plan was searched by: leave --deadline out.")

    if dry_run:
        deadline_ms = None if deadline is None else parse_milliseconds(deadline)
        foreseen = steps.foresee_bench(workspace, bundle, data, split, passes, target, deadline_ms)
        return print_prospects(foreseen, as_json)
    if deadline is not None:
        return _bench_deadline(workspace, bundle, data, split, passes, deadline, target, as_json)
    with progress_bar(as_json) as progress:
        result = steps.bench(workspace, bundle, data, split, passes, progress, target, partial(say, err=as_json))
    if as_json:
        print_json(asdict(result))
        return _exit_if_missed(result, strict)
    columns = {result.baseline_name: result.baseline}
    columns |= {name: getattr(result, name) for name in ("predicted", "replayed", "measured")}
    rows = [
        [name, f"{c.miou:.2f}", f"{c.latency_ms:.2f}", f"{c.gmacs:.3f}", rates(c.exit_rates)]
        for name, c in columns.items()
    ]
    print_table(
        f"{result.images} images of {result.split}, {result.passes} passes",
        ["", "mIoU %", "latency ms", "GMACs", "exits"],
        rows,
    )
    for other in result.other_baselines:
        say(f"{result.baseline_name} is the better baseline here: {other.name} has {other.miou:.2f} % mIoU")
    low, high = result.latency_ratio_range
    say(
        f"measured against {result.baseline_name} in the same run: {speed(result.latency_ratio)} (passes "
        f"{low:.2f}x to {high:.2f}x), {work(result.workload_ratio)}, {result.miou_difference:+.2f} pp of mIoU"
    )
    for promise in result.promises:
        say(promise.sentence)
    if result.tuned_on:
        say(
            f"the plan was chosen on {result.tuned_on} of these {result.images} images: a result from tuning data; "
            "--split names others"
        )
    for near in result.disagreements:
        say(
            f"{near.image}: replayed exit {near.replayed_exit}, measured {near.measured_exit}, "
            f"{near.counts_from_cut} counts from the cut"
        )
    _print_doubts(result.doubts)
    print_next(*_after_bench(result, bundle))
    return _exit_if_missed(result, strict)


MISSED = 3
"""The exit code of `bench --strict` for a bench that was done, and found a promise missed."""


def _exit_if_missed(result: Bench, strict: bool) -> None:
    if strict and result.missed:
        raise click.exceptions.Exit(MISSED)


_BOUNDS = {
    "latency_ms": "--max-latency {:.4g}ms",
    "p95_ms": "--max-latency-p95 {:.4g}ms",
    "worst_ms": "--max-latency-worst {:.4g}ms",
    "gmacs": "--max-workload {:.4g}",
    "energy_mj": "--max-energy {:.4g}mJ",
    "memory_bytes": "--max-memory {:.0f}B",
}
"""How `search` is asked for the bounds that a bench speaks of."""


def _after_bench(result: Bench, bundle: Path) -> list[str]:
    """What follows from the promises: a safer plan, a fresh latency table, or shipping."""
    from mess_compile.search.requirement import safer_max_err

    missed, report = {each.quantity: each for each in result.missed}, hints.for_device("report", result.device)
    if not missed:
        return [report, *filter(None, [hints.ship_to_host(bundle, result.device)])]
    steps = []
    if "err_pp" in missed and missed["err_pp"].asked > 0:  # nothing is safer than 0
        lost = missed["err_pp"]
        safer = safer_max_err(lost.asked, lost.found or 0.0)
        others = [_BOUNDS[each.quantity].format(each.asked) for each in result.promises if each is not lost]
        asked = hints.search_for(result.device, f"{safer:.2g}%")
        steps.append(" ".join([asked, *others]))
    if set(missed) & {"latency_ms", "p95_ms", "worst_ms"}:
        steps.append(f"profile --device {result.device}")
    return [*steps, report]


def _bench_deadline(
    workspace: Workspace,
    bundle: Path,
    data: DataFolder | None,
    split: str,
    passes: int,
    deadline: str,
    target: str | None,
    as_json: bool,
) -> None:
    from mess_compile import steps
    from mess_compile.search.requirement import parse_milliseconds

    deadline_ms = parse_milliseconds(deadline)
    with progress_bar(as_json) as progress:
        tell = partial(say, err=as_json)
        found = steps.bench_deadline(workspace, bundle, data, split, passes, deadline_ms, progress, target, tell)
    if as_json:
        return print_json(asdict(found))
    sure = "" if found.confidence is None else f", {found.confidence:.0%} of the cells sure"
    say(
        f"{found.images} images of {found.split}, {found.passes} passes, at {found.deadline_ms:g} ms: "
        f"{found.miou:.2f} % mIoU{sure}; last exits {rates(found.exit_rates)}"
    )
    say(
        f"misses: {found.missed_later:.2%} of the images had a later result too late, {found.missed_first:.2%} "
        f"even the first; the last result came after {found.p50_ms:.2f} ms (median), {found.p99_ms:.2f} ms (p99)"
    )
    _print_doubts(found.doubts)
    return hints.print_known(hints.run_on_an_image(bundle, f" --deadline {deadline_ms:g}ms"))


_REMEDIES = {
    "power mode": "set the power mode back, or profile again",
    "latency": "see what else runs and how warm it is, profile again, or allow more by --latency-factor",
    "signature": "get it from somebody whom you know, or sign it by `bundle --sign KEY`",
}


@click.command(short_help="Does this machine compute what was evaluated?")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@click.option("--allowed-signers", type=FILE, help="It must be signed by one of them: NAME and public key, one a line.")
@click.option("--identity", help="Which of the allowed signers; any by default.")
@click.option("--require-signature", is_flag=True, help="Refuse to go on without --allowed-signers.")
@click.option(
    "--latency-factor",
    type=click.FloatRange(min=0, min_open=True),
    help="What golden frames may take, in multiples of the plan's latency; 1.25 by default.",
)
@_target_option
@json_option
def verify(
    bundle: Path,
    allowed_signers: Path | None,
    identity: str | None,
    require_signature: bool,
    latency_factor: float | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Hashes, signature, golden frames, latency: does this machine compute what was evaluated?"""
    from mess_compile.runtime.bundle.signature import Signers
    from mess_compile.runtime.serve.verify import LATENCY_FACTOR, Demands, verify_bundle

    if allowed_signers is None and (require_signature or identity is not None):
        raise click.UsageError("a signature is checked by --allowed-signers FILE; add it.")
    signers = None if allowed_signers is None else Signers(allowed_signers, identity)
    demands = Demands(signers, require_signature, latency_factor or LATENCY_FACTOR)
    with progress_bar(as_json) as progress:
        checks = verify_bundle(bundle, target, demands, progress)
    good = all(check.passed for check in checks)
    if as_json:
        print_json({"passed": good, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            say(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    if not good:
        failed = [check.name for check in checks if not check.passed]
        remedy = _REMEDIES.get(failed[0], "write it again on this machine")
        fail(f"{bundle} failed verification on this machine ({', '.join(failed)}): {remedy}")
    if not as_json:
        hints.print_known(hints.run_on_an_image(bundle))


@click.command(short_help="What is in a backbone, bundle, plan or artefact.")
@click.argument("thing", shell_complete=completion.inspected)
@click.option(
    "--classes", type=click.IntRange(2, 255), default=21, show_default=True, help="Classes, when THING is a backbone."
)
@click.option("--input", "input_hw", default="512x512", show_default=True, help="Input size, when THING is a backbone.")
@click.option("--exits", default=6, show_default=True, help="Exit points, when THING is a backbone.")
@click.option("--all", "whole_front", is_flag=True, help="Every plan of the front, when THING is a plan.")
@json_option
@click.pass_obj
def inspect(
    workspace: Workspace, thing: str, classes: int, input_hw: str, exits: int, whole_front: bool, as_json: bool
) -> None:
    """What is in a backbone (resnet50, mobilenetv2), bundle, plan (its file or device), or the workspace's graphs,
    statistics, latency or plan."""
    from mess_compile.report import inspection

    found = inspection.inspect(workspace, thing, classes, size(input_hw), exits, whole_front)
    if as_json:
        return print_json(found.content)
    print_inspection(found)
    return hints.print_known(_after_inspection(thing, found.content))


def _after_inspection(thing: str, content: dict[str, Any]) -> str | None:
    if thing in ("resnet50", "mobilenetv2"):
        known = hints.workspace_here().memory().data is not None
        return f"train --data {quoted(hints.data_root())} --backbone {thing}" if known else None
    if "certificate" in content:
        return "bundle" if thing == "plan" else f"bundle {quoted(Path(thing))}"
    after = {"graphs": "profile --device host"}
    after |= dict.fromkeys(("statistics", "latency"), "search --max-err 1%")
    if thing in after:
        return after[thing]
    here = any(hints.runs_here(plan["target"], plan["library"]) for plan in content["plans"])
    return hints.run_on_an_image(Path(thing)) if here else None
