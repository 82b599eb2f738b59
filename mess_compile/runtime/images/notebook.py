"""Renders objects for a notebook: small pieces of HTML, every text escaped, no script, no style sheet."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from typing import Sequence, Tuple

import numpy as np

from mess_compile.runtime.images import png

Palette = Sequence[Tuple[str, Tuple[int, int, int]]]
"""The name and colour of every label."""
_MOST_SIDE = 480
_NAMED = 8
_UNNAMED = (0, 0, 0)


def table_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names the rows and is left-aligned, the others are right-aligned."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{_row_html(row)}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row_html(row: Sequence[str]) -> str:
    first, *rest = row
    cells = "".join(f'<td style="text-align:right">{escape(cell)}</td>' for cell in rest)
    return f'<th scope="row" style="text-align:left">{escape(first)}</th>{cells}'


def text_html(*lines: str) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def labels_html(labels: np.ndarray, palette: Palette) -> str:
    """Labels (H, W) in the colours of `palette`, and the share of the picture that the most frequent ones cover."""
    counts = np.bincount(labels.ravel(), minlength=len(palette))
    most = [int(label) for label in np.argsort(-counts, kind="stable")[:_NAMED] if counts[label]]
    shares = [(_name(label, palette), counts[label] / max(1, labels.size)) for label in most]
    words = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    step = max(1, -(-max(labels.shape) // _MOST_SIDE))
    colours = [colour for _, colour in palette] + [_UNNAMED] * (len(counts) - len(palette))
    content = png.write_png(labels[::step, ::step], colours)
    picture = b64encode(content).decode()
    return f'<img alt="labels: {escape(words)}" src="data:image/png;base64,{picture}"/>{text_html(words)}'


def _name(label: int, palette: Palette) -> str:
    return palette[label][0] if label < len(palette) else f"label {label}"
