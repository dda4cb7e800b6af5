"""Builds an image: generated pieces, the agent loop and a board, by the board's C compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from agent.protocol.errors import PlanDoesNotFit, ShoalError

from .board import Board
from .slot_image import HEADER_BYTES, with_header

FIRMWARE = Path(__file__).parent / "firmware"
HARNESS = Path(__file__).parent / "harness"
LIBFUZZER = "libFuzzer"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
STACK_BYTES = 8192
WATCHDOG_S = 20
BOOTLOADER_BYTES = 4096
WARNINGS = (
    "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wdouble-promotion", "-Werror",
)  # fmt: skip
COMMON = ("-std=c99", *WARNINGS, "-O2", "-ffunction-sections", "-fdata-sections")
_SMALL = (
    "-Os", "-flto", "-fno-move-loop-invariants", "-fno-tree-loop-distribute-patterns",
)  # fmt: skip
"""Of the bootloader, whose own memcpy must not become a call to itself."""
_LOOP = ("shoal_agent.c", "shoal_crc.c", "shoal_frame.c")
_PREFIX = {"arm": "arm-none-eabi-", "riscv": "riscv64-unknown-elf-"}
APT_LINE = {
    "arm": "apt-get install --no-install-recommends gcc-arm-none-eabi libnewlib-arm-none-eabi",
    "riscv": "apt-get install --no-install-recommends gcc-riscv64-unknown-elf "
    "picolibc-riscv64-unknown-elf",
    "host": "apt-get install --no-install-recommends gcc libc6-dev",
}
_DECLARED = re.compile(r"^extern const struct shoal_piece (\w+)_piece;", re.MULTILINE)
_OVERFLOW = re.compile(r"region [`'](\w+)' overflowed by (\d+) bytes")
_CALL_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Sources:
    """Generated C of an image's pieces.

    Attributes:
        folder: Holds shoal_piece.h, kernels and a .c and .h for each piece.
        sha256: Of the .tflite that each piece was made from, hex, by its C prefix.
        plan: The plan's id, eight hex digits.
        classes: Of each piece whose answer rule lies there as PREFIX_scores.c: what it answers.
    """

    folder: Path
    sha256: Mapping[str, str]
    plan: str = "00000000"
    classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """What was built.

    Attributes:
        elf: With symbols; what QEMU runs. For the host: the program.
        binary: As it goes into flash; None for the host.
        map_file: The linker's map; None for the host.
        board: None for the host.
        sections: Bytes by section; empty for the host.
    """

    elf: Path
    binary: Path | None
    map_file: Path | None
    board: Board | None
    sections: Mapping[str, int]

    @property
    def flash_bytes(self) -> int:
        """Code, constants, weights, and the first values of variables."""
        names = (".vectors", ".text", ".ARM.exidx", ".data", ".image_end")
        return sum(self.sections.get(name, 0) for name in names)

    @property
    def ram_bytes(self) -> int:
        """Stack, variables, tensors and arena."""
        names = (".handover", ".stack", ".data", ".bss", ".arena")
        return sum(self.sections.get(name, 0) for name in names)


def compiler(toolchain: str) -> str:
    """The C compiler for `arm`, `riscv` or `host`.

    Raises:
        ShoalError: it is not installed; the hint has the apt line.
    """
    names = ("cc", "gcc", "clang") if toolchain == "host" else (f"{_PREFIX[toolchain]}gcc",)
    for name in names:
        if shutil.which(name) is not None:
            return name
    raise ShoalError(f"{names[0]} is not installed", APT_LINE[toolchain])


def prefixes(folder: Path) -> list[str]:
    """C prefixes of the pieces in a folder of generated C, in order.

    Raises:
        ShoalError: there is none.
    """
    found = [
        name
        for header in sorted(folder.glob("*.h"))
        for name in _DECLARED.findall(header.read_text("utf-8"))
    ]
    if not found:
        raise ShoalError(
            f"{folder}: no generated C of a piece", "make it: shoal codegen MODEL.tflite -o DIR"
        )
    return found


def build_image(
    board: Board | None,
    sources: Sources,
    out: Path,
    *,
    flash_bytes: int | None = None,
    ram_bytes: int | None = None,
    version: int = 1,
    stack_bytes: int = STACK_BYTES,
    slot: int | None = None,
    extra_flags: Sequence[str] = (),
) -> Image:
    """Compile and link an image.

    Args:
        board: None for a process of this machine.
        sources: The pieces.
        out: Folder to write to; created.
        flash_bytes: Budget; the board's own size where it is less. The linker refuses more.
        ram_bytes: Likewise.
        version: Of the image, told in its identity.
        stack_bytes: Room for the stack.
        slot: Link for this slot of the board's bootloader instead of the whole flash.
        extra_flags: Of the compiler.

    Raises:
        PlanDoesNotFit: flash or RAM overflows; says by how much.
        ShoalError: no compiler, or it refuses the sources.
    """
    out.mkdir(parents=True, exist_ok=True)
    if board is None:
        flash, ram = flash_bytes or 0, ram_bytes or 0
    else:
        room = board.flash.bytes
        if slot is not None:
            assert board.slots is not None
            room = board.slots.bytes - HEADER_BYTES
        flash = min(flash_bytes or room, room)
        ram = min(ram_bytes or board.ram.bytes, board.ram.bytes)
    (out / "shoal_image.c").write_text(
        _image_text(board, sources, flash=flash, ram=ram, version=version), encoding="utf-8"
    )
    files = [out / "shoal_image.c", *sorted(sources.folder.glob("*.c"))]
    of_slot = "shoal_slot_none.c" if slot is None else "shoal_slot.c"
    files += [FIRMWARE / name for name in (*_LOOP, of_slot)]
    include = ["-I", str(out), "-I", str(FIRMWARE), "-I", str(sources.folder)]
    if board is None:
        return _build_host(files, [*include, *extra_flags], out)
    (out / "shoal_board.h").write_text(board_header(board, slot), encoding="utf-8")
    (out / "memory.ld").write_text(
        _memory_text(board, flash=flash, ram=ram, slot=slot, stack_bytes=stack_bytes), "utf-8"
    )
    files += [FIRMWARE / "main.c", *([] if slot is None else _slot_files(board))]
    image = _link(
        board,
        [*files, *_port_files(board)],
        include,
        out / "image",
        ("-O2", "-DSHOAL_POLLED=0", "-DSHOAL_EVEN_PARITY=0", *extra_flags),
        flash,
        ram,
    )
    if slot is not None:
        assert image.binary is not None
        image.binary.write_bytes(with_header(image.binary.read_bytes(), version))
    return image


def build_bootloader(board: Board, out: Path) -> Image:
    """Build the bootloader of a board with slots.

    Args:
        board: Which.
        out: Folder to write to; created.

    Raises:
        PlanDoesNotFit: it exceeds BOOTLOADER_BYTES.
        ShoalError: no compiler.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "shoal_board.h").write_text(board_header(board, None), encoding="utf-8")
    ram = board.ram.bytes
    (out / "memory.ld").write_text(
        _memory_text(board, flash=BOOTLOADER_BYTES, ram=ram, slot=None, stack_bytes=2048), "utf-8"
    )
    files = [
        FIRMWARE / name for name in ("boot_main.c", "boot_an3155.c", "boot_memory.c", "shoal_crc.c")
    ]
    files += [*_slot_files(board), *_port_files(board)]
    include = ["-I", str(out), "-I", str(FIRMWARE)]
    flags = (*_SMALL, "-DSHOAL_POLLED=1", "-DSHOAL_EVEN_PARITY=1")
    return _link(board, files, include, out / "bootloader", flags, BOOTLOADER_BYTES, ram)


def build_boot_host(board: Board, out: Path) -> Path:
    """Build the bootloader's decisions for this machine, on a flash that is a file: boot_host.c."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "shoal_board.h").write_text(board_header(board, None), encoding="utf-8")
    names = ("boot_host.c", "boot_state.c", "shoal_sha256.c", "shoal_crc.c")
    program = out / "boot_host"
    command = [
        compiler("host"), *COMMON, "-I", str(out), "-I", str(FIRMWARE),
        *(str(FIRMWARE / name) for name in names), "-o", str(program),
    ]  # fmt: skip
    _compile(command, 0, 0)
    return program


@cache
def has_libfuzzer() -> bool:
    """Whether clang is here, and the runtime library that Debian packs apart from it."""
    if shutil.which("clang") is None:
        return False
    empty = "#include <stdint.h>\n#include <stddef.h>\n"
    empty += "int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n) { return d && n ? 0 : 0; }\n"
    command = ["clang", "-fsanitize=fuzzer,address", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input=empty.encode(), capture_output=True).returncode == 0


def build_fuzzer(sources: Sources, out: Path) -> tuple[Path, str]:
    """Build the frame parser and the command loop as a fuzzing target: harness/fuzz_loop.c.

    Args:
        sources: The pieces; outputs and arenas of at most 4096 bytes.
        out: Folder to write to; created.

    Returns:
        The program, and which fuzzer it is: libFuzzer where `has_libfuzzer`, else
        harness/fuzz_driver.c.

    Raises:
        ShoalError: no compiler that has the sanitizers.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = _image_text(None, sources, flash=0, ram=0, version=1)
    (out / "shoal_image.c").write_text(text, encoding="utf-8")
    include = ["-I", str(out), "-I", str(FIRMWARE), "-I", str(sources.folder)]
    flags = [*COMMON, *SANITIZERS, *include]
    target = [FIRMWARE / "shoal_agent.c", FIRMWARE / "shoal_frame.c", HARNESS / "fuzz_loop.c"]
    plain = [FIRMWARE / "shoal_crc.c", FIRMWARE / "shoal_slot_none.c", out / "shoal_image.c"]
    plain += sorted(sources.folder.glob("*.c"))
    program = out / "fuzz_loop"
    if has_libfuzzer():
        files = map(str, [*target, *plain])
        command = ["clang", *flags, "-fsanitize=fuzzer", *files, "-o", str(program), "-lm"]
        _compile(command, 0, 0)
        return program, LIBFUZZER
    cc = compiler("host")
    objects = []
    for path in (*plain, HARNESS / "fuzz_driver.c"):
        # Not followed: only edges of parser and loop are.
        objects.append(str(out / f"{path.stem}.o"))
        _compile([cc, *flags, "-c", str(path), "-o", objects[-1]], 0, 0)
    followed = ["-fsanitize-coverage=trace-pc", *map(str, target)]
    _compile([cc, *flags, *followed, *objects, "-o", str(program), "-lm"], 0, 0)
    return program, "coverage-guided, firmware_tools/harness/fuzz_driver.c"


def fuzz_command(program: Path, which: str, seconds: float, seed: int = 1) -> list[str]:
    """The command that fuzzes for so long with what `build_fuzzer` gave; it fails at a finding."""
    if which == LIBFUZZER:
        return [str(program), f"-max_total_time={seconds:.0f}", f"-seed={seed}", "-max_len=2048"]
    return [str(program), str(seconds), str(seed)]


def _slot_files(board: Board) -> list[Path]:
    assert board.slots is not None
    names = ("boot_state.c", "shoal_sha256.c", f"flash_{board.slots.driver}.c")
    return [FIRMWARE / name for name in names]


def _port_files(board: Board) -> list[Path]:
    port = "port_rv32.c" if board.toolchain == "riscv" else "port_cortex_m.c"
    return [FIRMWARE / name for name in (port, "port_bare.c", f"uart_{board.uart.driver}.c")]


def _link(
    board: Board,
    files: Sequence[Path],
    include: Sequence[str],
    target: Path,
    optimize: Sequence[str],
    flash: int,
    ram: int,
) -> Image:
    elf, map_file, binary = (target.with_suffix(end) for end in (".elf", ".map", ".bin"))
    libraries = (
        ["--specs=nano.specs", "--specs=nosys.specs"]
        if board.toolchain == "arm"
        else ["--specs=picolibc.specs"]
    )
    command = [
        compiler(board.toolchain), *board.flags, *COMMON, *optimize, *include,
        *map(str, files), "-o", str(elf),
        *libraries, "-nostartfiles", "-L", str(FIRMWARE), "-T", str(target.parent / "memory.ld"),
        f"-Wl,--gc-sections,-Map={map_file},--no-warn-rwx-segments", "-lm",
    ]  # fmt: skip
    _compile(command, flash, ram)
    prefix = _PREFIX[board.toolchain]
    _call([f"{prefix}objcopy", "-O", "binary", str(elf), str(binary)])
    return Image(elf, binary, map_file, board, _sections(f"{prefix}size", elf))


def _build_host(files: Sequence[Path], include: Sequence[str], out: Path) -> Image:
    program = out / "image"
    files = [*files, FIRMWARE / "port_host.c"]
    command = [compiler("host"), *COMMON, *include, *map(str, files), "-o", str(program), "-lm"]
    _compile(command, 0, 0)
    return Image(program, None, None, None, {})


def _compile(command: Sequence[str], flash: int, ram: int) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_CALL_TIMEOUT_S)
    if ran.returncode == 0:
        return
    over = {name: int(size) for name, size in _OVERFLOW.findall(ran.stderr)}
    lines = [
        f"the image needs {have + over[region]} B of {what}, budget {have} B "
        f"(over by {over[region]})"
        for region, what, have in (("FLASH", "flash", flash), ("RAM", "RAM", ram))
        if region in over
    ]
    if lines:
        raise PlanDoesNotFit(
            "\n".join(lines),
            "export with a smaller --keep or --max-drop, or give the device a larger budget",
        )
    raise ShoalError(f"{command[0]} refuses the sources:\n{ran.stderr.strip()[-4000:]}")


def _call(command: Sequence[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_CALL_TIMEOUT_S)
    if ran.returncode != 0:
        raise ShoalError(f"{' '.join(command)} failed:\n{ran.stderr.strip()}")
    return ran.stdout


def _sections(size: str, elf: Path) -> dict[str, int]:
    lines = (line.split() for line in _call([size, "-A", str(elf)]).splitlines())
    return {part[0]: int(part[1]) for part in lines if len(part) == 3 and part[0][0] == "."}


def board_header(board: Board, slot: int | None) -> str:
    """The text of shoal_board.h: a board's numbers for the C sources."""
    origin = board.flash.origin
    if slot is not None:
        assert board.slots is not None
        origin = board.slots.origin[slot] + HEADER_BYTES
    lines = {
        "UART_BASE": f"0x{board.uart.base:08X}U",
        "UART_RX_IRQ": str(board.uart.rx_irq),
        "UART_TX_IRQ": str(board.uart.tx_irq),
        "UART_BAUD": f"{board.uart.baud}U",
        "IRQS": str(board.irqs),
        "TICK_HZ": f"{board.tick_hz}U",
        "HAS_FPU": str(int(board.fpu)),
        "HAS_VTOR": str(int(board.vtor)),
        "VECTORS": f"0x{origin:08X}U",
        "WATCHDOG_S": f"{WATCHDOG_S}U",
    }
    if board.watchdog.driver != "none":
        lines[f"WATCHDOG_{board.watchdog.driver.upper()}"] = f"0x{board.watchdog.base:08X}U"
    if board.clock is not None:
        lines[f"CLOCK_{board.clock.upper()}"] = "1"
    if board.slots is not None:
        lines |= {
            "SLOT_0": f"0x{board.slots.origin[0]:08X}U",
            "SLOT_1": f"0x{board.slots.origin[1]:08X}U",
            "SLOT_BYTES": f"{board.slots.bytes}U",
            "STATE_0": f"0x{board.slots.state[0]:08X}U",
            "STATE_1": f"0x{board.slots.state[1]:08X}U",
            "PAGE_BYTES": f"{board.slots.page_bytes}U",
        }
    if slot is not None:
        lines["SLOT"] = f"{slot}U"
    defines = [f"#define SHOAL_{name} {value}" for name, value in lines.items()]
    return "\n".join(
        [
            f"/* Generated by `shoal build` from boards/{board.name}.yaml; do not edit. */",
            "#ifndef SHOAL_BOARD_H",
            "#define SHOAL_BOARD_H",
            *defines,
            "#endif",
            "",
        ]
    )


def _memory_text(board: Board, *, flash: int, ram: int, slot: int | None, stack_bytes: int) -> str:
    origin = board.flash.origin
    if slot is not None:
        assert board.slots is not None
        origin = board.slots.origin[slot] + HEADER_BYTES
    return (
        f"/* Generated by `shoal build` from boards/{board.name}.yaml; do not edit. */\n"
        f"shoal_stack_bytes = {stack_bytes};\n"
        "MEMORY\n{\n"
        f"    FLASH (rx) : ORIGIN = 0x{origin:08X}, LENGTH = {flash}\n"
        f"    RAM (rwx) : ORIGIN = 0x{board.ram.origin:08X}, LENGTH = {ram}\n"
        "}\n"
        "ENTRY(shoal_reset_handler)\n"
        "INCLUDE sections.ld\n"
    )


def _image_text(
    board: Board | None, sources: Sources, *, flash: int, ram: int, version: int
) -> str:
    names = prefixes(sources.folder)
    build = 0
    for path in (*sorted(sources.folder.glob("*.[ch]")), *sorted(FIRMWARE.glob("*.[ch]"))):
        build = zlib.crc32(path.read_bytes(), build)
    build = zlib.crc32(f"{board!r} {flash} {ram} {version}".encode(), build)
    entries = []
    for name in names:
        digest = bytes.fromhex(sources.sha256.get(name, "00" * 32))
        values = ", ".join(f"0x{value:02X}" for value in digest)
        entries.append(f"    {{&{name}_piece, {{{values}}}}},")

    def largest(what: str) -> list[str]:
        fields = [f"    uint8_t of_{name}[{name.upper()}_{what}_BYTES + 1];" for name in names]
        return [f"union {what.lower()}_room {{", *fields, "    uint64_t aligned[2];", "};"]

    lines = [
        "/* Generated by `shoal build`; do not edit. */",
        '#include "shoal_image.h"',
        "",
        *(f'#include "{name}.h"' for name in names),
        *(f'#include "{name}_scores.h"' for name in names if name in sources.classes),
        "",
        "/* Room for the largest piece: one runs at a time. */",
        *largest("INPUT"),
        *largest("OUTPUT"),
        *largest("ARENA"),
        "#if defined(__arm__) || defined(__riscv)",
        '#define ARENA __attribute__((section(".arena"), aligned(16)))',
        "#else",
        "#define ARENA __attribute__((aligned(16)))",
        "#endif",
        "static union input_room input ARENA;",
        "static union output_room output ARENA;",
        "static union arena_room arena ARENA;",
        "",
        "static const struct shoal_image_piece pieces[] = {",
        *entries,
        "};",
        "",
        "const struct shoal_image shoal_image = {",
        f'    .board = "{"host" if board is None else board.name}",',
        f"    .plan = 0x{sources.plan}U,",
        f"    .build = 0x{build:08X}U,",
        f"    .version = {version}U,",
        f"    .flash_bytes = {flash}U,",
        f"    .ram_bytes = {ram}U,",
        f"    .n_pieces = {len(names)}U,",
        "    .pieces = pieces,",
        "    .input = (int8_t *)&input,",
        "    .output = (int8_t *)&output,",
        "    .arena = &arena,",
        "};",
        "",
        *_answer_lines(names, sources.classes),
    ]
    return "\n".join(lines)


def _answer_lines(names: Sequence[str], classes: Mapping[str, tuple[int, ...]]) -> list[str]:
    head = "bool shoal_image_answer(uint8_t piece, const int8_t *scores, "
    head += "struct shoal_image_answer *answer)"
    answering = [(index, name) for index, name in enumerate(names) if name in classes]
    if not answering:
        unused = [f"    (void){name};" for name in ("piece", "scores", "answer")]
        return [head, "{", *unused, "    return false;", "}", ""]
    tables = [
        f"static const uint16_t classes_of_{name}[] = {{{', '.join(map(str, classes[name]))}}};"
        for _, name in answering
    ]
    cases = [
        line
        for index, name in answering
        for line in (
            f"    case {index}U:",
            f"        said = shoal_scores_answer(&{name}_scores, scores);",
            f"        answer->class_index = classes_of_{name}[said.class_position];",
            "        break;",
        )
    ]
    return [
        *tables,
        "",
        head,
        "{",
        "    struct shoal_answer said;",
        "    switch (piece) {",
        *cases,
        "    default:",
        "        return false;",
        "    }",
        "    answer->known = said.known != 0U;",
        "    answer->entropy = said.entropy;",
        "    answer->confidence = said.confidence;",
        "    return true;",
        "}",
        "",
    ]
