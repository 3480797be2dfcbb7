"""Arrays as pictures inside the page: PNG data in the address of an image, so that nothing is fetched."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.report.markup import Html, element

_RAMP = np.array(
    [(20, 22, 48), (35, 66, 118), (24, 116, 136), (66, 160, 116), (168, 196, 84), (250, 226, 120)],
    dtype=np.float64,
)
"""Colours from nothing to most, evenly spaced; lightness grows throughout, so that it also reads in grey."""


def heat_colours(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Return the colours of a map, (H, W) → (H, W, 3).

    Args:
        values: the map; values outside the range take the colour at its end.
        low: value of the first colour.
        high: value of the last one.
    """
    span = high - low
    shares = np.zeros(values.shape) if span <= 0 else np.clip((values - low) / span, 0.0, 1.0)
    places = shares * (len(_RAMP) - 1)
    below = np.minimum(places.astype(np.int64), len(_RAMP) - 2)
    part = (places - below)[..., None]
    colours: NDArray[np.uint8] = np.rint(_RAMP[below] * (1 - part) + _RAMP[below + 1] * part).astype(np.uint8)
    return colours


def picture(colours: NDArray[np.uint8], description: str, *, sharp: bool = True) -> Html:
    """Return an image, (H, W, 3) of uint8, with a text for those who do not see it.

    Args:
        colours: the pixels.
        description: what it shows.
        sharp: whether enlarged pixels keep their edges: for maps, not for photographs.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, format="PNG", optimize=True)
    height, width = colours.shape[:2]
    attributes = {
        "class": "map sharp" if sharp else "map",
        "alt": description,
        "width": width,
        "height": height,
        "src": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}",
    }
    return element("img", attributes)


def heat_scale(low: str, high: str) -> Html:
    """Return the bar that explains the colours, with the texts at its ends."""
    bar = picture(
        heat_colours(np.linspace(0, 1, 64)[None, :], 0, 1), "colours from least to most", sharp=False
    )
    return element("p", {"class": "scale"}, element("span", None, low), bar, element("span", None, high))
