"""A headless Chromium, spoken to over two pipes: no driver and no package is needed beside the browser itself."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def installed() -> str | None:
    """Returns the path of a Chromium or Chrome; None if there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page of a browser that is started for it.

    Attributes:
        complaints: errors that a page wrote to its console, exceptions, and files that it could not load.
    """

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_commands, self._to = os.pipe()
        self._from, write_answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        # The browser reads commands from file 3 and answers on file 4.
        redirect = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        profile = f"--user-data-dir={self._profile.name}"
        command = [str(installed()), *flags, "--remote-debugging-pipe", profile, "about:blank"]
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", redirect, *command],
            pass_fds=(read_commands, write_answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._rest, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        pages = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command of the Chrome DevTools Protocol, and returns its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        number = self._number
        while True:
            answer = self._next(60.0)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._events.append(answer)

    def _next(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {seconds:g} seconds")
            self._rest += os.read(self._from, 1 << 20)
        message, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(message))

    def open(self, url: str) -> None:
        """Opens a page and waits until it has loaded; what it complains of is added to `complaints`."""
        self._events.clear()
        failed = self("Page.navigate", url=url).get("errorText")
        if failed:
            self.complaints.append(f"{url}: {failed}")
            return
        seen: list[dict[str, Any]] = []
        while not any(event.get("method") == "Page.loadEventFired" for event in seen):
            seen.append(self._events.pop(0) if self._events else self._next(60.0))
        self.evaluate("new Promise(done => setTimeout(done, 50))")  # scripts that wait for the page
        for event in [*seen, *self._events]:
            if complaint := _complaint(event):
                self.complaints.append(f"{url}: {complaint}")

    def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression in JavaScript."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Gives the page a size in pixels, and a colour scheme."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: str, whole: bool = False) -> None:
        """Writes a picture of what is seen, or of the whole page, as PNG."""
        data = self("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as file:
            file.write(b64decode(data))


def _complaint(event: dict[str, Any]) -> str | None:
    method, params = event.get("method"), event.get("params", {})
    if method == "Runtime.exceptionThrown":
        details = params["exceptionDetails"]
        return str(details.get("exception", {}).get("description", details["text"]))
    if method == "Runtime.consoleAPICalled" and params["type"] == "error":
        return " ".join(str(argument.get("value", "")) for argument in params["args"])
    if method == "Log.entryAdded" and params["entry"]["level"] == "error":
        return f"{params['entry']['text']} {params['entry'].get('url', '')}"
    if method == "Network.loadingFailed" and not params.get("canceled"):
        return f"could not load a {params['type']}: {params['errorText']}"
    return None
