"""`quartermap deploy web`: the site that is written, and what it does in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_bundles
from command_line import call
from deploy_bundles import contents, dynamic_bundle, static_bundle
from made_once import made_once
from npm_packages import npm_package
from PIL import Image
from task_bundles import judge_bundle, pooled_bundle, restorer_bundle, segmenter_bundle, words_bundle
from web_server import serving_folder

import quartermap_deploy as qm
from quartermap_deploy.bundle import describe_file
from quartermap_deploy.data.digits import load_digits
from quartermap_deploy.deploy.web import HEADERS, MARKER, WebOptions, deploy_web
from quartermap_deploy.errors import DeployError, InputError
from quartermap_deploy.validation.tolerances import STORED

pytest.importorskip("aiohttp", reason="the extra serve is not installed")
from browser import find as find_browser
from live_browser import Page, open_page

READY = "['ready', 'stopped'].includes(document.body.dataset.phase)"
STATUS = "document.getElementById('status').innerText"
ERROR = "Number(document.getElementById('here').dataset.error)"
FIRST = "document.querySelector('.result')"
SECONDS = 120
"""How long a browser may take to start the model, on a machine that is busy with other tests."""

needs_browser = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium to run a site")


def options(**settings: Any) -> WebOptions:
    return WebOptions(runtime=npm_package("onnxruntime-web"), **settings)


def site(name: str = "digits", bundle: Callable[[], Path] = dynamic_bundle, **settings: Any) -> Path:
    """A site of a bundle; written once in a test run, and not to be changed."""
    chosen = options(**settings)
    return made_once(f"site_{name}", lambda path: deploy_web(bundle(), path, chosen))


def visit(
    address: str, look: Callable[[Page], Awaitable[None]], own: str | None = None, phase: str = "ready"
) -> None:
    """Open a site, wait until its model is ready, look at it, and see that it asked for nothing but its own."""

    async def inside() -> None:
        browser = find_browser()
        assert browser is not None
        async with open_page(browser, address) as page:
            await page.until(READY, SECONDS)
            assert await page.evaluate("document.body.dataset.phase") == phase, await page.evaluate(STATUS)
            await look(page)
            allowed = (own or address, "blob:", "data:")
            assert all(asked.startswith(allowed) for asked in page.requested()), page.requested()
            assert page.complaints() == []

    asyncio.run(inside())


def visit_site(folder: Path, look: Callable[[Page], Awaitable[None]], **headers: str) -> None:
    with serving_folder(folder, headers) as address:
        visit(address, look)


async def answered(page: Page, count: int) -> str:
    """Wait for so many results, and return the text of the last one that was given."""
    await page.until(f"document.querySelectorAll('.result[data-done]').length === {count}", SECONDS)
    assert await page.evaluate(f"{FIRST}.dataset.done") == "yes", await page.evaluate(f"{FIRST}.innerText")
    return str(await page.evaluate(f"{FIRST}.innerText"))


def image_file(path: Path, image: Any) -> Path:
    Image.fromarray(image).save(path)
    return path


# What is written --------------------------------------------------------------------------------------------------


def test_the_site_is_whole_and_its_policy_allows_no_other_origin() -> None:
    folder = site()
    entry = json.loads((folder / MARKER).read_text())
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*entry["files"], MARKER}
    assert all(describe_file(folder / name) == known for name, known in entry["files"].items())
    page = (folder / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and "{{" not in page
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'" and "unsafe-inline" not in policy[1] and "*" not in policy[1]
    assert rules["script-src"] == "'self' 'wasm-unsafe-eval'" and rules["connect-src"] == "'self'"
    # Neither code nor style in the page itself, and nothing from elsewhere.
    assert not re.search(r"<script>|<style|\son\w+=|style=|https?://", page)
    for script in folder.glob("*.js"):
        assert not re.search(r"https?://|\beval\(|innerHTML", script.read_text()), script.name


def test_licences_of_all_that_it_carries_are_in_it() -> None:
    folder = site() / "licences"
    assert "Apache License" in (folder / "quartermap-deploy-LICENSE").read_text()
    assert "MIT License" in (folder / "onnxruntime-LICENSE").read_text()
    assert "protobuf" in (folder / "onnxruntime-ThirdPartyNotices.txt").read_text()
    listed = (folder / "README.txt").read_text()
    assert all(name in listed for name in ("onnxruntime.wasm", "model.onnx", "vmamba_digits"))


def test_weights_in_fewer_bits_make_smaller_files_and_are_proved(tmp_path: Path) -> None:
    bundle = dynamic_bundle()
    sizes, whole = {}, (bundle / "model.onnx").stat().st_size
    for storage in ("float32", "float16", "int8"):
        made = deploy_web(bundle, tmp_path / storage, options(storage=storage))
        assert 0 < made.error <= STORED[storage].relative
        sizes[storage] = made.model_bytes / whole
    assert sizes["float32"] == 1 and sizes["float16"] < 0.6 and sizes["int8"] < 0.4


def test_the_command_says_what_was_written_and_how_to_look(tmp_path: Path) -> None:
    runtime, out = npm_package("onnxruntime-web"), tmp_path / "site"
    written = call("deploy", "web", dynamic_bundle(), "-o", out, "--runtime", runtime)
    assert written.code == 0 and f"http.server --directory {out}" in written.out and "float16" in written.out
    before = contents(out)
    again = call("deploy", "web", dynamic_bundle(), "-o", out, "--runtime", runtime)
    assert again.code == 2 and "--force" in again.err and contents(out) == before
    replaced = call("deploy", "web", dynamic_bundle(), "-o", out, "--runtime", runtime, "--force", "--json")
    assert replaced.code == 0 and replaced.json["shows"] == "classes" and contents(out) == before


@pytest.mark.parametrize(
    ("bundle", "error", "reason"),
    [
        (words_bundle, InputError, "is one input alone"),
        (pooled_bundle, InputError, "do not belong to single images"),
        (static_bundle, DeployError, 'io = "float32"'),
    ],
)
def test_what_a_browser_cannot_show_is_refused(
    tmp_path: Path, bundle: Callable[[], Path], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        deploy_web(bundle(), tmp_path / "site", WebOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_loses_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STORED, "float16", STORED["float32"])
    with pytest.raises(DeployError, match=r"departs from .*--weights float32"):
        deploy_web(dynamic_bundle(), tmp_path / "site", options())
    assert list(tmp_path.iterdir()) == []


# In a browser -------------------------------------------------------------------------------------------------------


@needs_browser
def test_images_that_are_chosen_dropped_and_drawn_are_classified(tmp_path: Path) -> None:
    bundle, digits = qm.load_bundle(dynamic_bundle()), load_digits().held_out
    paths = [image_file(tmp_path / f"{place}.png", digits.images[place]) for place in range(3)]

    async def look(page: Page) -> None:
        assert await page.evaluate(STATUS) == "Ready, on 1 thread."
        # PyTorch's golden outputs, in this browser.
        found = await page.evaluate(ERROR)
        assert 0 < found <= STORED["float16"].relative
        await page.choose("#file", paths[0], paths[1])
        text = await answered(page, 2)
        (right,) = bundle.predict(paths[1]).results
        shown = re.findall(r"([\d.]+) %", text)
        for score, percent in zip(right.scores, shown, strict=True):
            assert abs(100 * score.probability - float(percent)) <= 0.3
        assert text.split("\n")[:2] == ["1.png", right.best.label]
        await drop(page, paths[2])
        text = await answered(page, 3)
        assert text.split("\n")[:2] == ["2.png", str(digits.labels[2])]
        assert "8 × 8 pixels, the model sees 64 × 64" in text
        await draw(page, [(0.5, 0.15), (0.5, 0.85)])
        text = await answered(page, 4)
        assert text.split("\n")[:2] == ["drawing", "1"]

    visit_site(site(), look)


async def drop(page: Page, path: Path) -> None:
    """Drop a file on the page with the pointer, as its user does."""
    box = await page.evaluate(
        "(({x, y}) => [x + 20, y + 20])(document.getElementById('drop').getBoundingClientRect())"
    )
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        await page.send("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)


async def draw(page: Page, places: list[tuple[float, float]]) -> None:
    """Draw a line on the pad through places, as shares of its sides."""
    x, y, side = await page.evaluate(
        "(({x, y, width}) => [x, y, width])(document.getElementById('pad').getBoundingClientRect())"
    )
    kinds = ["mousePressed", *["mouseMoved"] * (len(places) - 1)]
    for kind, (across, down) in zip([*kinds, "mouseReleased"], [*places, places[-1]], strict=True):
        await page.send(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x + across * side,
            y=y + down * side,
            button="left",
            buttons=1,
            clickCount=1,
        )


@needs_browser
def test_with_two_headers_it_has_several_threads(tmp_path: Path) -> None:
    path = image_file(tmp_path / "digit.png", load_digits().held_out.images[0])

    async def look(page: Page) -> None:
        assert await page.evaluate("crossOriginIsolated")
        cores = await page.evaluate("Math.min(8, navigator.hardwareConcurrency)")
        assert f"on {cores} thread" in await page.evaluate(STATUS)
        assert await page.evaluate(ERROR) <= STORED["float16"].relative
        await page.choose("#file", path)
        assert f"\n{load_digits().held_out.labels[0]}\n" in await answered(page, 1)

    sent = dict(line.strip().split(": ") for line in (site() / "_headers").read_text().splitlines()[1:])
    assert sent == HEADERS
    visit_site(site(), look, **sent)


@needs_browser
def test_it_works_without_a_server_where_it_is_opened_as_a_file(tmp_path: Path) -> None:
    folder = site("file", from_file=True)
    path = image_file(tmp_path / "digit.png", load_digits().held_out.images[0])

    async def look(page: Page) -> None:
        assert await page.evaluate(STATUS) == "Ready, on 1 thread."
        assert await page.evaluate(ERROR) <= STORED["float16"].relative
        await page.choose("#file", path)
        assert f"\n{load_digits().held_out.labels[0]}\n" in await answered(page, 1)

    visit((folder / "index.html").as_uri(), look, own=f"{folder.as_uri()}/")
    # And from a server, of all things.
    visit_site(folder, look)


@needs_browser
def test_a_site_that_needs_a_server_says_so_where_it_is_opened_as_a_file() -> None:
    async def inside() -> None:
        browser = find_browser()
        assert browser is not None
        async with open_page(browser, (site() / "index.html").as_uri()) as page:
            assert "needs a web server" in await page.evaluate(STATUS)

    asyncio.run(inside())


@needs_browser
def test_a_mask_is_that_of_predict(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    path = image_file(tmp_path / "scene.png", random.integers(0, 256, (40, 60, 3)).astype(np.uint8))
    bundle = qm.load_bundle(segmenter_bundle())

    async def look(page: Page) -> None:
        await page.choose("#file", path)
        text = await answered(page, 1)
        (right,) = bundle.predict(path).results
        for index, share in right.shares.items():
            shown = re.search(rf"{right.labels[index]}\s+([\d.]+) %", text)
            assert shown is not None and abs(100 * share - float(shown[1])) <= 1
        assert (
            await page.evaluate("document.querySelector('.result canvas.output').width")
            == right.mask.shape[1]
        )

    visit_site(site("segmenter", segmenter_bundle), look)


@needs_browser
@pytest.mark.parametrize(
    ("name", "bundle", "shape", "expected"),
    [
        ("restorer", restorer_bundle, (32, 32), "canvas.output"),
        ("judge", judge_bundle, (32, 32, 4), ".bars meter"),
        ("toy", toy_bundles.classifier, (50, 40, 3), ".bars meter"),
    ],
)
def test_other_bundles_show_what_they_give(
    tmp_path: Path, name: str, bundle: Callable[[], Path], shape: tuple[int, ...], expected: str
) -> None:
    path = image_file(
        tmp_path / "image.png", np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    )

    async def look(page: Page) -> None:
        assert await page.evaluate(ERROR) <= STORED["float16"].relative
        await page.choose("#file", path)
        await answered(page, 1)
        assert await page.evaluate(f"document.querySelectorAll('.result {expected}').length") >= 1

    visit_site(site(name, bundle), look)


@needs_browser
def test_a_file_that_is_no_image_is_told_and_the_next_one_is_answered(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    path = image_file(tmp_path / "digit.png", load_digits().held_out.images[0])

    async def look(page: Page) -> None:
        await page.choose("#file", tmp_path / "notes.png")
        await page.until(f"{FIRST}?.dataset.done === 'no'")
        assert "no PNG, JPEG, WebP or BMP" in await page.evaluate(f"{FIRST}.innerText")
        await page.choose("#file", path)
        await answered(page, 2)

    visit_site(site(), look)


@needs_browser
def test_a_model_that_was_changed_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    shutil.copytree(site(), folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)

    async def look(page: Page) -> None:
        assert "another one than the site was written with" in await page.evaluate(STATUS)

    with serving_folder(folder) as address:
        visit(address, look, phase="stopped")


@needs_browser
def test_it_fits_wide_and_narrow_windows_light_and_dark(tmp_path: Path) -> None:
    path = image_file(tmp_path / f"{'a long name ' * 9}.png", load_digits().held_out.images[0])

    async def look(page: Page) -> None:
        await page.choose("#file", path)
        await answered(page, 1)
        grounds = set()
        for width, dark in ((1400, False), (1400, True), (340, False), (340, True)):
            await page.resize(width, 800, dark=dark)
            assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2

    visit_site(site(), look)
