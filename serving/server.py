"""vLLM's OpenAI server as a child process, and one greedy request to it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 600
REQUEST_SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """What the server answered.

    Args:
        status: of HTTP.
        error: its message where the status is not 200.
        prompt_ids: the prompt's ids.
        token_ids: the greedy tokens.
        logprobs: at each step the logarithms of the likeliest tokens' probabilities, by id.
    """

    status: int
    error: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]


class Server:
    """vLLM's server on the CPU in float32, from entering the context to leaving it.

    Args:
        venv: where vLLM is installed.
        checkpoint: the folder to serve.
        plugin: whether this package's plugin is loaded; no other is.
        max_length: longest sequence, in tokens.
        max_images: most pictures of a request.
        log: file for what the server prints.

    Raises:
        RuntimeError: on entering, where the server does not start; the message has the end of its log.
    """

    def __init__(
        self, venv: Path, checkpoint: Path, *, plugin: bool, max_length: int, max_images: int, log: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._log = log
        self._command = [
            str(venv.absolute() / "bin" / "python"),
            "-m",
            "vllm.entrypoints.openai.api_server",  # `vllm serve`, whose own command the CPU wheel breaks
            f"--model={checkpoint.resolve()}",
            "--trust-remote-code",
            "--served-model-name=nvlm",
            "--dtype=float32",
            "--enforce-eager",
            f"--max-model-len={max_length}",
            f"--max-num-batched-tokens={max_length}",
            "--max-num-seqs=4",
            "--chat-template-content-format=openai",  # vLLM's own guess moves all pictures to the front
            f"--limit-mm-per-prompt={json.dumps({'image': max_images})}",
            "--host=127.0.0.1",
            f"--port={self._port}",
        ]
        defaults = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._environment = {**defaults, **os.environ, "VLLM_PLUGINS": "nvlm" if plugin else ""}

    def __enter__(self) -> "Server":
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
                raise RuntimeError(f"vLLM ended with status {self._process.returncode}. {self._log}:\n{self._tail()}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"vLLM did not start within {START_SECONDS} s. {self._log}:\n{self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def _stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def ask(self, body: dict[str, Any], *, max_tokens: int, top: int) -> Answer:
        """Send a greedy chat request.

        Args:
            body: its messages, and other fields of OpenAI's chat completions.
            max_tokens: most new tokens.
            top: how many logprobs a step.
        """
        greedy = {
            "model": "nvlm",
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "logprobs": True,
            "top_logprobs": top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/chat/completions",
            data=json.dumps({**greedy, **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            return Answer(error.code, _message(error.read()), [], [], [])
        choice = answer["choices"][0]
        steps = choice["logprobs"]["content"]
        logprobs = [{_token_id(entry["token"]): entry["logprob"] for entry in step["top_logprobs"]} for step in steps]
        return Answer(200, "", answer["prompt_token_ids"], choice["token_ids"], logprobs)


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _message(body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
