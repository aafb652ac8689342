"""What each unit of a model is on the tokens of calibration texts, in a file for each site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lewis_hub.calibration.forward import deterministic_threads, forward
from lewis_hub.calibration.hooks import not_finite
from lewis_hub.calibration.meta_model import weight_names
from lewis_hub.calibration.model import block_linears, check_tokens_fit
from lewis_hub.calibration.texts import CalibrationTokens, single_text
from lewis_hub.checkpoint import names
from lewis_hub.display import Advance
from lewis_hub.errors import CalibrationModelError
from lewis_hub.files import unwritable
from lewis_hub.system import reserve

MAX_TOKENS = 2048  # whose activations are kept, evenly spread over all texts

Side = Literal["input", "output"]
Sites = Mapping[str, tuple[str, Side]]  # name -> module by the checkpoint's names, and its side


def n_kept(tokens: CalibrationTokens) -> int:
    """The number of tokens whose activations are kept."""
    return min(MAX_TOKENS, tokens.n_tokens)


def write_activations(
    model: PreTrainedModel,
    name: str,
    sites: Sites,
    tokens: CalibrationTokens,
    folder: Path,
    advance: Advance,
) -> None:
    """Run texts through a model, and write the activations at each site into `folder`.

    Every model that reads the same texts keeps the same tokens. `advance` is called with the number
    of tokens done. A CalibrationModelError says that the tokens do not fit, that the model lacks a
    module, or that an activation is not finite.
    """
    check_tokens_fit(model, name, tokens)
    modules = _modules(model, name, sites)
    kept = np.linspace(0, tokens.n_tokens - 1, n_kept(tokens)).round().astype(np.int64)
    seen: dict[str, Tensor] = {}
    files: dict[str, npt.NDArray[np.float32]] = {}
    first = 0
    with deterministic_threads(block_linears(model, name).values()), _watched(modules, seen):
        for ids in tokens.ids:
            forward(model, single_text(ids))
            begin, end = np.searchsorted(kept, (first, first + len(ids))).tolist()
            rows = torch.from_numpy(kept[begin:end] - first)
            for site, activations in seen.items():
                if site not in files:
                    files[site] = _new_file(folder, site, (len(kept), activations.shape[1]))
                files[site][begin:end] = activations.index_select(0, rows).numpy()
            seen.clear()
            first += len(ids)
            advance(len(ids))
    for site, values in files.items():
        if not np.isfinite(values).all():
            raise not_finite(f"the activations at {sites[site][0]}", name)


def read_activations(folder: Path, site: str) -> Tensor:
    """The activations at a site, (tokens, units) float32."""
    return torch.from_numpy(np.load(_path(folder, site), allow_pickle=False))


def _new_file(folder: Path, site: str, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    path = _path(folder, site)
    mapped = np.lib.format.open_memmap(path, "w+", np.dtype("<f4"), shape)
    try:  # a write to a mapped page that the disk has no room for would end the process
        with path.open("r+b") as file:
            reserve(file.fileno(), path.stat().st_size)
    except OSError as error:
        raise unwritable(path, error) from None
    return mapped


def _path(folder: Path, site: str) -> Path:
    return folder / f"{site.replace(' ', '-')}.npy"


def _modules(model: PreTrainedModel, name: str, sites: Sites) -> dict[str, tuple[nn.Module, Side]]:
    """The module of each site. A checkpoint may name modules otherwise than the loaded model."""
    loaded = dict(model.named_modules())
    paths = {names.module(stored): names.module(p) for p, stored in weight_names(model).items()}
    found: dict[str, tuple[nn.Module, Side]] = {}
    for site, (module, side) in sites.items():
        known = names.find(f"{module}.weight", [f"{one}.weight" for one in paths])
        if len(known) != 1:
            problem = f"the loaded model has no module {module}"
            remedy = (
                "Remove `align` from this model: its tensors are not those of its architecture."
            )
            raise CalibrationModelError(name, problem, remedy)
        found[site] = loaded[paths[names.module(known[0])]], side
    return found


@contextmanager
def _watched(
    modules: Mapping[str, tuple[nn.Module, Side]], seen: dict[str, Tensor]
) -> Iterator[None]:
    """Put what goes into or comes out of each module into `seen`, as (tokens, units) float32."""

    def keep(sites: Sequence[str], value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1]).float().cpu().clone()
        seen.update(dict.fromkeys(sites, rows))

    def before(sites: Sequence[str], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep(sites, inputs[0])

    def after(sites: Sequence[str], _: nn.Module, _inputs: object, output: Tensor) -> None:
        keep(sites, output)

    with ExitStack() as handles:
        for site, (module, side) in modules.items():
            if side == "input":
                handles.enter_context(module.register_forward_pre_hook(partial(before, [site])))
            else:
                handles.enter_context(module.register_forward_hook(partial(after, [site])))
        yield
