"""The project's evidence on the digits, measured on this machine and written to docs/evidence.md: `make evidence`.

    compile → eval → compare → ablate → tune → docs/evidence/*.json → docs/evidence.md

Every number comes from a command that users have, run as they run it. What is measured goes to a folder of its own
first; the page and its results are replaced when everything is there. A run that was interrupted goes on from there.

Speeds of VMamba-T, S and B at 224x224 take long and may come from another machine. Each is a result of

    quartermap compare vmamba_tiny_s1l8 --batch 1 8 -o docs/evidence/speed_tiny.json

and the page takes every docs/evidence/speed_*.json. `--write` writes the page from the results that are there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where a test loads this file from elsewhere

from evidence_page import RESULTS, page, read_results

from quartermap_deploy.bundle import write_json
from quartermap_deploy.errors import QuartermapError, ReportError
from quartermap_deploy.files import write_whole

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "evidence.md"
WORK = REPOSITORY / "build" / "evidence"
MODEL = "vmamba_digits"
PLANS: dict[str, list[str]] = {"unpruned": [], "k3": ["--every", "3"], "k2": ["--every", "2"]}
PRECISIONS = ("float32", "float16")
SPEED_MODELS = ("vmamba_tiny_s1l8", "vmamba_small_s2l15", "vmamba_base_s2l15")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        result: the file that is there when it is done, in the working folder.
        arguments: of `quartermap`.
        printed: whether what it prints is the result.
    """

    result: str
    arguments: tuple[str, ...]
    printed: bool = False

    @property
    def command(self) -> str:
        """The command as a user types it."""
        written = " ".join(("quartermap", *self.arguments))
        return f"{written} > {self.result}" if self.printed else written


def steps(repeats: int) -> list[Step]:
    """Return the commands, in order; their paths are relative to the working folder."""
    found = []
    for plan, options in PLANS.items():
        for precision in PRECISIONS:
            name = f"{plan}_{precision}"
            settings = ("--precision", precision, "--out", name, "--force", "--quiet")
            found.append(Step(f"{name}/manifest.json", ("compile", MODEL, *options, *settings)))
            # A bundle's PyTorch model is in float32, whatever the bundle is in.
            for target in ("onnxruntime", "torch") if precision == "float32" else ("onnxruntime",):
                evaluation = ("eval", name, "--target", target, "--json", "--quiet")
                found.append(Step(f"eval_{name}_{target}.json", evaluation, printed=True))
    rounds = ("--repeats", str(repeats))
    found += [
        Step("compare.json", ("compare", MODEL, "--batch", "1", "8", "32", *rounds, "-o", "compare.json")),
        Step("ablate.json", ("ablate", MODEL, "--batch", "32", *rounds, "--no-plots", "-o", "ablate.json")),
        Step("tuned.toml", ("tune", MODEL, "--budget", "1%", "--batch", "32", *rounds, "-o", "tuned.toml")),
    ]
    return found


def measure(repeats: int, work: Path) -> None:
    """Run every command whose result is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    times = work / "seconds.json"
    seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    for step in steps(repeats):
        if complete(work / step.result):
            print(f"is there: {step.command}", file=sys.stderr)
            continue
        print(step.command, file=sys.stderr, flush=True)
        start = time.monotonic()
        run(step, work)
        seconds[step.command] = round(seconds.get(step.command, 0) + time.monotonic() - start, 1)
        write_json(times, seconds)


def complete(path: Path) -> bool:
    """Whether a result is there and says nothing else about itself."""
    if not path.exists() or path.suffix != ".json":
        return path.exists()
    values = json.loads(path.read_text(encoding="utf-8"))
    return not isinstance(values, dict) or values.get("complete", True) is True


def run(step: Step, work: Path) -> None:
    """Run one command in the working folder.

    Raises:
        ReportError: if it fails; it has said why.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "quartermap_deploy", *step.arguments]
    output = subprocess.PIPE if step.printed else subprocess.DEVNULL
    done = subprocess.run(command, cwd=work, env=environment, stdout=output, check=False)
    if done.returncode:
        raise ReportError(
            f"`{step.command}` ended with exit code {done.returncode}; what was measured before it is kept in {work}"
        )
    if step.printed:
        write_whole(work / step.result, done.stdout)


def collect(work: Path, folder: Path, repeats: int) -> None:
    """Put the results into the folder beside the page."""
    from quartermap_deploy.machine import describe_machine
    from quartermap_deploy.manifest import versions

    folder.mkdir(parents=True, exist_ok=True)
    seconds = json.loads((work / "seconds.json").read_text(encoding="utf-8"))
    evaluations = [step.result for step in steps(repeats) if step.arguments[0] == "eval"]
    values: dict[str, Any] = {
        "accuracy": [json.loads((work / name).read_text(encoding="utf-8")) for name in evaluations],
        **{
            name: json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("compare", "ablate")
        },
        "tune": json.loads((work / "tuned.json").read_text(encoding="utf-8")),
        "run": {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": versions(),
            "commands": [
                {"command": step.command, "seconds": seconds[step.command]} for step in steps(repeats)
            ],
        },
    }
    for name in RESULTS:
        text = json.dumps(values[name], indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / f"{name}.json", f"{text}\n".encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Measure the project's evidence on the digits and write its page."
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE.md", help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=15, metavar="N", help="timed rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--write", action="store_true", help="measure nothing; write the page from the results beside it"
    )
    options = parser.parse_args(arguments)
    folder = options.page.with_suffix("")
    try:
        if not options.write:
            measure(options.repeats, WORK)
            collect(WORK, folder, options.repeats)
            shutil.rmtree(WORK)
        write_whole(options.page, page(read_results(folder)).encode("utf-8"))
    except QuartermapError as error:
        print(f"evidence: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
