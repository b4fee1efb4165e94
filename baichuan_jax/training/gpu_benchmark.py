"""The whole training step of a large model on one GPU, beside transformers', and the head alone.

One program after the other, each with the card to itself. A model has as many layers as the card's
memory holds; what is compared is FLOP/s as `parallel.cost.flops_per_token` counts them, which
hardly depends on how many those are. Rows are whole documents; packed ones are timed besides.
"""

import dataclasses
import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator, Sequence

import jax

from baichuan_jax import interleave
from baichuan_jax.config import Config, ModelConfig, TrainingConfig, saved_names
from baichuan_jax.model.transformer import norm_head
from baichuan_jax.parallel import flags
from baichuan_jax.parallel.chips import GIB, GPU_MEMORY_FRACTION
from baichuan_jax.parallel.layout import Job
from baichuan_jax.training import benchmark, device_benchmark
from baichuan_jax.training.benchmark import Shape
from baichuan_jax.training.loss import next_token_loss

SIDES = ("ours", "transformers")
ROWS, LENGTH = 8, 4_096  # of a step: 32,768 tokens

# What of a layer is saved, and in how many micro-batches. The first fits the most layers; the
# second is what several devices, which divide the weights, have memory for with all of them.
LAYOUTS = {"full": 1, "matmuls": 2}

CHUNKS = tuple(TrainingConfig().loss_chunk // part for part in (1, 2, 4))  # of the head's tokens

# Bytes beside 16 of a parameter (weights, moments, gradients; 4 more where micro-batches add up)
# and what is saved of the layers. With them the compiler's total for H200 is up to 2 GiB below.
_WORKING = {1: 9 * GIB, 2: 6.5 * GIB}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what one side trained, and the median seconds of a step."""

    side: str
    shape: Shape
    seconds: float
    limit: float  # FLOP/s of its library's product
    peak: int  # bytes
    about: str
    packed: float | None = None  # seconds, too

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.shape.flops / self.seconds

    @property
    def share(self) -> float:
        return self.rate / self.limit

    def __str__(self) -> str:
        shape = self.shape
        packed = f"{1e3 * self.packed:,.0f}" if self.packed else "-"
        return (
            f"{self.side:13}{shape.num_layers:>6}{shape.micro_batches:>6}{shape.remat:>9}"
            f"{1e3 * self.seconds:9,.0f}{packed:>8}{shape.tokens / self.seconds:10,.0f}"
            f"{self.rate / 1e12:9.3g}{self.limit / 1e12:7.3g}{self.share:7.1%}"
            f"{self.peak / GIB:7.1f}  {self.about}"
        )


HEADING = (
    f"{'':13}{'layers':>6}{'micro':>6}{'saved':>9}{'ms':>9}{'packed':>8}{'tokens/s':>10}"
    f"{'TFLOP/s':>9}{'limit':>7}{'share':>7}{'GiB':>7}"
)


def report(
    recipes: dict[str, Config], names: Sequence[str], steps: int, sides: Sequence[str] = SIDES
) -> Iterator[str]:
    """Tables, line by line as they are measured.

    Args:
      recipes: '7B' and '13B'.
      names: '7b', and '13b_half' for half of the 13B's layers; later ones are compared with the
        first.
      steps: counted, of each program.
      sides: of SIDES; transformers' is left out where PyTorch sees no GPU.

    Raises:
      ValueError: there is no such model or side, or no GPU, or it holds not one layer.
    """
    models = {"7b": recipes["7B"].model}
    models["13b_half"] = dataclasses.replace(recipes["13B"].model, num_layers=20)
    for flag, given, known in (("shape", names, ["27m", *models]), ("sides", sides, SIDES)):
        if wrong := [name for name in given if name not in known]:
            raise ValueError(f"--{flag}={wrong[0]}: should be of {', '.join(known)}.")
    if "27m" in names:
        raise ValueError("--shape=27m is measured alone: it suits a CPU, the others a GPU.")
    jax.config.update("jax_platforms", "cpu")  # of this process, which leaves the card to others
    device = interleave.run({"": (device_side, {})}, [], list(_DEVICE), 0)[""]
    if device["platform"] != "gpu":
        raise ValueError(
            f"--shape={','.join(names)} is trained on a GPU, and this machine's device is"
            f" {device['about']}. --what=train_step without --shape suits it."
        )
    yield device["about"]
    yield (
        f"rows of {LENGTH:,} tokens, {ROWS} a step; limit: the library's own product of two large"
        " square matrices"
    )
    if "transformers" in sides and not device["torch"]:
        yield "transformers: left out, PyTorch or it is not installed or sees no GPU"
        sides = [side for side in sides if side != "transformers"]
    rows: dict[str, dict[str, Row]] = {}
    for name in names:
        model = models[name]
        yield f"\n{name}: D {model.hidden_size:,}, F {model.intermediate_size:,}, {model.position}"
        yield HEADING
        rows[name] = {}
        for side, shape, make, settings in programs(model, device["memory"], sides):
            try:
                row = measure(side, shape, make, settings, steps)
            except RuntimeError as error:
                yield f"{side}, {shape.num_layers} layers, saved: {shape.remat}: {error}"
                continue
            rows[name][f"{side} {shape.remat}" if side == "ours" else side] = row
            yield str(row)
        yield from _beside_transformers(model, rows[name])
        if "ours" in sides:
            settings = {"rows": ROWS, "length": LENGTH, "dtype": "bfloat16"}
            for chunk in CHUNKS:
                yield head(model, settings | {"chunk": chunk}, steps)
    yield from beside(rows)


def programs(
    model: ModelConfig, memory: float, sides: Sequence[str]
) -> Iterator[tuple[str, Shape, Callable, dict]]:
    """What is measured of a model: the side, its shape, and a worker's function and settings."""
    for remat in LAYOUTS:
        shape = fitted(model, remat, memory)
        if "ours" in sides:
            yield "ours", shape, alone, dataclasses.asdict(shape)
        if remat == "full" and "transformers" in sides:
            theirs = their_layout(shape, memory)
            more = {"weights": "bfloat16", "compiled": True, "checkpoint": theirs.remat == "full"}
            yield (
                *("transformers", theirs, benchmark.their_side),
                dataclasses.asdict(theirs) | more,
            )


def fitted(model: ModelConfig, remat: str, memory: float) -> Shape:
    """The model with the most layers whose step has room in so many bytes.

    Raises:
      ValueError: not one layer has.
    """
    for layers in range(model.num_layers, 0, -1):
        shape = _shape(model, layers, LAYOUTS[remat], remat)
        of_parameter = 16 if shape.micro_batches == 1 else 20
        job = Job.of(shape.config)
        saved = sum(map(job.activation, {"input", *saved_names(remat)}))
        saved *= layers * shape.tokens // shape.micro_batches
        needed = of_parameter * parameters(shape) + saved + _WORKING[shape.micro_batches]
        if needed <= memory:
            return shape
    raise ValueError(
        f"A GPU with {memory / GIB:.1f} GiB for training does not hold a layer of"
        f" {model.hidden_size:,} with embedding, head and AdamW: {needed / GIB:.1f} GiB."
    )


def their_layout(ours: Shape, memory: float) -> Shape:
    """The same for transformers with all in bfloat16: as few micro-batches as memory allows.

    Its `remat` is 'full' where layers have to be checkpointed, which is avoided.
    """
    D, F, V, L = ours.hidden_size, ours.intermediate_size, ours.vocab_size, ours.num_layers
    saved = {"none": 2 * L * (9 * D + 4 * F), "full": 2 * (L * D + 9 * D + 4 * F)}  # of a token
    for remat, bytes_ in saved.items():
        for parts in (2, 4, 8):
            tokens = ours.tokens // parts
            # Logits and their gradients in bfloat16 and float32.
            if 8 * parameters(ours) + tokens * (bytes_ + 12 * V) <= 0.9 * memory:
                return dataclasses.replace(ours, micro_batches=parts, remat=remat)
    return dataclasses.replace(ours, micro_batches=8, remat="full")


def parameters(shape: Shape) -> int:
    """Of matrices; norms' gains do not count."""
    D, F = shape.hidden_size, shape.intermediate_size
    return 2 * shape.model.padded_vocab_size * D + shape.num_layers * (4 * D * D + 3 * D * F)


def _shape(model: ModelConfig, layers: int, micro_batches: int, remat: str) -> Shape:
    sizes = ("hidden_size", "intermediate_size", "num_heads", "vocab_size", "position")
    return Shape(
        **{name: getattr(model, name) for name in sizes},
        num_layers=layers,
        rows=ROWS,
        sequence_length=LENGTH,
        micro_batches=micro_batches,
        dtype="bfloat16",
        remat=remat,
    )


def measure(side: str, shape: Shape, make: Callable, settings: dict, steps: int) -> Row:
    """Runs one side alone on the device.

    Raises:
      RuntimeError: its process ended, for want of memory for one.
    """
    calls = ["train", "packed", "product"] if side == "ours" else ["train", "product"]
    rounds = device_benchmark.WARM_UP + steps
    fields = ["about", "product_flops", "peak"]
    found = interleave.run({side: (make, settings)}, calls, fields, rounds)[side]
    counted = {call: found[call][device_benchmark.WARM_UP :] for call in calls}
    return Row(
        side,
        shape,
        statistics.median(counted["train"]),
        found["product_flops"] / statistics.median(counted["product"]),
        found["peak"],
        found["about"],
        statistics.median(counted["packed"]) if "packed" in calls else None,
    )


def _beside_transformers(model: ModelConfig, rows: dict[str, Row]) -> Iterator[str]:
    theirs = rows.get("transformers")
    if not theirs:
        return
    bias = ", ALiBi as a dense mask" if model.position == "alibi" else ""
    yield (
        "transformers: weights, gradients and moments in bfloat16, torch.compile, SDPA, fused"
        f" AdamW{bias}; no NormHead, no max-z. Ours has weights and moments in float32."
    )
    times = [
        f"{name.removeprefix('ours ')} {row.rate / theirs.rate:.2f}×"
        for name, row in rows.items()
        if row.side == "ours"
    ]
    if times:
        yield f"ours beside it, as fast per FLOP: {', '.join(times)}"


def beside(rows: dict[str, dict[str, Row]]) -> Iterator[str]:
    """Later models beside the first, per FLOP and by the share of the limit."""
    (first, base), *others = rows.items()
    for name, mine in others:
        told = [
            f"{layout} {mine[layout].share / base[layout].share - 1:+.1%}"
            for layout in mine
            if layout in base
        ]
        yield f"\n{name} beside {first}, share of the limit: {', '.join(told) or 'not known'}"


def alone(**shape) -> benchmark.Side:
    """`benchmark.our_side` in a process that has the GPU to itself."""
    # More than a run takes, and at once: pieces of memory would not add up to what a step needs.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{GPU_MEMORY_FRACTION + 0.03:.2f}")
    flags.prepare_process()
    return benchmark.our_side(**shape)


@dataclasses.dataclass(frozen=True)
class _Device:
    platform: str
    about: str
    memory: float  # bytes that training may use
    torch: bool  # whether the other side can have it


_DEVICE = tuple(field.name for field in dataclasses.fields(_Device))


def device_side() -> _Device:
    """What there is."""
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(GPU_MEMORY_FRACTION)
    device = jax.devices()[0]
    installed = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    if installed:
        import torch

        installed = torch.cuda.is_available()
    return _Device(
        device.platform,
        device_benchmark.about(),
        (device.memory_stats() or {}).get("bytes_limit", 0),
        bool(installed),
    )


@dataclasses.dataclass(frozen=True)
class _Head:
    loss: Callable[[], float]  # seconds, forward and backward
    product: Callable[[], float]
    product_flops: int
    temporary: int  # bytes beside arguments and results


def head_side(model: dict, rows: int, length: int, dtype: str, chunk: int) -> _Head:
    """Cross-entropy with NormHead and max-z, and its gradients by hidden states and head.

    Args:
      model: fields of `ModelConfig`.
    """
    model = ModelConfig(**model)
    keys = jax.random.split(jax.random.key(0), 2)
    hidden_BTD = jax.random.normal(keys[0], (rows, length, model.hidden_size), dtype)
    head_VD = jax.random.normal(keys[1], (model.padded_vocab_size, model.hidden_size))
    tokens_BT = jax.random.randint(keys[1], (rows, length), 0, model.vocab_size)
    arguments = hidden_BTD, head_VD, tokens_BT, tokens_BT >= 0
    run = jax.jit(jax.value_and_grad(functools.partial(head_loss, model, chunk), (0, 1)))
    program = run.lower(*arguments).compile()
    multiply, flops = device_benchmark.product(dtype)
    return _Head(
        device_benchmark.timed(lambda: program(*arguments)),
        device_benchmark.timed(multiply),
        flops,
        program.memory_analysis().temp_size_in_bytes,
    )


def head_loss(model: ModelConfig, chunk: int, hidden_BTD, head_VD, targets_BT, mask_BT):
    """Sum of the loss from hidden states in the compute dtype and the raw float32 head."""
    return next_token_loss(
        hidden_BTD,
        norm_head(head_VD).astype(hidden_BTD.dtype),
        targets_BT,
        mask_BT,
        vocab_size=model.vocab_size,
        max_z_weight=TrainingConfig().max_z_weight,
        chunk=chunk,
    )[0]


def head(model: ModelConfig, settings: dict, steps: int) -> str:
    """A line about the head of a model alone on the device; arguments of `head_side`."""
    where = f"head, {settings['chunk']:,} tokens at a time"
    warm_up = device_benchmark.WARM_UP
    try:
        found = interleave.run(
            {"": (head_side, {"model": dataclasses.asdict(model)} | settings)},
            ["loss", "product"],
            ["product_flops", "temporary"],
            warm_up + steps,
        )[""]
    except RuntimeError as error:
        return f"{where}: {error}"
    seconds, product = (statistics.median(found[call][warm_up:]) for call in ("loss", "product"))
    tokens = settings["rows"] * settings["length"]
    flops = 3 * 2 * tokens * model.padded_vocab_size * model.hidden_size
    ideal = flops * product / found["product_flops"]
    return (
        f"{where}: loss and gradients of {tokens:,} in {1e3 * seconds:,.1f} ms,"
        f" {seconds / ideal:.2f} × three products at the limit; temporaries"
        f" {found['temporary'] / GIB:.2f} GiB"
    )
