"""What `--dry-run` prints: a step that a command would take, what it writes and how long it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_OF_GRAPHS = ("device", "precision", "place", "graphs", "there", "most_s")


@dataclass(frozen=True)
class Shipment:
    """What would be sent to a place and built there, where the version `current` is in use; `files` counts those of the
    bundle that the place lacks.

    `signers` is the file of allowed signers there; `refusal` says why the place would refuse the bundle.
    """

    current: str | None
    send_bytes: int
    files: int
    build: tuple[str, ...]
    free_bytes: int
    signers: str | None
    refusal: str | None


@dataclass(frozen=True)
class PlannedStep:
    """A step that would be taken: `what` it would do, and the files and folders that it `writes`.

    It takes at least `least_s`, an estimate by `basis`; None where there is no basis, and `basis` says why. Steps on
    graphs (build, profile) have a `device`, a `precision`, a `place` and at most `most_s`; of their `graphs` so many
    are `there` already (None: only the device knows). Shipping has a `place` and a `shipment`.
    """

    step: str
    what: str
    writes: tuple[str, ...]
    least_s: float | None
    basis: str
    notes: tuple[str, ...] = ()
    most_s: float | None = None
    device: str | None = None
    precision: str | None = None
    place: str | None = None
    graphs: int | None = None
    there: int | None = None
    shipment: Shipment | None = None

    def content(self) -> dict[str, Any]:
        """As JSON."""
        if self.shipment is not None:
            return {"place": self.place, "expected_s": self.least_s, **asdict(self.shipment)}
        left_out = ("shipment", *(_OF_GRAPHS if self.graphs is None else ()))
        return {key: value for key, value in asdict(self).items() if key not in left_out}
