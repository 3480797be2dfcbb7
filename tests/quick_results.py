"""Real results of the measuring commands, with as little measured as they allow, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path

from made_once import made_once
from measuring import MODEL, call

FEW = ("--limit", "20", "--repeats", "1", "--target", "torch")
"""In PyTorch nothing has to be exported first."""

COMMANDS: dict[str, tuple[str, ...]] = {
    "compare": ("compare", MODEL, "--batch", "1", "2", *FEW),
    "ablate": ("ablate", MODEL, "--groups", "every,stage,upsample", "--batch", "2", *FEW),
    "tune": (
        *("tune", MODEL, "--budget", "5%", "--measure", "flops", "--stride", "2"),
        *("--calibration", "128", "--verification", "60", "--evaluations", "24"),
    ),
}


def quick_results() -> dict[str, Path]:
    """Return results of compare, ablate and tune, by command; they are measured once in a test run."""

    def measure(folder: Path) -> None:
        draft = folder.with_suffix(".draft")
        draft.mkdir()
        for name, command in COMMANDS.items():
            out = () if name != "tune" else ("-o", draft / "tuned.toml")
            outcome = call(*command, *out, "--json", "--quiet")
            assert outcome.code == 0, outcome.err
            (draft / f"quick_{name}.json").write_text(outcome.out, encoding="utf-8")
        draft.rename(folder)

    folder = made_once("quick_results", measure)
    return {name: folder / f"quick_{name}.json" for name in COMMANDS}
