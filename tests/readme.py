"""Runs the commands of a README as a reader would, block after block, in one working copy.

Every command stands in a fenced block marked `sh`, on a line that starts with `$ ` (and goes on in
the next line after a backslash); the block's other lines show output, which nobody compares. A
comment right before a block says what its test needs to know:

    <!-- test: needs FILE... -->    write these files first: NAME.keras, .npz, .npy or .png
    <!-- test: expect TEXT -->      the block's output holds this text
    <!-- test: interrupt VERB -->   Ctrl-C in the terminal of `shoal VERB` comes first
    <!-- test: exit CODE -->        its last command ends with this code instead of 0
    <!-- test: skip REASON -->      it takes hardware, another machine or hours: it is checked for
                                    what can be known without running it

`shoal up` and `shoal run` serve the commands after them until the next `shoal up`, and `shoal
emulate` to the end; `shoal monitor` and `shoal sub` are interrupted once they show something.
`make` and `pip` are never run: targets and extras must exist. Port 1883 stands for a free one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from agent.broker import free_port
from agent.cli import main as shoal
from agent.protocol.errors import ExitCode
from tests.digits_network import CHECKOUT, QUIET, digits_network, write_digits
from tests.support import eventually

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMAND_TIMEOUT_S = 300.0
SERVING_TIMEOUT_S = 120.0
INTERRUPTED = int(ExitCode.INTERRUPTED)
SERVES = {"up": r"is up at|\"devices\"", "run": r"is online", "emulate": r"/dev/pts/\d+"}
STAYS = "emulate"
"""Serves on while a fleet ends and another begins."""
WATCHES = {"monitor", "sub"}
ENDING_OPTIONS = {"--once", "--count", "--help"}
NOT_RUN = {"make", "pip"}
TAKEN_ON_TRUST = {"apt", "apt-get", "cd", "git", "rsync", "scp", "source"}
"""Commands of a skipped block whose arguments mean nothing here."""
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "bundle")


class ReadmeError(AssertionError):
    """A README that does not do what it says, with its line."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"README line {line}: {text}")


@dataclass(frozen=True)
class Block:
    """The commands of one fenced block, each with its line, and what the comments before it say."""

    line: int
    commands: tuple[tuple[int, str], ...]
    needs: tuple[str, ...] = ()
    expect: tuple[str, ...] = ()
    exit_code: int = 0
    skip: str | None = None
    interrupt: tuple[str, ...] = ()


def blocks(text: str) -> list[Block]:
    """Every `sh` block of a README.

    Raises:
        ReadmeError: a marker that is misspelt or leads to no block, a block without a command, a
            command in a block that is not marked `sh`.
    """
    found: list[Block] = []
    markers: list[tuple[int, str, str]] = []
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        fence = re.match(r"( *)```(.*)$", line)
        if marker := re.match(r" *<!-- test: ?(.*?) ?-->$", line):
            word, _, rest = marker[1].partition(" ")
            if word not in ("needs", "expect", "exit", "skip", "interrupt") or not rest:
                raise ReadmeError(number, f"no such marker: {line.strip()}")
            markers.append((number, word, rest))
        elif fence is not None:
            inside = list(_until_closed(lines, number, len(fence[1])))
            if fence[2] == "sh":
                found.append(_block(number, inside, markers))
                markers = []
            elif strays := [n for n, content in inside if content.startswith("$ ")]:
                raise ReadmeError(strays[0], "a command in a block that is not marked sh")
        elif line.strip() and markers:
            break
    if markers:
        raise ReadmeError(markers[0][0], "a test marker without an sh block after it")
    return found


def _until_closed(
    lines: Iterator[tuple[int, str]], opened: int, indent: int
) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if line.strip() == "```":
            return
        yield number, line[indent:]
    raise ReadmeError(opened, "a block that does not end")


def _block(
    line: int, inside: Sequence[tuple[int, str]], markers: Sequence[tuple[int, str, str]]
) -> Block:
    commands: list[tuple[int, str]] = []
    goes_on = False
    for number, content in inside:
        if goes_on:
            commands[-1] = (commands[-1][0], f"{commands[-1][1]} {content.strip()}")
        elif content.startswith("$ "):
            commands.append((number, content[2:].strip()))
        else:
            continue
        goes_on = content.endswith("\\")
        commands[-1] = (commands[-1][0], commands[-1][1].removesuffix("\\").strip())
    if not commands:
        raise ReadmeError(line, "an sh block without a command: start its commands with `$ `")
    said: dict[str, list[str]] = {}
    for _, word, rest in markers:
        said.setdefault(word, []).append(rest)
    return Block(
        line=line,
        commands=tuple(commands),
        needs=tuple(" ".join(said.get("needs", [])).split()),
        expect=tuple(said.get("expect", [])),
        exit_code=int(said.get("exit", ["0"])[-1]),
        skip=said["skip"][0] if "skip" in said else None,
        interrupt=tuple(said.get("interrupt", [])),
    )


class Session:
    """A reader's terminals in a working copy of the checkout; leave the `with` block to end it.

    Args:
        folder: Where the working copy is made.
        provide: Name of a needed file -> writes it, beside those known by their ending.
    """

    def __init__(
        self, folder: Path, provide: Mapping[str, Callable[[Path], object]] | None = None
    ) -> None:
        self.folder = folder / "shoal"
        self.port = free_port()
        self._provide = dict(provide or {})
        self._serving: list[_Serving] = []
        shutil.copytree(CHECKOUT, self.folder, ignore=LEFT_BEHIND)
        fleet = self.folder / "fleet.yaml"
        fleet.write_text(fleet.read_text().replace("port: 1883", f"port: {self.port}"))
        foreign = ("PYTHON", "SHOAL_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._env = {**kept, **QUIET, "PATH": path, "COLUMNS": "160", "TERM": "xterm"}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, *verbs: str) -> None:
        """Interrupt what serves, or these; it must end as an interrupted command does."""
        served = [x for x in self._serving if not verbs or shlex.split(x.command)[1] in verbs]
        self._serving = [x for x in self._serving if x not in served]
        statuses = {serving.command: serving.stop() for serving in served}
        wrong = {command: code for command, code in statuses.items() if code != INTERRUPTED}
        assert not wrong, f"ended otherwise when interrupted: {wrong}"

    def follow(self, block: Block) -> None:
        """Do what a block says.

        Raises:
            ReadmeError: a command fails, or its block's output lacks what is expected.
        """
        if block.interrupt and block.skip is None:
            self.stop(*block.interrupt)
        for name in block.needs:
            self._write(block.line, name)
        output = ""
        for line, command in block.commands:
            last = line == block.commands[-1][0]
            if block.skip is not None or _first_word(command) in NOT_RUN:
                check_unrun(line, command)
            else:
                text = command.replace(":1883", f":{self.port}")
                output += self._run(line, text, block.exit_code if last else 0)
        for expected in block.expect:
            if expected not in output:
                raise ReadmeError(block.line, f"the output lacks {expected!r}:\n{output}")

    def _write(self, line: int, name: str) -> None:
        path = self.folder / name
        if path.exists():
            return
        write = self._provide.get(name) or PROVIDED.get(path.suffix)
        if write is None:
            raise ReadmeError(line, f"no test knows how to make {name}")
        write(path)

    def _run(self, line: int, command: str, exit_code: int) -> str:
        words = shlex.split(command)
        verb = words[1] if words[0] == "shoal" and len(words) > 1 else ""
        lasting = not ENDING_OPTIONS & set(words)
        if lasting and (verb in SERVES or verb in WATCHES):
            if verb == "up":
                self.stop(*(x for x in SERVES if x != STAYS))
            serving = _Serving(command.removesuffix("&").strip(), self.folder, self._env)
            self._serving.append(serving)
            shown = serving.wait_for(SERVES.get(verb, r"\S"))
            if shown is None or verb in WATCHES:
                status = self._serving.pop().stop()
                if shown is None or status != INTERRUPTED:
                    raise ReadmeError(
                        line, f"`{command}`, then Ctrl-C, ended with {status}:\n{serving.output}"
                    )
            return shown
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != exit_code:
            raise ReadmeError(
                line, f"`{command}` ended with {done.returncode}, not {exit_code}:\n{done.stdout}"
            )
        return done.stdout


class _Serving:
    """A command that runs in a terminal of its own until it is interrupted."""

    def __init__(self, command: str, folder: Path, env: Mapping[str, str]) -> None:
        self.command = command
        self._output = b""
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=env,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while part := os.read(self._master, 65_536):
                self._output += part

    @property
    def output(self) -> str:
        return self._output.decode(errors="replace")

    def wait_for(self, pattern: str) -> str | None:
        """What it shows, once it shows that it works; None if it ends, or takes too long."""
        eventually(
            lambda: re.search(pattern, self.output) or self._process.poll() is not None,
            SERVING_TIMEOUT_S,
        )
        return self.output if re.search(pattern, self.output) else None

    def stop(self) -> int:
        """Ctrl-C, as a reader would, and SIGKILL if that is not heard; returns the exit status."""
        self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join(timeout=5)
        os.close(self._master)
        return status


def check_unrun(line: int, command: str) -> None:
    """What can be known of a command without running it.

    Raises:
        ReadmeError: an unknown command, option, make target, extra or module.
    """
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    simple: list[list[str]] = [[]]
    for word in lexer:
        if word in ("&&", "||", "|", ";", "&"):
            simple.append([])
        else:
            simple[-1].append(word)
    for words in filter(None, simple):
        while words[0] == "sudo" or re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        _check_simple(line, words)


def _check_simple(line: int, words: list[str]) -> None:
    name, *arguments = words
    if name in ("python", "python3") and arguments[:2] == ["-m", "pip"]:
        name, arguments = "pip", arguments[2:]
    if name == "ssh":
        check_unrun(line, " ".join(arguments[1:]))
    elif name == "shoal":
        _check_shoal(line, arguments)
    elif name == "make":
        targets = re.findall(r"^([a-z][a-z-]*):", (CHECKOUT / "Makefile").read_text(), re.M)
        for word in arguments:
            if "=" not in word and word not in targets:
                raise ReadmeError(line, f"the Makefile has no target {word!r}")
    elif name == "pip":
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"(?:shoal|\.)\[([^\]]+)\]", " ".join(arguments)):
            if unknown := set(extra.split(",")) - set(project["optional-dependencies"]):
                raise ReadmeError(line, f"no such extra: {', '.join(sorted(unknown))}")
    elif name in ("python", "python3") and arguments[:1] == ["-m"]:
        _check_module(line, arguments[1], arguments[2:])
    elif name not in TAKEN_ON_TRUST:
        raise ReadmeError(line, f"nothing is known of `{name}` without running it")


def _check_shoal(line: int, arguments: list[str]) -> None:
    group = click.Context(shoal, info_name="shoal")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            name, command, rest = shoal.resolve_command(group, arguments or ["--help"])
            assert command is not None
            command.make_context(name, list(rest), parent=group).close()
    except click.exceptions.Exit:
        return  # --help
    except click.ClickException as error:
        text = f"`shoal {' '.join(arguments)}`: {error.format_message()}"
        raise ReadmeError(line, text) from None


def _check_module(line: int, module: str, arguments: list[str]) -> None:
    if module == "venv":
        return
    if not module.startswith(("agent", "benchmarks", "tests")) or not _is_module(module):
        raise ReadmeError(line, f"there is no module {module}")
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=CHECKOUT,
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    for word in arguments:
        option = word.partition("=")[0]
        if done.returncode or (option.startswith("-") and option not in done.stdout):
            raise ReadmeError(line, f"`python -m {module}` has no {option}:\n{done.stdout}")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _first_word(command: str) -> str:
    words = shlex.split(command)
    if words[:3] in (["python", "-m", "pip"], ["python3", "-m", "pip"]):
        return "pip"
    return words[0]


def _a_digit(path: Path) -> None:
    from tests.toy_fleet import digits

    np.save(path, digits()[0][-1])


def _a_picture(path: Path) -> None:
    from PIL import Image

    from tests.toy_fleet import digits

    Image.fromarray(digits()[0][-1][..., 0]).save(path)


PROVIDED: Mapping[str, Callable[[Path], object]] = {
    ".keras": lambda path: shutil.copyfile(digits_network(), path),
    ".npz": write_digits,
    ".npy": _a_digit,
    ".png": _a_picture,
}
