"""What is in a bundle, whether it works on this machine, and run it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

import numpy as np

from mess_compile.runtime.archive import open_archive
from mess_compile.runtime.cascade import Cascade, Prediction, load
from mess_compile.runtime.errors import InputError, MessError
from mess_compile.runtime.manifest import Manifest
from mess_compile.runtime.pictures import read_picture, write_labels, write_picture
from mess_compile.runtime.signature import Signers
from mess_compile.runtime.verify import LATENCY_FACTOR, Demands, verify_bundle


def main(arguments: Optional[List[str]] = None, bundle: Optional[Path] = None) -> int:
    """Exit code 0: done and well; 1: not, with one line on standard error; 2: wrong usage.

    `bundle` is the one that this program lies in, None where it has to be named.
    """
    options = _parser(bundle).parse_args(arguments)
    try:
        code: int = options.do(options)
        return code
    except MessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser(bundle: Optional[Path]) -> argparse.ArgumentParser:
    program = "python3 -m mess_compile.runtime" if bundle is None else f"python3 {bundle.name}"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, do, words in (
        ("info", _info, "what the bundle is"),
        ("verify", _verify, "hashes, signature, golden frames, latency: one line each"),
        ("run", _run, "segment pictures: labels as a palette PNG, and an overlay"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.set_defaults(do=do)
        if bundle is None:
            command.add_argument("bundle", type=Path)
        else:
            command.set_defaults(bundle=bundle)
        if name != "info":
            command.add_argument("--target", help="the plan to use; the first that fits this machine by default")
            command.add_argument("--allowed-signers", type=Path, help="whose signature counts, as ssh-keygen reads it")
            command.add_argument("--identity", help="which of them; any by default")
        if name == "verify":
            command.add_argument("--require-signature", action="store_true", help="refuse a bundle without one")
            command.add_argument("--latency-factor", type=_factor, default=LATENCY_FACTOR, help="default: %(default)s")
        if name == "run":
            command.add_argument("images", type=Path, nargs="+", help="PNG; others where Pillow is installed")
            command.add_argument("-o", "--output", type=Path, default=Path("predictions"), help="default: %(default)s")
            command.add_argument("--operating-point", default="default", help="default: %(default)s")
    return parser


def _factor(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no factor above 0")
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
            f"{figures.miou:.2f} % mIoU, {figures.source}; baseline {baseline.latency_ms:.2f} ms, {baseline.miou:.2f} %"
        )
        lines += [f"  exit {number}: {stage.head}" for number, stage in enumerate(plan.stages, 1)]
        for point in plan.operating_points:
            figures = point.predicted
            lines.append(f"  operating point {point.name}: {figures.latency_ms:.2f} ms, {figures.miou:.2f} % mIoU")
    return lines


def _verify(options: argparse.Namespace) -> int:
    demands = Demands(_signers(options), options.require_signature, options.latency_factor)
    checks = verify_bundle(options.bundle, options.target, demands)
    for check in checks:
        print(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else 1


def _run(options: argparse.Namespace) -> int:
    stems = [path.stem for path in options.images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise InputError(f"two images are named {twice[0]}: their pictures would share a name; run them one by one")
    with load(options.bundle, options.target, signers=_signers(options)) as cascade:
        cascade.operating_point = options.operating_point
        for path in options.images:
            frame = read_picture(path)
            prediction = cascade(frame)
            written = _write(cascade, prediction, options.output / path.stem, frame)
            print(
                f"{path}: exit {prediction.exit}, confidence {prediction.confidence:.3f}, "
                f"{prediction.latency_ms:.2f} ms -> {written}"
            )
    return 0


def _write(cascade: Cascade, prediction: Prediction, stem: Path, frame: np.ndarray) -> str:
    labels, overlay = (stem.with_name(f"{stem.name}.{kind}.png") for kind in ("labels", "overlay"))
    write_labels(labels, prediction.labels, cascade.manifest.network.colours)
    write_picture(overlay, cascade.overlay(frame, prediction))
    return f"{labels}, {overlay}"


if __name__ == "__main__":
    sys.exit(main())
