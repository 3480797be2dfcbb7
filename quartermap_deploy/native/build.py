"""Building the plugin library with CMake, from the sources that come with this package."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quartermap_deploy.errors import MissingDependencyError
from quartermap_deploy.files import write_whole
from quartermap_deploy.gpu import find_gpu
from quartermap_deploy.native import object_cache
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.seal import sealed
from quartermap_deploy.progress import SILENT, Progress

OLDEST_ARCHITECTURE = 80
PLUGIN_LIBRARY = "libquartermap_plugin.so"
KERNEL_LIBRARY = "libquartermap_kernels.so"
ONNXRUNTIME_LIBRARY = "libquartermap_onnxruntime_cuda.so"
_COMPILED = re.compile(r"\bBuilding (CXX|CUDA) object\b")
"""In what Ninja and make print of each file."""
NVCC_PLACES = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc")


@dataclass(frozen=True)
class BuildOptions:
    """How the plugin is built.

    Attributes:
        cuda_architectures: such as ("80", "90"); empty for all that these kernels and the compiler know.
        kernels_only: build the kernels' C interface without the TensorRT plugin.
        onnxruntime: build the operator of ONNX Runtime's CUDA provider, without the TensorRT plugin.
        emulation: run the kernels on the CPU; for tests.
        optimisation: a compiler flag that replaces those of a release, for tests, or None.
    """

    cuda_architectures: tuple[str, ...] = ()
    kernels_only: bool = False
    onnxruntime: bool = False
    emulation: bool = False
    optimisation: str | None = None

    @property
    def library(self) -> str:
        """Name of the file that is built."""
        if self.onnxruntime:
            return ONNXRUNTIME_LIBRARY
        return KERNEL_LIBRARY if self.kernels_only else PLUGIN_LIBRARY


def plugin_sources() -> Path:
    """Return the folder with the C++ sources.

    Raises:
        PluginError: if this installation brings none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_plugins", package.parent / "plugins"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise PluginError(
        "this installation of quartermap-deploy brings no plugin sources; install it anew with pip"
    )


def build_plugin(
    output: Path,
    options: BuildOptions | None = None,
    *,
    progress: Progress = SILENT,
    on_output: Callable[[str], None] | None = None,
    cache: Path | None = None,
) -> Path:
    """Build the library and put it into a folder, in one piece or not at all.

    Args:
        output: the folder; made if it is not there. A library of the same name in it is replaced.
        options: how; None for the defaults.
        progress: is told of the steps.
        on_output: is given each line that CMake and the compilers print.
        cache: a folder of this user's own, in which compiled files are kept and looked for; None for none.

    Returns:
        The path of the library.

    Raises:
        MissingDependencyError: if CMake, nvcc or a C++ compiler is missing.
        PluginError: if compiling fails.
    """
    options = options or BuildOptions()
    require_writable(output)
    configure = [_cmake(), "-S", str(plugin_sources()), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    configure += _definitions(options)
    say = on_output or _ignore
    with tempfile.TemporaryDirectory(prefix="quartermap-plugin-") as temporary:
        events = Path(temporary) / "events.txt"
        if cache is not None:
            configure += launcher(cache, events)
        configure += ["-B", temporary]
        with progress.step("configuring the plugin"):
            _configure(configure, say)
        title = "compiling files, for each GPU architecture 90 s of a core"
        with progress.step(title, total=_files(Path(temporary))) as advance, _shown(events, progress):

            def counted(line: str) -> None:
                say(line)
                if _COMPILED.search(line):
                    advance(1)

            jobs = str(os.cpu_count() or 1)
            lines, code = _run(
                [configure[0], "--build", temporary, "--target", "quartermap_plugin", "--parallel", jobs],
                counted,
            )
        if cache is not None:
            object_cache.prune(cache)
        if code != 0:
            raise PluginError("the plugin could not be compiled:\n" + important_lines(lines))
        return place_library(Path(temporary) / options.library, output)


def launcher(cache: Path, events: Path) -> list[str]:
    """Return what CMake is told so that compiled files are kept in a folder and looked for there."""
    kernels, others = hashlib.sha256(), hashlib.sha256()
    for path in sorted(plugin_sources().rglob("*.h")):
        name = path.relative_to(plugin_sources())
        # Kernels include these alone, see plugins/CMakeLists.txt.
        of_kernels = name.parts[0] in ("kernels", "emulation")
        (kernels if of_kernels else others).update(f"{name}\0".encode() + path.read_bytes())
    identity = hashlib.sha256()
    for compiler in (find_nvcc(), shutil.which(os.environ.get("CXX") or "c++")):
        if compiler is not None:
            done = subprocess.run([compiler, "--version"], capture_output=True)
            identity.update(compiler.encode() + done.stdout)
    for variable in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "CPLUS_INCLUDE_PATH"):
        identity.update(f"{variable}={os.environ.get(variable)}\0".encode())
    cache.mkdir(parents=True, exist_ok=True)
    # Apart from this installation's packages (-I), and without looking for any (-S).
    command = [sys.executable, "-I", "-S", str(Path(object_cache.__file__).resolve())]
    kernels.update(identity.digest())
    others.update(kernels.digest())
    command += [str(cache.resolve()), f"{kernels.hexdigest()}:{others.hexdigest()}", str(events)]
    if any(";" in word for word in command):
        return []
    return [f"-DCMAKE_{language}_COMPILER_LAUNCHER={';'.join(command)}" for language in ("CUDA", "CXX")]


@contextlib.contextmanager
def _shown(events: Path, progress: Progress) -> Iterator[None]:
    """Show each file while it is compiled, by what `object_cache` writes."""
    ended = threading.Event()

    def follow() -> None:
        with contextlib.ExitStack() as every:
            open_steps: dict[str, contextlib.ExitStack] = {}
            read = 0
            while True:
                last = ended.wait(0.2)
                lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
                for line in lines[read:]:
                    what, name = line.split(" ", 1)
                    if what == "begin":
                        open_steps[name] = every.enter_context(contextlib.ExitStack())
                        open_steps[name].enter_context(progress.step(f"compiling {name}"))
                    elif what == "end" and name in open_steps:
                        open_steps.pop(name).close()
                read = len(lines)
                if last:
                    return

    follower = threading.Thread(target=follow, name="compiled files", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def usual_architectures() -> tuple[str, ...]:
    """Return the architecture of this machine's GPU, else the oldest, whose PTX is for every newer one."""
    found = find_gpu()
    number = found.compute_capability.replace(".", "") if found else ""
    usable = number.isdigit() and int(number) >= OLDEST_ARCHITECTURE
    return (number,) if usable else (str(OLDEST_ARCHITECTURE),)


def _files(folder: Path) -> int | None:
    """How many files are compiled in a folder that CMake has configured, as far as it says so."""
    # The build hook of the wheel has the standard library alone, and needs this file.
    from quartermap_deploy.reading import read_json

    try:
        return len(read_json(folder / "compile_commands.json"))
    except (OSError, ValueError, TypeError):
        return None


def require_writable(output: Path) -> None:
    """Check, before minutes of compiling, that a file can be put into a folder; by doing it, since root may do all."""
    if output.exists() and not output.is_dir():
        raise PluginError(f"{output} is no folder; name the folder that the library is to be put into")
    made = [folder for folder in (output.absolute(), *output.absolute().parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise PluginError(f"cannot write into {output}: {error.strerror}; name another with --out") from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _ignore(line: str) -> None:
    return None


def _cmake() -> str:
    found = shutil.which("cmake")
    if found is None:
        raise MissingDependencyError(
            "building the plugin needs CMake 3.24 or newer, and there is none on the PATH: pip install cmake"
        )
    return found


def _definitions(options: BuildOptions) -> list[str]:
    """Return the arguments that tell CMake what to build."""
    found = ["-DQUARTERMAP_TEST_HOST=OFF"]
    if shutil.which("ninja"):
        found += ["-G", "Ninja"]
    if options.onnxruntime:
        found.append("-DQUARTERMAP_ONNXRUNTIME=ON")
    elif options.kernels_only:
        found.append("-DQUARTERMAP_KERNELS_ONLY=ON")
    if options.emulation:
        found.append("-DQUARTERMAP_EMULATION=ON")
    else:
        found.append(f"-DCMAKE_CUDA_COMPILER={_nvcc()}")
    if len(options.cuda_architectures) != 1 and not options.emulation:
        # A file is compiled for several architectures at the same time: the last ones would keep a single core busy.
        found.append("-DCMAKE_CUDA_FLAGS=--threads=4")
    for name in options.cuda_architectures:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", name):
            raise PluginError(f"{name!r} is no CUDA architecture; expected numbers such as 80,90 or 120-real")
        if int(re.match(r"\d+", name)[0]) < OLDEST_ARCHITECTURE:  # type: ignore[index]
            raise PluginError(
                f"the kernels need CUDA architecture {OLDEST_ARCHITECTURE} or newer, found {name}"
            )
    if options.cuda_architectures:
        found.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(options.cuda_architectures)}")
    if options.optimisation is not None:
        found += [
            f"-DCMAKE_CXX_FLAGS_RELEASE={options.optimisation}",
            f"-DCMAKE_CUDA_FLAGS_RELEASE={options.optimisation}",
        ]
    return found


def _nvcc() -> str:
    if (found := find_nvcc()) is not None:
        return found
    raise MissingDependencyError(
        "building the plugin needs nvcc from the CUDA toolkit 12.4 or newer "
        "(https://developer.nvidia.com/cuda-downloads; on Debian and Ubuntu from NVIDIA's repository: apt install "
        "cuda-nvcc-13-0 cuda-cudart-dev-13-0); put it on the PATH or set CUDA_HOME"
    )


def find_nvcc() -> str | None:
    """Find nvcc where CMake would, and where CUDA is installed but not on the PATH; None where it is not."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [
        os.environ.get("CUDACXX"),
        shutil.which("nvcc"),
        *([f"{home}/bin/nvcc"] if home else []),
        *NVCC_PLACES,
    ]
    return next((place for place in places if place and Path(place).is_file()), None)


def _configure(command: Sequence[str], say: Callable[[str], None]) -> None:
    lines, code = _run(command, say)
    if code == 0:
        return
    text = "\n".join(lines)
    if "CMAKE_MAKE_PROGRAM" in text:
        raise MissingDependencyError(
            "building the plugin needs make or Ninja, and CMake found neither: apt install ninja-build"
        )
    if "CMAKE_CXX_COMPILER" in text:
        raise MissingDependencyError(
            "building the plugin needs a C++17 compiler, and CMake found none: apt install g++ (or set CXX)"
        )
    raise PluginError("the plugin could not be configured:\n" + important_lines(lines))


def _run(command: Sequence[str], say: Callable[[str], None]) -> tuple[list[str], int]:
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                say(lines[-1])
        except BaseException:
            process.terminate()
            raise
    return lines, process.returncode


def important_lines(lines: Sequence[str], most: int = 20) -> str:
    """Return the lines around the first error that a compiler printed, or the last ones."""
    errors = [i for i, line in enumerate(lines) if re.search(r"\berror\b|CMake Error", line, re.IGNORECASE)]
    start = max(0, errors[0] - 2) if errors else max(0, len(lines) - most)
    return "\n".join(f"  {line}" for line in lines[start : start + most])


def place_library(built: Path, output: Path) -> Path:
    """Seal a library and put it into a folder under its own name, whole, so that nobody ever loads half of it."""
    output.mkdir(parents=True, exist_ok=True)
    target = output / built.name
    write_whole(target, sealed(built.read_bytes()), mode=0o755)
    return target
