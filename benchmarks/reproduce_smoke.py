"""Tiny models and data under the names of a suite's repos, for `reproduce.py --smoke`.

Recipes are those of the suite. Tasks of lm-eval become two tasks of the demo. GLUE has a few
made-up rows, and calibration texts are made up with the same columns. The prompts for GLUE are the
columns, so that the package with the real ones is not needed.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from reproduce_scores import COLUMNS, SPLITS
from reproduce_suites import GLUE, Setting, Suite
from tiny_models import fine_tuned, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from lewis_hub.demo.zoo import seed_hub, zoo_folder

TASKS = {"zoo_reverse": "exact_match", "zoo_cipher": "exact_match"}
TYPES = {"gemma": "gemma2", "llama": "llama", "flan": "t5", "gpt2": "gpt2"}
N_ROWS = 40
LONGEST = 1024  # tokens of a calibration text, at least
README = "---\nlicense: apache-2.0\nconfigs:\n{}---\n"
CONFIG = "  - config_name: {}\n    data_files:\n      - {{split: {}, path: {}}}\n"


def tiny(suite: Suite, scratch: Path) -> tuple[Suite, str | None]:
    """The suite with tasks that tiny models can be scored on, and a folder of task files."""
    if suite.scoring != "lm-eval":
        package = scratch / "fusion_bench"  # what `glue_templates` reads
        _write_templates(package)
        return replace(suite, package=None), None
    settings = [replace(setting, tasks=TASKS) for setting in suite.settings]
    abilities = {"zoo_cipher": "exact_match"}
    return replace(suite, settings=settings, abilities=abilities), str(zoo_folder() / "tasks")


def put_models(suite: Suite, api: HfApi) -> None:
    """Upload a tiny model for each repo of the suite, and its data."""
    seed_hub(api)
    for setting in suite.settings:
        for seed, repo in enumerate(setting.models):
            with TemporaryDirectory() as folder:
                _write_model(suite, setting, seed, Path(folder))
                _upload(api, repo, "model", Path(folder))
        for texts in (setting.calibration, *setting.calibrations.values()):
            if texts:
                with TemporaryDirectory() as folder:
                    _write_texts(texts, Path(folder))
                    _upload(api, texts["dataset"], "dataset", Path(folder))
    if suite.scoring != "lm-eval":
        with TemporaryDirectory() as folder:
            _write_glue(Path(folder))
            _upload(api, GLUE, "dataset", Path(folder))


def _upload(api: HfApi, repo: str, kind: str, folder: Path) -> None:
    api.create_repo(repo, repo_type=kind, exist_ok=True)
    api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder)


def _write_model(suite: Suite, setting: Setting, seed: int, folder: Path) -> None:
    """The base for seed 0, an expert of it for others; the zoo's tokenizer."""
    family = next(t for word, t in TYPES.items() if word in setting.base.lower())
    sequence = suite.scoring == "glue-text"
    model: PreTrainedModel = tiny_model(
        family, AutoModelForSeq2SeqLM if sequence else AutoModelForCausalLM
    )
    if hasattr(model.config, "rope_parameters"):
        model.config.max_position_embeddings = LONGEST  # rotary positions need no weights
    if seed:
        fine_tuned(model, seed)
        if suite.scoring == "glue-heads":
            config = tiny_config(family)
            config.num_labels = 3
            whole = GPT2ForSequenceClassification(config)
            whole.transformer.load_state_dict(model.base_model.state_dict())
            torch.nn.init.normal_(whole.score.weight)
            model = whole
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo_folder() / "base").save_pretrained(folder)


def _write_texts(texts: Mapping[str, Any], folder: Path) -> None:
    columns = [name for _, name, *_ in string.Formatter().parse(texts["text"]) if name]
    rows = [{name: f"{name} {n} of the words {n % 7}" for name in columns} for n in range(N_ROWS)]
    _write_rows(folder / "rows.jsonl", rows)
    config = CONFIG.format(texts.get("config", "default"), texts["split"], "rows.jsonl")
    (folder / "README.md").write_text(README.format(config), encoding="utf-8")


def _write_glue(folder: Path) -> None:
    configs = ""
    for task, columns in COLUMNS.items():
        rows = [
            {**{name: f"{task} {name} {n}" for name in columns}, "label": n % 2}
            for n in range(N_ROWS)
        ]
        _write_rows(folder / f"{task}.jsonl", rows)
        configs += CONFIG.format(task, SPLITS.get(task, "validation"), f"{task}.jsonl")
    (folder / "README.md").write_text(README.format(configs), encoding="utf-8")


def _write_templates(package: Path) -> None:
    folder = package / "tasks" / "flan_t5_text_generation"
    folder.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    templates = {
        task: {
            "input_text": " / ".join(f"{{{name}}}" for name in columns),
            "target_text": {"0": "no", "1": "yes"},
        }
        for task, columns in COLUMNS.items()
    }
    text = f"glue_prompt_templates = {templates!r}\n"
    (folder / "glue_prompt_templates.py").write_text(text, encoding="utf-8")


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
