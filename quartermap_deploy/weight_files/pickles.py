"""Reading the pickles of `torch.save` without running anything: a few names mean values of ours, and no other does.

A pickle is a program that builds values. What it may call is in a table here: functions that note what a tensor is
like, and dictionaries. They are made anew for each pickle, so that what it does to them is gone with it. Before it
runs, its operations are counted, so that it takes no more memory than a checkpoint's may.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from quartermap_deploy.weight_files.stored import CodeError, OtherTensor, Storage, WeightsError, stored_tensor

LARGEST = 64 << 20
"""Bytes of a pickle. That of a checkpoint has a hundred for each tensor."""
LARGEST_IN_MEMORY = 256 << 20
"""Bytes that what it builds takes at most."""
_COST, _COST_OF_SET = 64, 256
"""Bytes that an operation takes at most, and one that makes a set."""
_LONGEST_WHOLE, _MOST_LONG = 8, 1000
"""Bytes of a whole number, and how many longer ones there may be: thousands of them can be made to lie in one place of
a dictionary. The states of random generators have some."""

_REFUSED = frozenset({"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"})
"""Operations that call something, and that `torch.save` does not write."""
_KNOWN = frozenset(
    (
        *("PROTO", "STOP", "FRAME", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *(
            "UNICODE",
            "BINUNICODE",
            "SHORT_BINUNICODE",
            "BINUNICODE8",
            "EMPTY_LIST",
            "LIST",
            "APPEND",
            "APPENDS",
        ),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *(
            "EMPTY_SET",
            "ADDITEMS",
            "FROZENSET",
            "GET",
            "BINGET",
            "LONG_BINGET",
            "PUT",
            "BINPUT",
            "LONG_BINPUT",
        ),
        *("MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    )
)

_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128", "bool"),
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
)
_STORAGES = {
    **{"Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "Bool": "bool"},
    **{"Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
    **{"QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32"},
    **{"QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"},
}
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_qtensor": "quantised",
    "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_wrapper_subclass": "wrapped",
    "_rebuild_device_tensor_from_cpu_tensor": "device",
    "_rebuild_device_tensor_from_numpy": "device",
}
"""Functions that make tensors that are no weights as they are, by their kind."""

_MOST_COPIED = 1_000_000
"""Entries of dictionaries that are given at once."""
UNTYPED = "bytes"
"""In the place of a type of numbers, where a storage has none."""

FindStorage = Callable[[Any], Storage]


def end_of_pickle(data: bytes, start: int = 0) -> int:
    """Return where a pickle ends, after a look at each of its operations.

    Raises:
        CodeError: if it has an operation that `torch.save` does not write, and that calls something, or if it is cut
            off after the name of something.
        WeightsError: if it has no end or another such operation, or what it builds would be too large.
    """
    cost = count = long = 0
    named = ""
    file = io.BytesIO(data)
    file.seek(start)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file), 1):
            name = operation.name
            if name in _REFUSED:
                raise CodeError
            if name not in _KNOWN:
                raise WeightsError(f"it has the operation {name}, which torch.save does not write")
            cost += _COST_OF_SET if name in ("EMPTY_SET", "FROZENSET") else _COST
            if isinstance(argument, (str, bytes, bytearray)):
                # A character takes four bytes where one of a text needs them.
                cost += 4 * len(argument)
                if name == "GLOBAL" and (called := str(argument).replace(" ", ".")) not in _HARMLESS:
                    named = named or called
            elif type(argument) is int:
                long += argument.bit_length() > 8 * _LONGEST_WHOLE
                # The place of a value that is needed again; Python makes room for all below it.
                if name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
                    raise WeightsError(f"it keeps value {count} in place {argument}")
            if cost > LARGEST_IN_MEMORY or long > _MOST_LONG:
                raise WeightsError("what it builds would be too large for a checkpoint")
    except WeightsError:
        raise
    except Exception as error:  # genops raises errors of several kinds on what is no pickle
        if named and all(part.isidentifier() for part in named.split(".")):
            raise CodeError(named) from error
        raise WeightsError(f"its pickle is damaged: {error}") from error
    return file.tell()


def unpickle(data: bytes, find_storage: FindStorage | None = None) -> Any:
    """Build what one pickle says.

    Args:
        data: the pickle, at which `end_of_pickle` looked.
        find_storage: gives the storage for what the pickle calls it; None where there are none.

    Returns:
        Plain values, with `StoredTensor` and `OtherTensor` for tensors, and objects without meaning for others.

    Raises:
        CodeError: if it names anything that is not in the table.
        WeightsError: if it is damaged.
    """
    table = _table()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (found := table.get(f"{module}.{name}")) is None:
                raise CodeError(f"{module}.{name}")
            return found

        def persistent_load(self, name: Any) -> Any:
            if find_storage is None:
                raise WeightsError("it has a tensor where none belongs")
            return find_storage(name)

    try:
        return Reader(io.BytesIO(data), encoding="utf-8").load()
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle does anything with the functions of the table
        raise WeightsError(f"its pickle is damaged: {error}") from error


class _Call:
    """What a name means that is called; a pickle cannot change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *values: Any) -> Any:
        return self._function(*values)

    def __setstate__(self, state: Any) -> None: ...


def _table() -> dict[str, Any]:
    """What the names in a pickle mean, made anew."""
    copied = 0

    class Ordered(OrderedDict[Any, Any]):
        def __init__(self, pairs: Any = ()) -> None:
            # Python 2 gives the pairs here; a list of them may be given a thousand times.
            nonlocal copied
            copied += len(pairs)
            if copied > _MOST_COPIED:
                raise WeightsError("what it builds would be too large for a checkpoint")
            super().__init__(pairs)

        def __setstate__(self, state: Any) -> None: ...

    class Meaningless:
        __slots__ = ()

        def __init__(self, *values: Any) -> None: ...

        def __setstate__(self, state: Any) -> None: ...

    table: dict[str, Any] = {
        "collections.OrderedDict": Ordered,
        "yacs.config.CfgNode": Ordered,
        "torch._utils._rebuild_tensor": _Call(_tensor),
        "torch._utils._rebuild_tensor_v2": _Call(_tensor),
        "torch._utils._rebuild_tensor_v3": _Call(_typed_tensor),
        "torch._utils._rebuild_parameter": _Call(lambda data, *rest: data),
        "torch._utils._rebuild_parameter_with_state": _Call(lambda data, *rest: data),
        "torch._tensor._rebuild_from_type_v2": _Call(
            lambda function, kind, arguments, state: function(*arguments)
        ),
    }
    for name, kind in _OTHER_TENSORS.items():
        table[f"torch._utils.{name}"] = _Call(lambda *values, kind=kind: OtherTensor(kind))
    return {**_TYPES, **table, **dict.fromkeys(_MEANINGLESS, Meaningless)}


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None, hooks: Any = None, view: Any = None
) -> Any:
    return _typed_tensor(storage, offset, size, stride, grad, hooks, getattr(storage, "dtype", None), view)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, view: Any = None
) -> Any:
    if view:
        return OtherTensor("conjugated or negated")
    return stored_tensor(storage, dtype, offset, size, stride)


_TYPES: dict[str, Any] = {
    **{f"torch.{name}": getattr(torch, name) for name in _DTYPES if hasattr(torch, name)},
    **{
        f"{module}.{name}Storage": getattr(torch, dtype)
        for name, dtype in _STORAGES.items()
        for module in ("torch", "torch.cuda", "torch.storage")
    },
    **dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), UNTYPED),
}
"""Types of numbers, which cannot be changed."""
_MEANINGLESS = (
    *(
        "argparse.Namespace",
        "collections.Counter",
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
    ),
    *("torch.nn.parameter.Parameter", "torch.serialization._get_layout"),
    *(
        f"torch.per_{kind}"
        for kind in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")
    ),
    "torch.per_channel_affine_float_qparams",
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("set", "bytearray", "complex")
    ),
)
"""What is found beside weights, and does not matter."""
_HARMLESS = frozenset(_table())
"""All names that mean something here."""
