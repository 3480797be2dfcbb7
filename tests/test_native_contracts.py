"""What a native library says of itself, compared with what this package knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quartermap_deploy.native import check
from quartermap_deploy.native.contract import CONTRACT, differences
from quartermap_deploy.native.errors import PluginError
from quartermap_deploy.native.library import served_tensorrt


def test_a_contract_differs_by_what_this_package_knows() -> None:
    same = CONTRACT.to_dict()
    assert differences({**same, "more": 1}) == []
    assert differences({**same, "kernels": 1}) == ["kernels: the library has 1, this package 4"]
    del same["element_types"]
    assert differences(same) == [
        "element_types: the library has None, this package ['float32', 'float16', 'bfloat16']"
    ]
    assert same["fields"] == [{"name": "directions", "type": "CHAR"}, {"name": "softplus", "type": "INT32"}]
    assert {entry["name"]: (entry["type"], entry["optional"]) for entry in same["inputs"]} == {
        "x": ("T", False),
        "dt": ("T", False),
        "B": ("T", False),
        "C": ("T", False),
        "A": ("float32", False),
        "D": ("float32", False),
        "dt_bias": ("float32", False),
        "dt_weight": ("T", True),
    }


def test_a_registry_has_to_list_the_plugin_with_its_fields() -> None:
    fields = (("directions", "CHAR"), ("softplus", "INT32"))
    good = check.Creator("SelectiveScan2D", "1", "quartermap", fields)
    other = check.Creator("SelectiveScan2D", "1", "quartermap", fields[:1])
    check._compare((other, good), Path("p.so"))
    with pytest.raises(PluginError, match="registers nothing; expected Creator"):
        check._compare((), Path("p.so"))
    with pytest.raises(PluginError, match=r"registers \[Creator"):
        check._compare((other,), Path("p.so"))


def test_a_plugin_library_is_reported_by_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    contract: dict[str, Any] = {"kernels": 1}
    both = {"getCreators": None, "setLoggerFinder": None}
    asked: list[Any] = []

    def checked(build_: dict[str, Any] | None, exported: Any, module: Any = None) -> check.PluginReport:
        own = dict(contract) if build_ is None else {**contract, "build": build_}
        monkeypatch.setattr(check, "load", lambda path: SimpleNamespace(**dict.fromkeys(exported)))
        monkeypatch.setattr(check, "describe", lambda library, path: own)
        monkeypatch.setattr(check, "differences", lambda found: [] if found == contract else ["other"])
        monkeypatch.setattr(check, "_first_module", lambda: module)
        return check.check_plugin(Path("p.so"))

    def registered(*given: Any) -> tuple[check.Creator, ...]:
        asked.append(given)
        return (check.Creator("SelectiveScan2D", "1", "quartermap", ()),)

    monkeypatch.setattr(check, "_registered", registered)
    monkeypatch.setattr(check, "_compare", lambda *given: asked.append(given))
    found = checked(None, both)
    assert found.to_dict() == {
        "path": "p.so",
        "contract": contract,
        "build": {},
        "registry": None,
        "creators": (),
        "note": "kernels only: this library holds no TensorRT plugin",
    }
    served = {"tensorrt": ["10"]}
    for exported in ((), ("getCreators",), ("setLoggerFinder",)):
        with pytest.raises(PluginError, match=r"p\.so does not export getCreators and setLoggerFinder"):
            checked(served, exported)
    found = checked(served, both)
    assert (found.build, found.registry, found.creators, found.note) == (
        served,
        None,
        (),
        check.WITHOUT_REGISTRY,
    )
    assert asked == []
    module = SimpleNamespace(__name__="tensorrt", __version__="10.9")
    found = checked(served, both, module)
    assert (found.contract, found.build, found.note) == (contract, served, None)
    assert found.registry == "tensorrt 10.9" and [item.name for item in found.creators] == ["SelectiveScan2D"]
    assert asked == [(module, Path("p.so")), (found.creators, Path("p.so"))]
    contract["kernels"] = 2
    monkeypatch.setattr(check, "describe", lambda library, path: {"kernels": 3})
    with pytest.raises(
        PluginError, match=r"(?s)does not fit this release.*quartermap plugin build\n  other$"
    ):
        check.check_plugin(Path("p.so"))


def test_which_tensorrt_a_library_serves() -> None:
    path = Path("p.so")
    assert served_tensorrt({}, path) == () == served_tensorrt({"tensorrt": []}, path)
    assert served_tensorrt({"tensorrt": ["10", "rtx"]}, path) == ("10", "rtx")
    for found in ("10", 10, [10], ["10", 11], {"10": 1}):
        with pytest.raises(PluginError, match=r"p\.so"):
            served_tensorrt({"tensorrt": found}, path)
