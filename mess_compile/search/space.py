"""The space of plans: chains of heads, and per early head every decision that its statistics can distinguish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.network import Head

CUTS = 32
ENUMERATED_EXITS = 2
"""The most early exits of which all rows and cuts are enumerated together."""
NEAR, NEAR_OF_THREE = 64, 16
"""The most cuts of each head tried between two neighbours on the grid; fewer where there are three heads."""
Grids = tuple[tuple[int, ...], ...]
"""The cuts of a head, by threshold row."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """The distinct decisions of one early head, in text order of (row, cut).

    `leaves` (options, n) says which images leave; of decisions by which the same images leave only the first is
    here. `total` counts all of them.
    """

    rows: NDArray[np.int64]
    cuts: NDArray[np.int64]
    leaves: NDArray[np.bool_]
    total: int

    @property
    def row_rank(self) -> NDArray[np.int64]:
        """The rank of each option's row in text order."""
        return np.cumsum(np.diff(self.rows, prepend=self.rows[:1]) != 0)


def row_text(row: int, plain: int) -> str:
    """A row as text, by which equal plans are ordered: of the `plain` threshold rows its number, others after these."""
    return str(row) if row < plain else f"~{row:02d}"


def nobody(images: int) -> Decisions:
    """The one decision by which no image leaves: it stands for a missing early head."""
    return Decisions(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, images), np.bool_), 1)


def head_options(statistics: ExitStatistics, head: str, grids: Grids) -> Decisions:
    """All pairs of a threshold row and a cut of `head`, of its `grids`, without duplicates in effect."""
    counts = np.asarray(statistics.counts[:, statistics.head_index(head)])  # (n, rows)
    plain = len(statistics.gate.thresholds)
    decisions = [(row, cut) for row, grid in enumerate(grids) for cut in grid]
    first_of: dict[bytes, tuple[int, int]] = {}
    for row, cut in sorted(decisions, key=lambda decision: (row_text(decision[0], plain), str(decision[1]))):
        first_of.setdefault(np.packbits(counts[:, row] >= cut).tobytes(), (row, cut))
    rows = np.array([row for row, _ in first_of.values()], np.int64)
    cuts = np.array([cut for _, cut in first_of.values()], np.int64)
    return Decisions(rows, cuts, counts.T[rows] >= cuts[:, None], len(decisions))


def options_near(statistics: ExitStatistics, head: str, row: int, cut: int, most: int) -> Decisions:
    """Cuts of `head` at one threshold row between the neighbours of `cut` on the grid, itself included: all of them, or
    of more than `most` those at even ranks."""
    counts = np.asarray(statistics.counts[:, statistics.head_index(head), row])  # (n,)
    grid, every = np.array(cut_grid(counts)), _cuts_between(counts)
    below, above = grid[grid < cut].max(initial=-1), grid[grid > cut].min(initial=np.iinfo(np.int64).max)
    near = every[(below < every) & (every < above)]
    near = near[np.unique(np.linspace(0, len(near) - 1, min(len(near), most)).round().astype(int))]
    cuts = np.array(sorted({cut, *near.tolist()}, key=str), np.int64)
    return Decisions(np.full(len(cuts), row, np.int64), cuts, counts[None] >= cuts[:, None], len(cuts))


def cut_grids(statistics: ExitStatistics, head: str) -> Grids:
    counts = np.asarray(statistics.counts[:, statistics.head_index(head)])  # (n, rows)
    return tuple(cut_grid(counts[:, row]) for row in range(counts.shape[1]))


def cut_grid(counts: NDArray[np.int32]) -> tuple[int, ...]:
    """Cuts midway (rounded up) between neighbouring observed counts: all, or of more than 32 those at even ranks.

    Source: docs/definitions.md, Gate; the ranks are ceil(j * M / 33), j = 1..32, of the M cuts.
    """
    cuts = _cuts_between(counts).tolist()
    total = len(cuts)
    if total > CUTS:
        cuts = [cuts[-(-j * total // (CUTS + 1)) - 1] for j in range(1, CUTS + 1)]
    return tuple(cuts)


def _cuts_between(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    observed = np.unique(counts).astype(np.int64)
    cuts: NDArray[np.int64] = (observed[:-1] + observed[1:] + 1) // 2
    return cuts


def chains(heads: Sequence[Head], final: int, early_exits: int) -> Iterator[tuple[str, ...]]:
    """Every choice of one of `heads` at each of 0 to `early_exits` ever deeper exit points before the `final` one."""

    def extended(chain: tuple[str, ...], deepest: int) -> Iterator[tuple[str, ...]]:
        yield chain
        if len(chain) < early_exits:
            for head in heads:
                if deepest < head.exit_point < final:
                    yield from extended((*chain, head.name), head.exit_point)

    return extended((), 0)


def last_heads(heads: Sequence[Head], chain: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `heads` at which a plan that begins with `chain` may end."""
    deepest = max((head.exit_point for head in heads if head.name in chain), default=0)
    return tuple(head.name for head in heads if head.exit_point > deepest)
