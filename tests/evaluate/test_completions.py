"""What a server of completions answers: the scores of transformers, or one message."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import re
import ssl
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from completions_server import NOWHERE, serving
from scored_models import result

from lewis_hub.errors import EvaluationError

ESC = chr(27)


def test_concurrent_requests_give_the_scores_of_transformers(own_tasks, poor_model, server, capfd):
    args = {"base_url": server.url, "num_concurrent": 2}

    plain = result(own_tasks, poor_model, "after", "choose")
    told = result(
        *(own_tasks, poor_model, "after", "choose"),
        **{"backend": "local-completions", "backend_args": args, "batch_size": 4},
    )

    assert told.tasks == plain.tasks
    assert "Requesting API" not in capfd.readouterr().err  # it is no progress of ours


def without_echo(choices):
    """The log probability of the new token alone."""
    for choice in choices:
        choice["logprobs"] = {name: found[-1:] for name, found in choice["logprobs"].items()}
    return choices


def with_likelihoods(value):
    def edit(choices):
        for choice in choices:
            choice["logprobs"]["token_logprobs"][-2] = value
        return choices

    return edit


def with_text(value):
    return lambda choices: [choice | {"text": value} for choice in choices]


NO_LIKELIHOODS = (
    r"the server was asked for the log probabilities of \d+ tokens and one more, and gave "
)


@pytest.mark.parametrize(
    ("task", "edit", "problem"),
    [
        ("choose", without_echo, NO_LIKELIHOODS + "1$"),
        ("choose", with_likelihoods(True), NO_LIKELIHOODS + "none, or what is none$"),
        ("choose", with_likelihoods(2.0), NO_LIKELIHOODS + "none, or what is none$"),
        ("choose", with_likelihoods(None), NO_LIKELIHOODS + "none, or what is none$"),
        ("choose", lambda found: found[:-1], "the server gave 0 answers to 1 prompts$"),
        ("after", with_text(None), "the server gave an answer without a text$"),
        ("after", with_text(["one"]), "the server gave an answer without a text$"),
        ("after", lambda found: [*found, found[0]], "the server gave 2 answers to 1 prompts$"),
        (
            *("after", lambda found: [one | {"index": 7} for one in found]),
            "the server did not number its 1 answers from 0$",
        ),
        (
            *("after", lambda found: [one | {"index": [0]} for one in found]),
            "the server did not number its 1 answers from 0$",
        ),
    ],
)
def test_answers_that_do_not_fit_the_requests_are_no_scores(
    own_tasks, good_model, server, task, edit, problem
):
    """A server that ignores `echo` gave all texts the likelihood 1."""
    served = {"backend": "local-completions", "backend_args": {"base_url": server.url}}
    server.edit = edit
    try:
        with pytest.raises(EvaluationError) as caught:
            result(own_tasks, good_model, task, **served)
    finally:
        server.edit = lambda choices: choices

    told = str(caught.value).splitlines()[0].rstrip(".")
    assert re.fullmatch(f"{server.url}: {problem}", told)


def test_the_api_key_is_in_no_message(own_tasks, good_model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving() as server:
        server.answer = lambda request: request.send(
            401, {}, [b"no such key: " + request.headers["authorization"].encode()]
        )
        args = {"base_url": server.url, "max_retries": 1}
        with pytest.raises(EvaluationError) as caught:
            result(own_tasks, good_model, "after", backend="local-completions", backend_args=args)

    problem = "the server answered 401: no such key: Bearer ..."
    assert str(caught.value).startswith(f"{server.url}: {problem}")


@pytest.fixture
def certificate(tmp_path):
    """A file with a key and a certificate of 127.0.0.1 that it signed itself."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, today = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(today - timedelta(1)).not_valid_after(today + timedelta(1))
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = made.add_extension(addresses, critical=False).sign(key, hashes.SHA256())
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    file = tmp_path / "here.pem"
    file.write_bytes(
        key.private_bytes(pem, kind, serialization.NoEncryption()) + signed.public_bytes(pem)
    )
    return file


@pytest.mark.parametrize("num_concurrent", [1, 2])
def test_a_certificate_that_requests_trusts_is_trusted(
    own_tasks, good_model, certificate, monkeypatch, num_concurrent
):
    """Each of concurrent requests had a connection of its own, until no more could be opened."""
    pytest.importorskip("tenacity")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context=context) as server:
        args = {"base_url": server.url, "num_concurrent": num_concurrent, "max_retries": 1}
        served = {"backend": "local-completions", "backend_args": args}
        with pytest.raises(EvaluationError, match="SSLCertVerificationError"):
            result(own_tasks, good_model, "after", **served)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        before = server.n_connections

        found = result(own_tasks, good_model, "after", **served)

    assert found.tasks == result(own_tasks, good_model, "after").tasks
    assert len(server.requests) == 10
    assert num_concurrent == 1 or server.n_connections - before == num_concurrent


def test_one_request_at_a_time_is_made_inside_a_running_loop(own_tasks, good_model, server):
    """Such as that of a notebook."""
    served = {"backend": "local-completions", "backend_args": {"base_url": server.url}}

    async def cell():
        return result(own_tasks, good_model, "after", **served)

    assert asyncio.run(cell()).tasks == result(own_tasks, good_model, "after").tasks


def test_a_server_that_is_not_there_is_one_message(own_tasks, good_model):
    pytest.importorskip("tenacity")
    args = {"base_url": NOWHERE, "max_retries": 1}

    with pytest.raises(EvaluationError) as caught:
        result(own_tasks, good_model, "after", backend="local-completions", backend_args=args)

    assert str(caught.value).startswith(
        f"{NOWHERE}: the server did not answer: ConnectionRefusedError: "
    )
    assert str(caught.value).endswith("Start it, or correct `base_url`.")


def compressed(request):
    content = gzip.compress(b" " * 10_000_000)
    request.send(200, {"content-encoding": "gzip"}, [content])


def endless(request):
    request.send(200, {}, itertools.repeat(b" " * 65536))


def slow(request):
    request.send(200, {}, (time.sleep(0.2) or b" " for _ in itertools.count()))


def slow_head(request):
    request.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
    for _ in range(1000):
        time.sleep(0.2)
        request.wfile.write(b"x")


def page(request):
    request.send(200, {"content-type": "text/html"}, [b"<html>Please sign in</html>"])


def deep(request):
    request.send(200, {}, [b"[" * 100_000])


def failing(request):
    request.send(500, {}, [f"{ESC}]0;title\a\n::error::no".encode() + b"x" * 100_000])


@pytest.mark.parametrize("num_concurrent", [1, 2])
@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (compressed, r"the server compressed its answer \(gzip\), unasked"),
        (endless, r"the server answered more than 1,[01]\d\d,\d{3} bytes to a request"),
        (slow, "the server did not answer: TimeoutError: it took more than 1 s"),
        (slow_head, "the server did not answer: TimeoutError: it took more than 1 s"),
        (page, r"the answer of the server is no JSON: Expecting value: line 1 .*"),
        (deep, "the answer of the server cannot be read: its values are in each other more .*"),
        (failing, r"the server answered 500: \\x1b]0;title\\x07 ::error::nox{160,200}\."),
    ],
)
def test_the_answers_of_a_server_have_limits(
    own_tasks, good_model, caplog, answer, problem, num_concurrent
):
    pytest.importorskip("tenacity")
    started = time.monotonic()
    with serving() as server:
        server.answer = answer
        args = {"base_url": server.url, "num_concurrent": num_concurrent}
        args |= {"timeout": 1, "max_retries": 1}
        with pytest.raises(EvaluationError) as caught:
            result(own_tasks, good_model, "after", backend="local-completions", backend_args=args)

    told = str(caught.value).splitlines()[0].rstrip(".") + "."
    assert re.match(f"{re.escape(server.url)}: {problem}", told)
    assert time.monotonic() - started < 20
    assert ESC not in caplog.text
