"""How much the outputs of a module differ between base and expert, on the same tokens.

Both models are in memory, and run text by text: the outputs of the base on one text are held until
the expert has made its own. For a module of n input features that is (tokens of the text) / n of
the size of its weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lewis_hub.checkpoint import names
from lewis_hub.errors import CalibrationModelError
from lewis_hub.guides.activations import block_linears, check_tokens_fit, evaluating, forward
from lewis_hub.guides.blocks import Linear, matrix
from lewis_hub.guides.calibrate import Place
from lewis_hub.guides.loading import load_model
from lewis_hub.guides.stored import stored_names
from lewis_hub.guides.threads import threads, whole_shares
from lewis_hub.guides.tokens import Batch, CalibrationTokens
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(
    base: Place,
    expert: Place,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
) -> list[dict[str, float]]:
    """Measure an expert against its base on each calibration set; both models are gone on return.

    Args:
        base: what task vectors start from.
        expert: of the same architecture.
        sets: one or more; the models are loaded once for all.
        device: as torch names it; it holds both models.
        advance: called with the number of tokens done.

    Returns:
        For each set, module -> sqrt(Σ‖y_expert - y_base‖² / Σ‖y_base‖²) over all tokens, in the
        base's order: 0 where nothing differs.

    Raises:
        CalibrationModelError: a model cannot be loaded, the tokens do not fit it, or an output is
            not finite.
    """
    models = [load_model(one.folder, device, one.name) for one in (base, expert)]
    for model, one in zip(models, (base, expert), strict=True):
        for tokens in sets:
            check_tokens_fit(model, one.name, tokens)
    widths = {matrix(m).shape[1] for m in block_linears(models[0], base.name).values()}
    with threads(whole_shares(widths, torch.get_num_threads())):
        return [
            output_shifts(models[0], models[1], expert.name, tokens, advance) for tokens in sets
        ]


def output_shifts(
    base: PreTrainedModel,
    expert: PreTrainedModel,
    name: str,
    tokens: CalibrationTokens,
    advance: Advance,
) -> dict[str, float]:
    """What `measure` returns, for one set and models that are loaded.

    A module that does not see every token of a text in both models, such as a routed expert, does
    not count for that text: its rows belong to other tokens. One that never counts is left out, and
    so is one that the checkpoint does not hold as it is, or that does not return what it
    multiplied alone, as some routers. Modules have the checkpoint's names.

    Raises:
        CalibrationModelError: an output is not finite, or no module counts.
    """
    of_base, of_expert = block_linears(base, name), block_linears(expert, name)
    sums = _Sums()
    with evaluating(base), evaluating(expert), torch.no_grad():
        for ids in tokens.ids:
            text = torch.tensor([ids])
            batch = Batch(text, torch.ones_like(text))
            with _outputs(of_base, sums.hold):
                forward(base, batch)
            with _outputs(of_expert, partial(sums.compare, len(ids))):
                forward(expert, batch)
            sums.held.clear()
            advance(len(ids))
    kept = stored_names(base)
    found = {
        names.module(kept[f"{path}.weight"]): sums.shift(name, path)
        for path in of_base
        if path in sums.differences and f"{path}.weight" in kept
    }
    if not found:
        problem = "no Linear in its blocks has one output for each token of a text"
        raise CalibrationModelError(name, problem, "Use guide `lewis`, which looks at inputs.")
    return found


class _Sums:
    """Squares over the tokens of all texts; `held` are the base's outputs on the one at hand."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.differences: defaultdict[str, float] = defaultdict(float)
        self._base: defaultdict[str, float] = defaultdict(float)

    def hold(self, path: str, y: Tensor) -> None:
        self.held[path] = y.clone()  # what comes after a module may write into its output

    def compare(self, n_tokens: int, path: str, y: Tensor) -> None:
        before = self.held.pop(path, None)
        if before is not None and len(before) == len(y) == n_tokens:
            self.differences[path] += _square_sum(y - before.to(y.device))  # GPUs may differ
            self._base[path] += _square_sum(before)

    def shift(self, name: str, path: str) -> float:
        difference, base = self.differences[path], self._base[path]
        ratio = difference / base if base else float(difference > 0)
        if not isfinite(ratio):
            problem = f"the outputs of {path} are not finite"
            remedy = "Its weights may be broken, or overflow in float16: try `--device cpu`."
            raise CalibrationModelError(name, problem, remedy)
        return sqrt(ratio)


def _square_sum(y: Tensor) -> float:
    """Over all entries: float32 in a row, float64 over the rows."""
    rows = y.float().square().sum(dim=-1)
    return float(rows.sum() if rows.device.type == "mps" else rows.double().sum())


@contextmanager
def _outputs(modules: Mapping[str, Linear], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hand on what each module returns, as (rows, out_features)."""
    handles = []
    try:
        for path, module in modules.items():

            def hook(_: nn.Module, _inputs: object, y: object, path: str = path) -> None:
                if isinstance(y, Tensor):
                    take(path, y.detach().reshape(-1, y.shape[-1]))

            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
