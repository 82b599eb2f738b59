"""Generates street scenes of varying difficulty: data for the demo and golden inputs for bundles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mess_compile import files
from mess_compile.data import scenes
from mess_compile.data.dataset import ClassList, Sample
from mess_compile.network import GraphSet, threshold_table

SCENE_CLASSES = ClassList(
    names=("sky", "building", "road", "pavement", "tree", "car", "pedestrian", "sign"),
    colours=(
        (110, 160, 220),
        (150, 80, 70),
        (120, 90, 140),
        (70, 60, 190),
        (60, 140, 60),
        (70, 30, 140),
        (210, 170, 40),
        (230, 90, 120),
    ),
    is_coloured=True,
)
Spread = tuple[float, float]
"""The parameters of a beta distribution of difficulties, from 0 to 1."""
HALF_HARD: Spread = (0.6, 0.6)
"""As many hard scenes as easy ones, and few between."""
MOSTLY_EASY: Spread = (0.5, 1.0)
"""Half of the scenes have a difficulty below 0.25, three in ten one above 0.5."""
_SKY, _BUILDING, _ROAD, _PAVEMENT, _TREE, _CAR, _PEDESTRIAN, _SIGN = range(8)
_PAINT = (
    (150, 190, 230),
    (150, 110, 95),
    (95, 95, 100),
    (160, 155, 150),
    (70, 110, 60),
    (160, 40, 50),
    (60, 60, 120),
    (220, 200, 60),
)


class _Canvas:
    """Draws every shape twice: into the frame with a disturbed colour, into the labels with its class."""

    def __init__(self, hw: tuple[int, int], rng: np.random.Generator, difficulty: float) -> None:
        self.height, self.width = hw
        self.rng, self.difficulty = rng, difficulty
        self.frame = Image.new("RGB", (self.width, self.height), self._colour(_SKY))
        self.labels = Image.new("L", (self.width, self.height), _SKY)
        self._frame, self._labels = ImageDraw.Draw(self.frame), ImageDraw.Draw(self.labels)

    def _colour(self, label: int) -> tuple[int, int, int]:
        base = np.array(_PAINT[label], float)
        grey = base.mean()
        mixed = base + self.difficulty * 0.7 * (grey - base) + self.rng.normal(0, 10 + 20 * self.difficulty, 3)
        red, green, blue = (int(v) for v in np.clip(mixed, 0, 255))
        return red, green, blue

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, label: int) -> None:
        box = [round(x0), round(y0), max(round(x0), round(x1)), max(round(y0), round(y1))]
        self._frame.rectangle(box, fill=self._colour(label))
        self._labels.rectangle(box, fill=label)

    def ellipse(self, x: float, y: float, rx: float, ry: float, label: int) -> None:
        box = [x - rx, y - ry, x + rx, y + ry]
        self._frame.ellipse(box, fill=self._colour(label))
        self._labels.ellipse(box, fill=label)

    def polygon(self, points: list[tuple[float, float]], label: int) -> None:
        self._frame.polygon(points, fill=self._colour(label))
        self._labels.polygon(points, fill=label)


def by_difficulty(hw: tuple[int, int], count: int) -> list[Sample]:
    """So many street scenes (H, W, 3), from the easiest to the hardest; always the same ones."""
    return [make_scene(seed, hw, seed / max(1, count - 1)) for seed in range(count)]


def make_scene(seed: int, hw: tuple[int, int], difficulty: float | None = None, spread: Spread = HALF_HARD) -> Sample:
    """One street scene (H, W, 3) with its labels; the same seed gives the same scene.

    `difficulty` in 0..1 sets how crowded, colourless, dark, blurred and noisy it is. By default it is drawn from the
    seed, by a beta distribution with the parameters `spread`.
    """
    rng = np.random.default_rng(seed)
    drawn = float(rng.beta(*spread))
    hard = drawn if difficulty is None else difficulty
    canvas = _Canvas(hw, rng, hard)
    horizon = hw[0] * rng.uniform(0.38, 0.52)
    _draw_street(canvas, horizon)
    _draw_objects(canvas, horizon)
    return Sample(f"scene_{seed:06d}", "scene", _photograph(canvas, hard), np.array(canvas.labels))


def _draw_street(canvas: _Canvas, horizon: float) -> None:
    rng, width, height = canvas.rng, canvas.width, canvas.height
    x = 0.0
    while x < width:
        step = width * rng.uniform(0.10, 0.30)
        if rng.random() < 0.85:
            canvas.rectangle(x, horizon * rng.uniform(0.15, 0.75), x + step, horizon, _BUILDING)
        x += step
    canvas.rectangle(0, horizon, width, height, _PAVEMENT)
    vanishing = width * rng.uniform(0.35, 0.65)
    left, right = width * rng.uniform(-0.1, 0.2), width * rng.uniform(0.8, 1.1)
    half = width * 0.04
    canvas.polygon([(vanishing - half, horizon), (vanishing + half, horizon), (right, height), (left, height)], _ROAD)


def _draw_objects(canvas: _Canvas, horizon: float) -> None:
    rng, width, height = canvas.rng, canvas.width, canvas.height
    count = 2 + round(12 * canvas.difficulty * rng.uniform(0.6, 1.0))
    for depth in np.sort(rng.uniform(0.0, 1.0, count)):
        ground = horizon + (height - horizon) * (0.12 + 0.7 * depth)
        size = height * (0.06 + 0.20 * depth)
        x = width * rng.uniform(0.0, 1.0)
        kind = rng.choice([_TREE, _CAR, _PEDESTRIAN, _SIGN], p=[0.25, 0.35, 0.25, 0.15])
        if kind == _CAR:
            canvas.rectangle(x - size, ground - 0.7 * size, x + size, ground, _CAR)
            canvas.rectangle(x - 0.6 * size, ground - 1.1 * size, x + 0.6 * size, ground - 0.7 * size, _CAR)
        elif kind == _PEDESTRIAN:
            canvas.rectangle(x - 0.18 * size, ground - 1.1 * size, x + 0.18 * size, ground, _PEDESTRIAN)
            canvas.ellipse(x, ground - 1.25 * size, 0.16 * size, 0.18 * size, _PEDESTRIAN)
        elif kind == _TREE:
            canvas.rectangle(x - 0.1 * size, ground - 1.4 * size, x + 0.1 * size, ground, _TREE)
            canvas.ellipse(x, ground - 1.9 * size, 0.7 * size, 0.8 * size, _TREE)
        else:
            canvas.rectangle(x - 0.05 * size, ground - 1.6 * size, x + 0.05 * size, ground, _SIGN)
            canvas.ellipse(x, ground - 1.7 * size, 0.25 * size, 0.25 * size, _SIGN)


def _photograph(canvas: _Canvas, hard: float) -> NDArray[np.uint8]:
    rng = canvas.rng
    scale = canvas.height / 120
    blurred = canvas.frame.filter(ImageFilter.GaussianBlur(scale * (0.3 + 1.0 * hard * rng.random())))
    frame = np.asarray(blurred, np.float32)
    shade = np.linspace(1.0, 1.0 - 0.5 * hard * rng.random(), canvas.width, dtype=np.float32)
    gain = np.float32(1.0 - 0.55 * hard * rng.random())
    noise = rng.standard_normal(frame.shape, np.float32)
    noise *= np.float32(3.0 + 15.0 * hard)
    noise += frame * (gain * shade)[None, :, None]
    return np.clip(noise, 0, 255, out=noise).astype(np.uint8)


def write_scenes(
    root: Path,
    counts: dict[str, int],
    hw: tuple[int, int],
    seed: int = 0,
    spread: Spread = HALF_HARD,
) -> None:
    """Write `ROOT/SPLIT/images|labels` for every split and `ROOT/classes.txt`; all of it or nothing."""
    with files.replaced_folder(root) as folder:
        lines = (
            f"{name} {r} {g} {b}" for name, (r, g, b) in zip(SCENE_CLASSES.names, SCENE_CLASSES.colours, strict=True)
        )
        (folder / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for split, count in counts.items():
            for kind in ("images", "labels"):
                (folder / split / kind).mkdir(parents=True)
            for _ in range(count):
                sample = make_scene(seed, hw, spread=spread)
                Image.fromarray(sample.frame).save(folder / split / "images" / f"{sample.id}.png", compress_level=0)
                Image.fromarray(sample.labels).save(folder / split / "labels" / f"{sample.id}.png")
                seed += 1


def profiling_inputs(graph_set: GraphSet) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The inputs that graphs are measured with: a generated frame at the network's input size, and the gate's
    thresholds.
    """
    frame = scenes.make_scene(0, graph_set.candidate.input_hw).frame
    return frame, threshold_table(graph_set.gate, len(graph_set.candidate.classes))
