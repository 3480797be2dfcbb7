"""A process that reads files of strangers, and says what came of each: run by `read_by_another_process`.

Nothing but the errors of this package may come out, memory stays bounded, no file is written and no program started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.rename",
    "os.remove",
)
FORBIDDEN += (
    "os.mkdir",
    "os.chmod",
    "os.symlink",
    "os.link",
    "shutil.copyfile",
    "socket.connect",
    "ctypes.dlopen",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclasses.dataclass
class Outcome:
    """What came of reading one file.

    Attributes:
        message: of the error of this package; None if the file was taken.
        defect: what should never happen, as a text; None if nothing did.
        seconds: how long it took.
        peak: the most memory that the process had meanwhile, in MiB, beyond what it had before.
    """

    message: str | None
    defect: str | None
    seconds: float
    peak: float


def readers() -> dict[str, Callable[[Path], object]]:
    """What reads a file, by its ending."""
    from quartermap_deploy.architectures import create_model
    from quartermap_deploy.arrays import ArrayError, opened_arrays
    from quartermap_deploy.bundle import read_manifest
    from quartermap_deploy.data.images import prepare
    from quartermap_deploy.data.preprocessing import Preprocessing
    from quartermap_deploy.errors import InputError
    from quartermap_deploy.evaluation.medmnist import read_medmnist
    from quartermap_deploy.onnx_bounds import check_model
    from quartermap_deploy.recipe import Recipe
    from quartermap_deploy.report.results import read_results

    plain = Preprocessing((8, 8), "stretch", (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)

    def arrays(path: Path) -> object:
        try:
            with opened_arrays(path) as file:
                return [file.read(name) for name in file.names]
        except ArrayError as error:
            raise InputError(f"{path}: {error}") from error

    def image(path: Path) -> object:
        return prepare([path], plain)

    def checkpoint(path: Path) -> object:
        return create_model("vmamba_digits", checkpoint=path)

    return {
        **dict.fromkeys((".pth", ".safetensors"), checkpoint),
        **dict.fromkeys((".png", ".jpg", ".tif", ".webp", ".bmp"), image),
        ".toml": lambda path: Recipe.load(path).to_dict(),
        ".manifest": lambda path: read_manifest(path),
        ".results": lambda path: read_results([path]),
        ".medmnist": lambda path: read_medmnist(path, "test"),
        ".npz": arrays,
        ".onnx": check_model,
    }


def watched(event: str, arguments: tuple[Any, ...]) -> str | None:
    """What an event of Python's says that must not happen while a file is read; None for all others."""
    if event in FORBIDDEN:
        return f"{event}{arguments!r}"[:200]
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        return f"it opened {arguments[0]!r} for writing"
    return None


def memory(line: str) -> float:
    """MiB of this process, by the name of a line of what the kernel says: now, or at most."""
    found = re.search(rf"^{line}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def read_all(paths: Iterable[Path]) -> Iterable[Outcome]:
    """Read files one after the other."""
    import warnings

    from quartermap_deploy.errors import QuartermapError

    # What is imported late, and what is looked for once, is no file's doing.
    ways = readers()
    for suffix, read in ways.items():
        with contextlib.suppress(QuartermapError, OSError):
            read(ROOT / "absent" / f"absent{suffix}")
    from PIL import Image

    Image.init()
    happened: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (found := watched(event, arguments)) is not None:
            happened.append(found)

    sys.addaudithook(hook)
    warnings.simplefilter("ignore")
    for path in paths:
        message = defect = None
        before = memory("VmRSS")
        # From here on the kernel counts the peak anew.
        Path("/proc/self/clear_refs").write_text("5")
        happened.clear()
        began = time.monotonic()
        try:
            ways[path.suffix](path)
        except QuartermapError as error:
            message = str(error)
        except BaseException as error:
            defect = f"{type(error).__name__}: {error}"[:300]
        if happened:
            defect = happened[0]
        yield Outcome(message, defect, time.monotonic() - began, memory("VmHWM") - before)


def read_by_another_process(paths: Iterable[Path], timeout: float = 300) -> list[Outcome]:
    """Read files in a process of its own, so that its memory is known."""
    process = subprocess.run(
        [sys.executable, __file__],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return [Outcome(**json.loads(line)) for line in process.stdout.splitlines()]


def outcomes_of(attacks: Mapping[str, Callable[[], bytes]], folder: Path) -> dict[str, Outcome]:
    """Write files to a folder, and return what came of reading them, one after the other in one process."""
    for name, make in attacks.items():
        (folder / name).write_bytes(make())
    return dict(zip(attacks, read_by_another_process(folder / name for name in attacks), strict=True))


if __name__ == "__main__":
    for found in read_all([Path(line) for line in sys.stdin.read().splitlines()]):
        print(json.dumps(dataclasses.asdict(found)), flush=True)
