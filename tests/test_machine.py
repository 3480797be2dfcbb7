"""The cores that a process may use: what it is bound to, and the limits of containers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quartermap_deploy import machine
from quartermap_deploy.machine import all_cores, instruction_sets, memory, usable_cores


def system(folder: Path, files: dict[str, str], siblings: int = 1) -> Path:
    """A file system with these files and eight processors, so many of which are one core."""
    for processor in range(8):
        first = processor - processor % siblings
        text = f"{first}-{first + siblings - 1}\n"
        files[f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"] = text
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _eight_processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr(machine.os, "cpu_count", lambda: 8)
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        # A share of a core is a thread, too.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "0::/pods/one/inner\n",
                "sys/fs/cgroup/pods/one/inner/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pods/one/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/pods/cpu.max": "600000 100000\n",
            },
            4,
        ),
        # The path of the host, in a container that does not see it.
        (
            {
                "proc/self/cgroup": "0::/kubepods/pod/container\n",
                "sys/fs/cgroup/cpu.max": "300000 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "5:cpuset:/\n4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1\n",
                "sys/fs/cgroup/cpuset/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({"proc/self/cgroup": "nonsense\n0::/../../x\n", "sys/fs/cgroup/cpu.max": "what\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1 0\n"}, 8),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert usable_cores(system(tmp_path, dict(files))) == expected
    assert all_cores(tmp_path) == 8


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = system(tmp_path, {}, siblings=2)
    assert (usable_cores(root), all_cores(root)) == (4, 4)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert (usable_cores(root), all_cores(root)) == (2, 4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to processors")
def test_sessions_of_a_bound_process_have_no_more_threads() -> None:
    script = (
        "import os\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from quartermap_deploy.targets.onnxruntime.opening import inference_session\n"
        "from quartermap_deploy.targets.onnxruntime.threads import default_threads\n"
        "import onnx, onnx.helper as h\n"
        "value = lambda name: h.make_tensor_value_info(name, 1, [1])\n"
        "graph = h.make_graph([h.make_node('Relu', ['x'], ['y'])], 'g', [value('x')], [value('y')])\n"
        "model = h.make_model(graph, opset_imports=[h.make_opsetid('', 20)], ir_version=9)\n"
        "session = inference_session(model.SerializeToString())\n"
        "print(default_threads(), session.get_session_options().intra_op_num_threads)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "QUARTERMAP_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=True,
    )
    cores = all_cores()
    assert done.stdout.split() == ["1", "1" if cores > 1 else "0"]


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            "model name\t: A\nflags\t\t: fpu sse2 sse4_2 avx avx2 fma f16c avx512f\nflags\t\t: fpu\n",
            ["avx", "avx2", "avx512f", "f16c", "fma", "sse4_2"],
        ),
        ("Features\t: fp asimd asimdhp sve i8mm\n", ["asimd", "asimdhp", "i8mm", "sve"]),
        ("hart\t: 0\n", []),
    ],
)
def test_instruction_sets(tmp_path: Path, cpuinfo: str, expected: list[str]) -> None:
    assert instruction_sets(system(tmp_path, {"proc/cpuinfo": cpuinfo})) == expected
    assert instruction_sets(tmp_path / "elsewhere") == []


def test_memory(tmp_path: Path) -> None:
    text = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:   8192 kB\n"
    assert memory(system(tmp_path, {"proc/meminfo": text})) == {"total": 16 << 20, "available": 8 << 20}
    here = memory()["total"]
    assert here is None or here > 1 << 28
