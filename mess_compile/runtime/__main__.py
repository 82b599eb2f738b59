"""`python3 -m mess_compile.runtime info|verify BUNDLE`: what a bundle is, and whether it works on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from mess_compile.runtime.archive import open_archive
from mess_compile.runtime.cascade import load
from mess_compile.runtime.errors import MessError
from mess_compile.runtime.manifest import Manifest
from mess_compile.runtime.verify import verify


def main(arguments: Optional[List[str]] = None) -> int:
    """Exit code 0: done and well; 1: not, with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python3 -m mess_compile.runtime", description=__doc__)
    parser.add_argument("command", choices=("info", "verify"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", help="the plan to verify; the first that fits this machine by default")
    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            return _info(options.bundle)
        return _verify(options.bundle, options.target)
    except MessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _info(bundle: Path) -> int:
    archive = open_archive(bundle)
    try:
        print("\n".join(_lines(archive.manifest)))
    finally:
        archive.close()
    return 0


def _lines(manifest: Manifest) -> List[str]:
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
    return lines


def _verify(bundle: Path, target: Optional[str]) -> int:
    with load(bundle, target) as cascade:
        checks = verify(cascade)
    for check in checks:
        print(f"{'ok' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
