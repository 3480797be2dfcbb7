"""The tool that plants faults (tests/mutants): what it plants, what it chooses, what it remembers, what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import REPOSITORY
from mutants.changed import touched_files
from mutants.faults import Fault, faults_of
from mutants.guards import Area, Guard, chosen, matches, read_areas, reporting
from mutants.listed import Equivalents, native_faults
from mutants.results import Result, Results
from mutants.table import Count, Judged, failing
from mutants.tree import Tree

HERE = REPOSITORY / "tests" / "mutants"


def becomes(source: str) -> list[str]:
    """Return what the last line of a source text can become."""
    last = source.count("\n")
    return [fault.becomes for fault in faults_of("a.py", source.encode()) if fault.number == last + 1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["x = a <= b", "x = a > b"]),
        ("x = a is not b", ["x = a is b"]),
        ("x = a + b", ["x = a - b"]),
        ("x = a and (b or c)", ["x = a or (b or c)", "x = True and (b or c)", "x = a and (b and c)"]),
        ("x = max(a, b)", ["x = min(a, b)", "x = max(b, a)"]),
        ("x = model.eval()", ["x = model"]),
        ("x = f(a, key=b)", ["x = f(a)"]),
        ("x = 1", ["x = 2", "x = 0"]),
        ("x = 'float32'", ["x = 'float32_'"]),
        ("x = 'a sentence for people'", []),
        ("x: float | None = None", []),
        ("f(a)", ["pass"]),
        ("x = '/'.join(é for é in a if é)", ["x = '/'.join(é for é in a if True)"]),
    ],
)
def test_faults_of_a_line(source: str, expected: list[str]) -> None:
    found = becomes(source)
    assert set(expected) <= set(found)
    assert bool(expected) == bool(found)


def test_a_check_can_be_left_out_and_its_message_stays() -> None:
    source = 'def check(x):\n    if x < 0:\n        raise InputError("found", len(x) + 1)\n    return x\n'
    found = faults_of("a.py", source.encode())
    assert {fault.becomes for fault in found if fault.number == 2} >= {"if x <= 0:", "if False:"}
    assert [fault.becomes for fault in found if fault.number == 3] == ["pass"]
    assert {fault.function for fault in found} == {"check"}
    changed = next(fault for fault in found if fault.becomes == "if False:").planted(source.encode())
    assert changed.decode() == source.replace("x < 0", "False")


def test_every_fault_of_a_real_file_is_another_program() -> None:
    source = (REPOSITORY / "quartermap_deploy" / "files.py").read_bytes()
    found = faults_of("quartermap_deploy/files.py", source)
    planted = {fault.planted(source) for fault in found}
    assert len(planted) == len(found) > 100
    assert source not in planted
    for fault in found[::10]:
        compile(fault.planted(source), "files.py", "exec")


def test_a_fault_keeps_its_name_when_lines_move() -> None:
    source = b"def f(x):\n    return x + 1\n\ndef g(x):\n    return x + 1\n"
    before = [fault.key for fault in faults_of("a.py", source)]
    moved = [fault.key for fault in faults_of("a.py", b"# A comment.\n\n" + source)]
    assert before == moved
    assert len(set(before)) == len(before)


def test_listed_faults_of_native_code_are_there() -> None:
    found = native_faults(HERE / "kernels.toml", REPOSITORY)
    areas = read_areas(HERE / "areas.toml")
    assert set(found) <= {file for area in areas for file in area.files(REPOSITORY)}
    for file, faults in found.items():
        source = (REPOSITORY / file).read_bytes()
        assert all(fault.planted(source) != source for fault in faults)


def test_a_listed_fault_whose_text_is_gone_is_an_error(tmp_path: Path) -> None:
    table = tmp_path / "kernels.toml"
    (tmp_path / "a.cpp").write_text("int a = 1;\nint b = 1;\n")
    table.write_text('[[fault]]\nfile = "a.cpp"\nwhat = "w"\nbefore = "int c"\nafter = ""\n')
    with pytest.raises(SystemExit, match="stands 0 times"):
        native_faults(table, tmp_path)
    table.write_text(table.read_text().replace("int c", "= 1"))
    with pytest.raises(SystemExit, match="stands 2 times"):
        native_faults(table, tmp_path)


def test_every_equivalent_fault_is_still_one_and_has_a_reason() -> None:
    equivalents = Equivalents(HERE / "equivalent.toml")
    for area in read_areas(HERE / "areas.toml"):
        for file in area.files(REPOSITORY):
            if file in equivalents.files:
                found = faults_of(file, (REPOSITORY / file).read_bytes())
                assert equivalents.outdated(file, found) == []
                reasons = [equivalents.reason(fault) for fault in found]
                assert all(len(reason) > 20 for reason in reasons if reason is not None)


def test_areas_name_files_and_tests_that_are_there() -> None:
    seen: set[str] = set()
    for area in read_areas(HERE / "areas.toml"):
        files = area.files(REPOSITORY)
        assert files and not seen & set(files), area.name
        seen |= set(files)
        assert all((REPOSITORY / test).is_file() for test in area.tests), area.name


def guard(name: str, seconds: float, *functions: str, file: str = "tests/test_a.py") -> Guard:
    return Guard(f"{file}::{name}", file, seconds, seconds, frozenset(f"a.py::{each}" for each in functions))


def test_tests_that_call_the_function_come_first_and_cheap_ones_before_them() -> None:
    fault = next(fault for fault in faults_of("a.py", b"def f(x):\n    return x + 1\n"))
    guards = [
        guard("slow", 5.0, "f"),
        guard("elsewhere", 0.1, "g", file="tests/test_b.py"),
        guard("beside", 0.1, "g"),
        guard("quick", 0.2, "f", "g"),
    ]
    names = [each.name.split("::")[1] for each in chosen(fault, guards, 40.0)]
    assert names == ["quick", "slow", "beside"]
    assert [each.name.split("::")[1] for each in chosen(fault, guards, 4.0)] == ["quick", "beside"]
    many = [
        guard("compiled", 3.0, "f"),
        guard("shares", 0.1, "f"),
        guard("heavy", 20.0, "f", file="tests/test_b.py"),
    ]
    assert [each.name.split("::")[1] for each in chosen(fault, many, 16.0)] == ["shares", "compiled"]
    # A slow test keeps itself out, and not the cheap ones of its file.
    beside_heavy = [*many, guard("light", 0.1, "f", file="tests/test_b.py")]
    assert [each.name.split("::")[1] for each in chosen(fault, beside_heavy, 16.0)] == [
        "shares",
        "light",
        "compiled",
    ]
    assert chosen(replace(fault, function="h"), guards, 40.0) == []
    everywhere = chosen(replace(fault, function=""), guards, 40.0)
    assert len(everywhere) == 4


def test_what_builds_something_of_its_own_is_late() -> None:
    area = Area("a", 1.0, (), (), late=("portable", "sixteen"))
    assert [area.is_late(guard(name, 1.0)) for name in ("f[avx2]", "f[portable-1]", "sixteen")] == [
        False,
        True,
        True,
    ]
    assert not Area("a", 1.0, (), ()).is_late(guard("portable", 1.0))


def test_every_test_of_the_area_runs_on_a_fault_of_native_code() -> None:
    fault = replace(faults_of("a.py", b"x = 1\n")[0], file="a.cpp")
    guards = [guard("slow", 90.0), guard("quick", 0.2), guard("other", 100.0, file="tests/test_b.py")]
    assert [each.name.split("::")[1] for each in chosen(fault, guards, 40.0)] == ["quick", "slow", "other"]


def test_functions_report_and_compute_the_same() -> None:
    source = b'"""Doc."""\nfrom __future__ import annotations\n\n'
    source += b'class A:\n    def f(self):\n        """Say."""\n        return 3\n'
    seen: dict[str, object] = {}
    changed = reporting("a.py", source)
    assert b"add('a.py::A.f')" in changed
    sys.modules["mutants_seen"] = type(sys)("mutants_seen")
    try:
        names: set[str] = set()
        sys.modules["mutants_seen"].add = names.add  # type: ignore[attr-defined]
        exec(compile(changed, "a.py", "exec"), seen)
        assert seen["A"]().f() == 3  # type: ignore[operator]
        assert seen["A"].f.__doc__ == "Say."  # type: ignore[attr-defined]
        assert names == {"a.py::A.f"}
    finally:
        del sys.modules["mutants_seen"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "package" / "a.py").write_text("def f(x):\n    return x + 1\n")
    (tmp_path / "tests" / "test_a.py").write_text(
        "def test_f():\n    assert f(1) == 2\n\ndef test_g():\n    pass\n"
    )
    return tmp_path


def test_results_hold_while_what_they_rest_on_is_unchanged(repository: Path) -> None:
    path, tests = repository / "results.jsonl", ("tests/test_a.py",)
    first, second = faults_of("package/a.py", (repository / "package" / "a.py").read_bytes())[:2]
    results = Results(repository, path)
    results.add(first, Result(first.key, "caught", "failed", "tests/test_a.py::test_f"), tests)
    results.add(second, Result(second.key, "survived", budget=10.0), tests)

    def known(budget: float = 10.0) -> list[str | None]:
        again = Results(repository, path)
        found = [again.known(fault, tests, budget) for fault in (first, second)]
        return [None if result is None else result.verdict for result in found]

    assert known() == ["caught", "survived"]
    assert known(budget=30.0) == ["caught", None], "more tests may catch it in more time"
    test_file = repository / "tests" / "test_a.py"
    test_file.write_text(test_file.read_text() + "\ndef test_h():\n    pass\n")
    assert known() == ["caught", None]
    test_file.write_text(test_file.read_text().replace("== 2", "== 3"))
    assert known() == [None, None]


def test_results_fall_with_the_file(repository: Path) -> None:
    path, source = repository / "results.jsonl", repository / "package" / "a.py"
    fault = faults_of("package/a.py", source.read_bytes())[0]
    Results(repository, path).add(fault, Result(fault.key, "caught", "failed", "tests/test_a.py::test_f"), ())
    assert Results(repository, path).known(fault, ()) is not None
    source.write_text(source.read_text() + "\n# More.\n")
    assert Results(repository, path).known(fault, ()) is None


def test_the_copy_is_mended_and_the_original_untouched(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    original = (repository / "package" / "a.py").read_bytes()
    tree = Tree(repository, tmp_path_factory.mktemp("tree"))
    tree.plant("package/a.py", b"def f(x):\n    return x - 1\n")
    (tree.path / "tests" / "test_a.py").unlink()
    (tree.path / "left_behind.txt").write_text("by a fault")
    assert (repository / "package" / "a.py").read_bytes() == original
    tree.mend()
    assert (tree.path / "package" / "a.py").read_bytes() == original
    assert (tree.path / "tests" / "test_a.py").is_file()
    assert not (tree.path / "left_behind.txt").exists()


def test_a_planted_file_is_compiled_anew_within_the_second(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Times of files in whole seconds and equal sizes must not bring back compiled code of another fault."""
    tree = Tree(repository, tmp_path_factory.mktemp("tree"))
    command = [sys.executable, "-c", "from package.a import f; print(f(1))"]
    stamp = (tree.path / "package" / "a.py").stat()
    for sign, expected in (("+", "2"), ("-", "0"), ("*", "1")):
        tree.plant("package/a.py", f"def f(x):\n    return x {sign} 1\n".encode())
        os.utime(tree.path / "package" / "a.py", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert (
            subprocess.run(command, cwd=tree.path, capture_output=True, text=True).stdout.strip() == expected
        )


def judged(area: Area, *verdicts: str) -> list[Judged]:
    fault = Fault("a.py", 0, 1, "x", "kind", 1, "a", "x", "f")
    return [
        Judged(area, fault, None if verdict == "equivalent" else Result("key", verdict), "reason" * 5)
        for verdict in verdicts
    ]


def test_an_area_fails_below_its_share() -> None:
    area = Area("all", 0.75, (), ())
    enough = judged(area, "caught", "caught", "caught", "survived", "equivalent")
    assert Count.of(enough).share == 0.75
    assert failing(enough) == []
    assert failing([*enough, *judged(area, "not covered")]) == ["all"]
    assert failing(judged(area, "equivalent")) == []


def test_patterns_mean_files_by_their_end() -> None:
    assert not matches("quartermap_deploy/validation/parity.py", ["passes/*.py", "ity.py"])
    assert matches("quartermap_deploy/validation/parity.py", ["validation/*.py"])
    assert matches("quartermap_deploy/validation/parity.py", ["*/validation/*.py"])
    assert matches("quartermap_deploy/validation/parity.py", ["parity.py"])
    assert matches("quartermap_deploy/validation/parity.py", [])


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_touched_files_are_those_of_the_branch(repository: Path) -> None:
    assert touched_files(repository) is None or REPOSITORY in repository.parents
    git(repository, "init")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "first")
    assert touched_files(repository) is None, "there is nothing to compare with"
    git(repository, "checkout", "-b", "branch")
    (repository / "package" / "a.py").write_text("def f(x):\n    return x\n")
    git(repository, "commit", "-am", "second")
    (repository / "package" / "new.py").write_text("")
    assert touched_files(repository) == ["package/a.py", "package/new.py"]


def test_help_and_list_need_no_run() -> None:
    def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'tests'}"}
        command = [sys.executable, "-m", "mutants", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    assert "SAMPLE=all" in tool("--help").stdout
    unknown = tool("--list", "--files", "no_such_file.py")
    assert unknown.returncode == 2 and "no_such_file.py" in unknown.stderr
    shown = tool("--list", "--files", "files.py", "--sample", "3").stdout.splitlines()
    assert len(shown) == 4 and shown[-1] == "3 faults"
    assert all(line.startswith("quartermap_deploy/files.py:") for line in shown[:-1])


TRIALS = """
import sys
from pathlib import Path
import pytest, hypothesis
from mutants import forked
from mutants.tree import Tree

tree, scratch = Tree(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3])
order = ["tests/test_a.py::test_process", "tests/test_a.py::test_f", "tests/test_a.py::test_two[two-2]"]
endless, leaving = "[1 for _ in iter(int, 1)]", "x + 1 if x > 1 else __import__('os')._exit(0)"
for body in ("x + 1", "x - 1", "x + x", "x + (x < 9)", "f(", endless, leaving):
    tree.plant("package/a.py", f"def f(x):\\n    return {body}\\n".encode())
    run = forked.run_tests(tree.path, scratch, ["tests/test_a.py"], order=order, seconds=5 if "iter" in body else 60)
    tree.mend()
    print(run.outcome, run.test or "-")
print(forked.run_tests(tree.path, scratch, ["tests/test_a.py"], order=["none"]).outcome)
print(forked.run_tests(tree.path, scratch, ["tests/test_a.py"], order=order, budget=0.0).data["passed"])
"""


def test_faults_are_caught_in_forks_and_by_processes_that_tests_start(
    repository: Path, tmp_path: Path
) -> None:
    (repository / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (repository / "tests" / "test_a.py").write_text(
        "import subprocess, sys\n"
        "from package.a import f\n"
        "import pytest\n"
        "def test_f():\n    assert f(1) == 2\n"
        "@pytest.mark.parametrize(('name', 'least'), [('two', f(9) - 8)])\n"
        "def test_two(name, least):\n    assert least == 2\n"
        "def test_process():\n"
        "    command = [sys.executable, '-c', 'from package.a import f; print(f(3) > 0)']\n"
        "    assert subprocess.run(command, capture_output=True, text=True, cwd='/').stdout == 'True\\n'\n"
        "def test_not_asked_for():\n    assert f(5) == 0\n"
    )
    places = [str(repository), str(tmp_path / "build" / "tree"), str(tmp_path / "build" / "scratch")]
    done = subprocess.run(
        [sys.executable, "-c", TRIALS, *places],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")},
        timeout=120,
    )
    assert done.stdout.splitlines() == [
        "passed -",
        "failed tests/test_a.py::test_f",  # f(3) is 2, which is above zero, too
        "failed tests/test_a.py::test_two[two-10]",  # not asked for by this name, which the fault made
        "failed tests/test_a.py::test_two[two-1]",
        "failed tests/test_a.py",
        "time -",
        "crashed -",
        "nothing ran",
        "1",
    ], done.stderr
