"""Which architectures can be calibrated and merged: `python benchmarks/architectures.py`.

For every model type that transformers lists as a causal language model, and for some
encoder-decoders and vision-language models, this creates a tiny random base and two fine-tuned
experts, calibrates them by `lewis`, decides densities, merges by TIES, loads the result and runs
it. It prints a table; `--write FILE` also puts the table between the markers of a Markdown file.

`--mergekit PYTHON` (from an environment with mergekit 0.1.5) also merges each model by mergekit, by
TIES at density 0.5, and loads and runs the result in the same way.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
import yaml
from safetensors.torch import load_file
from tiny_models import fine_tuned, tiny_model

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.workflow import report as reporting

CAUSAL = "AutoModelForCausalLM"
SEQ2SEQ = ("bart", "led", "longt5", "m2m_100", "marian", "mt5", "pegasus", "switch_transformers")
SEQ2SEQ += ("t5", "t5gemma", "umt5")
VISION = ("aya_vision", "gemma3", "idefics3", "internvl", "llava", "llava_next", "paligemma")
VISION += ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm")
TEXTS = ("The quick brown fox", "jumps over", "the lazy dog, twice", "and sleeps 12 hours.")
START, END = "<!-- table: start -->", "<!-- table: end -->"
CALLS = 100  # of a process

Result = TypeVar("Result")


MERGEKIT = """
import sys, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for path in sys.argv[1:]:
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(Path(path).read_text()))
        run_merge(config, str(Path(path).parent / "theirs"), MergeOptions(quiet=True))
        told = "yes"
    except BaseException as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
    print(path, told, sep=chr(9), flush=True)
"""


@dataclass(frozen=True)
class Case:
    """A model type, and the class of transformers that creates a model from its configuration."""

    model_type: str
    automatic: str


@dataclass(frozen=True)
class Row:
    """The result of a case; `reason` is empty if the case passes."""

    case: Case
    n_measured: int = 0
    n_scheduled: int = 0
    n_merged: int = 0
    reason: str = ""
    mergekit: str = ""


def cases() -> list[Case]:
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = [Case(name, CAUSAL) for name in sorted(known)]
    found += [Case(name, "AutoModelForSeq2SeqLM") for name in SEQ2SEQ]
    return found + [Case(name, "AutoModelForImageTextToText") for name in VISION]


def build(case: Case, folder: Path) -> None:
    """Write `base`, `one` and `two`, each with the zoo's tokenizer, and `texts.jsonl`."""
    model = tiny_model(case.model_type, getattr(transformers, case.automatic))
    for seed, name in enumerate(("base", "one", "two")):
        (fine_tuned(model, seed) if seed else model).save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(zoo_folder() / "base" / file, folder / name / file)
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")


def recipe(folder: Path, *, guided: bool) -> Path:
    models = [
        {"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("one", "two")
    ]
    asked: dict[str, Any] = {
        "base_model": str(folder / "base"),
        "models": models,
        "merge_method": "ties",
        "dtype": "float32",
    }
    if guided:
        data = {"dataset": str(folder / "texts.jsonl"), "text": "{text}", "samples": 4}
        asked["guide"] = {"name": "lewis", "gamma": 0.3, "epsilon": 0.8, "calibration": data}
    else:
        asked["parameters"] = {"density": 0.5, "normalize": True}
    path = folder / ("guided.yaml" if guided else "plain.yaml")
    path.write_text(yaml.safe_dump(asked, sort_keys=False))
    return path


def run(folder: Path) -> None:
    """Load a model by the class in its configuration, and run it on four tokens."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"loading: {report['missing_keys']} missing, {report['unexpected_keys']}")
    ids = torch.tensor([[1, 5, 6, 7]])
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if config.is_encoder_decoder:
        options["decoder_input_ids"] = ids
    accepted = inspect.signature(model_class.forward).parameters
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in options.items() if k in accepted}).logits
    if not torch.isfinite(logits).all():
        raise ValueError("the merged model's logits are not finite")


def n_changed(folder: Path, merged: Path) -> int:
    """Number of tensors of a merge that differ from the base's."""
    base, made = (load_file(path / "model.safetensors") for path in (folder / "base", merged))
    return sum(not torch.equal(tensor, made[name]) for name, tensor in base.items())


def examine(case: Case, folder: Path) -> Row:
    """Run one case in an empty folder; an error becomes the row's reason."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), _undrawn():
        warnings.simplefilter("ignore")
        try:
            build(case, folder)
        except Exception as error:  # noqa: BLE001 - a table of what goes wrong
            return Row(case, reason=f"not made: {_line(error)}")
        n_measured = n_scheduled = 0
        try:
            asked = lewis_hub.read_recipe(recipe(folder, guided=True))
            merged = lewis_hub.merge_models(asked, folder / "merged").output
            density = json.loads((merged / "lewis" / "density.json").read_text())
            profile = json.loads((merged / "lewis" / "importance.json").read_text())
            n_measured = len(profile["sources"][0]["modules"])
            n_scheduled = len(density["experts"][0]["tensors"])
            run(merged)
            row = Row(case, n_measured, n_scheduled, n_changed(folder, merged))
            idle = not (row.n_measured and row.n_scheduled and row.n_merged)
            return replace(row, reason="nothing was measured or merged") if idle else row
        except Exception as error:  # noqa: BLE001 - a table of what goes wrong
            return Row(case, n_measured, n_scheduled, 0, _line(error))


@contextmanager
def _undrawn() -> Iterator[None]:
    """Skip the plots, which would take most of the time."""
    draw = reporting.draw_maps
    reporting.draw_maps = lambda *_: None
    try:
        yield
    finally:
        reporting.draw_maps = draw


def by_mergekit(python: str, folders: list[Path]) -> dict[Path, str]:
    """Folder -> "yes", or the reason why the model by mergekit does not load or run."""
    warnings.simplefilter("ignore")
    made = [folder for folder in folders if (folder / "texts.jsonl").exists()]
    configs = [str(recipe(folder, guided=False)) for folder in made]
    home = {"HF_HOME": str(folders[0].parent / "hf-home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", MERGEKIT, *configs],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | home,
    )
    told = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    found = dict.fromkeys(folders, "not made")
    for folder, config in zip(made, configs, strict=True):
        found[folder] = _short(told.get(config, "the process ended before it"))
        if found[folder] == "yes":
            try:
                run(folder / "theirs")
            except Exception as error:  # noqa: BLE001 - a table of what goes wrong
                found[folder] = _line(error)
    return found


def _line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}" if not str(error).count("\n") else str(error)
    return _short(" ".join(text.split()))


def _short(text: str) -> str:
    text = re.sub(r"/tmp/[^ ]*/", "", text).replace("|", "/")
    return text if len(text) <= 160 else f"{text[:159]}…"


def table(rows: list[Row], *, mergekit: bool) -> Iterator[str]:
    passed = sum(not row.reason for row in rows)
    yield f"{passed} of {len(rows)} pass (transformers {transformers.__version__})."
    if mergekit:
        theirs = sum(row.mergekit == "yes" for row in rows)
        yield f"mergekit 0.1.5 merges {theirs} of them into a model that loads and runs."
    yield ""
    last = " mergekit 0.1.5 |" if mergekit else ""
    yield f"| model type | matrices measured | with a density | tensors merged | result |{last}"
    yield "|---|---:|---:|---:|---|" + ("---|" if mergekit else "")
    yield from map(line, rows)


def line(row: Row) -> str:
    numbers = f"{row.n_measured} | {row.n_scheduled} | {row.n_merged}"
    shown = f"| {row.case.model_type} | {numbers} | {row.reason or 'yes'} |"
    return f"{shown} {row.mergekit} |" if row.mergekit else shown


def _mapped(
    n_workers: int, function: Callable[..., Result], *arguments: Sequence[Any]
) -> Iterator[Result]:
    """`map` in processes that end after CALLS calls, because their memory grows."""
    step = n_workers * CALLS
    for first in range(0, len(arguments[0]), step):
        with ProcessPoolExecutor(n_workers, get_context("spawn")) as pool:
            yield from pool.map(function, *(some[first : first + step] for some in arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", help="only these model types")
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]")
    parser.add_argument("--mergekit", help="path of the python of its environment")
    parser.add_argument("--write", type=Path, help="put the table into this Markdown file")
    asked = parser.parse_args()
    chosen = [case for case in cases() if not asked.types or case.model_type in asked.types]
    with tempfile.TemporaryDirectory() as made:
        folders = [Path(made) / f"{i}-{case.model_type}" for i, case in enumerate(chosen)]
        rows = []
        for row in _mapped(asked.jobs, examine, chosen, folders):
            rows.append(row)
            print(line(row), flush=True)
        if asked.mergekit:
            parts = [folders[i :: asked.jobs] for i in range(asked.jobs)]
            programs = [asked.mergekit] * asked.jobs
            found = _mapped(asked.jobs, by_mergekit, programs, parts)
            told = {folder: text for part in found for folder, text in part.items()}
            rows = [replace(r, mergekit=told[f]) for r, f in zip(rows, folders, strict=True)]
    text = "\n".join(table(rows, mergekit=bool(asked.mergekit)))
    print(text)
    if asked.write:
        page = asked.write.read_text()
        before, after = page.split(START)[0], page.split(END)[1]
        asked.write.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
