"""A headless Chromium for tests, driven over its own pipe (Chrome DevTools Protocol), without a driver."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Seen(NamedTuple):
    """What a page did while it was open."""

    problems: list[str]
    """Console messages, exceptions, and requests for anything but the file itself."""
    overflow: int
    """Pixels by which the page is wider than the window."""
    smallest_text: float
    """Height of the smallest letters in a figure, in CSS pixels; infinite without figures."""
    text: str
    scripts: int
    violations: list[str]
    """Serious ones that axe found; empty where its source was not given."""


_MEASURE = """(() => {
  const heights = [...document.querySelectorAll("figure svg text")].map(
    (e) => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b));
  return JSON.stringify({
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    smallest: heights.length ? Math.min(...heights) : 1e9,
    text: document.body.innerText, scripts: document.scripts.length});
})()"""
_AXE = """axe.run().then((r) => JSON.stringify(r.violations
  .filter((v) => ["serious", "critical"].includes(v.impact)).map((v) => v.id + " " + v.nodes[0].html)))"""


class Chromium:
    """One browser; use :func:`chromium`."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def descriptors() -> None:
            # The protocol's pipes are file descriptors 3 and 4, where something else may be open already, the
            # pipes themselves too. So they first get numbers that nothing has.
            reads, writes = (fcntl.fcntl(pipe, fcntl.F_DUPFD, 100) for pipe in (to_read, to_write))
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        self._process = subprocess.Popen(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            preexec_fn=descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)

    def look(self, page: Path, *, width: int, scheme: str = "light", axe: str | None = None) -> Seen:
        """Open a page in a window of a width, with details open, and say what was seen."""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", {}, session)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._call("Emulation.setEmulatedMedia", media, session)
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", window, session)
        self._events.clear()
        self._call("Page.navigate", {"url": page.absolute().as_uri()}, session)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        open_all = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        self._value(open_all, session)
        found = json.loads(self._value(_MEASURE, session))
        problems = [_problem(event, page) for event in self._events]
        violations = []
        if axe is not None:
            # The protocol may evaluate where the page's own policy forbids every script.
            self._value(axe + "; 0", session)
            violations = json.loads(self._value(_AXE, session))
        self._call("Target.closeTarget", {"targetId": target})
        return Seen(
            problems=[problem for problem in problems if problem],
            overflow=found["overflow"],
            smallest_text=found["smallest"],
            text=found["text"],
            scripts=found["scripts"],
            violations=violations,
        )

    def _value(self, expression: str, session: str) -> Any:
        arguments = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self._call("Runtime.evaluate", arguments, session)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _call(self, method: str, arguments: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": arguments}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        received: dict[str, Any] = json.loads(message)
        if "method" in received:
            self._events.append(received)
        return received


def _problem(event: dict[str, Any], page: Path) -> str | None:
    method, said = event["method"], event.get("params", {})
    if method == "Network.requestWillBeSent":
        url = said["request"]["url"]
        return None if url == page.absolute().as_uri() or url.startswith("data:") else f"request: {url}"
    if method == "Runtime.consoleAPICalled":
        return f"console: {said['args']}"
    if method == "Runtime.exceptionThrown":
        return f"exception: {said['exceptionDetails']['text']}"
    if method == "Log.entryAdded":
        return f"log: {said['entry']['text']}"
    return None


@contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """A browser that ends with the block.

    Args:
        profile: An empty folder for what it keeps.
    """
    browser = Chromium(profile)
    try:
        yield browser
    finally:
        browser.close()
