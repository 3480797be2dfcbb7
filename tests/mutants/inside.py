"""What happens in the fork: pytest, in the copy of the repository, on chosen tests in a chosen order."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

SEEN_VARIABLE = "QUARTERMAP_MUTANTS_SEEN"


def run(
    tree: Path,
    scratch: Path,
    report: Path,
    files: Sequence[str],
    order: Sequence[str] | None,
    budget: float,
    measure: bool,
) -> int:
    """Run tests and write what came of it; return pytest's exit code."""
    # An editable install puts the repository on the path; here the copy stands for it.
    repository = Path(__file__).resolve().parent.parent.parent
    outside = {str(repository), str(repository / "tests"), ""}
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in outside)]
    for name in ("home", "temporary", "seen"):
        (scratch / name).mkdir()
    os.environ |= {
        "PYTHONPATH": str(tree),
        "HOME": str(scratch / "home"),
        "TMPDIR": str(scratch / "temporary"),
    }
    os.environ.pop("PYTEST_ADDOPTS", None)
    if measure:
        os.environ[SEEN_VARIABLE] = str(scratch / "seen")
    os.chdir(tree)
    plugin = Measuring(report, scratch / "seen") if measure else Judging(report, order, budget)
    options = [
        "-q",
        "--rootdir",
        str(tree),
        "-c",
        str(tree / "pyproject.toml"),
        "--basetemp",
        str(scratch / "pytest"),
    ]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *(() if measure else ("-x",))]
    code = int(pytest.main([*options, *files], plugins=[plugin]))
    plugin.end(code)
    return code


class Judging:
    """A pytest plugin that runs chosen tests in their order, and leaves at the first failure, or when time is up.

    The time is that of processors, also of processes that tests started, so that a busy machine makes no difference.
    """

    def __init__(self, report: Path, order: Sequence[str] | None, budget: float) -> None:
        self._report, self._end = report, _cpu_seconds() + budget
        self._order = None if order is None else {name: place for place, name in enumerate(order)}
        self._passed = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Choose and order the tests, after pytest has put those with the same fixtures together."""
        if self._order is None:
            return
        # A fault may change the parameters of a test, which are in its name: its function is asked for all the same.
        gone = self._order.keys() - {item.nodeid for item in items}
        functions = {name.split("[")[0]: self._order[name] for name in gone if "[" in name}
        order = {
            **{i.nodeid: functions[base] for i in items if (base := i.nodeid.split("[")[0]) in functions},
            **self._order,
        }
        left_out = [item for item in items if item.nodeid not in order]
        items[:] = sorted(
            (item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid]
        )
        config.hook.pytest_deselected(items=left_out)

    def pytest_collectreport(self, report: Any) -> None:
        """A test file that cannot be imported is a failure."""
        if report.failed:
            self._leave("failed", report.nodeid)

    def pytest_runtest_setup(self) -> None:
        """No test begins after the time."""
        if self._passed and _cpu_seconds() > self._end:
            self._leave("passed", "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The first failure is enough."""
        if report.failed:
            self._leave("failed", report.nodeid)
        self._passed += report.when == "call" and report.passed

    def end(self, code: int) -> None:
        """Write what came of it, once pytest has ended by itself."""
        if code == 0 and self._passed:
            self._write("passed", "")
        elif code not in (0, 5):
            self._write("crashed", "")
        else:
            self._write("nothing ran", "")

    def _leave(self, outcome: str, test: str) -> None:
        self._write(outcome, test)
        sys.stdout.flush()
        # What the tests started is ended by the parent; taking it down in order could take long.
        os._exit(1)

    def _write(self, outcome: str, test: str) -> None:
        self._report.write_text(
            json.dumps({"outcome": outcome, "test": test, "passed": self._passed}), encoding="utf-8"
        )


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


class Measuring:
    """A pytest plugin that notes the time of each test that passes, and the functions that it runs."""

    def __init__(self, report: Path, seen: Path) -> None:
        self._report, self._seen = report, seen
        self._tests: dict[str, dict[str, Any]] = {}
        self._imported: list[str] = []

    def pytest_collection_finish(self) -> None:
        """What ran until now ran at import."""
        self._imported = self._take()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        """Note what one test runs, and the time that it takes with all that it sets up."""
        self._take()
        cpu, wall = _cpu_seconds(), time.monotonic()
        result = yield
        if item.nodeid in self._tests:
            taken = {"seconds": _cpu_seconds() - cpu, "wall": time.monotonic() - wall}
            self._tests[item.nodeid] = {**taken, "functions": self._take()}
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that does not pass catches nothing."""
        if report.when == "call" and report.passed:
            self._tests[report.nodeid] = {}
        elif not report.passed:
            self._tests.pop(report.nodeid, None)

    def end(self, code: int) -> None:
        """Write what was noted."""
        found = {
            "outcome": "passed",
            "test": "",
            "code": code,
            "imported": self._imported,
            "tests": self._tests,
        }
        self._report.write_text(json.dumps(found), encoding="utf-8")

    def _take(self) -> list[str]:
        """Return the functions that ran since the last call, in this process and in those that ended."""
        import mutants_seen

        names = set(mutants_seen.NAMES)
        mutants_seen.NAMES.clear()
        for path in self._seen.iterdir():
            names |= set(path.read_text(encoding="utf-8").split("\n")) - {""}
            path.unlink()
        return sorted(names)
