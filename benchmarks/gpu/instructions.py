"""Count the machine instructions of the kernels on tensor cores: registers, spills, and instructions for each element.

    python benchmarks/gpu/instructions.py [--architectures 80 89 90] [--cuobjdump FILE] [--json FILE] [--write]

An element is a position of a channel in a direction. The kernels are compiled, not run: nvcc is looked for as
`quartermap plugin build` does, and cuobjdump, which prints machine code, comes with the CUDA toolkit or from pip
(`nvidia-cuda-cuobjdump`). What is counted is what a warp issues over a whole launch, idle lanes and padding paid for:
reading x and writing y, staging, parameters, and the walk; each loop by how often it runs. A branch that one warp of a
team takes is divided among its warps. What a block does where y is not finite is left out. Of several states
count_states.py says what is counted.

`--write` also puts the counts into instructions.json beside this file, of which traffic.py and docs/performance.md are
made. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from count_states import count_general, count_states
from machine_code import Loop, body, functions, walk, without_repair

from quartermap_deploy.native.build import OLDEST_ARCHITECTURE, find_nvcc, plugin_sources

COUNTS = Path(__file__).with_name("instructions.json")
ARCHITECTURES = ("80", "89", "90")
TYPES = {"float16": "6__half", "bfloat16": "13__nv_bfloat16"}
GOALS = {56: 17.0, 28: 21.0, 14: 21.0, 7: 30.0}
"""Of compute capability 9.0 in float16, by the side of the map."""
STATES_GAIN = 2.0
"""By which the kernel of several states is ahead of the general one, at least."""
MOST_SPILLED = 16
"""Bytes."""
ROOM_FOR_56 = ("90", "100", "103", "110")
"""Capabilities whose blocks have the 226 KiB that a resident map of 56 × 56 needs; no other runs that kernel."""
USER_ERROR = 2
FAMILIES = ("tensor_core/resident", "tensor_core/split", "tensor_core/states", "kernel")
"""Sources that are compiled, of each element type."""

_RESIDENT = re.compile(
    r"resident_kernelI(?P<type>6__half|13__nv_bfloat16).*?ResidentGeometryI(?P<numbers>.*?)EEE"
)
_SPLIT = re.compile(r"split_kernelI(?P<type>6__half|13__nv_bfloat16)(?P<numbers>.*?)EEE?v")
_STATES = re.compile(r"states_kernelI(?P<type>6__half|13__nv_bfloat16)(?P<numbers>.*?)EEE?v")
_GENERAL = re.compile(r"selective_scan_kernelI(?P<type>6__half|13__nv_bfloat16)Li2ELb0ELb1ELb1EEEv")
"""The general kernel for several states of two channels, with a projection, and with its maps in shared memory."""
_NUMBER = re.compile(r"L[ib](\d+)E")


@dataclass(frozen=True)
class Geometry:
    """`ResidentGeometry` of geometry.h.

    Attributes:
        width: of the map.
        height: of the map.
        ranks: R.
        warps: in a team.
        teams: in a block and group.
        groups: of 16 channels in a block.
        private: whether each warp stages what it needs.
        blocks: on a multiprocessor.
    """

    width: int
    height: int
    ranks: int
    warps: int
    teams: int
    groups: int
    private: int
    blocks: int

    @property
    def all_warps(self) -> int:
        """Warps of a block."""
        return self.warps * self.teams * self.groups

    @property
    def tasks(self) -> int:
        """Tasks of the map."""
        slots = self.height // 7 * (-(-self.width // 2))
        return -(-slots // 4)

    @property
    def chunks(self) -> int:
        """Chunks of the map."""
        return -(-self.tasks // self.warps)

    @property
    def elements(self) -> float:
        """Elements of a block for each lane of it."""
        return 16 * self.groups * self.width * self.height * 4 / (32 * self.all_warps)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel.

    Attributes:
        name: mangled.
        registers: of a thread.
        spilled: bytes of a thread that are written to memory for want of registers.
        reloaded: and read from there.
    """

    name: str
    registers: int
    spilled: int
    reloaded: int


def refuse(message: str) -> None:
    """End the program with one message and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(USER_ERROR)


def known_architecture(name: str) -> bool:
    """Whether the kernels are compiled for an architecture of this name."""
    return bool(re.fullmatch(r"\d{2,3}[af]?", name)) and int(name.rstrip("af")) >= OLDEST_ARCHITECTURE


def find_cuobjdump(named: Path | None) -> str | None:
    """Return the program: as named, on the PATH, beside nvcc, or from a pip package of this interpreter."""
    places = [str(named)] if named else [shutil.which("cuobjdump")]
    if not named and (nvcc := find_nvcc()):
        places.append(str(Path(nvcc).resolve().with_name("cuobjdump")))
    if not named:
        places += [str(Path(folder, "nvidia", "cu13", "bin", "cuobjdump")) for folder in sys.path]
    return next((place for place in places if place and Path(place).is_file()), None)


def compile_kernels(nvcc: str, source: Path, architecture: str, output: Path) -> dict[str, Compiled]:
    """Compile one source for one architecture, and return what the compiler says, by mangled name."""
    folder = plugin_sources() / "kernels"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-arch=sm_{architecture}",
        f"-I{folder / 'include'}",
        f"-I{folder}",
    ]
    command += ["-Xptxas", "-v", "-cubin", "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        refuse(f"{source.name} does not compile for sm_{architecture}:\n{done.stderr[-2000:]}")
    found, name, spills = {}, "", (0, 0)
    for line in done.stderr.splitlines():
        if match := re.search(r"entry function '(\S+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(match[1]), int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            found[name] = Compiled(name, int(match[1]), *spills)
    return found


def disassemble(cuobjdump: str, cubin: Path) -> str:
    """Return the machine code as text."""
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        refuse(f"{cuobjdump} fails: {done.stderr.strip()[-500:]}")
    return done.stdout


def kind_of(loop: Loop) -> str:
    """Say what a loop of a resident kernel does, by its instructions."""
    kinds = loop.kinds
    if kinds["MUFU"] >= 28:
        return "walk"
    if kinds["LDG"] and kinds["STS"]:
        # B and C are put into the halves of words; x is only multiplied.
        return "stage" if kinds["LOP3"] >= 4 and kinds["HMUL2"] + kinds["HFMA2"] <= 1 else "maps"
    if kinds["STG"] and kinds["LDS"]:
        return "maps"
    raise ValueError(f"a loop at {loop.first:#x} that is not known: {dict(kinds)}")


def runs_of(geometry: Geometry, loop: Loop) -> float:
    """Return how often a warp runs a loop of a resident kernel. Two teams have loops of their own."""
    kind = kind_of(loop)
    if kind == "walk":
        return geometry.chunks / geometry.teams
    if kind == "stage":
        return max(1.0, geometry.tasks / geometry.all_warps)
    channels = 16 * geometry.groups / geometry.all_warps
    return channels / min(4, math.ceil(channels))  # as many at once as `for_each_line` takes


def count_resident(geometry: Geometry, function: Loop) -> dict[str, float]:
    """Count instructions for each element, in all and by part, and those of two units."""
    parts: defaultdict[str, float] = defaultdict(float)
    kinds: defaultdict[str, float] = defaultdict(float)
    for loop, times in walk(function, lambda each: runs_of(geometry, each)):
        outside = loop is function
        part = "parameters and the rest" if outside else kind_of(loop)
        # Outside, what belongs to one team is half of it.
        share = times / geometry.teams if outside else times
        alone = loop.side_branch() if part == "walk" and geometry.warps > 1 else 0
        parts[part] += (len(loop.own) - alone) * share
        parts["segments"] += alone * share / geometry.warps
        for kind, number in loop.kinds.items():
            kinds[kind] += number * share
    counts = {name: value / geometry.elements for name, value in parts.items() if value}
    return {
        "instructions": sum(counts.values()),
        "special functions": kinds["MUFU"] / geometry.elements,
        "matrix products": kinds["HMMA"] / geometry.elements,
        **counts,
    }


def count(nvcc: str, cuobjdump: str, architectures: Sequence[str]) -> list[dict[str, Any]]:
    """Compile and count everything; a row for each kernel, element type and architecture."""
    rows = []
    folder = plugin_sources() / "kernels"
    with tempfile.TemporaryDirectory() as temporary:
        for architecture in architectures:
            for element_type in TYPES:
                for family in FAMILIES:
                    cubin = Path(temporary) / "kernels.cubin"
                    source = folder / f"{family}_{element_type}.cu"
                    print(f"compiling {source.name} for sm_{architecture}", file=sys.stderr, flush=True)
                    compiled = compile_kernels(nvcc, source, architecture, cubin)
                    code = functions(disassemble(cuobjdump, cubin))
                    rows += [
                        _row(architecture, element_type, each, body(without_repair(code[name])))
                        for name, each in sorted(compiled.items())
                        if "selective_scan_kernel" not in name or _GENERAL.search(name)
                    ]
    return rows


def _row(architecture: str, element_type: str, compiled: Compiled, function: Loop) -> dict[str, Any]:
    row: dict[str, Any] = {"architecture": architecture, "type": element_type}
    if match := _RESIDENT.search(compiled.name):
        geometry = Geometry(*(int(number) for number in _NUMBER.findall(match["numbers"] + "E")))
        row |= {"kernel": "resident", "geometry": asdict(geometry)}
        row["counts"] = count_resident(geometry, function)
    elif match := _SPLIT.search(compiled.name):
        blocks, tiles, odd = (int(number) for number in _NUMBER.findall(match["numbers"] + "E"))
        row |= {"kernel": "split", "rank_blocks": blocks, "tiles": tiles, "odd": bool(odd)}
        walks = [len(loop.own) for loop, _ in walk(function, lambda _: 1.0) if loop.kinds["MUFU"] >= 28]
        row["counts"] = {"walk": sum(walks) / len(walks) / (4 * tiles)}
    elif match := _STATES.search(compiled.name):
        tiles, odd = (int(number) for number in _NUMBER.findall(match["numbers"] + "E"))
        row |= {"kernel": "states", "tiles": tiles, "odd": bool(odd), "counts": count_states(function, tiles)}
    elif _GENERAL.search(compiled.name):
        row |= {"kernel": "general", "counts": count_general(function)}
    else:
        raise ValueError(f"a kernel that is not known: {compiled.name}")
    row["registers"] = compiled.registers
    row["spilled"], row["reloaded"] = compiled.spilled, compiled.reloaded
    return row


def runs(row: Mapping[str, Any]) -> bool:
    """Whether a card of this capability can run a kernel."""
    large = row["kernel"] == "resident" and row["geometry"]["width"] == 56
    return not large or row["architecture"] in ROOM_FOR_56


def missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which goals are missed, in words."""
    found = []
    for row in rows:
        name = f"{row['kernel']} {_title(row)}, {row['type']}, sm_{row['architecture']}"
        if row["spilled"] > MOST_SPILLED and runs(row):
            found.append(f"{name}: {row['spilled']} bytes are spilled; at most {MOST_SPILLED}")
        if row["kernel"] == "resident" and (row["architecture"], row["type"]) == ("90", "float16"):
            number, goal = row["counts"]["instructions"], GOALS[row["geometry"]["width"]]
            if not number <= goal:
                found.append(f"{name}: {number:.1f} instructions; at most {goal:.0f}")
    general = {(row["architecture"], row["type"]): row for row in rows if row["kernel"] == "general"}
    for row in rows:
        if row["kernel"] == "states":
            number, most = (
                each["counts"]["instructions"] for each in (row, general[row["architecture"], row["type"]])
            )
            if not number <= most / STATES_GAIN:
                name = f"16 states, {_title(row)}, {row['type']}, sm_{row['architecture']}"
                found.append(f"{name}: {number:.0f} instructions where the general kernel has {most:.0f}")
    return found


def _title(row: Mapping[str, Any]) -> str:
    if row["kernel"] == "resident":
        geometry = row["geometry"]
        return f"{geometry['height']} × {geometry['width']}, R = {geometry['ranks']}"
    if row["kernel"] == "general":
        return "several states"
    odd = ", odd widths" if row["odd"] else ""
    if row["kernel"] == "states":
        return f"segments of {row['tiles']}{odd}"
    return f"R ≤ {8 * row['rank_blocks']}, segments of {row['tiles']}{odd}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of docs/performance.md: counts of resident kernels, of 16 states, and registers of all."""
    return "\n\n".join((_resident_table(rows), _states_table(rows), _registers_table(rows)))


def _states_table(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = ("instructions", "each state", "special functions")
    heads = ["16 states", *(f"{part}, {name}" for name in TYPES for part in parts)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    of_states = [
        row for row in rows if row["kernel"] in ("states", "general") and row["architecture"] == "90"
    ]
    for first in sorted((row for row in of_states if row["type"] == "float16"), key=_order):
        cells = [
            _title(first) if first["kernel"] == "states" else "the general kernel, its loop over the states"
        ]
        for name in TYPES:
            same = [row for row in of_states if row["type"] == name and _order(row) == _order(first)]
            cells += [
                f"{same[0]['counts'][part]:.{0 if part == parts[0] else 1}f}" if same else "–"
                for part in parts
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _resident_table(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = ("walk", "segments", "stage", "maps", "parameters and the rest")
    heads = ["resident kernel, float16", "instructions", *parts, "special functions", "matrix products"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in sorted(_of(rows, "resident", "float16", "90"), key=_order):
        counts = row["counts"]
        numbers = [f"{counts['instructions']:.1f}", *(f"{counts.get(part, 0.0):.2f}" for part in parts)]
        numbers += [f"{counts[name]:.2f}" for name in ("special functions", "matrix products")]
        lines.append(f"| {_title(row)} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _registers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    architectures = sorted({row["architecture"] for row in rows})
    heads = ["kernel", *(f"{name}, {a[:-1]}.{a[-1]}" for name in TYPES for a in architectures)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for first in sorted(_of(rows, None, "float16", architectures[0]), key=_order):
        cells = [f"{first['kernel']}, {_title(first)}"]
        for element_type in TYPES:
            for architecture in architectures:
                same = [
                    row
                    for row in _of(rows, first["kernel"], element_type, architecture)
                    if _title(row) == _title(first)
                ]
                cells.append(_registers(same[0]) if same else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(
    rows: Sequence[Mapping[str, Any]], kernel: str | None, element_type: str, architecture: str
) -> list[Mapping[str, Any]]:
    return [
        row
        for row in rows
        if kernel in (None, row["kernel"])
        and (row["type"], row["architecture"]) == (element_type, architecture)
    ]


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    if row["kernel"] == "resident":
        return ("resident", -row["geometry"]["width"], row["geometry"]["ranks"])
    if row["kernel"] == "general":
        return ("states, general", 0, 0)
    return (row["kernel"], row["tiles"] + 10 * row["odd"], row.get("rank_blocks", 0))


def _registers(row: Mapping[str, Any]) -> str:
    spills = f" ({row['spilled']} / {row['reloaded']})" if row["spilled"] or row["reloaded"] else ""
    return f"{row['registers']}{spills}"


def main() -> None:
    """Compile, count, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architectures", nargs="+", default=list(ARCHITECTURES), metavar="CC", help="such as 90"
    )
    parser.add_argument("--cuobjdump", type=Path, metavar="FILE", help="the program that prints machine code")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")
    parser.add_argument(
        "--write", action="store_true", help=f"also write them to {COUNTS.name} beside this file"
    )
    options = parser.parse_args()
    if wrong := [name for name in options.architectures if not known_architecture(name)]:
        refuse(
            f"{wrong[0]!r} is no architecture of the kernels on tensor cores; expected such as 80, 89 or 90"
        )
    nvcc, cuobjdump = find_nvcc(), find_cuobjdump(options.cuobjdump)
    if nvcc is None:
        refuse(
            "there is no nvcc; install the CUDA toolkit 12.4 or newer, put it on the PATH or set CUDA_HOME"
        )
    if cuobjdump is None and options.cuobjdump is not None:
        refuse(f"there is no file {options.cuobjdump}; name the program cuobjdump, or leave --cuobjdump out")
    if cuobjdump is None:
        refuse(
            "there is no cuobjdump; install it with pip install nvidia-cuda-cuobjdump, or name it with --cuobjdump"
        )
    rows = count(str(nvcc), str(cuobjdump), options.architectures)
    release = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", release)
    described = {"measured": False, "nvcc": version[1] if version else None, "kernels": rows}
    text = json.dumps(described, indent=1) + "\n"
    for file in [*([options.json] if options.json else []), *([COUNTS] if options.write else [])]:
        file.write_text(text)
    print(markdown(rows))
    for words in missed(rows):
        print(f"MISSED: {words}")


if __name__ == "__main__":
    main()
