"""`make mutants`: plant small faults one at a time, run the tests that guard the place, and count those they catch."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from mutants import forked
from mutants.changed import touched_files
from mutants.faults import Fault, faults_of
from mutants.guards import Area, Guard, Guards, chosen, expected_seconds, matches, read_areas
from mutants.listed import Equivalents, native_faults
from mutants.results import Result, Results
from mutants.table import Judged, failing, show
from mutants.tree import Tree

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
BUILD = REPOSITORY / "build" / "mutants"
SLACK = 4.0
"""How many times longer than usual tests may take before the fault counts as caught by time."""
GRACE = 30.0
"""Seconds more, for imports and a busy machine."""

EPILOGUE = """
examples:
  make mutants                                        20 faults of every file, which takes hours the first time
  make mutants FILES=quartermap_deploy/files.py       of one file; patterns and several files work, too
  make mutants FILES="validation/*.py" SAMPLE=all     every fault of an area
  make mutants SEED=1                                 20 others
  make mutants MUTANTS_FLAGS=--list FILES=files.py    show the faults, run nothing

What is known stays in build/mutants/ and is not run again while the file and the tests that decide are unchanged, so an
interrupted run goes on where it was. The first run of an area also runs its tests once, to see which function each
calls. A fault that nobody could notice goes into tests/mutants/equivalent.toml, with the reason; faults of C++ are
listed in tests/mutants/kernels.toml.

Exits with 1 if fewer faults were caught in an area than tests/mutants/areas.toml asks for.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    if options.list:
        return _list(options)
    with contextlib.ExitStack() as stack:
        if not _alone(stack):
            print(
                "mutants: another run is under way; no fault was planted, and nothing is proved",
                file=sys.stderr,
            )
            return 0 if options.touched else 2
        return _run(options, began)


def _alone(stack: contextlib.ExitStack) -> bool:
    """Whether no other run uses the copy of the repository; none will until the stack is left."""
    BUILD.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((BUILD / "lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _run(options: argparse.Namespace, began: float) -> int:
    """Do what the options say, and return the exit code."""
    # Everything is read from the copy, so that the working tree may change meanwhile.
    tree = Tree(REPOSITORY, BUILD / "tree")
    areas = read_areas(HERE / "areas.toml")
    patterns = _patterns(options)
    if options.touched:
        touched = touched_files(REPOSITORY)
        if touched is None:
            print(
                "mutants: no git history to tell what was touched; no fault was planted, and nothing is proved"
            )
            return 0
        mine = {file for area in areas for file in area.files(tree.path)}
        patterns = [file for file in touched if file in mine]
        if not patterns:
            print(
                "mutants: no file was touched that faults are planted in; none was planted, and nothing is proved"
            )
            return 0
    plan = list(_plan(tree.path, areas, patterns, options.sample, options.seed))
    if not plan:
        return _nothing_meant(patterns)
    deadline = None if options.seconds is None else began + options.seconds
    judged, left = _judge(tree, areas, plan, options, deadline)
    show(judged, Console(width=None if sys.stdout.isatty() else 150))
    if left:
        print(f"\n{left} of {len(plan)} faults were not tried for lack of time: no word about them")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "seed": options.seed,
            "sample": options.sample,
            "faults": [each.to_dict() for each in judged],
        }
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if options.touched:  # a few faults are no measure of an area
        return 0
    return 1 if failing(judged) else 0


def _list(options: argparse.Namespace) -> int:
    """Print the faults of a sample."""
    patterns = _patterns(options)
    plan = list(_plan(REPOSITORY, read_areas(HERE / "areas.toml"), patterns, options.sample, options.seed))
    for _, fault, reason in plan:
        same = f" (equivalent: {reason})" if reason else ""
        print(f"{fault.file}:{fault.number} ({fault.kind}) {fault.line} → {fault.becomes}{same}")
    print(len(plan), "faults")
    return 0 if plan else _nothing_meant(patterns)


def _patterns(options: argparse.Namespace) -> list[str]:
    return [pattern for given in options.files for pattern in given.split()]


def _nothing_meant(patterns: Sequence[str]) -> int:
    print(f"mutants: no file of tests/mutants/areas.toml is meant by {' '.join(patterns)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "make mutants",
        description=__doc__,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--files",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="files to plant faults in; all, if not given",
    )
    add("--sample", default="20", metavar="N", help="faults of each file, or all (default: 20)")
    add("--seed", type=int, default=0, help="which faults the sample holds (default: 0)")
    add(
        "--budget",
        type=float,
        default=40.0,
        metavar="S",
        help="seconds of tests for each fault (default: 40)",
    )
    add("--seconds", type=float, metavar="S", help="stop after so long altogether")
    add(
        "--touched",
        action="store_true",
        help="only files that the change at hand touches; measures nothing first",
    )
    add("--again", action="store_true", help="try anew what is known")
    add("--list", action="store_true", help="show the faults and run nothing")
    add(
        "--json",
        type=Path,
        default=BUILD / "result.json",
        help="where the result goes (default: %(default)s)",
    )
    return parser


_Plan = tuple[Area, Fault, str]


def _plan(
    root: Path, areas: Sequence[Area], patterns: Sequence[str], sample: str, seed: int
) -> Iterator[_Plan]:
    """Return the faults of a sample, with the reason of those that change nothing.

    A sample is those faults whose name, together with the seed, has the least hash: it stays the same when lines move.
    """
    equivalents = Equivalents(HERE / "equivalent.toml")
    native = native_faults(HERE / "kernels.toml", root)
    for area in areas:
        for file in area.files(root):
            if not matches(file, patterns):
                continue
            python = file.endswith(".py")
            faults = faults_of(file, (root / file).read_bytes()) if python else native.get(file, [])
            for line in equivalents.outdated(file, faults):
                print(f"equivalent.toml: {file} has no such fault any more: {line}", file=sys.stderr)
            if python and sample != "all":
                faults = sorted(faults, key=lambda fault: _draw(fault, seed))[: int(sample)]
            for fault in sorted(faults, key=lambda fault: fault.start):
                yield area, fault, equivalents.reason(fault) or ""


def _draw(fault: Fault, seed: int) -> str:
    return hashlib.sha256(f"{seed} {fault.key}".encode()).hexdigest()


def _judge(
    tree: Tree,
    areas: Sequence[Area],
    plan: Sequence[_Plan],
    options: argparse.Namespace,
    deadline: float | None,
) -> tuple[list[Judged], int]:
    """Return what became of the faults, and how many were not tried."""
    results = Results(tree.path, BUILD / "results.jsonl")
    judged: dict[str, Judged] = {}
    missing = []
    for area, fault, reason in plan:
        known = None if options.again else results.known(fault, area.tests, options.budget)
        if reason or known is not None:
            judged[fault.key] = Judged(area, fault, None if reason else known, reason)
        else:
            missing.append((area, fault))
    print(f"{len(plan)} faults, of which {len(missing)} are to be tried", file=sys.stderr)
    if options.touched:  # a little of everything, as time may be short
        missing.sort(key=lambda item: _draw(item[1], options.seed))
    if missing:
        trial = Trial(tree, areas, results, options.budget, not options.touched)
        try:
            for count, (area, fault) in enumerate(missing, start=1):
                if deadline is not None and time.monotonic() > deadline - 2:
                    break
                result = trial.of(area, fault, deadline)
                if result is None:
                    break
                judged[fault.key] = Judged(area, fault, result)
                _tell(count, len(missing), fault, result)
        except KeyboardInterrupt:
            print("\nstopped; what is known so far is kept", file=sys.stderr)
    found = [judged[fault.key] for _, fault, _ in plan if fault.key in judged]
    return found, len(plan) - len(found)


def _tell(count: int, of: int, fault: Fault, result: Result) -> None:
    """Print a line of progress; on a terminal, one that is caught makes room for the next."""
    test = result.test.removeprefix("tests/")
    text = f"{count}/{of} {result.verdict} {fault.file}:{fault.number} {result.seconds:.0f} s {test}"
    stays = result.verdict != "caught" or not sys.stderr.isatty()
    text = text if not sys.stderr.isatty() else f"\r\x1b[K{text[:110]}"
    print(text, end="\n" if stays else "", file=sys.stderr, flush=True)


class Trial:
    """Plants faults in a copy of the repository and runs tests there."""

    def __init__(
        self, tree: Tree, areas: Sequence[Area], results: Results, budget: float, measure: bool
    ) -> None:
        forked.import_libraries()
        self._tree, self._results, self._budget, self._measure = tree, results, budget, measure
        self._guards = Guards(tree.path, BUILD, areas)
        self._sound: set[str] = set()

    def of(self, area: Area, fault: Fault, deadline: float | None) -> Result | None:
        """Return what the tests made of a fault; None if time ran out before they had spoken."""
        measured = [self._guards.of_file(file, self._measure) for file in area.tests]
        if any(guards is None for guards in measured):
            return self._guessed(area, fault, deadline)
        guards = [guard for each in measured for guard in each or ()]
        tests = self._ordered(area, fault, chosen(fault, guards, self._budget))
        if not tests:
            return self._results.add(fault, Result(fault.key, "not covered"), area.tests)
        # The file whose tests are cheapest alone, as it catches most and the others need not be imported then.
        late = area.is_late(tests[0])
        first = [guard for guard in tests if guard.file == tests[0].file and area.is_late(guard) == late]
        self._check(area, first)
        began = time.monotonic()
        for part in (first, [guard for guard in tests if guard not in first]):
            if part:
                run, cut = self._run_guards(fault, part, deadline)
                if cut:
                    return None
                if run.outcome != "passed":
                    break
        verdict = "survived" if run.outcome in ("passed", "nothing ran") else "caught"
        how = "" if verdict == "survived" else run.outcome
        taken = round(time.monotonic() - began, 1)
        found = Result(fault.key, verdict, how, run.test, len(tests), taken, self._budget)
        return self._results.add(fault, found, area.tests)

    def _check(self, area: Area, tests: Sequence[Guard]) -> None:
        """Run an area's first tests once without a fault: what fails then would take every fault for caught."""
        if area.name in self._sound:
            return
        names = [guard.name for guard in tests if guard.file == tests[0].file]
        run = forked.run_tests(
            self._tree.path, BUILD / "scratch", [tests[0].file], order=names, budget=self._budget
        )
        if run.outcome != "passed":
            raise SystemExit(
                f"without a fault, {run.test or tests[0].file} {run.outcome}:\n{run.data['log'][-2000:]}"
            )
        self._sound.add(area.name)

    def _run_guards(
        self, fault: Fault, tests: Sequence[Guard], deadline: float | None
    ) -> tuple[forked.Run, bool]:
        files = list(dict.fromkeys(guard.file for guard in tests))
        limit = GRACE + SLACK * max(self._budget, expected_seconds(tests))
        return self._run(fault, files, [guard.name for guard in tests], limit, deadline)

    def _ordered(self, area: Area, fault: Fault, tests: list[Guard]) -> list[Guard]:
        """Put first the test that caught the fault the last time, and last those that build something of their own."""
        earlier = self._results.earlier(fault)
        caught = "" if earlier is None else earlier.test
        return sorted(tests, key=lambda guard: (guard.name != caught, area.is_late(guard)))

    def _guessed(self, area: Area, fault: Fault, deadline: float | None) -> Result | None:
        """Run, whole, the test files that name the module; nothing is kept, as only a part of the tests is asked."""
        module = fault.file.removesuffix(".py").replace("/", ".")
        files = [
            file for file in area.tests if module in (self._tree.path / file).read_text(encoding="utf-8")
        ]
        run, cut = self._run(fault, files or list(area.tests[:1]), None, 600.0, deadline)
        if cut or run.outcome == "nothing ran":
            return None
        verdict = "survived" if run.outcome == "passed" else "caught"
        return Result(
            fault.key,
            verdict,
            "" if verdict == "survived" else run.outcome,
            run.test,
            0,
            round(run.seconds, 1),
        )

    def _run(
        self,
        fault: Fault,
        files: Sequence[str],
        order: Sequence[str] | None,
        limit: float,
        deadline: float | None,
    ) -> tuple[forked.Run, bool]:
        """Run tests with the fault in place; return what they said, and whether they were cut off by the deadline."""
        left = limit if deadline is None else max(deadline - time.monotonic(), 1.0)
        self._tree.plant(fault.file, fault.planted((self._tree.path / fault.file).read_bytes()))
        try:
            run = forked.run_tests(
                self._tree.path, BUILD / "scratch", files, order=order, seconds=min(limit, left)
            )
        finally:
            self._tree.mend()
        return run, run.outcome == "time" and left < limit


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
