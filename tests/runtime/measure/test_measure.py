"""Latencies are measured in context and survive a break: else a user plans on numbers that no cascade shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.engines.engine import TensorSpec, open_library
from mess_compile.runtime.engines.engine_fake import FakeGraph, FakeLibrary
from mess_compile.runtime.measure import job_pool
from mess_compile.runtime.measure.job_pool import Job, Opened
from mess_compile.runtime.measure.measure import Effort, MeasureTask, Window, measure
from mess_compile.runtime.measure.summary import summarise
from tests import small_network

MS = 1_000_000
BRIEF = Effort(window_s=0.01, window_runs=3, max_s=0.2, warm_up_s=0.0)
FRAME = np.zeros((2, 2, 3), np.uint8)
THRESHOLDS = np.zeros((4, 2), np.float32)
NAMES = ("a", "b", "head", "upload", "download", "null")
COSTS_MS = {"a": 1, "b": 2, "head": 4, "tick": 0.5}
LOOK_MS = 0.1
"""What a look at the clock takes here: a transfer costs nothing in the script, and a window must still end."""


def scripted() -> FakeLibrary:
    image, first = TensorSpec("image", "uint8", (1, 2, 2, 3)), TensorSpec("exit1", "float32", (1, 1))
    second, thresholds = TensorSpec("exit2", "float32", (1, 1)), TensorSpec("thresholds", "float32", (4, 2))
    counts, labels = TensorSpec("counts", "int32", (4,)), TensorSpec("labels", "uint8", (1, 2, 2))

    def graph(name: str, sources: tuple[TensorSpec, ...], targets: tuple[TensorSpec, ...]) -> FakeGraph:
        out = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in targets}
        return FakeGraph(sources, targets, lambda feeds: out, int(COSTS_MS[name] * MS))

    return FakeLibrary(
        {
            "a": graph("a", (image,), (first,)),
            "b": graph("b", (first,), (second,)),
            "head": graph("head", (second, thresholds), (counts, labels)),
            "tick": graph("tick", (image,), (first,)),
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each scripted graph, of 10 bytes for every letter of its name."""
    folder = tmp_path_factory.mktemp("graphs")
    for name in COSTS_MS:
        (folder / f"{name}.onnx").write_bytes(bytes(10 * len(name)))
    return folder


def jobs(root: Path) -> list[Job]:
    return [
        Job("a", root / "a.onnx"),
        Job("b", root / "b.onnx", "a"),
        Job("head", root / "head.onnx", "b"),
        Job("upload", None),
        Job("download", None, "head"),
        Job("null", None, "head"),
        Job("tick", root / "tick.onnx"),
    ]


def events(
    library: FakeLibrary,
    todo: Sequence[Job],
    effort: Effort = BRIEF,
    earlier: Sequence[Window] = (),
    reference: str | None = None,
    measured: Sequence[str] | None = None,
    **options: object,
) -> Iterator[Opened | Window]:
    names = [job.name for job in todo]

    def clock() -> int:
        library.now_ns += int(LOOK_MS * MS)
        return library.now_ns

    reference = reference or ("tick" if "tick" in names else names[0])
    measured = measured or [name for name in names if name != "tick"]
    task = MeasureTask(todo, FRAME, THRESHOLDS, reference, measured, earlier)
    return measure(library, task, effort, clock_ns=clock, **options)  # type: ignore[arg-type]


def windows(library: FakeLibrary, todo: Sequence[Job], *args: object, **options: object) -> list[Window]:
    return [event for event in events(library, todo, *args, **options) if isinstance(event, Window)]  # type: ignore[arg-type]


def noisy_windows(
    todo: Sequence[Job], noise: dict[str, list[float]], effort: Effort, earlier: Sequence[Window] = ()
) -> Iterator[Window]:
    """A job's n-th window runs slower by its n-th factor, whether or not there was a break before."""
    library = scripted()
    usual = dict(library.graphs)
    library.graphs = dict(usual)
    count = Counter(window.job for window in earlier)
    going = events(library, todo, effort, earlier)
    while True:
        for name, factors in noise.items():
            factor = factors[count[name] % len(factors)]
            library.graphs[name] = replace(usual[name], cost_ns=int(usual[name].cost_ns * factor))
        event = next(going, None)
        if event is None:
            return
        if isinstance(event, Window):
            count[event.job] += 1
            yield event


def by_job(found: Sequence[Window]) -> dict[str, list[Window]]:
    return {name: [window for window in found if window.job == name] for name in {window.job for window in found}}


NOISE = st.fixed_dictionaries(
    {name: st.lists(st.sampled_from([1.0, 1.02, 1.1, 3.0]), min_size=1, max_size=5) for name in ("a", "b", "head")}
)


@pytest.mark.parametrize("queued", [False, True])
def test_each_graph_is_timed_without_its_predecessor(root: Path, queued: bool) -> None:
    """Also on a GPU, where a run that returns has only begun."""
    found = by_job(windows(replace(scripted(), queued=queued), jobs(root)))
    assert set(found) == set(NAMES)
    for name, taken in found.items():
        for window in taken:
            np.testing.assert_allclose(window.wall_ms, COSTS_MS.get(name, LOOK_MS))
            assert window.device_ms == ()


def test_the_predecessor_runs_just_before_every_timed_run(root: Path) -> None:
    library = scripted()
    window = next(event for event in events(library, jobs(root), measured=["b"]) if isinstance(event, Window))
    assert window == Window("b", 0, (2.0,) * 4, (), None, 4 * 0.0031, (0.5, 0.5))
    ran = [name for verb, name in library.log if verb == "run" and name != "tick"]
    assert ran[-8:] == ["a", "b"] * 4


def ran_for(
    root: Path,
    job: str,
    first_ms: float = 0.5,
    window_s: float = 0.09,
    power: Callable[[], float | None] | None = None,
) -> str:
    """The graphs that ran in the last runs of a job's first window; `tick` is the first in the list, as baselines are.

    Three runs in half of 90 ms leave 15 ms to each, of which a small graph and its predecessor take no more than half.
    """
    library, todo = scripted(), jobs(root)
    library.graphs = {**library.graphs, "tick": replace(library.graphs["tick"], cost_ns=int(first_ms * MS))}
    effort = replace(BRIEF, window_s=window_s)
    going = events(library, [todo[-1], *todo[:-1]], effort, measured=[job], reference="a", power=power)
    next(event for event in going if isinstance(event, Window))
    ran = "".join({"tick": "t", "head": "h"}.get(name, name) for verb, name in library.log if verb == "run")
    return ran.rstrip("a")  # ticks of the reference


def test_other_work_comes_between_frames_so_that_caches_are_cold_as_in_a_cascade(root: Path) -> None:
    """Before the predecessor of a graph within a frame; just before what begins one, such as the upload."""
    assert ran_for(root, "b").endswith("tabtab")
    assert ran_for(root, "head").endswith("tbhtbh")
    assert ran_for(root, "download").endswith("thth")
    assert ran_for(root, "upload").endswith("tt")


def test_the_reference_is_the_other_work_where_the_first_graph_takes_too_long(root: Path) -> None:
    assert ran_for(root, "b", first_ms=13).endswith("aabaab")


def test_nothing_runs_between_the_runs_of_a_slow_graph_or_where_power_is_read(root: Path) -> None:
    assert ran_for(root, "head", window_s=0.03).endswith("bhbhbh")
    assert ran_for(root, "head", power=lambda: 1.0).endswith("bhbhbh")


def test_device_times_are_kept_beside_the_wall(root: Path) -> None:
    library = scripted()
    library.graphs = {**library.graphs, "b": replace(library.graphs["b"], device_ns=MS // 2)}
    found = by_job(windows(library, jobs(root)))
    assert all(window.device_ms == (0.5,) * len(window.wall_ms) for window in found["b"])
    assert summarise(found["b"]).device_mean_ms == 0.5
    assert summarise(found["a"]).device_mean_ms is None


def test_every_round_has_its_own_order(root: Path) -> None:
    def rounds(seed: int) -> list[list[str]]:
        found = windows(scripted(), jobs(root), replace(BRIEF, seed=seed))
        return [[window.job for window in found if window.round == number] for number in range(found[-1].round + 1)]

    orders = rounds(0)
    assert orders == rounds(0) != rounds(1)
    assert len(orders) == 3
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    assert orders[0] != orders[1]


def test_the_reference_ticks_before_and_after_every_window(root: Path) -> None:
    """Once between two windows that follow each other: two ticks would tell the same."""
    library = scripted()
    found = windows(library, jobs(root), measured=["a"])
    assert all(window.ticks_ms == (0.5, 0.5) for window in found)
    ran = "".join({"a": "a", "tick": "."}.get(name, "") for verb, name in library.log if verb == "run")
    between = [len(ticks) for ticks in ran.split("a") if ticks]
    assert len(between) == len(found) + 1
    assert max(between[1:]) == 4  # 2 ms, a fifth of a window, at 0.6 ms each


@settings(deadline=None, max_examples=40)
@given(noise=NOISE, share=st.floats(0, 1))
def test_a_measurement_broken_anywhere_ends_as_if_it_had_not_been(
    root: Path, noise: dict[str, list[float]], share: float
) -> None:
    whole = list(noisy_windows(jobs(root), noise, BRIEF))
    kept = whole[: round(share * len(whole))]
    assert kept + list(noisy_windows(jobs(root), noise, BRIEF, kept)) == whole


@settings(deadline=None, max_examples=40)
@given(noise=NOISE, windows_wanted=st.integers(1, 5), max_s=st.floats(0.005, 0.5))
def test_a_job_is_measured_until_it_is_steady_and_no_longer_than_allowed(
    root: Path, noise: dict[str, list[float]], windows_wanted: int, max_s: float
) -> None:
    effort = replace(BRIEF, windows=windows_wanted, max_s=max_s)
    found = by_job(list(noisy_windows(jobs(root), noise, effort)))
    assert set(found) == set(NAMES)
    for taken in found.values():
        assert [window.round for window in taken] == list(range(len(taken)))
        assert len(taken) >= windows_wanted
        medians = [np.median(window.wall_ms) for window in taken]
        steady = [
            np.ptp(medians[end - windows_wanted : end]) <= 0.03 * np.median(medians[end - windows_wanted : end])
            for end in range(windows_wanted, len(taken) + 1)
        ]
        spent = np.cumsum([window.spent_s for window in taken])
        assert any(steady) or spent[-1] >= max_s
        assert not any(steady[:-1])
        assert len(taken) == windows_wanted or spent[-2] < max_s
        longest_run_s = 0.001 * (3 * 4 + 3 * 2 + 4 * LOOK_MS)
        assert all(window.spent_s <= max(max_s / windows_wanted, 0.01) + 3 * longest_run_s for window in taken)


def test_a_slow_graph_has_shorter_windows_but_as_many(root: Path) -> None:
    """Five runs of 20 s each would be 20 times the seconds that were allowed."""
    slow = {"a": [20_000.0], "b": [1.0], "head": [1.0]}
    taken = by_job(list(noisy_windows(jobs(root), slow, Effort())))["a"]
    assert [window.wall_ms for window in taken] == [(20_000.0,)] * 3


def test_what_never_is_steady_is_given_up_after_the_seconds_allowed(root: Path) -> None:
    found = by_job(list(noisy_windows(jobs(root), {"a": [1.0], "b": [1.0, 1.1], "head": [1.0]}, BRIEF)))
    assert {name: len(taken) for name, taken in found.items() if name not in ("a", "b")} == dict.fromkeys(NAMES[2:], 3)
    assert 0.2 <= sum(window.spent_s for window in found["b"]) < 0.22
    assert not summarise(found["b"], effort=BRIEF).steady
    assert summarise(found["head"], effort=BRIEF).steady


def test_nothing_is_opened_when_nothing_is_left_to_measure(root: Path) -> None:
    whole, library = windows(scripted(), jobs(root)), scripted()
    gone = [Window("gone", 7, (1.0,))]
    assert windows(library, jobs(root), earlier=whole + gone) == []
    assert library.log == []


def test_only_some_jobs_may_be_timed_and_the_rest_later(root: Path) -> None:
    some = windows(scripted(), jobs(root), measured=["null", "b"])
    assert {name: len(taken) for name, taken in by_job(some).items()} == {"b": 3, "null": 3}
    rest = windows(scripted(), jobs(root), earlier=some)
    assert {name: len(taken) for name, taken in by_job(rest).items()} == dict.fromkeys(set(NAMES) - {"b", "null"}, 3)


def test_the_reference_warms_the_device_up_for_a_time(root: Path) -> None:
    library = scripted()
    next(events(library, jobs(root), Effort(warm_up_s=1.0)))
    ran = [name for verb, name in library.log if verb == "run"]
    first = next(place for place, name in enumerate(ran) if name != "tick")
    assert first == pytest.approx(1000 / 0.6, abs=10)  # at 0.6 ms each: a second, and a run or two that prepare


def test_all_engines_are_closed_also_when_the_caller_stops(root: Path) -> None:
    library = scripted()
    going = events(library, jobs(root))
    next(going)
    going.close()  # type: ignore[attr-defined]
    loaded = sorted(name for verb, name in library.log if verb == "load")
    assert loaded
    assert loaded == sorted(name for verb, name in library.log if verb == "close")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([Job("b", Path("b.onnx"))], r"job b: nothing produces exit1 \(1, 1\)"),
        ([Job("b", Path("b.onnx"), "a")], "no job 'a'"),
        ([Job("null", None)], "job null: nothing produces counts"),
        ([Job("download", None, "a"), Job("a", Path("a.onnx"))], "job download: nothing produces labels"),
        ([Job("mystery", None)], "no job 'mystery'"),
        ([Job("a", Path("a.onnx"), "upload"), Job("upload", None)], "job upload is not a graph"),
    ],
)
def test_a_job_that_cannot_be_fed_is_named(root: Path, wrong: list[Job], words: str) -> None:
    here = [replace(job, path=job.path and root / job.path) for job in wrong]
    with pytest.raises(InputError, match=words):
        windows(scripted(), here, reference=here[0].name)


def test_a_reference_that_is_no_job_is_named(root: Path) -> None:
    with pytest.raises(InputError, match="reference 'baseline' is not among the 7 jobs"):
        windows(scripted(), jobs(root), reference="baseline")


def test_each_graph_tells_once_what_it_costs_to_hold(root: Path) -> None:
    library = scripted()
    library.graphs = {**library.graphs, "b": replace(library.graphs["b"], scratch_bytes=4096)}
    found = list(events(library, jobs(root), most_open=2))
    opened = [event for event in found if isinstance(event, Opened)]
    assert sorted(opened, key=lambda one: one.job) == [
        Opened("a", LOOK_MS, 10, None),
        Opened("b", LOOK_MS, 10, 4096),
        Opened("head", LOOK_MS, 40, None),
        Opened("tick", LOOK_MS, 40, None),
    ]
    for name in COSTS_MS:
        told = [type(event) for event in found if event.job == name]
        assert told == [Opened] + [Window] * (len(told) - 1)


def times(found: Sequence[Window]) -> list[tuple[str, int, float]]:
    """What is told of each window, however many runs it has."""
    return [(window.job, window.round, window.median_ms) for window in found]


def most_open(library: FakeLibrary) -> int:
    steps = [{"load": 1, "close": -1}.get(verb, 0) for verb, _ in library.log]
    return int(np.cumsum(steps).max())


def test_more_graphs_than_may_be_open_are_measured_all_the_same(root: Path) -> None:
    library = scripted()
    assert times(windows(library, jobs(root), most_open=1)) == times(windows(scripted(), jobs(root)))
    assert most_open(library) == 3


def test_fewer_engines_stay_open_when_memory_is_scarce(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_pool, "_memory_is_scarce", lambda: True)
    library = scripted()
    assert len(windows(library, jobs(root))) == 18
    assert most_open(library) == 3


@pytest.mark.parametrize(
    ("text", "scarce"),
    [
        ("MemTotal:  8000 kB\nMemFree: 9 kB\nMemAvailable:  999 kB\n", True),
        ("MemTotal:  8000 kB\nMemFree: 9 kB\nMemAvailable: 1000 kB\n", False),
        ("MemTotal:  8000 kB\nMemFree: 9 kB\n", False),
        ("no memory\n", False),
        ("", False),
    ],
)
def test_memory_is_scarce_below_an_eighth_where_the_system_tells(tmp_path: Path, text: str, scarce: bool) -> None:
    path = tmp_path / "meminfo"
    path.write_text(text)
    assert job_pool._memory_is_scarce(path) == scarce
    assert not job_pool._memory_is_scarce(tmp_path / "none")


def test_engines_that_take_the_memory_of_another_make_room(root: Path) -> None:
    """A GPU that is full refuses the next engine, or its run; what is open is closed, and it has a second chance."""
    library = replace(scripted(), room=3)
    assert times(windows(library, jobs(root))) == times(windows(scripted(), jobs(root)))
    assert most_open(library) == 3


def test_a_graph_that_fails_for_itself_is_named(root: Path) -> None:
    with pytest.raises(EngineError, match=r"there is no graph .*gone.onnx"):
        windows(scripted(), [*jobs(root), Job("gone", root / "gone.onnx")])


def test_power_is_asked_for_between_runs_and_not_too_often(root: Path) -> None:
    library = scripted()
    asked: list[int] = []

    def power() -> float | None:
        asked.append(library.now_ns)
        library.now_ns += 5 * MS  # a slow sensor, that at times gives nothing
        return None if len(asked) % 3 == 0 else float(len(asked))

    effort = replace(BRIEF, window_s=0.1, max_s=1.0)
    window = next(event for event in events(library, jobs(root)[:1], effort, power=power) if isinstance(event, Window))
    assert window.wall_ms == (1.0,) * len(window.wall_ms)
    assert min(np.diff(asked)) >= 25 * MS
    assert len(asked) == 4
    assert window.power_mw == pytest.approx((1 + 2 + 4) / 3)
    short = next(event for event in events(library, jobs(root)[:1], power=power) if isinstance(event, Window))
    assert short.power_mw is None  # over before a sensor could tell of this job rather than the one before


def test_frames_follow_each_other_in_a_circle(root: Path) -> None:
    """In a cascade the last graph of a frame runs just before the first one of the next."""
    library = scripted()
    pairs = (("a", "head"), ("b", "a"), ("head", "b"))
    circle = [Job(name, root / f"{name}.onnx", before) for name, before in pairs]
    for order in (circle, circle[1:] + circle[:1], circle[2:] + circle[:2]):
        found = {event.job for event in events(library, order) if isinstance(event, Window)}
        assert found == {"a", "b", "head"}


def test_real_graphs_are_measured(tmp_path: Path) -> None:
    graphs = small_network.graph_set(tmp_path)
    head = f"head-{small_network.HEADS[1]}"
    chain = [("segment-0-1", None), ("segment-1-2", "segment-0-1"), ("segment-0-2", None), (head, "segment-1-2")]
    todo = [Job(name, graphs.path(name), before) for name, before in [*chain, ("output-4x6", head)]]
    todo += [Job("upload", None), Job("download", None, "output-4x6"), Job("null", None, head)]
    effort = Effort(window_s=0.001, max_s=0.01, warm_up_s=0.001)
    library = open_library("onnxruntime", threads=1)
    task = MeasureTask(todo, small_network.frame(0), small_network.thresholds(), "segment-0-2")
    found = list(measure(library, task, effort))
    taken = by_job([event for event in found if isinstance(event, Window)])
    assert set(taken) == {job.name for job in todo}
    assert all(len(each) >= 3 and min(window.wall_ms) > 0 for each in taken.values() for window in each)
    opened = {event.job: event for event in found if isinstance(event, Opened)}
    assert set(opened) == {job.name for job in todo if job.path is not None}
    assert opened[head].file_bytes == graphs.path(head).stat().st_size
    assert all(each.load_ms > 0 and each.scratch_bytes is None for each in opened.values())
