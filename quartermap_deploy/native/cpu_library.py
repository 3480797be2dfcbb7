"""The CPU library: where it is found, and whether it fits.

A library is taken from three places and no others: the file that the environment variable QUARTERMAP_NATIVE names, the
package itself where a wheel brought one, and this user's own cache of libraries that were built here from exactly these
sources. What does not fit is passed over, with its reason. Nothing is ever built by looking for it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from quartermap_deploy import __version__
from quartermap_deploy.errors import QuartermapError
from quartermap_deploy.native.cpu_build import CPU_LIBRARY, built_libraries, sources_hash
from quartermap_deploy.native.cpu_kernels import CpuKernels
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import CPU, describe, load
from quartermap_deploy.plain_text import printable
from quartermap_deploy.private_folders import own_folder

NATIVE_VARIABLE = "QUARTERMAP_NATIVE"
"""One of `OFF` turns the library off, one of `ON` says what holds without it; a path from / on names one."""
OFF = ("0", "off", "no", "false")
ON = ("", "1", "on", "yes", "true")
INSTRUCTION_SET_VARIABLE = "QUARTERMAP_INSTRUCTION_SET"
"""Names the instruction set that the library uses; it reads this as it is loaded."""
INTERFACE = 1
"""QUARTERMAP_CPU_SCAN_VERSION of `quartermap/cpu_scan.h`: of its functions and structures."""
BUILD = CPU.build

Origin = Literal["QUARTERMAP_NATIVE", "wheel", "built here", "named"]


@dataclass(frozen=True)
class CpuLibrary:
    """A library that fits this release and this machine.

    Attributes:
        path: where it lies.
        contract: what it says about itself.
        instruction_set: what its scans use here: "avx512", "avx2", "baseline" or "neon".
        origin: where it comes from; "named" by the caller, who looks at it.
    """

    path: Path
    contract: Mapping[str, Any]
    instruction_set: str
    origin: Origin

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class CpuSearch:
    """What was found.

    Attributes:
        library: the one to use, or None.
        refused: what was passed over, each a path or a place and the reason, which names its file.
        summary: in one line, which was chosen, or why none.
    """

    library: CpuLibrary | None
    refused: tuple[tuple[str, str], ...]
    summary: str

    @property
    def warning(self) -> str | None:
        """What whoever runs a model should know of what was passed over, in one line; None where nothing was."""
        if not self.refused:
            return None
        reasons = "; ".join(" ".join(reason.split()) for _, reason in self.refused)
        instead = (
            "the portable form runs" if self.library is None else f"{printable(self.library.path)} is used"
        )
        return f"{reasons}; {instead}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "library": None if self.library is None else self.library.to_dict(),
            "refused": [{"place": place, "reason": reason} for place, reason in self.refused],
            "summary": self.summary,
        }


def find_cpu_library() -> CpuSearch:
    """Look for a library that fits; one that does not is no error.

    The answer is kept for this process, until the environment names another place or a library comes or goes.
    """
    named = os.environ.get(NATIVE_VARIABLE, "")
    if named.lower() in OFF:
        return CpuSearch(None, (), f"turned off by {NATIVE_VARIABLE}={named}")
    candidates: list[tuple[Origin, Path]] = []
    refused: list[tuple[str, str]] = []
    try:
        candidates.extend(_places(refused))
    except (QuartermapError, OSError) as error:
        refused.append(("the cache of libraries built here", str(error)))
    instruction_set = os.environ.get(INSTRUCTION_SET_VARIABLE)
    return _choose(
        tuple((*place, _changed(place[1])) for place in candidates), tuple(refused), instruction_set
    )


def named_and_passed_over(found: CpuSearch) -> bool:
    """Whether the environment names a library, and another one or none was taken."""
    named = os.environ.get(NATIVE_VARIABLE, "")
    return any(place in (NATIVE_VARIABLE, named) for place, _ in found.refused)


class _InstructionSetError(PluginError):
    """The instruction set that the environment asks for is not to be had, whichever library is taken."""


def load_cpu_library(path: Path, origin: Origin = "named") -> CpuLibrary:
    """Load a library, after a look at its file, and compare what it says about itself with this release.

    Args:
        path: the library; loading it runs code of it.
        origin: where it comes from.

    Raises:
        PluginError: if it is missing, damaged, for another platform, of another release or other sources, or for
            instructions that this processor lacks.
    """
    library = load(path, kind=CPU)
    contract = describe(library, path, CPU)
    if wrong := _differences(contract):
        raise PluginError(
            f"the CPU library {printable(path)} does not fit this release of quartermap-deploy; build it anew: {BUILD}"
            "\n  " + "\n  ".join(wrong)
        )
    instruction_set = CpuKernels(library).instruction_set
    if instruction_set not in contract["instruction_sets"]:
        named, built = os.environ.get(INSTRUCTION_SET_VARIABLE, ""), contract["instruction_sets"]
        reason = (
            f"this processor lacks {named}, which {INSTRUCTION_SET_VARIABLE} asks for; leave the variable out, and "
            "the widest that there is is taken"
            if named in built
            else f"{INSTRUCTION_SET_VARIABLE} is {printable(named)!r}; expected one of {', '.join(built)}"
        )
        raise _InstructionSetError(reason)
    return CpuLibrary(path, contract, instruction_set, origin)


def summary(library: CpuLibrary) -> str:
    """Return one line about a library that is used."""
    return f"{printable(library.path)} ({library.origin}, {library.instruction_set})"


def _differences(contract: Mapping[str, Any]) -> list[str]:
    """Compare a library's contract with this package's; returns one line for each difference."""
    try:
        sources: str | None = sources_hash()
    except PluginError:
        # Somebody took them out of the installation.
        sources = None
    expected = {"library": "quartermap_cpu", "version": INTERFACE, "release": __version__, "sources": sources}
    wrong = [
        f"{name}: the library has {_short(contract.get(name))}, this package {_short(value)}"
        for name, value in expected.items()
        if value is not None and contract.get(name) != value
    ]
    if not wrong and not isinstance(contract.get("instruction_sets"), list):
        wrong.append("instruction_sets: the library has none")
    return wrong


def _short(value: object) -> str:
    text = printable(repr(value))
    return text if len(text) < 40 else f"{text[:16]}…{text[-1]}"


def _places(refused: list[tuple[str, str]]) -> Iterator[tuple[Origin, Path]]:
    """Yield the files that are there, in the order in which they are tried."""
    named = os.environ.get(NATIVE_VARIABLE, "")
    if named.lower() not in ON:
        if os.path.isabs(named):
            yield "QUARTERMAP_NATIVE", Path(named)
        else:
            reason = f"{NATIVE_VARIABLE} is {printable(named)!r}; expected 0, 1, or the path of a library from / on"
            refused.append((NATIVE_VARIABLE, reason))
    carried = Path(__file__).resolve().parents[1] / "_native" / CPU_LIBRARY
    if carried.is_file():
        yield "wheel", carried
    if own_folder("cache") is None:
        # Whoever has no home has built nothing, either.
        return
    for path in built_libraries():
        yield "built here", path


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=8)
def _choose(
    candidates: tuple[tuple[Origin, Path, int], ...],
    refused: tuple[tuple[str, str], ...],
    instruction_set: str | None,
) -> CpuSearch:
    """Take the first library that fits.

    Args:
        candidates: each with its origin and when it was changed.
        refused: what was passed over already.
        instruction_set: what the environment asks for; another answer for another one.
    """
    for origin, path, _ in candidates:
        try:
            library = load_cpu_library(path, origin)
        except (PluginError, OSError) as error:
            place = INSTRUCTION_SET_VARIABLE if isinstance(error, _InstructionSetError) else str(path)
            refused = tuple(dict.fromkeys([*refused, (place, str(error))]))
            continue
        return CpuSearch(library, refused, summary(library))
    if not refused:
        return CpuSearch(None, (), f"none was built: {BUILD}")
    return CpuSearch(None, refused, f"none fits: {' '.join(refused[0][1].split())}")
