"""Exit statistics: mIoU as per-pixel confusion gives it, shards that merge to equal bytes, damage that is noticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mess_compile.candidates import Gate
from mess_compile.runtime.errors import InputError, StaleError
from mess_compile.statistics import (
    ExitStatistics,
    check_current,
    head_miou,
    merge,
    miou,
    read_statistics,
    threshold_table,
    write_statistics,
)
from tests.search.cases import candidate_network, exit_statistics, graph_set

GRAPHS = graph_set(candidate_network((2, 1)), rows=3)


def statistics(images: int = 7) -> ExitStatistics:
    return exit_statistics(GRAPHS, images, seed=5)


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


def test_what_cannot_be_merged_is_named() -> None:
    whole = statistics()
    with pytest.raises(InputError, match="image2 is in more than one shard"):
        merge([whole.select([0, 2]), whole.select([2, 3])])
    with pytest.raises(InputError, match="network differ"):
        merge([whole.select([0]), dataclasses.replace(whole.select([1]), network="other")])
    with pytest.raises(InputError, match="no statistics"):
        merge([])


def test_what_is_written_is_read_again_memory_mapped(tmp_path: Path) -> None:
    written = statistics()
    write_statistics(tmp_path / "statistics", written)
    found = read_statistics(tmp_path / "statistics")
    assert isinstance(found.counts, np.memmap)
    for field in dataclasses.fields(ExitStatistics):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(written, field.name))


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


def test_statistics_of_another_network_gate_or_heads_are_stale() -> None:
    current = statistics()
    check_current(current, GRAPHS)
    for what, changed in {
        "network": dataclasses.replace(current, network="other"),
        "gate": dataclasses.replace(current, gate=Gate(confidence="entropy")),
        "heads": dataclasses.replace(current, heads=current.heads[::-1]),
        "classes": dataclasses.replace(current, classes=("a", "b", "c")),
    }.items():
        with pytest.raises(StaleError, match=rf"another {what} .* run `mess-compile evaluate`"):
            check_current(changed, GRAPHS)
