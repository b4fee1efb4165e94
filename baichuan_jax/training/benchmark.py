"""Training steps timed beside Hugging Face transformers' Llama, step by step in turn.

The ratios of minima and of medians are what counts (see `interleave`). Both have the same
shapes, random tokens, AdamW, clipping, and float32 weights; 'bfloat16' is the compute dtype
here and autocast there.
"""

import dataclasses
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax import interleave
from baichuan_jax.config import BATCH_AXES, Config, MeshConfig, ModelConfig
from baichuan_jax.model import cpu
from baichuan_jax.model.position import alibi_slopes
from baichuan_jax.parallel import flags
from baichuan_jax.parallel.cost import flops_per_token
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training import device_benchmark, optimizer
from baichuan_jax.training import step as step_module


@dataclasses.dataclass(frozen=True)
class Shape:
    """What both sides train; the defaults have 27 million parameters.

    Attributes:
      rows: of a step, in so many micro-batches.
      remat: ours only; see config.TrainingConfig.
    """

    hidden_size: int = 512
    intermediate_size: int = 1_376
    num_layers: int = 6
    num_heads: int = 8
    vocab_size: int = 8_192
    rows: int = 4
    sequence_length: int = 256
    micro_batches: int = 1
    dtype: str = "float32"
    position: str = "rope"
    remat: str = "none"

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_layers,
            self.num_heads,
            self.position,
        )

    @property
    def config(self) -> Config:
        """Of our side's run. Nothing is divided, so nothing is held twice."""
        config = Config(self.model)
        config.data.sequence_length = self.sequence_length
        config.training.batch_size, config.training.micro_batches = self.rows, self.micro_batches
        config.training.compute_dtype, config.training.remat = self.dtype, self.remat
        config.zero.full_layers = self.num_layers
        config.zero.embedding = config.zero.head = "full"
        return config

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.rows * self.sequence_length

    @property
    def flops(self) -> float:
        """Of one step, by the causal convention."""
        per_token = flops_per_token(self.model, self.sequence_length)
        return per_token * self.tokens


@dataclasses.dataclass(frozen=True)
class Side:
    """What a worker runs; `train`, `packed` and `product` return their seconds.

    Attributes:
      about: versions, device.
      packed: the step on rows of several documents; ours only.
      product: of two large square matrices, with `product_flops`.
      peak: bytes of the device's memory at the worst moment so far; 0 where it is not known.
    """

    about: str
    train: Callable[[], float]
    product: Callable[[], float]
    product_flops: float
    packed: Callable[[], float] | None = None
    peak: Callable[[], int] = lambda: 0


def our_side(**shape) -> Side:
    """This project's training step as `training.loop` runs it; arguments as `Shape`."""
    shape = Shape(**shape)
    cpu.keep_memory()
    config, device = shape.config, jax.devices()[0]
    mesh = make_mesh(MeshConfig(), [device])
    tx = optimizer.adamw(config.optimizer, config.training.num_steps)
    loss = step_module.pretraining_loss(config.model, config.training)
    run = step_module.compiled_step(config, loss, tx, flags.for_training(mesh).options)
    model = step_module.create_model(config.model, 0, mesh)
    state = step_module.create_state(model, tx, mesh)
    del model  # the step gives its memory to the next state
    B, T = shape.rows, shape.sequence_length
    text = np.random.default_rng(0).integers(0, shape.vocab_size, (B, T + 1), np.int32)
    ones = np.ones((B, T), np.int32)
    rows = NamedSharding(mesh, P(BATCH_AXES, None))

    def batch(positions_BT: np.ndarray, segments_BT: np.ndarray) -> dict[str, jax.Array]:
        arrays = {"tokens_BT": text[:, :T], "targets_BT": text[:, 1:], "mask_BT": ones > 0}
        where = {"positions_BT": positions_BT, "segments_BT": segments_BT}
        return jax.device_put(arrays | where, rows)

    whole = batch(ones * np.arange(T, dtype=np.int32), ones)
    packed = batch(*device_benchmark.packed_rows(B, T))
    number = 0

    def step(batch: dict[str, jax.Array]) -> float:
        nonlocal state, number
        number += 1
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            state, metrics = run(state, number, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    multiply, flops = device_benchmark.product(shape.dtype)
    return Side(
        about=f"jax {jax.__version__}, {device.platform}",
        train=lambda: step(whole),
        packed=lambda: step(packed),
        product=device_benchmark.timed(multiply),
        product_flops=flops,
        peak=lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
    )


def llama(shape: Shape | ModelConfig):
    """transformers' LlamaForCausalLM of the shape, with random float32 weights."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            max_position_embeddings=4_096,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def their_side(
    *, weights: str = "float32", compiled: bool = False, checkpoint: bool = False, **shape
) -> Side:
    """The same of transformers' LlamaForCausalLM with fused AdamW in PyTorch.

    Args:
      weights: dtype of weights, gradients and moments.
      compiled: by `torch.compile`.
      checkpoint: layers are computed again in the backward pass.
      **shape: as `Shape`. ALiBi is a dense mask for PyTorch's attention, as in the official code,
        and nothing is rotated then.
    """
    import torch
    import transformers

    shape = Shape(**shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it on a GPU
    dtype = getattr(torch, shape.dtype)
    with torch.device(device):
        model = llama(shape).to(getattr(torch, weights))
    model.train()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adamw = torch.optim.AdamW(
        model.parameters(), 2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    run = torch.compile(model) if compiled else model
    extra = {"use_cache": False}
    if shape.position == "alibi":
        transformers.models.llama.modeling_llama.apply_rotary_pos_emb = lambda q, k, *_: (q, k)
        bias_HTT = torch.from_numpy(alibi_mask(shape.num_heads, shape.sequence_length))
        extra["attention_mask"] = bias_HTT[None].to(device, dtype)
    tokens = torch.randint(0, shape.vocab_size, (shape.rows, shape.sequence_length), device=device)
    size = device_benchmark.product_size(device)
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)

    def wait(_=None) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def train() -> float:
        began = time.perf_counter()
        adamw.zero_grad(set_to_none=True)
        for part in tokens.chunk(shape.micro_batches):
            with torch.autocast(device, dtype, enabled=weights != shape.dtype):
                loss = run(input_ids=part, labels=part, **extra).loss
            (loss / shape.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        wait()
        return time.perf_counter() - began

    return Side(
        about=f"transformers {transformers.__version__}, torch {torch.__version__}, {device}",
        train=train,
        product=device_benchmark.timed(lambda: torch.mm(a, b), wait),
        product_flops=2 * size**3,
        peak=lambda: torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    )


def alibi_mask(num_heads: int, length: int) -> np.ndarray:
    """Bias of causal attention with ALiBi, float32 [H, T, T], -inf above the diagonal."""
    index = np.arange(length, dtype=np.float32)
    distance_TT = index - index[:, None]
    bias_HTT = alibi_slopes(num_heads)[:, None, None] * distance_TT
    return np.where(distance_TT > 0, -np.inf, bias_HTT).astype(np.float32)


_SIDES = {"ours": our_side, "transformers": their_side}


def compare(shape: Shape, steps: int, sides: list[str] | None = None) -> dict[str, dict]:
    """Times the sides in turn.

    Args:
      sides: of 'ours' and 'transformers'; by default both where torch and transformers are
        installed.

    Returns:
      By side: `about`, its versions and device; `train`, the seconds of `steps` steps; and
      `limit`, the FLOP/s of the fastest product of two large square matrices.
    """
    if sides is None:
        installed = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
        sides = list(_SIDES) if installed else ["ours"]
    results = interleave.run(
        {side: (_SIDES[side], dataclasses.asdict(shape)) for side in sides},
        calls=["train", "product"],
        about=["about", "product_flops"],
        rounds=device_benchmark.WARM_UP + steps,
    )
    return {
        side: {
            "about": result["about"],
            "train": result["train"][device_benchmark.WARM_UP :],
            "limit": result["product_flops"] / min(result["product"]),
        }
        for side, result in results.items()
    }


def report(sizes: dict[str, int], dtypes: list[str], steps: int) -> Iterator[str]:
    """A table for each dtype; `sizes` are the other fields of `Shape`."""
    for dtype in dtypes:
        shape = Shape(**sizes, dtype=dtype)
        yield table(shape, compare(shape, steps))


def table(shape: Shape, results: dict[str, dict]) -> str:
    """The results as text, with the ratios where there are two sides."""
    lines = [
        f"{shape.dtype}: hidden {shape.hidden_size}, layers {shape.num_layers}, vocabulary"
        f" {shape.vocab_size:,}, {shape.rows} × {shape.sequence_length} tokens,"
        f" {shape.flops / 1e9:,.0f} GFLOP a step",
        f"{'':14}{'min s':>9}{'median s':>10}{'GFLOP/s':>9}{'limit':>9}{'share':>7}",
    ]
    for side, result in results.items():
        least, limit = min(result["train"]), result["limit"]
        rate = shape.flops / least
        lines.append(
            f"{side:14}{least:9.4f}{statistics.median(result['train']):10.4f}{rate / 1e9:9,.0f}"
            f"{limit / 1e9:9,.0f}{rate / limit:7.0%}  {result['about']}"
        )
    lines.append("limit: the library's own product of two large square matrices")
    if len(results) == 2:
        ours, theirs = (result["train"] for result in results.values())
        lines.append(
            f"ours is {min(theirs) / min(ours):.2f}× as fast by the minima,"
            f" {statistics.median(theirs) / statistics.median(ours):.2f}× by the medians"
        )
    else:
        lines.append("For the comparison: pip install -e '.[oracle]' (torch and transformers).")
    return "\n".join(lines)
