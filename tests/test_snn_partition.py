from __future__ import annotations

import math

import numpy as np
import pytest

from agent.protocol.errors import DataError, PlanDoesNotFit, ShoalError
from exporter.methods.snn.partition import (
    PartitionOptions,
    canonical,
    confusion_partitions,
    counts_for_budgets,
    enumerate_partitions,
    equal_counts,
    improved,
    partition_count,
    random_partition,
    search_partition,
    top_overlap,
)


def inside(affinity, partition):
    return float(sum(affinity[np.ix_(group, group)].sum() for group in partition))


def blocks(seed=0, classes=12, groups=3, noise=0.2):
    """Classes that are confused inside hidden groups, and a little everywhere."""
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(classes).reshape(groups, -1)
    table = rng.random((classes, classes)) * noise
    for group in hidden:
        table[np.ix_(group, group)] += 1
    np.fill_diagonal(table, 0)
    return table + table.T, canonical(hidden.tolist())


@pytest.mark.parametrize(
    ("classes", "devices", "counts"), [(10, 2, (5, 5)), (10, 3, (4, 3, 3)), (3, 3, (1, 1, 1))]
)
def test_devices_share_classes_equally_unless_told_otherwise(classes, devices, counts):
    assert equal_counts(classes, devices) == counts


@pytest.mark.parametrize("devices", [0, 11])
def test_more_devices_than_classes_is_refused(devices):
    with pytest.raises(PlanDoesNotFit, match=f"{devices} devices cannot share 10 classes"):
        equal_counts(10, devices)


def test_a_large_device_takes_more_classes_than_a_small_one():
    counts = counts_for_budgets(10, [500_000, 150_000_000], lambda count: 100_000 + 100_000 * count)

    assert counts == (1, 9)


def test_equal_budgets_give_equal_counts():
    assert counts_for_budgets(10, [10_000] * 3, lambda count: 1000 * count) == (4, 3, 3)


def test_budget_counts_make_the_largest_pressure_as_small_as_any_counts_could():
    budgets, classes = (7_000, 9_000, 20_000), 9

    def size(count):
        return 1500 + 700 * count + 60 * count**2

    counts = counts_for_budgets(classes, budgets, size)

    def worst(of):
        return max(size(k) / b for k, b in zip(of, budgets, strict=True))

    every = [(a, b, 9 - a - b) for a in range(1, 8) for b in range(1, 9 - a)]
    assert sum(counts) == classes
    assert worst(counts) == pytest.approx(min(map(worst, every)))


def test_every_device_too_small_for_one_class_is_named():
    with pytest.raises(PlanDoesNotFit) as refusal:
        counts_for_budgets(4, [900, 5000, 10], lambda count: 1000 * count, devices=["a", "b", "c"])

    assert "a: an SNN for one class needs 1_000 B, budget 900 B (over by 100 B)" in str(
        refusal.value
    )
    assert "c:" in str(refusal.value)
    assert "b:" not in str(refusal.value)


def test_a_fleet_too_small_for_all_classes_says_how_many_it_holds():
    with pytest.raises(PlanDoesNotFit, match=r"holds 3 of 5 classes \(a 1, b 2\): 2 have no"):
        counts_for_budgets(5, [1000, 2000], lambda count: 1000 * count, devices=["a", "b"])


@pytest.mark.parametrize("counts", [(5, 5), (4, 3, 3), (2, 2, 2), (3, 1, 1, 2), (1, 1, 1), (6,)])
def test_enumeration_lists_every_partition_once(counts):
    listed = list(enumerate_partitions(counts))

    assert len(listed) == len(set(listed)) == partition_count(counts)
    for partition in listed:
        assert tuple(map(len, partition)) == counts
        assert sorted(c for group in partition for c in group) == list(range(sum(counts)))
        assert canonical(partition) == partition


def test_counts_of_the_paper_scale_candidates():
    assert partition_count((5, 5)) == 126
    assert partition_count((4, 3, 3)) == 2100
    assert partition_count((2,) * 5) == 945
    assert partition_count((50, 50)) == math.comb(100, 50) // 2


def test_random_partitions_reach_every_candidate():
    rng = np.random.default_rng(0)

    drawn = {random_partition((2, 2, 1), rng) for _ in range(500)}

    assert drawn == set(enumerate_partitions((2, 2, 1)))


def test_groups_of_one_size_are_interchangeable_and_sizes_keep_their_places():
    assert canonical([[5, 4], [3], [1, 0], [2]]) == ((0, 1), (2,), (4, 5), (3,))


def test_small_search_is_exhaustive_and_returns_the_best_real_score():
    affinity, hidden = blocks(classes=6, groups=2)
    evaluated = []

    def evaluate(partitions):
        evaluated.extend(partitions)
        return [-inside(affinity, p) for p in partitions]  # reality contradicts the estimate

    options = PartitionOptions(evaluated_share=0.5, evaluated_at_most=5)
    found = search_partition((3, 3), lambda p: inside(affinity, p), evaluate, options=options)

    assert found.exhaustive
    assert len(found.ranking) == found.possible == 10
    assert evaluated[0] == hidden == found.ranking[0].partition
    assert [x.partition for x in found.evaluated] == evaluated
    assert len(evaluated) == 5
    assert found.best.real == max(x.real for x in found.evaluated)
    assert found.best.partition == evaluated[-1]


def test_five_percent_of_the_candidates_are_evaluated():
    found = search_partition((5, 5), lambda p: sum(p[0]), lambda ps: [0.0] * len(ps))

    assert len(found.evaluated) == math.ceil(0.05 * 126)
    assert found.best == found.ranking[0]  # equal in reality: the estimate decides


def test_sampled_search_finds_the_hidden_groups_by_local_search():
    affinity, hidden = blocks()
    options = PartitionOptions(exhaustive_up_to=10, samples=30, seed=3)

    found = search_partition(
        (4, 4, 4), lambda p: inside(affinity, p), lambda ps: [0.0] * len(ps), options=options
    )

    assert not found.exhaustive
    assert found.ranking[0].partition == hidden


def test_search_is_a_function_of_its_seed():
    affinity, _ = blocks()
    options = PartitionOptions(exhaustive_up_to=10, samples=20, climbs=2, swaps=50, seed=7)

    def run():
        return search_partition(
            (4, 4, 4), lambda p: inside(affinity, p), lambda ps: [1.0] * len(ps), options=options
        )

    assert run() == run()


@pytest.mark.parametrize("sign", [1, -1])
def test_confusion_graph_seeds_both_groupings_of_confusable_classes(sign):
    affinity, hidden = blocks(noise=0.05)
    rng = np.random.default_rng(0)

    together, apart = confusion_partitions(affinity, (4, 4, 4), rng)

    assert together == hidden
    scores = [inside(affinity, random_partition((4, 4, 4), rng)) for _ in range(300)]
    assert inside(affinity, apart) <= min(scores)
    options = PartitionOptions(exhaustive_up_to=0, samples=1, climbs=0)
    found = search_partition(
        (4, 4, 4),
        lambda p: sign * inside(affinity, p),
        lambda ps: [0.0] * len(ps),
        options=options,
        confusions=affinity,
    )
    expected = inside(affinity, together if sign == 1 else apart)
    assert inside(affinity, found.best.partition) == pytest.approx(expected)


def test_classes_move_to_roomier_devices_up_to_their_limits():
    start = ((0, 1, 2), (3, 4, 5))

    moved = improved(
        start,
        lambda p: len(p[1]) + 0.01 * sum(p[1]),
        np.random.default_rng(0),
        tries=500,
        limits=(3, 5),
    )

    assert moved == ((0,), (1, 2, 3, 4, 5))


def test_swaps_keep_class_counts():
    start = ((0, 1, 2), (3, 4, 5), (6,))

    best = improved(start, lambda p: p[2][0] * -1.0, np.random.default_rng(0), tries=500)

    assert tuple(map(len, best)) == (3, 3, 1)
    assert best[2] == (0,)


def test_local_search_asks_no_more_than_it_may():
    asked = []

    improved(
        ((0, 1, 2), (3, 4, 5)), lambda p: asked.append(p) or 0.0, np.random.default_rng(0), tries=4
    )

    assert len(asked) == 1 + 4


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ShoalError, match="has the score nan"):
        search_partition((1, 1), lambda p: math.nan, lambda ps: [0.0] * len(ps))


def test_options_name_every_value_that_is_out_of_range():
    with pytest.raises(DataError) as refusal:
        PartitionOptions(samples=0, evaluated_share=1.5)

    assert "samples" in str(refusal.value)
    assert "evaluated_share" in str(refusal.value)


def test_top_overlap_counts_the_truly_best_among_the_estimated_best():
    real = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]

    assert top_overlap(real, real) == 1
    assert top_overlap([9, 8, 0, 7, 1, 1, 1, 1, 1, 1], real) == pytest.approx(2 / 3)
    assert top_overlap([-x for x in real], real) == 0
