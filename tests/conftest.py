import os
import platform
import sys
from collections.abc import Callable, Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from agent.broker import Broker, find_mosquitto, start_broker

# What tests read is piped; a worker of pytest-xdist is told the width of the terminal.
os.environ.pop("COLUMNS", None)

# The same examples in every run; how long one takes on a busy machine decides nothing.
settings.register_profile(
    "shoal", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shoal")

IMPOSSIBLE_HERE = {
    "PR_SET_PDEATHSIG is Linux's": sys.platform != "linux",
    "tflite_micro is not installed": (sys.platform, platform.machine()) != ("linux", "x86_64"),
}
"""Reasons to skip -> whether it is this platform that forbids the test; no other counts in CI."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a missing component fails the test that wants it."""
    report = yield
    return _no_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In CI a missing component fails the module that wants it."""
    report = yield
    return _no_skip(report)


def _no_skip(report):
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not IMPOSSIBLE_HERE.get(reason):
            report.outcome = "failed"
            report.longrepr = f"would be skipped outside CI: {reason}"
    return report


class Mosquitto:
    """The session's shared broker (host, port), and a starter of private ones to break."""

    def __init__(self, shared: Broker) -> None:
        self.shared = shared
        self.host = shared.host
        self.port = shared.port
        self.start: Callable[..., Broker] = start_broker


@pytest.fixture(scope="session")
def mosquitto() -> Iterator[Mosquitto]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    with start_broker() as broker:
        yield Mosquitto(broker)
