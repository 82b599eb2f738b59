"""The figures of a running cascade: what a user would lose is the warning that the plan no longer fits the scene."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile import runtime
from mess_compile.runtime.bundle.manifest import BundlePlan, Manifest
from mess_compile.runtime.cascade import metrics as metrics_module
from mess_compile.runtime.cascade.metrics import Metrics, Recorder, drift
from tests import small_network
from tests.small_network import frame


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.mess"
    small_network.write_bundle(path)
    return path


@pytest.fixture(scope="module")
def plan(bundle: Path) -> BundlePlan:
    with runtime.load(bundle, threads=1) as cascade:
        return cascade.plan


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.05, 5e4), min_size=1, max_size=300))
def test_percentiles_are_exact_to_2_percent(plan: BundlePlan, latencies_ms: list[float]) -> None:
    recorder = Recorder(plan)
    for latency_ms in latencies_ms:
        recorder.finished(1, latency_ms, (), False)
    found = recorder.metrics("tiny", "default").latency
    assert found.mean_ms == pytest.approx(sum(latencies_ms) / len(latencies_ms))
    for share, value in ((50, found.p50_ms), (90, found.p90_ms), (95, found.p95_ms), (99, found.p99_ms)):
        assert value == pytest.approx(np.percentile(latencies_ms, share, method="inverted_cdf"), rel=0.0222)
    for bound_ms, count in found.buckets:
        assert count == sum(latency_ms <= bound_ms for latency_ms in latencies_ms)


def test_latencies_beyond_all_bins_are_still_counted(plan: BundlePlan) -> None:
    recorder = Recorder(plan)
    for latency_ms in (0.0, 1e-9, 1e12):
        recorder.finished(1, latency_ms, (), False)
    found = recorder.metrics("tiny", "default")
    assert (found.frames, found.latency.buckets[0][1], found.latency.buckets[-1][1]) == (3, 2, 2)


def test_drift_is_the_population_stability_index() -> None:
    tuning, recent = [0, 0, 0, 0, 0, 0, 0, 10, 20, 70], [0, 0, 0, 0, 0, 0, 300, 300, 300, 100]
    found = drift(2, tuning, recent)
    smooth_tuning, smooth_recent = np.array([0.5, 10.5, 20.5, 70.5]) / 102, np.array([300.5] * 3 + [100.5]) / 1002
    wanted = np.sum((smooth_recent - smooth_tuning) * np.log(smooth_recent / smooth_tuning))
    assert found.index == pytest.approx(wanted)
    assert (found.exit, found.frames, found.tuning_images) == (2, 1000, 100)


def test_chance_alone_exceeds_its_bound_in_one_case_of_a_hundred() -> None:
    random = np.random.default_rng(0)
    shares = np.array([0.01, 0.02, 0.03, 0.05, 0.09, 0.1, 0.15, 0.15, 0.2, 0.2])
    cases = [drift(1, random.multinomial(400, shares), random.multinomial(1000, shares)) for _ in range(4000)]
    exceeded = np.mean([case.index > case.by_chance for case in cases])
    assert 0.003 < exceeded < 0.02
    other = shares[::-1]
    moved = [drift(1, random.multinomial(400, shares), random.multinomial(1000, other)) for _ in range(200)]
    assert all(case.index > max(case.by_chance, 0.2) for case in moved)


def confident(manifest: Manifest) -> Manifest:
    """Tuning images whose first exit was sure of all to all cells, and 20 that reached the second, sure of few."""
    plan = manifest.plans[0]
    bins = ((0, 0, 0, 0, 0, 0, 0, 0, 10, 90), (20, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    return replace(manifest, plans=(replace(plan, confidence=bins),))


def test_drift_is_told_of_the_frames_that_reach_an_exit(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_module, "RECENT", 200)
    path = small_network.changed_bundle(bundle, tmp_path / "confident.mess", confident)
    firsts = [small_network.expected(frame(seed))[0][0][2] for seed in range(40)]
    seconds = [small_network.expected(frame(seed))[1][0][2] for seed in range(40) if firsts[seed] < 18]
    with runtime.load(path, threads=1) as cascade:
        for seed in range(40):
            cascade(frame(seed))
        assert cascade.metrics().drift == ()  # too few yet
        for seed in [*range(40)] * 6:
            cascade(frame(seed))
        first, second = cascade.metrics().drift
    for found, counts, tuning in ((first, firsts, [0] * 8 + [10, 90]), (second, seconds, [20] + [0] * 9)):
        bins = np.bincount([min(int(count / 24 * 10), 9) for count in counts], minlength=10)
        rough = drift(1, tuning, [int(count) for count in bins * 200 // max(sum(bins), 1)]).index
        assert found.index == pytest.approx(rough, rel=0.2)
    assert first.frames == 200  # of the latest alone
    assert first.index > max(first.by_chance, 0.2)


def test_metrics_of_a_long_run_take_no_more_memory_than_of_a_short_one(plan: BundlePlan) -> None:
    recorder = Recorder(plan)
    for number in range(3000):
        recorder.finished(1, 1.0 + number % 7, (0.5,), False)
    assert len(recorder._recent[0]) == metrics_module.RECENT
    assert recorder.metrics("tiny", "default").frames == 3000


SAMPLE = re.compile(r'([a-z_]+?)(_bucket|_sum|_count)?\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\} (\S+)')


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Samples by family, read by the rules of the text format 0.0.4: each family once, HELP and TYPE before it."""
    families: dict[str, dict[str, float]] = {}
    name = kind = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in families
            families[name] = {}
        elif line.startswith("# TYPE "):
            assert line.split()[2] == name
            kind = line.split()[3]
            assert kind in ("counter", "gauge", "histogram")
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert (match[1] + (match[2] or "") if kind != "histogram" else match[1]) == name
            assert (match[2] is not None) == (kind == "histogram")
            assert kind != "counter" or name.endswith("_total")
            key = f"{match[2] or ''}{{{match[3]}}}"
            assert key not in families[name]
            families[name][key] = float(match[4])
    assert text.endswith("\n")
    return families


def some_metrics(plan: BundlePlan, bundle: str = "tiny") -> Metrics:
    recorder = Recorder(replace(plan, confidence=((5,) * 10, ())))
    for number in range(150):
        recorder.finished(1 + number % 2, 0.9 + number % 2, (number % 10 / 10,), number == 3)
    recorder.had_deadline(True, False)
    recorder.had_deadline(False, True)
    recorder.had_deadline(False, False)
    recorder.failed(runtime.EngineError("x"))
    return recorder.metrics(bundle, "default")


def test_prometheus_reads_the_same_numbers(plan: BundlePlan) -> None:
    families = parsed(some_metrics(plan).to_prometheus())
    here = 'bundle="tiny",target="host"'
    assert families["mess_frames_total"] == {f'{{{here},exit="1"}}': 75, f'{{{here},exit="2"}}': 75}
    histogram = families["mess_frame_latency_seconds"]
    assert histogram[f"_count{{{here}}}"] == histogram[f'_bucket{{{here},le="+Inf"}}'] == 150
    assert histogram[f"_sum{{{here}}}"] == pytest.approx(75 * 0.9e-3 + 75 * 1.9e-3)
    assert histogram[f'_bucket{{{here},le="0.001"}}'] == 75
    assert histogram[f'_bucket{{{here},le="0.002"}}'] == 150
    buckets = [value for key, value in histogram.items() if key.startswith("_bucket")]
    assert buckets == sorted(buckets)
    assert families["mess_deadline_frames_total"] == {f"{{{here}}}": 3}
    missed = families["mess_deadline_misses_total"]
    assert missed == {f'{{{here},result="first"}}': 1, f'{{{here},result="later"}}': 1}
    assert families["mess_fallback_frames_total"] == {f"{{{here}}}": 1}
    assert sum(families["mess_engine_failures_total"].values()) == 1
    assert list(families["mess_confidence_drift"]) == [f'{{{here},exit="1"}}']
    assert families["mess_cascade_info"] == {f'{{{here},library="onnxruntime",operating_point="default"}}': 1}


def test_names_are_escaped_for_prometheus(plan: BundlePlan) -> None:
    text = some_metrics(plan, 'a"b\\c\nd').to_prometheus()
    assert 'bundle="a\\"b\\\\c\\nd"' in text
    parsed(text)


def test_metrics_as_json_are_numbers(plan: BundlePlan) -> None:
    found = json.loads(some_metrics(plan).to_json())
    assert found["exits"] == [75, 75]
    assert found["drift"][0]["exit"] == 1
    json.loads(some_metrics(plan).to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
