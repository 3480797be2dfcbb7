"""Stands in for Triton's ONNX Runtime backend: a Python-based backend that runs the file with pip's ONNX Runtime.

The wheel that real Triton comes from has the core and the Python backend alone. Triton takes this file for the backend
`onnxruntime` if it lies in its folder of backends as onnxruntime/model.py. Everything that the core does with such a
model is real: reading the configuration, checking requests, joining them, warming up, instances, versions, statistics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the file that the configuration names, as NVIDIA's backend does."""
        config = json.loads(args["model_config"])
        threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value", "0")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        path = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.shapes = [tensor["dims"] for tensor in config["output"]]
        self.batched = config["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run what the core has put together, as one batch if the model takes some."""
        if self.batched:
            return self.run(requests)
        return [answer for request in requests for answer in self.run([request])]

    def run(self, requests: list[Any]) -> list[Any]:
        """Run requests as one batch."""
        parts = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.inputs
        ]
        try:
            feeds = {name: np.concatenate(part) for name, part in zip(self.inputs, parts, strict=True)}
            found = self.session.run(self.outputs, feeds)
        except Exception as error:
            # Shapes that do not go together, and what ONNX Runtime refuses.
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        if len(requests) == 1:
            return [self.answer(found)]
        ends = np.cumsum([len(values) for values in parts[0]])[:-1]
        rows = zip(*(np.split(values, ends) for values in found), strict=True)
        return [self.answer(values) for values in rows]

    def answer(self, values: Any) -> Any:
        """The outputs of one request."""
        # A number without axes gets the shape that the configuration says, as by NVIDIA's backend.
        shaped = [
            item if item.ndim else item.reshape(list(map(int, shape)))
            for item, shape in zip(values, self.shapes, strict=True)
        ]
        tensors = [pb_utils.Tensor(name, item) for name, item in zip(self.outputs, shaped, strict=True)]
        return pb_utils.InferenceResponse(tensors)
