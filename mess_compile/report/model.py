"""The parts of a report, and what stands for a part that is missing."""

from __future__ import annotations

from dataclasses import dataclass

from mess_compile.bench.result import StoredBench
from mess_compile.report.views import Classes, GraphCosts, PlanView
from mess_compile.search.plan import SearchResult


@dataclass(frozen=True)
class Missing:
    """Why a part is missing and what to run, in one sentence; commands between backticks."""

    reason: str


@dataclass(frozen=True)
class Picture:
    """A JPEG with its caption and its text for screen readers."""

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
    """Strips of several images; `source` says which images they are and how they are ordered."""

    source: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class SearchFound:
    """A search and its plans as the page shows them; `unseen` says why they lack details."""

    result: SearchResult
    views: tuple[PlanView, ...]
    unseen: Missing | None


@dataclass(frozen=True)
class Benched:
    """What `bench` measured; `note` says why it may not be comparable with the plan."""

    bench: StoredBench
    note: str


@dataclass(frozen=True)
class Report:
    """Everything on the page of one device; `notes` are warnings about all of it."""

    device: str
    search: SearchFound | Missing
    classes: Classes | Missing
    costs: GraphCosts | Missing
    bench: Benched | Missing
    strips: Strips | Missing
    provenance: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
