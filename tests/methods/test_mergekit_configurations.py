"""mergekit 0.1.5 accepts the 28 configurations as they are, and merges to the same numbers.

mergekit computes in `dtype`, so both sides compute in float32 here, or in float64 where the
configuration says so. Random masks differ, so that those merges are only made.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mergekit_configurations import (
    AFTER_BLOCKS,
    CONFIGURATIONS,
    N_ROUNDED,
    N_TOKENS,
    RANDOM,
    write_models,
)
from safetensors.torch import load_file

from lewis_hub.cli.main import cli

EMBEDDINGS = "model.embed_tokens.weight"
MERGEKIT = os.environ.get("LEWIS_HUB_MERGEKIT", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MERGEKIT, reason="LEWIS_HUB_MERGEKIT is not set: no mergekit here"),
]

# runs in mergekit's own Python, once for all configurations, because its imports take long
RUN = """
import json, sys, traceback, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import main
errors = {}
for file in sorted(Path("configurations").glob("*.yaml")):
    LoaderCache().loaders = {}
    text, out = file.read_text(), Path("theirs") / file.stem
    try:
        if text.count("\\n---\\n"):
            words = [str(file), "--out-path", str(out), "-I", "theirs/steps"]
            words += ["--lora-merge-cache", "cache", "--no-write-model-card"]
            main(words, standalone_mode=False)
        else:
            options = MergeOptions(lora_merge_cache="cache", write_model_card=False)
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
    except Exception:
        errors[file.stem] = traceback.format_exc()
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def merged_by_mergekit(tmp_path_factory):
    """The folder with the models and mergekit's results, and its errors."""
    root = write_models(tmp_path_factory.mktemp("models"))
    (root / "configurations").mkdir()
    for name, text in CONFIGURATIONS.items():
        text = text.replace("dtype: bfloat16", "dtype: float32")
        text = text.replace("dtype: float16", "dtype: float32")
        (root / "configurations" / f"{name}.yaml").write_text(text)
    python = Path(MERGEKIT).parent / "python"
    done = subprocess.run(
        [python, "-c", RUN],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(done.stdout.splitlines()[-1])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_mergekit_makes_the_same_numbers(merged_by_mergekit, monkeypatch, tmp_path, name):
    root, errors = merged_by_mergekit
    assert name not in errors, errors[name]
    monkeypatch.chdir(root)
    words = ["merge", f"configurations/{name}.yaml", str(tmp_path / "ours")]

    run = CliRunner().invoke(cli, words)

    assert run.exit_code == 0, run.output
    ours, theirs = weights(tmp_path / "ours"), weights(root / "theirs" / name)
    shapes = [{key: tensor.shape for key, tensor in one.items()} for one in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for key, tensor in theirs.items():
        if name in RANDOM or (name in AFTER_BLOCKS and not key.startswith("model.layers")):
            continue
        rows = slice(N_TOKENS.get(name) if key == EMBEDDINGS else None)
        close = torch.isclose(ours[key][rows], tensor[rows], rtol=1e-5, atol=1e-6)
        assert int((~close).sum()) <= N_ROUNDED.get(name, 0), key
