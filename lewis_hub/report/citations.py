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
REGMEAN = Paper(
    "2212.09849",
    """@inproceedings{jin2023dataless,
  title = {Dataless Knowledge Fusion by Merging Weights of Language Models},
  author = {Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  eprint = {2212.09849},
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
AIM = Paper(
    "2502.02421",
    """@inproceedings{nobari2025activation,
  title = {Activation-Informed Merging of Large Language Models},
  author = {Nobari, Amin Heyrani and Alimohammadi, Kaveh and ArjomandBigdeli, Ali and
            Srivastava, Akash and Ahmed, Faez and Azizan, Navid},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
  eprint = {2502.02421},
  archivePrefix = {arXiv}
}""",
)
OWL = Paper(
    "2310.05175",
    """@inproceedings{yin2024outlier,
  title = {Outlier Weighed Layerwise Sparsity ({OWL}): A Missing Secret Sauce for Pruning {LLMs} to
           High Sparsity},
  author = {Yin, Lu and Wu, You and Zhang, Zhenyu and Hsieh, Cheng-Yu and Wang, Yaqing and
            Jia, Yiling and Li, Gen and Jaiswal, Ajay and Pechenizkiy, Mykola and Liang, Yi and
            Bendersky, Michael and Wang, Zhangyang and Liu, Shiwei},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  eprint = {2310.05175},
  archivePrefix = {arXiv}
}""",
)
HARNESS = """@misc{eval-harness,
  title = {The Language Model Evaluation Harness},
  author = {Gao, Leo and Tow, Jonathan and Abbasi, Baber and Biderman, Stella and Black, Sid and
            DiPofi, Anthony and Foster, Charles and Golding, Laurence and Hsu, Jeffrey and
            Le Noac'h, Alain and Li, Haonan and McDonell, Kyle and Muennighoff, Niklas and
            Ociepa, Chris and Phang, Jason and Reynolds, Laria and Schoelkopf, Hailey and
            Skowron, Aviya and Sutawika, Lintang and Tang, Eric and Thite, Anish and Wang, Ben and
            Wang, Kevin and Zou, Andy},
  year = {2024},
  publisher = {Zenodo},
  doi = {10.5281/zenodo.12608602}
}"""


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
    "regmean": KnownMethod("RegMean on task vectors", (REGMEAN, TASK_ARITHMETIC)),
    "model_stock": KnownMethod("Model Stock", (MODEL_STOCK,)),
    "slerp": KnownMethod("spherical interpolation (SLERP)", ()),
    "nuslerp": KnownMethod("spherical interpolation (NuSLERP)", ()),
    "multislerp": KnownMethod("spherical interpolation (Multi-SLERP)", ()),
    "karcher": KnownMethod("their Karcher mean", ()),
    "arcee_fusion": KnownMethod("Arcee Fusion", ()),
    "nearswap": KnownMethod("NearSwap", ()),
    "passthrough": KnownMethod("passing it through", ()),
}
GUIDES = {"lewis": LEWIS, "lewis_reference": LEWIS, "aim": AIM, "owl": OWL}


def papers(method: str, guide: str | None) -> Sequence[Paper]:
    """What a merge by this method and guide cites; nothing where we know no paper."""
    known = METHODS.get(method)
    guided = (GUIDES[guide],) if guide in GUIDES else ()
    return (*guided, *(known.papers if known else ()))
