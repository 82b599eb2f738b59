"""The commands that take bundles to devices: parse, call one function, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mess_compile.cli import completion
from mess_compile.cli.console import fail, print_json, print_next, print_table, quoted, say
from mess_compile.cli.options import FILE, PYTHON, data_options, json_option
from mess_compile.data_folder import DataFolder

if TYPE_CHECKING:
    from mess_compile.ship.client import Destination, Preview, Shipped
    from mess_compile.workspace import Workspace

_CANNOT_TELL = "cannot tell what is there; the same command asks again"


@click.command(short_help="Take a bundle to devices in use, verified there.")
@click.argument(
    "things",
    nargs=-1,
    required=True,
    metavar="BUNDLE ssh://USER@HOST[:PORT]:/FOLDER...",
    shell_complete=completion.shipped,
)
@click.option("--rollback", is_flag=True, help="Without BUNDLE: back to the version that was in use before.")
@click.option("--dry-run", is_flag=True, help="Say what would travel, be built, and how long it should take.")
@click.option("--keep", type=click.IntRange(1), default=3, show_default=True, help="Versions that stay there.")
@click.option("--allow-downgrade", is_flag=True, help="Also a bundle that is older than the one in use.")
@click.option("--target", help="The plan to verify by; the first that fits there by default.")
@click.option(
    "--latency-factor",
    type=click.FloatRange(min=0, min_open=True),
    help="What golden frames may take there, in multiples of the plan's latency; 1.25 by default.",
)
@data_options("Choose thresholds again there, by the images that the plan was chosen on.")
@click.option("--sign", type=FILE, metavar="KEY", help="With --data: sign again.")
@PYTHON
@click.option("--unit", is_flag=True, help="Also a systemd unit of the user's own, for frames in FOLDER/live/in.")
@json_option
@click.pass_obj
def ship(workspace: Workspace, /, things: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Copy a bundle to devices in use, build and verify it there, and only then have it take over.

    What changed travels, nothing else. A ship that was cut is continued by the same command.
    """
    from mess_compile.runtime.serve.verify import LATENCY_FACTOR
    from mess_compile.ship import client as ships

    if options["data"] is not None and (options["rollback"] or options["dry_run"]):
        raise click.UsageError("--data is for shipping itself: leave --rollback and --dry-run out.")
    if options["rollback"] and options["dry_run"]:
        raise click.UsageError("--rollback has no --dry-run: `ships` says what is there.")
    texts = things if options["rollback"] else things[1:]
    if not texts:
        raise click.UsageError("ship what, and where to? `ship BUNDLE ssh://USER@HOST:/FOLDER`.")
    places = _places(workspace, texts, options["python"])
    factor = options["latency_factor"] or LATENCY_FACTOR
    choice = _choice(workspace, options["data"], options["sign"])
    chosen = ships.ShipOptions(
        options["keep"], options["allow_downgrade"], factor, options["target"], options["unit"], choice
    )
    if options["dry_run"]:
        return _print_expected(Path(things[0]), ships.preview(Path(things[0]), places, chosen), as_json)
    tell = _teller(as_json)
    if options["rollback"]:
        found = ships.rollback(places, chosen, tell)
    else:
        found = ships.ship(Path(things[0]), places, chosen, tell)
    reached = [each.place for each in found if each.done]
    workspace.remember_ships(reached)
    for place in places:
        if place.text in reached:
            workspace.remember_python(place.host.text, options["python"])
    if as_json:
        print_json({"places": [asdict(each) for each in found]})
    elif any(each.done for each in found):
        _print_shipped(found)
    _fail_where_it_did(
        found, "failed; `mess-compile ships` tells what is in use, and the same command tries them again"
    )
    if not as_json:
        print_next("ships", *(f"ship --rollback {each.place}" for each in found[:1] if _can_go_back(each, options)))
    return None


def _places(workspace: Workspace, texts: Sequence[str], python: str | None) -> list[Destination]:
    """With the Python that is named, or was when the device was reached before."""
    from mess_compile.ship import client as ships

    known, places = workspace.memory().pythons, [ships.parse_place(text) for text in dict.fromkeys(texts)]
    pythons = [python or known.get(place.host.text, place.host.python) for place in places]
    return [ships.parse_place(place.text, python) for place, python in zip(places, pythons, strict=True)]


def _can_go_back(shipped: Shipped, options: dict[str, Any]) -> bool:
    done = shipped.done
    return (
        not options["rollback"]
        and options["keep"] > 1
        and done is not None
        and done.before not in (None, done.version.id)
    )


def _choice(workspace: Workspace, data: DataFolder | None, key: Path | None) -> Any:
    if data is None:
        if key is not None:
            raise click.UsageError("--sign is for thresholds that --data changes; `bundle --sign` signs a bundle.")
        return None
    from mess_compile.network import read_graph_set
    from mess_compile.ship.retune import Choice

    return Choice(workspace.data_folder(data), read_graph_set(workspace.graphs).candidate, key)


def _teller(as_json: bool) -> Callable[[Destination, str], None]:
    """Progress by lines on standard error."""

    def tell(place: Destination, text: str) -> None:
        if not as_json:
            say(f"{place.text}: {text}", err=True)

    return tell


def _print_shipped(found: Sequence[Shipped]) -> None:
    rows = []
    for each in found:
        if each.done is None:
            rows.append([each.place, "FAILED", "", "", "", f"{each.seconds:.1f}"])
            continue
        done = each.done
        name = f"{done.version.name} {done.version.id}"
        kept = "the same" if done.before == done.version.id else done.before or "nothing"
        rows.append([each.place, name, kept, f"{each.sent_bytes:,}", str(done.built), f"{each.seconds:.1f}"])
    print_table("", ["place", "in use now", "before", "bytes that travelled", "engines built", "s"], rows)
    for each in found:
        if each.retuned is not None:
            say(f"{each.place}: {_retuned(each.retuned)}")
        for check in each.checks if len(found) == 1 else ():
            say(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
        if each.done is not None and each.done.version.signed_by is not None:
            say(f"{each.place}: signed by {each.done.version.signed_by}")
        for refusal in () if each.done is None else each.done.refusals:
            say(f"{each.place}: no engine to fall back to: {refusal}")
        if each.done is not None and each.done.unit is not None:
            say(f"{each.place}: {each.done.unit}")


def _retuned(told: Any) -> str:
    found = f"{told.found_miou:.2f} % mIoU on the plan's {told.images} images, {told.promised_miou:.2f} % were promised"
    if not told.changed:
        return f"{found}: its thresholds stay"
    return f"{found}; with other thresholds {told.chosen_miou:.2f} % in {told.chosen_ms:.2f} ms"


def _fail_where_it_did(found: Sequence[Any], words: str) -> None:
    errors = [(each.place, each.error) for each in found if getattr(each, "error", None) is not None]
    if errors and len(found) > 1:
        for place, error in errors:
            why = error.removeprefix(f"{place}: ").removeprefix(f"{place.rpartition(':')[0]}: ")
            say(f"failed: {place}: {why}", err=True)
        fail(f"{len(errors)} of {len(found)} places {words}")
    if errors:
        fail(errors[0][1])


def _print_expected(bundle: Path, found: Sequence[Any], as_json: bool) -> None:
    if as_json:
        print_json({"places": [asdict(each) for each in found]})
        return _fail_where_it_did(found, _CANNOT_TELL)
    told = [each for each in found if getattr(each, "error", None) is None]
    for each in told:
        say("\n".join(f"{each.place}: {line}" for line in _expected(each)))
    _fail_where_it_did(found, _CANNOT_TELL)
    ready = [each.place for each in told if each.refusal is None]
    if ready:
        return print_next(f"ship {quoted(bundle)} {' '.join(ready)}")
    places = " ".join(each.place for each in told)
    return print_next(f"ships {places}", f"ship {quoted(bundle)} {places} --dry-run")


def _expected(of: Preview) -> Iterator[str]:
    from mess_compile.ship.client import duration

    time = "how long it takes there is known after the first time"
    if of.expected_s is not None:
        time = f"it should take about {duration(of.expected_s)}"
    yield (
        f"{of.current or 'nothing'} is in use; {of.send_bytes:,} bytes would travel ({of.files} files beside "
        f"manifest and program; {of.free_bytes / 2**20:,.0f} MiB are free), {len(of.build)} engines be built; {time}"
    )
    if of.signers is not None:
        yield f"the signature would be checked by {of.signers}"
    if of.refusal is not None:
        yield f"it would be refused: {of.refusal}"


@click.command(short_help="Which versions are where.")
@click.argument("places", nargs=-1, metavar="[ssh://USER@HOST[:PORT]:/FOLDER]...")
@PYTHON
@json_option
@click.pass_obj
def ships(workspace: Workspace, places: tuple[str, ...], python: str | None, as_json: bool) -> None:
    """Which versions are where; by default at the places that this workspace has shipped to."""
    from mess_compile.ship import client as shipping

    texts = tuple(dict.fromkeys(places or workspace.memory().ships))
    if not texts:
        raise click.UsageError("nothing was shipped from this workspace: name ssh://USER@HOST:/FOLDER.")
    found = shipping.look(_places(workspace, texts, python))
    if as_json:
        print_json({"places": [{"place": text, **asdict(each)} for text, each in zip(texts, found, strict=False)]})
    else:
        rows = [row for text, each in zip(texts, found, strict=False) for row in _rows(text, each)]
        print_table("", ["place", "version", "bundle", "release", "signed by", "MiB", "shipped", "state"], rows)
    _fail_where_it_did(found, _CANNOT_TELL)
    if not as_json:
        back = [text for text, each in zip(texts, found, strict=False) if _kept(each) > 1]
        print_next(f"ship {quoted(Path('BUNDLE'))} {texts[0]}", *(f"ship --rollback {text}" for text in back[:1]))


def _kept(looked: Any) -> int:
    """Versions that are at a place; of one that cannot tell none."""
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
