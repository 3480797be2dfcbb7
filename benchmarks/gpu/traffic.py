"""Count the bytes that a scan moves at each stage of VMamba-T and VMamba-B, ours and the public path: no GPU, no torch.

    python benchmarks/gpu/traffic.py [--json FILE] [--bandwidth TB/S] [--instructions 10^12/S]

Both are floors: every step reads its inputs and writes its outputs once, in float16, parameters included. Ours is one
step. The public path has four: cross-scan, which unrolls the map into four sequences; the projection of the time step;
the selective scan of these sequences; cross-merge, which adds them up. The projection of x to dt, B and C is left out
of both; the public code reads the four sequences there, ours the map.

The second table is what three limits of a GPU would leave of that at batch 128: its memory bandwidth, how many
instructions it issues, and how many special functions its units compute, by the counts of instructions.py for each
position, channel and direction. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DIRECTIONS = 4
BATCHES = (1, 8, 128)
HALF, SINGLE = 2, 4
"""Bytes of float16, which maps and the projection's weight have, and of float32, which the other parameters have."""

H100_BANDWIDTH = 3.35
"""TB/s, of the SXM card with HBM3."""
H100_INSTRUCTIONS = 29.6
"""10^12 instructions of one lane each second: 132 multiprocessors, 128 lanes, 1.755 GHz."""
SPECIAL_SHARE = 16 / 128
"""Lanes of a multiprocessor that compute a special function in a clock, of those for which it issues an instruction."""
LOW_RANK, PER_RANK = 95.0, 2.0
"""Instructions of the general kernel for each position, channel and direction, and for each rank of the time step
beside that. Counted in the machine code for compute capability 9.0 (nvcc 13.0, float16, four channels a thread) along
the path of the plans for batch 128, with staging, reading x and writing y; by hand, to about 10 %."""
COUNTS = Path(__file__).with_name("instructions.json")
"""What instructions.py counted of the kernels on tensor cores."""


@dataclass(frozen=True)
class Stage:
    """The scan of one stage, for one image.

    Attributes:
        d_inner: channels.
        side: height and width of the map.
        rank: R of the time step.
        states: N.
    """

    d_inner: int
    side: int
    rank: int
    states: int = 1

    @property
    def positions(self) -> int:
        """Positions of the map."""
        return self.side**2

    @property
    def parameters(self) -> int:
        """Bytes of A, D, the bias and the weight of the time step."""
        wide = DIRECTIONS * self.d_inner
        return wide * ((self.states + 2) * SINGLE + self.rank * HALF)


STAGES = {
    "VMamba-T (s1l8)": (Stage(96, 56, 6), Stage(192, 28, 12), Stage(384, 14, 24), Stage(768, 7, 48)),
    "VMamba-B (s2l15)": (Stage(256, 56, 8), Stage(512, 28, 16), Stage(1024, 14, 32), Stage(2048, 7, 64)),
}
"""At 224 × 224."""


def fused_bytes(stage: Stage, batch: int) -> int:
    """Return the bytes of our kernel: x and y, the low-rank time step, B and C."""
    maps = 2 * stage.d_inner + DIRECTIONS * (stage.rank + 2 * stage.states)
    return batch * stage.positions * maps * HALF + stage.parameters


def public_steps(stage: Stage, batch: int) -> dict[str, int]:
    """Return the bytes of each step of the public path."""
    wide = DIRECTIONS * stage.d_inner
    maps = {
        "cross-scan": stage.d_inner + wide,
        "projection": DIRECTIONS * stage.rank + wide,
        "selective scan": 3 * wide + DIRECTIONS * 2 * stage.states,
        "cross-merge": wide + stage.d_inner,
    }
    steps = {name: batch * stage.positions * count * HALF for name, count in maps.items()}
    weight = wide * stage.rank * HALF
    steps["projection"] += weight
    steps["selective scan"] += stage.parameters - weight
    return steps


def public_bytes(stage: Stage, batch: int) -> int:
    """Return the bytes of the public path."""
    return sum(public_steps(stage, batch).values())


@dataclass(frozen=True)
class Limits:
    """What a GPU's three limits leave of one launch.

    Attributes:
        by_bytes: microseconds, if only the bytes counted.
        by_instructions: microseconds, if only the instructions did.
        by_special_functions: microseconds, if only the special functions did.
        public_by_bytes: microseconds of the public path, if only its bytes counted.
        share: of the bandwidth, that is left when all count.
        ratio: time of the public path, by its bytes alone, over ours.
        instructions: of our kernel for each position, channel and direction.
        special_functions: of these.
        general: instructions of the general kernel.
    """

    by_bytes: float
    by_instructions: float
    by_special_functions: float
    public_by_bytes: float
    share: float
    ratio: float
    instructions: float
    special_functions: float
    general: float


def counted(stage: Stage, architecture: str = "90") -> tuple[float, float]:
    """Return instructions and special functions of the resident kernel of a stage, in float16, for each element."""
    kernels: list[dict[str, Any]] = json.loads(COUNTS.read_text(encoding="utf-8"))["kernels"]
    for row in kernels:
        if (row["kernel"], row["type"], row["architecture"]) == ("resident", "float16", architecture):
            geometry = row["geometry"]
            if (geometry["height"], geometry["width"], geometry["ranks"]) == (
                stage.side,
                stage.side,
                stage.rank,
            ):
                return row["counts"]["instructions"], row["counts"]["special functions"]
    raise ValueError(f"{COUNTS.name} has no counts of {stage}")


def limits(stage: Stage, batch: int, bandwidth: float, instructions: float) -> Limits:
    """Compare the limits.

    Args:
        stage: the scan.
        batch: images.
        bandwidth: of the memory, in TB/s.
        instructions: of one lane each second, in 10^12.
    """
    work = batch * stage.positions * stage.d_inner * DIRECTIONS / instructions * 1e-6
    needed, special = counted(stage)
    by_bytes = fused_bytes(stage, batch) / bandwidth * 1e-6
    public = public_bytes(stage, batch) / bandwidth * 1e-6
    longest = max(by_bytes, work * needed, work * special / SPECIAL_SHARE)
    return Limits(
        by_bytes=by_bytes,
        by_instructions=work * needed,
        by_special_functions=work * special / SPECIAL_SHARE,
        public_by_bytes=public,
        share=by_bytes / longest,
        ratio=public / longest,
        instructions=needed,
        special_functions=special,
        general=LOW_RANK + PER_RANK * stage.rank,
    )


def count(bandwidth: float, instructions: float) -> list[dict[str, Any]]:
    """Return everything, a row for each stage."""
    return [
        {
            "model": model,
            "stage": number,
            **asdict(stage),
            "bytes": {
                str(batch): {"fused": fused_bytes(stage, batch), "public": public_steps(stage, batch)}
                for batch in BATCHES
            },
            "ratio": {
                str(batch): public_bytes(stage, batch) / fused_bytes(stage, batch) for batch in BATCHES
            },
            "limits": asdict(limits(stage, BATCHES[-1], bandwidth, instructions)),
        }
        for model, stages in STAGES.items()
        for number, stage in enumerate(stages, start=1)
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the two tables of docs/performance.md."""
    largest = BATCHES[-1]
    heads = [f"MB, ours / public, batch {batch}" for batch in BATCHES]
    lines = [_line(["stage", "map", "R", *heads, "public / ours"]), _line(["---"] * 7)]
    for row in rows:
        sizes = []
        for batch in BATCHES:
            found = row["bytes"][str(batch)]
            sizes.append(f"{_mb(found['fused'])} / {_mb(sum(found['public'].values()))}")
        ratios = " / ".join(f"{row['ratio'][str(batch)]:.1f}" for batch in BATCHES)
        lines.append(_line([*_names(row), *sizes, ratios]))
    heads = [
        "stage",
        "instructions",
        "general kernel",
        f"µs by bytes, batch {largest}",
        "by instructions",
        "by special functions",
        "share of bandwidth",
        "public by bytes, µs",
        "public / ours",
    ]
    lines += ["", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        found = row["limits"]
        times = [f"{found[name]:.0f}" for name in ("by_bytes", "by_instructions", "by_special_functions")]
        cells = [f"{found['instructions']:.1f}", f"{found['general']:.0f}", *times, f"{found['share']:.0%}"]
        lines.append(
            _line([_names(row)[0], *cells, f"{found['public_by_bytes']:.0f}", f"{found['ratio']:.1f}"])
        )
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"|{'|'.join(cells)}|" if set(cells) == {"---"} else f"| {' | '.join(cells)} |"


def _names(row: dict[str, Any]) -> list[str]:
    side = row["side"]
    return [f"{row['model']} {row['stage']}", f"{row['d_inner']} × {side} × {side}", str(row["rank"])]


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}" if size < 10e6 else f"{size / 1e6:.0f}"


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=H100_BANDWIDTH,
        metavar="TB/S",
        help="of the GPU's memory (default: %(default)s, an H100)",
    )
    parser.add_argument(
        "--instructions",
        type=float,
        default=H100_INSTRUCTIONS,
        metavar="10^12/S",
        help="that the GPU issues, of one lane each (default: %(default)s, an H100)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts here")
    options = parser.parse_args()
    if options.bandwidth <= 0 or options.instructions <= 0:
        parser.error("--bandwidth and --instructions have to be positive")
    rows = count(options.bandwidth, options.instructions)
    print(markdown(rows))
    if options.json is not None:
        gpu = {"bandwidth": options.bandwidth, "instructions": options.instructions}
        options.json.write_text(json.dumps({"measured": False, "gpu": gpu, "stages": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
