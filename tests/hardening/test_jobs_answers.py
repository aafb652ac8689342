"""Wrong answers to the calls of Jobs: to start one, to list and delete schedules, to follow a log.

What is asked for is done, or one message says why not, in bounded time. hf-xet's own calls, which
upload the files of a Job, have limits of their own.
"""

from __future__ import annotations

import errno
import json
import os
import random

import pytest
from effort import SEED, times
from faulty_proxy import FAULTS
from huggingface_hub import HfApi

from hardening.test_answer_shapes import cases, changed, striking
from hardening.test_http import LONGEST_PAUSES_S, calls_of, said
from lewis_hub.cli.jobs import LogEnd, job_result, printed_document
from lewis_hub.errors import PublishError
from lewis_hub.hub import jobs
from lewis_hub.hub.failures import HubRepo, call_hub
from lewis_hub.hub.jobs import JobRequest, SubmittedJob
from lewis_hub.hub.publish import Publication, publish
from lewis_hub.localhub.server import serve

pytest.importorskip("hf_xet")

PRINTS = 'print(\'one\\n{\\n "status": "refused"\\n}\'); raise SystemExit(3)'
DRAWN_FAULTS, DRAWN_VALUES = 6, 25  # of an operation, in the gate


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("jobs") / "hub", jobs=True) as running:
        yield running


class Schedule:
    """Makes a schedule, lists it and deletes it; then starts a Job."""

    error = PublishError

    def __init__(self, hub, folder):
        self.hub, self.file = hub, folder / "recipe.yaml"
        self.file.write_text("")

    def prepare(self):
        api = self.hub.api()
        for one in api.list_scheduled_jobs(namespace=self.hub.user):
            api.delete_scheduled_job(scheduled_job_id=one.id, namespace=self.hub.user)

    def run(self, url):
        api = HfApi(endpoint=url, token=self.hub.write_token)
        asked = JobRequest(["-h"], {"recipe.yaml": self.file}, "lewis-hub", None, None, None)
        made = jobs.submit(api, asked, "@daily")
        listed = jobs.scheduled(api, None)
        assert all(isinstance(text, str | None) for one in listed for text in one.values())
        jobs.unschedule(api, made.id, None)
        return bool(jobs.submit(api, asked).url)


class Follow(Schedule):
    """Passes on the log of a Job."""

    def __init__(self, hub, folder):
        super().__init__(hub, folder)
        made = hub.api().run_job(image="x", command=["python", "-c", PRINTS], namespace=hub.user)
        self.job = SubmittedJob(made.id, hub.user, made.url)
        hub.api().wait_for_job(made.id, namespace=hub.user)

    def prepare(self):
        pass

    def run(self, url):
        log, api = LogEnd(), HfApi(endpoint=url, token=self.hub.write_token)
        code = jobs.follow(api, self.job, log.add)
        self.found = job_result(code, printed_document(log.lines))
        return True


def calls(behind, operation):
    """The calls but for those of hf-xet, which are made in no Python."""
    found = calls_of(behind, operation)
    return [call for call in found if "/api/" in call[1] and "xet" not in call[1]]


@pytest.mark.parametrize("kind", [Schedule, Follow])
def test_a_wrong_answer_to_a_call_of_jobs_is_told(hub, behind, pauses_s, tmp_path, kind, subtests):
    operation, told = kind(hub, tmp_path), []
    named = calls(behind, operation)
    pairs = [(call, fault, lasts) for call in named for fault in FAULTS for lasts in (False, True)]
    for case in random.Random(SEED).sample(pairs, times(DRAWN_FAULTS, len(pairs))):
        with subtests.test(str(case)):
            operation.prepare()
            behind.reset(case)
            pauses_s.clear()
            told.append(said(operation, behind.url))
            assert behind.n_struck
            assert sum(pauses_s) < LONGEST_PAUSES_S
            assert hub.write_token not in told[-1]
    assert any(told)


@pytest.mark.parametrize("kind", [Schedule, Follow])
def test_json_of_another_shape_is_told(hub, behind, pauses_s, tmp_path, kind, subtests):
    operation, forward, told = kind(hub, tmp_path), behind.answered, []
    for call, path, other in cases(behind, operation, calls(behind, operation), DRAWN_VALUES):
        with subtests.test(f"{call} {path} {other!r}"):
            operation.prepare()
            behind.reset()
            striking(behind, forward, call, lambda answer, p=path, o=other: changed(answer, p, o))
            told.append(said(operation, behind.url))
            behind.answered = forward
            assert hub.write_token not in told[-1]
    assert any(told)


def test_a_log_whose_events_have_another_shape_is_told(hub, behind, pauses_s, tmp_path):
    operation, forward = Follow(hub, tmp_path), behind.answered
    assert operation.run(behind.url)
    assert operation.found == (3, "refused")
    for data in (b"5", b"null", b'["x"]', b"{}", b'"x', b"[" * 100_000, b"9" * 5000):
        body = b'data: {"data": ' + data + b"}\n\n"

        def answered(method, target, answer, body=body):
            answer = forward(method, target, answer)
            return answer.sending(body) if target.endswith("/logs") else answer

        behind.answered = answered
        assert "does not answer like a Hub" in said(operation, behind.url)


@pytest.mark.parametrize("address", ["x", "a\nb::error::c"])
@pytest.mark.parametrize("work", ["a Job", "a push"])
def test_a_failure_of_hf_xet_is_one_message(hub, behind, tmp_path, monkeypatch, work, address):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    operation, forward = Schedule(hub, tmp_path), behind.answered
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1" * 3000)

    def push(url):
        api = HfApi(endpoint=url, token=hub.write_token)
        publish(api, tmp_path, "lewis/sent", Publication("Sent"), lambda _: None)

    def misleading(method, target, answer):
        answer = forward(method, target, answer)
        if "xet-write-token" in target:
            told = json.loads(answer.body) | {"casUrl": address}
            answer = answer.sending(json.dumps(told).encode())
        return answer

    behind.answered = misleading
    with pytest.raises(PublishError) as raised:
        (operation.run if work == "a Job" else push)(behind.url)

    assert f"cannot reach {behind.url}" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_that_hf_xet_tells_is_no_failure_of_the_hub(number):
    inside = {"__name__": "huggingface_hub.file_download"}  # hf-xet has no frames of its own
    exec(f"def call(): raise OSError('I/O error: I/O error: full (os error {number})')", inside)

    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        call_hub(HubRepo.to_publish(HfApi(), "a/b"), inside["call"])

    assert raised.value.errno == number
