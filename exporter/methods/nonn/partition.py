"""Which student learns which filters: whole communities, balanced over the students' shares.

The released code groups communities by their size, drops the largest group and packs the rest
greedily. Here communities stay apart, what is dropped are the isolated filters, and students may
have unequal shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent.protocol.errors import PlanDoesNotFit

from .communities import FilterNetwork
from .network import Weights

SLACK = 1.25
"""A community larger than so many times the largest student's share is cut in two."""

Filters = tuple[int, ...]


def partition(network: FilterNetwork, shares: Sequence[float]) -> tuple[Filters, ...]:
    """Give every filter that is in a community to one student.

    Communities go, the largest first, to the student that is then least full for its share. One
    that is too large for any student, or all of them while there are fewer than students, are
    first cut where their links are weakest.

    Args:
        network: The teacher's.
        shares: Of each student, > 0; they need not add up to anything.

    Returns:
        The filters of each student, ascending, at least one each.

    Raises:
        PlanDoesNotFit: more students than filters in communities.
    """
    filters = sum(map(len, network.communities))
    if len(shares) > filters:
        raise PlanDoesNotFit(
            f"{len(shares)} students, but only {filters} of the teacher's filters fire together",
            "take fewer devices, or a teacher with more filters in its last convolution",
        )
    quota = np.asarray(shares, float) / sum(shares) * filters
    groups = list(network.communities)
    while True:
        largest = max(groups, key=len)
        if len(largest) < 2 or (
            len(groups) >= len(shares) and len(largest) <= max(SLACK * quota.max(), 2)
        ):
            break
        groups.remove(largest)
        groups += bisected(network.weights, largest)
    students: list[list[int]] = [[] for _ in shares]
    for done, group in enumerate(sorted(groups, key=lambda members: (-len(members), members))):
        empty = [i for i, student in enumerate(students) if not student]
        takers = empty if len(groups) - done <= len(empty) else range(len(students))
        least = min(takers, key=lambda i: (len(students[i]) + len(group)) / quota[i])
        students[least] += group
    return tuple(tuple(sorted(student)) for student in students)


def bisected(weights: Weights, members: Filters) -> tuple[Filters, Filters]:
    """Two halves of a community with weak links between them (Fiedler 1973).

    Args:
        weights: (F, F) of the whole network.
        members: At least two.
    """
    inside = weights[np.ix_(members, members)]
    laplacian = np.diag(inside.sum(axis=1)) - inside
    fiedler = np.linalg.eigh(laplacian)[1][:, 1]
    order = [members[i] for i in np.argsort(fiedler, kind="stable")]
    half = len(order) // 2
    return tuple(sorted(order[:half])), tuple(sorted(order[half:]))
