"""Forms with files: read in pieces of any size, in one pass, and within limits."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartermap_deploy.serving.forms import FIELDS, MOST_HEADERS, FormReader
from quartermap_deploy.serving.refusal import Refusal

TYPE = "multipart/form-data; boundary=x"
HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
END = b"\r\n--x--\r\n"
MIB = 1 << 20


def read(body: bytes, kind: str = TYPE, piece: int = 1 << 16, most: int = 8) -> list[tuple[str, bytes]]:
    reader = FormReader(kind, most)
    for start in range(0, len(body), piece):
        reader.feed(body[start : start + piece])
    return [(file.name, bytes(file.content)) for file in reader.end()]


def refusal(body: bytes, kind: str = TYPE, piece: int = 1 << 16) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(body, kind, piece)
    return caught.value


def part(headers: str, content: bytes = b"") -> bytes:
    return b"--x\r\n" + headers.encode() + b"\r\n\r\n" + content + b"\r\n"


CONTENTS = st.lists(
    st.lists(
        st.sampled_from([b"\r", b"\n", b"\r\n", b"--", b"\r\n--", b"\r\n--y", b"-", b"x", b"\0", b"ab"])
    ).map(b"".join),
    min_size=1,
    max_size=4,
)


@given(CONTENTS, st.integers(1, 40))
def test_files_are_what_was_sent_however_it_is_cut(contents: list[bytes], piece: int) -> None:
    sent = [content for content in contents if b"\r\n--x" not in b"\r\n" + content]
    body = b"".join(
        part(f'Content-Disposition: form-data; name="f"; filename="{n}"', c) for n, c in enumerate(sent)
    )
    if sent:
        expected = [(str(number), content) for number, content in enumerate(sent)]
        assert read(body + b"--x--\r\n", piece=piece) == expected == read(body + b"--x--")


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ('filename="a b.png"', "a b.png"),
        ("filename=a.png", "a.png"),
        (r'filename="a\"b\\c.png"', 'a"b\\c.png'),
        ('filename=""', ""),
        ('filename="../../etc/passwd"', "../../etc/passwd"),
        ('filename="Blüte.png"', "Blüte.png"),
        ("filename*=UTF-8''Bl%C3%BCte.png", "Blüte.png"),
        ("filename*=UTF-8''%ff.png; filename=\"x.png\"", "�.png"),
        ('filename="a;b=c.png"', "a;b=c.png"),
    ],
)
def test_names_of_files(parameters: str, name: str) -> None:
    body = part(f"Content-Disposition: form-data; name=file; {parameters}", b"!") + b"--x--"
    assert read(body) == [(name, b"!")]


def test_fields_are_no_files_and_everything_may_be_spelt_as_clients_do() -> None:
    body = (
        part("content-disposition:form-data; name=top", b"5")
        + part('CONTENT-TYPE: image/png\r\nContent-Disposition: Form-Data; name="f"; filename="a"', b"1")
        + b"--x  \r\n"
        + part('Content-Disposition: form-data; name="f"; filename="a"\r\nX-Other: \xfc', b"2")[5:]
        + b"--x--\r\n"
    )
    assert read(body) == [("a", b"1"), ("a", b"2")]
    for kind in ('multipart/form-data; boundary="x"', "multipart/form-data;charset=utf-8;boundary=x"):
        assert read(body, kind) == [("a", b"1"), ("a", b"2")]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "ends before"),
        (b"--x", 400, "ends before"),
        (b"--x-", 400, "ends before"),
        (b"--x--", 400, "no file"),
        (b"junk", 400, "does not begin with the boundary"),
        (b"preamble\r\n" + HEAD + END, 400, "does not begin with the boundary"),
        (HEAD, 400, "ends before"),
        (HEAD + b"abc\r\n--x", 400, "ends before"),
        (HEAD + b"abc\r\n--y--\r\n", 400, "ends before"),
        (HEAD + END + b"more", 400, "goes on behind"),
        (b"--xy\r\n" + HEAD + END, 400, "something else than the end of its line"),
        (part("") + b"--x--", 400, "no header Content-Disposition"),
        (
            part("Content-Disposition: attachment; filename=a") + b"--x--",
            400,
            "no header Content-Disposition",
        ),
        (part("no header") + b"--x--", 400, "headers that are none"),
        (part("Content-Disposition : form-data; filename=a") + b"--x--", 400, "headers that are none"),
        (part(" Content-Disposition: form-data") + b"--x--", 400, "headers that are none"),
        (part("A: b\r\na: c") + b"--x--", 400, "one of them twice"),
        (part("Content-Disposition: form-data; filename=a; filename=b") + b"--x--", 400, "something twice"),
        (part('Content-Disposition: form-data; filename="a') + b"--x--", 400, "cannot be read"),
        (part("Content-Type: multipart/mixed; boundary=y") + b"--x--", 400, "a form in it"),
        (
            part("Content-Disposition: form-data; filename=a\r\nContent-Transfer-Encoding: base64")
            + b"--x--",
            415,
            "send files as they are",
        ),
        (
            part("Content-Disposition: form-data; filename=a\r\nContent-Encoding: gzip") + b"--x--",
            415,
            "send files as they are",
        ),
    ],
)
def test_forms_that_are_none(body: bytes, status: int, message: str) -> None:
    for piece in (1, 7, 1 << 16):
        found = refusal(body, piece=piece)
        assert found.status == status and message in found.message, found


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "a" * 71,
        "multipart/form-data; boundary=" + "a" * 8000,
        'multipart/form-data; boundary="a\r\nb"',
        'multipart/form-data; boundary="x "',
        "multipart/form-data; boundary=\x00",
        "multipart/form-data; boundary=ü",
        "multipart/form-data; boundary=x; boundary=y",
    ],
)
def test_boundaries_that_are_none(kind: str) -> None:
    found = refusal(HEAD + END, kind)
    assert found.status == 400 and found.message.isprintable() and len(found.message) < 300


def test_parts_are_counted_and_headers_measured_before_the_rest_is_there() -> None:
    """Of millions no more is read than the limits: nothing has to be held to count them."""
    for body, most, message in (
        (b"--x\r\n\r\n\r\n", 8, "no header Content-Disposition"),
        (HEAD + b"\r\n", 8, "more than 8 parts"),
        (part("Content-Disposition: form-data; name=a"), FIELDS, f"more than {FIELDS} parts"),
    ):
        reader = FormReader(TYPE, most)
        with pytest.raises(Refusal, match=message):
            for _ in range(most + 1):
                reader.feed(body)
    reader = FormReader(TYPE, 8)
    reader.feed(HEAD[:-4] + b"\r\nX: ")
    with pytest.raises(Refusal, match="headers of part 1 of the form are longer"):
        for _ in range(MOST_HEADERS // 1000 + 1):
            reader.feed(b"a" * 1000)


@pytest.mark.parametrize("content", [b"\r\n--", b"\r\n", b"\r", b"\r\n--y", b"\0" * 64])
def test_the_time_grows_with_the_size_alone(content: bytes) -> None:
    """What nearly is a boundary costs no more than twenty times what nothing of it does; it was seconds for 60 MB."""
    body = HEAD + content * (8 * MIB // len(content)) + END
    start = time.process_time()
    (found,) = read(body)
    assert len(found[1]) > 7 * MIB
    # Eight MiB take 0.02 to 0.05 s.
    assert time.process_time() - start < 1


def test_a_form_is_free_as_soon_as_nobody_has_it() -> None:
    """What holds itself waits for Python's collector: six bodies of 60 MB took a gigabyte."""
    import weakref

    reader = FormReader(TYPE, 8)
    reader.feed(HEAD + b"abc")
    gone = weakref.ref(reader)
    del reader
    assert gone() is None
