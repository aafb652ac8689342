"""Tuning by drift compared with tuning by the answer loss, on the zoo.

    python benchmarks/drift.py RESULTS [--trials 30] [--recipe ties|regmean]

Both searches begin at the same recipe, with the same number of trials and the same seed. Merges are
fitted on 64 texts of each expert. One search measures the answer loss of 100 further training items
of each skill, the other the drift on 64 further texts of each expert. Then every trial of both is
merged again and measured by the losses on the tune items (`zoo_items.py`), which neither search
saw, by the drift, and by the distance of the hidden states from the expert's on the same texts: the
mean over blocks of |h - h_e|^2 / |h_e|^2, each summed over tokens. No test item is scored.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from answers import read_items, score, texts
from zoo_items import write_items

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.localhub.server import serve

SKILLS = ("reverse", "cipher")
STARTS = {
    "ties": "merge_method: ties\nguide: {name: lewis, gamma: 0.05, epsilon: 0.1}\n"
    "parameters: {lambda: 0.5}\n",
    "regmean": "merge_method: regmean\nparameters: {inputs: own, off_diagonal: 0.5}\n",
}
MODEL = (
    "- {{model: {zoo}/expert-{skill}, calibration: {{dataset: {zoo}/data/{skill}/train.jsonl, "
    "text: 'Question: {{question}}\\nAnswer: {{answer}}', samples: 64, max_tokens: 64}}}}"
)
TASK = """task: {skill}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {zoo}/data/{skill}/train.jsonl, test: {tune}}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: " {{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 9, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write_recipe(folder: Path, start: str, items: Path) -> Path:
    """Write a recipe and its tasks, which score tune items."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    zoo = zoo_folder()
    for skill in SKILLS:
        tune = (items / f"{skill}_tune.jsonl").resolve()
        text = TASK.format(skill=skill, zoo=zoo, tune=tune)
        (folder / "tasks" / f"{skill}.yaml").write_text(text, encoding="utf-8")
    models = "\n".join(MODEL.format(zoo=zoo, skill=skill) for skill in SKILLS)
    (folder / "recipe.yaml").write_text(
        f"base_model: {zoo}/base\nmodels:\n{models}\ndtype: float32\n{STARTS[start]}"
        f"evaluate: {{tasks: [{', '.join(SKILLS)}], include: tasks, limit: 1}}\n",
        encoding="utf-8",
    )
    return folder / "recipe.yaml"


def hidden_distance(model: Any, expert: Any, tokens: Any) -> float:
    """The mean over blocks of the squared distance of hidden states, relative to the expert's."""
    import torch

    from lewis_hub.calibration.texts import unpadded_batches

    distances: list[Any] = []
    norms: list[Any] = []
    for batch in unpadded_batches(tokens):
        with torch.inference_mode():
            pair = [
                torch.stack(one(batch.input_ids, output_hidden_states=True).hidden_states[1:])
                for one in (model, expert)
            ]
        distances.append((pair[0] - pair[1]).square().sum(dim=(1, 2, 3)))
        norms.append(pair[1].square().sum(dim=(1, 2, 3)))
    return float((torch.stack(distances).sum(0) / torch.stack(norms).sum(0)).mean())


def measure(tuned: Mapping[str, Any], items: Path, folder: Path) -> list[dict[str, Any]]:
    """Merge all trials of both searches again, and measure each."""
    import lewis_hub
    from lewis_hub.evaluate.backends import EvaluationSettings
    from lewis_hub.evaluate.harness import load
    from lewis_hub.tune.space import candidate

    zoo, by_drift = zoo_folder(), tuned["drift"]
    asked = {skill: texts(zoo / "base", read_items(items, skill, "tune")) for skill in SKILLS}
    experts = [load(zoo / f"expert-{s}", EvaluationSettings()).model for s in SKILLS]
    found = []
    for search, one in tuned.items():
        for trial in one.trials:
            if trial.state == "failed":
                continue
            recipe = candidate(one.space, trial.values).model_copy(update={"evaluate": None})
            execution = lewis_hub.Execution(replace=True)
            merged = lewis_hub.merge_models(recipe, folder / "merged", execution, progress=False)
            lm = load(merged.output, EvaluationSettings())
            *_, drift = by_drift.objective.values(lm, lambda _: None)
            scored = {skill: score(lm.model, some) for skill, some in asked.items()}
            pairs = zip(experts, by_drift.texts, strict=True)
            found.append(
                {
                    "search": search,
                    "number": trial.number,
                    "is_best": trial.number == one.best.number,
                    "values": dict(trial.values),
                    "objective": trial.value,
                    "drift": drift,
                    "hidden": fmean(hidden_distance(lm.model, e, t.tokens) for e, t in pairs),
                    "losses": [fmean(one.losses) for one in scored.values()],
                    "exact": [fmean(one.right) for one in scored.values()],
                }
            )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The choice of each search and measure, and rank correlations over all trials."""
    from scipy.stats import rankdata, spearmanr

    losses = [fmean(one["losses"]) for one in found]
    drifts, hidden = ([one[name] for one in found] for name in ("drift", "hidden"))
    both = list(rankdata(drifts) + rankdata(hidden))
    rows = [
        "| setting | drift | loss | loss, reverse | loss, cipher | exact |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    shown = {"start": 0}
    for search in ("answers", "drift"):
        is_best = [one["search"] == search and one["is_best"] for one in found]
        shown[f"best by the search on {search}"] = is_best.index(True)
    shown["lowest hidden distance of all"] = hidden.index(min(hidden))
    shown["lowest sum of the ranks of drift and hidden distance"] = both.index(min(both))
    shown["lowest loss of all"] = losses.index(min(losses))
    for name, index in shown.items():
        one = found[index]
        exact = " / ".join(f"{value:.3f}" for value in one["exact"])
        cells = (one["drift"], losses[index], *one["losses"])
        rows.append(f"| {name} | {' | '.join(f'{cell:.4f}' for cell in cells)} | {exact} |")
    rows.append("")
    for name, values in {"drift": drifts, "hidden": hidden, "sum of both ranks": both}.items():
        rows.append(f"rank correlation with the loss, {name}: {spearmanr(values, losses)[0]:.3f}")
    rows.append(f"n = {len(found)}")
    return "\n".join(rows)


def main() -> None:
    """Search, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--recipe", choices=STARTS, default="ties")
    asked = parser.parse_args()
    folder, items = (asked.results / asked.recipe).resolve(), asked.results / "items"
    write_items(items)
    with serve(folder / "hub") as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
        import lewis_hub

        recipe = lewis_hub.read_recipe(write_recipe(folder, asked.recipe, items))
        tuned = {}
        for objective, samples in (("answers", 100), ("drift", 64)):
            search = lewis_hub.Search(n_trials=asked.trials, samples=samples, objective=objective)
            tuned[objective] = lewis_hub.tune_recipe(recipe, search, folder / objective)
        profile = folder / "answers" / "importance.json"  # merges read it beside the recipe
        if profile.exists():
            (folder / "importance").mkdir(exist_ok=True)
            shutil.copy(profile, folder / "importance")
        found = measure(tuned, items, folder)
    (folder / "trials.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))
    names = {"answers": "100 items a task", "drift": "64 texts an expert"}
    for objective, one in tuned.items():
        means = [sum(trial.seconds.values()) for trial in one.trials if trial.value is not None]
        pruned = sum(trial.state == "pruned" for trial in one.trials)
        print(f"{objective}, {names[objective]}: {fmean(means):.2f} s a trial, {pruned} pruned")


if __name__ == "__main__":
    main()
