"""Exit statistics: mIoU as per-pixel confusion gives it, shards that merge to equal bytes, damage that is noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mess_compile.evaluate.statistics import (
    ExitStatistics,
    changed_share,
    check_statistics_current,
    head_miou,
    merge,
    miou,
    read_statistics,
    statistics_content_sha256,
    write_statistics,
)
from mess_compile.network import Gate, threshold_table
from mess_compile.runtime.base.errors import InputError, StaleError
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT
from tests.search.cases import by_class, candidate_network, exit_statistics, graph_set

GRAPHS = graph_set(candidate_network((2, 1)), rows=3)


def statistics(images: int = 7) -> ExitStatistics:
    return exit_statistics(GRAPHS, images, seed=5)


def with_alone(of: ExitStatistics, seed: int = 0) -> ExitStatistics:
    """With a baseline trained alone that is right on a random part of the labelled pixels."""
    right = np.random.default_rng(seed).integers(0, of.labelled + 1)
    return dataclasses.replace(
        of,
        intersection=np.concatenate([of.intersection, right[:, None]], axis=1),
        predicted=np.concatenate([of.predicted, right[:, None] + 1], axis=1),
        baseline_alone="a" * 64,
    )


def miou_from_confusion(truth: NDArray[np.int64], guess: NDArray[np.int64], classes: int) -> float:
    confusion = [[0] * classes for _ in range(classes)]
    for t, g in zip(truth.ravel(), guess.ravel(), strict=True):
        confusion[t][g] += 1
    ious = []
    for k in range(classes):
        row, column = sum(confusion[k]), sum(line[k] for line in confusion)
        if row:
            ious.append(confusion[k][k] / (row + column - confusion[k][k]))
    return 100 * sum(ious) / len(ious)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))
def test_miou_of_summed_counts_is_that_of_the_confusion_over_all_pixels(images: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, rng.integers(1, classes + 1), (images, 5, 7))
    guess = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, classes, truth.shape))
    intersection, predicted, labelled = (
        np.array([[int((mask == k).sum()) for k in range(classes)] for mask in masks]).sum(axis=0)
        for masks in (np.where(truth == guess, truth, -1), guess, truth)
    )
    expected = miou_from_confusion(truth, guess, classes)
    assert miou(intersection, predicted, labelled) == pytest.approx(expected, rel=1e-12)


def test_without_labelled_pixels_there_is_no_miou() -> None:
    with pytest.raises(InputError, match="no image has a labelled pixel"):
        miou(np.zeros(3, np.int64), np.ones(3, np.int64), np.zeros(3, np.int64))


def test_an_unknown_head_is_named() -> None:
    with pytest.raises(InputError, match=r"no head 'exit9\.fcn'"):
        head_miou(statistics(), "exit9.fcn")


def test_every_class_gets_the_rows_plain_threshold() -> None:
    table = threshold_table(Gate(thresholds=(0.5, 0.9)), 3)
    np.testing.assert_array_equal(table, np.array([[0.5] * 3, [0.9] * 3], np.float32))


def test_shards_merge_to_the_bytes_of_one_process(tmp_path: Path) -> None:
    whole = statistics()
    shards = [whole.select(range(3)), whole.select(range(3, 4)), whole.select(range(4, 7))]
    write_statistics(tmp_path / "whole", whole)
    write_statistics(tmp_path / "merged", merge(shards))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.booleans(), st.integers(0, 10**6))
def test_images_of_shards_keep_their_own_figures(shard_of_image: list[int], alone: bool, seed: int) -> None:
    """Whatever images a shard gets, with a baseline trained alone or without."""
    whole = exit_statistics(GRAPHS, len(shard_of_image), seed)
    if alone:
        whole = with_alone(whole, seed)
    chosen = [[i for i, shard in enumerate(shard_of_image) if shard == number] for number in range(3)]
    merged = merge([whole.select(images) for images in chosen])
    order = [i for images in chosen for i in images]
    assert merged.image_id == tuple(f"image{i}" for i in order)
    assert merged.baseline_alone == whole.baseline_alone
    for place, image in enumerate(order):
        for name in ("counts", "intersection", "predicted", "labelled"):
            assert getattr(merged, name)[place].tolist() == getattr(whole, name)[image].tolist()
    for name in whole.scored:
        assert head_miou(merged, name) == head_miou(whole, name)


def test_what_cannot_be_merged_is_named() -> None:
    whole = statistics()
    with pytest.raises(InputError, match="image2 is in more than one shard"):
        merge([whole.select([0, 2]), whole.select([2, 3])])
    with pytest.raises(InputError, match="network differ"):
        merge([whole.select([0]), dataclasses.replace(whole.select([1]), network="other")])
    with pytest.raises(InputError, match="baseline_alone differ"):
        merge([whole.select([0]), with_alone(whole).select([1])])
    with pytest.raises(InputError, match="truth differ"):
        merge([whole.select([0]), dataclasses.replace(whole.select([1]), truth=OWN_OUTPUT)])
    with pytest.raises(InputError, match="no statistics"):
        merge([])


@pytest.mark.parametrize("alone", [False, True])
def test_what_is_written_is_read_again_memory_mapped(tmp_path: Path, alone: bool) -> None:
    written = with_alone(statistics()) if alone else statistics()
    write_statistics(tmp_path / "statistics", written)
    found = read_statistics(tmp_path / "statistics")
    assert isinstance(found.counts, np.memmap)
    for field in dataclasses.fields(ExitStatistics):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(written, field.name))


def test_statistics_from_before_baselines_were_trained_alone_are_still_read(tmp_path: Path) -> None:
    write_statistics(tmp_path, statistics())
    index = tmp_path / "statistics.json"
    content = json.loads(index.read_text())
    del content["baseline_alone"]
    index.write_text(json.dumps(content))
    assert read_statistics(tmp_path).baseline_alone is None


def test_statistics_say_what_they_are_against(tmp_path: Path) -> None:
    """Those against labels are written as earlier releases did: plans made then name a hash over all of it."""
    own = dataclasses.replace(statistics(), truth=OWN_OUTPUT)
    write_statistics(tmp_path / "own", own)
    write_statistics(tmp_path / "labels", statistics())
    assert read_statistics(tmp_path / "own").truth == "the network's own output"
    assert read_statistics(tmp_path / "labels").truth == "labels"
    assert "truth" not in json.loads((tmp_path / "labels" / "statistics.json").read_text())
    assert statistics_content_sha256(own) != statistics_content_sha256(statistics())
    index = tmp_path / "own" / "statistics.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"truth": "a guess"}))
    with pytest.raises(InputError, match=r"truth is 'a guess', not one of labels, the network's own output"):
        read_statistics(tmp_path / "own")


def test_shares_of_changed_pixels_are_rounded_half_up_to_billionths() -> None:
    wrong, labelled = np.array([0, 1, 2, 1, 5, 0]), np.array([3, 3, 3, 2 * 10**9, 5, 0])
    assert changed_share(wrong, labelled).tolist() == [0, 333333333, 666666667, 1, 10**9, 0]


def test_a_baseline_cannot_be_edited_in_or_out(tmp_path: Path) -> None:
    for written, name in ((with_alone(statistics()), None), (statistics(), "b" * 64)):
        write_statistics(tmp_path, written)
        index = tmp_path / "statistics.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"baseline_alone": name}))
        with pytest.raises(InputError, match=r"intersection is int64 .* run `mess-compile evaluate`"):
            read_statistics(tmp_path)


@pytest.mark.parametrize("name", ["counts", "intersection", "predicted", "labelled", "thresholds"])
def test_a_changed_missing_or_shortened_array_is_noticed(tmp_path: Path, name: str) -> None:
    write_statistics(tmp_path, statistics())
    path = tmp_path / f"{name}.npy"
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-8], b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{name}\.npy is damaged .* run `mess-compile evaluate`"):
            read_statistics(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}\.npy does not exist: run `mess-compile evaluate`"):
        read_statistics(tmp_path)


def test_arrays_that_do_not_fit_the_description_are_refused(tmp_path: Path) -> None:
    write_statistics(tmp_path, statistics())
    index = tmp_path / "statistics.json"
    index.write_text(index.read_text().replace('"image0",', ""))
    with pytest.raises(InputError, match="counts is int32"):
        read_statistics(tmp_path)


def test_statistics_by_a_gate_without_classes_stay_readable_and_current(tmp_path: Path) -> None:
    """A gate of an earlier release counts the same cells: what was recorded need not be recorded again."""
    write_statistics(tmp_path, statistics())
    content = json.loads((tmp_path / "statistics.json").read_text())
    assert "by_class" not in content["gate"], "plans name hashes of it"
    exported = dataclasses.replace(GRAPHS, gate=dataclasses.replace(GRAPHS.gate, by_class=True))
    check_statistics_current(read_statistics(tmp_path), exported)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_counts_by_class_are_read_back_and_add_up(tmp_path: Path, dtype: type) -> None:
    found = by_class(statistics())
    found = dataclasses.replace(found, class_counts=found.class_counts.astype(dtype))
    write_statistics(tmp_path, found)
    read = read_statistics(tmp_path)
    np.testing.assert_array_equal(read.class_counts, found.class_counts)
    assert (read.class_counts.dtype, type(read.class_counts)) == (dtype, np.memmap)
    assert statistics_content_sha256(read) == statistics_content_sha256(found)
    other = found.class_counts.copy()
    other[3, 1, 2, 0] += 1
    write_statistics(tmp_path, dataclasses.replace(found, class_counts=other))
    with pytest.raises(InputError, match="counts by class do not add up to the confident cells"):
        read_statistics(tmp_path)
    (tmp_path / "class_counts.npy").unlink()
    with pytest.raises(InputError, match=r"class_counts\.npy does not exist: run `mess-compile evaluate`"):
        read_statistics(tmp_path)


def test_counts_by_class_are_merged_and_selected_with_their_images() -> None:
    found = by_class(statistics())
    merged = merge([found.select(range(3, 7)), found.select(range(3))])
    np.testing.assert_array_equal(merged.class_counts, found.class_counts[[3, 4, 5, 6, 0, 1, 2]])


def test_statistics_of_another_network_gate_or_heads_are_stale() -> None:
    current = statistics()
    check_statistics_current(current, GRAPHS)
    for what, changed in {
        "network": dataclasses.replace(current, network="other"),
        "baseline": with_alone(current),
        "gate": dataclasses.replace(current, gate=Gate(confidence="entropy")),
        "heads": dataclasses.replace(current, heads=current.heads[::-1]),
        "classes": dataclasses.replace(current, classes=("a", "b", "c")),
    }.items():
        with pytest.raises(StaleError, match=rf"another {what} .* run `mess-compile evaluate`"):
            check_statistics_current(changed, GRAPHS)
