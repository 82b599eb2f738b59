"""What a plan promises for unseen images must hold there: by direct sums, and on a population that is known."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import guarantee as benchmark
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.runtime.base.errors import InputError, RequirementError, StaleError
from mess_compile.search.guarantees import (
    certification_split,
    certify,
    cross_validation_folds,
    least_sequences,
    optimism,
    parse_confidence,
)
from mess_compile.search.metrics import Evidence, figures_of_stages
from mess_compile.search.plan import Plan
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.risk import (
    Limits,
    Pairs,
    bootstrap_bounds_pp,
    certified_in_turn,
    log_capital,
    pairs_of_plans,
    risk_bound,
    safest_first,
    stake_for,
)
from mess_compile.search.solver import search
from tests.search.brute_force import BrutePlan, all_plans, baseline_of, cost_of_exit, miou_of
from tests.search.cases import against_own_output, evidence, with_baseline_alone
from tests.search.test_solver import brute_identity, identity, key, satisfies

BOLD = 5.0  # a stake above what any mean allows: all is bet


def with_groups(case: Evidence, group: list[str]) -> Evidence:
    """The case with these sequences, each image with labelled pixels."""
    labelled = case.statistics.labelled + 1
    statistics = dataclasses.replace(case.statistics, group=tuple(group), labelled=labelled)
    return dataclasses.replace(case, statistics=statistics)


# Optimism


def heads_taken(case: Evidence, plan: BrutePlan, images: list[int]) -> list[str]:
    """The head at which each image leaves, image by image."""
    statistics = case.statistics
    taken = []
    for image in images:
        leaves = [
            head
            for head, row, cut in zip(plan.heads, plan.rows, plan.cuts, strict=False)
            if statistics.counts[image, statistics.heads.index(head), row] >= cut
        ]
        taken.append((*leaves, plan.heads[-1])[0])
    return taken


def part(case: Evidence, images: list[int]) -> Evidence:
    return dataclasses.replace(case, statistics=case.statistics.select(images))


def expected_optimism(case: Evidence, folds: list[list[int]], max_err_pp: float) -> tuple[float, float, float]:
    """(pp of mIoU, percent of latency, spread) by a plain enumeration of every plan on the other folds."""
    n = case.statistics.images
    name = baseline_of(case)[0]
    scored = case.candidate.baseline if name == "baseline" else name
    answers, predicted_gains, differences, predicted_ns, held_ns = [""] * n, [], [], 0.0, 0
    for held in folds:
        rest = part(case, [i for i in range(n) if i not in held])
        allowed = [p for p in all_plans(rest, "input-dependent", 2) if p.miou >= baseline_of(rest)[1] - max_err_pp]
        best = min(allowed, key=lambda plan: (plan.cost_ns, -plan.miou, plan.graphs, plan.text))
        taken = heads_taken(case, best, held)
        predicted_gains.append(best.miou - miou_of(rest, [scored] * rest.statistics.images))
        unseen = part(case, held)
        differences.append(predicted_gains[-1] - (miou_of(unseen, taken) - miou_of(unseen, [scored] * len(held))))
        predicted_ns += best.cost_ns / rest.statistics.images * len(held)
        held_ns += sum(cost_of_exit(case, best, best.heads.index(head)) for head in taken)
        for image, head in zip(held, taken, strict=True):
            answers[image] = head
    pooled = miou_of(case, answers) - miou_of(case, [scored] * n)
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
    return sum(predicted_gains) / len(predicted_gains) - pooled, 100 * (held_ns / predicted_ns - 1), spread


@pytest.mark.parametrize("seed", range(6))
def test_optimism_is_what_plans_chosen_without_a_fold_lose_on_it(seed: int) -> None:
    case = evidence((2, 1), 2, images=15, seed=seed)
    case = with_baseline_alone(case, 0.004, seed) if seed % 2 else case
    case = with_groups(case, [f"drive{i // 3}" for i in range(15)])
    max_err_pp = 60.0 if seed % 2 else 3.0  # the random one trained alone is far better
    found = optimism([case], Requirement(max_err_pp=max_err_pp))
    expected = expected_optimism(case, [list(range(3 * i, 3 * i + 3)) for i in range(5)], max_err_pp)
    assert (found.miou_pp, found.latency_percent, found.spread_pp) == pytest.approx(expected, abs=1e-9)
    assert (found.folds, found.method) == (5, "cross-validation over 5 folds of 5 sequences")
    assert (found.images, found.groups) == (15, 5)


def test_with_fewer_sequences_than_folds_blocks_of_images_stand_in_and_it_says_so() -> None:
    case = with_groups(evidence((1, 1), 2, images=12, seed=3), ["a"] * 7 + ["b"] * 5)
    found = optimism([case], Requirement(max_err_pp=3.0), folds=4)
    expected = expected_optimism(case, [list(range(3 * i, 3 * i + 3)) for i in range(4)], 3.0)
    assert (found.miou_pp, found.latency_percent, found.spread_pp) == pytest.approx(expected, abs=1e-9)
    assert "4 blocks of images in order (2 sequences are fewer than 4 folds" in found.method
    assert (found.images, found.groups) == (12, 2)


def test_folds_on_which_no_plan_satisfies_are_left_out_and_counted() -> None:
    case = evidence((1, 1), 2, images=12, seed=4)
    parts, _ = cross_validation_folds(case.statistics.group, 4)
    best = []
    for held in parts:
        rest = part(case, [i for i in range(12) if i not in held])
        best.append(max(plan.miou for plan in all_plans(rest, "input-dependent", 2)))
    wanted = sorted(best)[1]
    found = optimism([case], Requirement(max_err_pp=0.0, baseline_miou=wanted), folds=4)
    assert (found.folds, found.method.split("; ")[1]) == (3, "left out: 1")
    with pytest.raises(RequirementError, match="for only 1 of 4 folds"):
        optimism([case], Requirement(max_err_pp=0.0, baseline_miou=max(best)), folds=4)


def test_one_image_tells_no_optimism() -> None:
    with pytest.raises(RequirementError, match="1 image is too few"):
        optimism([evidence((1,), 2, images=1, seed=0)], Requirement())


@pytest.mark.parametrize(("setting", "deadline"), [("budgeted", None), ("anytime", None), ("anytime", 0.02)])
def test_optimism_of_settings_in_which_every_image_takes_the_same_way(setting: str, deadline: float | None) -> None:
    case = with_groups(evidence((2, 1), 2, images=20, seed=8), [f"image{i}" for i in range(20)])
    found = optimism([case], Requirement(setting=setting, deadline_ms=deadline))
    assert found.latency_percent == pytest.approx(0.0, abs=1e-9)
    assert found.method == "cross-validation over 5 folds of 20 images"


@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=40), st.integers(2, 6))
def test_every_image_is_in_one_fold_and_no_sequence_in_two(groups: list[str], folds: int) -> None:
    parts, _ = cross_validation_folds(groups, folds)
    assert sorted(i for held in parts for i in held.tolist()) == list(range(len(groups)))
    assert all(len(held) for held in parts)
    if len(set(groups)) >= folds:
        assert len(parts) == folds
        assert sum(len({groups[i] for i in held}) for held in parts) == len(set(groups))


# The split


@settings(max_examples=50)
@given(st.integers(180, 400), st.integers(1, 4), st.integers(0, 10**6))
def test_no_sequence_is_chosen_on_and_certified_on(sequences: int, frames: int, seed: int) -> None:
    case = evidence((1,), 1, images=sequences * frames, seed=1)
    group = np.random.default_rng(seed).permutation(np.repeat(np.arange(sequences), frames))
    labelled = case.statistics.labelled.copy()
    labelled[3] = 0
    statistics = dataclasses.replace(case.statistics, group=tuple(map(str, group)), labelled=labelled)
    chosen, held = certification_split(statistics, Limits(2.0), 0.95, seed)
    assert not {statistics.group[i] for i in chosen} & {statistics.group[i] for i in held}
    assert sorted([*chosen, *held]) == [i for i in range(statistics.images) if labelled[i].any()]
    assert len({statistics.group[i] for i in held}) >= 149  # 0.98^149 is the first power below 0.05
    again = certification_split(statistics, Limits(2.0), 0.95, seed)
    assert [*map(list, again)] == [list(chosen), list(held)]
    other = certification_split(statistics, Limits(2.0), 0.95, seed + 1)
    assert list(other[1]) != list(held)


@pytest.mark.parametrize(("limit_pp", "confidence"), [(1.0, 0.95), (0.5, 0.95), (2.0, 0.95), (1.0, 0.9), (5.0, 0.99)])
def test_too_few_images_are_refused_with_the_number_at_which_no_error_at_all_passes(
    limit_pp: float, confidence: float
) -> None:
    least = next(n for n in range(1, 10_000) if (1 - limit_pp / 100) ** n <= 1 - confidence)
    assert least_sequences(limit_pp, confidence) == least
    flawless = np.zeros(least)
    assert risk_bound(flawless, BOLD, confidence) <= limit_pp / 100
    assert risk_bound(flawless[1:], BOLD, confidence) > limit_pp / 100
    case = evidence((1,), 1, images=least + 19, seed=2)
    case = with_groups(case, [f"image{i}" for i in range(least + 19)])
    with pytest.raises(
        InputError, match=rf"{least + 19} labelled independent images are too few .* at least {least + 20} "
    ):
        certify([case], Requirement(max_err_pp=limit_pp), confidence)


def test_frames_of_few_drives_are_not_taken_for_independent_images() -> None:
    case = with_groups(evidence((1,), 1, images=2000, seed=2), [f"drive{i % 4}" for i in range(2000)])
    with pytest.raises(InputError, match=r"2000 labelled images of 4 independent sequences .* at least 319 "):
        certify([case], Requirement(max_err_pp=1.0), 0.95)


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        (Requirement(), "give --max-err 1% too"),
        (Requirement(max_err_pp=1.0, baseline_miou=54.24), "leave --baseline out"),
        (Requirement(max_err_pp=0.0), "no number of images can certify --max-err 0%"),
        (Requirement(max_err_pp=100.0), "no number of images can certify --max-err 100%"),
    ],
)
def test_a_requirement_with_nothing_to_certify_is_refused(requirement: Requirement, said: str) -> None:
    with pytest.raises(InputError, match=said):
        certify([evidence((1,), 1, images=400, seed=2)], requirement, 0.95)


def test_a_confidence_is_written_in_percent() -> None:
    assert parse_confidence("95%") == 0.95
    assert parse_confidence(" 99.9 % ") == pytest.approx(0.999)
    for text in ("95", "0.95", "100%", "49%", "-5%", "nan%", "a lot"):
        with pytest.raises(InputError, match="write 95%"):
            parse_confidence(text)
    with pytest.raises(InputError, match="confidence of 95 is not"):
        certify([evidence((1,), 1, images=400, seed=2)], Requirement(max_err_pp=1.0), 95)


def test_recipes_evaluated_on_other_images_are_refused() -> None:
    cases = [evidence((1,), 1, images=n, seed=2) for n in (6, 7)]
    for call in (lambda: optimism(cases, Requirement()), lambda: certify(cases, Requirement(max_err_pp=1.0), 0.95)):
        with pytest.raises(StaleError, match="different images"):
            call()


# What is tested


@pytest.mark.parametrize("alone", [False, True])
def test_a_sequence_counts_once_however_many_frames_it_has(alone: bool) -> None:
    """Risk: the mean over frames of the share of labelled pixels wrong above the baseline's; pixels: plain sums."""
    case = with_groups(evidence((2, 1), 2, images=8, seed=5), list("abacaada"))
    case = with_baseline_alone(case, 0.004) if alone else case
    plans = search(case, Requirement()).front
    statistics, name = case.statistics, "baseline-alone" if alone else case.candidate.baseline
    pairs = pairs_of_plans([case], [case], plans, (0, name))
    for sequence, letter in enumerate("abcd"):
        frames = [i for i in range(8) if statistics.group[i] == letter]
        expected = {0: sum(statistics.labelled[i] for i in frames)}
        for j, plan in enumerate((None, *plans)):
            risk, right, predicted = 0.0, 0, 0
            for i in frames:
                stages = plan.stages if plan else ()
                leaves = [s.head for s in stages if s.cut is None or counted(statistics, i, s.head, s.row) >= s.cut]
                leaves = leaves or [name]
                took, base = statistics.scored.index(leaves[0]), statistics.scored.index(name)
                right, predicted = right + statistics.intersection[i, took], predicted + statistics.predicted[i, took]
                fewer = int(statistics.intersection[i, base].sum()) - int(statistics.intersection[i, took].sum())
                risk += fewer / int(statistics.labelled[i].sum()) / len(frames)
            expected[1 + 2 * j], expected[2 + 2 * j] = right, predicted
            if plan:
                assert pairs.risk[j - 1, sequence] == pytest.approx(risk, abs=1e-12)
        assert {row: list(pixels) for row, pixels in enumerate(pairs.pixels[sequence])} == {
            row: list(pixels) for row, pixels in expected.items()
        }


def counted(statistics: ExitStatistics, image: int, head: str, row: int) -> int:
    return int(statistics.counts[image, statistics.heads.index(head), row])


# The finite-sample bound


@pytest.mark.parametrize("mean", [0.002, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("stake", [0.2, 0.9, BOLD])
def test_the_bound_misses_the_mean_of_failures_no_more_often_than_promised(mean: float, stake: float) -> None:
    """By the binomial distribution itself: images fail wholly with probability `mean`, or not at all."""
    n, missed = 320, 0.0
    for failures in range(n + 1):
        probability = math.comb(n, failures) * mean**failures * (1 - mean) ** (n - failures)
        if probability < 1e-12:
            continue
        risk = np.array([1.0] * failures + [0.0] * (n - failures))
        missed += probability * (risk_bound(risk, stake, 0.95) < mean)
    assert missed <= 0.05


@pytest.mark.parametrize("stake", [0.3, 1.0])
def test_a_bet_against_the_truth_gains_nothing_on_average(stake: float) -> None:
    """Risks of -0.5, 0 and 1 with a mean of 0.02: the capital's expectation, summed over all outcomes of 12 images."""
    values, chances = (-0.5, 0.0, 1.0), (0.06, 0.89, 0.05)
    n, expectation = 12, 0.0
    for better in range(n + 1):
        for worse in range(n + 1 - better):
            counts = (better, n - better - worse, worse)
            ways = math.factorial(n) // math.prod(map(math.factorial, counts))
            chance = ways * math.prod(p**k for p, k in zip(chances, counts, strict=True))
            expectation += chance * math.exp(log_capital(np.repeat(values, counts), 0.02, stake))
    assert expectation == pytest.approx(1.0, abs=1e-9)


risks = st.lists(st.floats(-1, 1), min_size=2, max_size=60)


@given(risks, st.floats(0.05, 3.0), st.data())
def test_more_risk_or_more_confidence_never_lowers_the_bound(
    risk: list[float], stake: float, data: st.DataObject
) -> None:
    bound = risk_bound(np.array(risk), stake, 0.95)
    assert max(-1.0, float(np.mean(risk))) <= bound <= 1
    place = data.draw(st.integers(0, len(risk) - 1))
    worse = [*risk[:place], data.draw(st.floats(risk[place], 1.0)), *risk[place + 1 :]]
    assert risk_bound(np.array(worse), stake, 0.95) >= bound - 1e-7
    assert risk_bound(np.array(risk), stake, 0.99) >= bound - 1e-7
    assert risk_bound(np.array(data.draw(st.permutations(risk))), stake, 0.95) == pytest.approx(bound, abs=1e-7)


def test_the_stake_makes_the_bound_of_small_risks_small() -> None:
    """Near Chernoff's of a normal distribution, 0.0077 above the mean; the range alone would give ten times that."""
    known, risk = np.random.default_rng(0).normal(0.002, 0.1, (2, 1000))
    bound = risk_bound(risk, stake_for(known, 1000, 0.95), 0.95)
    normal = math.sqrt(2 * math.log(20) / 1000) * 0.1
    assert risk.mean() + 0.95 * normal < bound < risk.mean() + 1.1 * normal


@pytest.mark.parametrize(("failures", "n", "limit"), [(0, 299, 0.01), (3, 500, 0.02), (12, 1000, 0.02), (40, 200, 0.3)])
def test_the_bound_it_is_compared_with_is_hoeffding_bentkus(failures: int, n: int, limit: float) -> None:
    mean = failures / n
    tail = sum(math.comb(n, k) * limit**k * (1 - limit) ** (n - k) for k in range(failures + 1))
    hoeffding = ((1 - limit) / (1 - mean)) ** (n - failures) * (limit / mean if failures else 1) ** failures
    assert benchmark.hoeffding_bentkus_p(mean, n, limit) == pytest.approx(min(1, hoeffding, math.e * tail), rel=1e-9)


# The bootstrap


def one_class(lost: np.ndarray, pixels: int = 1000) -> Pairs:
    """A plan that loses a share of each image's pixels to nobody, beside a perfect baseline: the drop is the mean."""
    n = len(lost)
    right = np.round(pixels * (1 - lost))
    columns = [np.full(n, pixels)] * 3 + [right, right]
    return Pairs(lost[None], np.stack(columns, axis=1)[:, :, None].astype(np.float64))


def test_the_bootstrap_bound_of_a_mean_is_that_of_the_normal_distribution() -> None:
    lost = np.round(np.random.default_rng(1).beta(1, 30, 900), 3)
    expected = 100 * (lost.mean() + 1.645 * lost.std() / math.sqrt(900))
    assert bootstrap_bounds_pp(one_class(lost).pixels, 0.95, 0)[0] == pytest.approx(expected, abs=0.03)


def test_the_same_images_are_drawn_for_plan_and_baseline() -> None:
    """A plan that is right wherever the baseline is loses nothing, however much images differ."""
    rng = np.random.default_rng(2)
    labelled = rng.integers(1, 100, (300, 1, 4))
    right = rng.integers(0, labelled + 1)
    pixels = np.concatenate([labelled, *[right, right + 5] * 2], axis=1).astype(np.float64)
    assert bootstrap_bounds_pp(pixels, 0.95, 0)[0] == 0.0


def test_a_class_that_a_resample_lacks_is_not_held_against_anyone() -> None:
    pixels = np.zeros((40, 5, 2))
    pixels[:, :, 0] = np.array([100, 100, 100, 90, 90])
    pixels[0, :, 1] = np.array([10, 10, 10, 9, 9])  # 0.9 in both classes, the second in one image of 40
    assert bootstrap_bounds_pp(pixels, 0.95, 0)[0] == pytest.approx(10.0)


# Plans tested in turn


def family_of(means: list[float], n: int, seed: int = 0, spread: float = 0.01) -> Pairs:
    """Plans from the boldest, with these risks and nothing lost in mIoU."""
    risk = np.array(means)[:, None] + np.random.default_rng(seed).normal(0, spread, (len(means), n))
    return Pairs(risk, np.ones((n, 3 + 2 * len(means), 1)))


def test_plans_are_tested_from_the_safest_and_the_first_failure_ends_it() -> None:
    chosen = family_of([0.004, 0.003, 0.002, 0.001], 1000)
    assert safest_first(chosen, Limits(1.0)) == [3, 2, 1, 0]
    held = family_of([0.001, 0.02, 0.002, 0.001], 1000, seed=1)  # the boldest would pass, but one before it fails
    verdict = certified_in_turn(chosen, held, Limits(1.0), 0.95, 0)
    assert (verdict.passed, verdict.tested) == (2, 3)
    assert 0.2 < verdict.risk_bound_pp <= 1.0
    everyone = certified_in_turn(chosen, chosen, Limits(1.0), 0.95, 0)
    assert (everyone.passed, everyone.tested) == (0, 4)
    nobody = certified_in_turn(chosen, family_of([0.02] * 4, 1000), Limits(1.0), 0.95, 0)
    assert (nobody.passed, nobody.tested) == (None, 1)
    assert nobody.risk_bound_pp > 1.0


def test_a_plan_that_is_neither_safer_nor_bolder_than_another_is_not_tested() -> None:
    assert safest_first(family_of([0.03, 0.02, 0.05, 0.01, 0.01], 200, spread=0.0), Limits(1.0)) == [3, 1, 0]


def test_a_drop_of_miou_fails_a_plan_whose_pixels_are_right_on_average() -> None:
    """A rare class that is lost costs few pixels: the bound on pixel error alone would not see it."""
    held = one_class(np.full(400, 0.0))
    rare = np.zeros((400, 5, 1))
    rare[:200] = np.array([1, 1, 1, 0, 0])[:, None]
    both = Pairs(held.risk, np.concatenate([held.pixels, rare], axis=2))
    assert certified_in_turn(held, held, Limits(1.0), 0.95, 0).passed == 0
    verdict = certified_in_turn(both, both, Limits(1.0), 0.95, 0)
    assert verdict.passed is None
    assert verdict.risk_bound_pp < 1.0 < verdict.drop_bound_pp == pytest.approx(50.0)


# A known population


@cache
def known() -> tuple[benchmark.Population, benchmark.Family]:
    graphs, table = benchmark.made_up_graphs()
    population = benchmark.population(graphs, 20_000, frames=1)
    return population, benchmark.family(graphs, table, population, images=500)


@pytest.mark.parametrize("bound_pp", [1.0, 2.0])
def test_risks_above_the_bound_are_certified_in_no_more_draws_than_promised(bound_pp: float) -> None:
    for of in (benchmark.without_miou(known()[1]), benchmark.rare_failures(bound_pp, 20_000)):
        row = benchmark.family_summary(of, 1000, bound_pp, draws=100)
        assert row["risk_violations"] <= row["allowed"]
    assert row["certified"] == row["risk_violations"], "the only plan is above the bound"


def test_the_certified_plan_keeps_most_of_the_saving() -> None:
    row = benchmark.family_summary(known()[1], 2000, 1.0, draws=15)
    assert row["drop_violations"] + row["risk_violations"] <= 2 * row["allowed"]
    assert row["saving_kept"] >= 70


@cache
def drawn(images: int = 900) -> Evidence:
    graphs, table = benchmark.made_up_graphs()
    population = known()[0]
    return population.evidence(graphs, table, population.drawn(np.random.default_rng(7), images))


def test_a_certified_plan_is_the_boldest_that_passed_and_says_on_what_grounds() -> None:
    case = drawn()
    requirement = Requirement(max_err_pp=1.0, max_exits=1)
    result = certify([case], requirement, 0.95, seed=3)
    guarantee, plan = result.plan.guarantee, result.plan
    assert guarantee.images_chosen + guarantee.images_certified == 900
    assert guarantee.groups == guarantee.images_certified == 450
    assert (guarantee.confidence, guarantee.seed, guarantee.risk_limit_pp, guarantee.miou_drop_limit_pp) == (
        0.95,
        3,
        1.0,
        1.0,
    )
    assert 0 < guarantee.risk_bound_pp <= 1.0
    assert 0 < guarantee.miou_drop_bound_pp <= 1.0
    assert "bootstrap" in guarantee.miou_method
    assert "independent draws" in guarantee.assumption
    assert guarantee.tested >= 2
    chosen, held = certification_split(case.statistics, Limits(1.0), 0.95, 3)
    on_part = search(part(case, chosen.tolist()), requirement)
    assert plan.predicted == figures_of_stages(part(case, chosen.tolist()), plan.setting, plan.stages)
    assert [point.name for point in plan.operating_points] == ["default"], "others were not certified"
    assert plan.predicted.latency_ms > on_part.plan.predicted.latency_ms
    assert {p.statistics_sha256 for p in (plan, *result.front)} == {case.statistics_sha256}, "of all that it came from"
    unseen = part(case, held.tolist())
    drop = unseen.baseline_miou("baseline") - figures_of_stages(unseen, plan.setting, plan.stages).miou
    assert drop < guarantee.miou_drop_bound_pp
    assert certify([case], requirement, 0.95, seed=3) == result
    assert certify([case], requirement, 0.95, seed=4) != result


def test_what_changes_is_certified_without_a_bound_on_miou() -> None:
    """The bound of the certified plan is the betting bound of its own changes, image by image."""
    case = against_own_output(drawn())
    result = certify([case], Requirement(max_change=30.0, max_exits=1), 0.95, seed=3)
    guarantee, plan = result.plan.guarantee, result.plan
    assert (guarantee.change_limit, guarantee.risk_limit_pp, guarantee.miou_drop_limit_pp) == (30.0, None, None)
    assert guarantee.risk_bound_pp is None
    chosen, held = certification_split(case.statistics, Limits(None, 30.0), 0.95, 3)
    shares = [changed_shares_of(part(case, rows.tolist()), plan) for rows in (chosen, held)]
    expected = 100 * risk_bound(shares[1], stake_for(shares[0], len(held), 0.95), 0.95)
    assert guarantee.change_bound == pytest.approx(expected)
    assert 100 * shares[1].mean() < guarantee.change_bound <= 30.0
    with pytest.raises(RequirementError, match=r"within 17 % of changed pixels .* raise --max-change, or"):
        certify([case], Requirement(max_change=17.0, max_latency=Limit(0.5, relative=True), max_exits=1), 0.95)


def changed_shares_of(case: Evidence, plan: Plan) -> np.ndarray:
    statistics, found = case.statistics, []
    for image in range(statistics.images):
        head = plan.stages[-1].head
        for stage in plan.stages[:-1]:
            if statistics.counts[image, statistics.heads.index(stage.head), stage.row] >= stage.cut:
                head = stage.head
                break
        index, labelled = statistics.head_index(head), int(statistics.labelled[image].sum())
        found.append((labelled - int(statistics.intersection[image, index].sum())) / labelled)
    return np.array(found)


def test_a_bound_on_changes_cannot_be_certified_against_labels() -> None:
    with pytest.raises(InputError, match="the evaluation is against labels"):
        certify([drawn()], Requirement(max_change=3.0), 0.95)


def plans_to_test(case: Evidence, requirement: Requirement) -> list[BrutePlan]:
    """From the boldest: the optimum, then the more careful ones of docs/guarantees.md, from every plan there is."""
    objective = "anytime" if requirement.setting == "anytime" else requirement.objective or "latency"
    plans = sorted(all_plans(case, requirement.setting, requirement.max_exits), key=lambda plan: key(plan, objective))
    bounds = dataclasses.replace(requirement, max_err_pp=None)
    allowed = [plan for plan in plans if satisfies(plan, bounds, case)]

    def best(err: float) -> list[BrutePlan]:
        return [plan for plan in allowed if plan.miou >= baseline_of(case)[1] - err][:1]

    found = best(requirement.max_err_pp)
    if objective == "accuracy":
        return found
    if objective != "anytime" and (objective != "latency" or requirement.max_latency is not None):
        return found + [plan for share in (0.75, 0.5, 0.25, 0.0) for plan in best(share * requirement.max_err_pp)]
    for plan in sorted(allowed, key=lambda plan: key(plan, "latency")):
        found += [plan] if plan.miou > found[-1].miou else []
    return found


@pytest.mark.parametrize(
    ("requirement", "seed", "place"),
    [
        (Requirement(max_exits=1), 21, 5),
        (Requirement(objective="workload", max_exits=1), 10, 4),
        (Requirement(objective="memory", max_exits=1), 41, 1),
        (Requirement(objective="energy", max_exits=1), 10, 4),
        (Requirement(objective="accuracy", max_exits=1), 1, 1),
        (Requirement(max_latency=Limit(2.5, relative=True), max_exits=1), 57, 3),
        (Requirement(setting="budgeted"), 37, 3),
        (Requirement(setting="anytime", max_exits=1), 1, 1),
    ],
)
def test_every_objective_and_setting_can_be_certified(requirement: Requirement, seed: int, place: int) -> None:
    """The plan is the one at its place, and what it loses on the images that it was not chosen on is bounded."""
    requirement = dataclasses.replace(requirement, max_err_pp=8.0)
    case = with_groups(evidence((2, 1), 2, images=90, seed=seed), [f"image{i}" for i in range(90)])
    chosen, held = (part(case, rows.tolist()) for rows in certification_split(case.statistics, Limits(8.0), 0.95, 0))
    plans = plans_to_test(chosen, requirement)
    plan = certify([case], requirement, 0.95).plan
    guarantee = plan.guarantee
    assert (guarantee.place, guarantee.candidates) == (place, len(plans))
    assert identity(plan) == brute_identity(plans[place - 1])
    taken = heads_taken(held, plans[place - 1], list(range(held.statistics.images)))
    if requirement.setting == "anytime":  # all take the report that was best where it was chosen
        best = max(plans[place - 1].heads, key=lambda head: miou_of(chosen, [head] * guarantee.images_chosen))
        taken = [best] * guarantee.images_certified
    name = baseline_of(chosen)[0].replace("baseline", case.candidate.baseline)
    assert (
        miou_of(held, [name] * guarantee.images_certified) - miou_of(held, taken) <= guarantee.miou_drop_bound_pp <= 8.0
    )
    assert 100 * mean_risk(held, name, taken) < guarantee.risk_bound_pp <= 8.0


def mean_risk(case: Evidence, baseline: str, taken: list[str]) -> float:
    """The mean over images of the share of labelled pixels that are wrong, less that of the baseline."""
    statistics, risks = case.statistics, []
    final = case.candidate.baseline
    for image, head in enumerate(final if head == "baseline" else head for head in taken):
        right, before = (int(statistics.intersection[image, statistics.heads.index(h)].sum()) for h in (head, baseline))
        risks.append((before - right) / int(statistics.labelled[image].sum()))
    return sum(risks) / len(risks)


@pytest.mark.parametrize(("seed", "place"), [(29, 1), (20, 3), (59, 2), (56, 1)])
@pytest.mark.parametrize("front_by", [("latency", "miou"), ("latency", "miou", "memory")])
def test_whatever_the_front_is_by_only_plans_that_keep_the_bounds_are_certified(
    seed: int, place: int, front_by: tuple[str, ...]
) -> None:
    """A front by memory holds plans beyond --max-memory, and plans that err no less and only take less memory."""
    case = with_groups(evidence((2, 1), 2, images=90, seed=seed), [f"image{i}" for i in range(90)])
    chosen = part(case, certification_split(case.statistics, Limits(8.0), 0.95, 0)[0].tolist())
    plans = sorted(all_plans(chosen, "input-dependent", 1), key=lambda plan: (plan.cost_ns, -plan.miou))
    limit = sorted({plan.memory for plan in plans})[3]
    rising: list[BrutePlan] = []
    for plan in plans:
        least = baseline_of(chosen)[1] - 8.0 if not rising else rising[-1].miou + 1e-9
        if plan.memory <= limit and plan.miou >= least:
            rising.append(plan)
    requirement = Requirement(max_err_pp=8.0, max_exits=1, max_memory_bytes=limit)
    found = certify([case], requirement, 0.95, front_by=front_by).plan
    assert found.predicted.memory_bytes <= limit
    assert (found.guarantee.place, found.guarantee.candidates) == (place, len(rising))
    assert found.predicted.miou == rising[place - 1].miou


def test_when_no_plan_passes_the_refusal_names_what_the_safest_reached() -> None:
    case = drawn()
    chosen, _ = certification_split(case.statistics, Limits(1.0), 0.95, 0)
    optimum = search(part(case, chosen.tolist()), Requirement(max_err_pp=1.0, max_exits=1)).plan
    barely = Limit(optimum.predicted.latency_ms + 0.01)  # no plan that is more careful is fast enough
    with pytest.raises(RequirementError, match=r"no plan can be certified within 1 pp at 95 % on 450 images .* pp of"):
        certify([case], Requirement(max_err_pp=1.0, max_latency=barely, max_exits=1), 0.95)


def test_of_several_recipes_the_best_baseline_is_what_errors_count_from() -> None:
    """An int8 plan next to a poor int8 baseline must not be certified for being next to it."""
    fp32 = drawn()
    worse = fp32.statistics.intersection - fp32.statistics.intersection // 20  # 5 % of what was right
    graphs = dataclasses.replace(fp32.graph_set, recipe="int8-1")
    entries = {key: dataclasses.replace(entry, mean_ms=entry.mean_ms / 2) for key, entry in fp32.table.entries.items()}
    table = dataclasses.replace(fp32.table, entries=entries, recipes={**fp32.table.recipes, "int8-1": graphs.identity})
    statistics = dataclasses.replace(fp32.statistics, intersection=worse, precision="int8-1", network=graphs.identity)
    int8 = Evidence(graphs, table, statistics)
    requirement = Requirement(max_err_pp=1.0, max_exits=1)
    alone = certify([int8], requirement, 0.95).plan
    both = certify([int8, fp32], requirement, 0.95).plan
    assert alone.precision == "int8-1"
    assert both.precision == fp32.graph_set.recipe
    assert both.statistics_sha256 == fp32.statistics_sha256
