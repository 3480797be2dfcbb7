"""Checkpoints made to fill the memory, to run something or to end in a traceback."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_reader import Outcome, outcomes_of
from reference_models import tiny
from torch import Tensor, nn

from quartermap_deploy.architectures import create_model
from quartermap_deploy.architectures.checkpoint import read_checkpoint
from quartermap_deploy.errors import CheckpointError
from quartermap_deploy.weights import load_weights, read_weights, unwrap

MEMORY = 100
"""MiB that reading any of these files may take."""


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def digits() -> dict[str, Tensor]:
    return dict(create_model("vmamba_digits").state_dict())


def safetensors(header: Any, data: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def with_pickle(data: bytes, change: Callable[[bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """The same file with another pickle in it, or packed in another way."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", method) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return made.getvalue()


def holding_itself() -> dict[str, Any]:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content["state_dict"] = content
    return content


def level_upon_level() -> dict[str, Any]:
    """Eight ways to the next dictionary in each of sixty."""
    content: dict[str, Any] = {"epoch": 1}
    for _ in range(60):
        names = ("model", "state_dict", "net", "params", "model_ema", "state_dict_ema", "params_ema")
        content = {"epoch": 1, **dict.fromkeys(names, content)}
    return content


def deep() -> bytes:
    """Two hundred thousand dictionaries in each other: more than Python's stack has room for."""
    levels = 200_000
    inner = b"}X\x05\x00\x00\x00model" * levels + b"}" + b"s" * levels
    return with_pickle(saved({}), lambda _: b"\x80\x02" + inner + b".")


def copies() -> bytes:
    """A list of 300,000 pairs, given to a thousand dictionaries."""
    pairs = b"](" + b"NN\x86" * 300_000 + b"eq\x000"
    return b"\x80\x02" + pairs + b"ccollections\nOrderedDict\nh\x00\x85R" * 999 + b"."


def attributes() -> bytes:
    """A dictionary of 200,000 entries as the attributes of a thousand others."""
    entries = b"}(" + b"".join(b"J%sN" % struct.pack("<i", number) for number in range(200_000)) + b"uq\x000"
    return b"\x80\x02" + entries + b"ccollections\nOrderedDict\n)Rh\x00b" * 999 + b"."


HEAD = "classifier.head.weight"
ATTACKS: dict[str, Callable[[], bytes]] = {
    # 104 bytes that asked for a last layer of 20 GB: no class has a number, and there are five billion of them.
    "classes.safetensors": lambda: safetensors(
        {HEAD: {"dtype": "F32", "shape": [5_000_000_000, 0], "data_offsets": [0, 0]}}
    ),
    "channels.safetensors": lambda: safetensors(
        {"patch_embed.0.weight": {"dtype": "F32", "shape": [0, 10**12, 3, 3], "data_offsets": [0, 0]}}
    ),
    "header.safetensors": lambda: struct.pack("<Q", 90 << 20) + b"{}",
    "nested.safetensors": lambda: safetensors(b'{"a":' + b"[" * 100_000),
    "digits.safetensors": lambda: safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    # 1.5 kB whose tensors are one number each, expanded to gigabytes.
    "expanded.pth": lambda: saved({HEAD: torch.zeros(1).expand(2_400_000_000, 1)}),
    "fitting.pth": lambda: saved({**digits(), HEAD: torch.zeros(1).expand(30_000_000, 96)}),
    "overlapping.pth": lambda: saved(
        {f"layers.{place}.x": torch.zeros(60_000).as_strided((30_000, 30_000), (1, 1)) for place in range(9)}
    ),
    "deflated.pth": lambda: with_pickle(
        saved({HEAD: torch.zeros(200, 1_000_000)}), bytes, zipfile.ZIP_DEFLATED
    ),
    "deflated_pickle.pth": lambda: with_pickle(
        saved({}), lambda _: b"\x80\x02" + b"]" * 60_000_000 + b".", zipfile.ZIP_DEFLATED
    ),
    "lists.pth": lambda: with_pickle(saved({}), lambda _: b"\x80\x02" + b"]" * 20_000_000 + b"."),
    "sets.pth": lambda: with_pickle(saved({}), lambda _: b"\x80\x04" + b"\x8f" * 10_000_000 + b"."),
    "memo.pth": lambda: with_pickle(saved({}), lambda _: b"\x80\x02}r\xff\xff\xff\x7f."),
    "bytes.pth": lambda: with_pickle(
        saved({}), lambda _: b"\x80\x02c__builtin__\nbytearray\nI90000000000\n\x85R."
    ),
    "copies.pth": lambda: with_pickle(saved({}), lambda _: copies()),
    "attributes.pth": lambda: with_pickle(saved({}), lambda _: attributes()),
    "meta.pth": lambda: saved({HEAD: torch.empty(10**6, 10**6, device="meta")}),
    "sparse.pth": lambda: saved({HEAD: torch.sparse_coo_tensor(size=(10**6, 10**6))}),
    "nested.pth": lambda: saved({HEAD: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}),
    "quantised.pth": lambda: saved(
        {HEAD: torch.quantize_per_tensor(torch.zeros(10, 4), 0.1, 0, torch.qint8)}
    ),
    "itself.pth": lambda: saved(holding_itself()),
    "levels.pth": lambda: saved(level_upon_level()),
    "deep.pth": deep,
    # Python follows the tuples of a key without a look at its stack, and ended with them.
    "tuples.pth": lambda: with_pickle(saved({}), lambda _: b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns."),
    "tuples_by_calls.pth": lambda: with_pickle(
        saved({}),
        lambda _: (
            b"\x80\x02}N\x85q\x00"
            + b"0ctorch._utils\n_rebuild_parameter\n(h\x00\x85tRq\x00" * 60_000
            + b"Ns."
        ),
    ),
    "prefixes.pth": lambda: saved({"model." * 300_000: torch.zeros(1)}),
    "numbers.pth": lambda: saved({10**5000: torch.zeros(1), 3: {}}),
    "blocks.pth": lambda: saved({f"layers.{'9' * 5000}.blocks.1.x": torch.zeros(1)}),
    "tuple.pth": lambda: saved((torch.zeros(1),)),
    "old_expanded.pth": lambda: saved(
        {HEAD: torch.zeros(1).expand(2_400_000_000, 1)}, _use_new_zipfile_serialization=False
    ),
    "old_liar.pth": lambda: saved(
        {HEAD: torch.zeros(1_000_003)}, _use_new_zipfile_serialization=False
    ).replace(struct.pack("<I", 1_000_003), struct.pack("<I", 2_000_000_003)),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What came of reading all of them, one after the other in one process."""
    return outcomes_of(ATTACKS, tmp_path_factory.mktemp("attacks"))


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_in_little_memory(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.defect is None and outcome.message is not None
    assert name in outcome.message and len(outcome.message) < 2500
    assert outcome.peak < MEMORY


def test_the_first_ones_would_have_asked_for_gigabytes() -> None:
    assert len(ATTACKS["classes.safetensors"]()) < 120 and len(ATTACKS["expanded.pth"]()) < 2000


@pytest.mark.parametrize("zipped", [True, False])
def test_honest_views_and_shared_weights_are_read(tmp_path: Path, zipped: bool) -> None:
    """Parts of one storage, transposed ones, tied ones, a small expanded one, half precision and whole numbers."""
    base = torch.arange(24.0)
    state = {
        "part": base[4:10],
        "turned": base.view(4, 6).t(),
        "tied": base,
        "again": base,
        "mask": torch.tensor([-torch.inf]).expand(50, 50),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "index": torch.arange(5),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path / "a.pth").state
    assert list(found) == list(state)
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    """An ordered dictionary is given its pairs as a list there."""
    made = with_pickle(saved({}), lambda _: b"\x80\x02ccollections\nOrderedDict\n](](U\x05epochK\x03ee\x85R.")
    (tmp_path / "a.pth").write_bytes(made)
    with pytest.raises(CheckpointError, match=r"no state dict.*found epoch"):
        read_weights(tmp_path / "a.pth")


class Payload:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize(
    "function", [eval, __import__, getattr, print, torch.load, torch.hub.load, nn.Linear, pickle.loads, open]
)
def test_nothing_but_tensors_is_called(tmp_path: Path, function: Any) -> None:
    torch.save({"model": Payload(function, "x")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds a pickled .* could run code"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "program",
    [
        # Fields of a function of ours, of a class of ours, and of a tensor: what a pickle writes there is nobody's.
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\x00\x00\x00kindK\x01s\x86b.",
        b"ccollections\nOrderedDict\nN}X\x08\x00\x00\x00__init__K\x01s\x86b.",
        b"ccollections\nOrderedDict\n)R}X\x04\x00\x00\x00keysK\x01sb.",
        b"ctorch\nfloat32\n}X\x08\x00\x00\x00itemsizeK\x01sb.",
        b"cargparse\nNamespace\n)\x81}X\x04\x00\x00\x00nameK\x01sb.",
    ],
)
def test_a_pickle_changes_nothing_that_outlives_it(tmp_path: Path, program: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(with_pickle(saved({}), lambda _: b"\x80\x02" + program))
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "a.pth")
    torch.save({"model": tiny("v2").state_dict()}, tmp_path / "good.pth")
    assert read_checkpoint(tmp_path / "good.pth").state


def test_entries_may_not_lie_or_come_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="two entries"):
        read_weights(path)


def test_shapes_come_before_values(tmp_path: Path) -> None:
    """Whether a tensor is finite takes memory as large as it is, so its shape is looked at first."""
    state = {"weight": torch.full((1,), torch.nan).expand(10_000_000, 1), "bias": torch.zeros(2)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="1 of another shape: weight"):
        load_weights(nn.Linear(4, 2), tmp_path / "a.pth")


def test_a_dictionary_that_holds_itself_ends() -> None:
    assert unwrap(holding_itself()) == ("", {})
