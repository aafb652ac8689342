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

from safetensors.torch import load_file, save_file

from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report.lock import Lock

RECIPE = "{base_model: BASE, models: [EXPERT], merge_method: ties, parameters: {density: 0.5}}"
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


def into_a_folder(path: Path, random: Random) -> None:  # noqa: ARG001 (one of CHANGES)
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path, Random], None]] = {
    **{"truncate": truncate, "replace": replace, "delete": delete, "folder": into_a_folder}
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
    kept = {name: large_copy(name, work / "kept" / name) for name in ("base", "expert-reverse")}
    began = time.perf_counter()
    clean = merged(work, kept["base"], kept["expert-reverse"])
    duration_s = time.perf_counter() - began
    outcomes = []
    for number in range(n_merges):
        models = {name: shutil.copytree(kept[name], work / str(number) / name) for name in kept}
        names = [(name, file) for name in kept for file in ("model.safetensors", "config.json")]
        (model, file), change = random.choice(names), random.choice(sorted(CHANGES))
        place = models[model] / file
        wait_s = duration_s * random.random()
        strike = threading.Timer(wait_s, CHANGES[change], (place, random))
        strike.start()
        try:
            ended = merged(work, models["base"], models["expert-reverse"])
            kind = "as before" if ended == clean else "other bytes"
        except LewisHubError as error:
            kind = "refused" if str(place.parent) in str(error) else f"refused: {error}"
        except Exception as error:  # noqa: BLE001 (it is reported)
            kind = repr(error)
        strike.join()
        outcomes.append([f"{change} {model}/{file} after {wait_s:.3f} s", kind])
        shutil.rmtree(work / str(number))
    json.dump(outcomes, sys.stdout)


def merged(work: Path, base: Path, expert: Path) -> dict[str, str]:
    """The digests of the files of a merge, but those that name the folders of its sources."""
    output = work / "merged"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(work / "merged.partial", ignore_errors=True)
    text = RECIPE.replace("BASE", str(base)).replace("EXPERT", str(expert))
    pipeline.merge_models(parse_recipe(text, "recipe.yaml"), output)
    lock = Lock.from_json((output / "lewis" / "lock.json").read_text(encoding="utf-8"))
    files = {name: file for name, file in lock.outputs.items() if "lewis" not in name}
    return {name: file.sha256 for name, file in files.items() if name not in WITH_PATHS}


if __name__ == "__main__":
    main()
