"""The model that an adapter changes, as PEFT sees it: loaded by transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import CalibrationModelError

HEAD = "lm_head.weight"  # the name in transformers of a head that is tied
FUSED = "is fused, split or reshaped when transformers loads the model"
ALSO, UNCHANGED = "is also", "which PEFT would not change with it"
WEIGHT = ".weight"
TRANSPOSED = "lies as (in, out), as GPT-2's do"


@dataclass(frozen=True)
class AdaptedModel:
    """How transformers names, makes and ties the tensors that a model's files store.

    Attributes:
        task: what PEFT calls the task of the model.
        names: tensor of a file -> the parameter that it becomes; others keep their names.
        linears: modules with a matrix, (out, in); None: not known.
        heads: table of embeddings -> the head that is tied to it, without a tensor in the files.
        unfit: parameter -> why PEFT has no adapter that changes it.
    """

    task: str | None
    names: Mapping[str, str] = field(default_factory=dict)
    linears: frozenset[str] | None = None
    heads: Mapping[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint of such files, with the names of the loaded model."""
        named = {self.names.get(name, name): one for name, one in checkpoint.tensors.items()}
        tensors = {name: replace(one, name=name) for name, one in named.items()}
        return replace(checkpoint, tensors=tensors)


def adapted_model(
    folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint, *, has_tied_head: bool
) -> AdaptedModel:
    """Describe the model in a folder, without its weights; imports torch.

    A model that names no architecture of transformers has the names of its files.
    """
    from lewis_hub.calibration.meta_model import build_named, parameter_names
    from lewis_hub.calibration.model import linears

    try:
        model = build_named(folder, checkpoint.label)
    except CalibrationModelError:
        tables = filter(names.is_token_embedding, checkpoint.tensors)
        heads = dict.fromkeys(tables, HEAD) if has_tied_head else {}
        return AdaptedModel(task_type(config), heads=heads)
    found, fused = parameter_names(model, checkpoint.tensors)
    stored = {found.get(name, name) for name in checkpoint.tensors}
    heads, unfit = _tied(model.all_tied_weights_keys, stored)
    modules = dict(linears("", model))
    matrices = {path for path, module in modules.items() if hasattr(module, "in_features")}
    unfit |= dict.fromkeys(fused, FUSED)
    unfit |= {f"{path}{WEIGHT}": TRANSPOSED for path in modules.keys() - matrices}
    return AdaptedModel(task_type(config), found, frozenset(matrices), heads, unfit)


def _tied(
    tied: Mapping[str, str], stored: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The heads that parameters are too, and the parameters that are another one, too."""
    absent = {one: own for one, own in tied.items() if one not in stored and one.endswith(WEIGHT)}
    heads = {owner: one for one, owner in absent.items() if names.may_be_tied(one)}
    others = {owner: one for one, owner in absent.items() if not names.may_be_tied(one)}
    return heads, {owner: f"{ALSO} {one}, {UNCHANGED}" for owner, one in others.items()}


def task_type(config: Mapping[str, Any]) -> str | None:
    """What PEFT calls the task of a model, by which it wraps the model; None: any other."""
    named = config.get("architectures")
    kinds = tuple(map(str, named if isinstance(named, list) else ()))
    writes = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
    if config.get("is_encoder_decoder") and any(kind.endswith(writes[0]) for kind in kinds):
        return "SEQ_2_SEQ_LM"
    is_writer = not kinds or any(kind.endswith(writes) for kind in kinds)
    return "CAUSAL_LM" if is_writer else None
