"""The server against ONNX Runtime called directly, with and without batches, and under mixed load.

    python benchmarks/serving.py bundles/digits_k3 --json results.json
    python benchmarks/serving.py bundles/tiny --batch 4 --requests 0
    python benchmarks/serving.py bundles/digits_k3 --rounds 0 --requests 10000 --clients 32

Everything is on the loopback of this machine, so that clients, server and model share its cores. What is compared runs
in turns, each for some seconds, and is stated as the median of the rounds' ratios:

    direct          the session, called with a full batch again and again in this process
    full batches    the server, asked by a few clients for full batches
    single images   the server, asked by many clients for single images, which it puts together
    no batches      the same with --max-batch 1

The clients of these send the same bytes again and again, so that they cost as little as clients can. Mixed requests
come from Triton's own clients over HTTP and gRPC, with tensors as JSON and as bytes, and with image files; each answer
is compared with the one that it has to be. They need a bundle of vmamba_digits. Then the same load is cut off by
SIGTERM.
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from served import Served, serving

import quartermap_deploy as qm
from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
from quartermap_deploy.targets.onnxruntime.threads import default_threads
from quartermap_deploy.validation.inputs import real_images

FEW, MANY = 4, 16
"""Clients that send full batches, and clients that send single images."""


class Load:
    """Clients that send one request again and again."""

    def __init__(self, server: Served, bundle: qm.Bundle, images: Any, clients: int) -> None:
        model, name = bundle.manifest["model"]["name"], bundle.inputs[0].name
        entry = {
            "name": name,
            "shape": list(images.shape),
            "datatype": "FP32",
            "parameters": {"binary_data_size": images.nbytes},
        }
        request = {"inputs": [entry], "parameters": {"binary_data_output": True}}
        head = json.dumps(request).encode()
        self.body = head + images.tobytes()
        self.headers = {"Inference-Header-Content-Length": str(len(head))}
        self.path = f"/v2/models/{model}/infer"
        self.server, self.images, self.clients = server, len(images), clients
        self.latencies: list[float] = []

    def run(self, seconds: float) -> float:
        """Send requests for some seconds; returns images answered in a second."""
        end = time.perf_counter() + seconds
        found: list[list[float]] = [[] for _ in range(self.clients)]
        threads = [threading.Thread(target=self._client, args=(end, latencies)) for latencies in found]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - start
        latencies = [latency for one in found for latency in one]
        self.latencies += latencies
        return len(latencies) * self.images / elapsed

    def _client(self, end: float, latencies: list[float]) -> None:
        connection = http.client.HTTPConnection(self.server.http, timeout=600)
        while time.perf_counter() < end:
            start = time.perf_counter()
            connection.request("POST", self.path, self.body, self.headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {body[:200]!r}")
            latencies.append(time.perf_counter() - start)
        connection.close()

    def percentiles(self) -> dict[str, float]:
        """Return the latencies' percentiles in milliseconds, by nearest rank over every request."""
        ordered = sorted(self.latencies)
        return {
            f"p{share}": 1000 * ordered[min(len(ordered) - 1, len(ordered) * share // 100)]
            for share in (50, 90, 99)
        }


def throughput(bundle: qm.Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the server with the session, and batches with none, in turns."""
    if bundle.preprocessing is None or len(bundle.inputs) != 1:
        raise SystemExit(f"{bundle.path} takes no images; give a bundle with one input for images")
    images = real_images(bundle.preprocessing, count=options.batch)
    session = OnnxRuntimeSession(bundle.model_path, options.threads)
    expected = session.run(images)
    arguments = ["--max-delay-ms", options.max_delay_ms, "--queue", 4 * MANY * options.batch]
    with (
        serving(bundle.path, "--max-batch", options.batch, *arguments, threads=options.threads) as server,
        serving(bundle.path, "--max-batch", 1, *arguments, threads=options.threads) as single,
    ):
        name = server.until("ready") and bundle.manifest["model"]["name"]
        check(server, bundle, images, expected)
        loads = {
            "full batches": Load(server, bundle, images, FEW),
            "single images": Load(server, bundle, images[:1], MANY),
            "no batches": Load(single, bundle, images[:1], MANY),
        }
        rates: dict[str, list[float]] = {"direct": [], **{name: [] for name in loads}}
        for round_number in range(options.rounds + 1):
            found = {"direct": direct(session, images, options.seconds)}
            for label, load in loads.items():
                time.sleep(0.5)
                found[label] = load.run(options.seconds)
            if round_number == 0:  # to warm up
                for load in loads.values():
                    load.latencies.clear()
                continue
            for label, rate in found.items():
                rates[label].append(rate)
            print(
                f"round {round_number}: { ({label: round(rate, 1) for label, rate in found.items()}) }",
                flush=True,
            )
        stats = json.loads(fetch(server, f"/v2/models/{name}/stats"))["model_stats"][0]

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    return {
        "batch": options.batch,
        "threads": options.threads,
        "images_per_second": {label: statistics.median(values) for label, values in rates.items()},
        "full batches / direct": ratio("full batches", "direct"),
        "single images / direct": ratio("single images", "direct"),
        "single images / no batches": ratio("single images", "no batches"),
        "milliseconds": {label: load.percentiles() for label, load in loads.items()},
        "batches": {entry["batch_size"]: entry["compute_infer"]["count"] for entry in stats["batch_stats"]},
    }


def direct(session: OnnxRuntimeSession, images: Any, seconds: float) -> float:
    """Call the session for some seconds; returns images in a second."""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        session.run(images)
        count += len(images)
    return count / elapsed


def check(server: Served, bundle: qm.Bundle, images: Any, expected: Any) -> None:
    """Check one answer of the server; nothing is timed that is not right."""
    load = Load(server, bundle, images, 1)
    connection = http.client.HTTPConnection(server.http, timeout=600)
    connection.request("POST", load.path, load.body, load.headers)
    answer = connection.getresponse()
    body = answer.read()
    length = int(answer.headers["Inference-Header-Content-Length"])
    logits = np.frombuffer(body[length:], np.float32).reshape(expected.shape)
    if not np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max():
        raise RuntimeError("the server's logits are not those of the session")


def fetch(server: Served, path: str) -> bytes:
    """Return what the server has under a path."""
    connection = http.client.HTTPConnection(server.http, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read()


def mixed(bundle: qm.Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Send mixed requests, watch the memory, and check every answer."""
    from crowd import Crowd, resident

    memory: list[int] = []
    over = threading.Event()
    with serving(bundle.path, "--queue", 1024, threads=options.threads) as server:

        def watch() -> None:
            while not over.wait(0.25):
                memory.append(resident(server.process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        crowd = Crowd(server, bundle, options.clients)
        start = time.perf_counter()
        crowd.run(options.requests)
        elapsed = time.perf_counter() - start
        over.set()
        watcher.join()
        stats = json.loads(fetch(server, "/v2/models/stats"))["model_stats"]
    quarter = max(1, len(memory) // 4)
    third, last = memory[-2 * quarter : -quarter], memory[-quarter:]
    return {
        "requests": options.requests,
        "clients": options.clients,
        "seconds": elapsed,
        "outcomes": dict(crowd.outcomes),
        "wrong": len(crowd.wrong),
        "answers_counted_by_the_server": stats[0]["inference_stats"]["success"]["count"],
        "memory_mb": {"third quarter": np.mean(third) / 1e6, "last quarter": np.mean(last) / 1e6},
        "memory growth over the second half": float(np.mean(last) / np.mean(third) - 1),
    }


def cut_off(bundle: qm.Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """Send SIGTERM in the middle of mixed requests; returns what was accepted and what became of it."""
    from crowd import Crowd

    server = Served(bundle.path, "--queue", 1024, "--shutdown-timeout", 120, threads=options.threads)
    server.until("ready")
    crowd = Crowd(server, bundle, options.clients, seed=1)
    thread = threading.Thread(target=crowd.run, args=(10**9,))
    thread.start()
    time.sleep(10)
    start = time.perf_counter()
    code = server.stop(seconds=150)
    elapsed = time.perf_counter() - start
    crowd.stop.set()
    thread.join()
    (stopped,) = server.said("stopped")
    return {
        "exit code": code,
        "seconds to stop": elapsed,
        "answered, says the server": stopped["answered"],
        "lost": stopped["answered"] - crowd.outcomes["answered"] + stopped["still_open"],
        "wrong": len(crowd.wrong),
        "outcomes": dict(crowd.outcomes),
    }


def main() -> None:
    """Run what was asked for, print tables, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle with the target onnxruntime and a dynamic batch")
    parser.add_argument("--batch", type=int, default=8, help="images of a full batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the session (default: all cores)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each; 0 leaves them out (default: %(default)s)"
    )
    parser.add_argument(
        "--max-delay-ms", type=float, default=1.0, help="of the server (default: %(default)s)"
    )
    parser.add_argument(
        "--requests", type=int, default=10_000, help="mixed ones; 0 leaves them out (default: %(default)s)"
    )
    parser.add_argument("--clients", type=int, default=32, help="that send them (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.threads = options.threads or default_threads()
    bundle = qm.load_bundle(options.bundle)
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "bundle": bundle.path.name,
    }
    if options.rounds:
        results["throughput"] = throughput(bundle, options)
    if options.requests:
        results["mixed"] = mixed(bundle, options)
        results["cut off"] = cut_off(bundle, options)
    console = Console(highlight=False)
    for title, values in results.items():
        if isinstance(values, dict):
            table = Table("", "", title=title, show_header=False, title_justify="left")
            for name, value in values.items():
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else _text(value))
            console.print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
