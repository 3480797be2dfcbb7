"""Preprocessing as a value: what it takes, what it refuses, and how it is read and written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.architectures.cards import list_models, load_card
from quartermap_deploy.data.preprocessing import (
    CHANNELS,
    FITS,
    INTERPOLATIONS,
    Preprocessing,
    parse_overrides,
)
from quartermap_deploy.errors import InputError

IMAGENET = load_card("vmamba_tiny_s1l8").preprocessing
PLAIN = {"crop": [32, 48], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize("name", list_models())
def test_every_card_is_written_and_read_back(name: str) -> None:
    preprocessing = load_card(name).preprocessing
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    assert preprocessing.color == "rgb" and preprocessing.scale == 1 / 255
    assert preprocessing.input_shape == load_card(name).input_shape


@given(
    st.sampled_from(sorted(CHANNELS)),
    st.sampled_from(FITS),
    st.sampled_from(INTERPOLATIONS),
    st.tuples(st.integers(1, 512), st.integers(1, 512)),
    st.integers(0, 64),
    st.floats(1e-6, 1e6),
    st.data(),
)
def test_all_values_survive_json(
    color: Any, fit: Any, interpolation: Any, crop: tuple[int, int], margin: int, scale: float, data: Any
) -> None:
    count = CHANNELS[color]
    preprocessing = Preprocessing(
        resize=(crop[0] + margin, crop[1]),
        fit=fit,
        crop=crop,
        interpolation=interpolation,
        mean=tuple(data.draw(st.lists(st.floats(-300, 300), min_size=count, max_size=count))),
        std=tuple(data.draw(st.lists(st.floats(1e-3, 300), min_size=count, max_size=count))),
        color=color,
        scale=scale,
    )
    again = Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict())))
    assert again == preprocessing and hash(again) == hash(preprocessing)
    assert again.input_shape == (count, *crop)


def test_what_is_left_out_has_a_default_except_mean_and_std() -> None:
    found = Preprocessing.from_dict(PLAIN)
    assert found == Preprocessing(
        (32, 48), "cover", (32, 48), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "rgb", 1 / 255
    )
    sized = Preprocessing.from_dict({"mean": [0], "std": [1], "color": "grey"}, size=(8, 9))
    assert sized.crop == sized.resize == (8, 9) and sized.mean == (0.0,) and sized.channels == 1
    assert Preprocessing.from_dict(PLAIN, size=(8, 9)).crop == (32, 48)
    for missing in ("crop", "mean", "std"):
        with pytest.raises(InputError, match=f"has no {missing}; give {missing}"):
            Preprocessing.from_dict({key: value for key, value in PLAIN.items() if key != missing})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.5]}, r"mean = \[0.5\] has 1 number; expected 3.*color = 'rgb', or say color = 'grey'"),
        ({"color": "grey"}, r"has 3 numbers; expected 1.*or say color = 'rgb' or 'bgr'"),
        (
            {"std": [1, 1]},
            r"std = \[1, 1\] has 2 numbers; expected 3, one for each channel of color = 'rgb'$",
        ),
        ({"std": [0.2, 0, 0.2]}, r"std = \[0.2, 0.0, 0.2\] must be positive"),
        ({"std": [0.2, -0.1, 0.2]}, "must be positive"),
        ({"std": 0.5}, "std = 0.5 is no list of finite numbers"),
        ({"mean": [0.5, math.nan, 0.5]}, "mean = .*nan.* is no list of finite numbers"),
        ({"mean": [0.5, math.inf, 0.5]}, "is no list of finite numbers"),
        ({"mean": [0.5, True, 0.5]}, "is no list of finite numbers"),
        ({"mean": ["0.5"] * 3}, "is no list of finite numbers"),
        ({"resize": [0, 256]}, r"resize = \[0, 256\] is not \[height, width\] in pixels, both above 0"),
        ({"crop": [224]}, "does not lie in resize|crop"),
        ({"crop": [224.0, 224.0]}, "crop = .* is not"),
        ({"crop": [1, 2, 3]}, "crop = .* is not"),
        ({"crop": "224"}, "crop = '224' is not"),
        ({"crop": [True, True]}, "is not"),
        ({"crop": [9000, 8]}, "crop = 9000 x 8 is too large; height and width may be 8192"),
        (
            {"resize": [64, 47]},
            "crop = 32 x 48 does not lie in resize = 64 x 47; make the crop smaller or resize",
        ),
        ({"fit": "contain"}, "unknown fit 'contain'. Available: cover, stretch"),
        ({"interpolation": "bicubik"}, "unknown interpolation 'bicubik'. Did you mean bicubic"),
        ({"interpolation": 3}, "unknown interpolation '3'"),
        ({"color": "gray", "mean": [0], "std": [1]}, "unknown color 'gray'. Did you mean grey"),
        ({"scale": 0}, "scale = 0 is no positive number"),
        ({"scale": -1.0}, "scale = -1.0 is no positive number"),
        ({"scale": math.nan}, "scale = nan is no positive number"),
        ({"scale": "1/255"}, "scale = '1/255' is no positive number"),
        ({"means": [0.5] * 3}, "unknown key of the preprocessing 'means'. Did you mean mean"),
        ({"colour": "rgb"}, "unknown key of the preprocessing 'colour'. Did you mean color"),
    ],
)
def test_wrong_values_are_told(values: dict[str, Any], message: str) -> None:
    given = {**PLAIN, "resize": [64, 64], **values}
    if values == {"crop": [224]}:
        given["resize"] = [100, 100]
    with pytest.raises(InputError, match=message):
        Preprocessing.from_dict(given)


@pytest.mark.parametrize("values", [None, 3, "rgb", [1, 2]])
def test_what_is_no_table_is_told(values: Any) -> None:
    with pytest.raises(InputError, match="is no table; expected resize, fit, crop"):
        Preprocessing.from_dict(values)


class TestReplace:
    def test_a_value_alone(self) -> None:
        bgr = IMAGENET.replace({"color": "bgr"})
        assert bgr.color == "bgr" and bgr.mean == IMAGENET.mean and bgr.crop == IMAGENET.crop
        assert IMAGENET.replace({}) == IMAGENET
        assert IMAGENET.replace({"mean": [0.5, 0.5, 0.5]}).mean == (0.5, 0.5, 0.5)

    def test_a_crop_alone_keeps_the_margin(self) -> None:
        assert IMAGENET.replace({"crop": [384, 384]}) == IMAGENET.with_size(384, 384)
        assert IMAGENET.replace({"crop": 384}) == IMAGENET.with_size(384, 384)
        whole = IMAGENET.replace({"crop": [384, 384], "resize": [384, 384]})
        assert whole.resize == whole.crop == (384, 384)

    def test_what_does_not_fit_the_rest_is_told(self) -> None:
        with pytest.raises(InputError, match="expected 1, one for each channel of color = 'grey'"):
            IMAGENET.replace({"color": "grey"})
        with pytest.raises(InputError, match="does not lie in resize"):
            IMAGENET.replace({"resize": [200, 200]})
        with pytest.raises(InputError, match="Did you mean std"):
            IMAGENET.replace({"stdd": [1, 1, 1]})

    def test_another_number_of_channels(self) -> None:
        half = load_card("medmamba_t").preprocessing
        grey = half.with_channels(1)
        assert (grey.color, grey.mean, grey.std) == ("grey", (0.5,), (0.5,))
        assert half.with_channels(4).input_shape == (4, 224, 224)
        assert half.with_channels(3) is half
        with pytest.raises(InputError, match=r"has 1 channel, and mean = .* are for 3; give color, mean and"):
            IMAGENET.with_channels(1)
        with pytest.raises(InputError, match="has 13 channels, and an image has 1, 3 or 4"):
            half.with_channels(13)


class TestCommandLine:
    def test_every_kind_of_value(self) -> None:
        found = parse_overrides(
            [
                "mean=0.485, 0.456,0.406",
                "std = 0.2,0.2,0.2",
                "resize=256",
                "crop=224x192",
                "scale=1/255",
                "color=bgr",
                "fit=stretch",
                "interpolation=lanczos",
            ]
        )
        assert IMAGENET.replace(found) == Preprocessing(
            (256, 256), "stretch", (224, 192), "lanczos", (0.485, 0.456, 0.406), (0.2,) * 3, "bgr", 1 / 255
        )
        assert parse_overrides(["scale=1"]) == {"scale": 1.0} and parse_overrides([]) == {}

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("mean", "'mean' is no setting of the preprocessing; expected NAME=VALUE"),
            ("mean=", "expected NAME=VALUE"),
            ("=3", "expected NAME=VALUE|unknown key"),
            ("maen=1,2,3", "unknown key of the preprocessing 'maen'. Did you mean mean"),
            ("mean=a,b", "mean = 'a,b' cannot be read; expected numbers with commas"),
            ("crop=224x", "crop = '224x' cannot be read; expected HEIGHTxWIDTH"),
            ("crop=22.4", "expected HEIGHTxWIDTH"),
            ("scale=1/0", "scale = '1/0' cannot be read; expected a number, such as 1/255"),
        ],
    )
    def test_what_cannot_be_read_is_told(self, assignment: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            parse_overrides([assignment])

    def test_a_value_given_twice_is_told(self) -> None:
        with pytest.raises(InputError, match="two values for color"):
            parse_overrides(["color=rgb", "color=bgr"])

    def test_what_is_no_number_is_told_with_the_rest(self) -> None:
        with pytest.raises(InputError, match="no list of finite numbers"):
            IMAGENET.replace(parse_overrides(["mean=nan,0,0"]))
        with pytest.raises(InputError, match="both above 0"):
            IMAGENET.replace(parse_overrides(["crop=-3x4"]))


def test_it_is_read_without_numpy_and_torch() -> None:
    program = (
        "import sys; from quartermap_deploy.data.preprocessing import Preprocessing; "
        f"Preprocessing.from_dict({PLAIN!r}); sys.exit(bool({{'torch', 'numpy', 'PIL'}} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
