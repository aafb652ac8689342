"""A small server of OpenAI-style completions on the loopback; a request names a model's folder."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

import torch
from running_server import running
from transformers import AutoModelForCausalLM, AutoTokenizer

NOWHERE = "http://127.0.0.1:9/v1/completions"  # where no server is
LOADING = Lock()  # transformers changes its classes while it loads a model


@cache
def load(folder: str):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def loaded(folder: str):
    with LOADING:
        return load(folder)


@torch.no_grad()
def logprobs(folder: str, tokens: list[int]) -> torch.Tensor:
    model, _ = loaded(folder)
    return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def scored(folder: str, prompt: list[int]) -> dict:
    """The prompt with its log probabilities, and one more token, as `echo` asks for."""
    found = logprobs(folder, prompt)
    tokens = [*prompt, int(found[-1].argmax())]
    rows = list(zip(found, tokens[1:], strict=True))
    best = [{str(int(row.argmax())): float(row.max())} for row, _ in rows]
    own = [float(row[token]) for row, token in rows]
    return {"text": "", "logprobs": {"token_logprobs": [None, *own], "top_logprobs": [None, *best]}}


def generated(folder: str, prompt: list[int], asked: dict) -> dict:
    model, tokenizer = loaded(folder)
    tokens = list(prompt)
    for _ in range(asked["max_tokens"]):
        tokens.append(int(logprobs(folder, tokens)[-1].argmax()))
    text = tokenizer.decode(tokens[len(prompt) :])
    for stop in asked.get("stop") or ():
        text = text.partition(stop)[0] if stop else text
    return {"text": text}


class Completions(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(asked)
        if self.server.answer:
            self.close_connection = True
            with suppress(ConnectionError):  # the client has gone
                self.server.answer(self)
            return
        one = scored if asked.get("echo") else lambda f, p: generated(f, p, asked)
        folder = self.server.folders.get(asked["model"], asked["model"])
        if not Path(folder).is_dir():
            self.send_error(404)
            return
        choices = [{"index": i, **one(folder, p)} for i, p in enumerate(asked["prompt"])]
        body = json.dumps({"choices": self.server.edit(choices)}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers["content-encoding"] = "identity"
        self.send(200, headers, [body])

    def send(self, status: int, headers: dict[str, str], pieces: Iterable[bytes]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    n_connections = 0

    def process_request(self, *accepted) -> None:
        self.n_connections += 1
        super().process_request(*accepted)


@contextmanager
def serving(
    folders: dict[str, str] | None = None, context: ssl.SSLContext | None = None
) -> Iterator[Server]:
    """The server; `requests` are those it got, `folders` the models that it knows by a name.

    `edit` changes the answers to a request, and `answer`, if it is set, sends another one. With a
    `context` it speaks TLS.
    """
    server = Server(("127.0.0.1", 0), Completions)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.requests, server.folders = [], folders or {}
    server.edit, server.answer = lambda choices: choices, None
    with running(server) as url:
        address = url.replace("http:", "https:") if context else url
        server.url = f"{address}/v1/completions"
        yield server
