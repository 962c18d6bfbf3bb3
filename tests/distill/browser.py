"""A headless Chromium that tests look at pages with: a small client of its DevTools protocol, over a pipe."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in one browser process; closes with its context.

    Attributes:
        events: what the browser has reported, each {"method", "params"}.
    """

    def __init__(self, profile: Path, seconds: float = 60.0) -> None:
        binary = find_browser()
        assert binary is not None
        self.seconds, self.events, self._ids, self._rest = seconds, [], itertools.count(1), b""
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", "about:blank"),
        ]
        # the protocol is spoken on file descriptors 3 and 4; a shell puts them there
        script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", script, binary, *options], pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self._session = None
            self.call("Browser.close")
            self._process.wait(self.seconds)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._write)
            os.close(self._read)

    def open(self, path: Path, width: int, height: int = 844, dark: bool = False) -> None:
        """Loads a file in a window of this size, afresh."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def accessible(self, role: str) -> list[str]:
        """The names of everything on the page that assistive technology is told to have this role."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        found = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") == role]
        return [node.get("name", {}).get("value", "") for node in found]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, requests that failed or were refused."""
        self.evaluate("1")  # what was reported before is read
        found = []
        for event in self.events:
            kind, what = event["method"], event["params"]
            if kind == "Runtime.exceptionThrown" or (
                kind == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert")
            ):
                found.append(json.dumps(what))
            elif kind == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
                found.append(what["entry"]["text"])
            elif kind == "Network.loadingFailed":
                found.append(json.dumps(what))
        return found

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        self.evaluate("1")
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"the browser said nothing for {self.seconds} s"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
