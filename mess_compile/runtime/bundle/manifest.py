"""Describes a bundle: `manifest.json`, read strictly."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import BundleError
from mess_compile.runtime.base.policy import PolicyRow, check_rows, named_row, top_of_row
from mess_compile.runtime.engines.engine import PRECISIONS

FORMAT = "mess-bundle"
VERSION = 7
READABLE = (5, 6, VERSION)
MANIFEST = "manifest.json"
MANIFEST_HASH = f"{MANIFEST}.sha256"
SIGNATURE = f"{MANIFEST}.sig"
BESIDE = (MANIFEST, MANIFEST_HASH, SIGNATURE)
"""A bundle's files that its manifest does not list; the signature is there only if the bundle is signed."""
SETTINGS = ("input-dependent", "budgeted", "anytime")
SOURCES = ("measured", "estimated")
LABELS, OWN_OUTPUT = "labels", "the network's own output"
TRUTHS = (LABELS, OWN_OUTPUT)
"""What mIoU is against."""
RESIZES = ("stretch", "letterbox")
DEFAULT_POINT = "default"
HELD_OUT = "held_out"
"""A key in a plan's environment: the share of its split's images that it was not chosen on."""
CERTIFIED = "certified"
"""Another key: the confidence that the plan was certified at, on images drawn for that."""
DOUBT = "doubt"
"""The keys of a plan's environment that begin with this hold warnings about its latencies."""
CONFIDENCE_BINS = 10
MAX_POINTS = 8
MAX_SIDE = 1 << 14
_MAX_DIGITS = 20
_MAX_THRESHOLD = 1e6
_PATH = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,120}(?:/(?!\.)[A-Za-z0-9_.-]{1,120}){0,3}")
_NAMES = {
    "precision": re.compile(r"[a-z0-9-]{1,32}"),
    "target": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
    "tuned_by": re.compile(r"[a-z_-]{1,40} on [A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
    "split": re.compile(r"[\w-]{1,64}(?:\[\d*:\d*\])?"),
}
"""These names become paths in a workspace."""
_POINT = re.compile(r"[a-z][a-z0-9-]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def against(truth: str) -> str:
    """What a title or sentence about mIoU adds: nothing where the truth is labels."""
    return "" if truth == LABELS else f", against {truth}"


@dataclass(frozen=True)
class Network:
    """The candidate network that the graphs were cut from; `gmacs` is its baseline's workload.

    `resize` says how frames of another size than `input_hw` are resized: "stretch", or "letterbox", which keeps their
    proportions.
    """

    backbone: str
    identity: str
    classes: Tuple[str, ...]
    colours: Tuple[Tuple[int, int, int], ...]
    input_hw: Tuple[int, int]
    gmacs: float
    resize: str


@dataclass(frozen=True)
class BundleGate:
    """`thresholds` is the (T, K) input of every head graph. Heads count `by_class`, (T + 2, K), but for those that
    earlier releases exported: these give the sums (T,)."""

    confidence: str
    edge_aware: bool
    thresholds: Tuple[Tuple[float, ...], ...]
    by_class: bool = field(default=False, metadata=decode.OPTIONAL)


@dataclass(frozen=True)
class BundleStage:
    """One exit: its graphs as paths in the bundle, and the decision: leave where the count of `row` is at least `cut`.

    `row` is one of the gate's thresholds, or a policy row of the plan beyond them; the map has so many `cells`.
    `cut` is None where nothing is decided: at the last exit, and everywhere in the anytime setting. A whole network,
    uncut, is one `segment` from image to labels, without head graph, output graph or confidence.
    """

    exit_point: int
    head: str
    segment: str
    head_graph: Optional[str]
    output: Optional[str]
    row: int
    cut: Optional[int]
    cells: int

    @property
    def is_whole(self) -> bool:
        return self.head_graph is None

    @property
    def graphs(self) -> Tuple[str, ...]:
        """Paths, in the order in which they run."""
        return tuple(path for path in (self.segment, self.head_graph, self.output) if path is not None)


@dataclass(frozen=True)
class Figures:
    """Costs and mIoU of a plan, or of the baseline, on the `images` of `split`.

    `latency_ms` is the mean over images, `p95_ms` the percentile of their path costs, `worst_ms` the deepest path at
    p99; `miou` in percent; `gmacs` the mean over images; `exit_rates` the share of images that leave at each exit;
    `source` is "measured" or "estimated", of the latencies; `energy_mj` is the mean over images, None where the latency
    table lacks the energy of a graph, and in a bundle. `error` is the factor by which estimated latencies may be too
    low or too high (90 % of the graphs that were checked are within), None of measured ones. `change` is the mean over
    images of the percentage of pixels that are labelled otherwise than by the network itself, None where the truth is
    labels.
    """

    latency_ms: float
    p95_ms: float
    worst_ms: float
    miou: float
    gmacs: float
    memory_bytes: int
    exit_rates: Tuple[float, ...]
    images: int
    split: str
    source: str
    energy_mj: Optional[float] = field(default=None, metadata=decode.LOCAL)
    error: Optional[float] = None
    change: Optional[float] = field(default=None, metadata=decode.OPTIONAL)


@dataclass(frozen=True)
class Promise:
    """A bound that the plan must keep, in the unit of its `quantity`: one of PROMISED.

    If it is `relative`, `limit` is a share of the baseline's; `err_pp` always counts from the baseline's mIoU, plus
    `offset_pp` if the error was counted from another mIoU. `class_err_pp` is IoU of `class_name` below the baseline's;
    on the images that the plan was chosen on it leaves `least_iou` (percent).
    """

    quantity: str
    limit: float
    relative: bool
    offset_pp: float
    class_name: str = field(default="", metadata=decode.OPTIONAL)
    least_iou: Optional[float] = field(default=None, metadata=decode.OPTIONAL)


CLASS_ERR = "class_err_pp"
PROMISED = ("err_pp", "change", CLASS_ERR, "latency_ms", "p95_ms", "worst_ms", "gmacs", "energy_mj", "memory_bytes")


@dataclass(frozen=True)
class Decision:
    """`row` and `cut` of one stage, as in `BundleStage`."""

    row: int
    cut: Optional[int]


@dataclass(frozen=True)
class OperatingPoint:
    """Other thresholds for the same graphs: a decision for each stage, and the search's predictions for them."""

    name: str
    decisions: Tuple[Decision, ...]
    predicted: Figures


@dataclass(frozen=True)
class StageCost:
    """What a stage costs by the target's latency table, in its `source`'s words.

    `mean_ms` and `p99_ms`: segment, gated head and, if the stage decides, the decision; the p99 always includes reading
    the counts. `report_mean_ms` and `report_p99_ms`: output graph and download.
    """

    mean_ms: float
    p99_ms: float
    report_mean_ms: float
    report_p99_ms: float


@dataclass(frozen=True)
class GraphPrecision:
    """The precision that a graph computes in, and the one that its recipe wanted: they differ after a fallback to a
    safer one.
    """

    used: str
    wanted: str


@dataclass(frozen=True)
class DeviceMatch:
    """How a plan's target differs from other machines, by its profile; None and empty are not checked.

    `gpu`, which goes with `compute_capability`, is the end of the driver's name of the GPU; one of `boards` is in the
    device tree's name of the board.
    """

    gpu: Optional[str] = None
    compute_capability: Optional[Tuple[int, int]] = None
    boards: Tuple[str, ...] = ()


@dataclass(frozen=True)
class BundlePlan:
    """A plan for one target; `baseline` has the figures of the single-exit graph `baseline_name`.

    `precision` names the recipe, `precisions` maps each graph's path to its precision. `tuned_by` is the engine library
    and device whose statistics chose the exits and thresholds, `power_mode` the one that the latencies are valid for,
    `environment` what else their measurement depended on. The operating point "default" is that of the stages.
    `promises` are the bounds of its requirement. `costs` has an entry for each stage; so has `confidence`: the tuning
    images that reached the stage, by the share of its confident cells, in ten bins of equal width, or nothing if
    unknown. `sources` are hashes of what the plan was searched from. `truth`, one of TRUTHS, is what every mIoU is
    against. `policy_rows` are the rows beyond the gate's thresholds that stages and operating points name. `retrained`
    is whether the network was trained further by `attach`; `baseline-alone` is then the network as it came.
    """

    target: str
    device: DeviceMatch
    library: str
    precision: str
    setting: str
    stages: Tuple[BundleStage, ...]
    predicted: Figures
    baseline: Figures
    baseline_name: str
    precisions: Dict[str, GraphPrecision]
    tuned_by: str
    power_mode: Optional[str]
    operating_points: Tuple[OperatingPoint, ...]
    costs: Tuple[StageCost, ...]
    upload_mean_ms: float
    upload_p99_ms: float
    confidence: Tuple[Tuple[int, ...], ...]
    environment: Dict[str, str]
    sources: Dict[str, str]
    promises: Tuple[Promise, ...]
    truth: str = field(default=LABELS, metadata=decode.entry(optional=True, check=decode.one_of(TRUTHS)))
    policy_rows: Tuple[PolicyRow, ...] = field(default=(), metadata=decode.OPTIONAL)
    retrained: bool = field(default=False, metadata=decode.OPTIONAL)

    @property
    def name(self) -> str:
        """Such as xavier:fp16; a bundle holds one plan of a name."""
        return f"{self.target}:{self.precision}"

    @property
    def doubts(self) -> Tuple[str, ...]:
        """Warnings that travel with every figure of the latencies."""
        return tuple(text for key, text in sorted(self.environment.items()) if key.startswith(DOUBT))

    @property
    def boldest(self) -> str:
        """The boldest precision that any of the graphs computes in."""
        return min((found.used for found in self.precisions.values()), key=PRECISIONS.index)

    def top(self, stage: BundleStage, row: Optional[int] = None) -> int:
        """The greatest count that a row of a stage can have, by default the stage's own: the number of cells, but for
        policies whose integers are no cells."""
        return top_of_row(self.policy_rows, stage.head, stage.row if row is None else row, stage.cells)

    def graphs(self) -> Tuple[str, ...]:
        """Paths of the graphs, each once, in the order of their first run."""
        return tuple(dict.fromkeys(path for stage in self.stages for path in stage.graphs))


@dataclass(frozen=True)
class Golden:
    """A frame (.npy, uint8 (H, W, 3)) and the expected result of the plan named `plan`.

    `labels` (.npy, uint8 (H, W)), `exit` from 1, `count` in the exit's row, at most its `top`, 0 for a whole network.
    """

    plan: str
    frame: str
    labels: str
    exit: int
    count: int


@dataclass(frozen=True)
class EngineFile:
    """An engine in `file`, built from the graph `graph`, or the builder's timing cache.

    `device` names the GPU that it is for, "" if any of `capability` will do; `precision` is the graph's, "" for a
    timing cache.
    """

    file: str
    graph: Optional[str]
    precision: str
    library: str
    library_version: str
    device: str
    capability: Tuple[int, int]


@dataclass(frozen=True)
class File:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """`files` lists every file of the bundle but the manifest, its hash and its signature.

    `engines` are used only if the signature is verified: an engine is code.
    """

    name: str
    network: Network
    gate: BundleGate
    plans: Tuple[BundlePlan, ...]
    golden: Tuple[Golden, ...]
    engines: Tuple[EngineFile, ...]
    files: Dict[str, File]
    provenance: Dict[str, str]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())

    def golden_of(self, plan: BundlePlan) -> Tuple[Golden, ...]:
        return tuple(golden for golden in self.golden if golden.plan == plan.name)


def manifest_to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`; equal manifests give equal text."""
    content = decode.encode(manifest, FORMAT, VERSION)
    content["files"] = dict(sorted(content["files"].items()))
    content["provenance"] = dict(sorted(content["provenance"].items()))
    return json.dumps(content, indent=1) + "\n"


def manifest_from_json(text: str) -> Manifest:
    """Read `manifest.json`. Raises BundleError naming the field, its value and the expected one."""
    try:
        content = json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST} does not have the format {FORMAT}")
    if content.get("version") not in READABLE or isinstance(content["version"], bool):
        known, remedy = "5, 6 and 7", "update mess-compile, or write the bundle again"
        raise BundleError(f"{MANIFEST} has version {content.get('version')!r}; this release reads {known}: {remedy}")
    if content["version"] == 5:
        _bring_up_to_date(content)
    fields = {key: value for key, value in content.items() if key not in ("format", "version")}
    try:
        manifest: Manifest = decode.decode(Manifest, fields, "manifest")
        _check(manifest)
    except decode.DecodeError as error:
        raise BundleError(f"{MANIFEST}: {error}") from error
    return manifest


def _integer(text: str) -> int:
    """Refuses long numbers at once: one of a million digits would take Python minutes."""
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)


def _object(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object has a key twice")
    return content


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise decode.DecodeError(message)


def _check(manifest: Manifest) -> None:
    folders = {path[: end.start()] for path in manifest.files for end in re.finditer("/", path)}
    for path, file in manifest.files.items():
        plain = _PATH.fullmatch(path) is not None and path not in BESIDE and path not in folders
        _need(plain, f"files has the path {path!r:.200}")
        _need(_SHA256.fullmatch(file.sha256) is not None, f"files[{path}].sha256 is {file.sha256!r}")
        _need(file.bytes >= 0, f"files[{path}].bytes is {file.bytes}")
    for text in _texts(asdict(manifest)):
        _need(text.isprintable(), f"the text {text!r:.80} has characters that cannot be printed")
    _check_network(manifest.network)
    rows = manifest.gate.thresholds
    wide = all(len(row) == len(manifest.network.classes) for row in rows)
    _need(bool(rows) and wide, f"gate.thresholds has rows that do not fit {len(manifest.network.classes)} classes")
    steepest = max(abs(value) for row in rows for value in row)
    _need(steepest <= _MAX_THRESHOLD, f"gate.thresholds has {steepest:g}; a confidence is between 0 and 1")
    _need(bool(manifest.plans), "plans is empty")
    names = [plan.name for plan in manifest.plans]
    _need(len(set(names)) == len(names), f"plans has a target and precision twice: {', '.join(names)}")
    for plan in manifest.plans:
        _check_plan(plan, manifest)
    for index, golden in enumerate(manifest.golden):
        _check_golden(golden, f"golden[{index}]", manifest)
    for index, engine in enumerate(manifest.engines):
        _check_engine(engine, f"engines[{index}]", manifest)


def _texts(value: Any) -> Iterator[str]:
    """Every text in JSON-like content, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _check_network(network: Network) -> None:
    _need(all(1 <= side <= MAX_SIDE for side in network.input_hw), f"network.input_hw is {network.input_hw}")
    _need(2 <= len(network.classes) <= 255, f"network.classes has {len(network.classes)} entries, not 2 to 255")
    _need(len(network.colours) == len(network.classes), "network.colours does not fit network.classes")
    _need(all(0 <= v <= 255 for colour in network.colours for v in colour), "network.colours is outside 0 to 255")
    _need(network.resize in RESIZES, f"network.resize is {network.resize!r}, not one of {', '.join(RESIZES)}")


def _check_plan(plan: BundlePlan, manifest: Manifest) -> None:
    where = f"the plan for {plan.name!r}"
    for name, pattern in _NAMES.items():
        text = plan.predicted.split if name == "split" else getattr(plan, name)
        _need(pattern.fullmatch(text) is not None, f"{where} has {name} {text!r:.80}")
    together = (plan.device.gpu is None) == (plan.device.compute_capability is None)
    _need(together, f"{where}: device has one of gpu and compute_capability, but needs both")
    _need(plan.setting in SETTINGS, f"{where} has setting {plan.setting!r}, not one of {', '.join(SETTINGS)}")
    _need(bool(plan.stages), f"{where} has no stages")
    points = [stage.exit_point for stage in plan.stages]
    _need(points == sorted(set(points)) and points[0] >= 1, f"{where} has exit points {points}, not ascending from 1")
    _need(plan.baseline.source in SOURCES, f"{where} has source {plan.baseline.source!r}")
    _check_figures(plan.predicted, plan, where)
    check_rows(plan.policy_rows, len(manifest.gate.thresholds), len(manifest.network.classes), where)
    by_class = manifest.gate.by_class or not plan.policy_rows
    _need(by_class, f"{where} has policy_rows, and its gate does not count by class")
    for stage in plan.stages:
        _check_stage(stage, plan, f"{where}, exit point {stage.exit_point}", manifest)
    _check_points(plan, where, manifest)
    _check_costs(plan, where)
    for promise in plan.promises:
        _need(promise.quantity in PROMISED, f"{where} promises {promise.quantity!r:.80}, not one of {PROMISED}")
    odd = sorted(set(plan.precisions) ^ set(plan.graphs()))
    _need(not odd, f"{where}: graphs and precisions disagree on {', '.join(map(repr, odd))}"[:300])
    for path, found in plan.precisions.items():
        known = found.used in PRECISIONS and found.wanted in PRECISIONS
        _need(known, f"{where}: {path} is {found.used!r}, wanted {found.wanted!r}; known are {', '.join(PRECISIONS)}")


def _bring_up_to_date(content: Dict[str, Any]) -> None:
    """Convert a manifest of version 5 to this version; the decoder reports what is wrong."""
    plans = content.get("plans")
    for plan in plans if isinstance(plans, list) else ():
        if not isinstance(plan, dict):
            continue
        plan.setdefault("promises", [])
        complete_figures(plan)


def complete_figures(plan: Dict[str, Any]) -> None:
    """Add the `error` that the figures of an earlier release lack to a plan's content."""
    points = plan.get("operating_points")
    places = [plan, plan.get("hold_out"), *(points if isinstance(points, list) else [])]
    for place in places:
        for name in ("predicted", "baseline"):
            figures = place.get(name) if isinstance(place, dict) else None
            if isinstance(figures, dict):
                figures.setdefault("error", None)


def _check_stage(stage: BundleStage, plan: BundlePlan, where: str, manifest: Manifest) -> None:
    uncut = stage.head_graph is None, stage.output is None
    _need(uncut[0] == uncut[1], f"{where}: it has one of head_graph and output, but needs both")
    _need(not stage.is_whole or len(plan.stages) == 1, f"{where}: a whole network is not the only stage")
    for path in stage.graphs:
        _need(path in manifest.files and path.endswith(".onnx"), f"{where}: {path!r} is not a graph of the bundle")
    _need(stage.cells >= 1, f"{where}: cells is {stage.cells}")
    _check_decision(Decision(stage.row, stage.cut), stage, plan, where, manifest)


def _check_decision(decision: Decision, stage: BundleStage, plan: BundlePlan, where: str, manifest: Manifest) -> None:
    row, cut = decision.row, decision.cut
    is_policy = named_row(plan.policy_rows, stage.head, row) is not None
    _need(0 <= row < len(manifest.gate.thresholds) or is_policy, f"{where}: row is {row}")
    decides = plan.setting != "anytime" and stage is not plan.stages[-1]
    _need((cut is not None) == decides, f"{where}: cut is {cut}")
    _need(cut is None or 0 <= cut <= plan.top(stage, row) + 1, f"{where}: cut is {cut}")


def _check_figures(figures: Figures, plan: BundlePlan, where: str) -> None:
    _need(figures.source in SOURCES, f"{where} has source {figures.source!r}")
    _need(len(figures.exit_rates) == len(plan.stages), f"{where}: exit_rates does not fit its stages")
    _need(figures.error is None or figures.error >= 1, f"{where}: error is {figures.error}, not a factor from 1")
    change = figures.change
    _need(change is None or 0 <= change <= 100, f"{where}: change is {change}, not a percentage")


def _check_points(plan: BundlePlan, where: str, manifest: Manifest) -> None:
    names = [point.name for point in plan.operating_points]
    odd = [name for name in names if _POINT.fullmatch(name) is None]
    _need(not odd, f"{where} has an operating point {odd[:1]}"[:200])
    _need(len(set(names)) == len(names) <= MAX_POINTS, f"{where}: operating_points are {names}, not {MAX_POINTS} names")
    for point in plan.operating_points:
        place = f"{where}, operating point {point.name!r}"
        _need(len(point.decisions) == len(plan.stages), f"{place}: decisions does not fit its stages")
        for stage, decision in zip(plan.stages, point.decisions):
            _check_decision(decision, stage, plan, place, manifest)
        _check_figures(point.predicted, plan, place)
    own = [(stage.row, stage.cut) for stage in plan.stages]
    defaults = [point.decisions for point in plan.operating_points if point.name == DEFAULT_POINT]
    same = bool(defaults) and [(each.row, each.cut) for each in defaults[0]] == own
    _need(same, f"{where}: operating_points has no {DEFAULT_POINT!r} with the row and cut of its stages")


def _check_costs(plan: BundlePlan, where: str) -> None:
    _need(len(plan.costs) == len(plan.stages), f"{where}: costs does not fit its stages")
    milliseconds = [plan.upload_mean_ms, plan.upload_p99_ms, *(ms for cost in plan.costs for ms in astuple(cost))]
    _need(min(milliseconds) >= 0, f"{where}: costs and upload are {min(milliseconds)} ms")
    _need(len(plan.confidence) == len(plan.stages), f"{where}: confidence does not fit its stages")
    for bins in plan.confidence:
        fits = len(bins) in (0, CONFIDENCE_BINS) and min(bins, default=0) >= 0
        _need(fits, f"{where}: confidence is {bins!r:.80}, not {CONFIDENCE_BINS} counts")


def _check_golden(golden: Golden, where: str, manifest: Manifest) -> None:
    for path in (golden.frame, golden.labels):
        _need(path in manifest.files and path.endswith(".npy"), f"{where}: {path!r} is not an array of the bundle")
    plans = [plan for plan in manifest.plans if plan.name == golden.plan]
    _need(bool(plans), f"{where}: there is no plan {golden.plan!r}")
    _need(1 <= golden.exit <= len(plans[0].stages), f"{where}: exit is {golden.exit}")
    top = plans[0].top(plans[0].stages[golden.exit - 1])
    _need(0 <= golden.count <= top, f"{where}: count is {golden.count}, not 0 to {top}")


def _check_engine(engine: EngineFile, where: str, manifest: Manifest) -> None:
    known = engine.file in manifest.files and engine.file.endswith((".engine", ".cache"))
    _need(known, f"{where}: {engine.file!r} is not an engine of the bundle")
    graphs = {graph for plan in manifest.plans for graph in plan.graphs()}
    _need(engine.graph is None or engine.graph in graphs, f"{where}: {engine.graph!r} is in no plan")
    _need(engine.precision in (*PRECISIONS, ""), f"{where}: precision is {engine.precision!r}")
