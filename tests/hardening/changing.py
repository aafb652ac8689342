"""Merge local models again and again while a file of them changes: `python -m hardening.changing`.

The words are a folder for the work, the number of merges and a seed. It prints, for each merge, how
the file changed and how the merge ended. It runs in a process of its own, which a signal would end.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from safetensors.torch import load_file, save_file

from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report.lock import Lock

MODELS = ("base", "expert-reverse")
TEXTS = "calibration: {dataset: TEXTS, text: '{text}', samples: 4}"
RECIPES = {
    "ties": "merge_method: ties, parameters: {density: 0.5}",
    "ties with lewis": f"merge_method: ties, guide: {{name: lewis, {TEXTS}}}",
    "regmean": f"merge_method: regmean, {TEXTS}",
}
SOURCES = "base_model: BASE, models: [EXPERT]"
FILES = (
    *(f"{model}/{file}" for model in MODELS for file in ("model.safetensors", "config.json")),
    *("base/tokenizer.json", "texts.jsonl"),
)
WITH_PATHS = ("README.md", "mergekit_config.yml")
N_COPIES = 12  # of each tensor, so that there is time to change the file


def truncate(path: Path, random: Random) -> None:
    with path.open("rb+") as file:
        file.truncate(int(path.stat().st_size * random.random()))


def replace(path: Path, random: Random) -> None:
    other = path.with_name("other")
    content = bytearray(path.read_bytes())
    content[-1000:] = random.randbytes(1000)
    other.write_bytes(content)
    other.replace(path)


def delete(path: Path, random: Random) -> None:  # noqa: ARG001 (one of CHANGES)
    path.unlink()


def edit_and_restore(path: Path, random: Random) -> None:
    content = path.read_bytes()
    replace(path, random)
    time.sleep(0.2 * random.random())
    path.write_bytes(content)


def into_a_folder(path: Path, random: Random) -> None:  # noqa: ARG001 (one of CHANGES)
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path, Random], None]] = {
    **{"truncate": truncate, "replace": replace, "delete": delete, "folder": into_a_folder},
    "edit and restore": edit_and_restore,
}


def large_copy(name: str, folder: Path) -> Path:
    """A model of the zoo with many copies of its tensors."""
    shutil.copytree(zoo_folder() / name, folder)
    tensors = load_file(zoo_folder() / name / "model.safetensors")
    copies = {
        f"copy.{n}.{key}": value.clone() for key, value in tensors.items() for n in range(N_COPIES)
    }
    save_file({**tensors, **copies}, folder / "model.safetensors", {"format": "pt"})
    return folder


def main() -> None:
    """Print the outcome of each merge as JSON."""
    work, n_merges, random = Path(sys.argv[1]), int(sys.argv[2]), Random(sys.argv[3])
    kept = work / "kept"
    for name in MODELS:
        large_copy(name, kept / name)
    lines = (json.dumps({"text": f"reverse BAKOT{n} and encode OZUN{n}"}) for n in range(400))
    (kept / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    clean, duration_s = {}, {}
    for method in RECIPES:
        merged(work, kept, method)  # some of it is compiled and cached by the first merge
        began = time.perf_counter()
        clean[method] = merged(work, kept, method)
        duration_s[method] = time.perf_counter() - began
    outcomes = []
    for number in range(n_merges):
        sources = shutil.copytree(kept, work / str(number))
        method = random.choice(sorted(RECIPES))
        file, change = random.choice(FILES), random.choice(sorted(CHANGES))
        wait_s = duration_s[method] * random.random()
        strike = threading.Timer(wait_s, CHANGES[change], (sources / file, random))
        strike.start()
        kind = outcome(work, sources, method, clean[method])
        strike.join()
        outcomes.append([f"{method}: {change} {file} after {wait_s:.3f} s", kind])
        shutil.rmtree(sources)
    json.dump(outcomes, sys.stdout)


def outcome(work: Path, sources: Path, method: str, clean: Merged) -> str:
    """How a merge ends, whose sources change meanwhile."""
    try:
        found = merged(work, sources, method)
    except LewisHubError as error:
        return "refused" if str(sources) in str(error) else f"refused: {error}"
    except Exception as error:  # noqa: BLE001 (it is reported)
        return repr(error)
    if found.inputs != clean.inputs:
        return "pinned after the change"
    return "as before" if found == clean else "other bytes"


class Merged(NamedTuple):
    """What a lock says of a merge."""

    inputs: list[dict[str, str]]  # path -> digest, of each model and dataset
    files: dict[str, str]  # of the merge, but those that name the folders of its sources


def merged(work: Path, sources: Path, method: str) -> Merged:
    """Merge anew."""
    output = work / "merged"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(work / "merged.partial", ignore_errors=True)
    places = {"BASE": MODELS[0], "EXPERT": MODELS[1], "TEXTS": "texts.jsonl"}
    text = f"{{{SOURCES}, {RECIPES[method]}}}"
    for name, place in places.items():
        text = text.replace(name, str(sources / place))
    pipeline.merge_models(parse_recipe(text, "recipe.yaml"), output)
    lock = Lock.from_json((output / "lewis" / "lock.json").read_text(encoding="utf-8"))
    inputs = [dict(one.files) for one in (*lock.inputs, *lock.calibration)]
    files = {name: file for name, file in lock.outputs.items() if "lewis" not in name}
    return Merged(inputs, {n: file.sha256 for n, file in files.items() if n not in WITH_PATHS})


if __name__ == "__main__":
    main()
