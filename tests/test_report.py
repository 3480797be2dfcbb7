"""The report: what is on the page, that it is whole and fetches nothing, in a parser and in a real browser."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from command_line import call
from quick_results import quick_results
from safetensors.torch import save_file

import quartermap_deploy as qm
from quartermap_deploy.bundle import describe_file, load_bundle
from quartermap_deploy.errors import BundleError, CheckpointError, InputError, ReportError
from quartermap_deploy.report import page as page_module
from quartermap_deploy.report import write_report
from quartermap_deploy.report.activations import block_activations
from quartermap_deploy.report.charts import (
    Point,
    Series,
    chart,
    counting_axis,
    linear_axis,
    logarithmic_axis,
    root_axis,
)
from quartermap_deploy.report.markup import Html, element
from quartermap_deploy.report.parts import Table, markdown
from quartermap_deploy.report.pictures import heat_colours
from quartermap_deploy.report.plots import ablation_plot, comparison_plot, search_plots
from quartermap_deploy.report.receptive import ReceptiveField, receptive_field
from quartermap_deploy.report.results import accuracy_table, plan_name, read_results, search_text
from quartermap_deploy.tables.words import ranges
from quartermap_deploy.validation.inputs import real_images

pytestmark = pytest.mark.usefixtures("natively")

PLAN = qm.QuarterMap(every=3)
SECTIONS = (
    "overview",
    "blocks",
    "parity",
    "accuracy",
    "speed",
    "ablations",
    "choice",
    "activations",
    "fields",
    "graph",
    "environment",
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The digits, unpruned and pruned."""
    folder = tmp_path_factory.mktemp("bundles")
    recipes = {"digits": qm.Recipe("vmamba_digits"), "digits_k3": qm.Recipe("vmamba_digits", quartermap=PLAN)}
    return [qm.compile(recipe, folder / name).path for name, recipe in recipes.items()]


@pytest.fixture(scope="module")
def results(bundles: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What the commands print: eval of both bundles, bench, validate, compare, ablate and tune."""
    folder = tmp_path_factory.mktemp("results")
    commands = {
        "unpruned": ["eval", bundles[0]],
        "pruned": ["eval", bundles[1]],
        "times": ["bench", *bundles, "--repeats", "2"],
        "proof": ["validate", bundles[1]],
    }
    paths = []
    for name, command in commands.items():
        code, out, err = call(*command, "--json", "--quiet")
        assert code == 0, err
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(out, encoding="utf-8")
    return [*paths, *quick_results().values()]


@pytest.fixture(scope="module")
def page(bundles: list[Path], results: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section."""
    return write_report(bundles, tmp_path_factory.mktemp("report") / "report.html", results=results)


@pytest.fixture
def quick(bundles: list[Path], tmp_path: Path) -> Callable[..., str]:
    """Write a report of the pruned bundle without maps and return it."""

    def write(path: Path = bundles[1], **settings: Any) -> str:
        out = write_report([path], tmp_path / "quick.html", **{"maps": False, **settings})
        return out.read_text(encoding="utf-8")

    return write


# The file -------------------------------------------------------------------------------------------------------


class Structure(HTMLParser):
    """Reads a page strictly: every element is closed, in order, and nothing comes from elsewhere."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.references: list[str] = []
        self.headings: list[int] = []
        self.problems: list[str] = []
        self.text: list[str] = []

    def handle_decl(self, decl: str) -> None:
        if decl != "DOCTYPE html":
            self.problems.append(f"the document type {decl}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if len(values) < len(attrs):
            self.problems.append(f"{tag} has an attribute twice: {attrs}")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "iframe", "object", "embed"):
            self.problems.append(f"the page has a {tag}")
        for name, value in values.items():
            if name in ("src", "href", "srcset", "action"):
                self.references.append(value or "")
            if name.startswith("on"):
                self.problems.append(f"{tag} has {name}")
        if "id" in values:
            self.identifiers.append(values["id"] or "")
        if tag == "img" and not values.get("alt"):
            self.problems.append("a picture without a text")
        if tag == "svg" and values.get("role") == "img" and not values.get("aria-label"):
            self.problems.append("a drawing without a text")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.problems.append(f"{tag} closes itself, which means nothing in HTML")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text.append(data)


def structure(text: str) -> Structure:
    """Read a page; it must be whole."""
    parser = Structure()
    parser.feed(text)
    parser.close()
    assert parser.problems == []
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_holds_everything(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = structure(text)
    assert len(set(parsed.identifiers)) == len(parsed.identifiers)
    assert {*SECTIONS} <= {*parsed.identifiers}
    outside = [link for link in parsed.references if not link.startswith(("#", "data:"))]
    assert outside == []
    assert {link[1:] for link in parsed.references if link.startswith("#")} == {*SECTIONS}
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_headings_do_not_skip_a_level(page: Path) -> None:
    levels = structure(page.read_text(encoding="utf-8")).headings
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_it_says_what_the_bundles_and_results_say(
    page: Path, bundles: list[Path], results: list[Path]
) -> None:
    text = " ".join("".join(structure(page.read_text(encoding="utf-8")).text).split())
    manifest = load_bundle(bundles[1]).manifest
    block = manifest["blocks"][2]
    assert "Block 3 pruned 8x8 → 4x4 256 → 64 tokens" in text
    assert (block["tokens_unpruned"], block["tokens"]) == (256, 64)
    assert f"{manifest['totals']['tokens']:,} ({2596 / 2848:.0%})" in text
    assert "insert_quartermap" in text and "block 3: restored after" in text
    for path, plan in zip(results[:2], ("no pruning", "k = 3"), strict=True):
        values = json.loads(path.read_text())
        assert f"{plan}digits, held_out450{values['top1']:.2%}" in text
    bench = json.loads(results[2].read_text())
    timed = bench["bundles"][1]
    assert f"digits_k3onnxruntime{timed['providers']}{timed['scans']}{timed['median_ms']:.2f}" in text
    assert "proof: quartermap validate" in text
    compared = json.loads(results[4].read_text())
    tome = compared["timings"][0]["variants"][-1]
    assert tome["name"] == "ToMe k = 3" and f"{tome['speed']:.2f} × [{tome['speed_quartiles'][0]:.2f}" in text
    searched = json.loads(results[6].read_text())
    assert f"{len(searched['tried'])} plans were run" in text
    assert f"Chosen: blocks {ranges(searched['chosen']['blocks'])} at stride 2" in text
    assert manifest["versions"]["torch"] in text
    assert "taskclassification, 10 classes: 0, 1, 2, 3 and 6 more" in text
    assert "inputimages (batch, 3, 64, 64)" in text and "outputlogits (batch, 10)" in text
    assert "weightsthose that come with the package" in text and "layers.1.blocks.0" in text
    assert "Left out" not in text


def test_sections_without_results_are_one_line_each_at_the_end(quick: Callable[..., str]) -> None:
    text = quick()
    found = list(structure(text).identifiers)
    assert {"overview", "blocks", "parity", "graph", "environment", "left-out"} <= {*found}
    assert {"accuracy", "speed", "activations", "fields"}.isdisjoint(found)
    assert found.index("left-out") > found.index("environment")
    assert "no result of quartermap eval --json" in text
    assert "no result of quartermap compare --json or quartermap bench --json" in text
    assert "Left out, as --no-maps asks for." in text


def test_the_page_opens_with_the_verdict(bundles: list[Path]) -> None:
    from quartermap_deploy.bundle import load_bundle
    from quartermap_deploy.report.results import Result
    from quartermap_deploy.report.verdict import verdicts

    found = {path.name: load_bundle(path) for path in bundles}
    first, second = found
    (plain, pruned) = (note.text for note in verdicts(found, []))
    assert plain.startswith(f"{first}: proved: it computes what the PyTorch model computes")
    assert plain.endswith("Nothing is pruned.")
    assert "It gains: " in pruned and "fewer operations" in pruned and "accuracy is not known here" in pruned
    data = {"images": 450, "data": {"name": "digits"}}
    timed = {"name": second, "target": "onnxruntime", "speed": 1.07, "speed_quartiles": [1.06, 1.08]}
    results = [
        Result("eval", "a", {"source": first, "plan": None, "top1": 0.98, **data}),
        Result("eval", "b", {"source": second, "plan": {"every": 3}, "top1": 0.96, **data}),
        Result("bench", "c", {"bundles": [{"name": first}, timed]}),
    ]
    _, pruned = (note.text for note in verdicts(found, results))
    assert f"1.07 times as fast as {first} on onnxruntime" in pruned
    assert (
        "It costs: top-1 96.00% on 450 images of digits, 2.00 points less than the 98.00% unpruned." in pruned
    )
    timed["speed_quartiles"] = [0.6, 2.0]
    _, pruned = (note.text for note in verdicts(found, results))
    assert "1.07" not in pruned and "too scattered to tell whether it is faster" in pruned


def test_names_are_text_not_markup(bundles: list[Path], tmp_path: Path, quick: Callable[..., str]) -> None:
    copy = Path(shutil.copytree(bundles[1], tmp_path / "<img src=x onerror=alert(1)>"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"]["title"] = "</title><script>alert(1)</script>"
    manifest["passes"][0]["changed"][0] = "</td><b>bold</b> & 'quotes' \""
    (copy / "manifest.json").write_text(json.dumps(manifest))
    text = quick(copy)
    parsed = structure(text)
    assert "<b>bold" not in text and "<img src=x" not in text
    assert "</td><b>bold</b> & 'quotes' \"" in "".join(parsed.text)


def test_a_failed_block_stands_out(bundles: list[Path], tmp_path: Path, quick: Callable[..., str]) -> None:
    copy = Path(shutil.copytree(bundles[1], tmp_path / "failed"))
    report = json.loads((copy / "report.json").read_text())
    output = next(entry for entry in report["cases"][0]["outputs"] if entry["name"] == "block_6/scan")
    output.update(relative_error=0.5, passed=False)
    missing = next(entry for entry in report["cases"][1]["outputs"] if entry["name"] == "block_7")
    missing.update(relative_error=None, passed=False)
    report.update(passed=False, first_departing_block=6)
    (copy / "report.json").write_text(json.dumps(report))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["report.json"] = describe_file(copy / "report.json")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    text = quick(copy)
    assert "Block 6 is the first that departs." in text
    assert "block_6/scan: 5.0e-01, tolerance 1e-05" in text
    assert "block_7: cannot be compared" in text
    assert "2 beyond the tolerance" in text


# In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    executable = browser.find()
    if executable is None:
        pytest.skip(f"no browser is installed: none of {', '.join(browser.NAMES)}")
    with browser.started(executable, tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(chromium: browser.Browser, page: Path, width: int, dark: bool) -> None:
    chromium.open(page, width=width, dark=dark)
    for opened in (False, True):
        chromium.evaluate(
            f"document.querySelectorAll('details').forEach(d => d.open = {str(opened).lower()})"
        )
        # Tables scroll in themselves; the page does not.
        assert chromium.evaluate("document.documentElement.scrollWidth") == width
    assert chromium.requests == [page.resolve().as_uri()]
    assert chromium.complaints == []
    shown = chromium.evaluate("[...document.querySelectorAll('section')].map(s => [s.id, s.offsetHeight])")
    assert [name for name, _ in shown] == list(SECTIONS)
    assert min(height for _, height in shown) > 50
    pictures = chromium.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(pictures) > 10 and all(pictures)


def test_colours_follow_the_scheme_and_can_be_read(chromium: browser.Browser, page: Path) -> None:
    """Text and marks stand out from what is behind them: 4.5 : 1 for text, 3 : 1 for marks (WCAG 2.2, AA)."""
    script = """(() => {
        const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(['panel', 'page', 'ink', 'muted', 'a', 'b', 'c', 'd', 'quiet', 'bad', 'limit',
            'pruned', 'kept', 'pruned-soft'].map(n => [n, style.getPropertyValue('--' + n).trim()]));
    })()"""
    backgrounds = []
    for dark in (False, True):
        chromium.open(page, width=1280, dark=dark)
        colours = chromium.evaluate(script)
        for text in ("ink", "muted", "a", "pruned"):
            assert contrast(colours[text], colours["panel"]) >= 4.5, (dark, text)
        assert contrast(colours["ink"], colours["pruned-soft"]) >= 4.5
        for mark in ("a", "b", "c", "d", "quiet", "bad", "limit", "kept"):
            assert contrast(colours[mark], colours["panel"]) >= 3, (dark, mark)
        backgrounds.append(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds[0] != backgrounds[1]


def contrast(first: str, second: str) -> float:
    """Contrast of two colours #rrggbb, as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


# What PyTorch computes for it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image() -> Any:
    return real_images(qm.load_card("vmamba_digits").preprocessing, count=1, digits=True)


def test_activation_maps_are_those_of_the_model(image: Any) -> None:
    model = qm.create_model("vmamba_digits")
    pruned = qm.prune(model, PLAN)
    found = block_activations(pruned, image)
    assert [entry.block for entry in found] == [3, 6, 9]
    first = found[0]
    assert first.before.shape == first.restored.shape == first.whole.shape == (8, 8)
    assert first.kept.shape == first.scanned.shape == (4, 4)
    # Not equal to the last bit: the means over the channels are added up in another order.
    np.testing.assert_allclose(first.kept, first.before[::2, ::2], rtol=1e-5)
    np.testing.assert_allclose(first.restored, np.repeat(np.repeat(first.scanned, 2, 0), 2, 1), rtol=1e-5)
    # Before its first pruned block, the pruned model is the unpruned one: the full scan of block 3 is its scan.
    scans: dict[str, Any] = {}
    for name, owner in (("whole", model), ("restored", pruned)):
        mixer = owner.blocks()[2].mixer
        hook = mixer.out_norm.register_forward_pre_hook(
            lambda module, inputs, name=name: scans.__setitem__(name, inputs[0])
        )
        with torch.no_grad():
            owner(torch.from_numpy(image))
        hook.remove()
    for name, scan in scans.items():
        np.testing.assert_allclose(getattr(first, name), scan[0].abs().mean(0).numpy(), rtol=1e-5, atol=1e-6)
    # The model is as it was.
    assert [block.mixer.subsample is not None for block in pruned.blocks()].count(True) == 3


def test_a_receptive_field_is_the_gradient_of_the_centre(image: Any) -> None:
    model = qm.prune(qm.create_model("vmamba_digits"), PLAN).double()
    found = receptive_field(model, image.astype(np.float64))
    assert found.images == 1
    assert found.field.sum() == pytest.approx(1)
    assert all(parameter.requires_grad for parameter in model.parameters())

    def last_map(x: Any) -> Any:
        x = model.patch_embed(torch.from_numpy(x))
        for stage in model.layers:
            x = stage(x)
        assert x.shape[2:] == (2, 2), "all four positions are the middle of the map"
        return x.sum().item()

    def slope(row: int, column: int) -> float:
        """Finite differences, without automatic differentiation, for all three colours."""
        total = 0.0
        for colour in range(3):
            up, down = image.astype(np.float64), image.astype(np.float64)
            up[0, colour, row, column] += 1e-5
            down[0, colour, row, column] -= 1e-5
            with torch.no_grad():
                total += abs(last_map(up) - last_map(down)) / 2e-5
        return total

    pixels = [(48, 48), (5, 60), (40, 12)]
    slopes = np.array([slope(*pixel) for pixel in pixels])
    shares = np.array([found.field[pixel] for pixel in pixels])
    np.testing.assert_allclose(shares / shares[0], slopes / slopes[0], rtol=1e-4)


def test_reach_of_a_field() -> None:
    field = np.zeros((8, 8))
    field[4, 4], field[4, 6], field[0, 0] = 0.5, 0.3, 0.2
    # The middle lies between rows 3 and 4, so that no reach is more than the image has.
    found = ReceptiveField(field, 1)
    assert [found.reach(share) for share in (0.5, 0.51, 0.8, 0.9, 1.0)] == [2, 6, 6, 8, 8]
    odd = np.zeros((7, 7))
    odd[3, 3], odd[0, 6] = 0.5, 0.5
    assert [ReceptiveField(odd, 1).reach(share) for share in (0.5, 1.0)] == [1, 7]


def test_a_model_whose_output_does_not_depend_on_the_image_has_no_field(image: Any) -> None:
    model = qm.create_model("vmamba_digits")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(InputError, match="adds up to 0 over 1 images"):
        receptive_field(model, image)


def test_maps_need_the_checkpoint_of_the_bundle(tmp_path: Path) -> None:
    model = qm.create_model("vmamba_digits")
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    save_file(model.state_dict(), own)
    save_file({name: value + 1 for name, value in model.state_dict().items()}, other)
    bundle = qm.compile(qm.Recipe("vmamba_digits", checkpoint=own, quartermap=PLAN), tmp_path / "bundle").path
    out = tmp_path / "report.html"
    text = write_report([bundle], out).read_text(encoding="utf-8")
    assert "compiled from the checkpoint own.safetensors, which is not in it; give the file with" in text
    assert "data:image/png" not in text
    text = write_report([bundle], out, checkpoints=[own]).read_text(encoding="utf-8")
    assert "data:image/png" in text and "compiled from the checkpoint" not in text
    with pytest.raises(CheckpointError, match=r"none of the bundles was compiled from .*other\.safetensors"):
        write_report([bundle], out, checkpoints=[other])


def test_a_model_that_is_not_the_bundles_is_left_out(bundles: list[Path], tmp_path: Path) -> None:
    """As new weights are, that come from a seed, under another version of torch."""
    copy = Path(shutil.copytree(bundles[1], tmp_path / "other_seed"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["recipe"]["quartermap"]["every"] = manifest["plan"]["every"] = 2
    (copy / "manifest.json").write_text(json.dumps(manifest))
    text = write_report([copy], tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("does not compute the outputs that the bundle keeps") == 2
    assert "data:image/png" not in text


def test_images_of_ones_own(bundles: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for level in (40, 90):
        Image.new("RGB", (20, 20), (level, 20, 200)).save(folder / f"{level}.png")
    out = tmp_path / "report.html"
    assert "mean over 2 images" in write_report([bundles[1]], out, images=folder).read_text(encoding="utf-8")
    (folder / "40.png").write_bytes(b"no image")
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"40\.png cannot be read"):
        write_report([bundles[1]], out, images=folder)
    assert out.read_bytes() == before


# Bad input --------------------------------------------------------------------------------------------------------


def test_command_line(bundles: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    code, printed, _ = call("report", *bundles, "-o", out, "--no-maps", "--json", "--quiet")
    assert code == 0
    assert json.loads(printed) == {"path": str(out), "bytes": out.stat().st_size}


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder", "damaged"])
def test_what_is_no_bundle(bundles: list[Path], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "damaged":
        shutil.copytree(bundles[0], path)
        with (path / "model.onnx").open("r+b") as file:
            file.write(b"\0\0\0\0")
    out = tmp_path / "report.html"
    code, _, err = call("report", bundles[1], path, "-o", out, "--quiet")
    assert code == 2 and "thing" in err and "Traceback" not in err
    assert not out.exists()
    with pytest.raises(BundleError):
        write_report([path], out)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="name at least one"):
        write_report([], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "found int"),
        ('{"nothing": 1}', "found nothing"),
        ('{"top1": 1, "per_class": {}, "target": "x", "source": "y"}', "are not what this version"),
        (None, "there is no file"),
    ],
)
def test_results_that_are_none(
    bundles: list[Path], tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=message) as error:
        write_report([bundles[0]], tmp_path / "report.html", results=[path], maps=False)
    assert "results" in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_several_results_in_one_file(results: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([json.loads(entry.read_text()) for entry in results]))
    kinds = ["eval", "eval", "bench", "validate", "compare", "ablate", "tune"]
    assert [result.kind for result in read_results([path])] == kinds


def test_what_was_set_otherwise_stands_beside_the_accuracy(results: list[Path]) -> None:
    own, other = (json.loads(path.read_text()) for path in results[:2])
    assert accuracy_table([own, other]).columns[-1] == ">broken"
    table = accuracy_table([own, {**other, "overridden": ["labels", "mean"]}])
    assert table.columns[-1] == "set otherwise" and [row[-1] for row in table.rows] == [None, "labels, mean"]


def test_everything_that_a_search_tried_is_drawn_where_it_is(results: list[Path]) -> None:
    values = json.loads(results[6].read_text())
    drawn, verified = search_plots(values)
    assert (
        drawn.content.count("<title>")
        == len(values["tried"]) + len(values["front"]) + len(values["fixed"]) + 1
    )
    # The search's own speeds, reckoned again from what single blocks save.
    for entry in (*values["front"], values["chosen"]):
        text = f"blocks {ranges(entry['blocks'])} at stride 2: {entry['speed']:.3f} ×, drop "
        assert drawn.content.count(f"{text}{entry['calibration']['drop']:.2%}") >= 2
    for entry in values["fixed"]:
        assert (
            f"{entry['fixed']['speed']:.3f} ×, drop {entry['fixed']['verification']['drop']:.2%}"
            in verified.content
        )
        assert f">k = {entry['every']}</text>" in verified.content


def test_a_search_that_found_nothing_is_told_of(results: list[Path]) -> None:
    values = {**json.loads(results[6].read_text()), "chosen": None}
    assert "Nothing reaches it." in search_text(values)
    assert len(search_plots(values)) == 2


def test_without_accuracies_there_is_no_plot_of_them(results: list[Path]) -> None:
    compared, ablated = (json.loads(results[i].read_text()) for i in (4, 5))
    assert len(comparison_plot(compared)) == len(ablation_plot(ablated)) == 1
    for values in (compared, *ablated["groups"]):
        for entry in values["variants"]:
            entry["accuracy"] = None
    assert comparison_plot(compared) == ablation_plot(ablated) == []


def test_only_reports_are_replaced(bundles: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "precious.onnx"
    out.write_bytes(b"precious")
    with pytest.raises(ReportError, match=r"is no report.*--force"):
        write_report([bundles[0]], out, maps=False)
    assert out.read_bytes() == b"precious"
    write_report([bundles[0]], out, maps=False, force=True)
    first = out.read_bytes()
    write_report([bundles[1]], out, maps=False)
    assert out.read_bytes() != first


def test_places_that_cannot_be_written(bundles: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is a folder"):
        write_report([bundles[0]], tmp_path, maps=False)
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="file is no folder that you may write to"):
        write_report([bundles[0]], tmp_path / "file" / "report.html", maps=False)


def test_folders_are_made_and_go_again_where_the_page_does_not_come(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "er" / "report.html"
    with pytest.raises(ReportError, match="there is no file"):
        write_report([bundles[0]], out, results=[tmp_path / "absent.json"], maps=False)
    with monkeypatch.context() as planted:
        planted.setattr(page_module, "write_whole", full_disk)
        with pytest.raises(ReportError, match="No space left"):
            write_report([bundles[0]], out, maps=False)
    assert not list(tmp_path.iterdir())
    assert write_report([bundles[0]], out, maps=False).is_file()


def full_disk(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_bundle_that_is_named_twice_is_told_apart(bundles: list[Path], tmp_path: Path) -> None:
    text = write_report([bundles[0], bundles[0]], tmp_path / "report.html", maps=False).read_text()
    assert "Report on the bundles digits, digits (2)" in text


def test_a_full_disk_leaves_what_was_there(bundles: list[Path], tmp_path: Path) -> None:
    """A limit on the size of files stops the writing in the middle, as a full disk does."""
    out = tmp_path / "report.html"
    write_report([bundles[0]], out, maps=False)
    before = out.read_bytes()
    half = len(before) // 2
    outcome = subprocess.run(
        [sys.executable, "-m", "quartermap_deploy", "report", bundles[1], "-o", out, "--no-maps", "--quiet"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)),
    )
    assert outcome.returncode == 2, outcome.stderr
    assert f"the report {out} was not written" in outcome.stderr and "Traceback" not in outcome.stderr
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_jinja_the_message_names_the_command(bundles: list[Path], tmp_path: Path) -> None:
    """The module is hidden from a process of its own, as if it were not installed."""
    code = (
        "import sys; sys.modules['jinja2'] = None; from quartermap_deploy.cli import main; "
        f"sys.exit(main(['report', {str(bundles[0])!r}, '-o', {str(tmp_path / 'r.html')!r}]))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.returncode == 2
    assert "pip install 'quartermap-deploy[report]'" in outcome.stderr


def test_a_report_without_maps_needs_no_torch(bundles: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys; from quartermap_deploy.report import write_report; "
        f"write_report([{str(bundles[0])!r}], {str(tmp_path / 'r.html')!r}, maps=False); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


# Pieces -----------------------------------------------------------------------------------------------------------


def test_markup_is_escaped_once() -> None:
    inner = element("b", None, "1 < 2 & 3")
    assert inner == "<b>1 &lt; 2 &amp; 3</b>"
    assert element("p", {"title": '"<'}, inner, " x") == '<p title="&quot;&lt;"><b>1 &lt; 2 &amp; 3</b> x</p>'
    assert isinstance(inner, Html)


def test_markdown_keeps_its_columns() -> None:
    table = Table("", ("name", ">value"), (("a|b\nc", 1.5), (None, "2")))
    assert markdown(table) == "| name | value |\n| --- | ---: |\n| a\\|b c | 1.5 |\n| – | 2 |\n"


def test_heat_colours_grow_lighter() -> None:
    colours = heat_colours(np.linspace(-1, 2, 40)[None], 0, 1)[0].astype(float)
    lightness = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) >= -1e-9).all() and lightness[-1] > 4 * lightness[0]
    assert (heat_colours(np.ones((2, 2)), 1, 1) == heat_colours(np.zeros((2, 2)), 0, 1)).all()


def test_axes() -> None:
    axis = linear_axis("", [0.9, 1.1])
    assert axis.low < 0.9 and axis.high > 1.1
    assert [text for _, text in axis.ticks] == ["0.90", "0.95", "1.00", "1.05", "1.10"]
    assert linear_axis("", [3.0, 3.0]).share(3.0) == pytest.approx(0.5)
    # No accuracy is above 100 %, but a mark there is whole.
    accuracies = linear_axis("", [90.0, 100.0], most=100)
    assert [text for _, text in accuracies.ticks][-1] == "100" and accuracies.share(100) < 0.95
    assert [text for _, text in linear_axis("", [100.0, 100.0], most=100).ticks][-1] == "100"
    decades = logarithmic_axis("", [2e-7, 1e-4])
    assert (decades.low, decades.high) == (1e-7, 1e-4)
    assert decades.share(1e-6) == pytest.approx(1 / 3)
    assert decades.share(0.0) == 0
    drops = root_axis("", [0.0, 38.7])
    assert [text for _, text in drops.ticks] == ["0", "0.5", "2", "5", "10", "20", "40"]
    assert drops.share(0) < 0.06 and drops.share(1) > 0.15
    many = counting_axis("", [str(i) for i in range(1, 31)] + ["logits"])
    assert len(many.ticks) <= 13 and many.ticks[-1] == (31.0, "\nlogits")
    # Every block of a model of ten has its number, the last of them, too.
    ten = counting_axis("", [str(i) for i in range(1, 11)] + ["logits"])
    assert [text for _, text in ten.ticks] == [*map(str, range(1, 11)), "\nlogits"]


def test_labels_lie_on_no_mark_and_on_no_other_label() -> None:
    points = tuple(Point(1 + i / 100, 5.0, "", f"k = {i}") for i in range(4))
    axes = linear_axis("", [1.0, 2.0]), linear_axis("", [0.0, 10.0])
    drawn = chart([Series("s", points)], *axes, "d")
    rows = [float(y) for y in re.findall(r'class="label" x="9" y="(-?[\d.]+)"', drawn)]
    assert len(rows) == 4
    assert all(abs(a - b) >= 12 for a, b in itertools.combinations(rows, 2))


def test_marks_lie_where_their_values_are() -> None:
    axis = linear_axis("", [0.0, 10.0])
    drawn = chart([Series("s", (Point(axis.low, axis.high, "corner"),))], axis, axis, "d")
    assert 'x="0.00%" y="0"' in drawn
    assert "<title>corner</title>" in drawn


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (None, "no pruning"),
        (qm.QuarterMap(every=2), "k = 2"),
        (qm.QuarterMap(blocks=(3, 5, 6, 7), stride=3), "blocks 3, 5–7, keep 1 of 3"),
        (qm.QuarterMap(exclude_stages=(), upsample="bilinear"), "k = 3, without stages none, bilinear"),
    ],
)
def test_names_of_plans(plan: qm.QuarterMap | None, name: str) -> None:
    assert plan_name(None if plan is None else plan.to_dict()) == name
    if plan is not None and plan.blocks is None:
        assert plan_name(dataclasses.replace(plan).to_dict()) == name
