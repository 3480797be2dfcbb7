"""What six hostile clients of /classify cost another client, and how much memory the server takes under them.

    python benchmarks/hostile_clients.py bundles/digits_k3
    python benchmarks/hostile_clients.py bundles/digits_k3 --attack "form: empty parts" --rounds 9 --json results.json

For each attack of `tests/hostile.py`, and for all of them in turns, a server of its own is asked to classify one digit
again and again, alone and beside six clients that attack it, in turns. The delay is the median under attack over the
median alone, of all rounds; the memory is the peak of the server's process over what it had before. Server, hostile
clients and the one that is measured have a process each and share the machine's cores.

A plain image is among the attacks for comparison: what six clients cost that ask for nothing but an answer each. What
a file holds beside its pixels is stepped over, so that files with much of it cost as much as that and no more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hostile import CLIENTS, Hostile, attacks, classify_seconds, peak_memory
from served import digits, file_of, serving

from quartermap_deploy.targets.onnxruntime.threads import default_threads

ALL = "all in turns"


def measure(bundle: Path, attack: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one attack, or all in turns."""
    image = file_of(digits(1)[0][0])
    alone: list[float] = []
    under: list[float] = []
    with serving(bundle, threads=options.threads) as server:
        for _ in range(20):
            classify_seconds(server, image)
        before = peak_memory(server.process.pid)
        with Hostile(server, *([] if attack == ALL else [attack])) as hostile:
            for _ in range(options.rounds):
                alone += _during(options.seconds, server, image)
                with hostile.at_work():
                    time.sleep(0.5)
                    under += _during(options.seconds, server, image)
                # What they are at comes to its end.
                time.sleep(2)
        memory = peak_memory(server.process.pid) - before
    return {
        "alone_ms": 1000 * statistics.median(alone),
        "under_attack_ms": 1000 * statistics.median(under),
        "delay": statistics.median(under) / statistics.median(alone),
        "memory_mb": memory / 1e6,
        "answers": dict(hostile.answers),
    }


def _during(seconds: float, server: Any, image: bytes) -> list[float]:
    end, found = time.perf_counter() + seconds, []
    while time.perf_counter() < end:
        found.append(classify_seconds(server, image))
        time.sleep(0.01)
    return found


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle of vmamba_digits")
    parser.add_argument("--attack", action="append", help="name of one, can be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the server (default: all cores)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.threads = options.threads or default_threads()
    table = Table("attack", "alone, ms", "under attack, ms", "delay", "memory over idle, MB", "answers")
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "clients": CLIENTS}
    for attack in options.attack or [ALL, *attacks()]:
        found = results[attack] = measure(options.bundle, attack, options)
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(found["answers"].items()))
        figures = (f"{found[key]:.1f}" for key in ("alone_ms", "under_attack_ms", "delay", "memory_mb"))
        table.add_row(attack, *figures, answers)
        print(attack, found, flush=True)
    Console(highlight=False, width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
