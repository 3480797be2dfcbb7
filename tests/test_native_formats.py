"""Which files are libraries for here: formats by hand-made heads, and the seal behind a library."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from library_heads import ARM, X86, elf

from quartermap_deploy.native import library_format
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import CPU, PLUGIN, check_bytes, inspect
from quartermap_deploy.native.library_format import FormatError, check_format
from quartermap_deploy.native.seal import SealError, check_seal, sealed


@pytest.fixture
def on_linux_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.ELF)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.usefixtures("on_linux_x86")
def test_an_elf_library_ends_where_its_last_table_or_segment_does() -> None:
    two = elf([(0, 100), (100, 200)])
    assert len(two) == 176
    check_format(two.ljust(300, b"\0"))
    with pytest.raises(FormatError, match="it has 299 bytes of 300"):
        check_format(two.ljust(299, b"\0"))
    check_format(elf([(0, 10), (0, 5)]))
    with pytest.raises(FormatError, match="it has 176 bytes of 501"):
        check_format(elf([(500, 1), (0, 5)]))
    # The headers of sections may lie behind everything.
    check_format(elf([(0, 10)], sections=(200, 2)).ljust(328, b"\0"))
    with pytest.raises(FormatError, match="it has 327 bytes of 328"):
        check_format(elf([(0, 10)], sections=(200, 2)).ljust(327, b"\0"))
    # So may those of segments, where the file is cut off within them.
    with pytest.raises(FormatError, match="it has 100 bytes of 176"):
        check_format(two[:100])
    # Without segments their headers' size says nothing.
    check_format(elf([]))
    check_format(elf([], header=0))


@pytest.mark.usefixtures("on_linux_x86")
def test_elf_files_that_are_no_library_for_here() -> None:
    for data, words, elsewhere in (
        (elf([], machine=ARM), "another kind of machine than this x86_64", True),
        (elf([], kind=2), "is no shared library", False),
        (elf([], order=2), "another kind of machine", True),
        (elf([(0, 1)], header=32), "has program headers of 32 bytes, expected 56", False),
        (elf([])[:63], "is no 64-bit ELF library", False),
        (b"\x7fELF\x01" + bytes(100), "is no 64-bit ELF library", False),
        (b"MZ" + bytes(100), "is no 64-bit ELF library", False),
    ):
        with pytest.raises(FormatError, match=words) as caught:
            check_format(data)
        assert caught.value.elsewhere is elsewhere


def test_machines_go_by_several_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.ELF)
    for name, fits in (("x86_64", X86), ("AMD64", X86), ("aarch64", ARM), ("arm64", ARM)):
        monkeypatch.setattr("platform.machine", lambda name=name: name)
        check_format(elf([], machine=fits))
        with pytest.raises(FormatError, match=f"than this {name}"):
            check_format(elf([], machine=X86 + ARM - fits))
    # Of a machine that is not known nothing can be said.
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    check_format(elf([], machine=243))


def mach_o(*commands: bytes, kind: int = 6, machine: int = 0x0100_000C) -> bytes:
    size = sum(map(len, commands))
    return struct.pack("<8I", 0xFEED_FACF, machine, 0, kind, len(commands), size, 0, 0) + b"".join(commands)


def segment(offset: int, length: int) -> bytes:
    return struct.pack("<II16s4Q4I", 0x19, 72, b"__TEXT", 0, 0, offset, length, 0, 0, 0, 0)


def test_a_library_for_macos_ends_where_its_last_segment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.MACH_O)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    other = struct.pack(
        "<IIQQQQQQ", 0x1B, 56, 0, 0, 0, 0, 9_000, 9_000
    )  # no segment, whatever it holds there
    whole = mach_o(other, segment(0, 100), segment(100, 300))
    check_format(whole.ljust(400, b"\0"))
    with pytest.raises(FormatError, match="it has 399 bytes of 400"):
        check_format(whole.ljust(399, b"\0"))
    check_format(mach_o(segment(0, 1), kind=8))
    for data, words in (
        (mach_o(segment(0, 1), kind=2), "no shared library"),
        (mach_o(segment(0, 1), machine=0x0100_0007), "than this arm64"),
        (mach_o(struct.pack("<II", 0x1B, 4).ljust(64, b"\0")), "a load command of 4 bytes, expected 8"),
        (mach_o(segment(0, 1), segment(0, 1))[:140], "is cut short"),
    ):
        with pytest.raises(FormatError, match=words):
            check_format(data)
    check_format(mach_o(struct.pack("<II", 0x1B, 8), segment(0, 1)))


def pe(*sections: tuple[int, int], flags: int = 0x2022, optional: int = 16) -> bytes:
    header = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 72).ljust(12, b"\0") + b"PE\0\0"
    header += struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, optional, flags) + bytes(optional)
    tables = (struct.pack("<8sIIII16x", b".text", 0, 0, length, offset) for length, offset in sections)
    return header + b"".join(tables)


def test_a_library_for_windows_ends_where_its_last_section_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_format, "_HERE", library_format.PE)
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    whole = pe((100, 300), (7, 200))
    assert len(whole) == 72 + 24 + 16 + 80
    check_format(whole.ljust(400, b"\0"))
    with pytest.raises(FormatError, match="it has 399 bytes of 400"):
        check_format(whole.ljust(399, b"\0"))
    with pytest.raises(FormatError, match="no shared library"):
        check_format(pe((1, 1), flags=0x0022))
    with pytest.raises(FormatError, match="is cut short"):
        check_format(pe((1, 1), (1, 1))[:170])
    with pytest.raises(FormatError, match="is no 64-bit PE library"):
        check_format(pe((1, 1)).replace(b"PE\0\0", b"NE\0\0"))


@pytest.mark.usefixtures("on_linux_x86")
def test_a_library_is_ours_by_the_name_of_its_function() -> None:
    name = CPU.contract.encode()
    for before in (b"\0", b"\0_"):
        check_bytes(sealed(elf([]) + before + name + b"\0"), "it", CPU)
    for text in (b"\0" + name + b"2\0", b"x" + name + b"\0", b"\0" + PLUGIN.contract.encode() + b"\0"):
        with pytest.raises(PluginError, match="it is a library, but no CPU library of quartermap-deploy"):
            check_bytes(elf([]) + text, "it", CPU)
    with pytest.raises(
        PluginError, match="but no plugin of quartermap-deploy: it has no function quartermap_plugin"
    ):
        check_bytes(elf([]), "it")
    with pytest.raises(
        PluginError, match=r"it is no shared library; it is damaged or no library; build it here"
    ):
        check_bytes(elf([], kind=2), "it")
    with pytest.raises(PluginError, match=r"than this x86_64; build it here: quartermap plugin build"):
        check_bytes(elf([], machine=ARM), "it")


def test_files_that_are_none_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="is a folder; name the library in it"):
        inspect(tmp_path)
    with pytest.raises(PluginError, match=r"there is no CPU library .*; `quartermap native build` makes one"):
        inspect(tmp_path / "none.so", CPU)


def test_a_seal_is_broken_by_any_change() -> None:
    data = sealed(b"a library")
    check_seal(data, required=True)
    assert data.startswith(b"a library") and sealed(data) == data != sealed(b"a librarz")
    for place in range(9):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(SealError, match="is damaged"):
            check_seal(bytes(changed), required=False)
    for none in (b"", b"a library", data[:-1], data + b"\0"):
        check_seal(none, required=False)
        with pytest.raises(SealError, match="no checksum"):
            check_seal(none, required=True)


def test_a_plugin_may_be_without_a_seal_and_not_with_a_broken_one() -> None:
    library = elf([]) + b"\0" + PLUGIN.contract.encode() + b"\0"
    check_bytes(library, "it")
    check_bytes(sealed(library), "it")
    with pytest.raises(PluginError, match=r"it is damaged.*nothing of it was run.*plugin build"):
        check_bytes(b"\x7f" + sealed(library)[1:60] + b"\1" + sealed(library)[61:], "it")
