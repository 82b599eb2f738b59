"""The command `ship`, and its form `ship --list`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion, hints
from mess_compile.cli.console import fail, print_hint, print_json, print_table, quoted, say
from mess_compile.cli.options import (
    FILE,
    PYTHON,
    Command,
    data_options,
    gathered,
    json_option,
    print_plan,
    verbose_option,
)
from mess_compile.data_folder import DataFolder
from mess_compile.planned_step import PlannedStep
from mess_compile.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from mess_compile.ship.client import Destination, Shipped
    from mess_compile.workspace import Workspace

_NO_ANSWER = "could not be queried; run the same command again"


@dataclass(frozen=True)
class ShipArguments:
    """What `ship` does at the devices, and what it prints."""

    listing: bool
    rollback: bool
    dry_run: bool
    keep: int
    allow_downgrade: bool
    target: str | None
    latency_factor: float | None
    sign: Path | None
    python: str | None
    systemd: bool
    verbose: bool
    as_json: bool


@click.command(cls=Command, formerly={"--unit": "--systemd"}, short_help="Install a bundle on devices, verified there.")
@click.argument(
    "things",
    nargs=-1,
    metavar="BUNDLE ssh://USER@HOST[:PORT]:/FOLDER...",
    shell_complete=completion.shipped,
)
@click.option(
    "--list",
    "listing",
    is_flag=True,
    help="Without BUNDLE: list the versions on the devices, by default on all that this workspace shipped to.",
)
@click.option("--rollback", is_flag=True, help="Without BUNDLE: return to the version that was in use before.")
@click.option("--dry-run", is_flag=True, help="Only print what would be sent and built, and how long it should take.")
@click.option("--keep", type=click.IntRange(1), default=3, show_default=True, help="Versions to keep on the device.")
@click.option("--allow-downgrade", is_flag=True, help="Accept a bundle that is older than the one in use.")
@click.option("--target", help="Name of the plan to verify; by default the first that fits the device.")
@click.option(
    "--latency-factor",
    type=click.FloatRange(min=0, min_open=True),
    help="Longest time allowed for golden frames, as a multiple of the plan's latency; 1.25 by default.",
)
@data_options("Choose the thresholds again on the device, on these images (those that the plan was chosen on).")
@click.option("--sign", type=FILE, metavar="KEY", help="With --data: private key to sign the changed bundle with.")
@PYTHON
@click.option("--systemd", is_flag=True, help="Also install a systemd user unit that labels frames in FOLDER/live/in.")
@verbose_option
@json_option
@click.pass_obj
@gathered(ShipArguments)
def ship(workspace: Workspace, things: tuple[str, ...], data: DataFolder | None, arguments: ShipArguments) -> None:
    """Install a bundle on devices: copy it, build its engines and verify it there, then switch to it.

    Only changed files are sent. The same command continues an interrupted transfer.
    """
    from mess_compile.runtime.serve.verify import LATENCY_FACTOR
    from mess_compile.ship import client

    as_json = arguments.as_json
    _refuse_contradictions(arguments, data)
    if arguments.listing:
        return _list(workspace, things, arguments)
    texts = things if arguments.rollback else things[1:]
    if not texts:
        raise click.UsageError("missing BUNDLE or destination: `ship BUNDLE ssh://USER@HOST:/FOLDER`.")
    places = _places(workspace, texts, arguments.python)
    factor = arguments.latency_factor or LATENCY_FACTOR
    choice = _choice(workspace, data, arguments.sign)
    chosen = client.ShipOptions(
        arguments.keep, arguments.allow_downgrade, factor, arguments.target, arguments.systemd, choice
    )
    if arguments.dry_run:
        return _print_planned(Path(things[0]), client.plan_ship(Path(things[0]), places, chosen), as_json)
    reporter = _reporter(as_json)
    if arguments.rollback:
        found = client.rollback(places, chosen, reporter)
    else:
        found = client.ship(Path(things[0]), places, chosen, reporter)
    reached = [each.place for each in found if each.done]
    workspace.remember_ships(reached)
    for place in places:
        if place.text in reached:
            workspace.remember_python(place.host.text, arguments.python)
    if as_json:
        print_json({"places": [asdict(each) for each in found]})
    elif any(each.done for each in found):
        _print_shipped(found, arguments.verbose)
    _fail_where_it_did(found, "failed; `ship --list` prints what is in use, and the same command tries them again")
    if not as_json:
        back = [each.place for each in found[:1] if _can_go_back(each, arguments)]
        print_hint("ship --list", *(f"ship --rollback {place}" for place in back))
    return None


def _refuse_contradictions(arguments: ShipArguments, data: DataFolder | None) -> None:
    if data is not None and (arguments.rollback or arguments.dry_run or arguments.listing):
        raise click.UsageError("--data is for shipping a bundle: drop --rollback, --dry-run and --list.")
    if arguments.rollback and arguments.dry_run:
        raise click.UsageError("--rollback has no --dry-run: `ship --list` prints what is there.")
    if arguments.listing and (arguments.rollback or arguments.dry_run):
        raise click.UsageError("--list changes nothing: drop --rollback and --dry-run.")


def _places(workspace: Workspace, texts: Sequence[str], python: str | None) -> list[Destination]:
    """The destinations, with the Python given or remembered."""
    from mess_compile.ship import client

    places = [client.parse_place(text) for text in dict.fromkeys(texts)]
    pythons = [python or workspace.known_python(place.host.text) or place.host.python for place in places]
    return [client.parse_place(place.text, python) for place, python in zip(places, pythons, strict=True)]


def _can_go_back(shipped: Shipped, arguments: ShipArguments) -> bool:
    done = shipped.done
    return (
        not arguments.rollback
        and arguments.keep > 1
        and done is not None
        and done.before not in (None, done.version.id)
    )


def _choice(workspace: Workspace, data: DataFolder | None, key: Path | None) -> Any:
    if data is None:
        if key is not None:
            raise click.UsageError("--sign needs --data; `bundle --sign` signs a bundle.")
        return None
    from mess_compile.network import read_graph_set
    from mess_compile.ship.retune import Choice

    return Choice(workspace.data_folder(data), read_graph_set(workspace.graphs).candidate, key)


def _reporter(as_json: bool) -> Reporter:
    """Prints notes as lines on standard error, none with --json."""
    return SILENT if as_json else Reporter(note=partial(say, err=True))


def _print_shipped(found: Sequence[Shipped], verbose: bool) -> None:
    rows = []
    for each in found:
        if each.done is None:
            rows.append([each.place, "FAILED", "", "", "", f"{each.seconds:.1f}"])
            continue
        done = each.done
        name = f"{done.version.name} {done.version.id}"
        before = "the same" if done.before == done.version.id else done.before or "nothing"
        rows.append([each.place, name, before, f"{each.sent_bytes:,}", str(done.built), f"{each.seconds:.1f}"])
    print_table("", ["place", "in use now", "before", "bytes sent", "engines built", "s"], rows)
    for each in found:
        for line in _remarks(each, verbose):
            say(f"{each.place}: {line}")


def _remarks(shipped: Shipped, verbose: bool) -> Iterator[str]:
    """What else is to know of a place: thresholds, checks, signature, fallback, unit."""
    if shipped.retuned is not None:
        yield _retuned(shipped.retuned)
    failed = [check for check in shipped.checks if not check.passed]
    if shipped.checks and not failed and not verbose:
        yield f"passed {len(shipped.checks)} checks there"
    for check in shipped.checks if verbose else failed:
        yield f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}"
    done = shipped.done
    if done is None:
        return
    if done.version.signed_by is not None:
        yield f"signed by {done.version.signed_by}"
    for refusal in done.refusals:
        yield f"no engine to fall back to: {refusal}"
    if done.unit is not None:
        yield done.unit


def _retuned(found: Any) -> str:
    figures = (
        f"{found.found_miou:.2f} % mIoU on the plan's {found.images} images, where the plan has "
        f"{found.promised_miou:.2f} %"
    )
    if not found.changed:
        return f"{figures}: thresholds unchanged"
    return f"{figures}; with new thresholds {found.chosen_miou:.2f} % in {found.chosen_ms:.2f} ms"


def _fail_where_it_did(found: Sequence[Any], words: str) -> None:
    errors = [(each.place, each.error) for each in found if getattr(each, "error", None) is not None]
    if errors and len(found) > 1:
        for place, error in errors:
            why = error.removeprefix(f"{place}: ").removeprefix(f"{place.rpartition(':')[0]}: ")
            say(f"failed: {place}: {why}", err=True)
        fail(f"{len(errors)} of {len(found)} places {words}")
    if errors:
        fail(errors[0][1])


def _print_planned(bundle: Path, found: Sequence[PlannedStep | Shipped], as_json: bool) -> None:
    planned = [each for each in found if isinstance(each, PlannedStep)]
    if as_json:
        print_json({"places": [each.content() if isinstance(each, PlannedStep) else asdict(each) for each in found]})
        return _fail_where_it_did(found, _NO_ANSWER)
    if planned:
        print_plan(planned, as_json)
    for each in planned:
        if each.shipment is not None and each.shipment.refusal is not None:
            say(f"{each.place} would refuse it: {each.shipment.refusal}")
    _fail_where_it_did(found, _NO_ANSWER)
    ready = [each.place for each in planned if each.shipment is not None and each.shipment.refusal is None]
    if ready:
        return print_hint(f"ship {quoted(bundle)} {' '.join(filter(None, ready))}")
    places = " ".join(filter(None, (each.place for each in planned)))
    return print_hint(f"ship --list {places}", f"ship {quoted(bundle)} {places} --dry-run")


def _list(workspace: Workspace, places: tuple[str, ...], arguments: ShipArguments) -> None:
    """Print which versions are at each place."""
    from mess_compile.ship import client

    as_json = arguments.as_json
    texts = tuple(dict.fromkeys(places or workspace.memory().ships))
    if not texts:
        raise click.UsageError("this workspace has shipped nowhere yet: name ssh://USER@HOST:/FOLDER.")
    found = client.look(_places(workspace, texts, arguments.python))
    if as_json:
        print_json({"places": [{"place": text, **asdict(each)} for text, each in zip(texts, found, strict=False)]})
    else:
        rows = [row for text, each in zip(texts, found, strict=False) for row in _rows(text, each)]
        print_table("", ["place", "version", "bundle", "release", "signed by", "MiB", "shipped", "state"], rows)
    _fail_where_it_did(found, _NO_ANSWER)
    if not as_json:
        back = [text for text, each in zip(texts, found, strict=False) if _versions(each) > 1]
        bundle = hints.bundle_for(client.parse_place(texts[0]).host)
        again = [] if bundle is None else [f"ship {quoted(bundle)} {texts[0]}"]
        hints.print_known(*again, *(f"ship --rollback {text}" for text in back[:1]))


def _versions(looked: Any) -> int:
    """How many versions are at a place; 0 where it did not answer."""
    return sum(version.here for version in getattr(looked, "versions", ()))


def _rows(text: str, looked: Any) -> list[list[str]]:
    if getattr(looked, "error", None) is not None:
        return [[text, "", "", "", "", "", "", "unknown"]]
    rows = []
    for each in looked.versions:
        version = each.version
        state = "in use" if each.current else "kept" if each.here else "removed"
        release = "" if version.release is None else str(version.release)
        size = f"{version.bytes / 2**20:.2f}"
        by = version.signed_by or ""
        rows.append([text, version.id, version.name, release, by, size, version.shipped, state])
    return rows or [[text, "", "", "", "", "", "", "nothing yet"]]
