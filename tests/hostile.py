"""What hostile clients send to `/classify`, and clients that send it again and again."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from png_files import chunk
from served import Served, ask

MIB = 1 << 20
CLIENTS = 6
"""Hostile clients at a time."""


def zeros(size: int) -> bytes:
    """So many zeros, packed."""
    packer, block = zlib.compressobj(1), bytes(MIB)
    parts = [packer.compress(block[: min(MIB, size - start)]) for start in range(0, size, MIB)]
    return b"".join(parts) + packer.flush()


def png(width: int, height: int, *between: bytes, color: int = 2, depth: int = 8) -> bytes:
    """A PNG of zeros, with further chunks before its pixels."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    data = zeros(height * (1 + (width * samples * depth + 7) // 8))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(768)) if color == 3 else b""
    pixels = chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + head + palette + b"".join(between) + pixels + chunk(b"IEND", b"")


def jpeg(width: int, height: int, mode: str = "RGB", **settings: object) -> bytes:
    """A JPEG of zeros."""
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "JPEG", **settings)
    return file.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def text_bomb(kind: bytes, size: int = 300 * MIB) -> bytes:
    """A PNG whose text, or profile, unpacks to so many bytes."""
    head = {b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0", b"iCCP": b"x\0\0"}[kind]
    return png(8, 8, chunk(kind, head + zeros(size)))


def comment_bomb(size: int) -> bytes:
    """A JPEG with so many bytes of empty comments."""
    whole = jpeg(8, 8)
    return whole[:2] + segment(0xFE, b"") * (size // 4) + whole[2:]


def exif_bomb(size: int = 4 * MIB, entries: int = 60_000) -> bytes:
    """A JPEG whose EXIF data name all of themselves as the value of each of their entries."""
    first = 8 + 2 + 12 * entries + 4
    table = b"".join(struct.pack("<HHII", tag, 7, size - first, first) for tag in range(1, entries + 1))
    body = b"II*\0" + struct.pack("<IH", 8, entries) + table + bytes(4)
    body += bytes(size - len(body))
    whole = jpeg(8, 8)
    parts = (body[start : start + 65_000] for start in range(0, len(body), 65_000))
    return whole[:2] + b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts) + whole[2:]


def scan_bomb(side: int = 2000, scans: int = 5000) -> bytes:
    """A progressive JPEG that goes over its pixels so many times."""
    whole = jpeg(side, side, progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + b"\xff\xd9"


def animation(frames: int = 3000) -> bytes:
    """A PNG with so many frames behind its pixels."""
    control = struct.pack(">IIIIIHHBB", 1, 8, 8, 0, 0, 1, 1, 0, 0)
    frame = chunk(b"fcTL", control) + chunk(b"fdAT", b"\0\0\0\2" + zlib.compress(bytes(8 * 25)))
    whole = png(8, 8, chunk(b"acTL", struct.pack(">II", frames, 0)))
    return whole[:-12] + frame * frames + whole[-12:]


def split_pixels(count: int) -> bytes:
    """A PNG with so many empty pieces between its pixels."""
    whole = png(8, 8)
    place = whole.index(b"IDAT") - 4
    return whole[:place] + chunk(b"IDAT", b"") * count + whole[place:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/hostile) (w) file\n%%EOF\n"
TIFF = b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + struct.pack("<HHII", 256, 4, 2**32 - 1, 8) * 60_000


def images() -> dict[str, Callable[[], bytes]]:
    """Image files that take much of something, or try to, by what they do."""
    return {
        "(a plain PNG)": lambda: png(8, 8),
        "PNG of 2^31 x 2^31": lambda: png(8, 8).replace(struct.pack(">II", 8, 8), b"\x7f\xff\xff\xff" * 2),
        "PNG, 50 million pixels": lambda: png(7071, 7071),
        "PNG, 50 million, transparent": lambda: png(7071, 7071, color=6),
        "PNG, 25 million, transparent": lambda: png(5000, 5000, color=6),
        "PNG, 16 million, 16 bits": lambda: png(4000, 4000, color=0, depth=16),
        "PNG, 1 x 50 million": lambda: png(1, 50_000_000, color=0),
        "PNG, 4 million": lambda: png(2000, 2000),
        "JPEG, 50 million": lambda: jpeg(7071, 7071),
        "JPEG, 50 million, progressive": lambda: jpeg(7071, 7071, progressive=True, subsampling=0),
        "JPEG, 16 million, CMYK, progressive": lambda: jpeg(4000, 4000, "CMYK", progressive=True),
        "JPEG, 5,000 scans": scan_bomb,
        "JPEG, a million comments": lambda: comment_bomb(4 * MIB),
        "JPEG, EXIF that repeats itself": exif_bomb,
        "PNG, zTXt of 300 MB": lambda: text_bomb(b"zTXt"),
        "PNG, iTXt of 300 MB": lambda: text_bomb(b"iTXt"),
        "PNG, iCCP of 300 MB": lambda: text_bomb(b"iCCP"),
        "PNG, 3,000 frames": animation,
        "PNG, a million empty pieces": lambda: split_pixels(1_000_000),
        "TIFF with 60,000 odd tags": lambda: TIFF,
        "EPS named .png": lambda: EPS,
    }


LIMIT = 60 * MIB
"""Bytes of the large forms; servers take 64 MiB."""


def forms() -> dict[str, Callable[[], bytes]]:
    """Bodies of forms with the boundary "x", likewise."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n'
    return {
        "empty parts": lambda: b"--x\r\n\r\n\r\n" * (LIMIT // 9) + b"--x--\r\n",
        "empty files": lambda: (head + b"\r\n\r\n") * (LIMIT // (len(head) + 4)) + b"--x--\r\n",
        "one long header": lambda: head + b"X: " + b"a" * LIMIT + b"\r\n\r\n\r\n--x--\r\n",
        "many headers": lambda: head + b"X: a\r\n" * (LIMIT // 6) + b"\r\n\r\n--x--\r\n",
        "nearly boundaries": lambda: head + b"\r\n" + b"\r\n--" * (LIMIT // 4) + b"\r\n--x--\r\n",
        "lines alone": lambda: head + b"\r\n" + b"\r\n" * (LIMIT // 2) + b"\r\n--x--\r\n",
        "forms in it": lambda: (
            b"--x\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n" * (LIMIT // 56) + b"--x--\r\n"
        ),
        "no end": lambda: head + b"\r\n" + bytes(LIMIT),
        "no boundary": lambda: bytes(LIMIT),
        "much behind its end": lambda: head + b"\r\n\r\n--x--\r\n" + bytes(LIMIT),
        "a large file that is none": lambda: head + b"\r\n" + bytes(LIMIT) + b"\r\n--x--\r\n",
        "a JPEG of 60 MB of filling": lambda: (
            head + b"\r\n" + jpeg(64, 64)[:-2] + b"\xff" * LIMIT + b"\r\n--x--\r\n"
        ),
    }


def request(body: bytes, kind: str) -> bytes:
    """A request with a body, as it is sent."""
    head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def attacks() -> dict[str, Callable[[], bytes]]:
    """What makes each request, by name."""

    def made(make: Callable[[], bytes], kind: str) -> Callable[[], bytes]:
        return lambda: request(make(), kind)

    return {
        **{f"form: {name}": made(make, "multipart/form-data; boundary=x") for name, make in forms().items()},
        **{f"image: {name}": made(make, "image/png") for name, make in images().items()},
    }


class Hostile:
    """Clients in a process of their own that send requests, each again and again, as soon as the last was answered."""

    def __init__(self, server: Served, *names: str, clients: int = CLIENTS) -> None:
        """Start the process; without names for all attacks, of which each client begins with another one."""
        command = [sys.executable, __file__, str(server.port), str(clients), *names]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: Counter[str] = Counter()

    def __enter__(self) -> Hostile:
        assert self._said() == "ready"
        return self

    def __exit__(self, *exception: object) -> None:
        """End them; `answers` has the statuses of the answers then, 0 where there was none."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.answers.update(json.loads(self._said()))
        self.process.wait(60)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While open, they send; outside of it they end what they are at."""
        self._tell("go")
        try:
            yield
        finally:
            self._tell("stop")

    def _said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()


def work(port: int, clients: int, names: list[str]) -> None:
    """Send while standard input says so, and print how many answers of each status there were when it ends."""
    known = attacks()
    requests = [known[name]() for name in names or known]
    answers: Counter[int] = Counter()
    going = threading.Event()

    def client(number: int) -> None:
        for turn in itertools.count(number * len(requests) // clients):
            going.wait()
            answers[send(port, requests[turn % len(requests)])] += 1

    for number in range(clients):
        threading.Thread(target=client, args=(number,), daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        (going.set if line.strip() == "go" else going.clear)()
    print(json.dumps(answers), flush=True)
    os._exit(0)


def send(port: int, whole: bytes) -> int:
    """Send a request on a connection of its own; returns the status of the answer, 0 where there was none."""
    received = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=60) as connection,
    ):
        with contextlib.suppress(OSError):
            connection.sendall(whole)
        received = connection.recv(4096)
    return int(received[9:12]) if received.startswith(b"HTTP/1.1 ") else 0


def classify_seconds(server: Served, image: bytes) -> float:
    """Classify an image file, as a client does that means no harm; returns how long it took."""
    start = time.perf_counter()
    status, _, answer = ask(server, "POST", "/classify", image, Content_Type="image/png")
    assert status == 200, answer
    return time.perf_counter() - start


def peak_memory(process: int) -> int:
    """The most bytes that a process has had in memory, as Linux tells."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (line,) = [line for line in lines if "VmHWM" in line]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
