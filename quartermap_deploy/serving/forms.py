"""Forms with files (multipart/form-data, RFC 7578), read as they come.

A form costs the time of one look at its bytes and the memory of its files. Parts, their headers and the boundary have
limits of their own, so that neither many empty parts nor long headers cost more than that; what is over a limit is
refused as soon as it is there, and not once the rest of the body is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from quartermap_deploy.plain_text import printable
from quartermap_deploy.serving.refusal import Refusal, invalid

FORM = "multipart/form-data"
LONGEST_BOUNDARY = 70
"""Letters of a boundary, by RFC 2046."""
MOST_HEADERS = 8192
"""Bytes of all headers of one part, and of the line before them."""
FIELDS = 64
"""Parts that a form may have beside its files: fields, which are read and thrown away."""
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=?\- ]*[0-9A-Za-z'()+_,./:=?\-]")
_PARAMETER = re.compile(r';\s*([\w!#$%&\'*+.^`|~-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s";]*)\s*')
_PLAIN = ("7bit", "8bit", "binary", "identity", "")


@dataclass(frozen=True)
class FormFile:
    """A file of a form.

    Attributes:
        name: what the client calls it.
        content: what is in it.
    """

    name: str
    content: bytearray


class FormReader:
    """A form that is being received; other parts than files are thrown away."""

    def __init__(self, content_type: str, most_parts: int) -> None:
        """Begin.

        Args:
            content_type: the header Content-Type of the request.
            most_parts: parts that the form has at most.

        Raises:
            Refusal: if it names no boundary.
        """
        self.files: list[FormFile] = []
        self._mark = b"\r\n--" + _boundary(content_type)
        self._most, self._parts = most_parts, 0
        # The first line of a form has nothing before it, and is read as if it had.
        self._buffer = bytearray(b"\r\n")
        # A plain function: a bound method would keep the form, and all of its files, until Python's collector comes by.
        self._read: Callable[[FormReader], bool] = FormReader._start
        self._content: bytearray | None = None

    def feed(self, data: bytes) -> None:
        """Read some more bytes.

        Raises:
            Refusal: if they do not go on with a form, or it is over a limit.
        """
        self._buffer += data
        while self._read(self):
            pass

    def end(self) -> list[FormFile]:
        """Return the files.

        Raises:
            Refusal: if the form is not whole, or has none.
        """
        if self._read is not FormReader._over:
            raise invalid("the form ends before its last boundary")
        if not self.files:
            raise invalid("the form has no file; send it as a part with a filename")
        return self.files

    # Each of these reads what it can from the buffer, and returns whether the next one can go on.

    def _start(self) -> bool:
        if len(self._buffer) < len(self._mark):
            if self._mark.startswith(self._buffer):
                return False
        elif self._buffer.startswith(self._mark):
            del self._buffer[: len(self._mark)]
            self._read = FormReader._head
            return True
        raise invalid("the form does not begin with the boundary that its Content-Type names")

    def _head(self) -> bool:
        """The line of a boundary, and the headers behind it."""
        if self._buffer[:2] == b"--":
            del self._buffer[:2]
            self._read = FormReader._over
            return True
        end = self._buffer.find(b"\r\n\r\n", 0, MOST_HEADERS)
        if end < 0:
            if len(self._buffer) >= MOST_HEADERS:
                raise invalid(
                    f"the headers of part {self._parts + 1} of the form are longer than {MOST_HEADERS:,} bytes"
                )
            return False
        line, *headers = bytes(self._buffer[:end]).split(b"\r\n")
        if line.strip(b" \t"):
            raise invalid("a boundary of the form is followed by something else than the end of its line")
        del self._buffer[: end + 4]
        self._parts += 1
        if self._parts > self._most:
            raise Refusal(
                413,
                f"the form has more than {self._most} parts; send fewer files at once, and no other fields",
            )
        name = _file_name(headers, self._parts)
        self._content = None
        if name is not None:
            self._content = bytearray()
            self.files.append(FormFile(name, self._content))
        self._read = FormReader._body
        return True

    def _body(self) -> bool:
        """What is in a part."""
        found = self._buffer.find(self._mark)
        # Where there is none, one may have begun at the end.
        end = found if found >= 0 else max(0, len(self._buffer) - len(self._mark) + 1)
        if self._content is not None and end:
            with memoryview(self._buffer) as buffer:
                self._content += buffer[:end]
        if found < 0:
            del self._buffer[:end]
            return False
        del self._buffer[: found + len(self._mark)]
        self._read = FormReader._head
        return True

    def _over(self) -> bool:
        if self._buffer.strip():
            raise invalid("the form goes on behind its last boundary")
        self._buffer.clear()
        return False


def _boundary(content_type: str) -> bytes:
    """Return the boundary that a Content-Type names."""
    _, semicolon, rest = content_type.partition(";")
    text = _parameters(semicolon + rest, "the Content-Type of the form").get("boundary", "")
    if not text:
        raise invalid("the Content-Type of the form names no boundary")
    if len(text) > LONGEST_BOUNDARY or not _BOUNDARY.fullmatch(text):
        raise invalid(
            f'the boundary of the form is "{printable(text, 80)}"; expected at most {LONGEST_BOUNDARY} letters, '
            "digits and signs"
        )
    return text.encode("ascii")


def _file_name(lines: list[bytes], place: int) -> str | None:
    """Read the headers of a part; returns the name of a file, and None where it is none."""
    headers: dict[str, str] = {}
    for line in lines:
        # Old clients wrote other encodings; a name is all that they are for.
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        name = name.lower()
        if not colon or name != name.strip() or name in headers:
            raise invalid(f"part {place} of the form has headers that are none, or one of them twice")
        headers[name] = value.strip()
    kind, semicolon, rest = headers.get("content-disposition", "").partition(";")
    if headers.get("content-type", "").lower().startswith("multipart/"):
        raise invalid("the form has a form in it; send files")
    if kind.strip().lower() != "form-data":
        raise invalid(f"part {place} of the form has no header Content-Disposition: form-data")
    for name in ("content-transfer-encoding", "content-encoding"):
        if headers.get(name, "").lower() not in _PLAIN:
            raise Refusal(
                415, f"part {place} of the form has a {name.title()}; send files as they are, as binary data"
            )
    found = _parameters(semicolon + rest, f"the Content-Disposition of part {place}")
    if "filename*" in found:
        return unquote_to_bytes(found["filename*"].rpartition("'")[2]).decode("utf-8", "replace")
    return found.get("filename")


def _parameters(text: str, name: str) -> dict[str, str]:
    """Read what follows the first word of a header: `; name=value; name="value"`."""
    found: dict[str, str] = {}
    position, text = 0, text.rstrip("; \t")
    while position < len(text):
        match = _PARAMETER.match(text, position)
        if match is None or match[1].lower() in found:
            raise invalid(f"{name} cannot be read, or says something twice")
        value = match[2]
        if value.startswith('"'):
            value = value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
        found[match[1].lower()] = value
        position = match.end()
    return found
