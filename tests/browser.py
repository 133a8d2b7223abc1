"""A headless Chromium without a network, driven over its DevTools protocol: just what the page tests need."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--proxy-server=127.0.0.1:9", "--remote-debugging-port=0"),
)
CUT_OFF = ("--host-resolver-rules=MAP * ~NOTFOUND",)
# WebGL 2 by software, and servers of this machine but no others
WEBGL = (
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--proxy-bypass-list=127.0.0.1"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def find() -> str | None:
    """Chromium's path, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one browser; ``problems`` collects console errors, exceptions and every request to a network."""

    def __init__(self, program: str, profile: Path, flags: Sequence[str] = CUT_OFF) -> None:
        kept = [flag for flag in FLAGS if flags is CUT_OFF or flag != "--disable-gpu"]
        self.process = subprocess.Popen(
            [program, f"--user-data-dir={profile}", *kept, *flags, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.socket = self._connect(profile / "DevToolsActivePort")
        except BaseException:
            self.process.kill()
            raise
        self.numbers = itertools.count(1)
        self.problems: list[str] = []
        self.loaded = False
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _connect(self, port_file: Path, patience: float = 60) -> websocket.WebSocket:
        end = time.monotonic() + patience
        while not (port_file.exists() and len(lines := port_file.read_text(encoding="utf-8").split()) == 2):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Chromium does not start (exit status {self.process.poll()})")
            time.sleep(0.05)
        port, path = lines
        # Chromium refuses connections that name an origin; a proxy in the environment is not for this one.
        return websocket.create_connection(
            f"ws://127.0.0.1:{port}{path}", timeout=patience, suppress_origin=True, http_no_proxy=["127.0.0.1"]
        )

    def send(self, method: str, **parameters: object) -> dict:
        """Call the protocol and wait for the answer; what happens meanwhile is noted."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := self._receive()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self) -> dict:
        message = json.loads(self.socket.recv())
        values = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Runtime.exceptionThrown":
                self.problems.append(values["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning"):
                self.problems.append(str(values["args"]))
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                self.problems.append(values["entry"]["text"])
            case "Network.requestWillBeSent" if not values["request"]["url"].startswith(("file:", "data:")):
                self.problems.append(f"asks for {values['request']['url']}")
        return message

    def open(self, page: Path, width: int = 1200, height: int = 900, mobile: bool = False) -> None:
        """Load a file at a window width in CSS pixels."""
        self.visit(page.resolve().as_uri(), width, height, mobile)

    def visit(self, address: str, width: int = 1200, height: int = 900, mobile: bool = False) -> None:
        """Load a page by its address."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.problems.clear()
        self.loaded = False
        self.send("Page.navigate", url=address)
        while not self.loaded:
            self._receive()

    def wait(self, expression: str, patience: float = 240) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + patience
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"still not true: {expression}; {self.problems[-3:]}")
            time.sleep(0.5)

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception']['description']}")
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of the first element that the selector finds."""
        x, y = self.evaluate(
            f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{ block: "center", inline: "center", behavior: "instant" }});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.evaluate("new Promise(requestAnimationFrame)")  # what follows a click (a toggle event) has happened

    def screenshot(self, destination: Path, part: tuple[float, float, float, float] | None = None) -> None:
        """The whole page as a PNG, or of what is seen of it (x, y, width, height)."""
        if part is None:
            what = {"captureBeyondViewport": True}
        else:
            what = {"clip": {**dict(zip(("x", "y", "width", "height"), part, strict=True)), "scale": 1}}
        picture = self.send("Page.captureScreenshot", format="png", **what)["data"]
        destination.write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        """End the browser."""
        self.socket.close()
        self.process.kill()
        self.process.wait()
