"""MQTT topics of one fleet, all below `shoal/<fleet>`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topics:
    """Builds and reads the topics of a fleet.

    | topic | QoS, retain | payload |
    |---|---|---|
    | `dev/<id>/status` | 1, retained, last will | `Status` |
    | `dev/<id>/info` | 1, retained | `DeviceInfo`, JSON |
    | `dev/<id>/stats` | 0 | `DeviceStats`, JSON |
    | `infer/req` | 0 | `Request`, binary |
    | `infer/up` | 0 | `Escalation`, binary |
    | `dev/<id>/res` | 0 | `Answer` or `Blank`, binary |
    | `dev/<id>/scores`, `dev/<id>/feat` | 0 | `TensorPart` or `Blank`, binary |
    | `decision` | 1 | `Decision`, JSON |
    | `decision/last` | 1, retained, at most one a second | `Decision`, JSON |
    | `choice` | 0 | `Choice`, JSON, from who asks, where strategies are picked |
    """

    fleet: str

    @property
    def root(self) -> str:
        """Common beginning of every topic, without a slash at the end."""
        return f"shoal/{self.fleet}"

    @property
    def request(self) -> str:
        """Where requests are sent to all devices."""
        return f"{self.root}/infer/req"

    @property
    def escalation(self) -> str:
        """Where a tier that is unsure asks the tiers below for their features."""
        return f"{self.root}/infer/up"

    @property
    def decision(self) -> str:
        """Where every decision appears."""
        return f"{self.root}/decision"

    @property
    def last_decision(self) -> str:
        """The retained copy of a recent decision."""
        return f"{self.root}/decision/last"

    @property
    def choice(self) -> str:
        """Where who asks tells which strategy was picked, and whether it was in time."""
        return f"{self.root}/choice"

    def device(self, device_id: str, leaf: str) -> str:
        """Topic of one device (`+`: of all); leaf is status, info, stats, res, scores or feat."""
        return f"{self.root}/dev/{device_id}/{leaf}"

    def sender(self, topic: str) -> str | None:
        """Device id of a topic below this fleet's `dev/`, None for any other topic."""
        before, _, leaf = topic.rpartition("/")
        devices, _, device_id = before.rpartition("/")
        return device_id if devices == f"{self.root}/dev" and device_id and leaf else None
