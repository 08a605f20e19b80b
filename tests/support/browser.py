"""A headless Chromium that opens a file, and says what happened: spoken to over its debugging pipe.

The protocol (https://chromedevtools.github.io/devtools-protocol) is JSON with a zero byte after each message,
on file descriptors 3 (to the browser) and 4 (from it).
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions")
QUIET = ("--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync")

# Puts its first two arguments, descriptors, to 3 and 4 by way of others, and becomes the rest.
STARTER = """import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])"""


def find() -> str | None:
    """The browser's path; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Seen:
    """What a page did while it was open: messages on its console, and all that it asked for, by address."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """One browser with one page; use as a context."""

    def __init__(self, path: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="porter-browser-", ignore_cleanup_errors=True)
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        command = [path, *FLAGS, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(to_read), str(to_write), *command, "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._ids, self._session, self._rest, self.seen = itertools.count(1), "", b"", Seen()

    def __enter__(self) -> Browser:
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(p["targetId"] for p in pages if p["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, file: Path, *, width: int, dark: bool) -> None:
        """Show a file in a window of that width, and wait until it is loaded; `seen` begins anew."""
        self.seen = Seen()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.as_uri())
        deadline = time.monotonic() + 60
        while self.ask("document.readyState") != "complete" or not self.ask("document.title"):
            assert time.monotonic() < deadline, "the page does not load"

    def ask(self, expression: str) -> object:
        """What a JavaScript expression is, in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, to: Path) -> None:
        """The whole page, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: object) -> dict:
        """One command of the protocol, and its answer."""
        message = {"id": next(self._ids), "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            self._note(answer)
            if answer.get("id") == message["id"]:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
        raise AssertionError(f"the browser ended: {method}")

    def _messages(self) -> Iterator[dict]:
        while True:
            while b"\0" not in self._rest:
                ready, _, _ = select.select([self._in], [], [], 120)
                assert ready, "the browser does not answer"
                if not (more := os.read(self._in, 1 << 20)):
                    return
                self._rest += more
            head, self._rest = self._rest.split(b"\0", 1)
            yield json.loads(head)

    def _note(self, message: dict) -> None:
        about, said = message.get("method"), message.get("params", {})
        if about == "Network.requestWillBeSent":
            self.seen.requests.append(said["request"]["url"])
        elif about == "Log.entryAdded":
            self.seen.console.append(said["entry"]["text"])
        elif about == "Runtime.consoleAPICalled":
            self.seen.console.append(str(said["args"]))
        elif about == "Runtime.exceptionThrown":
            self.seen.console.append(str(said["exceptionDetails"]))
