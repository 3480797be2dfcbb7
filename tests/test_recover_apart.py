"""`recover_2d` on scans that are no whole map summed in place: one SelectiveScan2D for each direction, or none at all.

The modules are narrow, so that the tests are quick, and what is too narrow is set for them; wide ones are among the
`spellings`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from helpers import error, run
from onnx import numpy_helper
from scan_modules import APART, Apart, Gates, QuarterCalls, Quarters, Together, Windows
from test_planted_recovery import PROJECTED, Change, Fault, everywhere, planted
from test_recover_2d import assert_same, picture, scan_nodes
from torch import Tensor
from tracing import INPUT, traced

from quartermap_deploy.compiling.cases import validation_cases
from quartermap_deploy.compiling.parity import parity_of
from quartermap_deploy.errors import PassError
from quartermap_deploy.exporting.export import Export, export
from quartermap_deploy.lowering.operator import SELECTIVE_SCAN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes import CANONICAL, OPTIMIZED, Selection, lower, run_passes
from quartermap_deploy.passes.recover_2d import Recovered, recover_2d
from quartermap_deploy.passes.recovery import apart as recovery
from quartermap_deploy.pruning.plan import QuarterMap, Subsample
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.sources.modules import ModuleSource, module_source
from quartermap_deploy.validation.parity import ParityReport

CHANNELS = Apart.channels
HEIGHT, WIDTH = 4, 6
LIMITS = ("NARROWEST", "NARROWEST_IN_LINES", "NARROWEST_UNROLLED")


@pytest.fixture(autouse=True, scope="module")
def every_width_pays() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in LIMITS:
            patch.setattr(recovery, name, 0)
        yield


@functools.cache
def apart(sides: bool) -> tuple[Together, onnx.ModelProto, Recovered]:
    """Return the modules side by side, their traced graph and what was recovered."""
    module = Together([make(seed, bool(seed % 2)) for seed, make in enumerate(APART.values())])
    model = traced(module, 2, CHANNELS, HEIGHT, WIDTH, sides=sides)
    return module, model, recover_2d(model)


@pytest.mark.parametrize("sides", [False, True])
def test_each_direction_becomes_a_scan_of_its_own_map(sides: bool) -> None:
    module, _, recovered = apart(sides)
    assert scan_nodes(recovered.model) == {
        f"block_{block}/scan/{place}": SELECTIVE_SCAN_2D
        for block in range(1, len(APART) + 1)
        for place in range(1, 5)
    }
    shapes = [(1, CHANNELS, 6, 4), (3, CHANNELS, 2, 8)] if sides else [(1, CHANNELS, 4, 6)]
    assert_same(recovered.model, module, (2, CHANNELS, 4, 6), *shapes)
    onnx.checker.check_model(lower(recovered.model), full_check=True)
    ranks = {
        tensor.name: tensor.dims[1] for tensor in recovered.model.graph.initializer if len(tensor.dims) == 2
    }
    for node in recovered.model.graph.node:
        if node.op_type == SELECTIVE_SCAN_2D:
            assert ranks[node.input[7]] == 1


def test_parts_of_the_map_are_taken_by_a_slice_and_whole_maps_as_they_are() -> None:
    _, _, recovered = apart(False)
    made = {name: node for node in recovered.model.graph.node for name in node.output}
    scans = {node.name: node for node in recovered.model.graph.node if node.op_type == SELECTIVE_SCAN_2D}
    assert [made[scans[f"block_1/scan/{place}"].input[0]].op_type for place in range(1, 5)] == ["Slice"] * 4
    assert len({scans[f"block_2/scan/{place}"].input[0] for place in range(1, 5)}) == 1
    # Of windows, the directions along rows are taken from the map, the others from the sequences.
    assert [made[scans[f"block_3/scan/{place}"].input[0]].op_type for place in (2, 4)] == ["Unsqueeze"] * 2
    assert scans["block_3/scan/1"].input[0] == scans["block_3/scan/3"].input[0]


def test_the_report_says_one_direction_each() -> None:
    report = apart(False)[2].report
    assert [scan.refused for scan in report.scans] == [None] * len(APART)
    assert [scan.apart for scan in report.scans] == [True] * len(APART)
    quarters, gates, windows = (scan.describe() for scan in report.scans)
    assert quarters.startswith(
        "block_1/scan: one direction each: row (every 2. row from 0, every 2. column from 0), "
        "column (every 2. row from 1, every 2. column from 0), row (every 2. row from 0, every 2. column from 1), "
    )
    assert "of 8×4×6, state 2, time step of rank 1, from " in quarters
    assert "one direction each: row, column, row_reverse, column_reverse of 8" in gates
    assert "one direction each: row, another order, row_reverse, another order of 8" in windows
    assert report.changed == [quarters, gates, windows] and not report.refused


@pytest.mark.parametrize(
    ("make", "limit"), [(Quarters, "NARROWEST"), (Gates, "NARROWEST"), (Windows, "NARROWEST_UNROLLED")]
)
def test_narrow_directions_stay_together(
    make: type[Apart], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, limit, CHANNELS)
    assert recover_2d(alone(make)).report.scans[0].apart
    monkeypatch.setattr(recovery, limit, CHANNELS + 1)
    recovered = recover_2d(alone(make))
    assert scan_nodes(recovered.model) == {"block_1/scan": SELECTIVE_SCAN}
    (scan,) = recovered.report.scans
    assert scan.refused is not None and not scan.apart
    assert scan.refused.endswith(
        "scanned one by one: with 8 channels that would be slower; it pays from 9 on"
    )


# Pruning -------------------------------------------------------------------------------------------------------------


def left_alone(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> Recovered:
    """Recover with scans of several directions left as they are."""
    with monkeypatch.context() as patch:
        for name in LIMITS:
            patch.setattr(recovery, name, CHANNELS + 1)
        recovered = recover_2d(model)
    assert set(scan_nodes(recovered.model).values()) == {SELECTIVE_SCAN}
    return recovered


def selected(recovered: Recovered, block: int, subsample: Subsample | None = None) -> Selection:
    return Selection((block,), subsample or Subsample(), recovered.orders, {block: f"mixers.{block - 1}"})


@pytest.mark.parametrize("block", [1, 3])
def test_what_was_refused_for_pruning_still_is_and_with_the_same_words(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, recovered = apart(False)
    said = []
    for one in (left_alone(model, monkeypatch), recovered):
        with pytest.raises(PassError) as refused:
            run_passes(one.model, selected(one, block), OPTIMIZED)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert ("6 of 24 positions" if block == 1 else "windows or another order") in said[0]


def test_parts_whose_order_is_not_known_are_refused() -> None:
    for block in (1, 3):
        with pytest.raises(PassError, match="whether of a whole map is not known"):
            run_passes(apart(True)[2].model, Selection((block,), Subsample()), OPTIMIZED)


@pytest.mark.parametrize("subsample", [Subsample(), Subsample(3), Subsample(3, 2)])
def test_whole_maps_are_pruned_as_their_steps_were(
    subsample: Subsample, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, recovered = apart(False)
    before = left_alone(model, monkeypatch)
    x = {INPUT: picture(3, CHANNELS, HEIGHT, WIDTH).numpy()}
    expected = run(lower(run_passes(before.model, selected(before, 2, subsample), CANONICAL)[0]), x)
    for passes in (CANONICAL, OPTIMIZED):
        pruned, reports = run_passes(recovered.model, selected(recovered, 2, subsample), passes)
        assert len(reports[0].changed) == 1
        found = run(lower(pruned), x)
        assert all(error(found[name], wanted) <= 2e-6 for name, wanted in expected.items())


# Parity, scan by scan ------------------------------------------------------------------------------------------------


def parity(source: ModuleSource, exported: Export, plan: QuarterMap | None = None) -> ParityReport:
    recipe = Recipe(source.name, quartermap=plan)
    graph = exported.model.SerializeToString()
    return parity_of(recipe, source, validation_cases(recipe, source), graph, exported.traced)


@pytest.mark.parametrize("make", [Quarters, Gates])
def test_each_direction_is_compared_at_every_size(make: type[Apart]) -> None:
    source = module_source(Together([make()]).eval(), picture(2, CHANNELS, 8, 12), dynamic_size=True)
    exported = export(source, None)
    assert "another size" in source.further_cases(exported.traced)
    report = parity(source, exported)
    assert report.passed, report.describe_failure()
    scans = {f"block_1/scan/{place}" for place in range(1, 5)}
    for outputs in report.cases.values():
        assert scans <= {output.name for output in outputs}

    for tensor in exported.model.graph.initializer:
        if tensor.name == "block_1/scan/3/A":
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
    report = parity(source, exported)
    assert not report.passed
    assert "block 1 (mixers.0) is the first that departs, in or before its scan" in report.describe_failure()
    for outputs in report.cases.values():
        assert {part.name for part in outputs if part.name in scans and not part.passed} == {"block_1/scan/3"}

    plan = QuarterMap(blocks=(1,))
    if make is Quarters:
        with pytest.raises(PassError, match="its directions scan parts of the map, 24 of 96 positions"):
            export(source, plan, traced=exported.traced)
        return
    for one in (plan, QuarterMap(blocks=(1,), upsample="bilinear")):
        report = parity(source, export(source, one, traced=exported.traced), one)
        assert report.passed, report.describe_failure()


def test_calls_of_one_direction_are_scans_of_their_parts_and_compared_by_their_names() -> None:
    source = module_source(QuarterCalls().eval(), picture(2, CHANNELS, HEIGHT, WIDTH))
    exported = export(source, None)
    names = ["block_1/scan/1", *(f"block_1/scan_{call}/1" for call in range(2, 5))]
    assert scan_nodes(exported.model) == dict.fromkeys(names, SELECTIVE_SCAN_2D)
    report = parity(source, exported)
    assert report.passed, report.describe_failure()
    for outputs in report.cases.values():
        assert set(names) <= {output.name for output in outputs}
    with pytest.raises(PassError, match="its directions scan parts of the map, 6 of 24 positions"):
        export(source, QuarterMap(blocks=(1,)), traced=exported.traced)


# Planted faults ------------------------------------------------------------------------------------------------------


def steps_of(length: int, *orders: tuple[int, list[int]]) -> np.ndarray:
    """The same steps for all directions but those that are given."""
    steps = np.stack([np.arange(length)] * 4)
    for direction, order in orders:
        steps[direction] = order
    return steps


def moved(length: int, *orders: tuple[int, list[int]]) -> Fault:
    """Directions whose u takes other steps than its projections."""
    return Fault({"u": lambda c, v: c.steps(v, steps_of(length, *orders))})


QUARTER = (HEIGHT // 2) * (WIDTH // 2)
TRANSPOSED = np.arange(QUARTER).reshape(2, 3).T.ravel().tolist()


def next_quarter(change: Change, value: str) -> str:
    """The first direction reads what the third does: the same rows, and columns from one further on."""
    return change.taken(value, 1, 2, 1, 2, 3)


QUARTERS_FAULTS = {
    "wrong direction in one quarter": moved(QUARTER, (0, TRANSPOSED)),
    "quarter taken backwards": moved(QUARTER, (2, list(range(QUARTER))[::-1])),
    "offset of a quarter wrong in u": Fault({"u": next_quarter}),
    "offset of a quarter wrong in the projections": Fault(dict.fromkeys(PROJECTED, next_quarter)),
    "offset of a quarter wrong in B": Fault({"B": next_quarter}),
    "a quarter shifted by one step": moved(QUARTER, (3, np.roll(np.arange(QUARTER), 1).tolist())),
    "u doubled": Fault({"u": lambda c, v: c.times(v, np.array(2.0))}),
    "u of one quarter doubled": Fault(
        {"u": lambda c, v: c.times(v, np.array([1.0, 2.0, 1.0, 1.0]).reshape(1, 4, 1, 1))}
    ),
    "u added to itself": Fault({"u": lambda c, v: c.node("Add", v, v)}),
    "an activation in the projections": Fault({"C": lambda c, v: c.node("Tanh", v)}),
    "an activation on u": Fault({"u": lambda c, v: c.node("Sigmoid", v)}),
    "a positional term in delta": Fault({"delta": lambda c, v: c.plus(v, np.linspace(-1, 1, QUARTER))}),
    "a quarter put elsewhere": Fault(output=lambda c, y: c.taken(y, 1, 2, 1, 0, 3)),
    "a quarter put back backwards": Fault(
        output=lambda c, y: c.steps(y, steps_of(QUARTER, (0, list(range(QUARTER))[::-1])))
    ),
    "one channel of the output permuted": Fault(output=lambda c, y: c.taken(y, 2, 1, 0, *range(2, CHANNELS))),
    "all of another image": everywhere(lambda c, v: c.other_image(v)),
}
LENGTH = HEIGHT * WIDTH
BACKWARDS = list(range(LENGTH))[::-1]
GATES_FAULTS = {
    "wrong direction of u": moved(LENGTH, (2, BACKWARDS)),
    "wrong direction of the projections": Fault(
        dict.fromkeys(PROJECTED, lambda c, v: c.steps(v, steps_of(LENGTH, (0, BACKWARDS))))
    ),
    "projections of the step before": Fault(
        dict.fromkeys(PROJECTED, lambda c, v: c.steps(v, np.stack([np.roll(np.arange(LENGTH), 1)] * 4)))
    ),
    "u gated by itself": Fault({"u": lambda c, v: c.node("Mul", v, c.node("Sigmoid", v))}),
    "u gated by another position": Fault(
        {"u": lambda c, v: c.node("Mul", v, c.steps(v, np.stack([np.roll(np.arange(LENGTH), 1)] * 4)))}
    ),
    "u doubled": Fault({"u": lambda c, v: c.times(v, np.array(2.0))}),
    "projections of another image": Fault(dict.fromkeys(PROJECTED, lambda c, v: c.other_image(v))),
    "a clamp that is seldom reached": Fault(
        {"delta": lambda c, v: c.node("Clip", v, c.constant(np.float32(-50)), c.constant(np.float32(50)))}
    ),
    "a snake": everywhere(
        lambda c, v: c.steps(
            v, steps_of(LENGTH, (0, [*range(6), *range(11, 5, -1), *range(12, 18), *range(23, 17, -1)]))
        )
    ),
}
FAULTS = {
    **{(Quarters, name): fault for name, fault in QUARTERS_FAULTS.items()},
    **{(Gates, name): fault for name, fault in GATES_FAULTS.items()},
    **{(Windows, name): GATES_FAULTS[name] for name in GATES_FAULTS if name != "a snake"},
}
LEGAL = {
    (Quarters, "steps moved nowhere"): moved(QUARTER),
    (Quarters, "two directions in another order"): everywhere(
        lambda c, v: c.taken(c.taken(v, 1, 1, 0, 3, 2), 1, 1, 0, 3, 2)
    ),
    (Quarters, "quarters weighted differently"): Fault(
        output=lambda c, y: c.times(y, np.array([1.0, 0.5, 1.0, 1.0]).reshape(1, 4, 1, 1))
    ),
    (Gates, "a bias of C"): Fault({"C": lambda c, v: c.plus(v, np.ones(1))}),
    (Gates, "a gate that reads another position"): Fault(
        output=lambda c, y: c.node(
            "Mul", y, c.node("Sigmoid", c.steps(y, np.stack([np.roll(np.arange(LENGTH), 1)] * 4)))
        )
    ),
    (Windows, "B doubled"): Fault({"B": lambda c, v: c.node("Add", v, v)}),
}


@functools.cache
def alone(make: type[Apart]) -> onnx.ModelProto:
    return traced(make(), 2, CHANNELS, HEIGHT, WIDTH)


def output(model: onnx.ModelProto) -> Tensor:
    """Return what a model without bodies makes of a random picture."""
    (found,) = run(lower(model), {INPUT: picture(2, CHANNELS, HEIGHT, WIDTH).numpy()}).values()
    return found


def length_of(make: type[Apart]) -> int:
    return QUARTER if make is Quarters else LENGTH


@pytest.mark.parametrize(("make", "name"), FAULTS, ids=lambda part: getattr(part, "__name__", part))
def test_a_fault_never_becomes_scans_of_maps(make: type[Apart], name: str) -> None:
    faulty = planted(alone(make), "block_1/scan", FAULTS[make, name], length_of(make))
    recovered = recover_2d(faulty)
    assert scan_nodes(recovered.model) == {"block_1/scan": SELECTIVE_SCAN}
    (found,) = recovered.report.scans
    assert found.refused is not None and not found.apart
    assert error(output(recovered.model), output(faulty)) <= 1e-6


@pytest.mark.parametrize(("make", "name"), LEGAL, ids=lambda part: getattr(part, "__name__", part))
def test_what_is_no_fault_becomes_one_scan_each(make: type[Apart], name: str) -> None:
    changed = planted(alone(make), "block_1/scan", LEGAL[make, name], length_of(make))
    recovered = recover_2d(changed)
    assert set(scan_nodes(recovered.model).values()) == {SELECTIVE_SCAN_2D}
    assert recovered.report.scans[0].apart
    assert error(output(recovered.model), output(changed)) <= 2e-6
