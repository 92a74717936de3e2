"""A web page as a person sees it: headless Chromium, told what to do over its own DevTools protocol."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# MLflow opens its assistant beside the page of whoever has not seen it.
SEEN = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


def look(url: str, *, until: str, width: int = 1300, height: int = 1000, picture: Path | None = None) -> str:
    """The text of a page, once this JavaScript is true of it. picture: where a PNG of it goes."""
    with _chromium() as port:
        return asyncio.run(_look(port, url, until=until, width=width, height=height, picture=picture))


@contextlib.contextmanager
def _chromium() -> Iterator[int]:
    assert CHROMIUM is not None, "there is no Chromium on PATH"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # As root, in containers, Chromium's sandbox does not start. It opens nothing but a server on this machine.
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
        ]
        process = subprocess.Popen(
            [*command, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = Path(folder, "DevToolsActivePort")
            deadline = time.monotonic() + 60
            while not ready.exists() or not ready.read_text():
                assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
                time.sleep(0.05)
            yield int(ready.read_text().split()[0])
        finally:
            process.kill()
            process.wait()


async def _look(port: int, url: str, *, until: str, width: int, height: int, picture: Path | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
        address = next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page")
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        number = 0

        async def call(method: str, **parameters: Any) -> Any:
            nonlocal number
            number += 1
            await socket.send_json({"id": number, "method": method, "params": parameters})
            while (answer := await socket.receive_json(timeout=60)).get("id") != number:
                pass
            return answer["result"]

        async def evaluate(expression: str) -> Any:
            return (await call("Runtime.evaluate", expression=expression, returnByValue=True))["result"].get("value")

        await call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        await call("Page.enable")
        await call("Page.addScriptToEvaluateOnNewDocument", source=SEEN)
        await call("Page.navigate", url=url)
        deadline = time.monotonic() + 90
        while await evaluate(f"Boolean(document.body) && Boolean({until})") is not True:
            text = await evaluate("document.body && document.body.innerText")
            assert time.monotonic() < deadline, f"{url} does not show {until}, but:\n{text}"
            await asyncio.sleep(0.2)
        if picture is not None:
            png = (await call("Page.captureScreenshot", format="png"))["data"]
            picture.write_bytes(base64.b64decode(png))
        return await evaluate("document.body.innerText")
