"""Describes the candidate network as data: exit points, heads, segments, workloads. No torch, no ONNX."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import files
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.engines.engine import FP32, PRECISIONS, TensorSpec

CRM_DIVISORS = (1, 2, 4, 8)
MAX_BLOCKS = 3
HEAD_KINDS = ("fcn", "dlb", "sep", "lra")
HEAD_WIDTHS = {"dlb": 256, "sep": 64, "lra": 128}
"""Default widths of the kinds that have a width of their own; an FCN head's follows from its channels."""
MAX_HEAD_WIDTH = 512
CONFIDENCES = ("top1", "margin", "entropy")
DEFAULT_THRESHOLDS = (0.40, 0.50, 0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.93, 0.96, 0.98, 0.99)
_HEAD_NAME = re.compile(r"([a-z]+)([1-9]\d{0,3})?-crm([1-9]\d*)-b(\d)(-rdi)?")
MAX_SIDE = 1 << 14
DTYPES = ("uint8", "int32", "int64", "float32", "bool")
IMAGE = "image"
"""The tensor that every network begins with: uint8 (1, H, W, 3)."""
_OWN_NAMES = re.compile(r"thresholds|logits|counts|labels|sound|(logits:|gate/|output/|sound/).*", re.DOTALL)
"""Names that heads, gates and output graphs give to their own tensors; no tensor at an exit point has one."""
OWN = "own"
"""The configuration of a head that is the own end of a network with one exit."""
_GRAPHS_REMEDY = "run `mess-compile export`"


@dataclass(frozen=True)
class HeadConfig:
    """One point of the head space: CRM -> extra blocks (dilated further by RDI) -> head.

    `crm` divides the channels (1: no module); `blocks` counts the extra 3x3 blocks; `fcn` and `dlb` (DeepLabV3) are the
    MESS poster's. `sep` is an ASPP of depthwise separable convolutions, `lra` the lite reduced ASPP of MobileNetV3;
    `width` is the number of channels within a `dlb`, `sep` or `lra`.
    """

    kind: str = "fcn"
    crm: int = 1
    blocks: int = 0
    rdi: bool = False
    width: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS or self.crm not in CRM_DIVISORS or not 0 <= self.blocks <= MAX_BLOCKS:
            raise InputError(
                f"head {self.name}{_nearest_head(self.name)}: kind is one of {', '.join(HEAD_KINDS)}, crm one of "
                f"{', '.join(map(str, CRM_DIVISORS))}, blocks 0 to {MAX_BLOCKS}"
            )
        if self.rdi and self.blocks == 0:
            raise InputError(f"head {self.name}: RDI has no effect without blocks; drop -rdi")
        if self.kind not in HEAD_WIDTHS and self.width is not None:
            raise InputError(f"head {self.name}: a {self.kind} head has no width of its own; drop the {self.width}")
        if self.width is not None and not 8 <= self.width <= MAX_HEAD_WIDTH:
            raise InputError(f"head {self.name}: width {self.width} is not between 8 and {MAX_HEAD_WIDTH}")
        if self.width == HEAD_WIDTHS.get(self.kind, 0):
            object.__setattr__(self, "width", None)  # one head, one name

    @property
    def name(self) -> str:
        return f"{self.kind}{self.width or ''}-crm{self.crm}-b{self.blocks}" + ("-rdi" if self.rdi else "")

    @property
    def channels(self) -> int:
        """The width that is built, for a kind that has one."""
        return self.width or HEAD_WIDTHS[self.kind]


def head_config_from_name(name: str) -> HeadConfig:
    """Parse `fcn-crm4-b2-rdi` or `sep96-crm1-b0`. Raises InputError."""
    match = _HEAD_NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"head {name!r}{_nearest_head(name)} does not have the form KIND[WIDTH]-crmN-bN[-rdi], such as "
            "fcn-crm4-b2-rdi or sep96-crm1-b0"
        )
    width = None if match[2] is None else int(match[2])
    return HeadConfig(match[1], int(match[3]), int(match[4]), match[5] is not None, width)


def _nearest_head(name: str) -> str:
    return did_you_mean(name, (head.name for head in head_grid()))


def head_grid() -> tuple[HeadConfig, ...]:
    """The paper's head space: 64 nominal configurations, 56 distinct."""
    return tuple(
        HeadConfig(kind, crm, blocks, rdi)
        for kind in ("fcn", "dlb")
        for crm in CRM_DIVISORS
        for blocks in range(MAX_BLOCKS + 1)
        for rdi in ((False, True) if blocks else (False,))
    )


_COUNT = decode.Check(lambda value: type(value) is int and 0 <= value < 1 << 48, "a workload or size")
"""Sums of these over a data set fit 64 bits."""
SIDES = decode.Check(lambda value: value is None or _are_sides(value), f"two sides from 1 to {MAX_SIDE}")


def _are_sides(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(type(v) is int and 1 <= v <= MAX_SIDE for v in value)


@dataclass(frozen=True)
class ExitPoint:
    """A place on the backbone where heads may attach.

    `name` is exit1..exitN, the name in every graph of the map that feeds the heads; `block` the backbone module it
    follows; `macs` the backbone's cumulative workload up to here (convolution MACs + 2 per BatchNorm element).
    `carried` are the other tensors that are alive here, since later nodes of the backbone, or the network's own end,
    read them: `image`, maps of earlier exit points, or any others. They have the same name and shape wherever they are
    alive.
    """

    name: str
    block: str
    channels: int
    hw: tuple[int, int]
    macs: int = field(metadata=decode.entry(check=_COUNT))
    carried: tuple[TensorSpec, ...] = field(default=(), metadata=decode.OPTIONAL)

    def frontier(self, number: int) -> tuple[TensorSpec, ...]:
        """All tensors that are alive here, at the exit point of this `number`: the map first, then the carried ones."""
        return (TensorSpec(f"exit{number}", "float32", (1, self.channels, *self.hw)), *self.carried)


@dataclass(frozen=True)
class Head:
    """One candidate head; `exit_point` counts from 1, `config` is a HeadConfig's name or a foreign name.

    `hw` is the size of its logits, None if it equals the exit point's map: a head may upsample inside. The network's
    own end, the last exit of a network that was brought, may have its own way from logits to labels: `labels` names the
    tensor uint8 (1, H, W) that it computes from them. Its gate may count over logits that are average-pooled to the
    size `gate_hw`.
    """

    exit_point: int
    config: str
    macs: int = field(metadata=decode.entry(check=_COUNT))
    hw: tuple[int, int] | None = field(default=None, metadata=decode.entry(check=SIDES, optional=True))
    labels: str | None = field(default=None, metadata=decode.OPTIONAL)
    gate_hw: tuple[int, int] | None = field(default=None, metadata=decode.entry(check=SIDES, optional=True))

    @property
    def name(self) -> str:
        return f"exit{self.exit_point}.{self.config}"


@dataclass(frozen=True)
class Gate:
    """How a head's logits become counts of confident cells: see docs/definitions.md, Gate.

    `thresholds` are the plain pixel thresholds of the T rows; `edge_aware` switches Eq. 2-3 on. Graphs count
    `by_class`, (T + 2, K), but for those that earlier releases exported: these give the sums (T,).
    """

    confidence: str = "top1"
    edge_aware: bool = True
    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    by_class: bool = field(default=False, metadata=decode.OPTIONAL)

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCES:
            raise InputError(f"confidence {self.confidence!r} is not one of {', '.join(CONFIDENCES)}")


@dataclass(frozen=True)
class CandidateNetwork:
    """The overprovisioned network. `baseline` names the final exit's head; `identity` is a SHA-256 of everything that
    decides its outputs (weights and architecture), by which statistics identify their network.
    """

    backbone: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    input_hw: tuple[int, int] = field(metadata=decode.entry(check=SIDES))
    exit_points: tuple[ExitPoint, ...]
    heads: tuple[Head, ...]
    baseline: str
    identity: str

    def head(self, name: str) -> Head:
        for head in self.heads:
            if head.name == name:
                return head
        raise InputError(f"no head {name!r} in this network; it has {', '.join(h.name for h in self.heads)}")

    def head_behind(self, name: str) -> Head:
        """The head of this name, or for a whole network its final head."""
        return self.head(self.baseline if is_whole(name) else name)

    def point_of(self, name: str) -> int:
        """The number of a head's exit point; a whole network ends at the last one."""
        return self.head_behind(name).exit_point

    def exit_point(self, number: int) -> ExitPoint:
        """The exit point by its number, from 1."""
        return self.exit_points[number - 1]

    def logits_hw(self, head: Head) -> tuple[int, int]:
        """The size of a head's logits, which its output graph reads."""
        return head.hw or self.exit_point(head.exit_point).hw

    def cells(self, head: Head) -> int:
        """The number of cells that a head's gate counts over."""
        return math.prod(head.gate_hw or self.logits_hw(head))

    def output_of(self, head: Head) -> str:
        """The name of the output graph that a head's logits go to."""
        return output_name(self.logits_hw(head)) if head.labels is None else OUTPUT_OWN

    def live(self, number: int) -> tuple[str, ...]:
        """The names of the tensors that are alive at an exit point, its map first; 0 is the image."""
        return tuple(tensor.name for tensor in self.frontier(number))

    def frontier(self, number: int) -> tuple[TensorSpec, ...]:
        """The tensors that are alive at an exit point, its map first; 0 is the image."""
        image = TensorSpec(IMAGE, "uint8", (1, *self.input_hw, 3))
        return self.exit_point(number).frontier(number) if number else (image,)

    def heads_at(self, number: int) -> tuple[Head, ...]:
        return tuple(head for head in self.heads if head.exit_point == number)

    def segments(self) -> tuple[tuple[int, int], ...]:
        """All N(N+1)/2 pairs (a, b), 0 <= a < b <= N; 0 is the image."""
        n = len(self.exit_points)
        return tuple((a, b) for a in range(n) for b in range(a + 1, n + 1))

    def segment_macs(self, a: int, b: int) -> int:
        start = self.exit_points[a - 1].macs if a else 0
        return self.exit_points[b - 1].macs - start

    @property
    def baseline_macs(self) -> int:
        return self.exit_points[-1].macs + self.head(self.baseline).macs

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        for head in content["heads"]:
            for key in ("hw", "labels", "gate_hw"):
                if head[key] is None:
                    del head[key]
        for point in content["exit_points"]:
            if not point["carried"]:
                del point["carried"]
        return content


def check_candidate(network: CandidateNetwork) -> None:
    """Raises InputError when exit points, heads, classes and colours do not fit together."""
    points = len(network.exit_points)
    if not network.heads or not points or any(not 1 <= head.exit_point <= points for head in network.heads):
        raise InputError(f"heads and exit points do not fit together: {len(network.heads)} heads, {points} exit points")
    if len(network.colours) != len(network.classes):
        raise InputError(f"there are {len(network.colours)} colours for {len(network.classes)} classes")
    if network.head(network.baseline).exit_point != points:
        raise InputError(f"the baseline head {network.baseline} is not at the final exit")
    _check_carried(network)
    for head in network.heads:
        _check_own_end(network, head)


def _check_carried(network: CandidateNetwork) -> None:
    """Raises InputError unless every carried tensor is alive at a row of exit points, the same at each."""
    if not any(point.carried for point in network.exit_points):
        return
    alive: dict[str, tuple[TensorSpec, int]] = {}
    for number in range(len(network.exit_points) + 1):
        frontier, where = network.frontier(number), f"exit{number}"
        if len({tensor.name for tensor in frontier}) < len(frontier):
            raise InputError(f"{where} carries a tensor twice: {', '.join(network.live(number))}")
        for tensor in frontier:
            _check_tensor(tensor)
            _check_carried_name(tensor.name, number, new=tensor.name not in alive)
            if min(tensor.shape, default=1) < 1:
                raise InputError(f"{where} carries {_described(tensor)}, without a static shape")
            known, last = alive.get(tensor.name, (tensor, number - 1))
            if last != number - 1:
                raise InputError(f"{where} carries {tensor.name}, which exit{number - 1} does not")
            if known != tensor:
                raise InputError(f"{where} carries {_described(tensor)}, but it was {_described(known)} before")
            alive[tensor.name] = tensor, number


def _check_carried_name(name: str, number: int, new: bool) -> None:
    if not name or _OWN_NAMES.fullmatch(name):
        raise InputError(f"exit{number} carries {name!r}, a name that heads and gates give to their own tensors")
    if new and name != f"exit{number}" and re.fullmatch(r"exit\d+", name):
        raise InputError(f"exit{number} carries {name}, which is not alive before it")


def _check_own_end(network: CandidateNetwork, head: Head) -> None:
    """Raises InputError for labels or a pooled gate of a head that is not the final one, and for wrong sizes."""
    if head.labels is None and head.gate_hw is None:
        return
    if head.name != network.baseline:
        raise InputError(f"head {head.name} has labels or gate_hw, which only the final head may have")
    if head.labels is not None and (not head.labels or head.labels in (IMAGE, *network.live(head.exit_point))):
        raise InputError(f"labels of head {head.name} is {head.labels!r}, which is no name of a tensor of its own")
    hw = network.logits_hw(head)
    if any(side % cells for side, cells in zip(hw, head.gate_hw or hw, strict=True)):
        raise InputError(f"gate_hw of head {head.name} is {head.gate_hw}, which does not divide its logits' {hw}")


def _described(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} {tensor.shape}"


def segment_name(a: int, b: int) -> str:
    return f"segment-{a}-{b}"


def head_graph_name(head: str) -> str:
    return f"head-{head}"


def output_name(hw: tuple[int, int]) -> str:
    """The output graph shared by all heads whose logits have this size."""
    return f"output-{hw[0]}x{hw[1]}"


OUTPUT_OWN = "output-own"
"""The output graph of the network's own end: its own nodes from logits to labels."""

BASELINE, BASELINE_ALONE = "baseline", "baseline-alone"
"""The single-exit graphs: the candidate network's final exit, and a network of one exit that was trained alone."""
SOUND = "sound"
"""The output of a single-exit graph that counts its cells with finite logits, as a gate's guard does for a head."""


def is_whole(name: str) -> bool:
    """Whether a plan's exit is a whole single-exit network, uncut, instead of a head."""
    return name in (BASELINE, BASELINE_ALONE)


_PRECISION = decode.entry(check=decode.one_of(PRECISIONS), optional=True)


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file below `graphs/`.

    `sha256` is over the ONNX bytes, which name every weight by its own hash. `bytes` counts the weights;
    `workspace_bytes` is the estimated peak of live activations. `precision` is what the graph computes in, `wanted`
    what its recipe asked for: they differ after a fallback to a safer one.
    """

    name: str
    path: str = field(metadata=decode.entry(check=decode.matches(r"[\w.-]+\.onnx", "the name of an .onnx file")))
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: int = field(metadata=decode.entry(check=_COUNT))
    bytes: int = field(metadata=decode.entry(check=_COUNT))
    workspace_bytes: int = field(metadata=decode.entry(check=_COUNT))
    precision: str = field(default=FP32, metadata=_PRECISION)
    wanted: str = field(default=FP32, metadata=_PRECISION)


@dataclass(frozen=True)
class GraphSet:
    """The result of `export` in `graphs/`: the candidate network, the gate, and every graph by name.

    `baseline_alone` is the identity of the single-exit network trained alone, None without one. `recipe` names the
    precision recipe that the graphs were converted by.
    """

    root: Path
    candidate: CandidateNetwork
    gate: Gate
    graphs: dict[str, GraphSpec]
    baseline_alone: str | None = None
    recipe: str = FP32

    @property
    def identity(self) -> str:
        """Identifies everything that decides the outputs: the network, and for a recipe other than fp32 its graphs,
        too.
        """
        if self.recipe == FP32:
            return self.candidate.identity
        parts = [f"{name} {spec.sha256}" for name, spec in sorted(self.graphs.items())]
        return hashlib.sha256("\n".join([self.candidate.identity, self.recipe, *parts]).encode()).hexdigest()

    @property
    def retrained(self) -> bool:
        """Whether `attach` trained the network's own end further, so that BASELINE_ALONE is the network as it came."""
        return self.baseline_alone is not None and self.candidate.head(self.candidate.baseline).labels is not None

    @property
    def baselines(self) -> tuple[str, ...]:
        """The graphs that plans are compared with: image to labels, one exit, no gate, all of one workload."""
        return (BASELINE,) if self.baseline_alone is None else (BASELINE, BASELINE_ALONE)

    def spec(self, name: str) -> GraphSpec:
        if name not in self.graphs:
            raise InputError(f"{self.root} has no graph {name!r}: {_GRAPHS_REMEDY}")
        return self.graphs[name]

    def path(self, name: str) -> Path:
        return self.root / self.spec(name).path


def write_graph_set(graph_set: GraphSet) -> None:
    """Write `index.json` into the set's root."""
    content = {
        "candidate": graph_set.candidate.to_json(),
        "gate": asdict(graph_set.gate),
        "baseline_alone": graph_set.baseline_alone,
        "recipe": graph_set.recipe,
        "graphs": [asdict(spec) for spec in graph_set.graphs.values()],
    }
    files.write_json(graph_set.root / "index.json", "mess-graphs", 1, content)


def read_graph_set(root: Path) -> GraphSet:
    """Read `index.json`. Raises InputError."""
    files.recovered(root)
    path = root / "index.json"
    content = files.read_json(path, "mess-graphs", 1, _GRAPHS_REMEDY)
    found: _GraphsDocument = files.decode_document(path, _GraphsDocument, content, _GRAPHS_REMEDY, _check_graph_set)
    graphs = {spec.name: spec for spec in found.graphs}
    return GraphSet(root, found.candidate, found.gate, graphs, found.baseline_alone, found.recipe)


@dataclass(frozen=True)
class _GraphsDocument:
    """The content of `index.json`."""

    candidate: CandidateNetwork
    gate: Gate
    graphs: tuple[GraphSpec, ...]
    baseline_alone: str | None = field(default=None, metadata=decode.OPTIONAL)
    recipe: str = field(default=FP32, metadata=decode.OPTIONAL)


def _check_graph_set(found: _GraphsDocument) -> None:
    check_candidate(found.candidate)
    for spec in found.graphs:
        check_tensors(spec)
    if (found.baseline_alone is None) == (BASELINE_ALONE in {spec.name for spec in found.graphs}):
        raise InputError(f"baseline_alone is {found.baseline_alone!r}, which does not fit the graphs")


def check_graphs(graph_set: GraphSet) -> None:
    """Hash every graph, not its weights. Raises InputError naming one that is missing or was changed."""
    for name, spec in graph_set.graphs.items():
        check_hash(graph_set.path(name), spec.sha256)


def verify_graph_set(graph_set: GraphSet) -> None:
    """Hash every graph and every stored weight. Raises InputError naming one that is missing or was changed."""
    check_graphs(graph_set)
    weights = graph_set.root / "weights"
    for weight in sorted(weights.iterdir()) if weights.is_dir() else ():
        check_hash(weight, weight.name)


def check_hash(path: Path, sha256: str) -> None:
    """Raises InputError when a graph or weight is missing or its bytes are not those that `export` wrote."""
    if not path.is_file():
        raise InputError(f"{path} is missing: {_GRAPHS_REMEDY}")
    if files.sha256_of_file(path) != sha256:
        raise InputError(f"{path} was changed after export: {_GRAPHS_REMEDY}")


def check_tensors(spec: GraphSpec) -> None:
    """Raises InputError for an input or output of an unknown type, or too large to count."""
    for tensor in (*spec.inputs, *spec.outputs):
        _check_tensor(tensor)


def _check_tensor(tensor: TensorSpec) -> None:
    if tensor.dtype not in DTYPES:
        raise InputError(f"tensor {tensor.name} has dtype {tensor.dtype!r}, not one of {', '.join(DTYPES)}")
    if not _COUNT.passes(math.prod(tensor.shape)):
        raise InputError(f"tensor {tensor.name} has shape {tensor.shape}, which is no size")


def threshold_table(gate: Gate, classes: int) -> NDArray[np.float32]:
    """The gate's plain thresholds as its (T, K) input: row j repeats threshold j for every class."""
    return np.repeat(np.array(gate.thresholds, np.float32)[:, None], classes, axis=1)
