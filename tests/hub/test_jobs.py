"""Jobs on the embedded Hub, through huggingface_hub: commands as processes of this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, Volume
from huggingface_hub.errors import HfHubHTTPError

from lewis_hub.errors import PublishError
from lewis_hub.hub import jobs
from lewis_hub.hub.failures import HubRepo, read_answer
from lewis_hub.hub.jobs import JobRequest, SubmittedJob
from lewis_hub.localhub.jobs import without_uv
from lewis_hub.localhub.server import serve

ME = "lewis"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("jobs") / "hub", jobs=True) as hub:
        yield hub


@pytest.fixture
def api(running) -> HfApi:
    return running.api()


def run(api: HfApi, code: str, **options: object) -> SubmittedJob:
    command = ["python", "-c", code]
    job = api.run_job(image="python:3.12", command=command, namespace=ME, **options)
    return SubmittedJob(job.id, ME, job.url)


def followed(api: HfApi, job: SubmittedJob) -> tuple[int | None, list[str]]:
    said: list[str] = []
    return jobs.follow(api, job, said.append), said


def test_a_job_s_lines_are_handed_on_in_order_until_it_ends(api):
    job = run(api, "import sys; print('one'); print('two', file=sys.stderr, flush=True)")

    code, said = followed(api, job)

    assert code == 0
    assert sorted(said) == ["one", "two"]
    assert api.inspect_job(job_id=job.id, namespace=ME).status.stage == "COMPLETED"


@pytest.mark.parametrize("code", [1, 3, 130])
def test_a_job_ends_with_its_command_s_exit_code(api, code):
    found, said = followed(api, run(api, f"raise SystemExit({code})"))

    assert found == code
    assert said == [f"Job ERROR: Job failed with exit code: {code}. Reason: Error"]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Job failed with exit code: 137. Reason: OOMKilled", 137),
        ("exit code 1", 1),
        ("Job timeout", None),
        ("exit code 0", None),
        ("exit code 256", None),  # as a status it would be 0
    ],
)
def test_a_failure_has_the_exit_code_of_a_failure(message, code):
    assert jobs.exit_code_in(message) == code


def test_lines_come_while_the_job_still_runs(api):
    job = run(api, "import time; print('now', flush=True); time.sleep(60)")

    lines = api.fetch_job_logs(job_id=job.id, follow=True, namespace=ME)

    assert next(iter(lines)) == "now"
    assert api.inspect_job(job_id=job.id, namespace=ME).status.stage == "RUNNING"
    api.cancel_job(job_id=job.id, namespace=ME)


TROUBLE = {
    "no log": lambda hub: hub.fail("/logs", 503, times=3),
    "the log breaks off": lambda hub: hub.fail("/logs", "drop", after_bytes=250),
    "no status": lambda hub: hub.fail(r"/api/jobs/lewis/\w{24}\?", 500, times=3),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_on_the_way_loses_no_line_says_none_twice_and_keeps_the_exit_code(
    api, running, no_pauses, trouble
):
    job = run(api, "print('\\n'.join(map(str, range(50)))); raise SystemExit(3)")
    api.wait_for_job(job.id, namespace=ME)
    TROUBLE[trouble](running)

    code, said = followed(api, job)

    assert running.faults.pending == []
    assert code == 3
    assert said[:-1] == [str(number) for number in range(50)]


def test_a_hub_that_stays_away_is_told_and_the_job_goes_on(api, running, no_pauses):
    job = run(api, "import time; print('now', flush=True); time.sleep(60)")
    assert next(iter(api.fetch_job_logs(job_id=job.id, follow=True, namespace=ME))) == "now"
    running.fail("/logs", 503, times=100)

    with pytest.raises(PublishError, match="still fails with 503 after several attempts"):
        jobs.follow(api, job, lambda _: None)

    running.faults.clear()
    assert api.inspect_job(job_id=job.id, namespace=ME).status.stage == "RUNNING"
    api.cancel_job(job_id=job.id, namespace=ME)


@pytest.mark.parametrize(("cron", "path"), [(None, "/api/jobs/"), ("@weekly", "/scheduled-jobs/")])
@pytest.mark.parametrize("fault", ["drop", 504])
def test_a_job_whose_answer_is_lost_may_exist(api, running, tmp_path, cron, path, fault):
    """The same command would start a second one, and both cost money."""
    (tmp_path / "recipe.yaml").write_text("")
    files = {"recipe.yaml": tmp_path / "recipe.yaml"}
    request = JobRequest(["--version"], files, "lewis-hub", None, None, ME)
    running.fail(path, fault, times=1, after_bytes=0, method="POST")

    with pytest.raises(PublishError) as caught:
        jobs.submit(api, request, cron)

    problem, remedy = str(caught.value).splitlines()
    assert problem.startswith(f"{ME}: no good answer came ({'504' if fault == 504 else ''}")
    assert problem.endswith("), so the Job may exist.")
    assert remedy == f"Look at {running.url}/settings/jobs before you start it again."


def test_a_log_that_never_comes_is_asked_for_six_times(api, running, no_pauses):
    """huggingface_hub itself repeats this call five times."""
    job = run(api, "import time; time.sleep(60)")
    fault = running.fail("/logs", "drop", times=100)

    with pytest.raises(PublishError, match="cannot reach"):
        jobs.follow(api, job, lambda _: None)

    assert fault.times == 100 - 6
    running.faults.clear()
    api.cancel_job(job_id=job.id, namespace=ME)


def test_a_cancelled_job_ends_with_its_children(api, tmp_path):
    sign = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(sign)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    job = run(api, code)
    time.sleep(0.3)

    api.cancel_job(job_id=job.id, namespace=ME)

    assert followed(api, job) == (None, ["Job CANCELED: the Hub does not say why"])
    time.sleep(2)
    assert not sign.exists()


def test_a_job_that_takes_too_long_is_ended(api):
    code, said = followed(api, run(api, "import time; time.sleep(60)", timeout="1s"))

    assert (code, said) == (None, ["Job ERROR: Job timeout"])


def test_a_command_that_is_not_there_fails_the_job(api):
    job = api.run_job(image="x", command=["no-such-command"], namespace=ME)

    code, said = followed(api, SubmittedJob(job.id, ME, job.url))

    assert code == 127
    assert said == ["Job ERROR: Job failed with exit code: 127. Reason: No such file or directory"]


def test_a_job_without_a_command_is_refused(api):
    with pytest.raises(HfHubHTTPError, match="A Job needs a command"):
        api.run_job(image="python:3.12", command=[], namespace=ME)

    assert not any(job.status.stage == "SCHEDULING" for job in api.list_jobs(namespace=ME))


def test_a_process_is_told_of_its_job_and_of_nothing_else_here(api, running, monkeypatch):
    monkeypatch.setenv("MY_OWN_SECRET", "hunter2")
    code = "import os; print(sorted(os.environ)); print(os.environ['HF_TOKEN'][:6])"
    job = run(api, code, env={"COLOUR": "blue"}, secrets={"HF_TOKEN": "hf_abc123"})

    (names, start) = followed(api, job)[1]

    assert start == "hf_abc"
    assert "MY_OWN_SECRET" not in names
    assert set(eval(names)) - {"LC_CTYPE"} == {  # noqa: S307 - a list that this test printed
        *("COLOUR", "HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET"),
        *("HF_TOKEN", "HOME", "JOB_ID", "LANG", "PATH", "TMPDIR"),
    }


def test_secrets_are_in_no_answer_and_on_no_disk(api, running):
    hidden = {"HF_TOKEN": "hf_not_to_be_seen"}
    job = run(api, "print('done')", secrets=hidden)
    made = api.create_scheduled_job(
        image="x", command=["true"], schedule="@daily", secrets=hidden, namespace=ME
    )
    followed(api, job)

    told = [
        api.inspect_job(job_id=job.id, namespace=ME),
        *api.list_jobs(namespace=ME),
        *api.list_scheduled_jobs(namespace=ME),
        *api.fetch_job_logs(job_id=job.id, namespace=ME),
        made,
    ]

    assert all("hf_not_to_be_seen" not in repr(one) for one in told)
    kept = [path for path in running.root.rglob("*") if path.is_file()]
    assert all(b"hf_not_to_be_seen" not in path.read_bytes() for path in kept)


def test_files_travel_to_a_job_and_its_token_as_a_secret_only(api, running, tmp_path):
    pytest.importorskip("hf_xet")
    (tmp_path / "recipe.yaml").write_text("merge_method: ties\n")
    (tmp_path / "task.yaml").write_text("task: mine\n")
    files = {"recipe.yaml": tmp_path / "recipe.yaml", "tasks/a.yaml": tmp_path / "task.yaml"}

    job = jobs.submit(api, JobRequest(["check", "/recipe"], files, "lewis-hub", None, None, None))

    code, said = followed(api, job)
    assert (code, said[-2]) == (1, "Add `models:`, or `slices:` to stack blocks; "
                                   "`lewis-hub schema` describes both.")  # fmt: skip
    info = api.inspect_job(job_id=job.id, namespace=ME)
    assert info.command == [
        *("uv", "run", "--with", "lewis-hub", "--python", "3.12"),
        *("lewis-hub", "check", "/recipe"),
    ]
    assert info.environment == {}
    assert api.token not in repr(info)
    (volume,) = info.volumes
    assert (volume.mount_path, volume.read_only) == ("/recipe", True)
    folder = running.root / "buckets" / ME / "jobs-artifacts" / volume.path
    there = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.yaml")}
    assert there == {"recipe.yaml": "merge_method: ties\n", "tasks/a.yaml": "task: mine\n"}


@pytest.mark.parametrize("cron", [None, "17 4 * * 1"])
def test_no_file_of_the_working_folder_replaces_a_word_of_the_command(
    api, running, tmp_path, monkeypatch, capsys, cron
):
    pytest.importorskip("hf_xet")
    monkeypatch.chdir(tmp_path)
    for name in ("lewis-hub", "merge", "recipe.yaml"):
        (tmp_path / name).write_text(f"secret in {name}")
    words = ["merge", "/recipe", "--repo", "me/blend", "-o", "missing.yaml"]
    files = {"recipe.yaml": tmp_path / "recipe.yaml"}

    made = jobs.submit(api, JobRequest(words, files, "lewis-hub==1.0", None, "1h", None), cron)

    listed = api.list_jobs if cron is None else api.list_scheduled_jobs
    (info,) = [getattr(one, "job_spec", one) for one in listed(namespace=ME) if one.id == made.id]
    assert info.command == [
        *("uv", "run", "--with", "lewis-hub==1.0", "--python", "3.12", "lewis-hub"),
        *words,
    ]
    assert info.docker_image == "ghcr.io/astral-sh/uv:python3.12-bookworm"
    assert [volume.mount_path for volume in info.volumes] == ["/recipe"]
    buckets = [path for path in (running.root / "buckets").rglob("*") if path.is_file()]
    assert not [path for path in buckets if b"secret in merge" in path.read_bytes()]
    assert capsys.readouterr().out == ""


def test_no_file_is_uploaded_to_a_bucket_that_everybody_can_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    files = {"recipe.yaml": tmp_path / "recipe.yaml"}
    with serve(tmp_path / "hub", jobs=True) as hub:
        api = hub.api()
        api.create_bucket(f"{ME}/jobs-artifacts")

        with pytest.raises(PublishError) as caught:
            jobs.submit(api, JobRequest(["merge"], files, "lewis-hub", None, None, ME))

        assert list(api.list_jobs(namespace=ME)) == []
    assert str(caught.value) == (
        f"lewis: everybody can read the bucket lewis/jobs-artifacts.\nMake it private in {hub.url}"
        "/buckets/lewis/jobs-artifacts/settings, then run the same command again."
    )
    assert not [path for path in (tmp_path / "hub/buckets").rglob("*") if path.is_file()]


def test_a_schedule_is_made_listed_triggered_and_deleted(api, tmp_path):
    pytest.importorskip("hf_xet")
    (tmp_path / "recipe.yaml").write_text("")
    files = {"recipe.yaml": tmp_path / "recipe.yaml"}
    asked = JobRequest(["merge", "/recipe"], files, "lewis-hub", "cpu-basic", "1h", ME)

    made = jobs.submit(api, asked, "17 4 * * 1")

    (found,) = [one for one in jobs.scheduled(api, ME) if one["id"] == made.id]
    assert (found["schedule"], found["flavor"]) == ("17 4 * * 1", "cpu-basic")
    started = api.trigger_scheduled_job(scheduled_job_id=made.id, namespace=ME)
    assert followed(api, SubmittedJob(started.id, ME, ""))[0] == 1  # an empty recipe
    jobs.unschedule(api, made.id, ME)
    assert made.id not in [one["id"] for one in jobs.scheduled(api, ME)]
    with pytest.raises(PublishError, match="Scheduled Job not found"):
        jobs.unschedule(api, made.id, ME)


def test_only_whoever_may_write_in_a_namespace_runs_jobs_there(running):
    running.add_token("hf_reader", "rita", "read")
    running.add_token("hf_writer", "wim", "write")
    for token, namespace in (("hf_reader", "rita"), ("hf_writer", ME), (False, ME)):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(endpoint=running.url, token=token).run_job(
                image="x", command=["true"], namespace=namespace
            )
        assert caught.value.response.status_code in (401, 403)


def test_a_job_finds_its_folder_below_a_relative_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serve(Path("hub"), jobs=True) as hub:
        api = hub.api()

        code, said = followed(api, run(api, "import os; print(os.path.isdir(os.environ['HOME']))"))

    assert (code, said) == (0, ["True"])


def test_a_hub_that_was_not_told_to_runs_nothing(hub):
    with pytest.raises(HfHubHTTPError, match=r"This Hub runs no Jobs: start it with `lewis-hub "):
        hub.api().run_job(image="x", command=["true"], namespace=hub.user)


@pytest.mark.parametrize("source", ["lewis/..", "../users", "lewis/none", "lewis"])
def test_a_volume_is_a_bucket_and_no_other_folder(api, source):
    volume = Volume(type="bucket", source=source, mount_path="/m")

    with pytest.raises(HfHubHTTPError) as caught:
        run(api, "pass", volumes=[volume])

    assert caught.value.response.status_code in (400, 404)


def test_of_uv_the_command_alone_is_run():
    command = ["uv", "run", "--with", "a", "--python", "3.12", "--with", "b", "tool", "--with", "x"]

    assert without_uv(command) == ["tool", "--with", "x"]
    assert without_uv([sys.executable, "run"]) == [sys.executable, "run"]


@pytest.mark.parametrize(
    "schedule",
    [
        {"id": "y" * 1001},
        {"command": ["lewis-hub", *["x"] * 1000]},
        {"command": ["lewis-hub", "x" * 10_001]},
    ],
)
def test_schedules_of_very_long_texts_are_an_answer_that_is_not_understood(schedule):
    """A table of an id of 30 MB and 1,000 others was drawn for minutes."""
    usual = {"id": "1", "schedule": "@weekly", "command": ["lewis-hub"], "flavor": None}
    hub_repo = HubRepo.to_publish(HfApi(), ME)

    assert read_answer(hub_repo, jobs.SCHEDULES, [usual])
    for listed in ([{**usual, **schedule}], [usual] * 1001):
        with pytest.raises(PublishError):
            read_answer(hub_repo, jobs.SCHEDULES, listed)
