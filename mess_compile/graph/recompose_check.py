"""Proves the cut graphs: recomposed, they compute what the network computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx

from mess_compile.array_types import Array
from mess_compile.graph.compare import run, thresholds_of
from mess_compile.graph.cut import NETWORK, cut, import_network
from mess_compile.graph.node_builder import OPSET
from mess_compile.graph.precision import Feed
from mess_compile.graph.store import read_model
from mess_compile.network import BASELINE, BASELINE_ALONE, IMAGE, SOUND, GraphSet, Head, head_graph_name, segment_name
from mess_compile.reporter import Progress
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines import engine

Reference = Callable[[Array], Mapping[str, Array]]
"""Frame uint8 (H, W, 3) -> logits f32 (K, h, w) or (1, K, h, w) of every head, by head name."""

TOLERANCE = 1e-4
"""Largest deviation, in units of the largest magnitude in the tensor (at least 1)."""
MOST_TIES = 1e-3
"""Largest share of pixels whose own label may differ, since the runtime rounds logits otherwise in another graph."""


def check_stages(graph_set: GraphSet, reference: Reference, frames: Sequence[Array], progress: Progress) -> None:
    """Recompose the stages in ONNX Runtime and compare them with the network they were cut from.

    `frames` are uint8 (H, W, 3) at the network's input size. Every segment (fused ones, too), every head, every output
    graph and the baseline runs. What segments compute, and the labels of the network's own end, are compared with the
    whole network, which must be beside the graphs. Raises InputError naming the graph, the deviation and the frame when
    logits or features differ by more than TOLERANCE, when labels differ where there is no tie, or when a graph is
    malformed.
    """
    size = graph_set.candidate.input_hw
    if not frames or any(frame.dtype != np.uint8 or frame.shape != (*size, 3) for frame in frames):
        raise InputError(f"the check of the graphs needs frames, uint8 of shape {(*size, 3)}")
    for name in graph_set.graphs:
        _check_form(graph_set, name)
    expected = [reference(frame) for frame in frames]
    for index, outputs in enumerate(expected):
        check_finite(outputs, index)
    with closing(engine.open_library("onnxruntime")) as library:
        whole = _whole_network(library, graph_set, frames)
        features = _checked_features(library, graph_set, whole, progress)
        heads = graph_set.candidate.heads
        for done, head in enumerate(heads, start=1):
            hw = graph_set.candidate.logits_hw(head)
            logits = [np.reshape(outputs[head.name], (1, -1, *hw)) for outputs in expected]
            own = None if head.labels is None else [tensors[head.labels] for tensors in whole]
            _check_head(library, graph_set, head, features[head.exit_point], logits, own)
            if head.name == graph_set.candidate.baseline:
                _check_baseline(library, graph_set, BASELINE, frames, logits, own)
            progress(f"checked {head_graph_name(head.name)}", done, len(heads))


def check_baseline_alone(
    graph_set: GraphSet, reference: Reference, frames: Sequence[Array], own: Sequence[Array] | None = None
) -> None:
    """Compare the graph of the single-exit network that stands alone with that network, like `check_stages`.

    `own` are its labels (1, H, W) of each frame, if it ends by its own nodes.
    """
    _check_form(graph_set, BASELINE_ALONE)
    expected = [logits for frame in frames for logits in reference(frame).values()]
    with closing(engine.open_library("onnxruntime")) as library:
        _check_baseline(library, graph_set, BASELINE_ALONE, frames, expected, own)


def _whole_network(library: engine.Library, graph_set: GraphSet, frames: Sequence[Array]) -> list[Feed]:
    """For each frame, the tensors of all exit points and the labels of the network's own end, computed uncut."""
    candidate = graph_set.candidate
    names = [name for number in range(1, len(candidate.exit_points) + 1) for name in candidate.live(number)]
    names += [head.labels for head in candidate.heads if head.labels is not None]
    outputs = [name for name in dict.fromkeys(names) if name != IMAGE]
    network = read_model(graph_set.root / NETWORK)
    whole = cut(import_network(network), [IMAGE], outputs)
    whole.ir_version = network.ir_version
    path = graph_set.root / "whole.onnx"  # beside the weights that it refers to
    try:
        onnx.save(whole, str(path))
        found = _run(library, path, [{IMAGE: frame[None]} for frame in frames])
    finally:
        path.unlink(missing_ok=True)
    return [{IMAGE: frame[None], **tensors} for frame, tensors in zip(frames, found, strict=True)]


def _check_baseline(
    library: engine.Library,
    graph_set: GraphSet,
    name: str,
    frames: Sequence[Array],
    logits: Sequence[Array],
    own: Sequence[Array] | None = None,
) -> None:
    """Check that a single-exit graph gives the argmax of the network's logits (1, K, h, w), or its own labels."""
    painted = _run(library, graph_set.path(name), [{"image": frame[None]} for frame in frames])
    labels = [outputs["labels"] for outputs in painted]
    if own is None:
        _compare_labels(name, labels, logits)
    else:
        _compare_own_labels(name, labels, own)
    for number, (outputs, values) in enumerate(zip(painted, logits, strict=True)):
        finite = int(np.isfinite(np.asarray(values).max(axis=1)).sum())
        if int(outputs[SOUND][0]) != finite:
            raise InputError(
                f"graph {name} counts {int(outputs[SOUND][0])} cells with finite logits on frame {number}, but there "
                f"are {finite}: the cut is wrong"
            )


def _check_head(
    library: engine.Library,
    graph_set: GraphSet,
    head: Head,
    features: Sequence[Feed],
    logits: Sequence[Array],
    own: Sequence[Array] | None,
) -> None:
    """Check that the gated head gives the network's logits, and its output graph their argmax, or its own labels."""
    name, output = head_graph_name(head.name), graph_set.candidate.output_of(head)
    thresholds = thresholds_of(graph_set)
    feeds = [{**tensors, "thresholds": thresholds} for tensors in features]
    found = [outputs["logits"] for outputs in _run(library, graph_set.path(name), feeds)]
    _compare(name, found, logits)
    painted = _run(library, graph_set.path(output), [{"logits": values} for values in found])
    labels = [outputs["labels"] for outputs in painted]
    if own is None:
        _compare_labels(f"{name} and {output}", labels, logits)
    else:
        _compare_own_labels(f"{name} and {output}", labels, own)


def _check_form(graph_set: GraphSet, name: str) -> None:
    """Check that a graph on disk is valid ONNX of opset 17, bounded by exactly the tensors of its description."""
    path, spec = graph_set.path(name), graph_set.graphs[name]
    model = read_model(path)
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if versions != [OPSET]:
        raise InputError(f"graph {name} has opset {versions}, not {OPSET}")
    for given, described in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        names = [value.name for value in given]
        if names != [tensor.name for tensor in described]:
            raise InputError(f"graph {name} is bounded by {names}, not by {[tensor.name for tensor in described]}")
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise InputError(f"graph {name} is not valid ONNX: {error}") from error


def _checked_features(
    library: engine.Library, graph_set: GraphSet, whole: Sequence[Feed], progress: Progress
) -> dict[int, list[Feed]]:
    """The tensors alive at every exit point, by its number, for each frame, as the path point by point computes them.

    Every segment, fused ones too, is compared with the `whole` network.
    """
    candidate = graph_set.candidate
    features: dict[int, list[Feed]] = {0: [{IMAGE: tensors[IMAGE]} for tensors in whole]}
    segments = sorted(candidate.segments(), key=lambda pair: (pair[1] - pair[0], pair))
    for done, (a, b) in enumerate(segments, start=1):
        name = segment_name(a, b)
        found = _run(library, graph_set.path(name), features[a])
        for tensor in found[0]:
            given, wanted = ([tensors[tensor] for tensors in some] for some in (found, whole))
            _compare(name if tensor == f"exit{b}" else f"{name} ({tensor})", given, wanted)
        if b == a + 1:
            both = [{**before, **made} for before, made in zip(features[a], found, strict=True)]
            features[b] = [{tensor: each[tensor] for tensor in candidate.live(b)} for each in both]
        progress(f"checked {name}", done, len(segments))
    return features


def _run(library: engine.Library, path: Path, feeds: Sequence[Feed]) -> list[Feed]:
    """Load a graph, run it on its inputs in each of `feeds`, release it: no two graphs are in memory."""
    with closing(library.load(path)) as loaded:
        return [run(library, loaded, feed) for feed in feeds]


def _compare(name: str, found: Sequence[Array], expected: Sequence[Array]) -> None:
    for index, (values, wanted) in enumerate(zip(found, expected, strict=True)):
        share = shares_of_allowed(values, wanted)
        if share > 1:
            allowed = _allowed(wanted)
            raise InputError(
                f"graph {name} deviates by {share * allowed:.3g} from the network on frame {index}, more than "
                f"{allowed:.3g}: the cut is wrong, or the network gives different results in two runs"
            )


def check_finite(logits: Mapping[str, Array], index: int) -> None:
    """Raises InputError for a network that itself gives NaN or infinity on frame `index`."""
    for head, values in logits.items():
        what = what_is_not_finite(values)
        if what is not None:
            remedy = "correct its weights, or the scale, mean and std of its input"
            if what == "-inf":
                remedy = "to mask out a class, use a large negative number such as -10000"
            raise InputError(f"head {head} of the original model gives {what} on frame {index}: {remedy}")


def what_is_not_finite(values: Array) -> str | None:
    """NaN, inf or -inf, whichever is among the values; None if all are finite."""
    if np.isnan(values).any():
        return "NaN"
    return next((name for name, value in (("inf", np.inf), ("-inf", -np.inf)) if (values == value).any()), None)


def shares_of_allowed(values: Array, wanted: Array) -> float:
    """The largest deviation from `wanted`, in units of the allowed one; infinite for another shape, or NaN."""
    if values.shape != wanted.shape or not np.isfinite(values).all():
        return np.inf
    if values.dtype.kind != "f":
        return 0.0 if np.array_equal(values, wanted) else np.inf
    return float(np.abs(values - wanted).max()) / _allowed(wanted)


def _compare_labels(name: str, found: Sequence[Array], logits: Sequence[Array]) -> None:
    """Check that every label has the highest logit of its pixel, or ties with it."""
    for index, (labels, values) in enumerate(zip(found, logits, strict=True)):
        pixels = upsampled(values[0], labels.shape[1:])  # (K, H, W)
        chosen = np.take_along_axis(pixels, labels.astype(np.int64), axis=0)[0]  # (H, W)
        wrong = int((pixels.max(axis=0) - chosen > 2 * _allowed(values)).sum())
        if wrong:
            raise InputError(f"{name}: {wrong} labels of frame {index} are not those of the network")


def _compare_own_labels(name: str, found: Sequence[Array], own: Sequence[Array]) -> None:
    """Check that the labels are the network's own, but for a few pixels where rounding decides between two classes."""
    for index, (labels, wanted) in enumerate(zip(found, own, strict=True)):
        wrong = int((labels != wanted).sum())
        if wrong > MOST_TIES * labels.size:
            raise InputError(f"{name}: {wrong} labels of frame {index} are not those of the network's own end")


def _allowed(values: Array) -> float:
    return TOLERANCE * max(1.0, float(np.abs(values).max()))


def upsampled(maps: Array, hw: Sequence[int]) -> Array:
    """Maps (K, h, w) at the size `hw`: bilinear, half-pixel centres, implemented independently of the output graph."""
    for axis, size in zip((1, 2), hw, strict=True):
        last = maps.shape[axis] - 1
        position = np.clip((np.arange(size) + 0.5) * (last + 1) / size - 0.5, 0, last)
        low = np.floor(position).astype(np.int64)
        share = (position - low).astype(np.float32)
        share = share[:, None] if axis == 1 else share
        high = np.minimum(low + 1, last)
        maps = maps.take(low, axis=axis) * (1 - share) + maps.take(high, axis=axis) * share
    return maps
