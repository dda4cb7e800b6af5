"""shoal doctor: names what is wrong, and the next command."""

import json
import os

import pytest
from click.testing import CliRunner

from agent.cli import main
from agent.doctor import Finding, Level, serial_ports, worst
from agent.link import BrokerAddress, Link
from agent.protocol.errors import ExitCode

FLEET_TEXT = """
shoal: 1
fleet: ward
aggregator: desk
devices:
  - {id: pi-a, kind: pi-4}
  - {id: desk, kind: pi-5, tier: edge}
broker: {port: PORT, username: USER, password_file: FILE}
"""


@pytest.fixture
def fleet_file(tmp_path, mosquitto):
    """Writes the fleet file for a broker and a user's password."""

    def write(broker=mosquitto.shared, password=None):
        text = FLEET_TEXT.replace("PORT", str(broker.port))
        if password is None:
            text = text.replace(", username: USER, password_file: FILE", "")
        else:
            secret = tmp_path / "password"
            secret.write_text(f"{password}\n")
            text = text.replace("USER", "ann").replace("FILE", str(secret))
        path = tmp_path / "fleet.yaml"
        path.write_text(text)
        return path

    return write


def examined(*arguments):
    """Exit code and the findings by what was checked."""
    result = CliRunner().invoke(main, ["doctor", "--json", *map(str, arguments)])
    printed = json.loads(result.stdout)
    assert result.exit_code == printed["exit_code"]
    found = {}
    for finding in printed["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return result.exit_code, found


@pytest.mark.broker
def test_all_fine_ends_with_0_and_names_silent_devices(fleet_file):
    code, found = examined("--fleet", fleet_file())

    assert code == 0
    for check in ("python", "packages", "runtime", "mosquitto", "fleet", "broker", "messages"):
        assert found[check][0]["level"] == "ok", check
    assert (
    )
    [devices] = found["devices"]
    assert devices["text"] == "pi-a (never seen), desk (never seen)"
    assert "shoal run --device pi-a" in devices["hint"]


@pytest.mark.broker
def test_text_gives_every_finding_with_the_next_command(fleet_file):
    result = CliRunner().invoke(main, ["doctor", "--fleet", str(fleet_file())])

    assert result.exit_code == 0
    assert "ok    broker" in result.stdout
    assert "-> start one: shoal run --device pi-a" in result.stdout


@pytest.mark.broker
def test_device_that_is_online_is_seen(fleet_file, mosquitto):
    path = fleet_file()
    with Link(BrokerAddress(mosquitto.host, mosquitto.port), "pi-a-of-ward") as agent:
        agent.start(5.0)
        agent.publish("shoal/ward/dev/pi-a/status", b"online", qos=1, retain=True)
        _, found = examined("--fleet", path)
        agent.publish("shoal/ward/dev/pi-a/status", b"", qos=1, retain=True)

    assert [finding["text"] for finding in found["devices"]] == [
        "online: pi-a",
        "desk (never seen)",
    ]


def test_broker_that_does_not_run_ends_with_4(fleet_file):
    code, found = examined("--fleet", fleet_file(), "--broker", "127.0.0.1:1")

    assert code == 4
    [broker] = found["broker"]
    assert broker["level"] == "wrong"
    assert "connection refused" in broker["text"]
    assert "mosquitto" in broker["hint"]


@pytest.mark.broker
def test_wrong_password_is_named_with_its_user(fleet_file, mosquitto):
    with mosquitto.start(credentials=("ann", "s3cret")) as broker:
        right = examined("--fleet", fleet_file(broker, "s3cret"))
        wrong = examined("--fleet", fleet_file(broker, "guess"))

    assert right[0] == 0
    assert wrong[0] == 4
    assert "user 'ann'" in wrong[1]["broker"][0]["text"]
    assert "guess" not in json.dumps(wrong[1])


@pytest.mark.broker
def test_access_list_that_hides_the_fleet_is_found(fleet_file, mosquitto):
    allowed = "topic readwrite shoal/link/#\ntopic read shoal/ward/#\n"
    with mosquitto.start(access_list=allowed) as broker:
        code, found = examined("--fleet", fleet_file(broker))

    assert code == 4
    [messages] = found["messages"]
    assert "did not come back" in messages["text"]
    assert "Not authorized" in messages["text"]
    assert "shoal/ward/#" in messages["hint"]


def test_password_file_that_is_missing_is_named(tmp_path, fleet_file):
    path = fleet_file(password="s3cret")
    (tmp_path / "password").unlink()

    code, found = examined("--fleet", path)

    assert code == 2
    assert str(tmp_path / "password") in found["fleet"][0]["text"]
    assert "broker" not in found


def test_every_mistake_of_the_fleet_file_is_listed(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text("shoal: 1\nfleet: Ward\naggregator: dsk\ndevices: [{id: pi, kind: pi-9}]\n")

    code, found = examined("--fleet", path)

    assert code == 2
    assert len(found["fleet"][0]["text"].splitlines()) >= 3


def test_folder_that_is_no_bundle_is_named(tmp_path):
    code, found = examined("--bundle", tmp_path)

    assert code == 2
    assert "manifest.json" in found["bundle"][0]["text"]
    assert "shoal export" in found["bundle"][0]["hint"]


def test_serial_port_that_may_not_be_opened_is_named_with_its_group(tmp_path, monkeypatch):
    (tmp_path / "ttyUSB0").touch()
    (tmp_path / "ttyACM1").touch()
    (tmp_path / "tty0").touch()
    # Root, as tests often are, may open anything.
    monkeypatch.setattr(os, "access", lambda path, mode: path.endswith("ACM1"))

    acm, usb = serial_ports(str(tmp_path))

    assert acm.level is Level.OK
    assert usb.level is Level.WRONG
    assert "ttyUSB0" in usb.text
    assert "dialout" in usb.hint


def test_worst_finding_gives_the_exit_code():
    codes = (ExitCode.DONE, ExitCode.UNREACHABLE, ExitCode.INPUT)
    findings = [Finding("x", Level.WRONG, "", exit_code=code) for code in codes]

    assert worst(findings) is ExitCode.UNREACHABLE
    assert worst([]) is ExitCode.DONE
