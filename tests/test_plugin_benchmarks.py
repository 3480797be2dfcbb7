"""The benchmarks on a GPU, as far as they run without one: the public path, the gate before timing, tables, counts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import REPOSITORY
from reference_models import tiny
from torch import Tensor

import quartermap_deploy as qm
from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_2d_definition
from quartermap_deploy.scan.operators import selective_scan

FOLDER = REPOSITORY / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the scripts as they import each other."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def test_cross_scan_and_cross_merge_are_the_directions() -> None:
    """Around a scan of sequences they make the scan of the map; sequences by this package's operator."""
    public = script("public_path")
    batch, d_inner, height, width, states = 2, 3, 4, 5, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = 4 * d_inner
    x, dt = normal(batch, d_inner, height, width), normal(batch, wide, height, width)
    B, C = normal(batch, 4 * states, height, width), normal(batch, 4 * states, height, width)
    A, D, bias = -normal(wide, states).exp(), normal(wide), normal(wide) - 1

    def unrolled(maps: Tensor) -> Tensor:
        """Each direction's own maps in the order of its scan, (batch, 4, channels, L)."""
        by_direction = maps.unflatten(1, (4, -1))
        return torch.stack([public.cross_scan(by_direction[:, k])[:, k] for k in range(4)], dim=1)

    ys = selective_scan(
        public.cross_scan(x).flatten(1, 2),
        unrolled(dt).flatten(1, 2),
        A,
        unrolled(B),
        unrolled(C),
        D,
        bias,
        True,
    )
    y = public.cross_merge(ys.view(batch, 4, d_inner, -1), height, width)
    expected = selective_scan_2d_definition(x, dt, B, C, A, D, bias, None, DIRECTIONS, True)
    assert relative(y, expected) < 1e-12


@pytest.mark.parametrize("name", ["v2", "v2_channel_last", "v0"])
def test_forms_agree_with_the_model(name: str) -> None:
    """Unpruned and pruned, with our operator and on the public path, in float32 against the same in float64."""
    models = script("models")
    model = tiny(name)
    torch.manual_seed(1)
    for block in model.blocks():
        torch.nn.init.zeros_(block.mixer.Ds)
    images = torch.randn(2, 3, 44, 52)
    everywhere = qm.QuarterMap(every=1, exclude_stages=())
    pruned_outputs = qm.prune(model.double(), everywhere)(images.double())
    model = model.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "PLAN", everywhere)
        calls = models.make_forms(model, images, selective_scan)
        assert tuple(calls) == models.FORMS
        assert max(models.errors(model, images, calls).values()) < 1e-5
        assert relative(calls[models.FORMS[3]](), pruned_outputs.detach()) < 1e-5
        assert tuple(models.make_forms(model, images, None)) == models.FORMS[:2]


def test_the_gate_sees_a_wrong_public_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two directions exchanged, which logits of new weights would hardly show with a skip connection."""
    models, public = script("models"), script("public_path")
    model = models.make_model("vmamba_digits", "cpu", torch.float32)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    original = public.cross_merge
    monkeypatch.setattr(
        public, "cross_merge", lambda ys, height, width: original(ys[:, [0, 1, 3, 2]], height, width)
    )
    found = models.errors(model, images, models.make_forms(model, images, selective_scan))
    ours, wrong = models.FORMS[:2], models.FORMS[2:]
    models.require_parity({name: found[name] for name in ours}, 1e-4)
    with pytest.raises(SystemExit, match=r"FAILED.*public k=3"):
        models.require_parity({name: found[name] for name in wrong}, 5e-3)
    with pytest.raises(SystemExit, match="ours by nan"):
        models.require_parity({"ours": float("nan")}, 5e-3)


def test_models_keep_what_the_scan_takes_in_float32() -> None:
    models = script("models")
    model = models.make_model("vmamba_digits", "cpu", torch.float16)
    kinds = {name.rsplit(".", 1)[1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["A_logs"] == kinds["Ds"] == kinds["dt_projs_bias"] == torch.float32
    assert kinds["x_proj_weight"] == kinds["dt_projs_weight"] == kinds["weight"] == torch.float16


def test_the_table_of_models() -> None:
    models = script("models")
    ours, pruned, public, public_pruned = models.FORMS
    full = models.make_row("a", 8, {ours: 2000.0, pruned: 1000.0, public: 8000.0, public_pruned: 5000.0})
    assert full["milliseconds"][ours] == 2.0 and full["images_per_second"][ours] == pytest.approx(4000.0)
    assert list(full["ratios"].values()) == [4.0, 5.0, 2.0]
    # Without mamba-ssm the public forms were not run; one that the memory did not hold has no time.
    partial = models.make_row("b", 128, {ours: 3000.0, pruned: None})
    assert partial["milliseconds"] == {ours: 3.0, pruned: None, public: None, public_pruned: None}
    assert list(partial["ratios"].values()) == [None, None, None]
    json.dumps([full, partial], allow_nan=False)
    lines = models.markdown([full, partial]).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "every line has the same number of cells"
    assert lines[2] == "| a | 8 | 2.000 | 1.000 | 8.000 | 5.000 | 4.00 | 5.00 | 2.00 |"
    assert lines[3] == "| b | 128 | 3.000 | – | – | – | – | – | – |"


def test_the_table_of_scans() -> None:
    scans = script("selective_scan")
    row = scans.make_row("m", 1, 8, {"fused": 10.0, "full": 20.0, "public": 40.0}, 1_000_000, 400.0)
    assert row["speed"] == 4.0 and row["gb_per_second"] == 100.0 and row["share_of_copy"] == 0.25
    assert scans.line(row).split() == ["m", "1", "8", "10.0us", "20.0us", "40.0us", "4.00", "100", "25.0%"]
    missing = scans.make_row("m", 1, 8, {"fused": 10.0, "full": None, "public": None}, 1_000_000, 400.0)
    assert missing["speed"] is None and scans.line(missing).split()[4:7] == ["–", "–", "–"]


def test_the_public_path_of_one_scan_is_the_fused_one() -> None:
    """With the time step, B and C in scan order, as the public code has them."""
    scans, public = script("selective_scan"), script("public_path")
    batch, d_inner, side, rank = 2, 3, 5, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, wide = normal(batch, d_inner, side, side), 4 * d_inner
    sequences = [normal(batch, 4, count, side * side) for count in (rank, 1, 1)]
    maps = [
        torch.cat([_map_of(public, sequence[:, k], k, side) for k in range(4)], dim=1)
        for sequence in sequences
    ]
    parameters = [-normal(wide, 1).exp(), normal(wide), normal(wide) - 1, normal(wide, rank)]
    given = [x, *(sequence.reshape(batch, -1, side, side) for sequence in sequences), *parameters]
    y = scans.public(given, selective_scan)()
    A, D, bias, weight = parameters
    expected = selective_scan_2d_definition(x, *maps, A, D, bias, weight, DIRECTIONS, True)
    assert relative(y, expected) < 1e-12


def _map_of(public: ModuleType, sequence: Tensor, k: int, side: int) -> Tensor:
    """Put a sequence of direction k, (batch, channels, L), where its positions lie in the map."""
    places = public.cross_scan(torch.arange(side * side).view(1, 1, side, side))[0, k, 0]
    result = torch.empty_like(sequence)
    result[..., places] = sequence
    return result.view(*sequence.shape[:2], side, side)


def test_bytes_of_a_stage() -> None:
    traffic = script("traffic")
    stage = traffic.Stage(d_inner=96, side=56, rank=6)
    # Per position: x and y; 4 × 6 of dt; 4 of B and 4 of C. Parameters: 384 × (A, D, bias in float32; 6 in float16).
    assert traffic.fused_bytes(stage, 1) == 3136 * (192 + 24 + 8) * 2 + 384 * (12 + 12)
    steps = traffic.public_steps(stage, 8)
    assert steps["cross-scan"] == 8 * 3136 * (96 + 384) * 2
    assert steps["projection"] == 8 * 3136 * (24 + 384) * 2 + 384 * 12
    assert steps["selective scan"] == 8 * 3136 * (384 + 384 + 8 + 384) * 2 + 384 * 12
    assert steps["cross-merge"] == 8 * 3136 * (384 + 96) * 2


def test_the_tables_in_the_documents_are_those_of_the_script() -> None:
    traffic = script("traffic")
    printed = traffic.markdown(traffic.count(traffic.H100_BANDWIDTH, traffic.H100_INSTRUCTIONS))
    text = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    for table in printed.split("\n\n"):
        assert table in text, (
            "run python benchmarks/gpu/traffic.py and put its tables into docs/performance.md"
        )


@pytest.mark.parametrize("name", ["models", "selective_scan", "all"])
def test_without_a_gpu_they_say_so(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: this benchmark needs an NVIDIA GPU")
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=100)
    assert usage.returncode == 0 and "--json" in usage.stdout


def test_a_dry_run_says_what_would_be_done_and_what_is_missing() -> None:
    command = [sys.executable, str(FOLDER / "all.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    parts = [part.name for part in script("all").PARTS]
    assert lines[0].startswith(f"{len(parts)} parts, at most 480 s together")
    assert [line.strip().split(" ")[0] for line in lines[1 : len(parts) + 1]] == parts
    if not torch.cuda.is_available():
        assert any("onnxruntime" in line and "MISSING: " in line for line in lines)


def test_a_part_that_fails_or_hangs_ends_alone(tmp_path: Path) -> None:
    """One lacks its program, two are not possible here, and one never ends."""
    everything = script("all")
    by_name = {part.name: part for part in everything.PARTS}
    parts = [
        replace(by_name["rates"], missing=lambda folder: None),
        by_name["operator"],
        replace(by_name["rtx"], missing=lambda folder: "nothing here"),
    ]
    output = tmp_path / "all.json"
    results = everything.run_all(parts, tmp_path, 60.0, output)
    assert results["rates"]["state"] == "failed" and "rates" in results["rates"]["output"]
    assert results["operator"] == {"state": "skipped", "why": "the kernels were not built"}
    assert results["rtx"] == {"state": "skipped", "why": "nothing here"}
    assert json.loads(output.read_text()) == {"parts": results}
    program = tmp_path / everything.RATES
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    assert everything.run_part(parts[0], tmp_path, 1.5)["state"] == "out of time"
    late = everything.run_all(parts[:1], tmp_path, 0.5, None)
    assert late["rates"] == {"state": "skipped", "why": "no time was left"}


def test_no_time_is_reported_of_wrong_kernels(tmp_path: Path) -> None:
    everything = script("all")
    operator = next(part for part in everything.PARTS if part.name == "operator")
    (tmp_path / everything.LIBRARY).touch()
    assert "were not checked" in operator.missing(tmp_path)
    (tmp_path / everything.CHECKED).write_text("[true, false]")
    assert "wrong results" in operator.missing(tmp_path)
    (tmp_path / everything.CHECKED).write_text("[true, true]")
    assert operator.missing(tmp_path) is None


SASS = """
		Function : _Z6kernelPf
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                              /* 0x000fe20000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;         /* 0x0000000000007919 */
        /*0020*/                   MUFU.EX2 R2, R0 ;          /* 0x0000000000007919 */
        /*0030*/              @P1  BRA 0x60 ;                 /* 0x0000000000007919 */
        /*0040*/                   LDS R3, [R0] ;             /* 0x0000000000007919 */
        /*0050*/                   FFMA R3, R3, R2, R3 ;      /* 0x0000000000007919 */
        /*0060*/                   LDG.E R4, [R2.64] ;        /* 0x0000000000007919 */
        /*0070*/              @!P0 BRA 0x60 ;                 /* 0x0000000000007919 */
        /*0080*/              @P0  BRA 0x20 ;                 /* 0x0000000000007919 */
        /*0090*/                   EXIT ;                     /* 0x0000000000007919 */
        /*00a0*/                   BRA 0xa0;                  /* 0x0000000000007919 */
        /*00b0*/                   NOP;                       /* 0x0000000000007919 */
"""


def test_loops_and_branches_of_machine_code() -> None:
    code = script("machine_code")
    found = code.functions(SASS)
    assert list(found) == ["_Z6kernelPf"] and len(found["_Z6kernelPf"]) == 12
    function = code.body(found["_Z6kernelPf"])
    (outer,) = function.inside
    (inner,) = outer.inside
    assert [instruction.kind for instruction in function.own] == ["LDC", "S2R", "EXIT", "BRA"]
    assert [instruction.name for instruction in outer.own] == ["MUFU.EX2", "BRA", "LDS", "FFMA", "BRA"]
    assert [instruction.kind for instruction in inner.own] == ["LDG", "BRA"]
    assert outer.side_branch() == 2 and inner.side_branch() == 0
    times = [(loop.first, each) for loop, each in code.walk(function, lambda loop: 3 if loop is outer else 5)]
    assert times == [(0, 1.0), (0x20, 3.0), (0x60, 15.0)]


def loop(code: ModuleType, names: str, first: int, inside: tuple[Any, ...] = ()) -> Any:
    own = [code.Instruction(first + 16 * i, name) for i, name in enumerate(names.split())]
    return code.Loop(first, first + 10_000, tuple(own), inside)


def test_loops_over_states_are_counted() -> None:
    """By hand: a task of 28 elements, two chains of segments, and a team of 8 warps that walks 32 of them in turns."""
    code, counting = script("machine_code"), script("count_states")
    segments = loop(code, "LDS " * 4 + "FFMA " * 4 + "STS " * 4, 3000)
    state = loop(code, "MUFU.EX2 " * 30 + "FFMA " * 168 + "BAR.SYNC BAR.SYNC", 2000, (segments,))
    staging = loop(code, "LDG LDG LDG LDG STS STS STS STS", 1500)
    chunk = loop(code, "MUFU.EX2 " * 28 + "HFMA2 " * 52, 1000, (staging, state))
    function = code.Loop(0, 100_000, (), (chunk,) * 4)
    counts = counting.count_states(function, 7)
    each = 200 + 12 * 32 / 4 / 8
    assert counts["each state"] == pytest.approx(each / 28)
    assert counts["instructions"] == pytest.approx((80 + 2 * 8 + 16 * each) / 28)
    assert counts["special functions"] == pytest.approx((28 + 16 * 30) / 28)
    with pytest.raises(ValueError, match="3 walks over chunks"):
        counting.count_states(code.Loop(0, 100_000, (), (chunk,) * 3), 7)
    shuffles, totals = loop(code, "SHFL FFMA", 3000), loop(code, "LDS FSEL FFMA FFMA", 4000)
    general = loop(code, "MUFU.EX2 " * 14 + "SHFL SHFL", 2000, (shuffles, totals))
    counts = counting.count_general(code.Loop(0, 100_000, (), (general,)))
    assert counts["each state"] == pytest.approx((16 + 5 * 2 + 4 * 7 / 4) / 14)


def test_the_goals_are_met_by_what_was_counted() -> None:
    instructions = script("instructions")
    counted = json.loads(instructions.COUNTS.read_text(encoding="utf-8"))
    rows = counted["kernels"]
    assert counted["measured"] is False
    assert instructions.missed(rows) == []
    assert {row["architecture"] for row in rows} == set(instructions.ARCHITECTURES)
    resident = [row for row in rows if (row["kernel"], row["architecture"]) == ("resident", "90")]
    assert len(resident) == 16, "eight maps, two element types"
    assert all(row["counts"]["instructions"] > 10 for row in resident)
    spilling = [{**row, "spilled": 20} for row in resident]
    assert all("20 bytes are spilled" in words for words in instructions.missed(spilling))
    assert len(instructions.missed(spilling)) == 16
    # No card of 8.9 has room for a block of the largest map, so its spills are nobody's.
    assert len(instructions.missed([{**row, "architecture": "89"} for row in spilling])) == 12
    states = [row for row in rows if row["kernel"] == "states"]
    assert len(states) == 18 and all(row["counts"]["each state"] > 5 for row in states)
    general = [row for row in rows if row["kernel"] == "general"]
    assert len(general) == 6
    slower = [{**row, "counts": {**row["counts"], "instructions": 400.0}} for row in states]
    assert len(instructions.missed([*slower, *general])) == 18
    slow = {**resident[0], "type": "float16", "counts": {"instructions": float("nan")}}
    assert "at most" in instructions.missed([slow])[0]


def test_what_cannot_be_counted_is_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instructions = script("instructions")
    monkeypatch.setattr(instructions, "find_nvcc", lambda: "/bin/false")
    for words, said in (
        (["--architectures", "rubbish"], "'rubbish' is no architecture"),
        (["--architectures", "90", "75"], "'75' is no architecture"),
        (["--cuobjdump", "/nope"], "there is no file /nope"),
    ):
        monkeypatch.setattr("sys.argv", ["instructions.py", *words])
        with pytest.raises(SystemExit) as leaving:
            instructions.main()
        assert leaving.value.code == 2 and said in capsys.readouterr().err


def test_the_counts_in_the_documents_are_those_that_were_written() -> None:
    instructions = script("instructions")
    printed = instructions.markdown(json.loads(instructions.COUNTS.read_text(encoding="utf-8"))["kernels"])
    text = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    for table in printed.split("\n\n"):
        assert table in text, (
            "run python benchmarks/gpu/instructions.py --write and put its tables into docs/performance.md"
        )


def test_models_are_checked_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = script("models")
    for arguments, words in (
        (["--models", "vmamba_huge"], "unknown model vmamba_huge"),
        (["--batches", "0"], "no whole number of at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["models.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            models.main()
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
