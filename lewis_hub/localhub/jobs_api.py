"""Answers of the embedded Hub about Jobs, schedules, and the buckets that hold files of Jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from lewis_hub.localhub import xet
from lewis_hub.localhub.access import Grant, Refusal
from lewis_hub.localhub.call import Call
from lewis_hub.localhub.jobs import Job, Jobs, Schedule
from lewis_hub.localhub.repositories import object_id

LOG_POLL_S = 0.05
SPEC = ("dockerImage", "command", "arguments", "environment", "flavor", "labels", "volumes")


def run(call: Call) -> Response:
    """POST /api/jobs/NAMESPACE: start a command."""
    grant, spec = _writer(call), call.json()
    variables = spec.pop("secrets", None) or {}
    job = _jobs(call).start(call.parts["namespace"], grant.user, spec, variables)
    return JSONResponse(_job_entry(job))


def jobs(call: Call) -> Response:
    """GET /api/jobs/NAMESPACE, newest first."""
    _writer(call)
    found = [job for job in _jobs(call).jobs.values() if job.namespace == call.parts["namespace"]]
    return JSONResponse([_job_entry(job) for job in reversed(found)])


def job(call: Call) -> Response:
    """GET /api/jobs/NAMESPACE/ID."""
    return JSONResponse(_job_entry(_find_job(call)))


def logs(call: Call) -> Response:
    """GET /api/jobs/NAMESPACE/ID/logs: the lines as events, until the Job ends."""
    job = _find_job(call)

    async def events() -> AsyncIterator[str]:
        n_sent = 0
        while job.active or n_sent < len(job.log):
            for when, line in job.log[n_sent:]:
                n_sent += 1
                yield f"data: {json.dumps({'data': line, 'timestamp': when})}\n\n"
            await asyncio.sleep(LOG_POLL_S)

    return StreamingResponse(events(), media_type="text/event-stream")


def cancel(call: Call) -> Response:
    """POST /api/jobs/NAMESPACE/ID/cancel."""
    job = _find_job(call)
    job.stop("CANCELED")
    return JSONResponse(_job_entry(job))


def create_schedule(call: Call) -> Response:
    """POST /api/scheduled-jobs/NAMESPACE."""
    grant, document = _writer(call), call.json()
    spec = dict(document.get("jobSpec") or {})
    variables = spec.pop("secrets", None) or {}
    cron = str(document.get("schedule"))
    made = Schedule(call.parts["namespace"], grant.user, spec, variables, cron)
    _jobs(call).schedules[made.id] = made
    return JSONResponse(_schedule_entry(made))


def schedules(call: Call) -> Response:
    """GET /api/scheduled-jobs/NAMESPACE."""
    _writer(call)
    known = _jobs(call).schedules.values()
    found = [item for item in known if item.namespace == call.parts["namespace"]]
    return JSONResponse([_schedule_entry(item) for item in found])


def delete_schedule(call: Call) -> Response:
    """DELETE /api/scheduled-jobs/NAMESPACE/ID."""
    del _jobs(call).schedules[_find_schedule(call).id]
    return JSONResponse({})


def trigger(call: Call) -> Response:
    """POST /api/scheduled-jobs/NAMESPACE/ID/run: run it now, whatever the schedule says."""
    item = _find_schedule(call)
    item.last = _jobs(call).start(item.namespace, item.user, item.spec, item.secrets)
    return JSONResponse(_job_entry(item.last))


def create_bucket(call: Call) -> Response:
    """POST /api/buckets/NAMESPACE/NAME; a bucket that exists is a conflict, with its address."""
    _writer(call)
    folder = _bucket(call)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    url = f"{call.endpoint}/buckets/{call.parts['namespace']}/{call.parts['name']}"
    return JSONResponse({"url": url}, 409 if existed else 200)


def bucket_token(call: Call) -> Response:
    """GET /api/buckets/NAMESPACE/NAME/xet-write-token: where hf_xet may write chunks."""
    _writer(call)
    return JSONResponse(xet.new_upload(call.store.root))


def fill_bucket(call: Call) -> Response:
    """POST /api/buckets/NAMESPACE/NAME/batch: lines of JSON, each a file to add."""
    _writer(call)
    folder = _bucket(call)
    for line in call.body.splitlines():
        entry = json.loads(line)
        target = folder / entry["path"]
        if entry["type"] != "addFile" or not target.resolve().is_relative_to(folder.resolve()):
            raise Refusal(400, "This Hub's buckets take new files only")
        if not xet.take_in(call.store.root, entry["xetHash"], target):
            raise Refusal(400, f"{entry['path']} was not uploaded")
    return JSONResponse({"success": True})


def _jobs(call: Call) -> Jobs:
    if call.hub.jobs is None:
        raise Refusal(400, "This Hub runs no Jobs: start it with `lewis-hub hub --jobs`")
    return call.hub.jobs


def _writer(call: Call) -> Grant:
    return call.owner(call.parts["namespace"], "job")


def _bucket(call: Call) -> Path:
    return _jobs(call).bucket(call.parts["namespace"], call.parts["name"])


def _find_job(call: Call) -> Job:
    _writer(call)
    job = _jobs(call).jobs.get(call.parts["id"])
    if job is None or job.namespace != call.parts["namespace"]:
        raise Refusal(404, "Job not found")
    return job


def _find_schedule(call: Call) -> Schedule:
    _writer(call)
    item = _jobs(call).schedules.get(call.parts["id"])
    if item is None or item.namespace != call.parts["namespace"]:
        raise Refusal(404, "Scheduled Job not found")
    return item


def _job_entry(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "createdAt": job.created_at,
        "owner": _owner(job.namespace),
        "initiator": {"type": "user", "id": object_id(job.user), "name": job.user},
        "status": {"stage": job.stage, "message": job.message},
        **_spec(job.spec),
    }


def _schedule_entry(item: Schedule) -> dict[str, Any]:
    last = item.last
    return {
        "id": item.id,
        "createdAt": item.created_at,
        "owner": _owner(item.namespace),
        "schedule": item.schedule,
        "suspend": False,
        "concurrency": False,
        "jobSpec": _spec(item.spec),
        "status": {"lastJob": {"id": last.id, "at": last.created_at} if last else None},
    }


def _spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec.get(key) for key in SPEC}


def _owner(namespace: str) -> dict[str, str]:
    return {"id": object_id(namespace), "name": namespace, "type": "user"}
