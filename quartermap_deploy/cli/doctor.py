"""`quartermap doctor`: everything about this installation and machine that a report of a defect needs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.options import add_output_options
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.tables.layout import facts, table

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "doctor",
        run,
        summary="show versions, devices and native libraries, for a report of a defect",
        description="""
            Show what a report of a defect needs: versions of Python and of the packages, the processor and the GPU, the
            providers of ONNX Runtime and which of them work (a tiny model is run by each, in a process of its own with
            a time limit), which native libraries were found, chosen or refused and why, the compilers, the
            environment variables that matter, and your own folders. Nothing is changed, built or sent anywhere, and
            what is missing is no error. Values of variables that may hold secrets are not shown; look through the rest
            before you publish it.
            """,
        examples="""
            quartermap doctor
            quartermap doctor --json > doctor.json
            """,
    )
    add_output_options(parser, quiet=False)


def run(options: argparse.Namespace) -> None:
    """Print it."""
    from quartermap_deploy.doctor import examine

    with results_only():
        found = examine()
    if options.json:
        print_json(found)
        return
    native = found["native"]
    show(
        facts("installation", _installation(found)),
        "",
        facts("machine", _machine(found["machine"])),
        "",
        facts("packages", found["packages"]),
        "",
        *_providers(found["onnxruntime"]),
        "",
        *_cpu_library(native["cpu"]),
        "",
        facts("other native libraries", {_OTHERS[kind]: _other(native[kind]) for kind in _OTHERS}),
        "",
        *_plugins(native["plugins"]),
        "",
        facts("compilers", found["compilers"]),
        "",
        facts("environment", found["environment"] or {"none": "no variable that matters is set"}),
        "",
        facts("folders", {name: _folder(value) for name, value in found["folders"].items()}),
    )


def _installation(found: dict[str, Any]) -> dict[str, object]:
    python, runtime = found["python"], found["onnxruntime"]
    packages = " and ".join(f"{name} {version}" for name, version in runtime.get("packages", {}).items())
    return {
        "quartermap-deploy": f"{found['quartermap_deploy']['version']} in {found['quartermap_deploy']['folder']}",
        "Python": f"{python['version']} ({python['implementation']}), {python['executable']}",
        "ONNX Runtime": runtime.get("error") or f"{runtime['version']}, by {packages or 'no package of pip'}",
    }


def _providers(runtime: dict[str, Any]) -> list[Any]:
    """Return the table of ONNX Runtime's providers, by which a tiny model was run."""
    if "error" in runtime:
        return [facts("providers of ONNX Runtime", {"none": runtime["error"]})]
    tried = {probe["provider"]: probe for probe in runtime["probes"]}
    rows = []
    for name in runtime["providers"]:
        probe = tried.get(name)
        verdict = "not tried" if probe is None else "works" if probe["works"] else "does not work"
        reason = "it sends the model elsewhere" if probe is None else probe["reason"]
        rows.append((name, verdict, "" if probe is None else f"{probe['seconds']:.1f} s", reason))
    found: list[Any] = [
        table("providers of ONNX Runtime", ["provider", "verdict", ">tried in", "why not"], rows)
    ]
    return [*found, runtime["problem"]] if runtime.get("problem") else found


def _machine(machine: dict[str, Any]) -> dict[str, object]:
    cores, memory, gpu = machine["cores"], machine["memory"], machine["gpu"]
    return {
        "system": f"{machine['system']} {machine['libc'] or ''}".strip(),
        "processor": f"{machine['processor'] or 'unknown'} ({machine['machine']})",
        "cores": f"{cores['usable']} usable, {cores['all']} in all",
        "instruction sets": ", ".join(machine["instruction_sets"]) or None,
        "memory": None if memory is None else _memory(memory),
        "GPU": None
        if gpu is None
        else gpu.get("error") or f"{gpu['name']}, compute capability {gpu['compute_capability']}",
    }


def _memory(memory: dict[str, Any]) -> str:
    if "error" in memory:
        return str(memory["error"])
    parts = [f"{value / 2**30:.1f} GiB {name}" for name, value in memory.items() if value is not None]
    return ", ".join(parts)


def _cpu_library(found: dict[str, Any]) -> list[Any]:
    """Return the tables about the CPU library."""
    if "error" in found:
        return [facts("CPU library", {"none": found["error"]})]
    library = found["library"]
    rows: dict[str, object] = {"chosen" if library else "none chosen": found["summary"]}
    if library:
        rows["compiled by"] = library["contract"].get("compiler")
    parts = [facts("CPU library", rows)]
    if found["refused"]:
        refused = [(entry["place"], entry["reason"]) for entry in found["refused"]]
        parts += [table(None, ["passed over", "why"], refused)]
    return parts


_OTHERS = {"cuda": "CUDA, for ONNX Runtime", "plugin": "TensorRT plugin"}
"""What kinds of libraries are called that the environment may name."""


def _other(found: dict[str, Any]) -> str:
    return str(found.get("error") or f"{'chosen' if found['library'] else 'none chosen'}: {found['summary']}")


def _plugins(found: Any) -> list[Any]:
    """Return the table about the store of TensorRT plugins."""
    if isinstance(found, dict):
        return [facts("TensorRT plugins", {"none": found["error"]})]
    if not found:
        return [facts("TensorRT plugins", {"none": "the store is empty"})]
    rows = [(entry["path"], entry["how"], entry["added"]) for entry in found]
    return [table("TensorRT plugins", ["library", "how it came", "when"], rows)]


def _folder(folder: dict[str, Any]) -> str:
    if folder["problem"]:
        return f"{folder['path'] or 'none'}: {folder['problem']}"
    return f"{folder['path'] or 'none'}{'' if folder['exists'] else ' (not there)'}"
