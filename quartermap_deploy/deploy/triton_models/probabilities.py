"""A model for Triton's Python backend: logits in, probabilities out. Written by quartermap-deploy; needs NumPy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The softmax over the classes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the names of the tensors."""
        config = json.loads(args["model_config"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        """Answer one request."""
        logits = pb_utils.get_input_tensor_by_name(request, self.input).as_numpy().astype(np.float32)
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probabilities = powers / powers.sum(axis=-1, keepdims=True)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(self.output, probabilities)])
