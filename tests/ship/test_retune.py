"""Thresholds chosen again on a device: the fastest with the promised mIoU, by an independent calculation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest

from mess_compile.bundle.write import write_retuned
from mess_compile.device.remote import Remote, parse_host
from mess_compile.evaluate.statistics import ExitStatistics, read_statistics
from mess_compile.reporter import SILENT
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle import archive, manifest
from mess_compile.runtime.serve.verify import verify_bundle
from mess_compile.search.plan import Stage
from mess_compile.ship.retune import Choice, chosen_stages, retune
from tests import small_network
from tests.commands import ANY_SPEED, printed_json
from tests.remote_device import Device, remote_device
from tests.search import cases
from tests.shipping import keys
from tests.small_network import changed_bundle


def all_leave_at_once(described: manifest.Manifest) -> manifest.Manifest:
    """A plan whose first exit is far too confident, as if by the device's precision; it promises older figures."""
    (plan,) = described.plans
    stages = (replace(plan.stages[0], cut=0), *plan.stages[1:])
    points = tuple(
        replace(point, decisions=(manifest.Decision(stages[0].row, 0), *point.decisions[1:]))
        if point.name == "default"
        else point
        for point in plan.operating_points
    )
    return replace(described, plans=(replace(plan, stages=stages, operating_points=points),))


def miou(statistics: ExitStatistics, heads: list[str], exits: list[int]) -> float:
    """In percent, image by image and class by class."""
    found = []
    for label in range(len(statistics.classes)):
        right = total = labelled = 0
        for image, exit_ in enumerate(exits):
            head = statistics.heads.index(heads[exit_])
            right += int(statistics.intersection[image, head, label])
            total += int(statistics.predicted[image, head, label])
            labelled += int(statistics.labelled[image, label])
        if labelled:
            found.append(right / (total + labelled - right))
    return 100 * sum(found) / len(found)


def exits_of(statistics: ExitStatistics, stages: tuple[Stage, ...]) -> list[int]:
    taken = []
    for image in range(statistics.images):
        for index, stage in enumerate(stages):
            count = int(statistics.counts[image, statistics.heads.index(stage.head), stage.row])
            if index == len(stages) - 1 or (stage.cut is not None and count >= stage.cut):
                taken.append(index)
                break
    return taken


def cost_ms(plan: manifest.BundlePlan, exit_: int) -> float:
    reached = plan.costs[: exit_ + 1]
    return plan.upload_mean_ms + sum(cost.mean_ms for cost in reached) + reached[-1].report_mean_ms


@pytest.fixture(scope="module")
def known(finished: Path) -> tuple[ExitStatistics, manifest.BundlePlan, tuple[Stage, ...]]:
    """What the plan was chosen by, and the plan."""
    statistics = read_statistics(finished / "statistics" / "val")
    with closing(archive.open_archive(finished / "host.mess")) as opened:
        (plan,) = opened.manifest.plans
    stages = tuple(Stage(stage.exit_point, stage.head, stage.row, stage.cut) for stage in plan.stages)
    return statistics, plan, stages


def test_thresholds_that_reach_the_promised_figures_stay(
    known: tuple[ExitStatistics, manifest.BundlePlan, tuple[Stage, ...]],
) -> None:
    assert chosen_stages(*known) == known[2]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> manifest.BundlePlan:
    path = tmp_path_factory.mktemp("bundle") / "street.mess"
    small_network.write_bundle(path)
    (plan,) = archive.read_manifest(path).plans
    return plan


@dataclass(frozen=True)
class Made:
    """Made-up statistics, a plan of three exits or two, and what all its decisions come to: ms of all images, mIoU.

    At an exit some images leave, all but some, or none. Where all left, those behind it were none of the plan's.
    """

    statistics: ExitStatistics
    plan: manifest.BundlePlan
    outcomes: dict[tuple[Stage, ...], tuple[float, float]]

    def chosen(self, miou: float) -> tuple[float, float]:
        """What those come to that take the place of the slowest, where the plan promised this mIoU in no time."""
        predicted = replace(self.plan.predicted, miou=miou, latency_ms=0.0)
        slowest = max(self.outcomes, key=lambda stages: self.outcomes[stages])
        found = chosen_stages(self.statistics, replace(self.plan, predicted=predicted), slowest)
        return outcome(self.plan, self.statistics, found)


def made(described: manifest.BundlePlan, seed: int, exits: int) -> Made:
    statistics = cases.evidence((1,) * (exits - 1), 3, 10, seed, distinct=4).statistics
    costs = tuple(manifest.StageCost(3.0 + 2 * exit_, 9.0, 2.0 - exit_ / 2, 9.0) for exit_ in range(exits))
    plan = replace(described, costs=costs, upload_mean_ms=0.5)
    decisions = []
    for index, head in enumerate(statistics.heads[:-1]):
        counts = statistics.counts[:, index]
        cuts = {(row, int(cut)) for row in range(3) for cut in {*counts[:, row], 99} - {counts[:, row].min()}}
        decisions.append([Stage(index + 1, head, row, cut) for row, cut in cuts])
    last = Stage(exits, statistics.heads[-1], 0, None)
    all_stages = [(*early, last) for early in product(*decisions)]
    return Made(statistics, plan, {stages: outcome(plan, statistics, stages) for stages in all_stages})


def outcome(plan: manifest.BundlePlan, statistics: ExitStatistics, stages: tuple[Stage, ...]) -> tuple[float, float]:
    taken = exits_of(statistics, stages)
    return sum(cost_ms(plan, exit_) for exit_ in taken), miou(statistics, list(statistics.heads), taken)


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_that_change_more_than_was_promised_are_not_chosen(
    described: manifest.BundlePlan, seed: int
) -> None:
    """The last exit for every image changes as much as was promised; faster thresholds may change more."""
    case = made(described, seed, 3)
    statistics = replace(case.statistics, truth=manifest.OWN_OUTPUT)
    limit = changed_percent(statistics, [2] * statistics.images)
    plan = replace(
        case.plan,
        predicted=replace(case.plan.predicted, miou=0.0, latency_ms=0.0),
        promises=(manifest.Promise("change", limit, False, 0.0),),
    )
    fastest = min(case.outcomes, key=lambda stages: case.outcomes[stages])
    found = chosen_stages(statistics, plan, fastest)
    assert changed_percent(statistics, exits_of(statistics, found)) <= limit + 1e-6
    free = chosen_stages(statistics, replace(plan, promises=()), fastest)
    assert outcome(plan, statistics, free)[0] <= outcome(plan, statistics, found)[0]


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_that_lose_more_of_a_class_than_was_promised_are_not_chosen(
    described: manifest.BundlePlan, seed: int
) -> None:
    """The last exit for every image has just the IoU that was promised; faster thresholds may have less."""
    case = made(described, seed, 3)
    least = class_iou_percent(case.statistics, [2] * case.statistics.images, 0)
    name = case.statistics.classes[0]
    plan = replace(
        case.plan,
        predicted=replace(case.plan.predicted, miou=0.0, latency_ms=0.0),
        promises=(manifest.Promise("class_err_pp", 0.5, False, 0.0, name, least),),
    )
    fastest = min(case.outcomes, key=lambda stages: case.outcomes[stages])
    found = chosen_stages(case.statistics, plan, fastest)
    assert class_iou_percent(case.statistics, exits_of(case.statistics, found), 0) >= least
    free = chosen_stages(case.statistics, replace(plan, promises=()), fastest)
    assert outcome(plan, case.statistics, free)[0] <= outcome(plan, case.statistics, found)[0]


def class_iou_percent(statistics: ExitStatistics, exits: list[int], k: int) -> float:
    right = sum(int(statistics.intersection[image, exit_, k]) for image, exit_ in enumerate(exits))
    predicted = sum(int(statistics.predicted[image, exit_, k]) for image, exit_ in enumerate(exits))
    return 100 * (right / (predicted + int(statistics.labelled[:, k].sum()) - right))


def changed_percent(statistics: ExitStatistics, exits: list[int]) -> float:
    shares = []
    for image, exit_ in enumerate(exits):
        labelled, right = (int(of.sum()) for of in (statistics.labelled[image], statistics.intersection[image, exit_]))
        shares.append(round(10**9 * (labelled - right) / labelled) if labelled else 0)
    return sum(shares) / len(shares) / 1e7


@pytest.mark.parametrize(("seed", "exits"), [(seed, exits) for exits in (2, 3) for seed in range(4)])
def test_the_fastest_thresholds_with_the_promised_miou_are_chosen(
    described: manifest.BundlePlan, seed: int, exits: int
) -> None:
    case = made(described, seed, exits)
    mious = sorted(found for _, found in case.outcomes.values())
    for promised in (each - 1e-9 for each in (mious[0], mious[len(mious) // 2], mious[-4], mious[-1])):
        cost, found = case.chosen(promised)
        assert found >= promised
        assert cost == pytest.approx(min(cost for cost, found in case.outcomes.values() if found >= promised))


@pytest.mark.parametrize(("seed", "exits"), [(seed, exits) for exits in (2, 3) for seed in range(4)])
def test_the_most_accurate_thresholds_are_chosen_where_none_reach_it(
    described: manifest.BundlePlan, seed: int, exits: int
) -> None:
    case = made(described, seed, exits)
    best = max(found for _, found in case.outcomes.values())
    cost, found = case.chosen(best + 1e-6)
    assert found == pytest.approx(best)
    assert cost == pytest.approx(min(cost for cost, found in case.outcomes.values() if found > best - 1e-9))


def test_no_image_leaves_at_exits_that_are_always_wrong_on_the_device(described: manifest.BundlePlan) -> None:
    case = made(described, 0, 3)
    right = case.statistics.intersection.copy()
    right[:, :2] = 0
    statistics = replace(case.statistics, intersection=right)
    promised = miou(statistics, list(statistics.heads), [2] * statistics.images)
    plan = replace(case.plan, predicted=replace(case.plan.predicted, miou=promised - 1e-9))
    chosen = chosen_stages(statistics, plan, next(iter(case.outcomes)))
    assert set(exits_of(statistics, chosen)) == {2}


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Plans in fp16 and fp32 for one target."""
    graphs = small_network.graph_set(tmp_path / "graphs")
    parts = [small_network.part(graphs, small_network.plan(18), recipe) for recipe in ("fp16", "fp32")]
    small_network.write_parts(tmp_path / "several.mess", parts)
    return tmp_path / "several.mess"


def test_retuning_one_plan_leaves_the_others_unchanged(several: Path, tmp_path: Path) -> None:
    with closing(archive.open_archive(several)) as opened:
        bold, safe = opened.manifest.plans
        first = replace(bold.stages[0], cut=0)
        points = tuple(
            replace(point, decisions=(manifest.Decision(first.row, 0), *point.decisions[1:]))
            for point in bold.operating_points
        )
        changed = replace(bold, stages=(first, *bold.stages[1:]), operating_points=points)
        written = write_retuned(tmp_path / "again.mess", opened, changed)
        assert written.plans == (changed, safe)
        assert written.golden_of(safe) == opened.manifest.golden_of(safe)
        assert written.provenance == opened.manifest.provenance
        assert {golden.exit for golden in opened.manifest.golden_of(bold)} != {1}, "the change must matter"
    assert {golden.exit for golden in written.golden_of(bold)} == {1}
    for name in (bold.name, safe.name):
        golden = [check for check in verify_bundle(tmp_path / "again.mess", name) if check.name.startswith("golden")]
        assert len(golden) == 2
        assert all(check.passed for check in golden)


def test_one_of_several_plans_must_be_named(several: Path, tmp_path: Path) -> None:
    choice = Choice(tmp_path / "data", small_network.candidate(), None)
    remote = Remote(parse_host("ssh://nobody@127.0.0.1"))
    with closing(archive.open_archive(several)) as opened:
        for target in (None, "host", "xavier"):
            with pytest.raises(InputError, match=r"has the plans host:fp16, host:fp32: .* --target host:fp16"):
                retune(opened, choice, target, remote, tmp_path / "never.mess", SILENT)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.mark.slow
def test_a_device_with_other_results_gets_its_own_thresholds(
    running: Device,
    workspace: Path,
    known: tuple[ExitStatistics, manifest.BundlePlan, tuple[Stage, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", f"{running.path_folder()}:{os.environ['PATH']}")
    place, statistics, plan = f"{running.host}:~/street", known[0], known[1]
    data = ("--data", workspace / "data")
    (same,) = printed_json("-C", workspace, "ship", workspace / "host.mess", place, *data, *ANY_SPEED)["places"]
    assert same["retuned"]["changed"] is False
    assert same["retuned"]["found_miou"] == pytest.approx(plan.predicted.miou)
    bold = changed_bundle(workspace / "host.mess", tmp_path / "host.mess", all_leave_at_once)
    (other,) = printed_json("-C", workspace, "ship", bold, place, *data, *ANY_SPEED)["places"]
    assert other["retuned"]["changed"] is True
    assert other["sent_bytes"] < 64 * 1024, "only thresholds differ"
    heads = [stage.head for stage in plan.stages]
    at_once = miou(statistics, heads, [0] * statistics.images)
    assert other["retuned"]["found_miou"] == pytest.approx(at_once)
    with closing(archive.open_archive(running.home / "street" / "current")) as opened:
        (now,) = opened.manifest.plans
    chosen = tuple(Stage(stage.exit_point, stage.head, stage.row, stage.cut) for stage in now.stages)
    assert now.predicted.miou == pytest.approx(miou(statistics, heads, exits_of(statistics, chosen)))
    assert now.predicted.miou >= plan.predicted.miou
    assert now.tuned_by == f"{plan.library} on {plan.target}"
    own, _ = keys(tmp_path)
    signed = changed_bundle(bold, tmp_path / "signed.mess", lambda described: described, own)
    (refused,) = [line for line in _complaint(workspace, signed, place, *data) if "error" in line]
    assert "sign it again with --sign KEY" in refused
    printed_json("-C", workspace, "ship", signed, place, *data, "--sign", own, *ANY_SPEED)
    assert (running.home / "street" / "current" / "manifest.json.sig").exists()


def _complaint(workspace: Path, *arguments: str | Path) -> list[str]:
    from tests.commands import run

    result = run("-C", workspace, "ship", *arguments, *ANY_SPEED)
    assert result.exit_code == 1
    return result.stderr.splitlines()
