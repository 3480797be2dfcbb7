"""Write down which names TensorRT's Python module has, as the real bindings say it.

    make tensorrt
    PYTHONPATH=tests .venv/bin/python tests/data/write_tensorrt_api.py > tests/data/tensorrt_api.json

`tensorrt_stand_in.py` is held to it, and `test_real_tensorrt.py` compares it with the bindings.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import real_tensorrt
from tensorrt_names import RELEASES


def main() -> None:
    """Write the names of all releases, as JSON with one name on a line, so that releases can be compared."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("QUARTERMAP_TEST_FOLDER", folder)
        result = {release: real_tensorrt.read_api(release) for release in RELEASES}
    print("{")
    for last_release, (release, api) in _with_last(result):
        print(f" {json.dumps(release)}: {{")
        for kind in ("classes", "enums"):
            print(f"  {json.dumps(kind)}: {{")
            for last, (name, entry) in _with_last(api[kind]):
                print(f"   {json.dumps(name)}: {json.dumps(entry, sort_keys=True)}{'' if last else ','}")
            print("  },")
        print(f'  "functions": {json.dumps(api["functions"])}')
        print(f" }}{'' if last_release else ','}")
    print("}")


def _with_last(entries: dict[str, Any]) -> list[tuple[bool, tuple[str, Any]]]:
    """Entries, each with whether it is the last."""
    return [(index == len(entries) - 1, item) for index, item in enumerate(entries.items())]


if __name__ == "__main__":
    main()
