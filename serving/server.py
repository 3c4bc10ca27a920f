"""vLLM's OpenAI server as a child process, and one greedy request to it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm.serving.process import ServerProcess, free_port


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


class Server(ServerProcess):
    """vLLM's server on the CPU in float32.

    Args:
        venv: where vLLM is installed.
        checkpoint: the folder to serve.
        plugin: whether this package's plugin is loaded; no other is.
        max_length: longest sequence, in tokens.
        max_images: most pictures of a request.
        log: file for what the server prints.
    """

    def __init__(
        self, venv: Path, checkpoint: Path, *, plugin: bool, max_length: int, max_images: int, log: Path
    ) -> None:
        port = free_port()
        command = [
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
            f"--port={port}",
        ]
        defaults = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment = {**defaults, **os.environ, "VLLM_PLUGINS": "nvlm" if plugin else ""}
        super().__init__("vLLM", command, environment, port=port, log=log)

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
        status, content = self.chat({**greedy, **body})
        if status != 200:
            return Answer(status, content, [], [], [])
        answer = json.loads(content)
        choice = answer["choices"][0]
        steps = choice["logprobs"]["content"]
        logprobs = [{_token_id(entry["token"]): entry["logprob"] for entry in step["top_logprobs"]} for step in steps]
        return Answer(status, "", answer["prompt_token_ids"], choice["token_ids"], logprobs)


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))
