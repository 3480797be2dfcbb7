"""Files of `torch.save`: zip files, and what PyTorch wrote before 1.6."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quartermap_deploy.archives import ArchiveError, is_archive, opened_archive, stored_places
from quartermap_deploy.weight_files.pickles import LARGEST, UNTYPED, end_of_pickle, unpickle
from quartermap_deploy.weight_files.stored import Content, Storage, WeightsError

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
"""What the old files begin with."""


class ProgramError(WeightsError):
    """A whole program; the message says of which kind, and how its weights are had."""


def read_torch_file(path: Path) -> Content:
    """Read what a file of `torch.save` holds; no number of its tensors is.

    Raises:
        CodeError: if it names anything else than tensors and plain values.
        ProgramError: if it is a program of TorchScript or torch.export.
        WeightsError: if it is damaged, compressed or something else.
        OSError: if it cannot be read.
    """
    return _read_zip(path) if is_archive(path) else _read_old(path)


def _read_zip(path: Path) -> Content:
    try:
        with opened_archive(path) as archive:
            _refuse_programs(archive.namelist())
            places = stored_places(archive)
    except ArchiveError as error:
        raise WeightsError(str(error)) from error
    pickles = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"it has {len(pickles)} entries data.pkl, expected 1")
    root = pickles[0].removesuffix("data.pkl")
    with path.open("rb") as file:
        if _bytes(file, places.get(f"{root}byteorder", (0, 0)), 8) == b"big":
            raise WeightsError("its numbers are in the order of another kind of machine (big-endian)")
        data = _bytes(file, places[pickles[0]], LARGEST)
    stored = {name.removeprefix(f"{root}data/"): place for name, place in places.items()}

    def find(name: Any) -> Storage:
        storage = _storage(name)
        if storage.key not in stored or storage.bytes > stored[storage.key][1]:
            raise WeightsError(f"it has no {storage.bytes:,} bytes of the name {storage.key[:80]!r}")
        return storage

    return Content(path, unpickle(data[: end_of_pickle(data)], find), stored)


def _bytes(file: Any, place: tuple[int, int], largest: int) -> bytes:
    start, size = place
    if size > largest:
        raise WeightsError(f"it has an entry of {size:,} bytes, where at most {largest:,} are expected")
    file.seek(start)
    return bytes(file.read(size))


def _refuse_programs(names: list[str]) -> None:
    """Refuse a whole program, which is a zip file as weights are, and holds some too."""
    inner = {name.partition("/")[2] for name in names}
    kind, load = "", ""
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        kind, load = "a TorchScript archive", "torch.jit.load(…)"
    elif {"archive_format", "models/model.json"} & inner or "serialized_exported_program.json" in names:
        kind, load = "a program of torch.export", "torch.export.load(…).module()"
    if kind:
        raise ProgramError(
            f"is {kind}, not weights; give the checkpoint that it was made from, or save {load}.state_dict() with "
            "torch.save and give that file"
        )


def _storage(name: Any) -> Storage:
    """What a pickle calls a storage: ("storage", type, key, device, how many numbers)."""
    if not isinstance(name, tuple) or len(name) != 5 or name[0] != "storage":
        raise WeightsError("it names its numbers in a way that torch.save does not")
    _, kind, key, _, count = name
    if not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 60:
        raise WeightsError("it names its numbers in a way that torch.save does not")
    if kind == UNTYPED:
        return Storage(key, None, 0, count)
    if not isinstance(kind, torch.dtype):
        raise WeightsError("it has numbers without a type")
    return Storage(key, kind, 0, count * kind.itemsize)


def _read_old(path: Path) -> Content:
    """Four pickles, the last but one with the values, then the storages: each its length in numbers, and these."""
    with path.open("rb") as file:
        data = file.read(LARGEST)
    found: dict[str, Storage] = {}

    def find(name: Any) -> Storage:
        view = name[5] if isinstance(name, tuple) and len(name) == 6 else None
        storage = _storage(name[:5] if isinstance(name, tuple) else name)
        if found.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"it has two storages of the name {storage.key[:80]!r}")
        return storage if view is None else _part(storage, view)

    start, head = 0, []
    for _ in range(3):
        end = end_of_pickle(data, start)
        head.append(unpickle(data[start:end]))
        start = end
        if head[0] != _MAGIC or head[1:2] not in ([], [_VERSION]):
            raise WeightsError("it does not begin as files of torch.save do")
    if not isinstance(head[2], Mapping) or head[2].get("little_endian") is not True:
        raise WeightsError("its numbers are in the order of another kind of machine (big-endian)")
    end = end_of_pickle(data, start)
    values = unpickle(data[start:end], find)
    start, end = end, end_of_pickle(data, end)
    return Content(path, values, _old_places(path, unpickle(data[start:end]), end, found))


def _part(storage: Storage, view: Any) -> Storage:
    """A part of a storage: (key, first number, how many)."""
    if not isinstance(view, tuple) or len(view) != 3 or storage.dtype is None:
        raise WeightsError("it names its numbers in a way that torch.save does not")
    _, first, count = view
    if not all(type(value) is int and 0 <= value < 1 << 60 for value in (first, count)):
        raise WeightsError("it names its numbers in a way that torch.save does not")
    width = storage.dtype.itemsize
    if (first + count) * width > storage.bytes:
        raise WeightsError("it has a view of numbers that are not there")
    return Storage(storage.key, storage.dtype, first * width, count * width)


def _old_places(
    path: Path, keys: Any, start: int, found: Mapping[str, Storage]
) -> dict[str, tuple[int, int]]:
    """Where the storages lie, in the order of their keys; each begins with the number of its numbers."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(found):
        raise WeightsError("it lists other numbers than its tensors have")
    places = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        for key in keys:
            file.seek(start)
            head = file.read(8)
            storage = found[key]
            width = 1 if storage.dtype is None else storage.dtype.itemsize
            if len(head) < 8 or struct.unpack("<q", head)[0] * width != storage.bytes:
                raise WeightsError("the lengths of its numbers are not what its tensors say")
            places[key] = start + 8, storage.bytes
            start += 8 + storage.bytes
            if start > size:
                raise WeightsError("it ends too early")
    return places
