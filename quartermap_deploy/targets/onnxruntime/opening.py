"""Sessions of ONNX Runtime: which providers start, in which form the scans run there, and what the session runs where.

In the CPU's memory the scans run by the native operator of the CPU library where that is found and takes the model, and
by the standard operators in the file otherwise: a loop, which a CPU runs well. A GPU would run it step by step. So with
CUDA the scans run by the native operator of the CUDA library, where that is found; otherwise, and on every other
device, they are written anew as the model is loaded, by the `tree` body, which has no loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from quartermap_deploy.errors import BundleError, MissingDependencyError, PassError
from quartermap_deploy.lowering.operator import SCANS, SELECTIVE_SCAN_2D
from quartermap_deploy.machine import usable_cores
from quartermap_deploy.native.cpu_library import find_cpu_library
from quartermap_deploy.native.cuda_library import find_cuda_library
from quartermap_deploy.onnx_bounds import LOOP, check_model
from quartermap_deploy.targets.execution import CPU, CUDA, ON_CPU, Execution, Provider, short_names
from quartermap_deploy.targets.fused_norms import fused_model
from quartermap_deploy.targets.onnxruntime.packages import (
    installed_packages,
    libraries_of,
    missing_provider,
    mixture,
)
from quartermap_deploy.targets.onnxruntime.probing import one_line, preload, probe
from quartermap_deploy.targets.onnxruntime.threads import threads_wanted
from quartermap_deploy.targets.placement import Placement
from quartermap_deploy.targets.scan_form import ScanForm

THREADS_ENTRY = "quartermap.threads"
"""The entry of a session's configuration by which the native operator learns how many threads there are."""
PLACEMENT_ENTRY = "session.record_ep_graph_assignment_info"
"""The entry by which ONNX Runtime, from 1.24 on, keeps which provider has which node."""
INLINED = "the scans are written out in the file (inline), so there is no operator whose place it could take"
FATAL = 4
"""Severity of what a log of ONNX Runtime still takes."""
LARGEST_FOLDED = str(64 << 20)
"""Bytes of a tensor that ONNX Runtime computes of constants ahead of time."""


class Opened(NamedTuple):
    """A session of ONNX Runtime.

    Attributes:
        session: the `onnxruntime.InferenceSession`.
        scans: what computes its scans.
        placement: what of it runs where.
    """

    session: Any
    scans: ScanForm
    placement: Placement


class Started(NamedTuple):
    """What is left of an execution on this machine.

    Attributes:
        providers: those that start, in order.
        left_out: the others, each with the reason.
    """

    providers: tuple[Provider, ...]
    left_out: Mapping[str, str]


def open_session(
    model: Path | bytes,
    threads: int | None = None,
    *,
    native: bool | None = None,
    profile: Path | None = None,
    fuse: bool = True,
    execution: Execution = ON_CPU,
) -> Opened:
    """Open a session for a file or serialised bytes.

    Args:
        model: its file, or its serialised bytes.
        threads: threads for one operator of the CPU provider; None takes the environment variable QUARTERMAP_THREADS,
            or else all cores that the process may use.
        native: whether the native operator computes its scans. None takes it where it is there and takes the model;
            False keeps to the portable body; True refuses a session without it.
        profile: record the time of every node; `end_profiling` writes it into a file whose name starts so.
        fuse: with the native operator and the CPU provider alone, also normalise maps by one operator each; see
            `fused_norms`. Other providers take a normalisation better than a map that comes back from the CPU.
        execution: the providers that run it.

    Raises:
        BundleError: if the model holds what this package does not write (see `onnx_bounds`), ONNX Runtime refuses it, a
            provider cannot start, or the model has scans for which the native operator is wanted and cannot be had.
        MissingDependencyError: if a provider is not in the package of ONNX Runtime that is installed.
    """
    kinds = check_model(model)
    scans = kinds.intersection(SCANS)
    if native and not scans and LOOP in kinds:
        raise BundleError(f"the native operator cannot run the scans of {_name(model)}: {INLINED}")
    found = started(execution)
    preload(tuple(provider.name for provider in found.providers))
    threads = threads if threads is not None else threads_wanted()

    def session(source: Path | bytes, library: Path | None) -> Any:
        return _session(source, _options(threads, profile, library, found.providers), found.providers)

    passed_over = None
    if not scans:
        form = ScanForm("portable", reason=INLINED) if LOOP in kinds else ScanForm("none")
        opened = _or_refused(model, lambda: session(model, None))
    elif all(provider.in_host_memory for provider in found.providers):
        fuse = fuse and found.providers[0].name == CPU
        opened, form = _in_host_memory(model, session, native, fuse)
        passed_over = find_cpu_library().warning if native is not False else None
    else:
        on_cuda = any(provider.name == CUDA for provider in found.providers)
        opened, form = _on_a_device(model, session, native, _cuda_operator(scans) if on_cuda else NOT_CUDA)
        passed_over = find_cuda_library().warning if on_cuda and native is not False else None
    placement = _placement(opened, found, execution)
    if placement.takes_nothing:
        left_out = {**placement.left_out, **_nothing_taken(placement, execution)}
        other = open_session(model, threads, native=native, profile=profile, fuse=fuse)
        return other._replace(placement=replace(other.placement, left_out=left_out))
    return Opened(opened, form, replace(placement, passed_over=passed_over))


def inference_session(model: Path | bytes, threads: int | None = None) -> Any:
    """A session as `open_session` makes it, which keeps to the portable body; `open_session` says what is raised."""
    return open_session(model, threads, native=False).session


# Providers -----------------------------------------------------------------------------------------------------------


def started(execution: Execution) -> Started:
    """Return which providers start here; each but the CPU's is tried in a process of its own, once in a process's life.

    Raises:
        MissingDependencyError: if one is not in the package of ONNX Runtime that is installed, and the CPU is not to
            take its place.
        BundleError: if one cannot start, and the CPU is not to take its place.
    """
    if execution.on_cpu:
        return Started(execution.providers, {})
    import onnxruntime

    available = onnxruntime.get_available_providers()
    kept, left_out = [], {}
    for provider in execution.providers:
        reason = None
        if provider.name not in available:
            reason = missing_provider(provider.name)
            if not execution.may_fall_back:
                raise MissingDependencyError(reason)
        elif provider.name != CPU and not (tried := probe(provider)).works:
            reason = str(tried.reason)
            if not execution.may_fall_back:
                raise BundleError(_cannot_start(provider.name, reason))
        if reason is None:
            kept.append(provider)
        else:
            left_out[provider.name] = reason
    return Started(tuple(kept), left_out)


def _cannot_start(name: str, reason: str) -> str:
    packages = installed_packages()
    called = " and ".join(f"{package} {version}" for package, version in packages.items()) or "ONNX Runtime"
    hints = [hint for hint in (mixture(packages), libraries_of(name)) if hint is not None]
    return (
        f"{name} is in {called} and cannot start: {'. '.join([reason, *hints])}. "
        f"`quartermap doctor` shows what works; to run on the CPU where it does not start, name the CPU behind it: "
        f"--provider {short_names([name])} --provider CPU, or --device auto for CUDA"
    )


def _nothing_taken(placement: Placement, execution: Execution) -> dict[str, str]:
    """Why providers that take nothing of a model are left out.

    Raises:
        BundleError: if the CPU is not to take their place.
    """
    names = [name for name in placement.providers if name != CPU]
    reason = f"of the model's {sum((placement.nodes or {}).values())} nodes it takes none"
    if not execution.may_fall_back:
        providers = " ".join(f"--provider {short_names([name])}" for name in names)
        raise BundleError(
            f"{short_names(names)} would leave the whole model to the CPU: {reason}. Look at its options, or, to run "
            f"on the CPU where it takes nothing, name the CPU behind it: {providers} --provider CPU"
        )
    return dict.fromkeys(names, reason)


def _placement(session: Any, found: Started, execution: Execution) -> Placement:
    """What a session runs where; refuses one that has fewer providers than it was given.

    Raises:
        BundleError: if so, and the CPU is not to take their place.
    """
    names = tuple(session.get_providers())
    left_out = dict(found.left_out)
    for provider in found.providers:
        if provider.name not in names:
            reason = "it starts in a process of its own, and not in this one; ONNX Runtime's log says why"
            if not execution.may_fall_back:
                raise BundleError(_cannot_start(provider.name, reason))
            left_out[provider.name] = reason
    if names == (CPU,) or not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement(names, left_out=left_out)
    nodes, on_cpu = Counter[str](), Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        kinds = [node.op_type for node in part.get_nodes()]
        nodes[part.ep_name] += len(kinds)
        if part.ep_name == CPU:
            on_cpu.update(kinds)
    ordered = {name: nodes[name] for name in (*names, *nodes) if nodes[name]}
    return Placement(names, ordered, dict(on_cpu.most_common()), left_out)


# Forms of the scans --------------------------------------------------------------------------------------------------

Opener = Callable[["Path | bytes", "Path | None"], Any]

NOT_CUDA = "there are native operators for the memory of the CPU and of CUDA alone"


def _in_host_memory(
    model: Path | bytes, session: Opener, native: bool | None, fuse: bool
) -> tuple[Any, ScanForm]:
    """A session in whose memory the operators of the CPU library work, and what computes its scans."""
    refused = "it was not wanted"
    if native is not False:
        found = find_cpu_library()
        if found.library is None:
            refused = found.summary
        else:
            try:
                opened = session(fused_model(model) if fuse else model, found.library.path)
            except Exception as error:  # the model's own fault shows again below
                refused = " ".join(str(error).split())[:400]
            else:
                return opened, ScanForm("native", found.library.instruction_set)
        if native:
            raise BundleError(f"the native operator cannot run the scans of {_name(model)}: {refused}")
    return _or_refused(model, lambda: session(model, None)), ScanForm("portable", reason=refused)


def _cuda_operator(scans: set[str] | frozenset[str]) -> Path | str:
    """The library with the operator of CUDA's provider, or why there is none for a model with such scans."""
    if others := scans - {SELECTIVE_SCAN_2D}:
        return f"the CUDA library computes scans of maps alone, and the model has {', '.join(sorted(others))}"
    found = find_cuda_library()
    return found.summary if found.library is None else found.library.path


def _on_a_device(
    model: Path | bytes, session: Opener, native: bool | None, operator: Path | str
) -> tuple[Any, ScanForm]:
    """A session on a GPU or the like: by the native operator, or with scans that have no loop; or as it is asked for.

    `operator` is the library with the operator, or why there is none.
    """
    if native is False:
        form = ScanForm("portable", reason="it was not wanted")
        return _or_refused(model, lambda: session(model, None)), form
    refused = operator if isinstance(operator, str) else ""
    if isinstance(operator, Path):
        try:
            return session(model, operator), ScanForm("native", "cuda")
        except Exception as error:  # the model's own fault shows again below
            refused = one_line(error)[:400]
    if native:
        raise BundleError(f"the native operator cannot run the scans of {_name(model)}: {refused}")
    try:
        tree = tree_form(model)
    except PassError as error:
        form = ScanForm(
            "portable", reason=f"{refused}, and the scans cannot be written without a loop: {error}"
        )
        return _or_refused(model, lambda: session(model, None)), form
    return _or_refused(model, lambda: session(tree, None)), ScanForm("tree", reason=refused)


def tree_form(model: Path | bytes) -> bytes:
    """The model with scans that have no loop, in standard operators, in its main graph.

    Raises:
        PassError: if its scans cannot be written so.
    """
    import onnx

    from quartermap_deploy.passes.inline_scans import inline_scans
    from quartermap_deploy.passes.lower import lower

    loaded = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    return bytes(inline_scans(lower(loaded, "tree")).SerializeToString())


def _or_refused(model: Path | bytes, make: Callable[[], Any]) -> Any:
    """Make a session.

    Raises:
        BundleError: if ONNX Runtime refuses the model.
    """
    try:
        return make()
    except Exception as error:
        raise BundleError(f"ONNX Runtime refuses {_name(model)}: {one_line(error)[:400]}") from error


def _name(model: Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


def _source(model: Path) -> str | bytes:
    """What ONNX Runtime reads a file by: its name, or what is in it where the name is in no known encoding."""
    try:
        str(model).encode("utf-8")
    except UnicodeEncodeError:
        return model.read_bytes()
    return str(model)


def _session(model: Path | bytes, options: Any, providers: tuple[Provider, ...]) -> Any:
    import onnxruntime

    if any(provider.name != CPU for provider in providers):
        # Providers write to a log of the whole process, names from the file among it, unescaped.
        onnxruntime.set_default_logger_severity(FATAL)
    source = model if isinstance(model, bytes) else _source(model)
    # By itself it would take the CPU where a provider fails, now or in a later run, and print that.
    return onnxruntime.InferenceSession(
        source,
        options,
        providers=[(provider.name, provider.settings()) for provider in providers],
        enable_fallback=0,
    )


def _options(
    threads: int, profile: Path | None, library: Path | None, providers: tuple[Provider, ...]
) -> Any:
    """The options of a session with so many threads, 0 for ONNX Runtime's own number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # What it would write of errors are names from the file, unescaped; the exception says the same.
    options.log_severity_level = FATAL
    options.intra_op_num_threads = threads
    # Idle workers spin for some milliseconds after a run and would take the cores from the next session's run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # What stands in the file is computed once, while it is loaded; versions that do not know this setting ignore it.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", LARGEST_FOLDED)
    if any(provider.name != CPU for provider in providers):
        options.add_session_config_entry(PLACEMENT_ENTRY, "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if library is not None:
        # Nothing in ONNX Runtime's interface tells an operator how many threads its session has. The library reads
        # this as it is registered.
        options.add_session_config_entry(THREADS_ENTRY, str(threads or usable_cores()))
        options.register_custom_ops_library(str(library))
    return options
