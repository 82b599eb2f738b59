"""What a report is made of, and what stands in the place of a part that is not there."""

from __future__ import annotations

from dataclasses import dataclass

from mess_compile.bench.result import StoredBench
from mess_compile.report.views import Classes, GraphCosts, PlanView
from mess_compile.search.plan import SearchResult


@dataclass(frozen=True)
class Missing:
    """Why a part is not there and what to run, in one sentence; commands between backticks."""

    reason: str


@dataclass(frozen=True)
class Picture:
    """A JPEG with its caption, and what it shows for those who cannot see it."""

    caption: str
    described: str
    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Strip:
    """One image on its way through the cascade."""

    title: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Strips:
    """`source` tells where the images are from and what they are ordered by."""

    source: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class SearchFound:
    """A search as it was written, and its plans as a reader looks at them; `unseen` tells why they lack details."""

    result: SearchResult
    views: tuple[PlanView, ...]
    unseen: Missing | None


@dataclass(frozen=True)
class Benched:
    """What was measured, and whether it was this plan; `note` says what to keep in mind."""

    bench: StoredBench
    note: str


@dataclass(frozen=True)
class Report:
    """Everything on the page of one device; `notes` are what to keep in mind of all of it, in sentences."""

    device: str
    search: SearchFound | Missing
    classes: Classes | Missing
    costs: GraphCosts | Missing
    bench: Benched | Missing
    strips: Strips | Missing
    provenance: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
