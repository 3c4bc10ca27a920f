"""Asks a server that speaks OpenAI's protocol, such as vLLM's, about a picture; needs nothing but the standard library.

Start one (docs/serving.md): `vllm serve tiny/checkpoint --trust-remote-code --max-model-len 2048`. Then
`python -m examples.serving http://localhost:8000/v1`, or cell by cell in a notebook.
"""

# %% A page as a data: URL; a server also takes addresses of pictures
import base64
import io
import json
import sys
import urllib.request
from typing import Any

from tiny.evaluate import held_out

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
sample = held_out("words", 1)[0]
question, truth = sample.questions[0]
file = io.BytesIO()
sample.pages[0].picture.save(file, "PNG")
picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def post(body: dict[str, Any]) -> Any:
    """The server's open answer to a request for a completion; an error of the server's is an HTTPError."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=300)


# %% Which model is served, and a question about the page
with urllib.request.urlopen(f"{url}/models", timeout=300) as response:
    model = json.load(response)["data"][0]["id"]
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}
with post(body) as response:
    answer = json.load(response)["choices"][0]["message"]["content"]
print(f"{question} {answer} (written is {truth})")

# %% The conversation goes on, and the answer comes piece by piece
messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "What is 37 + 5?"}]
print("What is 37 + 5? ", end="")
streamed = ""
with post({**body, "stream": True}) as response:
    for line in response:
        event = line.decode().strip().removeprefix("data: ")
        if event and event != "[DONE]":
            piece = json.loads(event)["choices"][0]["delta"].get("content") or ""
            streamed += piece
            print(piece, end="", flush=True)
print()
