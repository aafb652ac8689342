"""Strangers send a Space no files, and no body that is larger than a recipe."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from templates.space.bodies import MAX_BYTES, LimitedBodies


@pytest.fixture
def client():
    async def count(request):
        return PlainTextResponse(str(len(await request.body())))

    routes = [Route("/", count, methods=["GET", "POST"])]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(LimitedBodies)]))


def in_pieces(n_bytes):
    """A body without a Content-Length."""
    for begin in range(0, n_bytes, 1 << 20):
        yield b"a" * min(1 << 20, n_bytes - begin)


@pytest.mark.parametrize("n_bytes", [0, 5, MAX_BYTES])
def test_a_body_within_the_limit_arrives(client, n_bytes):
    answers = [client.post("/", content=body) for body in (b"a" * n_bytes, in_pieces(n_bytes))]

    assert [(one.status_code, one.text) for one in answers] == [(200, str(n_bytes))] * 2


def test_a_larger_body_is_refused_while_it_is_read(client):
    answers = [
        client.post("/", content=body)
        for body in (b"a" * (MAX_BYTES + 1), in_pieces(MAX_BYTES + 1), in_pieces(10 * MAX_BYTES))
    ]

    assert [one.status_code for one in answers] == [413] * 3


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "Multipart/Form-Data"])
def test_files_are_refused(client, kind):
    refused = client.post("/", content=b"--x--", headers={"Content-Type": kind})

    assert (refused.status_code, refused.text) == (415, "This Space takes no files")


def test_a_request_without_a_body_is_answered(client):
    assert client.get("/").text == "0"
