"""What pruning saves, from measured times: scaled to the whole, and told apart from noise."""

from __future__ import annotations

import math

import pytest

from quartermap_deploy.bench import Timing
from quartermap_deploy.evaluation.savings import Savings, _saved, is_noisy, scaled


@pytest.mark.parametrize(
    ("share", "error", "noisy"),
    [
        (0.3, 0.0, False),
        (0.3, 0.099, False),
        (0.3, 0.101, True),
        (0.03, 0.0099, False),
        (0.03, 0.0101, True),
        (0.0, 0.0, True),
        (-0.1, 0.01, True),
        (math.nan, 0.01, True),
        (0.3, math.nan, True),
    ],
)
def test_savings_are_noise_where_their_error_is_more_than_a_third_of_them(
    share: float, error: float, noisy: bool
) -> None:
    assert is_noisy((share, error)) is noisy


@pytest.mark.parametrize(
    ("whole", "parts", "scale"),
    [
        (0.3, (0.1, 0.1), 1.5),
        (0.2, (0.2, 0.2), 0.5),
        (0.1, (0.2, 0.2), 0.5),  # a quarter would be a contradiction
        (0.9, (0.1, 0.1), 2.0),
        (-0.1, (0.1, 0.1), 1.0),
        (0.1, (0.1, -0.2), 1.0),
    ],
)
def test_stages_add_up_to_the_whole_within_a_factor_of_two(
    whole: float, parts: tuple[float, ...], scale: float
) -> None:
    found = scaled((whole, 0.01), [(share, 0.02) for share in parts])
    assert found == [(pytest.approx(scale * share), pytest.approx(scale * 0.02)) for share in parts]


def test_what_is_saved_is_the_share_of_the_unpruned_time_of_the_same_round() -> None:
    unpruned, pruned = Timing((1.0, 2.0, 4.0)), Timing((0.5, 1.5, 3.6))
    share, error = _saved(pruned, unpruned)
    assert share == pytest.approx(0.25)
    # The quartiles of 0.5, 0.75 and 0.9 are 0.625 and 0.825.
    assert error == pytest.approx(1.253 / 1.349 * 0.2 / math.sqrt(3))
    assert _saved(unpruned, unpruned) == (0.0, 0.0)


def test_the_speed_of_several_blocks_is_that_of_what_is_left() -> None:
    savings = Savings("time", {(1, 2): 0.1, (2, 2): 0.15, (2, 3): 0.5}, {}, "for this test")
    assert savings.speed((), 2) == 1.0
    assert savings.speed((1, 2), 2) == pytest.approx(1 / 0.75)
    assert savings.speed((2,), 3) == pytest.approx(2.0)
    assert Savings.from_dict(savings.to_dict()) == savings
