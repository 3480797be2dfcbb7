"""A page of a running server in a real Chromium without a window, driven by its DevTools protocol.

`browser.py` opens files; here the test goes on with its server meanwhile, so that everything is asynchronous.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp


class Page:
    """One page of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Carry out a command of the protocol; what happens meanwhile is kept in `events`."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), 30)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    async def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript."""
        found = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 30) -> Any:
        """Wait until an expression is true, and return it."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not (value := await self.evaluate(expression)):
            if asyncio.get_running_loop().time() > deadline:
                text = await self.evaluate("document.body.innerText")
                raise TimeoutError(f"{expression} did not become true; the page says {text[:2000]!r}")
            await asyncio.sleep(0.1)
        return value

    async def choose(self, selector: str, *files: Path) -> None:
        """Choose files in a file input."""
        root = (await self.send("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.send("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in files])

    async def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window, and whether its user likes dark pages."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        found = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Errors that the browser has logged: exceptions, what a policy forbade, and requests that failed."""
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"])[:500])
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        """The addresses that the page has asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]


@asynccontextmanager
async def open_page(browser: str, address: str) -> AsyncIterator[Page]:
    """Open an address in a browser of its own, with an empty profile."""
    # Its processes write on for a moment after the first has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}", "about:blank"]
        # Its own services want a message bus, and complain where there is none.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ports = Path(profile) / "DevToolsActivePort"
            for _ in range(600):
                if ports.is_file() and len(ports.read_text().split()) == 2:
                    break
                assert process.poll() is None, "the browser has ended"
                await asyncio.sleep(0.1)
            port = ports.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [entry for entry in await answer.json() if entry["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
                        await page.send(f"{domain}.enable")
                    await page.send("Page.navigate", url=address)
                    await page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
                    yield page
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
