"""The command shoal: light, helpful about mistakes, and honest in its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from agent.cli import ShoalGroup, main
from agent.commands import read_address
from agent.protocol.errors import DeviceUnreachable, PlanDoesNotFit, ShoalError

REPOSITORY = Path(__file__).parent.parent
HEAVY = (
    "tensorflow", "keras", "numpy", "pydantic", "yaml", "paho", "rich", "ai_edge_litert", "sklearn",
)  # fmt: skip


def cpu_seconds(*command: str) -> float:
    """Processor time of a command: unlike its duration, the same on a busy machine."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def group(command) -> ShoalGroup:
    return ShoalGroup("shoal", commands={"work": click.command("work")(command)})


def test_help_is_fast_and_so_is_the_import():
    assert min(cpu_seconds("-m", "agent", "--help") for _ in range(3)) < 0.3
    assert min(cpu_seconds("-c", "import agent.cli") for _ in range(3)) < 0.3


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from agent.cli import main; main(['--help'], standalone_mode=False); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr.strip() == "[]"
    for name in ("check", "doctor", "infer", "monitor", "run", "sub", "up"):
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(name))
        assert len(line.split()) > 3
        assert not line.endswith("...")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ShoalError("it is wrong", "do this"), 2),
        (PlanDoesNotFit("it is wrong", "do this"), 3),
        (DeviceUnreachable("it is wrong", "do this"), 4),
    ],
)
def test_users_mistake_ends_with_message_hint_and_its_exit_code(error, code):
    def work():
        raise error

    result = CliRunner().invoke(group(work), ["work"])

    assert result.exit_code == code
    assert result.stderr == "error: it is wrong\n  hint: do this\n"
    assert result.stdout == ""


def test_bug_ends_with_traceback_and_a_request_to_report_it():
    def work():
        raise ZeroDivisionError("oops")

    result = CliRunner().invoke(group(work), ["work"])

    assert result.exit_code == 1
    assert "ZeroDivisionError: oops" in result.stderr
    assert "Please report it" in result.stderr


def test_interruption_ends_with_130():
    def work():
        raise KeyboardInterrupt

    result = CliRunner().invoke(group(work), ["work"])

    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_exit_code_of_a_command_is_kept():
    def work():
        raise SystemExit(3)

    assert CliRunner().invoke(group(work), ["work"]).exit_code == 3


@pytest.mark.parametrize(
    ("module", "extra"),
    [("tensorflow", "exporter"), ("serial", "firmware"), ("distributed", "dask")],
)
def test_missing_extra_is_named_with_its_pip_line(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # what import does without the extra

    def work():
        __import__(module)

    result = CliRunner().invoke(group(work), ["work"])

    assert result.exit_code == 2
    assert f"`shoal work` needs {module}" in result.stderr
    assert f"pip install 'shoal[{extra}]'" in result.stderr


def test_missing_part_of_an_installed_package_is_a_bug():
    def work():
        __import__("json.no_such_part")

    assert CliRunner().invoke(group(work), ["work"]).exit_code == 1


def test_other_packages_add_commands_by_entry_point(tmp_path, monkeypatch):
    info = tmp_path / "coral-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coral\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[shoal.commands]\nwave = coral_commands:wave\nneedy = coral_needy:needy\n"
    )
    (tmp_path / "coral_commands.py").write_text(
        "import click\n@click.command()\ndef wave():\n    'Wave at you.'\n    click.echo('hello')\n"
    )
    (tmp_path / "coral_needy.py").write_text("import serial_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        sys.modules["agent.cli"].EXTRA_OF_MODULE, "serial_that_is_missing", "firmware"
    )
    fresh = ShoalGroup("shoal")

    listed = CliRunner().invoke(fresh, ["--help"])

    assert listed.exit_code == 0
    assert "Wave at you." in listed.stdout
    assert "shoal[firmware]" in listed.stdout
    assert CliRunner().invoke(fresh, ["wave"]).stdout == "hello\n"
    assert CliRunner().invoke(fresh, ["needy"]).exit_code == 2


def test_misspelt_command_and_option_are_answered_with_the_right_ones():
    command = CliRunner().invoke(main, ["chekc"])
    option = CliRunner().invoke(main, ["check", "--jsno"])

    assert (command.exit_code, option.exit_code) == (2, 2)
    assert "did you mean 'check'?" in command.stderr
    assert "--json" in option.stderr


def test_unknown_command_is_answered_with_all_commands():
    result = CliRunner().invoke(main, ["xyzzy"])

    assert result.exit_code == 2
    listed = result.stderr.split("there are: ")[1].strip().split(", ")
    assert {"check", "doctor", "export", "run"} <= set(listed)


def test_check_prints_devices_and_budgets():
    table = CliRunner().invoke(main, ["check", str(REPOSITORY / "fleet.yaml")])
    printed = CliRunner().invoke(main, ["check", "--json", str(REPOSITORY / "fleet.yaml")])

    assert table.exit_code == printed.exit_code == 0
    row = next(line.split() for line in table.stdout.splitlines() if "mcu-small" in line)
    assert row[:8] == ["mcu-small", "mcu", "0", "tflite-micro", "96.0", "kB", "256.0", "kB"]
    assert "no mistakes" in table.stderr
    devices = {device["id"]: device for device in json.loads(printed.stdout)["devices"]}
    assert devices["mcu-small"]["flash_bytes"] == 256_000


def test_check_prints_every_mistake_with_its_place(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "shoal: 1\nfleet: reef\naggregator: dsk\ndevices:\n"
        "  - {id: pi, kind: pi-9}\n  - {id: desk, kind: pi-5, tier: edge, memmory: 5 MB}\n"
    )

    result = CliRunner().invoke(main, ["check", str(path)])

    assert result.exit_code == 2
    assert f"{path}:3:13: aggregator 'dsk'" in result.stderr
    assert f"{path}:5:" in result.stderr
    assert "did you mean 'memory'" in result.stderr
    assert result.stdout == ""


def test_piped_output_has_no_colours_and_no_cut_cells():
    done = subprocess.run(
        [sys.executable, "-m", "agent", "check", str(REPOSITORY / "fleet.yaml")],
        capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"FORCE_COLOR": ""},
    )  # fmt: skip

    assert "\x1b" not in done.stdout + done.stderr
    assert "100 Mbit/s, 0.5 ms   aggregator" in done.stdout


def test_reader_that_leaves_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "agent", "check", "--json", str(REPOSITORY / "fleet.yaml")],
        stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.5:1884", ("10.0.0.5", 1884)),
        ("broker.local", ("broker.local", 1883)),
        ("[::1]:1884", ("::1", 1884)),
        ("[::1]", ("::1", 1883)),
        ("fe80::1", ("fe80::1", 1883)),
    ],
)
def test_broker_address_is_read(text, address):
    assert read_address(click.Context(main), main.params[0], text) == address


@pytest.mark.parametrize(
    "text", ["", ":1883", "host:0", "host:99999", "host:mqtt", "[::1", "[::1]x"]
)
def test_broker_address_that_is_none_is_refused(text):
    result = CliRunner().invoke(main, ["sub", "--broker", text])

    assert result.exit_code == 2
    assert "is not HOST:PORT" in result.stderr


def test_command_without_fleet_says_what_to_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(main, ["monitor"])

    assert result.exit_code == 2
    assert "add --bundle or --fleet" in result.stderr


def test_broker_that_is_not_there_ends_with_4(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text((REPOSITORY / "fleet.yaml").read_text())
    nobody = "127.0.0.1:1"

    result = CliRunner().invoke(main, ["sub", "--fleet", str(path), "--broker", nobody])

    assert result.exit_code == 4
    assert "127.0.0.1 port 1" in result.stderr
    assert "hint:" in result.stderr


def test_options_of_other_methods_are_refused_all_at_once():
    command = ["export", "m.keras", "--data", "digits", "--method", "lcp"]
    result = CliRunner().invoke(main, [*command, "--beta", "5", "--keep", "0.5", "--epochs", "3"])

    assert result.exit_code == 2
    assert "--method lcp does not read: --keep belongs to snn; --beta belongs to nonn" in " ".join(
        result.stderr.split()
    )


def test_help_of_export_goes_by_method():
    shown = CliRunner().invoke(main, ["export", "--help"]).stdout
    sections = {part.split("\n")[0]: part for part in shown.split("\nOptions")}

    assert "--beta" in sections[" of nonn:"] and "--beta" not in sections[" of snn:"]
    assert "--epochs" in sections[" of ddnn, lcp, nonn, edgent:"]
    assert "--fleet" in sections[":"]
