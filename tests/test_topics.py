"""Topics: what is built is read back, and other fleets' topics are not ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.topics import Topics

IDS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)
LEAVES = st.sampled_from(["status", "info", "stats", "res", "scores", "feat"])


def test_topics_of_a_fleet() -> None:
    topics = Topics("lab")
    assert topics.request == "shoal/lab/infer/req"
    assert topics.escalation == "shoal/lab/infer/up"
    assert topics.decision == "shoal/lab/decision"
    assert topics.last_decision == "shoal/lab/decision/last"
    assert topics.device("pi-door", "res") == "shoal/lab/dev/pi-door/res"
    assert topics.device("+", "status") == "shoal/lab/dev/+/status"


@given(IDS, IDS, LEAVES)
def test_sender_is_read_back(fleet: str, device: str, leaf: str) -> None:
    topics = Topics(fleet)
    assert topics.sender(topics.device(device, leaf)) == device


@given(IDS, IDS, IDS, LEAVES)
def test_other_fleets_have_no_senders_here(fleet: str, other: str, device: str, leaf: str) -> None:
    foreign = Topics(other).device(device, leaf)
    assert (Topics(fleet).sender(foreign) is None) == (fleet != other)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "dev/a/res",
        "shoal/lab/dev/a",
        "shoal/lab/dev//res",
        "shoal/lab/dev/a/",
        "shoal/lab/dev/a/res/more",
        "x/shoal/lab/dev/a/res",
        "shoal/lab/decision",
        "shoal/lab/decision/last",
        "shoal/lab/infer/req",
    ],
)
def test_other_topics_have_no_sender(topic: str) -> None:
    assert Topics("lab").sender(topic) is None
