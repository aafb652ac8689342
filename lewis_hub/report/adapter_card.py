"""The card of an adapter that was extracted: from what, and what it misses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lewis_hub.hub.source import Source
from lewis_hub.report import markdown

if TYPE_CHECKING:
    from lewis_hub.merge.extract import Extracted


def adapter_card(base: Source, expert: Source, licence: str | None, extracted: Extracted) -> str:
    """Its `README.md`: metadata as the Hub reads it, and how close each update comes."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=None if base.folder else base.name,
        base_model_relation=None if base.folder else "adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lewis-hub"],
        license=licence,
    )
    worst = sorted(extracted.fits.items(), key=lambda item: -item[1].error)[:5]
    rows = [[markdown.code(module), str(fit.rank), f"{fit.error:.4f}"] for module, fit in worst]
    missed = markdown.table(["module", "rank", "missed"], rows, right=(1, 2))
    errors = [fit.error for fit in extracted.fits.values()]
    mean = math.fsum(errors) / len(errors) if errors else 0.0
    whole = f"\n{len(extracted.whole)} tensors that are no matrix of a block differ too, and are "
    whole += "kept whole.\n"
    return (
        f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n"
        f"A LoRA adapter that makes {markdown.code(expert.pinned)} of "
        f"{markdown.code(base.pinned)}, extracted by singular value decomposition of their "
        f"difference, without training.\n\n"
        f"Of the task vectors of {len(errors)} modules it misses {mean:.2%} on average (Frobenius "
        f"norm of the rest, as a share). The most is missed of:\n\n{missed}\n"
        f"{whole if extracted.whole else ''}"
    )
