"""`quartermap serve` beside a real Triton on the same bundle, in turns.

    make triton
    python benchmarks/serving_triton.py bundles/digits_k3 --json results.json

Triton's ONNX Runtime backend is stood in for by one of ours in Python (docs/triton.md): its own is faster by what that
costs. Both run the portable form of the scans. Clients, servers and model share the cores of this machine. Every load
is given to each server in turns, and what counts is the median of the rounds' ratios. The processor time of a server
for an image, its model included, depends less on what else the machine does than the images a second.

    serve            as it is started by default
    Triton           as `quartermap deploy triton` writes it by default
    Triton, 2 × 1    with --instances 2 --threads 1
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from serving import FEW, MANY, Load

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from real_triton import running
from served import digits, file_of, serving

import quartermap_deploy as qm
from quartermap_deploy.deploy.triton import TritonOptions, deploy_triton
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
from quartermap_deploy.validation.inputs import real_images

OURS = "serve"


class Files(Load):
    """Clients that send one image file again and again."""

    def __init__(self, server: Any, bundle: qm.Bundle, file: bytes, clients: int) -> None:
        super().__init__(server, bundle, real_images(bundle.preprocessing, count=1), clients)
        entry = {
            "name": "image",
            "shape": [1, 1],
            "datatype": "BYTES",
            "parameters": {"binary_data_size": 4 + len(file)},
        }
        head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
        self.body = head + len(file).to_bytes(4, "little") + file
        self.headers = {"Inference-Header-Content-Length": str(len(head))}
        self.path = self.path.replace("/infer", "_image/infer")


def processor_seconds(process: int) -> float:
    """Processor time of a process and all that it started, in seconds."""
    parents: dict[int, list[int]] = {}
    times: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        number = int(path.parent.name)
        parents.setdefault(int(fields[1]), []).append(number)
        times[number] = int(fields[11]) + int(fields[12])
    total, family = 0, [process]
    while family:
        one = family.pop()
        total += times.get(one, 0)
        family += parents.get(one, [])
    return total / os.sysconf("SC_CLK_TCK")


def check(load: Load, expected: Any) -> None:
    """Check one answer; nothing is timed that is not right."""
    import numpy as np

    connection = http.client.HTTPConnection(load.server.http, timeout=600)
    connection.request("POST", load.path, load.body, load.headers)
    answer = connection.getresponse()
    body = answer.read()
    values = np.frombuffer(body[int(answer.headers["Inference-Header-Content-Length"]) :], np.float32)
    if not np.abs(values - expected.reshape(-1)).max() <= 1e-5 * np.abs(expected).max():
        raise RuntimeError(f"{load.path} of {load.server.http} gives other logits than the session")


def measure(bundle: qm.Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Give every load to every server in turns; returns the rounds."""
    images = real_images(bundle.preprocessing, count=options.batch)
    expected = OnnxRuntimeSession(bundle.model_path, 1).run(images)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # No native operator, which Triton has not.
        os.environ["QUARTERMAP_HOME"] = str(work / "home")
        servers: dict[str, Any] = {OURS: stack.enter_context(serving(bundle.path, threads=0))}
        for name, settings in (("Triton", {}), ("Triton, 2 × 1", {"instances": 2, "threads": 1})):
            folder = work / f"triton{len(servers)}"
            deploy_triton(bundle.path, folder / "repository", TritonOptions(**settings))
            servers[name] = stack.enter_context(running([folder / "repository"], folder))
        file = file_of(digits(1)[0][0])
        loads: dict[str, dict[str, Load]] = {
            name: {
                "one client": Load(server, bundle, images[:1], 1),
                f"{MANY} clients": Load(server, bundle, images[:1], MANY),
                f"{FEW} clients, batches of {options.batch}": Load(server, bundle, images, FEW),
                f"{MANY} clients, files": Files(server, bundle, file, MANY),
            }
            for name, server in servers.items()
        }
        for name in servers:
            check(loads[name]["one client"], expected[:1])
        rounds: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for round_number in range(options.rounds + 1):
            for label in loads[OURS]:
                for name, server in servers.items():
                    before = processor_seconds(server.process.pid)
                    load = loads[name][label]
                    load.latencies.clear()
                    rate = load.run(options.seconds if round_number else 1.0)
                    spent = processor_seconds(server.process.pid) - before
                    count = len(load.latencies) * load.images
                    if round_number:  # the first one warms up
                        rounds.setdefault(label, {}).setdefault(name, []).append((rate, 1000 * spent / count))
            print(f"round {round_number} of {options.rounds}", file=sys.stderr, flush=True)
    return rounds


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle of vmamba_digits with a dynamic batch")
    parser.add_argument("--batch", type=int, default=8, help="images of a full batch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rounds = measure(qm.load_bundle(options.bundle), options)
    table = Table(
        "load", "server", "images/s", "ms of processor an image", "serve to this: images/s", "processor"
    )
    for label, servers in rounds.items():
        for name, found in servers.items():
            turns = list(zip(servers[OURS], found, strict=True))
            ratios = [
                statistics.median(ours[part] / theirs[part] for ours, theirs in turns) for part in (0, 1)
            ]
            rate, cost = (statistics.median(part) for part in zip(*found, strict=True))
            table.add_row(label, name, f"{rate:.0f}", f"{cost:.2f}", *(f"{ratio:.2f}" for ratio in ratios))
    Console(highlight=False, width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=2) + "\n")


if __name__ == "__main__":
    main()
