"""`quartermap bench`: compare the speed of bundles in one run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.bench import Timing, interleave, measured, scatter
from quartermap_deploy.bundle import bundle_labels
from quartermap_deploy.cli.execution import add_execution_options, execution_of, tell_placement
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.options import add_output_options, add_plugin_option, add_signature_option
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import file_or_folder, whole
from quartermap_deploy.errors import InputError
from quartermap_deploy.limits import LARGEST_BATCH, MOST_ROUNDS, MOST_THREADS
from quartermap_deploy.tables.timing import result_table
from quartermap_deploy.targets import DEFAULT, refuse_providers
from quartermap_deploy.targets.execution import ON_CPU, Execution

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.cli.parsing import Subparsers
    from quartermap_deploy.progress import Progress
    from quartermap_deploy.targets import Session
    from quartermap_deploy.tensor_info import TensorInfo


SCANS = {"auto": None, "native": True, "portable": False}
"""What `--scans` takes, and what a session is told for it."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "bench",
        run,
        summary="compare the speed of bundles, in turns",
        description="""
            Time bundles on the real inputs that they were validated with: images, where they take images, or else the
            example that they were compiled with. They may have several inputs and outputs. They run in turns, one call
            of each per round, so that a machine whose speed changes slows all of them alike; speeds are compared within
            a round. Inputs are prepared beforehand, and two rounds warm up.

            Speed is relative to the first bundle, 2 for twice as many images per second: the median over the rounds,
            and in brackets its quartiles. Naming a bundle twice shows what the machine's noise amounts to.
            """,
        examples="""
            quartermap bench bundles/vmamba_digits bundles/vmamba_digits_k3 --batch 64
            quartermap bench bundles/tiny_k3_float16 --target onnxruntime tensorrt-rtx --batch 8
            quartermap bench bundles/tiny bundles/tiny_k3 --device cuda --batch 8
            quartermap bench bundles/* --threads 2 --repeats 31 --json
            """,
    )
    parser.add_argument(
        "bundles",
        type=file_or_folder,
        nargs="+",
        metavar="BUNDLE",
        help="folders that `quartermap compile` wrote; speeds are relative to the first",
    )
    parser.add_argument(
        "--batch",
        type=whole(1, LARGEST_BATCH),
        default=1,
        metavar="N",
        help="images, or other entries of a batch, per call (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=whole(1, MOST_THREADS),
        metavar="N",
        help="threads of ONNX Runtime (default: QUARTERMAP_THREADS, or all cores)",
    )
    parser.add_argument(
        "--repeats",
        type=whole(1, MOST_ROUNDS),
        default=15,
        metavar="N",
        help="rounds that are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        nargs="+",
        metavar="NAME",
        help="what each bundle runs on; several run in turns, too (default: onnxruntime, or the bundle's only target)",
    )
    parser.add_argument(
        "--scans",
        nargs="+",
        choices=tuple(SCANS),
        default=["auto"],
        help="what computes the scans in onnxruntime: the native operator, the portable body in the file, or the "
        "former where it can be had; several run in turns (default: auto)",
    )
    add_execution_options(parser)
    add_plugin_option(parser)
    add_signature_option(parser, "each bundle")
    add_output_options(parser)


def run(options: argparse.Namespace) -> None:
    """Time the bundles and print the table."""
    from quartermap_deploy.targets.onnxruntime.threads import default_threads

    paths = dict(zip(bundle_labels(options.bundles), options.bundles, strict=True))
    threads = options.threads or default_threads()
    with results_only():
        bundles = load_bundles(paths, make_progress(options), options.signed_by)
        timings = time_bundles(bundles, options, make_progress(options))
    first = next(iter(timings.values()))
    results = [
        {
            "name": label,
            "path": paths[label],
            "target": target,
            "scans": scans,
            "providers": providers,
            **measured(timing, first, options.batch),
        }
        for (label, target, scans, providers), timing in timings.items()
    ]
    values = {
        "batch": options.batch,
        "unit": unit(bundles.values()),
        "threads": threads,
        "repeats": options.repeats,
        "bundles": results,
    }
    if options.json:
        print_json(values)
    elif not options.quiet:
        show(result_table(values))
    tell_scatter(results)


def tell_scatter(results: Sequence[Mapping[str, Any]]) -> None:
    """Warn of speeds that say little, and of what helps."""
    for result in results:
        if (unknown := scatter(result)) is not None:
            low, high = result["speed_quartiles"]
            message(
                "warning",
                f"the rounds of {result['name']} are too scattered to tell {unknown}: half of them say {low:.2f} to "
                f"{high:.2f} times as fast as the first. Time it where nothing else runs, with fewer --threads than "
                "cores, more --repeats, or a larger --batch",
            )


def load_bundles(
    paths: Mapping[str, Path], progress: Progress, signed_by: Sequence[Path] = ()
) -> dict[str, Bundle]:
    """Load the bundles, by their names in the results; `load_bundle` says who `signed_by` are."""
    from quartermap_deploy.bundle import load_bundle

    found = {}
    with progress.step("loading the bundles", total=len(paths)) as advance:
        for label, path in paths.items():
            found[label] = load_bundle(path, signed_by=signed_by)
            advance(1)
    return found


def unit(bundles: Iterable[Bundle]) -> str:
    """What a batch holds: "images", where every bundle takes one image for each entry, or else "entries"."""
    image = all([item.is_image for item in bundle.inputs] == [True] for bundle in bundles)
    return "images" if image else "entries"


def time_bundles(
    bundles: Mapping[str, Bundle], options: argparse.Namespace, progress: Progress
) -> dict[tuple[str, str, str | None, str | None], Timing]:
    """Open bundles, each for every target that was asked for, and time them in turns.

    Returns:
        The timings, by the name, the target, what computes the scans, and how many nodes which provider has.

    Raises:
        InputError: if there are providers, and no bundle runs on ONNX Runtime.
    """
    execution = execution_of(options)
    wanted = [
        (label, bundle, target)
        for label, bundle in bundles.items()
        for target in dict.fromkeys(map(bundle.target, options.target or [None]))
    ]
    if all(target != DEFAULT for *_, target in wanted):
        refuse_providers(wanted[0][2], execution)
    functions, places = {}, {}
    told: set[str] = set()
    with progress.step("running each once", total=len(wanted)) as advance:
        for label, bundle, target in wanted:
            own = execution if target == DEFAULT else ON_CPU
            for form in dict.fromkeys(options.scans if target == DEFAULT else ["auto"]):
                session, run_once = call(
                    bundle, options.batch, options.threads, target, options.plugin, SCANS[form], own
                )
                tell_placement(session, label, told)
                scans = None if session.scans is None else str(session.scans)
                providers = None if session.placement is None else str(session.placement)
                name = f"{label} on {target}, {scans or form}"
                places[name] = (label, target, scans, providers)
                functions[name] = run_once
            advance(1)
    timings = interleave(functions, options.repeats, progress=progress)
    return {places[name]: timing for name, timing in timings.items()}


def call(
    bundle: Bundle,
    batch: int,
    threads: int | None,
    target: str,
    plugin: Path | None = None,
    native: bool | None = None,
    execution: Execution = ON_CPU,
) -> tuple[Session, Callable[[], object]]:
    """Return a session, and a function that runs it once on a batch of the inputs that the bundle was validated with.

    Raises:
        InputError: if the bundle does not take batches of this size.
    """
    from quartermap_deploy.targets import open_session

    feeds = golden_batch(bundle, batch)
    entry = {**bundle.manifest["targets"][target], "size_rules": bundle.manifest["size_rules"]}
    with thread_count(threads):
        session = open_session(target, bundle.path, entry, plugin=plugin, native=native, execution=execution)
    # Engines take float32 whatever the portable model takes.
    feeds = {item.name: feeds[item.name].astype(item.type, copy=False) for item in session.inputs}
    session.infer(feeds)
    return session, lambda: session.infer(feeds)


def golden_batch(bundle: Bundle, batch: int) -> dict[str, NDArray[Any]]:
    """Return the inputs that a bundle was validated with, repeated to a batch; zeros would take another time.

    Inputs that have no batch, or a fixed one, stay as they are.

    Raises:
        InputError: if the bundle's batch is fixed at another size.
        BundleError: if its golden files cannot be read.
    """
    import numpy as np

    from quartermap_deploy.validation.golden import read_golden

    _require_batch(bundle, batch)
    cases, _ = read_golden(bundle.path, bundle.manifest["golden"])
    inputs = next((cases[name] for name in ("images", "example") if name in cases), None)
    inputs = next(iter(cases.values())) if inputs is None else inputs
    return {
        item.name: np.ascontiguousarray(
            inputs[item.name][np.arange(batch) % len(inputs[item.name])]
            if _has_open_batch(item)
            else inputs[item.name]
        )
        for item in bundle.inputs
    }


def _has_open_batch(item: TensorInfo) -> bool:
    return bool(item.shape) and isinstance(item.shape[0], str)


def _require_batch(bundle: Bundle, batch: int) -> None:
    first = bundle.inputs[0]
    if any(map(_has_open_batch, bundle.inputs)):
        return
    fixed = first.shape[0] if first.shape else 1
    if batch != fixed:
        raise InputError(
            f"the bundle {bundle.path} takes {fixed} at a time, as its input {first.name} has the fixed shape "
            f"({', '.join(map(str, first.shape))}); say --batch {fixed}, or compile it with an open batch"
        )


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """While open, sessions are made with this many threads; None leaves it to the environment."""
    from quartermap_deploy.targets.onnxruntime.threads import THREADS_VARIABLE

    before = os.environ.get(THREADS_VARIABLE)
    if threads is not None:
        os.environ[THREADS_VARIABLE] = str(threads)
    try:
        yield
    finally:
        if before is not None:
            os.environ[THREADS_VARIABLE] = before
        elif threads is not None:
            del os.environ[THREADS_VARIABLE]
