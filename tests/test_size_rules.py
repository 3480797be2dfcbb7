"""Rules of sizes: what they allow, and that nothing but comparisons of whole numbers is ever computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.errors import BundleError, InputError
from quartermap_deploy.size_rules import SizeRules, is_rule

RULES = [
    "images[2] % 7 == 0",
    "images[2] // 4 != 1 and images[3] >= 8",
    "max(1, images[3] // 4) < 8 * max(1, (images[2] // 4) * (images[3] // 4))",
    "first[0] == second[0]",
    "not images[2] < -3",
    "8 <= images[2] <= 64",
]


@pytest.mark.parametrize("rule", RULES)
def test_rules_say_what_python_says(rule: str) -> None:
    for side in (1, 4, 7, 8, 28, 63, 64, 65):
        shapes = {"images": (1, 3, side, 2 * side), "first": (side,), "second": (28,)}
        fulfilled = eval(rule, {"__builtins__": {"max": max}}, shapes)
        if fulfilled:
            SizeRules([rule]).check(shapes)
        else:
            with pytest.raises(InputError, match="exported for sizes with"):
                SizeRules([rule]).check(shapes)


def test_the_message_says_rule_and_sizes() -> None:
    with pytest.raises(InputError, match=r"images\[2\] % 7 == 0, found images \(1, 3, 30, 28\)"):
        SizeRules(["images[3] % 7 == 0", "images[2] % 7 == 0"]).check({"images": (1, 3, 30, 28)})


@pytest.mark.parametrize("shapes", [{}, {"images": (1,)}, {"other": (1, 3, 7, 7)}])
def test_sizes_that_are_not_there_fulfil_nothing(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError):
        SizeRules(["images[2] % 7 == 0"]).check(shapes)


def test_a_division_by_zero_is_no_size_that_fits() -> None:
    with pytest.raises(InputError):
        SizeRules(["8 % (images[0] - 1) == 0"]).check({"images": (1,)})


@pytest.mark.parametrize(
    "rule",
    [
        "__import__('os').system('true')",
        "images.__class__",
        "open('x')",
        "images[2] ** 10 ** 10 == 1",
        "images[2] << 99999999 == 1",
        "(lambda: 1)()",
        "[x for x in images]",
        "max(*images)",
        "max(images[2], key=print)",
        "images['a'] == 1",
        "images[-1.5] == 1",
        "1 if images[2] else 2",
        "f'{images}'",
        "images[2] == 1; 2",
        "",
        "(" * 500,
        "images[2] == " + "1 + " * 900 + "1",
    ],
)
def test_anything_else_is_refused_before_it_is_computed(rule: str) -> None:
    assert not is_rule(rule)
    with pytest.raises(BundleError, match="no rule of sizes"):
        SizeRules([rule])


@pytest.mark.parametrize("rule", [None, 3, ["images[2] == 1"], "x" * 3000])
def test_what_is_no_text_or_too_long_is_refused(rule: object) -> None:
    with pytest.raises(BundleError):
        SizeRules([rule])  # type: ignore[list-item]


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rules = SizeRules([text])
    except BundleError:
        return
    try:
        rules.check({"images": (1, 3, 8, 8)})
    except InputError:
        return


def test_of_several_broken_rules_the_shortest_is_named() -> None:
    rules = SizeRules(["8*x[3]*x[2] == 128*(x[3] // 4)*(x[2] // 4)", "4*(x[3] // 4) == x[3]", "x[2] > 1"])
    rules.check({"x": (1, 8, 8, 12)})
    with pytest.raises(InputError, match=r"sizes with 4\*\(x\[3\] // 4\) == x\[3\], found"):
        rules.check({"x": (1, 8, 8, 10)})
