"""Training steps timed beside Hugging Face transformers' Llama, step by step in turn.

The ratios of minima and of medians are what counts (see `interleave`). Both have the same
shapes, random tokens, AdamW, clipping, and float32 weights; 'bfloat16' is the compute dtype
here and autocast there.
"""

import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax import interleave
from baichuan_jax.config import BATCH_AXES, Config, MeshConfig, ModelConfig
from baichuan_jax.model import cpu
from baichuan_jax.parallel.cost import flops_per_token
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training import optimizer
from baichuan_jax.training import step as step_module

WARM_UP = 3  # steps that are not counted


def _product_size(device: str) -> int:
    """Rows and columns of the product that shows a library's own limit."""
    return 1_024 if device == "cpu" else 8_192  # a small one is over before a GPU is busy


@dataclasses.dataclass(frozen=True)
class Shape:
    """What both sides train; the defaults have 27 million parameters."""

    hidden_size: int = 512
    intermediate_size: int = 1_376
    num_layers: int = 6
    num_heads: int = 8
    vocab_size: int = 8_192
    rows: int = 4
    sequence_length: int = 256
    dtype: str = "float32"

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_layers,
            self.num_heads,
        )

    @property
    def flops(self) -> float:
        """Of one step, by the causal convention."""
        per_token = flops_per_token(self.model, self.sequence_length)
        return per_token * self.rows * self.sequence_length


@dataclasses.dataclass(frozen=True)
class Side:
    """What a worker runs; the two calls return their seconds when all work is done."""

    about: str  # versions, device
    train: Callable[[], float]
    product: Callable[[], float]
    product_flops: float


def our_side(**shape) -> Side:
    """This project's training step as `training.loop` runs it; arguments as `Shape`."""
    shape = Shape(**shape)
    cpu.keep_memory()
    config = Config(model=shape.model)
    config.training.compute_dtype, config.training.remat = shape.dtype, "none"
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.adamw(config.optimizer, config.training.num_steps)
    model = step_module.create_model(config.model, 0, mesh)
    state = step_module.create_state(model, tx, mesh)
    loss = step_module.pretraining_loss(config.model, config.training)
    options = {"loss": loss, "tx": tx, "clip_norm": config.optimizer.clip_norm}
    run = jax.jit(functools.partial(step_module.train_step, **options), donate_argnums=0)
    T = shape.sequence_length
    text = np.random.default_rng(0).integers(0, shape.vocab_size, (shape.rows, T + 1), np.int32)
    ones = np.ones((shape.rows, T), np.int32)
    batch = {
        "tokens_BT": text[:, :T],
        "targets_BT": text[:, 1:],
        "segments_BT": ones,
        "positions_BT": ones * np.arange(T, dtype=np.int32),
        "mask_BT": ones > 0,
    }
    batch = jax.device_put(batch, NamedSharding(mesh, P(BATCH_AXES, None)))
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    device = jax.default_backend()
    size = _product_size(device)
    square = jnp.ones((size, size), shape.dtype)

    def train() -> float:
        nonlocal state
        number = int(state.step) + 1
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            state, metrics = run(state, number, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    def product() -> float:
        began = time.perf_counter()
        multiply(square, square).block_until_ready()
        return time.perf_counter() - began

    about = f"jax {jax.__version__}, {device}"
    return Side(about, train, product, 2 * size**3)


def llama(shape: Shape):
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


def their_side(**shape) -> Side:
    """The same of transformers' LlamaForCausalLM with fused AdamW in PyTorch."""
    import torch
    import transformers

    shape = Shape(**shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it on a GPU
    dtype = getattr(torch, shape.dtype)
    model = llama(shape).to(device)
    adamw = torch.optim.AdamW(
        model.parameters(), 2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, shape.vocab_size, (shape.rows, shape.sequence_length), device=device)
    size = _product_size(device)
    square = torch.ones(size, size, dtype=dtype, device=device)

    def timed(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def train() -> None:
        adamw.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()

    return Side(
        f"transformers {transformers.__version__}, torch {torch.__version__}, {device}",
        lambda: timed(train),
        lambda: timed(lambda: torch.mm(square, square)),
        2 * size**3,
    )


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
        rounds=WARM_UP + steps,
    )
    return {
        side: {
            "about": result["about"],
            "train": result["train"][WARM_UP:],
            "limit": result["product_flops"] / min(result["product"]),
        }
        for side, result in results.items()
    }


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
