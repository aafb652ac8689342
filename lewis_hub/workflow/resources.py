"""What a merge may use, and the memory and disk that it takes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from lewis_hub.calibration.grams import HELD_BYTES as GRAM_BYTES
from lewis_hub.calibration.grams import WIDEST, n_entries
from lewis_hub.calibration.profile import OF_WHOLE_MODELS, WITHOUT_TEXTS
from lewis_hub.calibration.subject import HELD_BYTES, KEPT_BYTES
from lewis_hub.calibration.texts import TOGETHER
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import WIDTHS, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.checkpoint.writer import DTYPES
from lewis_hub.errors import DeviceError
from lewis_hub.guides.registry import RegisteredGuide
from lewis_hub.hub.fetch import weight_files
from lewis_hub.merge.runners import Backend, Ray, parse_runner
from lewis_hub.recipe.evaluation import Evaluation
from lewis_hub.recipe.schema import Calibration
from lewis_hub.workflow.open import MergeSources

SOFTWARE = (
    *("torch", "transformers", "tokenizers", "accelerate", "safetensors", "huggingface_hub"),
    *("datasets", "lm_eval", "numpy", "numba"),
)


@dataclass(frozen=True)
class Execution:
    """Execution settings; none of them changes the merged weights.

    Attributes:
        runner: `inline`, `threads` (one per core), `threads:N` or `ray`.
        ray_address: of the cluster; None: Ray is started on this machine.
        device: torch device on which models are measured and scored. With `cuda` the weights are
            merged there too, unless Ray's workers merge them; with `mps` the CPU merges them.
        max_shard_bytes: limit for a file of weights.
        max_memory_bytes: a model that needs more is measured block by block; None: no limit.
        replace: whether an existing output folder may be replaced.
        allow_code: whether benchmarks may run code that a model wrote.
        allow_nan: whether experts may hold NaN and infinity, which are replaced by the base's
            values.
        allow_pickle: whether sources may have only pickled weights.
        held_out: tasks that are scored later if the recipe scores nothing; calibration does not
            draw their items.
        measures_again: whether measurements and texts beside the recipe are not used, but made
            again.
    """

    runner: str = "threads"
    ray_address: str | None = None
    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000
    max_memory_bytes: int | None = None
    replace: bool = False
    allow_code: bool = False
    allow_nan: bool = False
    allow_pickle: bool = False
    held_out: Evaluation | None = None
    measures_again: bool = False

    @property
    def loading(self) -> Loading:
        """The device and memory limit for measured models."""
        return Loading(self.device, self.max_memory_bytes)

    def means(self, *, is_read_next: bool) -> Backend:
        """Return runner and device of a merge; `is_read_next`: whether the files are read soon."""
        device = self.device if self.device.startswith("cuda") else None
        return Backend(parse_runner(self.runner, self.ray_address), device, is_read_next)

    def require_usable(self) -> None:
        """Refuse a runner or device that is unknown or that this machine does not have."""
        runner = parse_runner(self.runner, self.ray_address)
        if isinstance(runner, Ray):
            runner.require_installed()
        if self.device != "cpu":
            _require_device(self.device)


@cache
def software() -> Mapping[str, str]:
    """Return the versions of the installed libraries, by name."""
    found = {"lewis_hub": version("lewis-hub"), "python": python_version()}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


NAMES_OF_DEVICES = "Write cpu, cuda, cuda:1 or mps."


def _require_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        problem = "torch knows no such device"
        raise DeviceError(f"device `{name}`", problem, NAMES_OF_DEVICES) from None
    n_found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_found:
        found = f"only {n_found}, counted from cuda:0" if n_found else "none"
        problem = f"torch {torch.__version__} finds {found}"
        remedy = "Use `--device cpu`, or install a driver and a torch that was built for CUDA."
        raise DeviceError(f"device `{name}`", problem, remedy)
    if device.type == "mps" and not torch.backends.mps.is_available():
        problem = f"torch {torch.__version__} finds no GPU of a Mac"
        remedy = "Use `--device cpu`; `mps` needs Apple silicon and macOS 14 or newer."
        raise DeviceError(f"device `{name}`", problem, remedy)


ENGINE_BYTES = 300_000_000  # interpreter and the engine's buffers, for models of any size
TORCH_BYTES = 900_000_000  # torch and transformers, loaded to calibrate and to evaluate
ANY_WIDTH = 1 << 62  # of a matrix whose inputs have all their second moments in one
GRAM_COPIES = 5  # matrices beside two of each expert, G and C, during a factorisation
DEFINED_COPIES = 4  # float64 copies of a tensor, beside its sources, that a torch method makes
WIDTH = 4  # bytes of a float32
EVEN_SO = (
    "more than `--max-memory` allows: the embeddings and all other tensors before the blocks, and "
    "one block twice while it is loaded"
)
ALLOW = "Raise the limit, or leave the option out if the memory holds the whole model."
ROWS = 8  # upper bound for vectors per token, as wide as the widest matrix, within a block


@dataclass(frozen=True)
class MomentSettings:
    """The second moments that a merge needs."""

    widest: int  # number of inputs that one matrix of second moments covers at most
    are_solved: bool  # whether matrices are fitted; otherwise entries are trimmed by the diagonal
    in_sequence: bool  # whether matrices are fitted one by one, on the merged model's activations
    in_expert_blocks: bool = (
        False  # whether experts' blocks run on the merged model's hidden states
    )
    fits_tables: bool = False  # whether token embeddings are fitted


@dataclass(frozen=True)
class Measurement:
    """The measurements that a merge needs."""

    guide: RegisteredGuide | None
    moments: MomentSettings | None
    calibrations: tuple[Calibration, ...]  # of each expert; empty if nothing is measured on texts

    @property
    def solves(self) -> bool:
        """Whether matrices are fitted by second moments."""
        return self.moments is not None and self.moments.are_solved

    @property
    def in_sequence(self) -> bool:
        """Whether matrices are fitted one after the other."""
        return self.moments is not None and self.moments.in_sequence

    @property
    def in_expert_blocks(self) -> bool:
        """Whether they are fitted in the experts' blocks."""
        return self.moments is not None and self.moments.in_expert_blocks

    @property
    def measures(self) -> frozenset[str]:
        """The measures that the guide needs of each source."""
        return frozenset(self.guide.needs if self.guide else ())

    @property
    def n_tokens(self) -> dict[Calibration, int]:
        """The largest possible number of tokens of each calibration's texts."""
        return {texts: texts.samples * texts.max_tokens for texts in self.calibrations}

    def waiting_bytes(
        self,
        n_tokens: Mapping[Calibration, int],  # of each calibration's texts
        checkpoints: Iterable[Checkpoint],
        loading: Loading,
    ) -> int:
        """Return the bytes of hidden states on the disk, in the largest measuring step."""
        if not n_tokens or not (self.moments or self.measures - OF_WHOLE_MODELS - WITHOUT_TEXTS):
            return 0
        n_measured = sum(n_tokens.values())
        n_fitted = 2 * sum(n_tokens[c] for c in self.calibrations) if self.in_sequence else 0
        sizes = [
            states_bytes(checkpoint, max(_n_stacks(checkpoint) * n_fitted, n_measured))
            for checkpoint in checkpoints
            if self.in_sequence or loading.goes_by_block(checkpoint, n_measured)
        ]
        largest = max(sizes, default=0)
        return largest if largest > HELD_BYTES else 0


@dataclass(frozen=True)
class Loading:
    """The device on which models are measured, and the memory limit for a model."""

    device: str = "cpu"
    max_memory_bytes: int | None = None  # a larger model is loaded by block; None: no limit

    def model_bytes(self, checkpoint: Checkpoint) -> int:
        """Return the bytes of a loaded model: float32 on a CPU, otherwise its own dtypes."""
        return sum(
            tensor.n_elements * (WIDTH if self.device == "cpu" else WIDTHS[tensor.kept_dtype])
            for tensor in checkpoint.tensors.values()
        )

    def is_too_large(self, checkpoint: Checkpoint) -> bool:
        """Return whether a whole model is larger than the limit."""
        limit = self.max_memory_bytes
        return limit is not None and self.model_bytes(checkpoint) > limit

    def has_room_for_blocks(self, checkpoint: Checkpoint) -> bool:
        """Return whether the limit allows the whole model, or at least block by block."""
        limit = self.max_memory_bytes
        return not self.is_too_large(checkpoint) or blocks_bytes(checkpoint) <= (limit or 0)

    def goes_by_block(self, checkpoint: Checkpoint, n_tokens: int) -> bool:
        """Return whether a model is measured block by block: it must be, or it takes less memory.

        It never takes less memory on a GPU: a block is copied there as float32 through the CPU's
        memory, which takes longer than loading the whole model.
        """
        blocks = blocks_bytes(checkpoint) + min(states_bytes(checkpoint, n_tokens), HELD_BYTES)
        is_less = self.device == "cpu" and blocks < self.model_bytes(checkpoint)
        return is_less or self.is_too_large(checkpoint)


def blocks_bytes(checkpoint: Checkpoint) -> int:
    """Return the peak bytes of float32 weights when a model runs block by block.

    They are all tensors outside the blocks except the head, and the largest block twice.
    """
    blocks: defaultdict[tuple[str | None, int], int] = defaultdict(int)
    outside = 0
    for name, tensor in checkpoint.tensors.items():
        number = names.block(name)
        if number is not None:
            blocks[names.stack(name), number] += WIDTH * tensor.n_elements
        elif not names.is_head(name):
            outside += WIDTH * tensor.n_elements
    return outside + 2 * max(blocks.values(), default=0)


def _n_stacks(checkpoint: Checkpoint) -> int:
    """2 for an encoder-decoder: the encoder's output stays beside the decoder's hidden states."""
    stacks = (names.stack(name) or "" for name in checkpoint.tensors)
    parts = {part for stack in stacks for part in stack.split(".")}
    return 2 if {"encoder", "decoder"} <= parts else 1


def states_bytes(checkpoint: Checkpoint, n_tokens: int) -> int:
    """Return the bytes of the float32 hidden states of texts between two blocks.

    More than `HELD_BYTES` are kept on the disk. Without token embeddings it returns 0.
    """
    widths = [t.shape[-1] for n, t in checkpoint.tensors.items() if names.is_token_embedding(n)]
    return WIDTH * max(widths, default=0) * n_tokens


def loading_problems(
    measurement: Measurement, sources: MergeSources, loading: Loading
) -> list[str]:
    """Refuse models, or blocks, that do not fit into the allowed memory to be measured."""
    guide, limit = measurement.guide, loading.max_memory_bytes
    if guide and measurement.measures & OF_WHOLE_MODELS:
        return [
            f"guide `{guide.name}` runs whole models, and {source.name} takes "
            f"{loading.model_bytes(source.checkpoint):,} bytes in memory, more than "
            "`--max-memory` allows. Raise the limit, or use a guide that measures block by block, "
            "such as `lewis`."
            for source in sources.distinct
            if loading.is_too_large(source.checkpoint)
        ]
    if limit is None or not measurement.calibrations:
        return []
    if measurement.in_sequence:
        fitted = (sources.donor, *sources.experts)
        n_bytes = sum(blocks_bytes(source.checkpoint) for source in fitted)
        name = "merged_block" if measurement.in_expert_blocks else "merged"
        subject = f"`inputs: {name}` runs the merge and all experts block by block, which"
        sizes = [(subject, n_bytes)] if n_bytes > limit else []
    else:
        sizes = [
            (f"block by block {source.name}", blocks_bytes(source.checkpoint))
            for source in sources.distinct
            if not loading.has_room_for_blocks(source.checkpoint)
        ]
    return [f"{label} takes {n:,} bytes in memory, {EVEN_SO}. {ALLOW}" for label, n in sizes]


def loading_notes(
    measurement: Measurement, sources: MergeSources, loading: Loading, *, scores: bool
) -> list[str]:
    """Return notes: which models are measured block by block, and that scoring loads them whole."""
    too_large = [one for one in sources.distinct if loading.is_too_large(one.checkpoint)]
    notes = [
        f"{source.name} takes {loading.model_bytes(source.checkpoint):,} bytes in memory, more "
        "than `--max-memory` allows, so it is measured block by block."
        for source in too_large
        if measurement.calibrations
    ]
    if scores and too_large:
        notes.append(
            "Scoring loads whole models and ignores `--max-memory`: skip it with `--no-eval`, and "
            "score the merge on a machine with enough memory."
        )
    return notes


@dataclass(frozen=True)
class Workload:
    """The values that determine the disk and memory of a merge."""

    sources: MergeSources
    output: Checkpoint  # headers of the merge, in the dtypes of its sources
    dtype: str | None  # dtype of the output; None keeps the dtype of each tensor
    has_kernel: bool  # whether compiled kernels compute all tensors that need no second moments
    makes_squares: bool  # whether its method does: `Method.makes_squares`
    measurement: Measurement
    loading: Loading
    scores: bool  # whether models are scored
    logits_bytes: int  # of the batches that are scored at a time
    n_twins: int  # number of twins that are made to be scored beside the merge
    uniform_twin: bool  # whether one of them has uniform densities
    loaded: Collection[str]  # pinned sources that transformers loads as whole models

    @property
    def _pickles(self) -> dict[str, int]:
        pickled = [s.source for s in self.sources.distinct if s.source.is_pickled]
        return {source.pinned: source.size_bytes(weight_files(source)) for source in pickled}

    def output_bytes(self) -> int:
        """Estimate the size of the merged weights."""
        donor = self.sources.donor.pinned
        return self._pickles.get(donor) or weight_bytes(self.output.tensors.values(), self.dtype)

    def disk_bytes(self) -> int:
        """Estimate the size of all written files except hidden states; downloads do not count."""
        written = [s.checkpoint for s in self.sources.distinct if s.pinned in self.loaded]
        written_bytes = sum(
            weight_bytes(one.tensors.values()) for one in written if one.is_computed
        )
        merges_bytes = self.output_bytes() * (1 + self.n_twins)
        return merges_bytes + written_bytes + self.statistics_bytes() + sum(self._pickles.values())

    def states_bytes(self) -> int:
        """Estimate the largest size of hidden states on the disk."""
        n_tokens, checkpoints = self.measurement.n_tokens, self.sources.checkpoints
        return self.measurement.waiting_bytes(n_tokens, checkpoints, self.loading)

    def memory_bytes(self) -> int:
        """Estimate the memory of the largest step."""
        n_pickled = max(self._pickles.values(), default=0) // 2  # two bytes: the smallest merged
        measuring = self._measuring_bytes(n_pickled)
        steps = (self._merging_bytes(), self._scoring_bytes(n_pickled), self._writing_bytes())
        return max(*steps, measuring)

    def statistics_bytes(self) -> int:
        """Estimate the files of second moments, or of the matrices that are fitted with them."""
        if not self.measurement.in_sequence:
            return len(self.sources.experts) * grams_bytes(self.output, self.measurement.moments)
        return weight_bytes(_matrices(self.output), self.dtype) * (1 + self.uniform_twin)

    def _merging_bytes(self) -> int:
        """Estimate merging: torch methods hold the largest tensor, adapters all their matrices."""
        tensors = [t for one in self.sources.checkpoints for t in one.tensors.values()]
        updates = [t.adapted.update for t in tensors if t.adapted and t.adapted.update]
        narrow_bytes = 4 * sum(update.a.n_elements + update.b.n_elements for update in updates)
        moments = self.measurement.moments
        if self.has_kernel and moments is None:
            return ENGINE_BYTES + narrow_bytes
        chunked = self.has_kernel and not (moments and moments.fits_tables)
        defined = _matrices(self.output) if chunked else [*self.output.tensors.values()]
        largest = max((tensor.n_elements for tensor in defined), default=0)
        n_sources = len(self.sources.checkpoints)
        held_bytes = (4 * n_sources + 8 * DEFINED_COPIES) * largest
        if self.measurement.solves:
            held_bytes += solving_bytes(self.output, n_sources)
        if self.makes_squares:
            held_bytes += solving_bytes(self.output, n_sources, ANY_WIDTH)
        return TORCH_BYTES + held_bytes + narrow_bytes

    def _scoring_bytes(self, n_pickled: int) -> int:
        """Estimate the memory of scoring: one model, in float32 on a CPU, and its logits."""
        if not self.scores:
            return 0
        sizes = map(_n_elements, (self.output, *self.sources.checkpoints))
        return TORCH_BYTES + WIDTH * max(*sizes, n_pickled) + self.logits_bytes

    def _writing_bytes(self) -> int:
        """Estimate the memory of an expert that writes texts, without its keys and values."""
        if not any(one.is_written for one in self.measurement.calibrations):
            return 0
        return TORCH_BYTES + max(self.loading.model_bytes(c) for c in self.sources.checkpoints)

    def _measuring_bytes(self, n_pickled: int) -> int:
        """Estimate the memory of calibration: a model or a block with its second moments."""
        if not self.measurement.calibrations:
            return 0
        if self.measurement.in_sequence:
            return self._fitting_bytes()
        n_tokens = sum(self.measurement.n_tokens.values())
        n_models = 2 if "output_shift" in self.measurement.measures else 1  # it compares two
        found = [WIDTH * n_pickled]
        for one in (self.output, *self.sources.checkpoints):
            held_bytes = 2 * grams_bytes(one, self.measurement.moments)
            if self.loading.is_too_large(one):
                n_blocks = len({names.block(name) for name in one.tensors} - {None})
                held_bytes //= max(n_blocks, 1)
                found.append(blocks_bytes(one) + held_bytes + self._texts_bytes(one, n_tokens))
            else:
                model_bytes = WIDTH * _n_elements(one)
                with_grams = model_bytes + min(GRAM_BYTES, held_bytes)
                found.append(max(n_models * model_bytes, with_grams))
        return TORCH_BYTES + max(found)

    def _fitting_bytes(self) -> int:
        """Estimate fitting in sequence: a block of each model, a batch of texts, two moments."""
        checkpoints = (self.output, *self.sources.checkpoints)
        drawn = self.measurement.n_tokens
        n_tokens = 2 * sum(drawn[one] for one in self.measurement.calibrations)
        texts = max(self._texts_bytes(one, n_tokens) for one in checkpoints)
        largest = max((tensor.n_elements for tensor in _matrices(self.output)), default=0)
        moments = 2 * solving_bytes(self.output, len(checkpoints))
        blocks = sum(map(blocks_bytes, checkpoints))
        kept = min(KEPT_BYTES, n_tokens * max(map(_block_width, checkpoints)) * WIDTH)
        if self.measurement.moments and self.measurement.moments.fits_tables:
            largest = max((t.n_elements for t in self.output.tensors.values()), default=0)
        return TORCH_BYTES + blocks + texts + moments + kept + 4 * len(checkpoints) * largest

    def _texts_bytes(self, checkpoint: Checkpoint, n_tokens: int) -> int:
        """Bound the activations of one batch, and the hidden states that are not on the disk."""
        longest = max(
            min(c.samples * c.max_tokens, max(c.max_tokens, TOGETHER))
            for c in self.measurement.calibrations
        )
        inside = (t for name, t in checkpoint.tensors.items() if names.block(name) is not None)
        shapes = (tensor.shape for tensor in inside)
        widest = max((max(shape[-2:]) for shape in shapes if len(shape) > 1), default=0)
        held_bytes = min(states_bytes(checkpoint, n_tokens), HELD_BYTES)
        return WIDTH * ROWS * longest * widest + held_bytes


def grams_bytes(checkpoint: Checkpoint, moments: MomentSettings | None) -> int:
    """Return an upper bound for the second moments of one expert: some modules share them."""
    if moments is None:
        return 0
    shapes = [tensor.shape for tensor in _matrices(checkpoint)]
    of_matrices = sum(n_entries(shape[1], moments.widest) for shape in shapes if len(shape) == 2)
    stacks = [shape for shape in shapes if len(shape) == 3]
    of_stacks = sum(shape[0] * n_entries(max(shape[1:]), moments.widest) for shape in stacks)
    return WIDTH * (of_matrices + of_stacks)


def _block_width(checkpoint: Checkpoint) -> int:
    """The inputs and outputs of all matrices of the widest block together."""
    widths: Counter[tuple[str | None, int | None]] = Counter()
    for name, tensor in checkpoint.tensors.items():
        if (number := names.block(name)) is not None and len(tensor.shape) == 2:
            widths[names.stack(name), number] += sum(tensor.shape)
    return max(widths.values(), default=0)


def _n_elements(checkpoint: Checkpoint) -> int:
    return sum(tensor.n_elements for tensor in checkpoint.tensors.values())


def weight_bytes(tensors: Iterable[TensorHeader], dtype: str | None = None) -> int:
    """Return the bytes of tensors in a dtype; None: each in its own."""
    code = DTYPES[dtype] if dtype else None
    return sum(tensor.n_elements * WIDTHS[code or tensor.kept_dtype] for tensor in tensors)


def _matrices(output: Checkpoint) -> list[TensorHeader]:
    """Return the matrices of the blocks, and stacks of them; kernels of convolutions are none."""
    return [
        tensor
        for name, tensor in output.tensors.items()
        if (len(tensor.shape) == 2 or (len(tensor.shape) == 3 and 1 not in tensor.shape))
        and names.block(name) is not None
    ]


def solving_bytes(output: Checkpoint, n_sources: int, widest: int = WIDEST) -> int:
    """Return the bytes of the widest matrix's second moments while one of them is factored."""
    shapes = [tensor.shape for tensor in output.tensors.values()]
    width = max((shape[-1] for shape in shapes if len(shape) > 1), default=0)
    return 4 * (2 * n_sources + GRAM_COPIES) * min(width, widest) ** 2


@dataclass(frozen=True)
class DiskNeeds:
    """The bytes that a merge takes on the disk."""

    download_bytes: int
    made_bytes: int  # of all written files except downloads and hidden states
    statistics_bytes: int  # of second moments, or of matrices that are fitted with them
    states_bytes: int
    shard_bytes: int  # of the largest file of weights
