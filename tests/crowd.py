"""Many clients at once, who ask in every way there is and know what the answers have to be."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as tritongrpc
import tritonclient.http as tritonhttp
from served import IMAGE_MODEL, MODEL, Array, Served, ask, close, digits, file_of, files, prepared, tensor
from tritonclient.utils import InferenceServerException

import quartermap_deploy as qm


class Crowd:
    """Clients that send requests of all kinds, each with an answer of its own, until they are told to stop."""

    def __init__(self, server: Served, bundle: qm.Bundle, clients: int, seed: int = 0) -> None:
        pictures, self.labels = digits(64)
        self.images = prepared(pictures)
        self.files = [file_of(picture) for picture in pictures]
        self.logits = np.concatenate(
            [bundle.run(self.images[place : place + 8]) for place in range(0, 64, 8)]
        )
        self.server, self.clients, self.seed = server, clients, seed
        self.stop = threading.Event()
        self.left = 0
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.by_model: Counter[str] = Counter()

    def run(self, requests: int) -> None:
        """Send so many requests, or fewer if told to stop."""
        self.left = requests
        with ThreadPoolExecutor(self.clients) as pool:
            list(pool.map(self._client, range(self.clients)))

    def _next(self) -> bool:
        with self._lock:
            self.left -= 1
            return self.left >= 0 and not self.stop.is_set()

    def _client(self, number: int) -> None:
        order = random.Random(1000 * self.seed + number)
        with (
            tritonhttp.InferenceServerClient(self.server.http, network_timeout=120) as over_http,
            tritongrpc.InferenceServerClient(self.server.grpc) as over_grpc,
        ):
            while self._next():
                kind = order.choice(["http", "http json", "grpc", "image", "classify"])
                # JSON is ten times the size, and images have to be decoded.
                count = 1 if kind in ("http json", "classify") else order.randint(1, 4)
                chosen = order.sample(range(64), count)
                try:
                    right = self._ask(kind, chosen, over_http, over_grpc)
                except (InferenceServerException, OSError, http.client.HTTPException) as error:
                    self._note(_kind(error))
                    if self.stop.is_set() or self.server.process.poll() is not None:
                        return
                    if not str(_kind(error)).startswith("refused"):
                        self.stop.wait(0.05)
                    continue
                except Exception as error:  # geventhttpclient has errors of its own for closed connections
                    self._note(f"closed: {type(error).__name__}")
                    continue
                self._note("answered", MODEL if kind in ("http", "http json", "grpc") else IMAGE_MODEL)
                if not right:
                    self.wrong.append(f"{kind} {chosen}")

    def _note(self, outcome: str, model: str = "") -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            if model:
                self.by_model[model] += 1

    def _ask(self, kind: str, chosen: list[int], over_http: Any, over_grpc: Any) -> bool:
        """Send one request; returns whether its answer is the right one."""
        if kind == "classify":
            status, _, body = ask(
                self.server, "POST", "/classify?top=1", self.files[chosen[0]], Content_Type="image/png"
            )
            if status != 200:
                raise InferenceServerException(msg=body.decode(), status=str(status))
            return bool(
                json.loads(body)["images"][0]["classes"][0]["class"] == self.logits[chosen[0]].argmax()
            )
        if kind == "image":
            contents = files(*(self.files[place] for place in chosen))
            answer = over_http.infer(IMAGE_MODEL, [tensor(tritonhttp, "image", contents)])
            expected = np.exp(self.logits[chosen].astype(np.float64))
            expected /= expected.sum(axis=1, keepdims=True)
            found: Array = answer.as_numpy("probabilities")
            return found.shape == expected.shape and bool(np.abs(found - expected).max() < 1e-4)
        module, client = (tritongrpc, over_grpc) if kind == "grpc" else (tritonhttp, over_http)
        settings = {"binary_data": kind == "http"} if module is tritonhttp else {}
        identity = str(random.random())
        inputs = [tensor(module, "images", self.images[chosen], **settings)]
        answer = client.infer(MODEL, inputs, request_id=identity)
        response = answer.get_response()
        found_identity = response["id"] if isinstance(response, dict) else response.id
        return found_identity == identity and close(answer.as_numpy("logits"), self.logits[chosen])


def _kind(error: Exception) -> str:
    """What a client sees of a refusal, and of a connection that is not there."""
    if isinstance(error, InferenceServerException):
        status = str(error.status())
        text = str(error.message())
        if status == "503" or ("UNAVAILABLE" in status and ("server is" in text or "wait already" in text)):
            return "refused"
        if "UNAVAILABLE" in status or "CANCELLED" in status:
            return "not taken on"
        return f"error {status}: {text[:100]}"
    return f"closed: {type(error).__name__}"


def resident(process: int) -> int:
    """Bytes of memory that a process has; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
