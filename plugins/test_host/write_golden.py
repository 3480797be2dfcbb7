"""Write golden cases for the test host: inputs as they lie in memory, and y by the float64 definition.

    python plugins/test_host/write_golden.py FOLDER

Each case is a file: one line of text (name, element type, softplus, tolerance, batch, d_inner, H, W, N, R, K and the
directions), then x, dt, B, C, A, D, dt_bias and, if R > 0, dt_weight, then y in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_2d_definition

# Of the largest value, at block level. Inputs are rounded before the definition sees them, so these are the errors of
# the arithmetic (float32 inside) and of rounding y.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a scan.

    Attributes:
        batch: batch size.
        d_inner: channels.
        height: H.
        width: W.
        d_state: N.
        dt_rank: R; 0 for a full time-step map.
        directions: the scan orders.
        softplus: whether softplus is applied.
    """

    batch: int
    d_inner: int
    height: int
    width: int
    d_state: int = 1
    dt_rank: int = 0
    directions: Sequence[str] = DIRECTIONS
    softplus: bool = True

    @property
    def name(self) -> str:
        """Say the sizes in one word."""
        kind = f"rank{self.dt_rank}" if self.dt_rank else "full"
        shape = "x".join(map(str, (self.batch, self.d_inner, self.height, self.width)))
        return f"{shape}-state{self.d_state}-{kind}-{len(self.directions)}"


SMALL = (
    Sizes(1, 1, 1, 1),
    Sizes(2, 3, 1, 9, dt_rank=2),
    Sizes(2, 3, 9, 1, dt_rank=2),
    Sizes(2, 5, 7, 7, dt_rank=6),
    Sizes(1, 17, 14, 14, dt_rank=9),
    Sizes(1, 6, 13, 17, d_state=16, dt_rank=3),
    Sizes(1, 4, 13, 5, d_state=5),
    Sizes(1, 3, 31, 29),
    Sizes(1, 2, 56, 56, dt_rank=8),
    Sizes(1, 32, 14, 14, dt_rank=24),
    Sizes(1, 1, 3, 400, dt_rank=1),
    Sizes(1, 1, 400, 3, dt_rank=1),
    Sizes(1, 3, 9, 11, dt_rank=2, directions=("column_reverse", "row"), softplus=False),
    Sizes(1, 3, 9, 11, dt_rank=2, directions=DIRECTIONS * 2),
)
LARGE = (
    Sizes(1, 2, 128, 128, dt_rank=6),
    Sizes(1, 1, 200, 211, dt_rank=2),
    Sizes(3, 96, 56, 56, dt_rank=6),
    Sizes(2, 2048, 7, 7, dt_rank=64),
)


def tensors(sizes: Sizes, element_type: str) -> list[Tensor]:
    """Return x, dt, B, C, A, D, dt_bias and perhaps dt_weight: time steps and decays as in trained models."""
    generator = torch.Generator().manual_seed(sum(sizes.name.encode()))
    count, dtype = len(sizes.directions), getattr(torch, element_type)
    rows = sizes.dt_rank or sizes.d_inner

    def maps(channels: int) -> Tensor:
        return torch.randn(sizes.batch, channels, sizes.height, sizes.width, generator=generator).to(dtype)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(count * sizes.d_inner, *shape, generator=generator)

    bias = parameter() - 3 if sizes.softplus else parameter().abs() * 0.1
    dt = maps(count * rows)
    found = [
        maps(sizes.d_inner),
        dt if sizes.softplus else (dt.abs() * 0.1).to(dtype),
        maps(count * sizes.d_state),
        maps(count * sizes.d_state),
        -torch.exp(parameter(sizes.d_state)),
        parameter(),
        bias,
    ]
    if sizes.dt_rank:
        weight = parameter(sizes.dt_rank) * sizes.dt_rank**-0.5
        found.append((weight if sizes.softplus else weight.abs() * 0.1).to(dtype))
    return found


def raw(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor; NumPy has no bfloat16."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_case(folder: Path, sizes: Sizes, element_type: str) -> str:
    """Write one case and return the name of its file."""
    inputs = tensors(sizes, element_type)
    x, dt, B, C, A, D, bias, *weight = (tensor.double() for tensor in inputs)
    y = selective_scan_2d_definition(
        x, dt, B, C, A, D, bias, weight[0] if weight else None, sizes.directions, sizes.softplus
    )
    header = [sizes.name, element_type, int(sizes.softplus), TOLERANCES[element_type], *x.shape, A.shape[1]]
    header += [sizes.dt_rank, len(sizes.directions), ",".join(sizes.directions)]
    file = f"{sizes.name}-{element_type}.bin"
    with (folder / file).open("wb") as stream:
        stream.write((" ".join(map(str, header)) + "\n").encode())
        for tensor in [*inputs, y]:
            stream.write(raw(tensor))
    return file


def write(folder: Path, large: bool) -> Iterator[str]:
    """Write all cases and yield the names of their files."""
    for sizes in SMALL + (LARGE if large else ()):
        for element_type in TOLERANCES:
            yield write_case(folder, sizes, element_type)


def main() -> None:
    """Write the cases and their index."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument(
        "--large", action="store_true", help="large maps too, for a GPU (default: small ones alone)"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    files = list(write(options.folder, options.large))
    (options.folder / "index.txt").write_text("\n".join(files) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
