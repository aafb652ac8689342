"""A proxy between a client and the embedded Hub that answers some calls wrongly, for tests."""

from __future__ import annotations

import gzip
import re
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # not the one that tests replace
from urllib.parse import urlsplit

from running_server import running

SAME = "the address itself"
DEEP = b"[" * 100_000
PAGE = b"<html><title>Sign in to this network</title></html>"
NEVER_FORWARDED = {"connection", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Answer:
    """An answer; `body` may be another than `headers` announce."""

    status: int
    headers: dict[str, str]  # with lower-case names
    body: bytes
    pause_s: float = 0.0  # before each byte

    def saying(self, **headers):
        """The same with other headers; None removes one."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        both = {**self.headers, **named}
        return replace(self, headers={n: str(v) for n, v in both.items() if v is not None})

    def sending(self, body):
        """The same with another body, whose length is announced."""
        return replace(self, body=body).saying(content_length=len(body))


def _other_range(answer):
    """As many bytes from the next one on, in place of those that were asked for."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("content-range", ""))
    if found is None:
        return answer
    start, stop, size = map(int, found.groups())
    moved = answer.sending(answer.body[1:] + b"\0")
    return moved.saying(content_range=f"bytes {start + 1}-{stop + 1}/{size}")


def _refusing(status, pause_s):
    return lambda answer: Answer(status, {"retry-after": str(pause_s)}, b"").sending(b"{}")


FOR_EVER = f'"api";r=0;t={"9" * 5000}'
FAULTS = {  # name -> what becomes of an answer
    "another range": _other_range,
    "other bytes": lambda answer: answer.sending(bytes(len(answer.body))),
    "too long": lambda answer: answer.sending(answer.body + bytes(1000)),
    "too short": lambda answer: answer.sending(answer.body[: len(answer.body) // 2]),
    "cut": lambda answer: answer.saying(content_length=len(answer.body) + 1),
    "slow": lambda answer: replace(answer, pause_s=0.02),
    "compressed": lambda a: a.sending(gzip.compress(a.body)).saying(content_encoding="gzip"),
    "not compressed": lambda answer: answer.saying(content_encoding="gzip"),
    "a page": lambda _: Answer(200, {"content-type": "text/html"}, b"").sending(PAGE),
    "too deep": lambda a: a.sending(DEEP).saying(content_type="application/json"),
    "nothing": lambda answer: answer.sending(b""),
    "a redirect loop": lambda _: Answer(302, {"location": SAME}, b"").sending(b""),
    "429": _refusing(429, 1),
    "429 for a day": _refusing(429, 86_400),
    "503": _refusing(503, 1),
    "500 for a day": _refusing(500, 86_400),
    "429 for ever": lambda _: Answer(429, {"ratelimit": FOR_EVER}, b"").sending(b"{}"),
}


def kind(target):
    """A request's target without what is another one each time."""
    return re.sub(r"[0-9a-f]{16,}|\d+", "*", target)


@dataclass
class Proxy:
    """Stands before two addresses of a Hub; `strike` is applied to the answer to one call."""

    hub: object
    url: str = ""
    calls: list = field(default_factory=list)  # (method, kind of target, equal ones before)
    counted: Counter = field(default_factory=Counter)
    struck: tuple | None = None  # the call, the fault, whether those after it too
    n_struck: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self, struck=None):
        """Forget the calls so far; strike one of the next."""
        self.calls.clear()
        self.counted.clear()
        self.struck, self.n_struck = struck, 0

    def answered(self, method, target, answer):
        """The answer as the client gets it."""
        one = method, kind(target)
        with self.lock:
            call = (*one, self.counted[one])
            self.counted[one] += 1
            self.calls.append(call)
            if self.struck is None:
                return answer
            wanted, fault, is_lasting = self.struck
            if call == wanted or (is_lasting and one == wanted[:2] and call[2] > wanted[2]):
                self.n_struck += 1
                answer = FAULTS[fault](answer)
                if answer.headers.get("location") == SAME:
                    return answer.saying(location=target)
        return answer


@contextmanager
def proxy(hub):
    """Serve a proxy of a Hub whose storage is behind it too."""
    stands = Proxy(hub)
    storage_url = hub.storage_url
    with _served(stands, hub.url) as url, _served(stands, storage_url) as storage:
        stands.url, hub.storage_url = url, storage
        try:
            yield stands
        finally:
            hub.storage_url = storage_url


@contextmanager
def _served(stands, upstream):
    place = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self):
            answer = stands.answered(self.command, self.path, _forwarded(place, self))
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            announced = int(answer.headers["content-length"])
            self.close_connection = announced != len(answer.body)
            if self.command == "HEAD":
                return
            with suppress(ConnectionError):  # the client reads no further
                for piece in _pieces(answer):
                    self.wfile.write(piece)

        def log_message(self, *_):
            pass

    for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.answer)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_):
            pass

    with running(Server(("127.0.0.1", 0), Handler)) as url:
        yield url


def _pieces(answer):
    if not answer.pause_s:
        yield answer.body
        return
    for i in range(len(answer.body)):
        sleep(answer.pause_s)
        yield answer.body[i : i + 1]


def _forwarded(place, request):
    """The Hub's own answer to a request."""
    told = {n: v for n, v in request.headers.items() if n.lower() != "transfer-encoding"}
    if request.headers.get("transfer-encoding") == "chunked":
        body = b"".join(iter(lambda: _chunk(request.rfile), b""))
        told["Content-Length"] = str(len(body))
    else:
        body = request.rfile.read(int(request.headers.get("content-length", 0)))
    connection = HTTPConnection(place)
    try:
        connection.request(request.command, request.path, body or None, told)
        found = connection.getresponse()
        content = found.read()
        headers = {n.lower(): v for n, v in found.getheaders() if n.lower() not in NEVER_FORWARDED}
        length = found.headers.get("content-length", len(content))
        return Answer(found.status, headers, content).saying(content_length=length)
    finally:
        connection.close()


def _chunk(file):
    n_bytes = int(file.readline(), 16)
    content = file.read(n_bytes)
    file.readline()
    return content
