"""Text from outside on its way to a terminal, a log, or a line to copy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.plain_text import command, printable, printable_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("VMamba-T [s1l8], größer 猫", "VMamba-T [s1l8], größer 猫"),
        ("\x1b[2J\x1b[Hpassed", r"\x1b[2J\x1b[Hpassed"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("\x9b31m", r"\x9b31m"),  # the same as ESC [, in one letter
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff", r"\udcff"),
        ("\x00\x07\x7f", r"\x00\x07\x7f"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_left(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_long_texts_are_cut_and_lines_kept_where_they_are_asked_for() -> None:
    assert printable("x" * 1000, 10) == "x" * 10 + "…"
    assert printable("x" * 1000, None) == "x" * 1000
    assert printable("one\ntwo\x1b", lines=True) == "one\ntwo\\x1b"
    assert printable(Path("a\x1b")) == r"a\x1b"


@given(st.text())
def test_all_that_is_printed_is_printable(text: str) -> None:
    assert printable(text).isprintable()
    shown = printable_json([text])
    assert shown.replace("\n", "").isprintable()
    assert json.loads(shown) == [text]


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=0, max_size=20), min_size=1
    )
)
def test_a_shell_reads_the_words_of_a_command_as_they_were(words: list[str]) -> None:
    line = command(*words)
    out = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    assert out == b"".join(word.encode() + b"\0" for word in words)


def test_a_path_cannot_end_the_command() -> None:
    assert command("quartermap", "rebuild", Path("b/x;touch PWN")) == "quartermap rebuild 'b/x;touch PWN'"
