"""The step `attach`: a trained single-exit network gets early exits, taught by its own outputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mess_compile import extras, files
from mess_compile.attach.checked import check_whole_form
from mess_compile.attach.opened import OpenedNetwork, open_network
from mess_compile.attach.own_labels import find_images, held_back_text, split_images, write_own_labels
from mess_compile.attach.preparation import CLEARLY_PP, prepared_miou
from mess_compile.attach.whole_form import ClassNames, WholeForm, early_frontiers, whole_form
from mess_compile.data.class_list import default_colour, read_class_list
from mess_compile.data.dataset import DataSet, open_dataset, read_frame, samples
from mess_compile.data_folder import Data, DataFolder
from mess_compile.evaluate.statistics import label_counts, miou
from mess_compile.graph.cut import NETWORK
from mess_compile.graph.exits_toml import PREPROCESSING, InputRule, read_input_rule
from mess_compile.graph.frontiers import frontiers_at
from mess_compile.graph.store import drop_unread_weights, write_model
from mess_compile.network import CandidateNetwork
from mess_compile.reporter import SILENT, Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.images import frames
from mess_compile.workspace import Workspace

if TYPE_CHECKING:
    from mess_compile.training.parallel import Machines
    from mess_compile.training.recipe import Recipe

CHECKED_FRAMES = 3
_BASE = "base.onnx"
ATTACHED = "attached.json"


@dataclass(frozen=True)
class AttachOptions:
    """What to attach to, and how.

    `images` is a folder of images without labels, `data` a labelled data set; one of them is needed. `preprocess` names
    how the network wants its input, or a TOML file with a table [input]. `exits` counts exit points with the network's
    own end; `exits_at` names tensors instead. `heads` are configurations at every early exit point, or `exitN.NAME`.
    `weights` are loaded into a torch module. With `may_freeze`, a network that cannot be trained keeps its weights.
    `hold_back` is a pattern of the names of `images` that are never taught on; by default a fifth is not.
    """

    preprocess: str | None = None
    images: Path | None = None
    data: Data | None = None
    exits: int = 5
    exits_at: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("sep-crm1-b0",)
    classes: Path | None = None
    output: str | None = None
    input_hw: tuple[int, int] | None = None
    weights: Path | None = None
    machines: Machines | None = None
    may_freeze: bool = False
    hold_back: str | None = None


@dataclass(frozen=True)
class Attached:
    """The candidate network, and mIoU in percent of each head on the validation images, the network's own end last.

    `truth` says what they were compared with. `changed` is the share of pixels that the network's trained end labels
    otherwise than the network as it came, 0 if it stayed frozen; `left_out` are classes too rare to count.
    """

    candidate: CandidateNetwork
    miou: dict[str, float]
    truth: str
    images: int
    changed: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    """The network in the whole-network form in a file, and the images to teach by."""

    opened: OpenedNetwork
    form: WholeForm
    base: Path
    training: DataSet
    validation: DataSet
    left_out: tuple[str, ...]
    hold_back: str | None = None


def attach(
    workspace: Workspace,
    source: Any,
    recipe: Recipe,
    options: AttachOptions = AttachOptions(),
    reporter: Reporter = SILENT,
) -> Attached:
    """Attach exits to `source` and teach them; writes the candidate network of the workspace.

    `source` is an ONNX file, a torch module, or `package.module:factory`, which returns one when it is called.

    With 0 epochs of stage 1 in `recipe` the network's own weights stay as they are. The same call continues an
    interrupted one. Raises InputError naming what cannot be taken and what to pass instead.
    """
    teaching, written = extras.torch_module("attach.teaching"), extras.torch_module("attach.written")
    parallel = extras.torch_module("training.parallel")
    source, options = _as_onnx(workspace, source, options)
    prepared = _prepared(workspace, source, options, reporter)
    heads = _heads(options.heads, len(prepared.form.candidate.exit_points))
    job = teaching.TeachingJob(
        graph=prepared.base,
        candidate=prepared.form.candidate,
        heads=heads,
        data=prepared.training,
        validation=prepared.validation,
        labelled=options.data is not None,
        recipe=recipe,
        folder=workspace.attaching,
        source=files.sha256_of_file(source),
        machines=options.machines or parallel.Machines(),
        may_freeze=options.may_freeze,
    )
    taught = teaching.teach(job, reporter)
    _set_aside(workspace.candidate, reporter)
    with files.replaced_folder(workspace.candidate) as folder:
        shutil.copytree(prepared.base.parent / "weights", folder / "weights")
        shutil.copyfile(prepared.base, folder / _BASE)
        written.write_candidate(taught.network, taught.weights, folder / _BASE, folder)
        drop_unread_weights(folder)
        files.write_json(folder / ATTACHED, "mess-attached", 1, _provenance(prepared, job, source, taught.weights))
    shutil.rmtree(workspace.attaching)
    candidate, truth = taught.network.candidate, "the user's labels" if job.labelled else "the network's own output"
    own = _own_end_miou(workspace.candidate / NETWORK, candidate, prepared.validation)
    found = {**taught.miou, candidate.baseline: own}
    return Attached(candidate, found, truth, len(prepared.validation.items), taught.changed, prepared.left_out)


def _own_end_miou(network: Path, candidate: CandidateNetwork, data: DataSet) -> float:
    """mIoU in percent of the network's own end, whose own nodes make its labels."""
    classes, confusion = len(candidate.classes), np.zeros((3, len(candidate.classes)), np.int64)
    with _labels_by(network, candidate) as labels_of:
        for sample in samples(data):
            confusion += label_counts(labels_of(sample.frame), sample.labels, classes)
    return miou(*confusion)


def _as_onnx(workspace: Workspace, source: Any, options: AttachOptions) -> tuple[Path, AttachOptions]:
    """The ONNX file of a source, and its options; a module's is written into the workspace, with its submodules
    `exits_at` by name.
    """
    factory = isinstance(source, Path | str) and ":" in str(source) and not Path(source).exists()
    if isinstance(source, Path | str) and not factory:
        return Path(source), options
    torch_source = extras.torch_module("attach.torch_source")
    if factory and not torch_source.is_factory(str(source)):
        raise InputError(f"{source} is neither a file nor of the form package.module:factory")
    if options.input_hw is None:
        raise InputError("--input is missing: a torch module needs the size of its input, such as --input 256x256")
    module = torch_source.made_by(str(source), options.weights) if factory else source
    workspace.attaching.mkdir(parents=True, exist_ok=True)
    path = workspace.attaching / f"{str(source).rpartition(':')[2] if factory else type(source).__name__}.onnx"
    torch_source.write_onnx(module, options.input_hw, options.exits_at, path)
    return path, replace(options, output=torch_source.OUTPUT)


def _prepared(workspace: Workspace, source: Path, options: AttachOptions, reporter: Reporter) -> _Prepared:
    if options.data is None and options.images is None:
        raise InputError("attach teaches exits on images: give --images DIR, or --data DIR with labels")
    if options.data is not None and options.images is not None:
        raise InputError("--images DIR is for images without labels, --data DIR for those with labels: give one")
    if options.data is not None and options.hold_back is not None:
        raise InputError("--hold-back chooses among --images; with --data the split val is never taught on: drop it")
    paths, notes = ((), ()) if options.images is None else find_images(options.images)
    data = None if options.data is None else _labelled(workspace, options.data)
    notes = notes if data is None else tuple(dict.fromkeys((*data[0].notes, *data[1].notes)))
    for note in notes:
        reporter.warn(note)
    folder = workspace.attaching
    shutil.rmtree(folder / "weights", ignore_errors=True)
    (folder / "weights").mkdir(parents=True)
    rule = _rule(options.preprocess, data is not None)
    opened = open_network(source, rule, folder, options.output, options.input_hw)
    classes = _classes(opened, options, None if data is None else data[0])
    if data is not None:
        opened = _well_prepared(opened, options.preprocess, folder, data[1], reporter)
    frontiers = opened.frontiers
    early = frontiers_at(frontiers, options.exits_at) if options.exits_at else early_frontiers(opened, options.exits)
    if not options.exits_at and len(early) + 1 < options.exits:
        reporter.warn(
            f"{len(early) + 1} exits instead of {options.exits}: no map lies near the other steps of the work; "
            "`mess-compile inspect MODEL.onnx` lists the places, --exits-at chooses others"
        )
    form = whole_form(opened, early, classes)
    images = list(paths) if data is None else [item.image for item in data[0].items]
    check_whole_form(opened, form, folder, _some_frames(images, opened.hw))
    base = folder / _BASE
    write_model(form.model, base)
    drop_unread_weights(folder)
    left_out: tuple[str, ...] = ()
    if data is None:
        splits = split_images(paths, options.hold_back)
        reporter.note(held_back_text(splits, options.hold_back))
        left_out = _label_by_network(workspace, base, form.candidate, splits, reporter)
        root = DataFolder(workspace.own_labels)
        data = open_dataset(root, "train"), open_dataset(root, "val")
        workspace.remember(data=root)
    else:
        workspace.remember(data=workspace.data_folder(options.data))
    return _Prepared(opened, form, base, *data, left_out, options.hold_back)


def _labelled(workspace: Workspace, data: Data) -> tuple[DataSet, DataSet]:
    folder = workspace.data_folder(data)
    training = open_dataset(folder, "train")
    return training, open_dataset(folder, "val", training.classes)


def _rule(name: str | None, labelled: bool) -> InputRule:
    if name is None and labelled:  # labels will show which is right
        return PREPROCESSING["imagenet"]
    if name is None:
        raise InputError(
            f"--preprocess is missing: how does the network want its input? {', '.join(PREPROCESSING)}, or a TOML file "
            "with a table [input]"
        )
    if name in PREPROCESSING:
        return PREPROCESSING[name]
    if Path(name).suffix == ".toml":
        return read_input_rule(Path(name))
    raise InputError(
        f"--preprocess {name!r} is not one of {', '.join(PREPROCESSING)}, and not a TOML file with a table [input]"
    )


def _well_prepared(
    opened: OpenedNetwork, asked: str | None, folder: Path, data: DataSet, reporter: Reporter
) -> OpenedNetwork:
    """The network with the preparation that labels show to be right, where none was asked for; else a warning."""
    if opened.image.dtype == "uint8":
        return opened
    found = prepared_miou(opened, folder, data)
    best = max(found, key=lambda name: found[name])
    values = ", ".join(f"{name} {value:.1f} %" for name, value in found.items())
    if asked is None:
        reporter.note(f"--preprocess {best} gives the best mIoU on some labelled images ({values}): taken")
        return replace(opened, rule=opened.fitted(PREPROCESSING[best]))
    if found[best] > found.get(asked, -1.0) + CLEARLY_PP and asked in found:
        reporter.warn(f"--preprocess {asked} is likely wrong: mIoU on some labelled images is {values}; try {best}")
    return opened


def _provenance(prepared: _Prepared, job: Any, source: Path, weights: Any) -> dict[str, Any]:
    """Where a candidate network comes from, and which images taught it."""
    return {
        "source": source.name,
        "source_sha256": job.source,
        "input": asdict(prepared.opened.rule),
        "trained": bool(weights),
        "epochs": list(job.recipe.epochs),
        "labelled": job.labelled,
        "split": prepared.training.split,
        "image_ids": [item.id for item in prepared.training.items],
        "held_back": [item.id for item in prepared.validation.items],
        "hold_back": prepared.hold_back,
    }


def _classes(opened: OpenedNetwork, options: AttachOptions, data: DataSet | None) -> ClassNames:
    count = opened.end.classes
    if options.classes is not None:
        found = read_class_list(options.classes)
        where = str(options.classes)
    elif data is not None:
        found, where = data.classes, str(data.root)
    else:
        names = ("background", "foreground") if opened.end.single else tuple(f"class{n}" for n in range(count))
        return ClassNames(names, tuple(default_colour(n - 1) for n in range(count)))
    if len(found.names) != count:
        raise InputError(
            f"{where} has {len(found.names)} classes, but output {opened.end.output.name!r} has {count}: "
            "name each, in the order of the network's channels, with --classes FILE"
        )
    return ClassNames(found.names, found.colours)


def _heads(names: Sequence[str], exits: int) -> tuple[Any, ...]:
    network = extras.torch_module("nets.network")
    heads: tuple[Any, ...] = network.heads_from_names(names, exits)
    return heads


def _some_frames(paths: Sequence[Path], hw: tuple[int, int]) -> list[NDArray[np.uint8]]:
    chosen = paths[:: max(1, len(paths) // CHECKED_FRAMES)][:CHECKED_FRAMES]
    return [frames.resize(read_frame(path), hw) for path in chosen]


def _label_by_network(
    workspace: Workspace,
    base: Path,
    candidate: CandidateNetwork,
    splits: dict[str, tuple[Path, ...]],
    reporter: Reporter,
) -> tuple[str, ...]:
    """Write the data set whose truth is the network's own output."""
    with _labels_by(base, candidate) as labels_of:
        return write_own_labels(workspace.own_labels, splits, candidate.classes, labels_of, reporter)


@contextmanager
def _labels_by(
    network: Path, candidate: CandidateNetwork
) -> Iterator[Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]:
    """A function from a frame (H, W, 3) of any size to the labels, at the network's input size, of its own end."""
    name = str(candidate.heads[-1].labels)
    with closing(open_library("onnxruntime")) as library, closing(library.load(network)) as engine:

        def labels(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
            outputs = engine.run({"image": library.upload(frames.resize(frame, candidate.input_hw)[None])})
            found: NDArray[np.uint8] = library.download(outputs[name])[0]
            return found

        yield labels


def _set_aside(folder: Path, reporter: Reporter) -> None:
    """Rename an earlier candidate network to the first free `candidate-N`."""
    if not folder.exists():
        return
    number = 1
    while (place := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(place)
    reporter.note(f"the network that was in {folder} is kept in {place}")
