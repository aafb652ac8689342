"""The papers that a card cites. Their BibTeX entries are in `templates/citations.bib`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

FILE = "citations.bib"
ENTRY = re.compile(r"^@\w+\{([\w-]+),\n.*?^\}$", re.MULTILINE | re.DOTALL)
EPRINT = re.compile(r"^  eprint = \{(.+)\}", re.MULTILINE)
HARNESS = "eval-harness"


@dataclass(frozen=True)
class KnownMethod:
    """The name of a method in a sentence, and the keys of its papers."""

    title: str
    papers: tuple[str, ...] = ()


METHODS = {
    "linear": KnownMethod("a weighted average of their weights", ("wortsman2022model",)),
    "task_arithmetic": KnownMethod("task arithmetic", ("ilharco2023editing",)),
    "ties": KnownMethod("TIES-Merging", ("yadav2023ties",)),
    "dare_linear": KnownMethod(
        "DARE with task arithmetic", ("yu2024language", "ilharco2023editing")
    ),
    "dare_ties": KnownMethod("DARE with TIES-Merging", ("yu2024language", "yadav2023ties")),
    "della": KnownMethod("DELLA-Merging", ("deep2024della",)),
    "della_linear": KnownMethod(
        "DELLA with task arithmetic", ("deep2024della", "ilharco2023editing")
    ),
    "breadcrumbs": KnownMethod("Model Breadcrumbs", ("davari2024model",)),
    "breadcrumbs_ties": KnownMethod(
        "Model Breadcrumbs with TIES-Merging", ("davari2024model", "yadav2023ties")
    ),
    "sce": KnownMethod("SCE", ("wan2025fusechat",)),
    "cabs": KnownMethod("CABS", ("yang2025cabs",)),
    "pcb": KnownMethod("PCB-Merging", ("du2024parameter",)),
    "regmean": KnownMethod("RegMean on task vectors", ("jin2023dataless", "ilharco2023editing")),
    "model_stock": KnownMethod("Model Stock", ("jang2024model",)),
    "slerp": KnownMethod("spherical interpolation (SLERP)"),
    "nuslerp": KnownMethod("spherical interpolation (NuSLERP)"),
    "multislerp": KnownMethod("spherical interpolation (Multi-SLERP)"),
    "karcher": KnownMethod("their Karcher mean"),
    "arcee_fusion": KnownMethod("Arcee Fusion"),
    "nearswap": KnownMethod("NearSwap"),
    "passthrough": KnownMethod("passthrough"),
}
GUIDES = {
    "lewis": "chopra2025lewis",
    "lewis_reference": "chopra2025lewis",
    "aim": "nobari2025activation",
    "owl": "yin2024outlier",
}


def papers(method: str, guide: str | None) -> tuple[str, ...]:
    """The keys of the papers of a guide and a method; empty if they are unknown."""
    known = METHODS.get(method)
    guided = (GUIDES[guide],) if guide in GUIDES else ()
    return (*guided, *(known.papers if known else ()))


def bibtex(keys: Iterable[str]) -> list[str]:
    """The entries of these papers."""
    text = files("lewis_hub.templates").joinpath(FILE).read_text(encoding="utf-8")
    entries = {entry[1]: entry[0] for entry in ENTRY.finditer(text)}
    return [entries[key] for key in keys]


def guide_url(guide: str) -> str | None:
    """The page on arXiv of a guide's paper; None for a guide without a paper."""
    if guide not in GUIDES:
        return None
    [entry] = bibtex([GUIDES[guide]])
    eprint = EPRINT.search(entry)
    return f"https://arxiv.org/abs/{eprint[1]}" if eprint else None
