"""Chromium without a window, spoken to over pipes in its own protocol."""

import itertools
import json
import os
import selectors
import subprocess
import time

PROGRAM = "chromium"


class Browser:
    """One page of a browser of its own.

    Attributes:
      errors: What the page's console said was wrong.
      hosts: Every host that was asked for something.
    """

    def __init__(self, profile):
        self.errors, self.hosts = [], set()
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        command = (
            f"exec {PROGRAM} --headless --no-sandbox --disable-gpu --remote-debugging-pipe "
            f"--user-data-dir={profile} --no-first-run about:blank 3<&{their_in} 4>&{their_out}"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL
        )
        os.close(their_in)
        os.close(their_out)
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)
        [target] = [
            one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"
        ]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._selector.close()

    def call(self, method: str, **params) -> dict:
        """Makes a call and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script: str):
        """Runs JavaScript in the page and returns its value."""
        made = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in made, made
        return made["result"].get("value")

    def until(self, script: str, seconds: float = 20.0):
        """Waits until JavaScript has a value that is true, and returns it."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, (script, self.run("document.body.innerText"))
            time.sleep(0.02)
        return value

    def press(self, key: str, modifiers: int = 0) -> None:
        """Presses a key: 2 is Ctrl."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    def write(self, text: str) -> None:
        """Types text where the focus is."""
        self.call("Input.insertText", text=text)

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            assert self._selector.select(30), "the browser is silent"
            data = os.read(self._in, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        data, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(data)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.hosts.add(params["request"]["url"].split("/")[2])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(params["args"])
        return message
