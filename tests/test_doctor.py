"""shoal doctor: names what is wrong, and the next command."""

import json
import os

import pytest
from click.testing import CliRunner

from agent.cli import main
from agent.doctor import Finding, Level, serial_ports, worst
from agent.link import BrokerAddress, Link
from agent.protocol.errors import ExitCode
from agent.protocol.manifest import read_manifest
from agent.protocol.messages import DeviceInfo, encode_text
from tests.toy_fleet import copy_bundle, toy_bundle

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
    assert "litert" in found["runtime"][0]["text"]
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


@pytest.mark.broker
def test_relative_password_file_counts_from_the_fleet_file(
    tmp_path, fleet_file, mosquitto, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "password").write_text("guess\n")
    with mosquitto.start(credentials=("ann", "s3cret")) as broker:
        path = fleet_file(broker, "s3cret")
        path.write_text(path.read_text().replace(str(tmp_path / "password"), "password"))
        monkeypatch.chdir(elsewhere)

        code, found = examined("--fleet", path)

    assert code == 0, found


def test_relative_password_file_that_is_missing_is_named_with_its_folder(tmp_path, fleet_file):
    path = fleet_file(password="s3cret")
    path.write_text(path.read_text().replace(str(tmp_path / "password"), "secret.txt"))

    code, found = examined("--fleet", path)

    assert code == 2
    assert str(tmp_path / "secret.txt") in found["fleet"][0]["text"]
    assert f"here {tmp_path}" in found["fleet"][0]["hint"]


def test_every_mistake_of_the_fleet_file_is_listed(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text("shoal: 1\nfleet: Ward\naggregator: dsk\ndevices: [{id: pi, kind: pi-9}]\n")

    code, found = examined("--fleet", path)

    assert code == 2
    assert len(found["fleet"][0]["text"].splitlines()) >= 3


@pytest.mark.broker
def test_bundle_is_checked_down_to_its_files_and_pieces(tmp_path, mosquitto):
    broker = f"{mosquitto.host}:{mosquitto.port}"
    bundle = copy_bundle(tmp_path / "bundle")
    (bundle / "eye-0" / "snn-0.tflite").write_bytes(b"altered")
    (bundle / "eye-1" / "snn-1.tflite").unlink()

    fine = examined("--bundle", toy_bundle(), "--broker", broker)
    broken = examined("--bundle", bundle, "--broker", broker)

    assert (fine[0], broken[0]) == (0, 2)
    for check in ("bundle", "files", "fleet", "pieces"):
        assert fine[1][check][0]["level"] == "ok", check
    assert "4 loaded" in fine[1]["pieces"][0]["text"]
    assert "stands in for the microcontroller" in json.dumps(fine[1]["pieces"])
    [files] = broken[1]["files"]
    assert "snn-0.tflite: altered" in files["text"]
    assert "snn-1.tflite: cannot be read" in files["text"]


@pytest.mark.broker
def test_device_that_runs_another_plan_is_found(mosquitto):
    bundle = toy_bundle()
    manifest = read_manifest(bundle)
    info = DeviceInfo(
        device="eye-0", boot="00000001", plan="0badc0de", version="0.1.0", runtime="litert",
        nodes=("node-0",), piece_sha256={}, simulated=False, pid=1,
    )  # fmt: skip
    with (
        mosquitto.start() as broker,
        Link(BrokerAddress(broker.host, broker.port), "toy.eye-0") as agent,
    ):
        agent.start(5.0)
        for leaf, payload in (("info", encode_text(info)), ("status", b"online")):
            agent.publish(f"shoal/toy/dev/eye-0/{leaf}", payload, qos=1, retain=True)
        code, found = examined("--bundle", bundle, "--broker", f"{broker.host}:{broker.port}")

    assert code == 2
    [wrong] = [finding for finding in found["devices"] if finding["level"] == "wrong"]
    assert f"eye-0 runs plan 0badc0de, the bundle is plan {manifest.plan_id}" in wrong["text"]


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
