"""Pytest plugin of the tests that run inside a Raspberry Pi userland.

A test module that has `pytest_plugins = ["tests.pi.fixtures"]` gets the session fixtures `arm64`
and `armhf` (each builds its userland on first use), `pi` (both in turn), and the rule of the marker
`pi`: such tests run when CI=true or SHOAL_TEST_PI=1 and are skipped, saying so, otherwise.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests.pi.userland import Userland, build

BUILD_TIMEOUT_S = 900
"""The first `pi` test of a fresh machine downloads a userland."""


def wanted() -> bool:
    """Whether this run includes the Pi userlands."""
    return os.environ.get("CI") == "true" or os.environ.get("SHOAL_TEST_PI") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine was not asked to run; give the rest time for a build."""
    reason = "Raspberry Pi userlands run in CI and by `make test-pi` (SHOAL_TEST_PI=1)"
    for item in items:
        if item.get_closest_marker("pi") is None:
            continue
        if not wanted():
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S))


@pytest.fixture(scope="session")
def arm64() -> Userland:
    """A Raspberry Pi 4's userland, 64-bit: LiteRT."""
    return _built("arm64")


@pytest.fixture(scope="session")
def armhf() -> Userland:
    """A Raspberry Pi 2's userland, 32-bit: tflite-runtime."""
    return _built("armhf")


@pytest.fixture(scope="session", params=["arm64", "armhf"])
def pi(request: pytest.FixtureRequest) -> Userland:
    """Each userland in turn."""
    userland: Userland = request.getfixturevalue(request.param)
    return userland


def _built(arch: str) -> Userland:
    return build(arch, say=lambda line: print(line, file=sys.stderr))
