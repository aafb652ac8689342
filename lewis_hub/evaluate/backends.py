"""lm-eval's backends, which run a model: transformers, vLLM, or a server of completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lewis_hub.checkpoint.configuration import require_buildable
from lewis_hub.documents import MAX_JSON_BYTES, leaves, read_json
from lewis_hub.errors import EvaluationError, ExtraMissingError, LewisHubError
from lewis_hub.evaluate.chat import limit_tokenizer
from lewis_hub.evaluate.empty_models import (
    limited_load,
    require_size_of_files,
    require_whole,
    stored_in,
)
from lewis_hub.evaluate.short_text import require_short_pass
from lewis_hub.loadable import only_files_of, require_loadable
from lewis_hub.recipe.backend import ADDRESS, Backend, Option, unsafe_args
from lewis_hub.tokenizer import panics_as_errors

MAX_BEAMS = 16  # that a model may ask for when it answers; usual: 1 to 6
MAX_NUMBERS_OF_ONE = 10_000  # in a setting of generation, such as words that are not written
EXTRAS = {  # backend -> package, our extra
    "vllm": ("vllm", "vllm"),
    "local-completions": ("tenacity", "api"),
    "mteb": ("mteb", "mteb"),
}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are run; the same for all that are compared."""

    device: str = "cpu"  # on `cpu` the arithmetic is float32, else the model's own dtype
    chat_template: bool = False  # prompts go through each model's own chat template
    backend: Backend = "hf"
    backend_args: Mapping[str, Option] = field(default_factory=dict)  # by lm-eval's names
    num_fewshot: int | None = None  # examples in a prompt; None: the task's number
    batch_size: int | None = None  # requests at a time; None: as many as memory allows
    generation: Mapping[str, Option] = field(default_factory=dict)  # over the task's own options

    @property
    def stated(self) -> dict[str, Any]:
        """The settings that can change scores, without defaults, as files and cards state them.

        Scores are comparable only if these are equal.
        """
        # where a server is does not change its answers
        args = {name: value for name, value in self.backend_args.items() if name != ADDRESS}
        known = {
            "chat_template": self.chat_template or None,
            "backend": self.backend if self.backend != "hf" else None,
            "backend_args": args,
            "num_fewshot": self.num_fewshot,
            "batch_size": self.batch_size,
            "generation": dict(self.generation),
        }
        return {name: value for name, value in known.items() if value not in (None, {})}

    @property
    def on_transformers(self) -> EvaluationSettings:
        """The same settings with transformers as the backend, whose weights can be exchanged."""
        return replace(self, backend="hf", backend_args={})


def require_installed(backend: Backend) -> None:
    """Refuse, before any work, a backend whose package is not installed."""
    package, extra = EXTRAS.get(backend, ("lm_eval", ""))
    if find_spec(package) is None:
        raise ExtraMissingError(f"The backend `{backend}`", extra)


def load_backend(folder: Path, settings: EvaluationSettings) -> Any:
    """Load the model in a folder as lm-eval's `LM`, or raise an EvaluationError.

    A server is not asked to load anything: its requests name the folder as the model, unless the
    argument `model` gives the name by which it serves the model.
    """
    require_installed(settings.backend)
    load = {"hf": _transformers, "vllm": _vllm, "local-completions": _server}[settings.backend]
    path = str(folder.resolve())  # transformers takes a relative path for the name of a repo
    try:
        with panics_as_errors(), only_files_of(folder, and_others=leads_elsewhere(settings)):
            _require_loadable(folder)
            lm = load(path, settings)
            limit_tokenizer(path, getattr(lm, "tokenizer", None))
            return lm
    except LewisHubError:
        raise
    except Exception as error:  # of any class, where a configuration has values of other types
        if isinstance(error, TypeError) and settings.backend_args:
            problem = f"`{settings.backend}` does not take these arguments: {error}"
            remedy = "See lm-eval's own documentation."
            raise EvaluationError("backend_args", problem, remedy) from error
        problem = f"cannot be loaded as a language model: {type(error).__name__}: {error}"
        remedy = (
            "Expected: config.json, tokenizer files and safetensors that transformers can load."
        )
        raise EvaluationError(str(folder), problem, remedy) from error


def leads_elsewhere(settings: EvaluationSettings) -> bool:
    """Whether loading a model has to open more than its files.

    vLLM starts processes and compilers. What no recipe may set is of the user, and may name an
    adapter or a kernel.
    """
    yours = [name for name, _ in unsafe_args(settings.backend_args) if name != ADDRESS]
    return bool(yours) or settings.backend == "vllm"


def _require_loadable(folder: Path) -> None:
    """Refuse what would take transformers for ever, or out of the folder; it refuses all else."""
    with (folder / "config.json").open("rb") as file:
        config = read_json(file.read(MAX_JSON_BYTES + 1))
    if isinstance(config, dict):
        require_buildable(str(folder), config)
    require_loadable(folder)


def _transformers(path: str, settings: EvaluationSettings) -> Any:
    from lm_eval.models.huggingface import HFLM

    own = {
        "dtype": "float32" if settings.device == "cpu" else "auto",
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    args = {**own, **settings.backend_args}

    class WholeModel(HFLM):  # type: ignore[misc]
        """Refuses a model with weights that are in no file, which would be random."""

        AUTO_MODEL_CLASS: Any

        def _create_model(self, *given: Any, **options: Any) -> None:
            automatic = self.AUTO_MODEL_CLASS
            whole = partial(_whole, automatic, settings.device)
            self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=whole)
            super()._create_model(*given, **options)
            self.AUTO_MODEL_CLASS = automatic

    return WholeModel(pretrained=path, tokenizer=path, device=settings.device, **args)


def _whole(automatic: Any, device: str, path: str, **options: Any) -> Any:
    require_size_of_files(path, Path(path), automatic)
    with limited_load(path, stored_in(Path(path)), device):
        model, report = automatic.from_pretrained(path, output_loading_info=True, **options)
    require_whole(path, report["missing_keys"], EvaluationError)
    require_short_pass(path, model)
    settings = getattr(model, "generation_config", None)  # an encoder has none
    if settings:
        _require_few_steps(path, settings)
        settings.max_new_tokens = None  # it would come before the limit of the task
    return model


def _require_few_steps(path: str, settings: Any) -> None:
    """Refuse settings of generation that take much memory or time for each token."""
    if (settings.num_beams or 1) > MAX_BEAMS:
        problem = f"`num_beams` of its generation_config.json is above the limit of {MAX_BEAMS}"
        raise EvaluationError(path, problem, "Each beam takes memory: set fewer in a copy of it.")
    for key, value in settings.to_dict().items():
        if (n := sum(1 for _ in leaves(value))) > MAX_NUMBERS_OF_ONE:
            problem = f"`{key[:100]}` of its generation_config.json has {n:,} values, the limit is "
            remedy = "Each takes time for each token: remove some in a copy of it."
            raise EvaluationError(path, f"{problem}{MAX_NUMBERS_OF_ONE:,}", remedy)


def _vllm(path: str, settings: EvaluationSettings) -> Any:
    from lm_eval.models.vllm_causallms import VLLM

    size = settings.batch_size or "auto"
    args = {"trust_remote_code": False, "batch_size": size, **settings.backend_args}
    return VLLM(pretrained=path, tokenizer=path, **args)


def _server(path: str, settings: EvaluationSettings) -> Any:
    from lewis_hub.evaluate.completions import CheckedCompletions  # imports lm-eval: only here

    config = read_json((Path(path) / "config.json").read_bytes())
    if not isinstance(config, dict):
        raise ValueError("config.json is no JSON object")
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    n_positions = next((text[key] for key in POSITIONS if key in text), None)
    args: dict[str, Any] = {
        "model": path,
        "tokenizer_backend": "huggingface",
        "batch_size": settings.batch_size or 1,
        **({"max_length": n_positions} if isinstance(n_positions, int) else {}),
        **settings.backend_args,
    }
    return CheckedCompletions(tokenizer=path, trust_remote_code=False, **args)
