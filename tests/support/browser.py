"""A headless Chromium without network, driven over its DevTools protocol on a pair of pipes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--proxy-server=127.0.0.1:9", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One page that is open in it. Whatever goes wrong in the page is kept in ``wrong``."""

    def __init__(self, commands: int, answers: int, path: Path) -> None:
        self._commands = commands
        self._answers = os.fdopen(os.dup(answers), "rb")
        self._asked = 0
        self._session = ""
        self.wrong: list[str] = []
        self._target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        attached = self.tell("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        self.tell("Runtime.enable")
        self.resize(1150, 900)
        self.tell("Page.navigate", url=path.as_uri())
        self.ask("await until(() => document.readyState == 'complete')")

    def tell(self, method: str, /, **parameters: Any) -> Any:
        """Send a command of the protocol, and return its result."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.wrong.append(str(answer["params"]["exceptionDetails"]))
            if answer.get("id") == self._asked:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        raw = bytearray()
        while not raw.endswith(b"\0"):
            byte = self._answers.read1(1)
            assert byte, "the browser is gone"
            raw += byte
        message: dict[str, Any] = json.loads(raw[:-1])
        return message

    def ask(self, body: str) -> Any:
        """Return what an async function with this body returns in the page.

        Its ``until`` waits for a condition.
        """
        until = """const until = async condition => {
          while (!condition()) await new Promise(done => setTimeout(done, 10)); };"""
        expression = f"(async () => {{ {until} {body} }})()"
        answer = self.tell(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        """Make the window so large, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """Prefer light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.tell("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        picture = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(picture["data"]))

    def pdf(self) -> bytes:
        """Print it."""
        return b64decode(self.tell("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        """Close the page, not the browser."""
        self._session = ""
        self.tell("Target.closeTarget", targetId=self._target)
        self._answers.close()


class Browser:
    """A running Chromium; several tests may share it."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers

    @contextmanager
    def page(self, path: Path) -> Iterator[Page]:
        """Open a file; nothing may have gone wrong in it in the end."""
        page = Page(self._commands, self._answers, path)
        yield page
        assert not page.wrong
        page.close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("needs Chromium: apt-get install chromium")
    (read, commands), (answers, write) = os.pipe(), os.pipe()
    theirs, ours = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write))
    os.close(read)
    os.close(write)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$@" 3<&{theirs} 4>&{ours}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", program, *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(theirs, ours),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        try:
            yield Browser(commands, answers)
        finally:
            os.close(commands)  # it ends with that
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(answers)
