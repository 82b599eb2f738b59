"""The runtime and the README that travel to a device, which then needs only numpy and an engine library."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

import mess_compile
from mess_compile.runtime.bundle.manifest import DOUBT, LABELS, BundlePlan, EngineFile, Figures, Manifest

README = "README.txt"
OWN_FILES_LAST = """\
import os
import sys


def own_files_last(paths):
    try:
        own = [os.path.realpath(place) for place in (os.path.expanduser("~"), os.curdir)]
    except OSError:  # the current folder is gone
        return list(paths)
    return sorted(paths, key=lambda path: os.path.realpath(path) in own)


"""
"""Runs before the imports of a program on a device: no file in the home folder or in the current one may replace a
module (json.py, numpy.py), even where PYTHONPATH names these folders. Otherwise PYTHONPATH is respected."""
_FIRST = f"""\
{OWN_FILES_LAST}sys.path[:] = [os.path.realpath(sys.path[0]), *own_files_last(sys.path[1:])]
"""
_MAIN = f"""\
{_FIRST}sys.dont_write_bytecode = True  # an unpacked bundle stays as it is
from pathlib import Path

from mess_compile.runtime.__main__ import main

sys.exit(main(bundle=Path(os.path.dirname(os.path.abspath(__file__)))))
"""
_PROGRAM = f"""\
{_FIRST}from importlib import import_module

sys.exit(import_module(sys.argv[1]).main(sys.argv[2:]))
"""
SESSION, SHIP_PROGRAM = "mess_compile.runtime.serve.worker", "mess_compile.runtime.serve.ship"
"""Programs in `runtime_zip`."""


def runtime_files() -> dict[str, bytes]:
    """The runtime for a bundle, which Python runs as a zip or folder: paths in the bundle -> content."""
    return {"__main__.py": _MAIN.encode(), **_modules()}


@functools.lru_cache(maxsize=1)
def runtime_zip() -> bytes:
    """The runtime as a zip for `python3 ZIP PROGRAM ARGUMENT...`, the same bytes each time.

    Python then looks for modules in the zip first, and not in the current folder, as it does for `python3 -m`.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as content:
        for path, source in {"__main__.py": _PROGRAM.encode(), **_modules()}.items():
            content.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), source, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _modules() -> dict[str, bytes]:
    package = Path(mess_compile.__file__).parent
    modules = (package / "__init__.py", *sorted((package / "runtime").rglob("*.py")))
    return {f"mess_compile/{path.relative_to(package).as_posix()}": path.read_bytes() for path in modules}


def readme(manifest: Manifest) -> bytes:
    """For the person on the device."""
    return "\n".join([*_what(manifest), *_how(manifest), *map(_plan_lines, manifest.plans), *_rest(manifest)]).encode()


def _what(manifest: Manifest) -> list[str]:
    height, width = manifest.network.input_hw
    title = f"{manifest.name}.mess"
    return [
        title,
        "=" * len(title),
        "",
        f"A {manifest.network.backbone} that labels every pixel of a frame with one of {len(manifest.network.classes)}",
        f"classes, at the frame's own size (internally at {height} x {width}), with early exits for easy images.",
        "",
        f"Classes, by label from 0: {', '.join(manifest.network.classes)}.",
    ]


def _how(manifest: Manifest) -> list[str]:
    libraries = ", ".join(dict.fromkeys(plan.library for plan in manifest.plans))
    name = f"{manifest.name}.mess"
    return [
        "",
        "Use",
        "---",
        f"Needed: Python 3.8 or later, numpy, and {libraries}. The runtime is inside.",
        "",
        f"    python3 {name} info                       # plans, figures, operating points",
        f"    python3 {name} verify                     # compares results and latency on this machine with the plan's",
        f"    python3 {name} run frame.png -o pictures  # labels as a palette PNG, and an overlay",
        f"    python3 {name} watch FOLDER               # labels frames that are moved to FOLDER/in, until stopped",
        *_choice(manifest),
        "",
        f"From a program, with {name} on sys.path or mess-compile installed:",
        "",
        "    from mess_compile import runtime",
        f'    with runtime.load("{name}") as cascade:',
        "        prediction = cascade(frame)  # uint8 RGB (H, W, 3) -> labels, exit, confidence, latency_ms",
        "",
        "The file may be unpacked (unzip); `python3 FOLDER verify` then works on the folder.",
        "",
        "Running this file runs the program in it. To check a bundle from an unknown source, use an installed",
        "mess-compile: it checks every byte, and the signature, before anything of the bundle is used:",
        "",
        f"    mess-compile verify {name} --allowed-signers FILE --require-signature",
    ]


def _choice(manifest: Manifest) -> list[str]:
    if len(manifest.plans) == 1:
        return []
    another = manifest.plans[-1].name
    return ["", "The first plan below that is for this machine runs; choose another one with", f"`--target {another}`."]


def _plan_lines(plan: BundlePlan) -> str:
    facts = {key: value for key, value in plan.environment.items() if not key.startswith(DOUBT)}
    where = "".join(f", {key} {value}" for key, value in sorted(facts.items()))
    title = f"Plan {plan.name}"
    lines = [
        "",
        title,
        "-" * len(title),
        f"{plan.library}, {plan.precision}, {plan.setting}; exits and thresholds chosen with {plan.tuned_by}.",
        f"Latencies are {plan.predicted.source} on {plan.target}{where}.",
        *([] if plan.truth == LABELS else [f"Every mIoU is against {plan.truth}."]),
        *(f"Warning: {doubt}." for doubt in plan.doubts),
        f"plan: {_figures(plan.predicted)}",
        f"{plan.baseline_name}: {_figures(plan.baseline)}",
    ]
    lines += [f"operating point {point.name}: {_figures(point.predicted)}" for point in plan.operating_points]
    return "\n".join(lines)


def _figures(figures: Figures) -> str:
    changed = "" if figures.change is None else f", changed pixels {figures.change:.2f} %"
    return (
        f"{figures.latency_ms:.2f} ms (p95 {figures.p95_ms:.2f}, worst {figures.worst_ms:.2f}), {figures.miou:.2f} % "
        f"mIoU{changed}, {figures.gmacs:.3f} GMACs, on the {figures.images} images of {figures.split} that it was "
        "chosen on"
    )


def _rest(manifest: Manifest) -> list[str]:
    engines = [engine for engine in manifest.engines if engine.graph is not None]
    lines = ["", "Files", "-----", "manifest.json lists every file with its SHA-256; docs/bundle.md of mess-compile"]
    lines += ["describes it. golden/ holds frames and their expected labels."]
    if engines:
        lines.append(f"The bundle has engines for {_places(engines)}. They are used when it is signed by somebody in")
        lines.append("--allowed-signers; otherwise engines are built from graphs/.")
    lines += ["", *(f"{key}: {value}" for key, value in sorted(manifest.provenance.items())), ""]
    return lines


def _places(engines: list[EngineFile]) -> str:
    places = (
        f"{engine.library} {engine.library_version} on {engine.device or 'any GPU'} of SM{major}{minor}"
        for engine in engines
        for major, minor in [engine.capability]
    )
    return "; ".join(dict.fromkeys(places))
