"""Inspect, verify and run a bundle on this machine."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from pathlib import Path
from typing import List, Optional

import numpy as np

from mess_compile.runtime.base import terminal
from mess_compile.runtime.base.errors import InputError, MessError, PlaceError, one_line
from mess_compile.runtime.bundle.archive import open_archive
from mess_compile.runtime.bundle.manifest import Manifest, against
from mess_compile.runtime.bundle.signature import Signers, installed_signers
from mess_compile.runtime.cascade.cascade import Cascade, Prediction, load
from mess_compile.runtime.images.confidence import LEGEND, exit_text
from mess_compile.runtime.images.pictures import read_picture, write_labels, write_picture
from mess_compile.runtime.serve.verify import LATENCY_FACTOR, VerifyOptions, verify_bundle
from mess_compile.runtime.serve.watch import REFUSED, watch

_REFUSED = "MESS_COMPILE_REFUSED"
"""How many frames were refused by the versions of a bundle that ran before, in the same process."""


def main(arguments: Optional[List[str]] = None, bundle: Optional[Path] = None) -> int:
    """Exit code 0: done and well; 1: not, with one line on standard error; 2: wrong usage.

    `bundle` is the one that this program lies in, None where it has to be named.
    """
    terminal.show_all()
    options = _parser(bundle).parse_args(arguments)
    try:
        code: int = options.do(options)
        sys.stdout.flush()
        return code
    except MessError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _failed("stopped; pictures that were written are whole")
    except MemoryError:
        return _failed("out of memory: stop what else runs here, or use smaller pictures")
    except BrokenPipeError:
        return _unread()
    except OSError as error:
        return _failed(_os_words(error))
    except UnicodeEncodeError as error:
        return _failed(terminal.unencodable(error))


def _failed(words: str) -> int:
    """One line, after what was printed before; that may be what cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        _unread()
    print(f"error: {words}", file=sys.stderr)
    return 1


def _unread() -> int:
    """Let Python not try again, at its end, to write what nobody takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _os_words(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{place}: free some space and run the same command again"
    return one_line(f"{error.strerror or error}{place}")


def _parser(bundle: Optional[Path]) -> argparse.ArgumentParser:
    program = "python3 -m mess_compile.runtime" if bundle is None else f"python3 {bundle.name}"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, do, words in (
        ("info", _info, "print what is in the bundle"),
        ("verify", _verify, "check hashes, signature, golden frames and latency, one line each"),
        ("run", _run, "segment pictures: write labels as a palette PNG, and an overlay"),
        (
            "watch",
            _watch,
            "segment every picture that appears in FOLDER/in (by rename), until stopped; metrics in FOLDER",
        ),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.set_defaults(do=do)
        if bundle is None:
            command.add_argument("bundle", type=Path)
        else:
            command.set_defaults(bundle=bundle)
        command.set_defaults(inside=bundle is not None)
        if name != "info":
            command.add_argument("--target", help="the plan to use; by default the first that fits this machine")
            command.add_argument(
                "--allowed-signers",
                type=Path,
                help="file of allowed signers in ssh-keygen's format; requires a signature",
            )
            command.add_argument("--identity", help="the allowed signer; any of them by default")
        if name == "verify":
            command.add_argument("--require-signature", action="store_true", help="fail without --allowed-signers")
            command.add_argument("--latency-factor", type=_factor, default=LATENCY_FACTOR, help="default: %(default)s")
        if name == "watch":
            command.add_argument(
                "folder", type=Path, help="labels go to FOLDER/out, unreadable pictures to FOLDER/refused"
            )
        if name == "run":
            command.add_argument("images", type=Path, nargs="+", help="PNG; other formats if Pillow is installed")
            command.add_argument("-o", "--output", type=Path, default=Path("predictions"), help="default: %(default)s")
            way = command.add_mutually_exclusive_group()
            way.add_argument("--operating-point", default="default", help="default: %(default)s")
            way.add_argument(
                "--deadline",
                type=_deadline,
                help="per-image deadline, such as 20ms: go on to the next stage while it fits",
            )
    return parser


def _factor(text: str) -> float:
    return _positive(text, text, "a number above 0, such as 1.25")


def _deadline(text: str) -> float:
    """Milliseconds."""
    found = re.fullmatch(r"(.*?)\s*ms", text.strip())
    return _positive(text, found[1] if found else "", "milliseconds, such as 20ms")


def _positive(text: str, number: str, wanted: str) -> float:
    """Of decimal digits alone: neither `nan` nor `1_000`."""
    value = float(number) if re.fullmatch(r"\d+\.?\d*|\.\d+", number.strip(), re.ASCII) else 0.0
    comma = re.fullmatch(r"(\d+),(\d+)", number.strip(), re.ASCII)
    if comma is not None:
        raise argparse.ArgumentTypeError(f"{text!r} has a decimal comma: write {comma[1]}.{comma[2]}")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _signers(options: argparse.Namespace) -> Optional[Signers]:
    if options.allowed_signers is None:
        if options.identity is not None or (options.command == "verify" and options.require_signature):
            raise InputError("a signature is checked by --allowed-signers FILE: name one")
        return None
    return Signers(options.allowed_signers, options.identity)


def _info(options: argparse.Namespace) -> int:
    archive = open_archive(options.bundle)
    try:
        print("\n".join(lines_of(archive.manifest)))
    finally:
        archive.close()
    return 0


def lines_of(manifest: Manifest) -> List[str]:
    """A bundle in words."""
    network = manifest.network
    height, width = network.input_hw
    lines = [f"{manifest.name}: {network.backbone}, {len(network.classes)} classes, {height} x {width}"]
    for plan in manifest.plans:
        figures, baseline = plan.predicted, plan.baseline
        lines.append(
            f"{plan.target} ({plan.library}, {plan.precision}, {plan.setting}): {figures.latency_ms:.2f} ms, "
            f"{figures.miou:.2f} % mIoU{against(plan.truth)}, {figures.source}; "
            f"baseline {baseline.latency_ms:.2f} ms, {baseline.miou:.2f} %"
        )
        lines += [f"  warning: {doubt}" for doubt in plan.doubts]
        lines += [f"  stage {number}: {stage.head}" for number, stage in enumerate(plan.stages, 1)]
        for point in plan.operating_points:
            figures = point.predicted
            lines.append(f"  operating point {point.name}: {figures.latency_ms:.2f} ms, {figures.miou:.2f} % mIoU")
    return lines


def _verify(options: argparse.Namespace) -> int:
    chosen = VerifyOptions(_signers(options), options.require_signature, options.latency_factor)
    checks = verify_bundle(options.bundle, options.target, chosen)
    for check in checks:
        print(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else 1


def _run(options: argparse.Namespace) -> int:
    stems = [path.stem for path in options.images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise InputError(f"two images are named {twice[0]}: their pictures would share a name; run them one by one")
    failed = 0
    with load(options.bundle, options.target, signers=_signers(options)) as cascade:
        cascade.operating_point = options.operating_point
        for path in options.images:
            try:
                _run_picture(cascade, path, options)
            except PlaceError:
                raise
            except MessError as error:
                failed += 1
                _failed(str(error))
            except MemoryError:
                failed += 1
                _failed(f"{path} takes more memory than there is: use a smaller picture")
        if failed < len(options.images):
            print(LEGEND)
            if options.deadline is not None:
                print(_misses(cascade, options.deadline))
    if failed and len(options.images) > 1:
        _failed(f"{failed} of {len(options.images)} pictures failed; those of the others are in {options.output}")
    return 1 if failed else 0


def _run_picture(cascade: Cascade, path: Path, options: argparse.Namespace) -> None:
    frame, deadline_ms = read_picture(path), options.deadline
    results = [cascade(frame)] if deadline_ms is None else list(cascade.refine(frame, deadline_ms))
    for prediction in results[:-1]:
        print(f"{path}: {_words(prediction, deadline_ms)}")
    written = _write(cascade, results[-1], options.output / path.stem, frame)
    print(f"{path}: {_words(results[-1], deadline_ms)} -> {written}")


def _words(prediction: Prediction, deadline_ms: Optional[float]) -> str:
    late = deadline_ms is not None and prediction.latency_ms > deadline_ms
    needed = prediction.needed if deadline_ms is None else None
    words = exit_text(prediction.exit, prediction.confidence, needed, prediction.policy)
    return f"{words}, {prediction.latency_ms:.2f} ms{', too late' if late else ''}"


def _misses(cascade: Cascade, deadline_ms: float) -> str:
    metrics = cascade.metrics()
    return (
        f"deadline {deadline_ms:g} ms: of {metrics.deadline_frames} pictures the first result came too late for "
        f"{metrics.missed_first}, a later one for {metrics.missed_later}"
    )


def _watch(options: argparse.Namespace) -> int:
    signers = _signers(options) or installed_signers()
    before = os.environ.pop(_REFUSED, "0")
    refused = int(before) if before.isdecimal() else 0
    while True:
        ended = watch(options.bundle, options.folder, options.target, signers)
        refused += ended.refused
        if not ended.by_new_bundle:
            break
        if options.inside:  # the program is the bundle's, too
            os.environ[_REFUSED] = str(refused)
            os.execv(sys.executable, [sys.executable, str(options.bundle), *sys.argv[1:]])
    return _failed(f"refused frames: {refused}; they lie in {options.folder / REFUSED}") if refused else 0


def _write(cascade: Cascade, prediction: Prediction, stem: Path, frame: np.ndarray) -> str:
    labels, overlay = (stem.with_name(f"{stem.name}.{kind}.png") for kind in ("labels", "overlay"))
    write_labels(labels, prediction.labels, cascade.manifest.network.colours)
    write_picture(overlay, cascade.overlay(frame, prediction))
    return f"{labels}, {overlay}"


if __name__ == "__main__":
    sys.exit(main())
