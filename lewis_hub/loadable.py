"""What transformers must not do when it loads: other files, maps, endless lists and texts, code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path, PureWindowsPath
from typing import Any

from lewis_hub.audit_hook import confined_to
from lewis_hub.documents import MAX_TABLE_BYTES, read_json
from lewis_hub.errors import LocatedError, SourceError, TokenizerError
from lewis_hub.files import require_inside, text_of
from lewis_hub.limits import TooMuchError, limited
from lewis_hub.system import limited_memory
from lewis_hub.text_growth import require_modest, require_modest_padding

TOKENIZERS = "*tokenizer.*json"  # settings may choose one for a version of transformers
# their settings become arguments of the tokenizer's class
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
PATHS = frozenset({"vocab", "merges", "gguf_file", "model_file"})  # as texts; of what to open
ENDS = ("_file", "_spm")  # of keys that name files, too
PART = "question_encoder_tokenizer"  # a folder with a tokenizer, of which one of RAG consists
ARGUMENTS = "init_inputs"  # those without a name
NEWER = "fast_tokenizer_files"  # in the folder
HIDDEN = "additional_chat_templates/.*.jinja"  # which are no files of a source
WEIGHTS = "*.safetensors"
CACHE = "TIKTOKEN_CACHE_DIR"  # of tiktoken, by the paths of files; empty: none
UNUSED = "special_tokens_map_file"  # the author's; it may exist in the same cache on this machine
REMEDY = "Remove it in a copy: only the files of a model are used."
# to load a tokenizer or a configuration: 262,144 tokens and 500,000 merges take 3 s and 0.4 GB
MAX_LOAD_S = 45.0
MAX_LOAD_BYTES = 1_500_000_000  # by which this process grows
MAX_MAPPED_BYTES = 2_000_000_000  # that one call may ask for: the growth is looked at afterwards
LAST_LOAD_S = 60.0  # code in Rust that no error stops ends with the process
SMALLER = "Its files are damaged, or made to do so: use an intact copy of the model."
# inside of a load that is limited
IS_LIMITED: ContextVar[bool] = ContextVar("IS_LIMITED", default=False)


def require_loadable(folder: Path) -> None:
    """Refuse a tokenizer that is made of other files than its folder's, or makes texts very long.

    transformers opens what some settings name: any file of this machine would become the tokens,
    and so a part of what the model writes. Of `vocab_file` and the like it takes the file in the
    folder instead, if there is one.

    Raises:
        TokenizerError: as said, or as `require_modest` and `require_modest_padding`.
    """
    for file in filter(Path.is_file, folder.glob(TOKENIZERS)):
        found = read_json(text_of(file, MAX_TABLE_BYTES), MAX_TABLE_BYTES)
        if isinstance(found, dict):
            require_modest(str(folder), found)
            require_modest_padding(f"{folder}: {file.name}", found)
            model = found.get("model")
            _require_values(file, model.items() if isinstance(model, dict) else (), is_whole=True)
    for place in (*folder.glob(PART), *folder.glob(HIDDEN)):
        problem = f"`{place.relative_to(folder).as_posix()}` is used, but no file of a tokenizer"
        raise TokenizerError(str(folder), problem, REMEDY)
    for name in SETTINGS:
        # the settings of the second replace files of the folder
        is_whole = name == SETTINGS[0] and (folder / "tokenizer.json").exists()
        with suppress(FileNotFoundError):
            found = read_json(text_of(folder / name, MAX_TABLE_BYTES), MAX_TABLE_BYTES)
            if isinstance(found, dict):
                require_modest_padding(f"{folder}: {name}", found)
            _require_values(folder / name, _settings(found), is_whole=is_whole)


def _require_values(file: Path, settings: Iterable[tuple[str, object]], *, is_whole: bool) -> None:
    for key, value in settings:
        if _names_file(key, value, is_whole=is_whole):
            problem = f"`{key}` names a file, {str(value)[:100]}"
            raise TokenizerError(f"{file.parent}: {file.name}", problem, REMEDY)


@contextmanager
def only_files_of(folder: Path, *, and_others: bool = False) -> Iterator[None]:
    """Let transformers open no file but those of a folder, map none, and run no code of a model.

    Args:
        folder: of the model.
        and_others: also what options of the user name: only the weights are looked at.

    Raises:
        SourceError: it fails, as it opens another file or a connection, or weights are elsewhere.
    """
    with without_code(), weights_copied(), loads_limited(), ExitStack() as only:
        if not and_others:
            only.enter_context(without_cache())
            only.enter_context(confined_to(folder))
        _require_own_weights(folder)
        yield


def _require_own_weights(folder: Path) -> None:
    """Refuse weights elsewhere: safetensors opens files in Rust, which no hook sees."""
    for file in folder.rglob(WEIGHTS):
        require_inside(folder, file, SourceError)
    for index in folder.rglob(f"{WEIGHTS}.index.json"):
        found = read_json(text_of(index, MAX_TABLE_BYTES), MAX_TABLE_BYTES)
        shards = found.get("weight_map") if isinstance(found, dict) else None
        for shard in shards.values() if isinstance(shards, dict) else ():
            if not (isinstance(shard, str) and PureWindowsPath(shard).name == shard):
                where = f"{folder}: {index.relative_to(folder).as_posix()}"
                problem = f"it names {str(shard)[:100]!r}, which is no file beside it"
                raise SourceError(where, problem, REMEDY)


@contextmanager
def weights_copied() -> Iterator[None]:
    """Have transformers read weights: a file that is truncated under a map ends the process."""
    import safetensors.torch
    from safetensors import safe_open
    from transformers import modeling_utils

    def read(*args: Any, **options: Any) -> Any:
        return safe_open(*args, **{**options, "backend": "pread"})

    modules: tuple[Any, ...] = (safetensors.torch, modeling_utils)
    for module in modules:
        module.safe_open = read
    try:
        yield
    finally:
        for module in modules:
            module.safe_open = safe_open


@contextmanager
def loads_limited() -> Iterator[None]:
    """Have transformers refuse tokenizers and configurations that take too much time or memory.

    A number in a small file makes a list of any length, and a long token as many merges as the
    square of its letters. Other libraries load them together with a model, which may take long:
    so the methods that load them are replaced.

    Raises:
        TokenizerError, SourceError: in them, and at the end of the block, as a library may go on
            without one.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

    refused = list[LocatedError]()
    tokenizer, config = (TokenizerError, "its tokenizer"), (SourceError, "its configuration")
    kinds: Mapping[Any, tuple[type[LocatedError], str]] = {
        AutoTokenizer: tokenizer,
        PreTrainedTokenizerBase: tokenizer,
        AutoConfig: config,
        PreTrainedConfig: config,
    }
    with ExitStack() as restored:
        for kind, told in kinds.items():
            before = kind.__dict__["from_pretrained"]
            restored.callback(setattr, kind, "from_pretrained", before)
            kind.from_pretrained = classmethod(_within_limits(before.__func__, refused, *told))
        try:
            yield
        except Exception:
            if refused:
                raise refused[0] from None
            raise
        if refused:
            raise refused[0]


def _within_limits(
    load: Callable[..., Any], refused: list[LocatedError], error: type[LocatedError], what: str
) -> Callable[..., Any]:
    @wraps(load)
    def load_within_limits(kind: type, folder: object, *args: Any, **options: Any) -> Any:
        if IS_LIMITED.get():  # a process has one last limit of time
            return load(kind, folder, *args, **options)
        if refused:  # a library tries another class
            raise refused[0]
        token = IS_LIMITED.set(True)
        try:
            with limited_load(error, f"{folder}: {what}"):
                return load(kind, folder, *args, **options)
        except LocatedError as found:
            refused.append(found)
            raise
        finally:
            IS_LIMITED.reset(token)

    return load_within_limits


@contextmanager
def limited_model(
    where: str, max_s: float, per: str, max_bytes: int | None = None
) -> Iterator[None]:
    """Stop a library that takes too much for a model; the limits are those of `limited`.

    Raises:
        SourceError: it took too much; `where` names the model.
    """
    try:
        with limited(max_s, per, max_bytes=max_bytes):
            yield
    except TooMuchError as error:
        raise SourceError(where, str(error), SMALLER) from None


@contextmanager
def limited_load(error: type[LocatedError], where: str) -> Iterator[None]:
    """Limit the time and memory of loading a configuration or a tokenizer.

    Raises:
        LocatedError: `error`, which names `where`: it took too much.
    """
    try:
        with (
            limited_memory(MAX_MAPPED_BYTES),
            limited(MAX_LOAD_S, "its load", max_bytes=MAX_LOAD_BYTES, last_s=LAST_LOAD_S),
        ):
            yield
    except TooMuchError as found:
        raise error(where, str(found), SMALLER) from None
    except MemoryError:
        raise error(where, "it takes too much memory to load", SMALLER) from None


@contextmanager
def without_cache() -> Iterator[None]:
    """Have tiktoken read a file of the model: of its path it may have cached another one."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = ""
    try:
        yield
    finally:
        os.environ.pop(CACHE, None)
        if before is not None:
            os.environ[CACHE] = before


@contextmanager
def without_code() -> Iterator[None]:
    """Have transformers refuse code of a model, which it else asks about on the terminal.

    With `trust_remote_code=False` it asks all the same for a model inside a model.
    """
    from transformers import dynamic_module_utils as dynamic

    seconds = dynamic.TIME_OUT_REMOTE_CODE
    dynamic.TIME_OUT_REMOTE_CODE = 0  # for an answer
    try:
        yield
    finally:
        dynamic.TIME_OUT_REMOTE_CODE = seconds


def _settings(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _settings(inner)


def _names_file(key: str, value: object, *, is_whole: bool) -> bool:
    if key == ARGUMENTS:
        return bool(value)
    if key == NEWER:
        return "/" in str(value) or "\\" in str(value)
    if not isinstance(value, str):
        return False
    is_used = key.endswith(ENDS) and key != UNUSED and not is_whole
    return key in PATHS or (is_used and Path(value).exists())
