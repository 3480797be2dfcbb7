"""What evaluating costs beside running the model: `evaluate` against a bare loop over prepared batches.

    python benchmarks/evaluation_overhead.py
    python benchmarks/evaluation_overhead.py --source bundles/tiny --images folder/of/photographs

Both run the same model on the same images, in turns in one process; the bare loop has its batches in memory, while
`evaluate` reads, prepares, counts and writes its state. It should take less than 1.10 times as long at batch 32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from quartermap_deploy.bench import interleave
from quartermap_deploy.cli.progress_display import LineProgress
from quartermap_deploy.evaluation.accuracy import evaluate
from quartermap_deploy.evaluation.batches import batches
from quartermap_deploy.evaluation.formats import open_dataset
from quartermap_deploy.evaluation.sessions import runner_for


def main() -> None:
    """Time both and print the ratio."""
    options = parse_arguments()
    progress = LineProgress(sys.stderr)
    runner = runner_for(options.source, options.target, progress=progress)
    dataset = open_dataset(options.images, "digits" if options.images is None else "imagefolder")
    dataset = dataset.subset(range(len(dataset) // options.batch * options.batch)[: options.limit])
    prepared = [part.images for part in batches(dataset, runner.preprocessing, options.batch)]

    def bare() -> None:
        for images in prepared:
            runner.run(images)

    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.json"

        def evaluated() -> None:
            state.unlink(missing_ok=True)
            evaluate(runner.run, dataset, runner.preprocessing, batch=options.batch, checkpoint=state)

        timings = interleave({"bare": bare, "evaluate": evaluated}, options.repeats, 1, progress)
    ratio = timings["evaluate"].ratio(timings["bare"])
    low, high = timings["evaluate"].ratio_spread(timings["bare"])
    for name, timing in timings.items():
        print(f"{name:9} {timing.median:7.3f} s, {len(dataset) / timing.median:8.1f} images/s")
    print(
        f"evaluate / bare: {ratio:.3f} [{low:.3f} – {high:.3f}], {len(dataset)} images, batch {options.batch}"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time the evaluation against a bare loop.")
    parser.add_argument("--source", default="vmamba_digits", help="bundle, recipe or model")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--images", type=Path, help="folder of class folders (default: the held-out digits)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, help="images (default: all that fill a batch)")
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
