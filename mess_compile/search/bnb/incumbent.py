"""The best plan so far, and what another plan must reach to replace it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mess_compile.array_types import Array
from mess_compile.network import is_whole
from mess_compile.search.bnb.arrays import UNBOUNDED, Problem
from mess_compile.search.space import row_text

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class BestPlan:
    """A plan: `heads` in running order, the (row, cut) of early ones; `goal` is the objective summed over images, or
    bytes of memory, or 0 where mIoU is the objective."""

    goal: int
    miou: float
    heads: tuple[str, ...]
    decisions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class BoundedChains:
    """`chains` (m, 4) of heads, in int16 for there may be millions, with lower bounds `least` (m,) on price - slope *
    mIoU of their plans."""

    chains: Array
    least: Array
    slope: float

    def price(self, miou: float) -> Array:
        """The least price (m,) of a plan with this mIoU."""
        price: Array = self.least + self.slope * miou
        return price

    def select(self, which: Any) -> BoundedChains:
        return BoundedChains(self.chains[which], self.least[which], self.slope)

    def from_cheapest(self) -> BoundedChains:
        """This order is the same for every mIoU."""
        return self.select(np.argsort(self.least, kind="stable"))


class Incumbent:
    """The `best` plan so far; None until there is one."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.best: BestPlan | None = None

    def offer(self, plan: BestPlan) -> None:
        """Replace the best plan by this one if it is allowed and comes first."""
        if self._problem.allowed(plan.heads) and (self.best is None or self._order(plan) < self._order(self.best)):
            self.best = plan

    def _order(self, plan: BestPlan) -> Any:
        """By objective, mIoU (greatest), number of graphs and text (docs/definitions.md, search order)."""
        known = self._problem
        points = [str(known.final if is_whole(head) else known.points[known.index(head)]) for head in plan.heads]
        rows = [row_text(row, known.plain) for row, _ in plan.decisions]
        cuts = [str(cut) for _, cut in plan.decisions]
        return plan.goal, -plan.miou, known.graphs(plan.heads), points, plan.heads, rows, cuts

    @property
    def min_miou(self) -> float:
        """The mIoU that a plan must reach; 0 when any is enough."""
        constraints = self._problem.constraints
        by_miou = constraints.objective < 0 and not self._problem.by_memory
        reached = self.best.miou if self.best is not None and by_miou else 0.0
        return max(constraints.floor, reached, 0.0)

    @property
    def min_charged(self) -> float:
        """What mIoU less its charges must reach: no plan that is allowed is charged more than the allowance."""
        return self.min_miou - self._problem.allowance

    @property
    def limit(self) -> int:
        """What a plan must not exceed of the priced quantity, summed over images."""
        bound = int(self._problem.constraints.bounds[self._problem.priced])
        if self._problem.constraints.objective >= 0 and self.best is not None:
            return min(bound, self.best.goal)
        return bound

    @property
    def max_price(self) -> float:
        """What a plan's price must not exceed, but for rounding errors."""
        return float(self.limit) if self._problem.weight else 0.0

    def ceiling(self, slope: float) -> float:
        """What price - slope * mIoU of a plan must not exceed."""
        return self._tolerated(slope) - slope * self.min_charged

    def _tolerated(self, slope: float) -> float:
        charged = slope * float(self._problem.table.charge_totals.max(initial=0.0))
        return self.max_price + _TOLERANCE * max(self.max_price, 1.0, charged)

    def may_lose_to(self, bounded: BoundedChains) -> Array:
        """Whether each of these chains may have a better plan, (m,)."""
        within: Array = bounded.price(self.min_charged) <= self._tolerated(bounded.slope)
        found: Array = within & self.fits(bounded.chains)
        return found

    def fits(self, chains: Array) -> Array:
        """Whether heads (m, 4) take no more memory than a better plan may."""
        most = self._problem.max_memory
        if self._problem.by_memory and self.best is not None:
            most = min(most, self.best.goal)
        return np.ones(len(chains), np.bool_) if most == UNBOUNDED else self._problem.memory(chains) <= most
