"""Build a real Debian userland of a Raspberry Pi and run its Python on this machine.

A userland is one folder: a Debian 12 root with Python 3.11, the base dependencies of
`pyproject.toml` as that Pi would get them, and the wheel of this checkout, run by QEMU's user-mode
emulator. No chroot, no binfmt, nothing installed on this machine. Packages come from wherever this
machine's apt and pip are set up to look.

    <cache>/qemu/                   the emulators, one binary each
    <cache>/<arch>/root/            Debian; /proc and /sys files of a Pi, which QEMU reads first
    <cache>/<arch>/site/            the base dependencies
    <cache>/<arch>/package/         the wheel of this checkout
    <cache>/<arch>/userland.json    stamp of root and site; package.json: stamp of the wheel

Each part is made in a folder of its own and renamed when whole, so an interrupted build goes on
where it stopped; downloads are kept until the stamp is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from agent.protocol.errors import ShoalError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPE_VERSION = 1
"""Raise it when the way a userland is made changes: older ones are then made anew."""

PYTHON_VERSION = "3.11"
"""Debian 12's Python; Raspberry Pi OS 12 has the same."""

GLIBC_MINORS = range(36, 16, -1)
"""Wheels for glibc 2.17 to 2.36 (Debian 12's) run there."""

HOST_TOOLS = {"apt-get": "apt", "dpkg": "dpkg", "dpkg-deb": "dpkg", "tar": "tar"}
"""Command -> the Debian package that brings it."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Architecture:
    """What differs between the kinds of Raspberry Pi userland.

    Attributes:
        name: Debian's name of the architecture.
        machine: What `uname -m` says there, and what wheels are tagged with.
        emulator: QEMU's user-mode binary.
        cpu: QEMU's CPU model. Never leave it out: the default CPU of QEMU 7.2 makes XNNPACK compute
            wrong int8 results, silently.
        multiarch: Debian's library folder.
        debs: Packages to unpack, with what they depend on.
        from_debian: Distribution -> Debian package, where no wheel exists for this machine.
        links: Links that a package's install script would make: path -> target, below the root.
        cpuinfo: A Pi's /proc/cpuinfo, one entry a core.
        cores: CPU cores of that Pi.
    """

    name: str
    machine: str
    emulator: str
    cpu: str
    multiarch: str
    debs: tuple[str, ...]
    cpuinfo: str
    cores: int = 4
    from_debian: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)


_PYTHON_DEBS = (
    f"python{PYTHON_VERSION}-minimal",
    f"libpython{PYTHON_VERSION}-stdlib",
    "libstdc++6",
    "libgcc-s1",
    "zlib1g",
    "libatomic1",
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "arm64": Architecture(
        name="arm64",
        machine="aarch64",
        emulator="qemu-aarch64-static",
        cpu="cortex-a72",
        multiarch="aarch64-linux-gnu",
        debs=_PYTHON_DEBS,
        cpuinfo=(
            "BogoMIPS\t: 108.00\n"
            "Features\t: fp asimd evtstrm crc32 cpuid\n"
            "CPU implementer\t: 0x41\n"
            "CPU architecture: 8\n"
            "CPU variant\t: 0x0\n"
            "CPU part\t: 0xd08\n"
            "CPU revision\t: 3\n"
        ),
    ),
    "armhf": Architecture(
        name="armhf",
        machine="armv7l",
        emulator="qemu-arm-static",
        cpu="cortex-a7",
        multiarch="arm-linux-gnueabihf",
        debs=(*_PYTHON_DEBS, "python3-numpy", "python3-yaml"),
        from_debian={"numpy": "python3-numpy", "pyyaml": "python3-yaml"},
        links={
            "usr/lib/arm-linux-gnueabihf/libblas.so.3": "blas/libblas.so.3",
            "usr/lib/arm-linux-gnueabihf/liblapack.so.3": "lapack/liblapack.so.3",
        },
        cpuinfo=(
            "model name\t: ARMv7 Processor rev 5 (v7l)\n"
            "BogoMIPS\t: 38.40\n"
            "Features\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae"
            " evtstrm\n"
            "CPU implementer\t: 0x41\n"
            "CPU architecture: 7\n"
            "CPU variant\t: 0x0\n"
            "CPU part\t: 0xc07\n"
            "CPU revision\t: 5\n"
        ),
    ),
}


class UserlandError(ShoalError):
    """A userland cannot be made on this machine."""


@dataclass(frozen=True)
class Userland:
    """A Raspberry Pi's Python, ready to run here.

    Attributes:
        architecture: Which kind of Pi.
        folder: Where it lies.
        emulator: Path of QEMU's binary.
    """

    architecture: Architecture
    folder: Path
    emulator: Path

    @property
    def root(self) -> Path:
        """Debian's root folder."""
        return self.folder / "root"

    @property
    def search_path(self) -> tuple[Path, Path]:
        """What PYTHONPATH names there: the wheel of this checkout, then its dependencies."""
        return self.folder / "package", self.folder / "site"

    def command(self, args: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs the Pi's Python with `args`; it needs `environment()`."""
        python = self.root / "usr" / "bin" / f"python{PYTHON_VERSION}"
        emulated = [str(self.emulator), "-L", str(self.root), str(python)]
        return emulated + [os.fspath(argument) for argument in args]

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment made fit for the Pi's Python, with `env` laid over it.

        Variables of this machine's Python and dynamic linker are left out, and the current folder
        is not imported from (the checkout would shadow the installed wheel).
        """
        foreign = ("PYTHON", "LD_", "QEMU_", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in self.search_path),
            "PYTHONSAFEPATH": "1",
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            "QEMU_CPU": self.architecture.cpu,
            **(env or {}),
        }

    def python(
        self,
        args: Sequence[str | os.PathLike[str]],
        env: Mapping[str, str] | None = None,
        **popen: Any,
    ) -> subprocess.Popen[str]:
        """Start the Pi's Python.

        Such a Python cannot start another one through `sys.executable`, and programs that it runs
        are this machine's own.

        Args:
            args: Its arguments: a script's path on this machine, `-m agent.cli`, or `-c code`.
            env: Variables to set beside those of `environment()`.
            **popen: For `subprocess.Popen`; streams are text unless it says otherwise.

        Returns:
            The running process, which the caller waits for or ends. SIGTERM and SIGKILL reach it.
        """
        popen.setdefault("text", True)
        return subprocess.Popen(self.command(args), env=self.environment(env), **popen)

    def run(
        self,
        args: Sequence[str | os.PathLike[str]],
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> str:
        """Run the Pi's Python to its end and return its standard output.

        Raises:
            UserlandError: It fails, or runs past `timeout_s`; the message holds its last lines.
        """
        process = self.python(args, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise UserlandError(
                f"{self.architecture.name}: Python still runs after {timeout_s:g} s\n"
                f"{_tail(out + err)}"
            ) from None
        if process.returncode != 0:
            raise UserlandError(
                f"{self.architecture.name}: Python ended with {process.returncode}\n"
                f"{_tail(out + err)}"
            )
        return str(out)


def cache_folder() -> Path:
    """Where userlands are kept: SHOAL_PI_CACHE, else `.cache/pi` of this checkout."""
    named = os.environ.get("SHOAL_PI_CACHE")
    return Path(named).resolve() if named else CHECKOUT / ".cache" / "pi"


def base_requirements(pyproject: Path, architecture: Architecture) -> list[Requirement]:
    """The base dependencies of `pyproject` that a Pi of this architecture installs.

    Returns:
        Those whose environment marker holds there, without the marker.
    """
    listed = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return applicable(listed, architecture)


def applicable(
    requirements: Sequence[str], architecture: Architecture, extras: frozenset[str] = frozenset()
) -> list[Requirement]:
    """Those of `requirements` whose environment marker holds on this Pi, without the marker."""
    environment = {
        "implementation_name": "cpython",
        "implementation_version": f"{PYTHON_VERSION}.2",
        "os_name": "posix",
        "platform_machine": architecture.machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{PYTHON_VERSION}.2",
        "python_version": PYTHON_VERSION,
        "sys_platform": "linux",
    }
    held = []
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
        ):
            requirement.marker = None
            held.append(requirement)
    return held


def build(
    arch: str,
    cache: Path | None = None,
    *,
    checkout: Path = CHECKOUT,
    say: Say = lambda line: None,
) -> Userland:
    """Make what is missing or out of date of a userland, and return it.

    Two processes that build in one cache take turns.

    Args:
        arch: A key of `ARCHITECTURES`.
        cache: Folder that holds all userlands; default `cache_folder()`.
        checkout: Whose base dependencies and package are installed.
        say: Told about each step, one line a call.

    Raises:
        UserlandError: A tool is missing, a download fails, or what was built does not import.
    """
    architecture = ARCHITECTURES[arch]
    _need_host_tools()
    cache = cache_folder() if cache is None else cache.resolve()
    userland = Userland(architecture, cache / arch, cache / "qemu" / architecture.emulator)
    userland.folder.mkdir(parents=True, exist_ok=True)
    with _turn(cache / ".lock"):
        builder = _Builder(userland, cache, checkout, say)
        builder.make_base()
        builder.make_package()
    return userland


class _Builder:
    """The steps of one build, each of which does nothing when its result is there."""

    def __init__(self, userland: Userland, cache: Path, checkout: Path, say: Say) -> None:
        self.userland = userland
        self.architecture = userland.architecture
        self.cache = cache
        self.checkout = checkout
        self.downloads = userland.folder / "downloads"
        self._say = say
        self._started_s = time.monotonic()

    def say(self, line: str) -> None:
        passed_s = time.monotonic() - self._started_s
        self._say(f"{self.architecture.name} {passed_s:6.1f} s  {line}")

    def make_base(self) -> None:
        """Emulator, Debian root and base dependencies, stamped with a hash of the recipe."""
        requirements = base_requirements(self.checkout / "pyproject.toml", self.architecture)
        recipe = {
            "version": RECIPE_VERSION,
            "python": PYTHON_VERSION,
            "architecture": asdict(self.architecture),
            "requirements": sorted(map(str, requirements)),
        }
        stamp = self.userland.folder / "userland.json"
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        if _stamped(stamp, digest) and self.userland.emulator.exists():
            self.say("userland is up to date")
            return
        started = self.userland.folder / "started"
        if not started.exists() or started.read_text() != digest:
            for left in (self.userland.root, self.userland.folder / "site", self.downloads):
                shutil.rmtree(left, ignore_errors=True)
            stamp.unlink(missing_ok=True)
            started.write_text(digest)
        self.make_emulator()
        self.make_root()
        self.make_site(requirements)
        installed = self.check_base(requirements)
        downloaded = _size_bytes(self.downloads)
        shutil.rmtree(self.downloads)
        started.unlink()
        stamp.write_text(
            json.dumps(
                {
                    "sha256": digest,
                    "recipe": recipe,
                    "installed": installed,
                    "build_s": round(time.monotonic() - self._started_s, 1),
                    "download_bytes": downloaded,
                    "disk_bytes": _size_bytes(self.userland.folder),
                },
                indent=1,
            )
        )
        self.say(
            f"userland is ready: {downloaded / 1e6:.0f} MB downloaded, "
            f"{_size_bytes(self.userland.folder) / 1e6:.0f} MB on disk"
        )

    def make_emulator(self) -> None:
        """QEMU's one binary, out of this machine's own package of it."""
        emulator = self.userland.emulator
        if emulator.exists():
            return
        self.say("emulator: apt-get download qemu-user-static")
        host = _run(["dpkg", "--print-architecture"]).strip()
        archive = self.apt(host, ["qemu-user-static"], with_dependencies=False)
        emulator.parent.mkdir(exist_ok=True)
        for architecture in ARCHITECTURES.values():
            aside = emulator.parent / f".{architecture.emulator}"
            with aside.open("wb") as binary:
                unpack = subprocess.Popen(
                    ["dpkg-deb", "--fsys-tarfile", str(archive[0])], stdout=subprocess.PIPE
                )
                member = f"./usr/bin/{architecture.emulator}"
                picked = subprocess.run(
                    ["tar", "-xO", member], stdin=unpack.stdout, stdout=binary, check=False
                )
                unpack.communicate()
            if picked.returncode != 0 or aside.stat().st_size == 0:
                raise UserlandError(f"{archive[0].name} holds no {member}")
            aside.chmod(0o755)
            aside.rename(emulator.parent / architecture.emulator)

    def make_root(self) -> None:
        """Debian's packages unpacked, with the files of a Pi that LiteRT and QEMU ask for."""
        root = self.userland.root
        if root.exists():
            return
        self.say(f"root: apt-get download {' '.join(self.architecture.debs)}")
        archives = self.apt(self.architecture.name, self.architecture.debs)
        self.say(f"root: unpack {len(archives)} packages")
        aside = root.with_name("root.part")
        shutil.rmtree(aside, ignore_errors=True)
        for name in ("bin", "sbin", "lib"):
            (aside / "usr" / name).mkdir(parents=True)
            (aside / name).symlink_to(f"usr/{name}")
        for archive in archives:
            _run(["dpkg-deb", "--extract", str(archive), str(aside)])
        for path, target in self.architecture.links.items():
            link = aside / path
            if not (link.parent / target).exists():
                raise UserlandError(
                    f"{self.architecture.name}: Debian's packages hold no {target} for {path}"
                )
            link.symlink_to(target)
        cores = self.architecture.cores
        entries = (f"processor\t: {core}\n{self.architecture.cpuinfo}\n" for core in range(cores))
        for path, text in {
            "proc/cpuinfo": "".join(entries),
            "sys/devices/system/cpu/possible": f"0-{cores - 1}\n",
            "sys/devices/system/cpu/present": f"0-{cores - 1}\n",
            "sys/devices/system/cpu/kernel_max": f"{cores - 1}\n",
        }.items():
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).write_text(text)
        aside.rename(root)

    def make_site(self, requirements: Sequence[Requirement]) -> None:
        """The wheels of `requirements` and of what they need, for this machine, unzipped."""
        site = self.userland.folder / "site"
        if site.exists():
            return
        wheels = self.wheels(requirements)
        self.say(f"site: unzip {len(wheels)} wheels")
        aside = site.with_name("site.part")
        shutil.rmtree(aside, ignore_errors=True)
        for wheel in wheels:
            _unzip(wheel, aside)
        aside.rename(site)

    def wheels(self, requirements: Sequence[Requirement]) -> list[Path]:
        """Download a wheel for each requirement and for each that those name, round by round.

        pip resolves with the markers of the machine that it runs on and needs a wheel for
        everything; here the markers are the Pi's, and Debian's packages count as installed.
        """
        folder = self.downloads / "wheels"
        folder.mkdir(parents=True, exist_ok=True)
        constraints: dict[str, SpecifierSet] = {}
        extras: dict[str, frozenset[str]] = {}
        chosen: dict[str, Path] = {}
        wanted = list(requirements)
        while wanted:
            missing = set()
            for requirement in wanted:
                name = canonicalize_name(requirement.name)
                if name in self.architecture.from_debian:
                    continue
                known = constraints.get(name, SpecifierSet())
                constraints[name] = known & requirement.specifier
                more = extras.get(name, frozenset()) | requirement.extras
                fits = name in chosen and constraints[name].contains(_version(chosen[name]), True)
                if not fits or more != extras.get(name):
                    missing.add(name)
                extras[name] = more
            wanted = []
            if missing:
                lines = sorted(f"{name}{constraints[name]}" for name in missing)
                self.say(f"site: pip download {' '.join(lines)}")
                self.pip_download(lines, folder)
                fitting = _fitting_wheels(folder, constraints)
                for name in missing:
                    chosen[name] = fitting[name]
                    listed = _metadata(fitting[name]).get_all("Requires-Dist") or []
                    wanted += applicable(listed, self.architecture, extras[name])
        return sorted(chosen.values())

    def pip_download(self, lines: Sequence[str], folder: Path) -> None:
        """`pip download` wheels for this Pi, nothing that they depend on."""
        machine = self.architecture.machine
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS]
        platforms.append(f"manylinux2014_{machine}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation=cp", f"--dest={folder}"]
        command += [f"--python-version={PYTHON_VERSION}"]
        command += [f"--platform={platform}" for platform in platforms]
        _run([*command, *lines], hint="Does pip reach its package index? Run the line by hand.")

    def apt(
        self, deb_arch: str, names: Sequence[str], *, with_dependencies: bool = True
    ) -> list[Path]:
        """Download Debian packages with this machine's sources and keys, touching nothing else.

        Returns:
            The archives, those of `names` with all they depend on or, without dependencies, of
            `names` alone.
        """
        work = self.downloads / f"apt-{deb_arch}"
        for folder in ("state/lists/partial", "cache/archives/partial", "log"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        (work / "status").touch()
        settings = work / "apt.conf"
        settings.write_text(
            f'Dir::State "{work}/state";\n'
            f'Dir::State::status "{work}/status";\n'
            f'Dir::Cache "{work}/cache";\n'
            f'Dir::Log "{work}/log";\n'
            f'APT::Architecture "{deb_arch}";\n'
            "#clear APT::Architectures;\n"
            f'APT::Architectures {{ "{deb_arch}"; }};\n'
            'APT::Install-Recommends "false";\n'
            'APT::Sandbox::User "";\n'
            'Acquire::Languages "none";\n'
            'Acquire::Retries "3";\n'
            "#clear APT::Update;\n"
            "#clear DPkg::Pre-Install-Pkgs;\n"
            "#clear DPkg::Pre-Invoke;\n"
            "#clear DPkg::Post-Invoke;\n"
        )
        apt = ["apt-get", "--config-file", str(settings), "--quiet", "--quiet", "--yes"]
        hint = f"Does apt reach this machine's sources? Do they carry Debian 12 for {deb_arch}?"
        self.update_lists([*apt, "update", "--error-on=any"])
        archives = work / "cache" / "archives"
        if with_dependencies:
            _run([*apt, "--download-only", "install", *names], hint=hint)
        else:
            _run([*apt, "download", *names], hint=hint, cwd=archives)
        return sorted(archives.glob("*.deb"))

    def update_lists(self, command: Sequence[str]) -> None:
        """`apt-get update`, leaving out a list that does not match its signed hash.

        One suite of a mirror is often behind its own index, and the other suites are enough. When
        they are not, the download that follows says which package it lacks.
        """
        try:
            _run(command)
        except UserlandError as error:
            self.say(f"root: some package lists are left out:\n{error}")

    def check_base(self, requirements: Sequence[Requirement]) -> dict[str, str]:
        """Compile what is there and hold its versions against `requirements`.

        Returns:
            Distribution -> version that Python sees there.
        """
        self.say("check: versions, and compile all modules")
        code = (
            "import compileall, importlib.metadata as m, json, sys\n"
            "names = sys.argv[2:]\n"
            "compileall.compile_dir(sys.argv[1], quiet=2)\n"
            "print(json.dumps({name: m.version(name) for name in names}))\n"
        )
        names = [requirement.name for requirement in requirements]
        out = self.userland.run(["-c", code, self.userland.folder / "site", *names], timeout_s=300)
        installed: dict[str, str] = json.loads(out)
        wrong = [
            f"{self.architecture.name}: pyproject.toml asks for {requirement}, "
            f"the userland has {installed[requirement.name]}"
            for requirement in requirements
            if not requirement.specifier.contains(installed[requirement.name], prereleases=True)
        ]
        if wrong:
            raise UserlandError("\n".join(wrong))
        return installed

    def make_package(self) -> None:
        """The wheel of the checkout, made anew when a file that goes into it changed."""
        sources = _package_sources(self.checkout)
        digest = hashlib.sha256()
        for path in sources:
            content = hashlib.sha256((self.checkout / path).read_bytes()).hexdigest()
            digest.update(f"{path.as_posix()} {content}\n".encode())
        stamp = self.userland.folder / "package.json"
        if _stamped(stamp, digest.hexdigest()):
            return
        self.say("package: pip wheel of the checkout")
        package = self.userland.folder / "package"
        aside = package.with_name("package.part")
        shutil.rmtree(aside, ignore_errors=True)
        unzipped = aside / "package"
        _unzip(make_wheel(self.checkout, aside), unzipped)
        stamp.unlink(missing_ok=True)
        shutil.rmtree(package, ignore_errors=True)
        unzipped.rename(package)
        shutil.rmtree(aside)
        stamp.write_text(json.dumps({"sha256": digest.hexdigest()}))
        self.say("package is installed")


def make_wheel(checkout: Path, folder: Path) -> Path:
    """`pip wheel` of a checkout, made in `folder` from a copy: the checkout stays as it is."""
    copy, made = folder / "checkout", folder / "wheel"
    for path in _package_sources(checkout):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout / path, copy / path)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={made}"]
    _run([*pip, str(copy)], hint="`pip wheel --no-deps .` in the checkout must work.")
    return next(made.glob("*.whl"))


def _package_sources(checkout: Path) -> list[Path]:
    """Files of the checkout that a wheel is made of: those at its top and of its packages."""
    top = [path for path in checkout.iterdir() if path.is_file() and path.name[0] != "."]
    packages = [path.parent for path in checkout.glob("*/__init__.py")]
    inside = [
        path
        for package in packages
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return sorted(path.relative_to(checkout) for path in [*top, *inside])


def _need_host_tools() -> None:
    missing = [name for name in HOST_TOOLS if shutil.which(name) is None]
    if missing:
        packages = " ".join(sorted({HOST_TOOLS[name] for name in missing}))
        raise UserlandError(
            f"A Pi userland is made with {', '.join(HOST_TOOLS)}; not found: {', '.join(missing)}",
            hint=f"On Debian: apt-get install {packages}. Elsewhere: use a Debian 12 container.",
        )


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """Hold the cache's lock."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _stamped(stamp: Path, digest: str) -> bool:
    """Whether the stamp says that this recipe was carried out."""
    try:
        return bool(json.loads(stamp.read_text())["sha256"] == digest)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _run(command: Sequence[str], *, hint: str | None = None, cwd: Path | None = None) -> str:
    """Run a command of this machine and return its standard output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserlandError(
            f"`{' '.join(command)}` ended with {done.returncode}\n"
            f"{_tail(done.stdout + done.stderr)}",
            hint=hint,
        )
    return done.stdout


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _unzip(wheel: Path, folder: Path) -> None:
    """Lay a wheel's files into a folder, as an installer would."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for data in folder.glob("*.data"):
        for part in ("purelib", "platlib"):
            if (data / part).exists():
                shutil.copytree(data / part, folder, dirs_exist_ok=True)
        shutil.rmtree(data)


def _version(wheel: Path) -> str:
    return str(parse_wheel_filename(wheel.name)[1])


def _fitting_wheels(folder: Path, constraints: Mapping[str, SpecifierSet]) -> dict[str, Path]:
    """The newest wheel in `folder` of each distribution that its constraint allows."""
    fitting: dict[str, Path] = {}
    for wheel in folder.glob("*.whl"):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        known = fitting.get(name)
        if constraints.get(name, SpecifierSet()).contains(version, prereleases=True) and (
            known is None or parse_wheel_filename(known.name)[1] < version
        ):
            fitting[name] = wheel
    return fitting


def _metadata(wheel: Path) -> Any:
    """A wheel's METADATA headers."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        return HeaderParser().parsestr(archive.read(name).decode("utf-8"))
