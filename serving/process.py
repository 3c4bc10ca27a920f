"""An OpenAI server as a child process: started, asked and ended."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

START_SECONDS = 1200
REQUEST_SECONDS = 600

Self = TypeVar("Self", bound="ServerProcess")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class ServerProcess:
    """A server on 127.0.0.1, from entering the context to leaving it.

    Args:
        name: what messages call it.
        command: what starts it.
        environment: its environment variables.
        port: where it listens.
        log: file for what it prints.

    Raises:
        RuntimeError: on entering, where the server does not start; the message has the end of its log.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], *, port: int, log: Path
    ) -> None:
        self._name = name
        self._command = command
        self._environment = environment
        self._url = f"http://127.0.0.1:{port}"
        self._log = log

    def __enter__(self: Self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._log.parent,  # Python imports from where it starts: not from a checkout of this package
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                status = self._process.returncode
                raise RuntimeError(f"{self._name} ended with status {status}. {self._log}:\n{self._tail()}")
            try:
                urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"{self._name} did not start within {START_SECONDS} s. {self._log}:\n{self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def _stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def chat(self, body: dict[str, Any]) -> tuple[int, str]:
        """Post to `/v1/chat/completions`: the HTTP status, and what came back or the error's message."""
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, _message(error.read().decode(errors="replace"))


def _message(body: str) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body
