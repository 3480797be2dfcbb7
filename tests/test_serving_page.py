"""The page, in a real browser without a window."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import toy_bundles
from deploy_bundles import dynamic_bundle
from served import MODEL, Served, ask, digits, file_of, serving
from task_bundles import segmenter_bundle

import quartermap_deploy as qm
from quartermap_deploy.data.images import sample_photographs

pytest.importorskip("aiohttp", reason="the extra serve is not installed")
from browser import find as find_browser
from live_browser import Page, open_page

needs_browser = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium to show the page")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(dynamic_bundle()) as running:
        yield running


def visit(server: Served, look: Callable[[Page], Awaitable[None]]) -> None:
    """Open the page, and look at it."""

    async def inside() -> None:
        browser = find_browser()
        assert browser is not None
        async with open_page(browser, f"http://{server.http}/") as page:
            await page.until("document.getElementById('phase').textContent === 'ready'")
            await look(page)
            # Nothing from elsewhere, nothing that its own policy forbids, no errors.
            own = (f"http://{server.http}/", f"blob:http://{server.http}/", "data:")
            assert all(address.startswith(own) for address in page.requested()), page.requested()
            assert page.complaints() == []

    asyncio.run(inside())


def test_the_page_needs_nothing_from_elsewhere(server: Served) -> None:
    status, headers, body = ask(server, "GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    text = body.decode()
    assert not re.search(r'(src|href)="(?!data:)', text) and "@import" not in text
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}


@needs_browser
def test_it_shows_the_model_its_blocks_and_its_parity(server: Served) -> None:
    bundle = qm.load_bundle(dynamic_bundle())

    async def look(page: Page) -> None:
        text = await page.evaluate("document.body.innerText")
        assert bundle.manifest["model"]["title"] in text and MODEL in text
        assert "parity passed" in text and "3 of 10 blocks pruned" in text
        assert bundle.manifest["files"]["model.onnx"]["sha256"] in text
        assert await page.evaluate("document.querySelectorAll('.block').length") == 10
        assert await page.evaluate("document.querySelectorAll('.block.pruned').length") == 3
        assert await page.evaluate("document.querySelectorAll('#errors rect').length") == 20

    visit(server, look)


@needs_browser
def test_a_dropped_image_is_classified_and_figures_move(server: Served, tmp_path: Path) -> None:
    images, labels = digits(3)
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(file_of(image))

    async def look(page: Page) -> None:
        before = await page.evaluate("document.getElementById('answered').textContent")
        await page.choose("#file", *paths[:2])
        await page.until("document.querySelectorAll('.result .bars').length === 2")
        # The last one stands first.
        first = "document.querySelector('.result .bar span').textContent"
        assert await page.evaluate(first) == str(labels[1])
        # A drop, as far as a script can make one.
        content = list(paths[2].read_bytes())
        await page.evaluate(
            f"""(() => {{
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array({content})], "dropped.png", {{type: "image/png"}}));
                const target = document.getElementById("drop");
                target.dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true, cancelable: true}}));
            }})()"""
        )
        await page.until("document.querySelectorAll('.result .bars').length === 3")
        assert await page.evaluate(first) == str(labels[2])
        assert "dropped.png" in await page.evaluate("document.querySelector('.result').innerText")
        await page.until(f"document.getElementById('answered').textContent !== {before!r}")
        await page.until("parseFloat(document.getElementById('p50').textContent) > 0")

    visit(server, look)


@needs_browser
def test_it_fits_wide_and_narrow_windows_light_and_dark(server: Served) -> None:
    async def look(page: Page) -> None:
        grounds = set()
        for width, dark in ((1400, False), (1400, True), (360, False), (360, True)):
            await page.resize(width, 800, dark=dark)
            assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2

    visit(server, look)


@needs_browser
def test_what_is_no_image_gets_a_message(server: Served, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")

    async def inside() -> None:
        browser = find_browser()
        assert browser is not None
        async with open_page(browser, f"http://{server.http}/") as page:
            await page.choose("#file", tmp_path / "no.png")
            await page.until("document.querySelectorAll('.result .fault').length === 1")
            text = await page.evaluate("document.querySelector('.result').innerText")
            assert "cannot be read as JPEG or PNG" in text and "no.png" in text

    asyncio.run(inside())


@needs_browser
def test_a_dropped_image_is_segmented(tmp_path: Path) -> None:
    (tmp_path / "photograph.png").write_bytes(file_of(next(iter(sample_photographs().values()))))

    async def look(page: Page) -> None:
        assert await page.evaluate("document.getElementById('try').textContent") == "Segment an image"
        await page.choose("#file", tmp_path / "photograph.png")
        await page.until("document.querySelectorAll('.result img.output').length === 1")
        await page.until("document.querySelector('.result img.output').naturalWidth === 32")
        legend = await page.evaluate("document.querySelector('.result .legend').innerText")
        (one,) = qm.load_bundle(segmenter_bundle()).predict(tmp_path / "photograph.png")
        assert all(label in legend for label in one.labels.values()) and "%" in legend
        color = "getComputedStyle(document.querySelector('.legend .key')).backgroundColor"
        assert (await page.evaluate(color)).startswith("rgb(")

    with serving(segmenter_bundle()) as server:
        visit(server, look)


@needs_browser
def test_a_model_of_arrays_has_no_place_for_images_and_says_why() -> None:
    async def look(page: Page) -> None:
        assert await page.evaluate("document.getElementById('drop').offsetParent === null")
        text = await page.evaluate("document.body.innerText")
        assert "This model takes arrays alone: the model takes first (batch, 3, 32, 48) and second" in text
        assert "first (batch, 3, 32, 48), second (batch, 3, 32, 48) → change (batch, 1, 8, 12), score" in text
        assert await page.evaluate("document.querySelectorAll('#errors rect').length") >= 1

    with serving(toy_bundles.change()) as server:
        visit(server, look)
