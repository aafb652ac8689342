"""Answers of the embedded Hub about Jobs, schedules, and buckets that bring them their files."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from lewis_hub.hub import xet
from lewis_hub.hub.access import Grant, Refusal, check_writes
from lewis_hub.hub.answers import object_id
from lewis_hub.hub.call import Call
from lewis_hub.hub.jobs_server import Job, Jobs, Schedule
from lewis_hub.hub.store import now


def run(call: Call) -> Response:
    """POST /api/jobs/NAMESPACE: a command starts."""
    grant, document = _writer(call), call.json()
    hidden = document.pop("secrets", None) or {}
    job = _jobs(call).start(call.parts["namespace"], grant.user, document, hidden)
    return JSONResponse(_job(job))


def listing(call: Call) -> Response:
    """GET /api/jobs/NAMESPACE, newest first."""
    _writer(call)
    own = [
        job for job in list(_jobs(call).jobs.values()) if job.namespace == call.parts["namespace"]
    ]
    return JSONResponse([_job(job) for job in reversed(own)])


def details(call: Call) -> Response:
    """GET /api/jobs/NAMESPACE/ID."""
    return JSONResponse(_job(_found(call)))


def logs(call: Call) -> Response:
    """GET /api/jobs/NAMESPACE/ID/logs: events as the Job writes lines, until it ends."""
    job = _found(call)

    def events() -> Iterator[str]:
        for when, line in job.follow():
            yield f"data: {json.dumps({'data': line, 'timestamp': when})}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def cancel(call: Call) -> Response:
    """POST /api/jobs/NAMESPACE/ID/cancel."""
    job = _found(call)
    _jobs(call).cancel(job)
    return JSONResponse(_job(job))


def schedule(call: Call) -> Response:
    """POST /api/scheduled-jobs/NAMESPACE."""
    grant, document = _writer(call), call.json()
    spec = dict(document.get("jobSpec") or {})
    hidden = spec.pop("secrets", None) or {}
    made = Schedule(
        secrets.token_hex(12),
        call.parts["namespace"],
        grant.user,
        spec,
        hidden,
        str(document.get("schedule")),
        now(),
    )
    _jobs(call).schedules[made.id] = made
    return JSONResponse(_schedule(made))


def schedules(call: Call) -> Response:
    """GET /api/scheduled-jobs/NAMESPACE."""
    _writer(call)
    known = list(_jobs(call).schedules.values())
    own = [one for one in known if one.namespace == call.parts["namespace"]]
    return JSONResponse([_schedule(one) for one in own])


def unschedule(call: Call) -> Response:
    """DELETE /api/scheduled-jobs/NAMESPACE/ID."""
    made = _scheduled(call)
    del _jobs(call).schedules[made.id]
    return JSONResponse({})


def trigger(call: Call) -> Response:
    """POST /api/scheduled-jobs/NAMESPACE/ID/run: now, whatever the schedule says."""
    made = _scheduled(call)
    made.last = _jobs(call).start(made.namespace, made.user, made.spec, made.secrets)
    return JSONResponse(_job(made.last))


def create_bucket(call: Call) -> Response:
    """POST /api/buckets/NAMESPACE/NAME; one that is there is a conflict, with its address."""
    _writer(call)
    folder = _jobs(call).bucket(call.parts["namespace"], call.parts["name"])
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    url = f"{call.endpoint}/buckets/{call.parts['namespace']}/{call.parts['name']}"
    return JSONResponse({"url": url}, 409 if there else 200)


def bucket_token(call: Call) -> Response:
    """GET /api/buckets/NAMESPACE/NAME/xet-write-token: where hf_xet may put chunks."""
    _writer(call)
    return JSONResponse(
        {
            "casUrl": xet.new_upload(call.store.root),
            "accessToken": "local",
            "exp": int(time.time()) + xet.TOKEN_S,
        }
    )


def fill_bucket(call: Call) -> Response:
    """POST /api/buckets/NAMESPACE/NAME/batch: lines of JSON, each a file to add."""
    _writer(call)
    folder = _jobs(call).bucket(call.parts["namespace"], call.parts["name"])
    for line in call.body.splitlines():
        entry = json.loads(line)
        target = folder / entry["path"]
        if entry["type"] != "addFile" or not target.resolve().is_relative_to(folder.resolve()):
            raise Refusal(400, "This Hub's buckets take new files only")
        if not xet.join(call.store.root, entry["xetHash"], target):
            raise Refusal(400, f"{entry['path']} was not uploaded")
    return JSONResponse({"success": True})


def _jobs(call: Call) -> Jobs:
    if call.hub.jobs is None:
        raise Refusal(400, "This Hub runs no Jobs: start it with `lewis-hub hub --jobs`")
    return call.hub.jobs


def _writer(call: Call) -> Grant:
    return check_writes(call.grant, call.parts["namespace"], "job")


def _found(call: Call) -> Job:
    _writer(call)
    job = _jobs(call).jobs.get(call.parts["id"])
    if job is None or job.namespace != call.parts["namespace"]:
        raise Refusal(404, "Job not found")
    return job


def _scheduled(call: Call) -> Schedule:
    _writer(call)
    made = _jobs(call).schedules.get(call.parts["id"])
    if made is None or made.namespace != call.parts["namespace"]:
        raise Refusal(404, "Scheduled Job not found")
    return made


def _job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "createdAt": job.created_at,
        "owner": _owner(job.namespace),
        "initiator": {"type": "user", "id": object_id(job.user), "name": job.user},
        "status": {"stage": job.stage, "message": job.message},
        **_spec(job.spec),
    }


def _schedule(made: Schedule) -> dict[str, Any]:
    last = made.last
    return {
        "id": made.id,
        "createdAt": made.created_at,
        "owner": _owner(made.namespace),
        "schedule": made.schedule,
        "suspend": False,
        "concurrency": False,
        "jobSpec": _spec(made.spec),
        "status": {"lastJob": {"id": last.id, "at": last.created_at} if last else None},
    }


def _spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    known = ("dockerImage", "command", "arguments", "environment", "flavor", "labels", "volumes")
    return {key: spec.get(key) for key in known}


def _owner(namespace: str) -> dict[str, str]:
    return {"id": object_id(namespace), "name": namespace, "type": "user"}
