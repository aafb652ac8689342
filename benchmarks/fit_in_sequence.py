"""What it costs to fit matrices in sequence: processor time, and the most memory of the process.

    python benchmarks/fit_in_sequence.py --models MODELS --data DATA [--blocks N]

MODELS has `base`, `expert-math` and `expert-strings`, DATA has `SKILL_train.jsonl`. `--blocks` fits
models that consist of their first N blocks. It prints JSON, without downloads, the start of the
process and the merge of the other tensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory

from guidance_variants import Bench, variants
from safetensors.torch import load_file, save_file

from lewis_hub.checkpoint import names
from lewis_hub.display import Silent
from lewis_hub.workflow.fetch import fetch_whole
from lewis_hub.workflow.job import prepare
from lewis_hub.workflow.resolve import hub_api, read_recipe
from lewis_hub.workflow.resources import Execution
from lewis_hub.workflow.statistics import gather
from lewis_hub.workflow.texts import calibration_sets, draw_texts

SKILLS = ("math", "strings")
VARIANT = "regmean merged 0.7"


def shortened(models: Path, n_blocks: int, output: Path) -> Path:
    """Copies of the models with their first blocks alone."""
    for name in ("base", *(f"expert-{skill}" for skill in SKILLS)):
        shutil.copytree(
            models / name, output / name, ignore=shutil.ignore_patterns("*.safetensors")
        )
        tensors = load_file(models / name / "model.safetensors")
        kept = {key: one for key, one in tensors.items() if (names.block(key) or 0) < n_blocks}
        save_file(kept, output / name / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((models / name / "config.json").read_text(encoding="utf-8"))
        config["num_hidden_layers"] = n_blocks
        (output / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return output


def measure(models: Path, data: Path, scratch: Path) -> dict[str, float]:
    bench = Bench(models, data, SKILLS)
    file = scratch / "recipe.yaml"
    file.write_text(json.dumps(variants(bench)[VARIANT].recipe(bench, 42)), encoding="utf-8")
    api, progress = hub_api(), Silent()
    job = prepare(read_recipe(file), Execution(runner="inline"), api, progress)
    assert job.statistics is not None
    drawn = draw_texts(job.texts, None, api, progress)
    sets = calibration_sets(job.texts, drawn, job.sources.experts)
    files = fetch_whole(api, [one.source for one in job.sources.models], progress)
    before = time.process_time()
    gather(job.statistics, sets, job.loader(files, scratch, progress), None, scratch)
    peak = getrusage(RUSAGE_SELF).ru_maxrss / 1024
    return {"processor_s": round(time.process_time() - before, 2), "peak_mib": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--blocks", type=int)
    given = parser.parse_args()
    with TemporaryDirectory() as made:
        scratch, models = Path(made), given.models
        if given.blocks:
            models = shortened(models, given.blocks, scratch / "models")
        print(json.dumps(measure(models.absolute(), given.data.absolute(), scratch)))


if __name__ == "__main__":
    main()
