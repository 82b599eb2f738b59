"""Estimates each graph's latency on a target by a roofline of its workload, calibrated by measurements.

A graph's time is a sum of terms: the MACs of each kind of convolution at the target's peak, the bytes of each kind of
operator at its memory bandwidth, and a launch per kernel. Each term takes a multiple of its roofline. Before any
measurement the multiples are the usual ones for small batches, with wide intervals; measurements narrow these. The
multiples' logarithms are fitted, with a Gaussian prior: no multiple becomes negative, more work never takes less time,
and a few measurements cannot push the fit far from the prior.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import onnx

from mess_compile.array_types import Floats
from mess_compile.graph.store import read_model
from mess_compile.graph.workload import activations
from mess_compile.network import CandidateNetwork, GraphSet
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import TensorSpec
from mess_compile.runtime.measure.job_pool import DOWNLOAD, NULL, UPLOAD
from mess_compile.targets import Peak, Target

DEFAULT_PEAK, DEFAULT_GB_PER_S = Peak(0.1, 0.1, 0.2), 20.0
"""For a target without these figures: one CPU core with 256-bit vectors at 3 GHz, and its share of the bandwidth."""
LAUNCH_MS = 0.005
"""Time to launch one kernel, on a GPU or in ONNX Runtime."""
_MACS = ("pointwise_macs", "dense_macs", "dilated_macs", "depthwise_macs", "padded_macs")
_BYTES = ("conv_bytes", "resampling_bytes", "other_bytes")
TERMS = (*_MACS, *_BYTES, "kernels")
_WIDTHS = {"fp32": 1.0, "fp16": 0.5, "int8": 0.25}
_LONGEST_MS, _SHORTEST_MS, _WIDEST = 1e9, 1e-6, 1e6


@dataclass(frozen=True)
class Features:
    """One graph's workload: multiply-adds by kind of convolution, bytes moved by kind of operator, and kernels.

    `pointwise` convolutions are 1x1, `depthwise` all grouped ones, `dilated` those with a dilation above 1, `dense` the
    rest; `padded` are the multiply-adds of all kinds in the padding, which some libraries skip. Gates and output graphs
    count, too. Bytes are the weights and the tensors between kernels; a convolution includes the BatchNorm, activation
    and sum behind it. `resampling` is Resize and ArgMax.
    """

    graph: str
    pointwise_macs: int = 0
    dense_macs: int = 0
    dilated_macs: int = 0
    depthwise_macs: int = 0
    padded_macs: int = 0
    conv_bytes: int = 0
    resampling_bytes: int = 0
    other_bytes: int = 0
    kernels: int = 1

    @property
    def macs(self) -> int:
        """The multiply-adds of all convolutions, padding included."""
        return sum(getattr(self, kind) for kind in _MACS)

    @property
    def bytes_moved(self) -> int:
        return sum(getattr(self, kind) for kind in _BYTES)


@dataclass(frozen=True)
class Roofline:
    """One graph's least time by the target's figures: `ms` in total, `terms_ms` for each of TERMS."""

    ms: float
    terms_ms: tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """A graph's estimated mean latency, and the interval `low_ms` to `high_ms` that holds for 90 of 100 graphs."""

    mean_ms: float
    low_ms: float
    high_ms: float

    @property
    def factor(self) -> float:
        """The factor by which the mean may be too low or too high."""
        return max(self.high_ms / self.mean_ms, self.mean_ms / self.low_ms)


@dataclass(frozen=True)
class Calibration:
    """The multiple of its roofline that each term takes: `log_multiples` (terms,), `covariance` (terms, terms).

    `noise` is the standard deviation of a graph's log latency around the sum of its terms; in cross-validation 90 % of
    the graphs left out lay within `reach` deviations.
    """

    log_multiples: Floats
    covariance: Floats
    noise: float
    reach: float


USUAL = Calibration(
    log_multiples=np.log([3.0, 3.0, 3.0, 10.0, 1.0, 1.5, 4.0, 3.0, 1.0]),
    covariance=np.diag([0.7**2] * len(TERMS)) + 1.0,
    noise=0.12,
    reach=2.0,
)
"""Prior before any measurement: one deviation is a factor of 2 for each term, and of 2.7 for all terms together."""
_OTHER_DEVICE = np.diag([0.4**2] * len(TERMS)) + 0.5**2
"""Covariance added to one device's multiples when they are used for another device."""
_KNOWN_ERRORS = 4
"""Weight of the usual noise against the errors of cross-validation, in graphs."""


def features(graph_set: GraphSet) -> dict[str, Features]:
    """The workload of every graph of the fp32 `graph_set`, from its ONNX without the weights. Raises InputError."""
    return {name: graph_features(name, read_model(graph_set.path(name))) for name in graph_set.graphs}


def pseudo_features(candidate: CandidateNetwork) -> dict[str, Features]:
    """The workload of the pseudo graphs. They do not calibrate estimates, since they run no kernels."""
    pixels = prod(candidate.input_hw)
    sizes = {UPLOAD: 3 * pixels, DOWNLOAD: pixels, NULL: 0}
    return {name: Features(name, other_bytes=2 * size) for name, size in sizes.items()}


def graph_features(name: str, model: onnx.ModelProto) -> Features:
    """One graph's workload. Raises InputError when its shapes cannot be inferred."""
    tensors = activations(model) | {tensor.name: _weight(tensor) for tensor in model.graph.initializer}
    counts = Counter[str]()
    for group in _fused_groups(model, tensors):
        kind = _kind(group.first, tensors)
        counts[f"{'conv' if kind in _MACS else kind}_bytes"] += group.bytes
        counts["kernels"] += 1
        if kind in _MACS:
            inside = _inside_macs(group.first, tensors)
            counts[kind] += inside
            counts["padded_macs"] += _macs(group.first, tensors) - inside
    return Features(name, **{"kernels": 1, **counts})


def _weight(tensor: onnx.TensorProto) -> TensorSpec:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    return TensorSpec(tensor.name, dtype, tuple(tensor.dims))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _kind(node: onnx.NodeProto, tensors: Mapping[str, TensorSpec]) -> str:
    if node.op_type in ("Gemm", "MatMul"):
        return "pointwise_macs"
    if node.op_type not in _CONVOLUTIONS:
        return "resampling" if node.op_type in ("Resize", "ArgMax") else "other"
    given = _attributes(node)
    if given.get("group", 1) > 1:
        return "depthwise_macs"
    if prod(tensors[node.input[1]].shape[2:]) == 1:
        return "pointwise_macs"
    return "dilated_macs" if max(given.get("dilations", [1])) > 1 else "dense_macs"


def _macs(node: onnx.NodeProto, tensors: Mapping[str, TensorSpec]) -> int:
    source, weight, made = (tensors[name].shape for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":
        return prod(made) * prod(weight[1:])
    return prod(source) * (prod(weight[1:]) if node.op_type == "ConvTranspose" else made[-1])


def _inside_macs(node: onnx.NodeProto, tensors: Mapping[str, TensorSpec]) -> int:
    """The multiply-adds without those in the padding of a Conv."""
    given = _attributes(node)
    if not any(given.get("pads", ())):
        return _macs(node, tensors)
    source, weight, made = (tensors[name].shape for name in (*node.input[:2], node.output[0]))
    count = prod(made[:2]) * weight[1]
    for axis, (size, taps, steps) in enumerate(zip(source[2:], weight[2:], made[2:], strict=True)):
        stride, dilation = (given.get(name, [1] * len(made))[axis] for name in ("strides", "dilations"))
        positions = np.add.outer(stride * np.arange(steps), dilation * np.arange(taps)) - given["pads"][axis]
        count *= int(((positions >= 0) & (positions < size)).sum())
    return count


_CONVOLUTIONS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout"))
_ARITHMETIC = "Abs Add Cast Div Erf Exp Log Max Min Mul Neg Pow Sqrt Sub Where"
_COMPARISONS = "Equal Greater GreaterOrEqual Less LessOrEqual"
_ACTIVATIONS = "BatchNormalization Clip Elu Gelu HardSigmoid HardSwish LeakyRelu PRelu Relu Sigmoid Softplus Tanh"
_POINTWISE = frozenset(f"{_ARITHMETIC} {_COMPARISONS} {_ACTIVATIONS}".split())


@dataclass(frozen=True)
class _Group:
    """Nodes that become one kernel: the first one, and the bytes that they read and write together."""

    first: onnx.NodeProto
    bytes: int


def _fused_groups(model: onnx.ModelProto, tensors: Mapping[str, TensorSpec]) -> list[_Group]:
    """A pointwise node joins the convolution or pointwise node before it when no other node reads that one's result."""
    viewed: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in _VIEWS:
            viewed[node.output[0]] = viewed.get(node.input[0], node.input[0])
    nodes = [node for node in model.graph.node if node.op_type not in _VIEWS]
    reads = [{viewed.get(name, name) for name in node.input if name} for node in nodes]
    outputs = {viewed.get(value.name, value.name) for value in model.graph.output}
    readers = Counter([*outputs, *(name for names in reads for name in names)])
    maker: dict[str, int] = {}
    groups: list[list[int]] = []
    for index, node in enumerate(nodes):
        alone = (name for name in reads[index] if name in maker and readers[name] == 1)
        fitting = {maker[name] for name in alone if tensors[name].shape == tensors[node.output[0]].shape}
        joined = [group for group in fitting if _takes_in(nodes[groups[group][0]], node)]
        if not joined:
            groups.append([])
        number = max(joined, default=len(groups) - 1)
        groups[number].append(index)
        maker.update({name: number for name in node.output if name})
    return [_group([nodes[i] for i in group], [reads[i] for i in group], readers, tensors) for group in groups]


def _takes_in(first: onnx.NodeProto, node: onnx.NodeProto) -> bool:
    return node.op_type in _POINTWISE and first.op_type in _POINTWISE | _CONVOLUTIONS


def _group(
    nodes: Sequence[onnx.NodeProto],
    reads: Sequence[set[str]],
    readers: Mapping[str, int],
    tensors: Mapping[str, TensorSpec],
) -> _Group:
    """A group reads each tensor of other groups once, and writes the tensors that others read."""
    within = Counter(name for names in reads for name in names)
    made = {name for node in nodes for name in node.output if name}
    passed = [name for name in within if name not in made] + [name for name in made if readers[name] > within[name]]
    return _Group(nodes[0], sum(tensors[name].bytes for name in passed))


def roofline(features: Mapping[str, Features], target: Target, precision: str) -> dict[str, Roofline]:
    """The roofline of every graph on the target, without any measurement.

    Computing and moving bytes overlap, so that the longer one counts; kernels launch one after the other. DEFAULT_PEAK
    and DEFAULT_GB_PER_S replace figures that the target lacks. Raises InputError for a precision that the target does
    not support.
    """
    peak = (target.peak or DEFAULT_PEAK).of(precision) if precision in target.precisions else None
    if peak is None:
        raise InputError(f"{target.name} does not compute in {precision}: take one of {', '.join(target.precisions)}")
    byte_ms = _WIDTHS[precision] / 1e6 / (target.memory_bandwidth_gb_per_s or DEFAULT_GB_PER_S)
    return {name: _roofline(graph, 2 / 1e9 / peak, byte_ms) for name, graph in features.items()}


def _roofline(graph: Features, mac_ms: float, byte_ms: float) -> Roofline:
    computing = [getattr(graph, kind) * mac_ms for kind in _MACS]
    moving = [getattr(graph, kind) * byte_ms for kind in _BYTES]
    launching = graph.kernels * LAUNCH_MS
    return Roofline(max(sum(computing), sum(moving)) + launching, (*computing, *moving, launching))


def calibrated(
    measured: Mapping[str, float], prior: Mapping[str, Roofline], start: Calibration = USUAL
) -> dict[str, Estimate]:
    """Estimates of every graph of `prior`, from means `measured` on this target in this precision (ms, by graph).

    `start` is the prior calibration, such as another device's by `for_another_device`. Without measurements and with
    the usual prior, the means are the roofline's. Raises InputError for a graph that is not in `prior`, or a time out
    of range.
    """
    found = estimates(prior, calibrate(measured, prior, start))
    if measured or start is not USUAL:
        return found
    return {
        name: Estimate(graph.ms, min(graph.ms, found[name].low_ms), max(graph.ms, found[name].high_ms))
        for name, graph in prior.items()
    }


def estimates(prior: Mapping[str, Roofline], calibration: Calibration) -> dict[str, Estimate]:
    """Estimates of every graph of `prior`; intervals are wider for graphs dominated by terms of uncertain multiples."""
    return {name: _estimate(graph, calibration) for name, graph in prior.items()}


def _estimate(graph: Roofline, calibration: Calibration) -> Estimate:
    ms, deviation = _prediction(np.array(graph.terms_ms), calibration)
    factor = min(_WIDEST, math.exp(calibration.reach * deviation))
    return Estimate(ms, ms / factor, ms * factor)


def _prediction(terms_ms: Floats, calibration: Calibration) -> tuple[float, float]:
    """A graph's latency in ms, and the standard deviation of its logarithm."""
    times = terms_ms * np.exp(calibration.log_multiples)
    shares = times / times.sum()
    return float(times.sum()), math.sqrt(calibration.noise**2 + float(shares @ calibration.covariance @ shares))


def calibrate(measured: Mapping[str, float], prior: Mapping[str, Roofline], start: Calibration = USUAL) -> Calibration:
    """The calibration `start`, updated by measurements (mean in ms, by graph).

    Raises InputError for a graph that is not in `prior`, or a time out of range.
    """
    _check_measured(measured, prior)
    if not measured:
        return start
    terms = np.array([prior[name].terms_ms for name in sorted(measured)])  # (graphs, terms)
    logs = np.log([measured[name] for name in sorted(measured)])
    noise = start.noise * _spread(_errors_left_out(terms, logs, start))
    start = replace(start, noise=noise)
    found = _most_likely(terms, logs, start, start.log_multiples)
    return replace(found, reach=_reach(_errors_left_out(terms, logs, start)))


def for_another_device(calibration: Calibration) -> Calibration:
    """One device's calibration as a prior for another: the same multiples with a wider covariance."""
    covariance = calibration.covariance + _OTHER_DEVICE
    return replace(calibration, covariance=covariance, reach=max(USUAL.reach, calibration.reach))


def choose_calibration(prior: Mapping[str, Roofline], count: int, start: Calibration = USUAL) -> tuple[str, ...]:
    """The `count` most informative graphs to measure, in order: each reduces the variance of all estimates the most.

    Deterministic; ties go by the order of `prior`. Raises InputError for a negative count.
    """
    if count < 0:
        raise InputError(f"{count} graphs cannot be measured: name 0 or more")
    terms = np.array([graph.terms_ms for graph in prior.values()]).reshape(-1, len(TERMS))
    times = terms * np.exp(start.log_multiples)
    shares = times / times.sum(axis=1, keepdims=True)  # (graphs, terms)
    covariance, remaining = start.covariance, list(range(len(shares)))
    chosen: list[int] = []
    while remaining and len(chosen) < count:
        shared = shares @ covariance @ shares[remaining].T  # (graphs, remaining): covariance of their log latencies
        gains = np.square(shared).sum(axis=0) / (start.noise**2 + shared[remaining, range(len(remaining))])
        chosen.append(remaining.pop(int(gains.argmax())))
        known = covariance @ shares[chosen[-1]]
        covariance = covariance - np.outer(known, known) / (start.noise**2 + shares[chosen[-1]] @ known)
    names = tuple(prior)
    return tuple(names[index] for index in chosen)


def _check_measured(measured: Mapping[str, float], prior: Mapping[str, Roofline]) -> None:
    for name, ms in measured.items():
        if name not in prior:
            raise InputError(
                f"{name!r} was measured, but is none of the graphs to estimate: profile these graphs again"
            )
        if not _SHORTEST_MS <= ms <= _LONGEST_MS:
            raise InputError(
                f"{name} was measured as {ms} ms, outside {_SHORTEST_MS:g} to {_LONGEST_MS:g} ms: profile it again"
            )


def _most_likely(terms: Floats, logs: Floats, start: Calibration, first_guess: Floats) -> Calibration:
    """The multiples that minimise the squared errors of log latencies and prior, by Gauss-Newton steps."""
    known = np.linalg.inv(start.covariance)

    def misfit(multiples: Floats) -> float:
        errors, moved = logs - np.log(terms @ np.exp(multiples)), multiples - start.log_multiples
        return float(errors @ errors / start.noise**2 + moved @ known @ moved)

    at = first_guess
    for _ in range(50):
        times = terms * np.exp(at)
        shares = times / times.sum(axis=1, keepdims=True)
        errors = logs - np.log(times.sum(axis=1))
        information = shares.T @ shares / start.noise**2 + known
        pull = shares.T @ errors / start.noise**2 - known @ (at - start.log_multiples)
        step = np.linalg.solve(information, pull)
        while np.abs(step).max() > 1e-6 and misfit(at + step) > misfit(at):
            step = step / 2
        if np.abs(step).max() <= 1e-6:
            break
        at = at + step
    return replace(start, log_multiples=at, covariance=np.linalg.inv(information))


def _errors_left_out(terms: Floats, logs: Floats, start: Calibration) -> Floats:
    """Leave-one-out errors: how many deviations each graph's log latency lies from the estimate by the others."""
    first_guess = _most_likely(terms, logs, start, start.log_multiples).log_multiples
    errors = []
    for graph in range(len(logs)):
        others = np.arange(len(logs)) != graph
        ms, deviation = _prediction(terms[graph], _most_likely(terms[others], logs[others], start, first_guess))
        errors.append(abs(float(logs[graph]) - math.log(ms)) / deviation)
    return np.array(errors)


def _spread(errors: Floats) -> float:
    """Root mean square of the errors in deviations, pooled with `_KNOWN_ERRORS` errors of one deviation."""
    return math.sqrt((_KNOWN_ERRORS + float(errors @ errors)) / (_KNOWN_ERRORS + len(errors)))


def _reach(errors: Floats) -> float:
    """Deviations within which 90 % of further graphs lie: Student's t, at least the conformal quantile if any."""
    rank = math.ceil(0.9 * (len(errors) + 1))
    conformal = float(np.sort(errors)[rank - 1]) if rank <= len(errors) else 0.0
    return max(_student_90(_KNOWN_ERRORS + len(errors)) * _spread(errors), conformal)


def _student_90(freedom: float) -> float:
    """Two-sided 90 % quantile of Student's t, by its expansion around the normal's (Abramowitz, Stegun, 26.7.5)."""
    z = 1.6449
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
