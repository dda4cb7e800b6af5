import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from agent.broker import Broker, find_mosquitto, start_broker

# The same examples in every run; how long one takes on a busy machine decides nothing.
settings.register_profile(
    "shoal", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shoal")


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
        reason = "mosquitto is not installed (apt-get install mosquitto)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with start_broker() as broker:
        yield Mosquitto(broker)
