"""What a merge builds on: papers and their BibTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper; `bibtex` without the outer entry's trailing line break."""

    arxiv: str
    bibtex: str

    @property
    def url(self) -> str:
        """Its page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}"


LEWIS = Paper(
    "2503.03874",
    """@misc{chopra2025lewis,
  title = {{LEWIS} ({LayEr} {WIse} {Sparsity}) -- A Training Free Guided Model Merging Approach},
  author = {Chopra, Hetarth and Rambhia, Vidhi and Adve, Vikram},
  year = {2025},
  eprint = {2503.03874},
  archivePrefix = {arXiv},
  note = {ICLR 2025 Workshop on Sparsity in LLMs}
}""",
)
MODEL_SOUPS = Paper(
    "2203.05482",
    """@inproceedings{wortsman2022model,
  title = {Model soups: averaging weights of multiple fine-tuned models improves accuracy without
           increasing inference time},
  author = {Wortsman, Mitchell and Ilharco, Gabriel and Gadre, Samir Yitzhak and
            Roelofs, Rebecca and Gontijo-Lopes, Raphael and Morcos, Ari S. and
            Namkoong, Hongseok and Farhadi, Ali and Carmon, Yair and Kornblith, Simon and
            Schmidt, Ludwig},
  booktitle = {International Conference on Machine Learning},
  year = {2022},
  eprint = {2203.05482},
  archivePrefix = {arXiv}
}""",
)
TASK_ARITHMETIC = Paper(
    "2212.04089",
    """@inproceedings{ilharco2023editing,
  title = {Editing Models with Task Arithmetic},
  author = {Ilharco, Gabriel and Ribeiro, Marco Tulio and Wortsman, Mitchell and
            Gururangan, Suchin and Schmidt, Ludwig and Hajishirzi, Hannaneh and Farhadi, Ali},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  eprint = {2212.04089},
  archivePrefix = {arXiv}
}""",
)
TIES = Paper(
    "2306.01708",
    """@inproceedings{yadav2023ties,
  title = {{TIES-Merging}: Resolving Interference When Merging Models},
  author = {Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2306.01708},
  archivePrefix = {arXiv}
}""",
)
DARE = Paper(
    "2311.03099",
    """@inproceedings{yu2024language,
  title = {Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
           Lunch},
  author = {Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  eprint = {2311.03099},
  archivePrefix = {arXiv}
}""",
)

DELLA = Paper(
    "2406.11617",
    """@misc{deep2024della,
  title = {{DELLA-Merging}: Reducing Interference in Model Merging through
           Magnitude-Based Sampling},
  author = {Deep, Pala Tej and Bhardwaj, Rishabh and Poria, Soujanya},
  year = {2024},
  eprint = {2406.11617},
  archivePrefix = {arXiv}
}""",
)
BREADCRUMBS = Paper(
    "2312.06795",
    """@inproceedings{davari2024model,
  title = {Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks},
  author = {Davari, MohammadReza and Belilovsky, Eugene},
  booktitle = {European Conference on Computer Vision},
  year = {2024},
  eprint = {2312.06795},
  archivePrefix = {arXiv}
}""",
)
FUSECHAT = Paper(
    "2408.07990",
    """@inproceedings{wan2025fusechat,
  title = {{FuseChat}: Knowledge Fusion of Chat Models},
  author = {Wan, Fanqi and Zhong, Longguang and Yang, Ziyi and Chen, Ruijun and Quan, Xiaojun},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  pages = {21629--21653},
  year = {2025},
  eprint = {2408.07990},
  archivePrefix = {arXiv}
}""",
)
MODEL_STOCK = Paper(
    "2403.19522",
    """@inproceedings{jang2024model,
  title = {Model Stock: All we need is just a few fine-tuned models},
  author = {Jang, Dong-Hwan and Yun, Sangdoo and Han, Dongyoon},
  booktitle = {European Conference on Computer Vision},
  year = {2024},
  eprint = {2403.19522},
  archivePrefix = {arXiv}
}""",
)
PCB = Paper(
    "2410.02396",
    """@inproceedings{du2024parameter,
  title = {Parameter Competition Balancing for Model Merging},
  author = {Du, Guodong and Lee, Junlin and Li, Jing and Jiang, Runhua and Guo, Yifei and
            Yu, Shuyang and Liu, Hanting and Goh, Sim Kuan and Tang, Ho-Kin and He, Daojing and
            Zhang, Min},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2410.02396},
  archivePrefix = {arXiv}
}""",
)
CABS = Paper(
    "2503.01874",
    """@inproceedings{yang2025cabs,
  title = {{CABS}: Conflict-Aware and Balanced Sparsification for Enhancing Model Merging},
  author = {Yang, Zongzhen and Qi, Binhang and Sun, Hailong and Long, Wenrui and Zhao, Ruobing and
            Gao, Xiang},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  eprint = {2503.01874},
  archivePrefix = {arXiv}
}""",
)


@dataclass(frozen=True)
class KnownMethod:
    """How a card speaks of a method, and what it cites."""

    title: str
    papers: tuple[Paper, ...]


METHODS = {
    "linear": KnownMethod("a weighted average of their weights", (MODEL_SOUPS,)),
    "task_arithmetic": KnownMethod("task arithmetic", (TASK_ARITHMETIC,)),
    "ties": KnownMethod("TIES-Merging", (TIES,)),
    "dare_linear": KnownMethod("DARE with task arithmetic", (DARE, TASK_ARITHMETIC)),
    "dare_ties": KnownMethod("DARE with TIES-Merging", (DARE, TIES)),
    "della": KnownMethod("DELLA-Merging", (DELLA,)),
    "della_linear": KnownMethod("DELLA with task arithmetic", (DELLA, TASK_ARITHMETIC)),
    "breadcrumbs": KnownMethod("Model Breadcrumbs", (BREADCRUMBS,)),
    "breadcrumbs_ties": KnownMethod("Model Breadcrumbs with TIES-Merging", (BREADCRUMBS, TIES)),
    "sce": KnownMethod("SCE", (FUSECHAT,)),
    "cabs": KnownMethod("CABS", (CABS,)),
    "pcb": KnownMethod("PCB-Merging", (PCB,)),
    "model_stock": KnownMethod("Model Stock", (MODEL_STOCK,)),
    "slerp": KnownMethod("spherical interpolation (SLERP)", ()),
    "nuslerp": KnownMethod("spherical interpolation (NuSLERP)", ()),
    "multislerp": KnownMethod("spherical interpolation (Multi-SLERP)", ()),
    "karcher": KnownMethod("their Karcher mean", ()),
    "arcee_fusion": KnownMethod("Arcee Fusion", ()),
    "nearswap": KnownMethod("NearSwap", ()),
    "passthrough": KnownMethod("passing it through", ()),
}
GUIDES = {"lewis": LEWIS, "lewis_reference": LEWIS}


def papers(method: str, guide: str | None) -> Sequence[Paper]:
    """What a merge by this method and guide cites; nothing where we know no paper."""
    known = METHODS.get(method)
    guided = (GUIDES[guide],) if guide in GUIDES else ()
    return (*guided, *(known.papers if known else ()))
