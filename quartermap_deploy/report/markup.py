"""Building HTML and SVG: text and attributes are always escaped, so that no name in a bundle becomes markup.

Marks that turn the direction of writing, and control characters, are shown as escapes, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from quartermap_deploy.plain_text import printable

_VOID = frozenset({"br", "img", "hr"})
"""HTML elements that have no end tag."""


class Html(str):
    """Text that is markup already. Template engines ask for `__html__` and do not escape it again."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def element(
    name: str, attributes: Mapping[str, object] | None = None, *children: str, separator: str = ""
) -> Html:
    """Return one element.

    Args:
        name: its tag.
        attributes: by name; one that is None is left out, numbers are written with two digits.
        children: what is in it, in order; a str is escaped, an `Html` is not.
        separator: written between the children.
    """
    written = "".join(
        f' {key}="{escape(_text(value), quote=True)}"'
        for key, value in (attributes or {}).items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    content = separator.join(
        child if isinstance(child, Html) else escape(printable(child, None, lines=True), quote=False)
        for child in children
    )
    return Html(f"<{name}{written}>{content}</{name}>")


def joined(*parts: Html) -> Html:
    """Return several pieces of markup as one."""
    return Html("".join(parts))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return printable(value, None, lines=True)
