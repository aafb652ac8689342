"""How much the outputs of an expert's modules differ from the base's on the same texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lewis_hub.calibration.determinism import deterministic_threads
from lewis_hub.calibration.hooks import block_linears, check_tokens_fit, evaluating, forward
from lewis_hub.calibration.model import Linear, load_model
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.calibration.texts import CalibrationTokens, TokenBatch
from lewis_hub.calibration.weight_names import weight_names
from lewis_hub.checkpoint import names
from lewis_hub.errors import CalibrationModelError
from lewis_hub.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_shifts(
    base: Snapshot,
    expert: Snapshot,
    sets: Sequence[CalibrationTokens],
    device: str,
    advance: Advance,
) -> list[dict[str, float]]:
    """Measure an expert against its base on each calibration set; frees both models on return.

    Args:
        base: what task vectors start from.
        expert: of the same architecture.
        sets: one or more; the models are loaded once for all sets.
        device: as torch names it; it holds both models.
        advance: called with the number of tokens done.

    Returns:
        For each set, module -> sqrt(Σ‖y_expert - y_base‖² / Σ‖y_base‖²) over all tokens, in the
        base's order: 0 if nothing differs.

    Raises:
        CalibrationModelError: a model cannot be loaded, the tokens do not fit it, or an output is
            not finite.
    """
    models = [load_model(one.folder, device, one.name) for one in (base, expert)]
    for model, one in zip(models, (base, expert), strict=True):
        for tokens in sets:
            check_tokens_fit(model, one.name, tokens)
    with deterministic_threads(block_linears(models[0], base.name).values()):
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
    """What `measure_shifts` returns, for one set and models that are loaded.

    A module that does not see every token of a text in both models, such as a routed matrix, does
    not count for that text: its rows belong to other tokens. Left out are modules that never count,
    that the checkpoint stores otherwise, or that return more than their product, as some routers
    do. Modules have the checkpoint's names.

    Raises:
        CalibrationModelError: an output is not finite, or no module counts.
    """
    of_base, of_expert = block_linears(base, name), block_linears(expert, name)
    sums = _ShiftSums()
    with evaluating(base), evaluating(expert), torch.no_grad():
        for ids in tokens.ids:
            text = torch.tensor([ids])
            batch = TokenBatch(text, torch.ones_like(text))
            with _outputs(of_base, sums.hold):
                forward(base, batch)
            with _outputs(of_expert, partial(sums.compare, len(ids))):
                forward(expert, batch)
            sums.held.clear()
            advance(len(ids))
    stored_as = weight_names(base)
    found = {
        names.module(stored_as[f"{path}.weight"]): sums.shift(name, path)
        for path in of_base
        if path in sums.differences and f"{path}.weight" in stored_as
    }
    if not found:
        problem = "no Linear in its blocks has one output for each token of a text"
        raise CalibrationModelError(name, problem, "Use guide `lewis`, which looks at inputs.")
    return found


class _ShiftSums:
    """Squares over the tokens of all texts; `held` are the base's outputs on the current text."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.differences: defaultdict[str, float] = defaultdict(float)
        self._base: defaultdict[str, float] = defaultdict(float)

    def hold(self, path: str, y: Tensor) -> None:
        self.held[path] = y.clone()  # later code may write into the output

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
    """The sum of squares of all entries: float32 in a row, float64 over the rows."""
    rows = y.float().square().sum(dim=-1)
    return float(rows.sum() if rows.device.type == "mps" else rows.double().sum())


@contextmanager
def _outputs(modules: Mapping[str, Linear], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Pass the output of each module to `take`, as (rows, out_features)."""
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
