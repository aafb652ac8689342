"""One merge of `guidance.py`, in this process; it reuses measurements of earlier merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lewis_hub.display import Silent
from lewis_hub.workflow.calibrate import guide
from lewis_hub.workflow.fetch import fetch_whole
from lewis_hub.workflow.generated import FILE, requests_of, write_texts
from lewis_hub.workflow.job import prepare
from lewis_hub.workflow.merge import finish_model, write_weights
from lewis_hub.workflow.resolve import hub_api, read_recipe
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.statistics import Gathered, gather
from lewis_hub.workflow.texts import calibration_sets, draw_texts


def make(told: Mapping[str, Any], store: Path, output: Path) -> None:
    """Merge as `lewis_hub.merge_models` does, without card, lock and scores.

    Args:
        told: a recipe as a mapping, with absolute paths.
        store: folder for measurements, each with everything that determines it.
        output: folder for the weights.
    """
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text(json.dumps(told))
        api, progress = hub_api(), Silent()
        job = prepare(read_recipe(file), Execution(runner="inline"), api, progress)
        sets = calibration_sets(
            job.texts, draw_texts(job.texts, None, api, progress), job.sources.experts
        )
        files = fetch_whole(api, [one.source for one in job.sources.models], progress)
        loader, schedule, known = job.loader(files, Path(scratch), progress), None, Gathered()
        asked = requests_of(job.texts, sets, job.sources.experts)
        store.mkdir(parents=True, exist_ok=True)
        sets = write_texts(job.texts, asked, sets, loader, [store / FILE], None).sets
        if job.guide:
            schedule = guide(job.guide, sets, loader, [store / "importance.json"]).schedule
        if job.statistics:
            known = gather(job.statistics, sets, loader, schedule, store)
        planned = job.plan.plan(schedule, known.statistics)
        places = {**files.locations, **known.folders}
        shards = write_weights(planned, places, output, job.means, progress)
        finish_model(planned, shards, job.sidecars, files.sources, output)
