"""A model for Triton's Python backend: JPEG or PNG files in, the input of the next model out.

Written by quartermap-deploy, which prepares images in the same way. Needs NumPy, which Triton's container has, and
Pillow, which it has not: pip install pillow. The parameter `preprocessing` in config.pbtxt holds, as JSON:

    resize, crop           [height, width]
    fit                    "cover" or "stretch"
    interpolation          a filter of Pillow's: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos"
    color                  the channels and their order: "rgb", "bgr", "grey" or "rgba"
    scale                  what a pixel, 0 to 255, is multiplied by
    mean, std              for each channel, of what that makes
    type                   of the output, "float32" or "float16"
    largest                the most pixels that an image may have, itself or resized
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from quartermap_deploy.data.pixels import (
    MODES,
    UnfitImageError,
    cropped,
    levels,
    opened,
    planes,
    with_mode,
)

FORMATS = ("JPEG", "PNG")
NO_PILLOW = "images need Pillow where Triton runs: pip install pillow, and start Triton again"


class NoImageError(Exception):
    """An element of a request that is no image, or one that is too large."""


class TritonPythonModel:
    """Decodes and prepares images."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration."""
        config = json.loads(args["model_config"])
        self.ready = True
        try:
            from PIL import Image
        except ImportError as error:
            # Not raised, as Triton would end, and the other models with it: it does where a model cannot be loaded.
            self.ready = False
            pb_utils.Logger.log_error(f"{config['name']}: {NO_PILLOW} ({error})")
            return
        settings = json.loads(config["parameters"]["preprocessing"]["string_value"])
        # The limit below is ours; Pillow's own would only warn.
        Image.MAX_IMAGE_PIXELS = None
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        self.resize, self.crop = tuple(settings["resize"]), tuple(settings["crop"])
        self.largest: int = settings["largest"]
        self.settings = {
            "stretch": settings["fit"] == "stretch",
            "interpolation": settings["interpolation"],
            "largest": self.largest,
        }
        self.color: str = settings["color"]
        self.levels = levels(settings["mean"], settings["std"], settings["scale"]).astype(settings["type"])
        # Pillow loads its formats with the first file. Triton's own warm-up has to succeed, so it would need Pillow.
        first = io.BytesIO()
        Image.new("RGB", (8, 8)).save(first, "PNG")
        self.prepare(first.getvalue(), 1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with its prepared images, or with what is wrong with one of them."""
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        """Answer one request."""
        if not self.ready:
            return refused(NO_PILLOW, pb_utils.TritonError.UNAVAILABLE)
        files = pb_utils.get_input_tensor_by_name(request, self.input).as_numpy().reshape(-1)
        try:
            batch = np.stack([self.prepare(data, place) for place, data in enumerate(files, 1)])
        except NoImageError as error:
            return refused(str(error), pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(self.output, batch)])

    def prepare(self, data: bytes, place: int) -> Any:
        """Return one image as (channels, height, width); `place` is for the message."""
        try:
            image = opened(io.BytesIO(data), FORMATS, self.largest)
            centre = cropped(with_mode(image, MODES[self.color]), self.resize, self.crop, **self.settings)
        except UnfitImageError as error:
            raise NoImageError(f"image {place} {error}") from error
        except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
            what = f"of {len(data)} bytes cannot be read as JPEG or PNG" if data else "is empty"
            raise NoImageError(f"image {place} {what}") from error
        return np.stack(
            [values[plane] for values, plane in zip(self.levels, planes(centre, self.color), strict=True)]
        )


def refused(message: str, code: int) -> Any:
    """Answer a request with what is wrong."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
