"""Building the CPU library with a C++17 compiler alone, in seconds, from the sources that come with this package.

What is built lies in this user's own cache, in a folder that is named by what it was built from: sources, compiler,
flags and platform. Nothing is built twice, and nobody else may write there.

    <cache>/native/<platform>-<sources>-<everything>/libquartermap_cpu.so

Needs Python's standard library alone, as the wheel's build hook calls it too.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy import __version__
from quartermap_deploy.errors import MissingDependencyError, TrustError
from quartermap_deploy.files import write_whole
from quartermap_deploy.machine import usable_cores
from quartermap_deploy.native.build import important_lines, plugin_sources, require_writable
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library_format import FormatError, check_format
from quartermap_deploy.native.seal import SealError, check_seal, sealed
from quartermap_deploy.plain_text import printable
from quartermap_deploy.private_folders import HOME_VARIABLE, check_private, make_private, own_folder
from quartermap_deploy.progress import SILENT, Progress

CPU_LIBRARY = {"darwin": "libquartermap_cpu.dylib", "win32": "quartermap_cpu.dll"}.get(
    sys.platform, "libquartermap_cpu.so"
)
CPU_COMPILERS = ("clang++", "g++") if sys.platform == "win32" else ("c++", "g++", "clang++")
"""Looked for in this order, after the environment variable CXX."""
INCLUDES = ("kernels/include", "kernels/cpu", "onnxruntime")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-pthread",
    *(() if sys.platform == "win32" else ("-fPIC",)),
)
MACHINE = ("-arch", platform.machine()) if sys.platform == "darwin" else ()
"""A Python for Intel on a Mac with Apple's own processor wants a library for Intel."""
X86 = ("x86_64", "amd64")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
VECTORS = {
    "avx2.cpp": AVX2,
    "avx512.cpp": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *AVX2),
}
"""Files for x86-64 alone, and the instructions that they may use; all others run on every processor."""
SCHEDULED = ("-frename-registers", "-fschedule-insns", "-fsched-pressure")
"""What GCC needs to keep four states in registers as well as other compilers do: 7 % of scans with 16 states."""
STATIC = {
    "linux": ("-static-libstdc++", "-static-libgcc", "-s"),
    "win32": ("-static", "-s"),
}
"""How the C++ library gets into ours, where it can: other modules of the process may have brought an older one."""
EXPORTED = "{ global: RegisterCustomOps; quartermap_cpu_*; local: *; };"
"""A version script for Linux: what headers of the C++ library bring into ours must not be seen from outside, since then
the copies of it in other modules of the process would take its place."""
_SECONDS = 600
"""No compiler needs as long for one file."""


@dataclass(frozen=True)
class CpuBuildOptions:
    """How the library is built; only what is built by the defaults, with any compiler, is ever found by itself.

    Attributes:
        compiler: a command, such as "clang++", "ccache g++" or one for another machine; None takes $CXX, or the first
            of `CPU_COMPILERS`.
        portable_vectors: vectors in plain C++, as for compilers without vector types, and no AVX; for tests.
        flags: more flags for the compiler; for tests.
    """

    compiler: str | None = None
    portable_vectors: bool = False
    flags: tuple[str, ...] = ()

    @property
    def usual(self) -> bool:
        """Whether it is what users build."""
        return not (self.portable_vectors or self.flags)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: the words that call it.
        version: the first line that it prints about itself.
        target: the machine and system that it compiles for, such as "x86_64-linux-gnu".
    """

    command: tuple[str, ...]
    version: str
    target: str

    @property
    def for_x86(self) -> bool:
        """Whether it compiles for x86-64."""
        return self.target.startswith(X86)


@dataclass(frozen=True)
class BuiltLibrary:
    """A library in this user's cache.

    Attributes:
        path: where it lies.
        fits: whether it was built for this platform, from exactly these sources, in the usual way.
        changed: when it was built, in seconds since 1970.
    """

    path: Path
    fits: bool
    changed: float

    @property
    def built(self) -> str:
        """When it was built, in ISO 8601."""
        when = datetime.datetime.fromtimestamp(self.changed, datetime.timezone.utc)
        return when.isoformat(timespec="seconds")

    @property
    def whole(self) -> bool:
        """Whether it is as it was built; its file is read for that."""
        return is_whole(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"path": str(self.path), "fits": self.fits, "whole": self.whole, "built": self.built}


# The sources ----------------------------------------------------------------------------------------------------


def cpu_sources() -> dict[str, Path]:
    """Return every file that the library is made of, by its name below the folder of the sources.

    Raises:
        PluginError: if this installation brings none.
    """
    root = plugin_sources()
    found = [
        root / "kernels" / "include" / "quartermap" / "cpu_scan.h",
        *(path for folder in INCLUDES[1:] for path in (root / folder).glob("*.[ch]*")),
    ]
    if not all(path.is_file() for path in found) or len(found) == 1:
        raise PluginError(
            "this installation of quartermap-deploy brings no sources of the CPU library; install it anew with pip"
        )
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}


@functools.cache
def sources_hash() -> str:
    """Return the SHA-256 of the sources with their names, and of how they are built, in hexadecimal.

    Raises:
        PluginError: if this installation brings none.
    """
    return hash_of_files(cpu_sources(), json.dumps([FLAGS, VECTORS, SCHEDULED, STATIC, EXPORTED]).encode())


def hash_of_files(files: Mapping[str, Path], before: bytes = b"") -> str:
    """Return the SHA-256 of files with their names, in their order, in hexadecimal.

    Args:
        files: by name.
        before: what is hashed before them.
    """
    digest = hashlib.sha256(before)
    for name, path in files.items():
        data = path.read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


# The compiler ---------------------------------------------------------------------------------------------------


def find_compiler(named: str | None = None) -> Compiler:
    """Return the C++ compiler that builds the library.

    Args:
        named: a command; None takes $CXX, or the first of `CPU_COMPILERS` that is there.

    Raises:
        MissingDependencyError: if there is none, or not the one that is named.
    """
    named = named or os.environ.get("CXX", "").strip() or None
    for command in CPU_COMPILERS if named is None else (named,):
        # Windows' paths are full of what escapes letters elsewhere.
        try:
            words = shlex.split(command, posix=sys.platform != "win32")
        except ValueError as error:  # a quotation without an end
            raise MissingDependencyError(
                f"{printable(command)!r}, which the environment variable CXX or an option names, is no command: {error}"
            ) from None
        if words and (program := shutil.which(words[0])):
            whole = (program, *words[1:])
            return Compiler(whole, _asked(whole, "--version"), _asked(whole, "-dumpmachine"))
    if named is not None:
        raise MissingDependencyError(
            f"there is no compiler {printable(named)}, which the environment variable CXX or an option names; name one "
            "that is there"
        )
    raise MissingDependencyError(
        f"building the CPU library needs a C++17 compiler, and there is none on the PATH (looked for: $CXX, "
        f"{', '.join(CPU_COMPILERS)}): {_how_to_install()}"
    )


def _how_to_install() -> str:
    return {
        "darwin": "xcode-select --install",
        "win32": "install LLVM (winget install LLVM.LLVM) with the build tools of Visual Studio, or MinGW-w64",
    }.get(sys.platform, "apt install g++, dnf install gcc-c++, apk add g++, or conda install gxx")


def _asked(command: Sequence[str], question: str) -> str:
    """Return the first line of a compiler's answer."""
    try:
        done = subprocess.run(
            [*command, question],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
            env=_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependencyError(
            f"the compiler {printable(command[0])} cannot be run: {error}"
        ) from error
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode != 0 or not lines:
        raise MissingDependencyError(
            f"{printable(' '.join(command))} is no compiler that can be used: asked for {question}, it says "
            f"{printable(lines[0] if lines else 'nothing')!r}"
        )
    return lines[0].strip()


def _environment() -> dict[str, str]:
    """Return the environment of compilers; their messages are read, so they are to be in English."""
    return {**os.environ, "LC_ALL": "C"}


# Where libraries lie --------------------------------------------------------------------------------------------


def built_folder() -> Path:
    """Where the libraries that were built here lie; the folder need not be there yet.

    Raises:
        TrustError: if nobody knows this user's home.
    """
    cache = own_folder("cache")
    if cache is None:
        raise TrustError(
            f"this user has no home to keep libraries in; name a folder in the environment variable {HOME_VARIABLE}, "
            "or one for the library with --out"
        )
    return cache / "native"


def built_libraries() -> list[Path]:
    """Return the libraries that were built here from exactly these sources in the usual way, the newest first.

    Raises:
        TrustError: if others could put libraries there, or nobody knows this user's home.
        PluginError: if this installation brings no sources.
    """
    return [library.path for library in every_built() if library.fits]


def every_built() -> list[BuiltLibrary]:
    """Return all libraries that were built here, also from other sources, the newest first.

    Raises:
        TrustError: if others could put libraries there, or nobody knows this user's home.
        PluginError: if this installation brings no sources.
    """
    folder, prefix = built_folder(), _prefix()
    if not os.path.lexists(folder):
        return []
    check_private(folder)
    found = []
    for path in folder.glob(f"*/{CPU_LIBRARY}"):
        check_private(path.parent)
        if not path.is_symlink():
            fits = path.parent.name.startswith(f"{prefix}-")
            found.append(BuiltLibrary(path, fits, path.stat().st_mtime))
    return sorted(found, key=lambda library: (library.changed, library.path), reverse=True)


def _prefix() -> str:
    return f"{sys.platform}-{platform.machine().lower()}-{sources_hash()[:16]}"


def cache_name(options: CpuBuildOptions | None = None) -> str:
    """Return the name of the folder of a library in the cache; one that is built in an unusual way is not looked for.

    Raises:
        MissingDependencyError: if there is no compiler.
    """
    options = options or CpuBuildOptions()
    return _cache_name(find_compiler(options.compiler), options)


def _cache_name(compiler: Compiler, options: CpuBuildOptions) -> str:
    known = [*astuple(compiler), _flags(compiler, options), __version__, sources_hash()]
    name = f"{_prefix()}-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}"
    return name if options.usual else f"test-{name}"


# Building -------------------------------------------------------------------------------------------------------


def build_cpu_library(
    output: Path | None = None, options: CpuBuildOptions | None = None, *, progress: Progress = SILENT
) -> Path:
    """Build the library, in one piece or not at all.

    Args:
        output: a folder for it, made if it is not there, in which a library of the same name is replaced. None puts it
            into this user's cache, where it is found by itself, and returns the one that lies there already.
        options: how; None for the defaults.
        progress: is told of the steps.

    Returns:
        The path of the library.

    Raises:
        MissingDependencyError: if there is no compiler.
        PluginError: if it cannot be compiled or written.
        TrustError: if others could write to the cache.
    """
    options = options or CpuBuildOptions()
    compiler = find_compiler(options.compiler)
    folder = _private(_cache_name(compiler, options)) if output is None else output
    target = folder / CPU_LIBRARY
    if output is None:
        if is_whole(target):
            return target
    else:
        require_writable(output)
    with tempfile.TemporaryDirectory(prefix="quartermap-native-") as temporary:
        with progress.step(f"compiling the CPU library with {compiler.version}"):
            objects = _compile(compiler, options, Path(temporary))
            data = sealed(_link(compiler, objects, Path(temporary) / CPU_LIBRARY))
        if output is None:
            _require_whole(data, compiler)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, data, mode=0o755 if output is not None else 0o700)
    return target


def is_whole(library: Path) -> bool:
    """Whether a library is there, and none that was damaged since it was built."""
    try:
        data = library.read_bytes()
        check_format(data)
        check_seal(data, required=True)
    except (OSError, FormatError, SealError):
        return False
    return True


def _require_whole(data: bytes, compiler: Compiler) -> None:
    """Refuse to keep what a compiler made, where that is no library for this machine."""
    try:
        check_format(data)
    except FormatError as error:
        raise PluginError(
            f"what {compiler.version} made {error}, so it is not kept; name another compiler in CXX, or a folder with "
            "--out"
        ) from error


def _private(name: str) -> Path:
    """Make a folder for a library in this user's cache, unless it is there, and those above it."""
    folder = built_folder()
    try:
        for place in (folder.parent, folder, folder / name):
            make_private(place)
    except OSError as error:
        raise PluginError(
            f"the cache {printable(folder)} cannot be made: {error.strerror}; name another place in the environment "
            f"variable {HOME_VARIABLE}, or a folder for the library with --out"
        ) from error
    return folder / name


def _flags(compiler: Compiler, options: CpuBuildOptions) -> list[str]:
    """Return the flags of every file."""
    found = [*FLAGS, f'-DQUARTERMAP_RELEASE="{__version__}"', f'-DQUARTERMAP_SOURCES="{sources_hash()}"']
    if options.portable_vectors:
        found.append("-DQUARTERMAP_PORTABLE_VECTORS")
    elif compiler.for_x86:
        found.append("-DQUARTERMAP_WITH_AVX")
    return [*found, *MACHINE, *options.flags]


def _compile(compiler: Compiler, options: CpuBuildOptions, folder: Path) -> list[Path]:
    """Compile every file into a folder, side by side; returns the object files."""
    flags = _flags(compiler, options)
    with_avx = "-DQUARTERMAP_WITH_AVX" in flags
    root = plugin_sources()
    flags += [f"-I{root / name}" for name in INCLUDES]
    tasks = []
    for name, path in cpu_sources().items():
        if path.suffix != ".cpp" or (path.name in VECTORS and not with_avx):
            continue
        result = folder / (name.replace("/", "-") + ".o")
        vectors = VECTORS.get(path.name, ())
        if vectors and "clang" not in compiler.version:
            vectors += SCHEDULED
        tasks.append((result, [*compiler.command, *flags, *vectors, "-c", str(path), "-o", str(result)]))
    # Those that take longest first.
    tasks.sort(key=lambda task: "-mfma" not in task[1])
    with ThreadPoolExecutor(min(len(tasks), usable_cores())) as pool:
        running = [pool.submit(_run, command) for _, command in tasks]
        try:
            for task in running:
                if (trouble := task.result()) is not None:
                    raise PluginError(
                        f"the CPU library could not be compiled by {compiler.version} (a C++17 compiler is needed):\n"
                        + trouble
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for result, _ in tasks]


def _link(compiler: Compiler, objects: Sequence[Path], result: Path) -> bytes:
    """Link the library and return it."""
    command = [*compiler.command, "-shared", "-pthread", *MACHINE]
    command += [*map(str, objects), "-o", str(result)]
    if sys.platform == "linux":
        script = result.with_suffix(".map")
        script.write_text(EXPORTED, encoding="ascii")
        command.append(f"-Wl,--version-script={script}")
    static = STATIC.get(sys.platform, ())
    # Not every system has a C++ library to put into others.
    trouble = _run([*command, *static]) if static else "  it was not tried yet"
    if trouble is not None and (trouble := _run(command)) is not None:
        raise PluginError(f"the CPU library could not be linked by {compiler.version}:\n{trouble}")
    try:
        return result.read_bytes()
    except FileNotFoundError:
        raise PluginError(
            f"{compiler.version} said that it had linked the CPU library, and wrote none; name another compiler in CXX"
        ) from None


def _run(command: Sequence[str]) -> str | None:
    """Run a compiler; returns None if it succeeded, or else the lines that say why not."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env=_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"  {printable(error)}"
    if done.returncode == 0:
        return None
    return important_lines(done.stdout.splitlines()) or f"  it ended with code {done.returncode}"
