"""Decoding timed beside Hugging Face transformers' `generate`, in turn (see `interleave`).

Two loads: one request alone, and many requests of mixed lengths at one time. There the engine
lets each go when it has its tokens, and transformers pads all to one batch and goes on to the
longest; only tokens that were asked for count.

Decoding one request reads every weight and all of its keys and values for each token, so its
limit is the memory's bandwidth, measured in the same run by a product of a large matrix with a
vector.
"""

import dataclasses
import importlib.util
import os
import statistics
import time
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_jax import interleave
from baichuan_jax.config import MeshConfig, ModelConfig
from baichuan_jax.inference import quantize, weights
from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.request import Request
from baichuan_jax.model import cpu
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.training import benchmark as training_benchmark

WARM_UP = 1  # rounds that are not counted

SHAPES = {
    "27m": ModelConfig(8_192, 512, 1_376, 6, 8),  # of the training benchmark
    "7b": ModelConfig(),
    "13b": ModelConfig(
        hidden_size=5_120,
        intermediate_size=13_696,
        num_layers=40,
        num_heads=40,
        position="alibi",
    ),
}


@dataclasses.dataclass(frozen=True)
class Load:
    """What both sides decode: greedy, random weights, no end of text."""

    shape: str = "27m"
    dtype: str = "float32"
    kind: str = ""  # of quantisation; ours only
    cache_dtype: str = ""
    prompt_tokens: int = 32  # of the request that runs alone
    new_tokens: int = 128
    requests: int = 16  # of those that run together, with prompts of 8 to 127 tokens

    @property
    def model(self) -> ModelConfig:
        return SHAPES[self.shape]

    @property
    def alone(self) -> list[int]:
        return np.random.default_rng(0).integers(3, 8_000, self.prompt_tokens).tolist()

    @property
    def together(self) -> list[tuple[list[int], int]]:
        """Prompts and numbers of new tokens, an eighth of `new_tokens` to all of them."""
        rng = np.random.default_rng(1)
        least = max(1, self.new_tokens // 8)
        return [
            (rng.integers(3, 8_000, rng.integers(8, 128)).tolist(), int(n))
            for n in rng.integers(least, self.new_tokens + 1, self.requests)
        ]


@dataclasses.dataclass(frozen=True)
class Side:
    """What a worker runs; the calls return their seconds when all work is done."""

    about: str  # versions, device
    alone: Callable[[], float]
    together: Callable[[], float]
    read: Callable[[], float]
    bytes_read: int  # by `read`
    bytes_per_token: int  # of weights and, half-way, of keys and values


def our_side(**load) -> Side:
    """The engine; arguments as `Load`."""
    load = Load(**load)
    cpu.keep_memory()
    config, dtype = load.model, jnp.dtype(load.dtype)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = weights.serve(config, random_weights(config, dtype), dtype, load.kind)
    cache_dtype = jnp.dtype(load.cache_dtype) if load.cache_dtype else None
    options = {"eos_id": -1, "max_length": 1_024, "mesh": mesh, "cache_dtype": cache_dtype}
    one = Engine(model, config, slots=1, **options)
    many = Engine(model, config, slots=load.requests, **options)
    device = jax.default_backend()
    rows = 1 << (14 if device == "cpu" else 17)
    matrix, vector = jnp.ones((rows, 4_096)), jnp.ones(4_096)
    product = jax.jit(jnp.dot)

    def timed(engine: Engine, requests: list[Request]) -> float:
        engine.forget()
        began = time.perf_counter()
        engine.generate(requests)
        return time.perf_counter() - began

    def read() -> float:
        began = time.perf_counter()
        product(matrix, vector).block_until_ready()
        return time.perf_counter() - began

    parts = quantize.memory(model)
    size = (cache_dtype or dtype).itemsize
    length = load.prompt_tokens + load.new_tokens // 2
    keys_values = 2 * config.num_layers * config.hidden_size * length * size
    return Side(
        f"jax {jax.__version__}, {device}",
        lambda: timed(one, [Request(load.alone, load.new_tokens)]),
        lambda: timed(many, [Request(*each) for each in load.together]),
        read,
        matrix.nbytes,
        parts["total"] - parts["embedding"] + keys_values,
    )


def random_weights(config: ModelConfig, dtype: jnp.dtype) -> weights.ReadRows:
    """Weights that never were on a disk, for `weights.serve`."""
    shapes = {name: x.shape for name, x in quantize.by_name(quantize.abstract(config)).items()}

    def read(name: str, start: int, stop: int) -> jax.Array:
        layered = name.startswith("layers.")
        shape = shapes[f"layers.0.{name.removeprefix('layers.')}" if layered else name]
        if name.endswith("gain"):
            return jnp.ones((stop - start, *shape) if layered else shape, dtype)
        key = jax.random.fold_in(jax.random.key(start), zlib.crc32(name.encode()))
        shape = (stop - start, *shape) if layered else shape
        return config.initializer_range * jax.random.normal(key, shape, dtype)

    return read


def their_side(**load) -> Side:
    """`generate` of transformers' LlamaForCausalLM, together as one batch padded on the left."""
    import torch
    import transformers

    load = Load(**load)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    model = training_benchmark.llama(load.model).to(device, getattr(torch, load.dtype)).eval()

    def run(prompts: list[list[int]], new_tokens: int) -> float:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    matrix = torch.ones(1 << (14 if device == "cpu" else 17), 4_096, device=device)
    vector = torch.ones(4_096, device=device)

    def read() -> float:
        began = time.perf_counter()
        torch.mv(matrix, vector)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    size = getattr(torch, load.dtype).itemsize
    config = load.model
    used = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    length = load.prompt_tokens + load.new_tokens // 2
    keys_values = 2 * config.num_layers * config.hidden_size * length
    return Side(
        f"transformers {transformers.__version__}, torch {torch.__version__}, {device}",
        lambda: run([load.alone], load.new_tokens),
        lambda: run([p for p, _ in load.together], max(n for _, n in load.together)),
        read,
        matrix.nbytes,
        (used + keys_values) * size,
    )


_SIDES = {"ours": our_side, "transformers": their_side}


def compare(load: Load, rounds: int, sides: list[str] | None = None) -> dict[str, dict]:
    """Times the sides in turn.

    Args:
      sides: of 'ours' and 'transformers'; by default both where torch and transformers are
        installed and the load is one that both know (RoPE, not quantised).

    Returns:
      By side: seconds of the counted rounds for `alone` and `together`, `about`,
      `bytes_per_token` and `bandwidth`, the bytes per second of the fastest `read`.
    """
    if sides is None:
        installed = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
        known = not load.kind and not load.cache_dtype and load.model.position == "rope"
        sides = list(_SIDES) if installed and known else ["ours"]
    results = interleave.run(
        {side: (_SIDES[side], dataclasses.asdict(load)) for side in sides},
        calls=["alone", "together", "read"],
        about=["about", "bytes_read", "bytes_per_token"],
        rounds=WARM_UP + rounds,
    )
    return {
        side: {
            "alone": result["alone"][WARM_UP:],
            "together": result["together"][WARM_UP:],
            "about": result["about"],
            "bytes_per_token": result["bytes_per_token"],
            "bandwidth": result["bytes_read"] / min(result["read"]),
        }
        for side, result in results.items()
    }


def table(load: Load, results: dict[str, dict]) -> str:
    """The results as text, with the ratios where there are two sides."""
    total = sum(n for _, n in load.together)
    lines = [
        f"{load.shape}, {load.kind or load.dtype}: alone {load.prompt_tokens} +"
        f" {load.new_tokens} tokens; together {load.requests} requests, {total:,} new tokens",
        f"{'':14}{'alone tok/s':>12}{'median':>8}{'GB/s':>7}{'limit':>7}{'share':>7}"
        f"{'together tok/s':>16}{'median':>8}",
    ]
    for side, result in results.items():
        alone = [load.new_tokens / seconds for seconds in result["alone"]]
        together = [total / seconds for seconds in result["together"]]
        rate, limit = max(alone) * result["bytes_per_token"], result["bandwidth"]
        lines.append(
            f"{side:14}{max(alone):12,.1f}{statistics.median(alone):8,.1f}{rate / 1e9:7,.0f}"
            f"{limit / 1e9:7,.0f}{rate / limit:7.0%}{max(together):16,.1f}"
            f"{statistics.median(together):8,.1f}  {result['about']}"
        )
    lines.append("GB/s: weights, keys and values read; limit: a large matrix times a vector")
    if len(results) == 2:
        ours, theirs = results.values()
        for what in ("alone", "together"):
            fastest = min(theirs[what]) / min(ours[what])
            median = statistics.median(theirs[what]) / statistics.median(ours[what])
            lines.append(f"{what}: {fastest:.2f}× as fast by the minima, {median:.2f}× by medians")
    elif load.model.position == "rope" and not load.kind and not load.cache_dtype:
        lines.append("For the comparison: pip install -e '.[oracle]' (torch and transformers).")
    return "\n".join(lines)
