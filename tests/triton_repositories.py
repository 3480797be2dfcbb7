"""Reading a repository for Triton as Triton does: by its own protobuf, which its client brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

Array = np.ndarray[Any, Any]

TYPES = {
    "TYPE_FP32": np.dtype("<f4"),
    "TYPE_FP16": np.dtype("<f2"),
    "TYPE_INT64": np.dtype("<i8"),
    "TYPE_BOOL": np.dtype("?"),
}


def read_config(repository: Path, model: str) -> Any:
    """Read a model's configuration; an unknown field is an error."""
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def models(repository: Path) -> list[str]:
    """The models of a repository: to Triton every folder in it is one."""
    return sorted(path.name for path in repository.iterdir() if path.is_dir())


def warmup_batch(repository: Path, model: str, sample: Any, name: str) -> Array:
    """The batch that Triton makes of a warm-up sample: one request for each, all with the same data, put together."""
    config = read_config(repository, model)
    meta = sample.inputs[name]
    data = (repository / model / "warmup" / meta.input_data_file).read_bytes()
    kind = model_config_pb2.DataType.Name(meta.data_type)
    one = np.frombuffer(data, dtype=TYPES[kind]).reshape(tuple(meta.dims))
    if config.max_batch_size == 0:
        assert sample.batch_size == 1
        return one
    assert 1 <= sample.batch_size <= config.max_batch_size
    return np.stack([one] * sample.batch_size)
