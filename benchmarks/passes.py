"""The pass of `lewis` alone, or a plain forward pass over the same batches, for `calibration.py`.

    python benchmarks/passes.py {lewis,plain} TEXTS MODEL [MODEL ...]

It prints seconds as JSON: the sum over all models, without the start of the process. Both begin
with models on the disk. "plain" loads each model with transformers, in float32, and runs its blocks
(no head, no gradients, no cache) over the same batches of the texts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lewis_hub.calibration.measure import calibrate
from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.calibration.subject import CalibrationSet, Subject, in_folder
from lewis_hub.calibration.texts import CalibrationTokens, batches

N_TOKENS = 512  # of a text, at most


def tokens_of(folder: Path, file: Path) -> CalibrationTokens:
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ids = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    cut = tuple(tuple(one[:N_TOKENS]) for one in ids)
    return CalibrationTokens(cut, tuple(range(len(cut))), len(cut), 0, 0, str(folder))


def lewis(folder: Path, tokens: CalibrationTokens) -> dict[str, float]:
    start = time.perf_counter()
    sets = (CalibrationSet({}, tokens),)
    weights = in_folder(folder.name, folder)
    subject = Subject(folder.name, "", "base", folder, sets, weights=weights, may_be_whole=True)
    nothing_known = ImportanceProfile("lewis", {}, ())
    calibrate([subject], nothing_known, "cpu", lambda _: None, lambda _: None)
    return {"pass_s": time.perf_counter() - start}


def plain(folder: Path, tokens: CalibrationTokens) -> dict[str, float]:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = time.perf_counter()
    with torch.no_grad():
        for one in batches(tokens):
            model.base_model(one.input_ids, attention_mask=one.attention_mask, use_cache=False)
    return {"load_s": loaded - start, "forward_s": time.perf_counter() - loaded}


def added(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in found) for name in found[0]}


def main() -> None:
    side, file, *folders = sys.argv[1:]
    measure = {"lewis": lewis, "plain": plain}[side]
    tokens = tokens_of(Path(folders[0]), Path(file))
    found = added([measure(Path(folder), tokens) for folder in folders])
    print(json.dumps(found | {"n_tokens": tokens.n_tokens}))


if __name__ == "__main__":
    main()
