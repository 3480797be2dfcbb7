"""A model for Triton's Python backend: logits in, probabilities out. Written by quartermap-deploy; needs NumPy.

The parameter `activation` in config.pbtxt says how: "softmax" over the classes, "sigmoid", or "none" where the model
before it gives probabilities itself.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What makes probabilities of logits, in float64."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration."""
        config = json.loads(args["model_config"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        self.activation: str = config["parameters"]["activation"]["string_value"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        """Answer one request."""
        logits = pb_utils.get_input_tensor_by_name(request, self.input).as_numpy().astype(np.float64)
        if self.activation == "softmax":
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            values = powers / powers.sum(axis=-1, keepdims=True)
        else:
            values = 0.5 + 0.5 * np.tanh(0.5 * logits) if self.activation == "sigmoid" else logits
        output = pb_utils.Tensor(self.output, values.astype(np.float32))
        return pb_utils.InferenceResponse(output_tensors=[output])
