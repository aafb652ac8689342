"""What to write instead of mergekit's options; `docs/mergekit.md` has the same table."""

from __future__ import annotations

import click

from lewis_hub.cli.help import Sectioned

NOTHING = "leave it out: "
ANSWERS = {  # option of mergekit-yaml -> what to do instead
    "--allow-crimes": NOTHING + "models of other architectures merge if their tensors fit",
    "--async-write": NOTHING + "files are hashed and written while tensors are merged",
    "--clone-tensors": NOTHING + "a block may be used several times",
    "--copy-tokenizer": NOTHING + "the tokenizer is always copied",
    "--cuda": "`--device cuda`",
    "--gpu-rich": "`--device cuda`",
    "--lazy-unpickle": "`--allow-pickle`: pickles are converted to safetensors first",
    "--lora-merge-cache": NOTHING + "adapters are merged in the folder of the output",
    "--lora-merge-dtype": NOTHING + "an adapter on `base_model` is added in float32, any other is "
    "merged into its base in the base's dtype",
    "--low-cpu-memory": NOTHING
    + "a few tensors are in memory at a time; `--max-memory` limits what "
    "measures and scores load",
    "--multi-gpu": "`--device cuda` uses one GPU; `--runner ray` uses several machines",
    "--num-threads": "`--runner threads:N`",
    "-j": "`--runner threads:N`",
    "--out-shard-size": "`--max-shard-size 5GB`: the size of a file in bytes, not in parameters",
    "--random-seed": "`seed: 42` in the recipe",
    "--read-to-gpu": "`--device cuda` reads into page-locked memory, and copies while it computes",
    "--safe-serialization": NOTHING + "only safetensors are written",
    "--transformers-cache": "the environment variable HF_HUB_CACHE",
    "--trust-remote-code": "`allow_code: [MODEL]` in the recipe copies its Python files; they are "
    "never run",
    "--unsafe-truncate-embeddings": "`tokenizer_source: base` in the recipe matches the rows by "
    "token",
    "-v": NOTHING + "progress is shown unless you add `--quiet`",
    "--write-model-card": NOTHING + "the model card is always written",
    "--write-threads": "`--runner threads:N`",
    # of mergekit-multi
    "--intermediate-dir": NOTHING + "merges on the way are kept beside the output while they are "
    "needed",
    "-I": NOTHING + "merges on the way are kept beside the output while they are needed",
    "--lazy": NOTHING + "finished merges of an interrupted run are always kept",
    "--out-path": "`--output DIR`, or `lewis-hub merge CONFIG DIR`",
}
SAME = ("--device", "--quiet")  # options with the same meaning here


class MergeCommand(Sectioned):
    """A command that explains an option of mergekit when it is given one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, as click does."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            named = error.option_name
            positive = "--" + named.removeprefix("--no-")
            answer = ANSWERS.get(named) or ANSWERS.get(positive)
            if answer is None:
                raise
            problem = f"{named} is an option of mergekit. Here: {answer}."
            raise click.UsageError(problem, ctx) from None
