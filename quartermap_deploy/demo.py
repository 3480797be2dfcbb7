"""The main job on real input, start to end: `python -m quartermap_deploy.demo`.

Compiles the trained model for handwritten digits, unpruned and with QuarterMap at every third, second and single block,
proves that each bundle computes what PyTorch computes, and shows on digits that the model has never seen what pruning
costs and what it saves.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bench import Timing, interleave
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.progress_display import LineProgress, TerminalProgress
from quartermap_deploy.cli.results import show
from quartermap_deploy.errors import ParityError, QuartermapError
from quartermap_deploy.plain_text import command
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.tables.layout import table
from quartermap_deploy.tables.words import error_text, ranges, worst_error

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.progress import Progress

MODEL = "vmamba_digits"
PLANS: dict[str, QuarterMap | None] = {
    "unpruned": None,
    "k3": QuarterMap(every=3),
    "k2": QuarterMap(every=2),
    "k1": QuarterMap(every=1),
}
TITLES = {"unpruned": "no pruning", "k3": "k = 3", "k2": "k = 2", "k1": "k = 1"}
LEAST_ACCURACY = 0.97
"""Share of the held-out digits that the unpruned model must read right."""
BATCH = 64


@dataclass(frozen=True)
class Result:
    """What the demo found out about one plan.

    Attributes:
        name: name of the plan, and of its bundle.
        pruned_blocks: numbers of the pruned blocks.
        accuracy: share of the held-out digits that the bundle reads right.
        torch_accuracy: the same for the PyTorch model.
        agreement: share of the held-out digits on which the two name the same digit.
        images_per_second: at the batch size of the demo.
        speed: images per second, relative to the unpruned bundle; median over the rounds.
        speed_quartiles: quartiles of it.
        tokens: positions that the scans walk for one image.
        nodes: nodes of the main graph.
        parity_error: worst error of any block or output in the parity check, as a share of the largest value.
    """

    name: str
    pruned_blocks: tuple[int, ...]
    accuracy: float
    torch_accuracy: float
    agreement: float
    images_per_second: float
    speed: float
    speed_quartiles: tuple[float, float]
    tokens: int
    nodes: int
    parity_error: float | None


def run(directory: Path, repeats: int = 9, progress: Progress | None = None) -> list[Result]:
    """Compile, evaluate and time every plan.

    Args:
        directory: where the bundles go, one folder each; bundles that are there are replaced.
        repeats: timed rounds.
        progress: shows the steps; None shows nothing.

    Returns:
        One result for each plan, unpruned first.

    Raises:
        QuartermapError: if a model does not compile, or a bundle departs from PyTorch.
    """
    from quartermap_deploy.compiler import compile
    from quartermap_deploy.data.digits import load_digits
    from quartermap_deploy.data.images import prepare
    from quartermap_deploy.progress import SILENT, Titled

    progress = progress or SILENT
    bundles = {
        name: compile(
            Recipe(MODEL, quartermap=plan),
            directory / name,
            force=True,
            progress=Titled(progress, TITLES[name]),
        )
        for name, plan in PLANS.items()
    }
    digits = load_digits().held_out
    preprocessing = next(iter(bundles.values())).preprocessing
    assert preprocessing is not None, "a model of a card says how its images are prepared"
    images = prepare(list(digits.images), preprocessing)
    predicted = {}
    for name, bundle in bundles.items():
        with progress.step(f"{TITLES[name]}: reading {len(digits)} held-out digits"):
            predicted[name] = (_predict(bundle, images), _predict_torch(PLANS[name], images))
    timings = _time(bundles, images[:BATCH], repeats, progress)
    return [
        _result(name, bundle, predicted[name], digits.labels, timings) for name, bundle in bundles.items()
    ]


def _predict(bundle: Bundle, images: NDArray[np.float32]) -> NDArray[np.int64]:
    session = bundle.session()
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.concatenate([session.run(batch).argmax(axis=1) for batch in batches])


def _predict_torch(plan: QuarterMap | None, images: NDArray[np.float32]) -> NDArray[np.int64]:
    import torch

    from quartermap_deploy.architectures import create_model
    from quartermap_deploy.pruning.reference import prune

    model = create_model(MODEL)
    if plan is not None:
        model = prune(model, plan)
    with torch.inference_mode():
        parts = [model(part).argmax(dim=1).numpy() for part in torch.from_numpy(images).split(BATCH)]
    return np.concatenate(parts)


def _time(
    bundles: dict[str, Bundle], images: NDArray[np.float32], repeats: int, progress: Progress
) -> dict[str, Timing]:
    """Time all bundles in turns on the same images."""

    def call(bundle: Bundle) -> Callable[[], object]:
        session = bundle.session()
        return lambda: session.run(images)

    return interleave({name: call(bundle) for name, bundle in bundles.items()}, repeats, progress=progress)


def _result(
    name: str,
    bundle: Bundle,
    predicted: tuple[NDArray[np.int64], NDArray[np.int64]],
    labels: NDArray[np.int64],
    timings: dict[str, Timing],
) -> Result:
    ours, torch_s = predicted
    first = next(iter(timings.values()))
    return Result(
        name=name,
        pruned_blocks=tuple(block["index"] for block in bundle.manifest["blocks"] if block["pruned"]),
        accuracy=float((ours == labels).mean()),
        torch_accuracy=float((torch_s == labels).mean()),
        agreement=float((ours == torch_s).mean()),
        images_per_second=BATCH / timings[name].median,
        speed=first.ratio(timings[name]),
        speed_quartiles=first.ratio_spread(timings[name]),
        tokens=bundle.manifest["totals"]["tokens"],
        nodes=bundle.manifest["graph"]["nodes"],
        parity_error=worst_error(bundle.report),
    )


def check(results: Sequence[Result]) -> None:
    """Check what the demo claims.

    Raises:
        ParityError: if the unpruned model reads too few digits, or a bundle names another digit than PyTorch.
    """
    unpruned = results[0]
    if unpruned.accuracy < LEAST_ACCURACY:
        raise ParityError(
            f"the unpruned model reads {unpruned.accuracy:.2%} of the held-out digits, expected at least "
            f"{LEAST_ACCURACY:.0%}"
        )
    for result in results:
        if result.agreement < 1:
            raise ParityError(
                f"{TITLES[result.name]}: bundle and PyTorch name the same digit for {result.agreement:.2%} of the "
                "held-out digits, expected all of them"
            )


def show_results(results: Sequence[Result]) -> None:
    """Print the table."""
    rows = [
        (
            TITLES[result.name],
            ranges(result.pruned_blocks) or None,
            f"{result.accuracy:.2%}",
            f"{result.images_per_second:,.0f}",
            f"{result.speed:.2f} ×",
            f"{result.tokens:,}",
            result.nodes,
            error_text(result.parity_error),
        )
        for result in results
    ]
    headings = [
        "plan",
        "pruned\nblocks",
        ">held-out\naccuracy",
        ">\nimages/s",
        ">\nspeed",
        ">tokens\nscanned",
        ">\nnodes",
        ">parity\nerror",
    ]
    agreement = min(result.agreement for result in results)
    show(
        table(f"{MODEL} on handwritten digits, in ONNX Runtime, batch {BATCH}", headings, rows),
        "",
        f"With every plan, bundle and PyTorch agree on at least {agreement:.2%} of the held-out digits.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m quartermap_deploy.demo",
        description="Compile the trained digits model with and without QuarterMap, prove parity, and compare accuracy "
        "on held-out digits and speed. Takes one to three minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the bundles and results.json"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    options = parser.parse_args(arguments)
    progress = TerminalProgress() if sys.stderr.isatty() else LineProgress(sys.stderr)
    try:
        results = run(options.out, options.repeats, progress)
        write_results(options.out / "results.json", results)
        show_results(results)
        check(results)
    except QuartermapError as error:
        message("error", str(error))
        return 2
    show(
        f"Bundles and results.json are in {options.out}; look into one with: "
        f"{command('quartermap', 'inspect', options.out / 'k3')}"
    )
    return 0


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write what the table shows as JSON."""
    from quartermap_deploy.bundle import write_json

    values: dict[str, Any] = {
        "model": MODEL,
        "batch": BATCH,
        "results": [dataclasses.asdict(result) for result in results],
    }
    write_json(path, values)


if __name__ == "__main__":
    sys.exit(main())
