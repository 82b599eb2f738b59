"""The command `run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import fail, print_json, reporting, say, warn
from mess_compile.cli.options import BUNDLE, FOLDER, TARGET, gathered, json_option, picked, rates, verbose_option
from mess_compile.data_folder import MOST_OFFSET

if TYPE_CHECKING:
    from mess_compile.steps.run import ImageFailure, ImageResult, VideoResult


@dataclass(frozen=True)
class RunArguments:
    """How `run` segments, what it writes, and what it prints."""

    progressive: bool
    truth: Path | None
    label_offset: int
    deadline: str | None
    operating_point: str | None
    every: int
    limit: int | None
    label_pictures: bool
    target: str | None
    verbose: bool
    as_json: bool


@click.command(short_help="Segment images, folders, videos or a camera.")
@click.argument("bundle", type=BUNDLE, shell_complete=completion.bundles)
@click.argument("sources", type=BUNDLE, nargs=-1, required=True, metavar="IMAGE|FOLDER|VIDEO|camera:N...")
@click.option("-o", "--output", type=FOLDER, default="predictions", show_default=True, help="Folder for the results.")
@click.option("--progressive", is_flag=True, help="Also write a strip with the input and the labels of every stage.")
@click.option("--truth", type=FOLDER, help="With --progressive: folder of true label PNGs, to end the strip with.")
@click.option(
    "--label-offset",
    type=click.IntRange(0, MOST_OFFSET),
    default=0,
    metavar="N",
    help="Label value of the first class in --truth; 1 if 0 means unlabelled.",
)
@click.option(
    "--deadline", help="Per-image deadline, such as 20ms: go on to the next stage while its p99 latency fits."
)
@click.option(
    "--operating-point",
    shell_complete=completion.operating_points,
    help="Name of other thresholds in the bundle, such as fast; `inspect plan` lists them.",
)
@click.option(
    "--every", type=click.IntRange(1), default=1, show_default=True, help="Use only every Nth image or frame."
)
@click.option("--limit", type=click.IntRange(1), help="Use at most this many images or frames.")
@click.option(
    "--labels", "label_pictures", is_flag=True, help="Also write a label PNG of every frame of a video or camera."
)
@TARGET
@verbose_option
@json_option
@gathered(RunArguments)
def run(bundle: Path, sources: tuple[Path, ...], output: Path, arguments: RunArguments) -> None:
    """Segment images, folders of images, videos, or the frames of a camera until Ctrl-C.

    Writes the labels of each image as a palette PNG, with an overlay; for videos, a video with overlay, stage and
    latency.
    """
    from mess_compile import steps
    from mess_compile.runtime.images.confidence import LEGEND
    from mess_compile.search.requirement import parse_milliseconds
    from mess_compile.steps.run import is_moving

    as_json, deadline = arguments.as_json, arguments.deadline
    deadline_ms = None if deadline is None else parse_milliseconds(deadline)
    _refuse_contradictions(arguments)
    options = picked(arguments, "progressive truth label_offset operating_point every limit label_pictures target")
    if arguments.progressive and any(map(is_moving, sources)):
        raise click.UsageError("--progressive makes a strip of an image: leave videos and cameras out.")

    def show(result: steps.ImageResult | steps.VideoResult) -> None:
        if as_json:
            return
        if isinstance(result, steps.VideoResult):
            _print_video(result)
        else:
            say(_of_image(result, arguments.verbose))

    def show_failure(failure: steps.ImageFailure) -> None:
        failures.append(failure)
        if len(failures) > 1 or not _is_all(failures, sources):
            say(f"failed: {failure.error}", err=True)

    failures: list[steps.ImageFailure] = []
    words = ""
    with reporting(as_json) as reporter:
        how = steps.RunOptions(deadline_ms=deadline_ms, **options)
        try:
            results = steps.run(bundle, sources, output, how, show, show_failure, reporter)
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
    if any(isinstance(result, steps.ImageResult) for result in results):
        say(f"labels and overlays in {output}")
    if arguments.verbose and any(getattr(result, "confidence", None) is not None for result in results):
        say(LEGEND)
    return hints.print_known(hints.bench_on_data(bundle))


def _refuse_contradictions(arguments: RunArguments) -> None:
    if arguments.deadline is not None and arguments.operating_point is not None:
        raise click.UsageError("--deadline decides by time, --operating-point by confidence: give one of them.")
    if arguments.truth is not None and not arguments.progressive:
        raise click.UsageError("--truth is shown in the strip of --progressive: add it.")
    if arguments.truth is None and arguments.label_offset:
        raise click.UsageError("--label-offset is about the labels of --truth: add it.")


def _of_image(result: ImageResult, verbose: bool) -> str:
    from mess_compile.runtime.images.confidence import exit_text

    written = f" -> {', '.join(str(path) for path in result.pictures)}" if verbose else ""
    words = exit_text(result.exit, result.confidence, result.needed, result.policy)
    return f"{result.image}: {words}, {result.latency_ms:.2f} ms{written}"


def _is_all(failures: Sequence[ImageFailure], sources: Sequence[Path]) -> bool:
    """Whether the only image or video failed: then the error at the end names it."""
    return len(sources) == 1 and [each.source for each in failures if not each.frames] == [str(sources[0])]


def _print_video(result: VideoResult) -> None:
    from mess_compile.steps.run import counts_frames

    written = [str(path) for path in (result.video, result.labels) if path is not None]
    say(
        f"{result.source}: {result.frames} frames at {result.frames_per_s:.1f}/s, "
        f"exits {rates(count / result.frames for count in result.exits)}, {result.mean_latency_ms:.2f} ms a frame "
        f"-> {', '.join(written)}"
    )
    if result.unread and not counts_frames(result.source):
        warn(f"{result.source} announces {result.unread} more frames, which cannot be read")
    if result.stopped:
        say("stopped by Ctrl-C; what is written is whole")
