"""The command `run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import fail, print_json, quoted, reporting, say
from mess_compile.cli.options import BUNDLE, FOLDER, TARGET, json_option, rates
from mess_compile.data_folder import MOST_OFFSET

if TYPE_CHECKING:
    from mess_compile.steps.run import ImageFailure, ImageResult, VideoResult


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
@TARGET
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
    with reporting(as_json) as reporter:
        how = steps.RunOptions(deadline_ms=deadline_ms, **options)
        try:
            results = steps.run(bundle, sources, output, how, tell, tell_failure, reporter)
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
    from mess_compile.runtime.images.confidence import exit_text

    return (
        f"{result.image}: {exit_text(result.exit, result.confidence)}, {result.latency_ms:.2f} ms "
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
