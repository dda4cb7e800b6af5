"""A teacher's filters: who fires with whom, which communities they form, who learns them."""

from __future__ import annotations

import numpy as np
import pytest

from agent.protocol.errors import DataError, PlanDoesNotFit
from exporter.methods.nonn.communities import (
    CommunityOptions,
    FilterNetwork,
    filter_network,
    louvain,
)
from exporter.methods.nonn.network import NetworkOptions, activation_network, strongest_links
from exporter.methods.nonn.partition import bisected, partition


def planted(groups: int = 4, each: int = 6, dead: int = 3, images: int = 400) -> np.ndarray:
    """Activations of filters that fire by groups; some never fire. Filters are shuffled."""
    rng = np.random.default_rng(3)
    active = rng.integers(0, groups, images)
    group = np.repeat(np.arange(groups), each)
    own = active[:, None] == group
    a = rng.random((images, groups * each)) * np.where(own, 1.0, 0.01)
    a = np.concatenate([a, -np.ones((images, dead))], axis=1).astype(np.float32)
    return a


def cliques(count: int, size: int, bridge: float = 0.05) -> np.ndarray:
    """A ring of cliques, neighbours joined by one weak link."""
    weights = np.zeros((count * size, count * size))
    for i in range(count):
        first = i * size
        weights[first : first + size, first : first + size] = 1
        onward = (first + size) % (count * size)
        weights[first + size - 1, onward] = weights[onward, first + size - 1] = bridge
    np.fill_diagonal(weights, 0)
    return weights


def network_of(*sizes: int) -> FilterNetwork:
    """Communities of these sizes, each fully linked."""
    ends = np.cumsum(sizes)
    communities = tuple(
        tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)
    )
    weights = np.zeros((ends[-1], ends[-1]))
    for members in communities:
        weights[np.ix_(members, members)] = 1
    np.fill_diagonal(weights, 0)
    return FilterNetwork(weights, weights.sum(1), communities, ())


def test_a_link_weighs_the_product_times_the_difference_summed_over_images():
    a = np.array([[1.0, 0.5, 0.25], [0.5, 1.0, -3.0], [2.0, 0.0, 1.0]], np.float32)

    got = activation_network(a, top=3)

    # image 1: 01 .25, 02 .1875, 12 .03125; image 2: 01 .25; image 3, divided by 2: 02 .25
    expected = np.array([[0, 0.5, 0.4375], [0.5, 0, 0.03125], [0.4375, 0.03125, 0]]) / 0.5
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_only_the_strongest_filters_of_an_image_count():
    a = np.array([[1.0, 0.6, 0.3, 0.2]], np.float32)

    linked = activation_network(a, top=2) > 0

    assert np.argwhere(linked).tolist() == [[0, 1], [1, 0]]


def test_images_come_in_any_order_and_scale():
    a = planted()
    order = np.random.default_rng(0).permutation(len(a))
    scale = np.random.default_rng(1).uniform(0.5, 2, (len(a), 1)).astype(np.float32)

    got = activation_network((a * scale)[order], top=5)

    np.testing.assert_allclose(got, activation_network(a, top=5), rtol=1e-4, atol=1e-7)


def test_paper_numbers_are_met_at_its_256_filters_and_scale_with_fewer():
    options = NetworkOptions()

    assert options.top_of(256) == 50
    assert options.percentile_of(256) == pytest.approx(99)
    links_each = (100 - options.percentile_of(64)) / 100 * 63 / 2
    assert links_each == pytest.approx(0.01 * 255 / 2)
    assert options.percentile_of(2) == 0


def test_cutting_keeps_links_from_the_percentile_on():
    weights = np.zeros((5, 5))
    upper = np.triu_indices(5, 1)
    weights[upper] = np.arange(10) / 9
    weights += weights.T

    kept = strongest_links(weights, 75)

    assert sorted(kept[upper][kept[upper] > 0]) == pytest.approx([7 / 9, 8 / 9, 1])


def test_planted_communities_are_found_and_dead_filters_are_isolated():
    found = filter_network(
        planted(), CommunityOptions(network=NetworkOptions(top=5, percentile=20))
    )

    assert sorted(found.communities) == [tuple(range(i, i + 6)) for i in (0, 6, 12, 18)]
    assert found.isolated == (24, 25, 26)
    assert all(found.hub(members) in members for members in found.communities)


def test_less_time_makes_more_communities():
    ring = cliques(12, 3, bridge=1)

    few, many = (louvain(ring, time=time, seed=0) for time in (4.0, 0.3))

    assert len(few) < len(many) == 12


def test_teacher_whose_filters_never_meet_is_refused():
    with pytest.raises(DataError, match="no two of the teacher's filters"):
        filter_network(np.eye(4, dtype=np.float32))


@pytest.mark.parametrize(
    ("sizes", "shares", "expected"),
    [
        ((6, 5, 4, 3), (1, 1), [9, 9]),
        ((6, 6, 4, 2), (2, 1), [12, 6]),
        ((5, 5, 5, 5, 5, 5), (3, 2, 1), [15, 10, 5]),
        ((12,), (1, 1, 1, 1), [3, 3, 3, 3]),
        ((2, 2), (100, 1), [2, 2]),
        ((2,), (1, 1), [1, 1]),
    ],
)
def test_students_get_whole_communities_in_proportion_to_their_shares(sizes, shares, expected):
    network = network_of(*sizes)

    students = partition(network, shares)

    assert [len(x) for x in students] == expected
    assert sorted(i for x in students for i in x) == list(range(sum(sizes)))


def test_communities_are_kept_whole_where_they_fit():
    network = network_of(6, 5, 4, 3)

    students = partition(network, (1, 1))

    for members in network.communities:
        assert sum(bool(set(members) & set(x)) for x in students) == 1


def test_a_community_too_large_for_any_student_is_cut_at_its_weakest_links():
    weights = cliques(2, 5)

    halves = bisected(weights, tuple(range(10)))

    assert sorted(halves) == [tuple(range(5)), tuple(range(5, 10))]


def test_more_students_than_filters_are_refused():
    with pytest.raises(PlanDoesNotFit, match="5 students, but only 4"):
        partition(network_of(2, 2), (1,) * 5)
