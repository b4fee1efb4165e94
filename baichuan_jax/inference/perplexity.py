"""Bits per byte of runs on text; what quantisation costs, in memory and perplexity.

Legend: B rows, T tokens, C of them at a time, D model, V vocabulary.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from baichuan_jax.config import Config, DataConfig, ModelConfig, from_json
from baichuan_jax.data import packing, shards
from baichuan_jax.data.stream import Stream
from baichuan_jax.inference import quantize
from baichuan_jax.model.transformer import Transformer, norm_head
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training.checkpoint import restore_model

_NAMES = {"": "bfloat16", "int8": "int8", "nf4": "nf4", "int4": "int4"}
_LOGITS = 1 << 26  # numbers that exist at one time: 256 MB in float32

# The released models, and what the official repository says they take on a GPU, in GiB.
RELEASED = {
    "Baichuan2-7B": (ModelConfig(), {"": 14.0, "int8": 8.0, "nf4": 5.1}),
    "Baichuan2-13B": (
        ModelConfig(
            hidden_size=5_120,
            intermediate_size=13_696,
            num_layers=40,
            num_heads=40,
            position="alibi",
        ),
        {"": 25.9, "int8": 14.2, "nf4": 8.6},
    ),
}


def losses(
    model: Transformer, batches: Iterable[dict[str, np.ndarray]], dtype: jnp.dtype = jnp.bfloat16
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of a model on packed rows; its layers are a stack.

    Args:
      batches: as `data.stream.Stream.rows` gives them.
      dtype: of the computation.

    Returns:
      Nats of each row and the number of tokens that were predicted in it, float64.
    """
    nats, tokens = [], []
    for batch in batches:
        nats.append(np.asarray(token_losses(model, batch, dtype), np.float64).sum(1))
        tokens.append(batch["mask_BT"].sum(1))
    return np.concatenate(nats), np.concatenate(tokens, dtype=np.float64)


@functools.partial(jax.jit, static_argnums=2)
def token_losses(
    model: Transformer, batch: dict[str, np.ndarray], dtype: jnp.dtype = jnp.bfloat16
) -> jax.Array:
    """Nats of each target [B, T] in float32, 0 where the mask is false; see `losses`."""
    places = (batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT"))
    hidden_BTD = model(*places, dtype=dtype)
    B, T, _ = hidden_BTD.shape
    size = max(1, min(T, _LOGITS // (B * model.head.shape[0])))

    def one(inputs):
        hidden_BCD, targets_BC, mask_BC = inputs
        logp_BCV = jax.nn.log_softmax(model.logits(hidden_BCD))
        # Not take_along_axis, which a mesh of explicit axes refuses.
        is_target_BCV = jnp.arange(logp_BCV.shape[-1]) == targets_BC[..., None]
        picked_BC = jnp.sum(jnp.where(is_target_BCV, logp_BCV, 0.0), axis=-1)
        return jnp.where(mask_BC, -picked_BC, 0.0)

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    inputs = (hidden_BTD, batch["targets_BT"], batch["mask_BT"])
    nats_NBC = jax.lax.map(one, jax.tree.map(chunks, inputs))
    return jnp.moveaxis(nats_NBC, 0, 1).reshape(B, -1)[:, :T]


def benchmark(checkpoint: epath.PathLike, text: str = "", max_tokens: int = 0) -> Iterator[str]:
    """Lines of the report: memory and perplexity of each kind of quantisation.

    Weights are those of the newest checkpoint, cast to bfloat16, the head normalised before; the
    computation is in bfloat16, too. Uses one device.

    Args:
      checkpoint: a run's folder.
      text: sources of text, as `data.sources` reads them; '' for the run's held-out rows.
      max_tokens: about how many to read at most; 0: all.

    Raises:
      ValueError: no such run, or no text: says what would be right.
    """
    workdir = _run_folder(checkpoint)
    config = from_json(workdir / "config.json")
    if kind := quantize.is_quantized(workdir):
        raise ValueError(
            f"--checkpoint={checkpoint} is quantised already, as {kind}: name the run with the"
            " full-precision weights."
        )
    with tempfile.TemporaryDirectory() as scratch:
        stream, where = _open_text(config, workdir, text, scratch)
        T = config.data.sequence_length
        most = -(-max_tokens // T) if max_tokens else stream.num_rows
        full, full_bytes = np.zeros(1), 0
        for kind in _NAMES:
            model = _restore(config.model, workdir)
            if kind:
                model = quantize.quantize(model, kind)
            nats, tokens = losses(model, _batches(stream, T, most))
            sizes = quantize.memory(model)
            if not kind:
                full, full_bytes = nats, sizes["total"]
                count = sum(x.size for x in jax.tree.leaves(model))
                yield f"{workdir}: {count:,} parameters; {int(tokens.sum()):,} tokens of {where}"
                yield (
                    f"{'':9}{'linears':>10}{'embedding':>11}{'head':>9}{'total MiB':>11}"
                    f"{'share':>7}{'nats/token':>12}{'perplexity':>12}{'change':>9} ± its error"
                )
            mib = {name: size / 2**20 for name, size in sizes.items()}
            loss, change = nats.sum() / tokens.sum(), (nats - full).sum() / tokens.sum()
            # Rows are independent; what is uncertain is the mean of their differences.
            rest = nats - full - change * tokens
            error = np.sqrt(np.sum(rest**2)) / tokens.sum()
            yield (
                f"{_NAMES[kind]:9}{mib['linears']:10.2f}{mib['embedding']:11.2f}{mib['head']:9.2f}"
                f"{mib['total']:11.2f}{sizes['total'] / full_bytes:7.0%}{loss:12.4f}"
                f"{np.exp(loss):12.3f}{np.expm1(change):+9.2%} ± {error:.2%}"
            )
            del model


def bits_per_byte(checkpoint: epath.PathLike, text: str) -> dict[str, tuple[float, int]]:
    """What a run's newest weights need for text that they have not seen, in float32.

    Bytes are those of the tokens that are predicted, so runs with other tokenizers compare.

    Args:
      checkpoint: the run's folder.
      text: sources, as `data.sources` reads them.

    Returns:
      By set (a source in a language): bits per byte, and the bytes.

    Raises:
      ValueError: no such run, or a source that cannot be read.
    """
    workdir, config, tokenizer = open_run(checkpoint)
    model = restore_float32(workdir, config.model)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        stream_of, names = _packed(text, tokenizer, config.data.sequence_length, scratch)
        for name in names:
            rows = list(_batches(stream_of(name), config.data.sequence_length))
            nats, _ = losses(model, rows, jnp.float32)
            predicted = np.concatenate([batch["targets_BT"][batch["mask_BT"]] for batch in rows])
            size = int(tokenizer.token_bytes[predicted].sum())
            found[name] = float(nats.sum() / np.log(2) / size), size
    return found


def released_memory() -> Iterator[str]:
    """Lines of a table: the weights of the released models in GiB, from their shapes."""
    yield f"{'GiB':16}{'':10}{'linears':>9}{'embedding':>11}{'head':>7}{'total':>8}{'official':>10}"
    for name, (config, official) in RELEASED.items():
        for kind in _NAMES:
            sizes = quantize.memory(quantize.abstract(config, kind))
            gib = {part: size / 2**30 for part, size in sizes.items()}
            beside = f"{official[kind]:10.1f}" if kind in official else ""
            yield (
                f"{name:16}{_NAMES[kind]:10}{gib['linears']:9.2f}{gib['embedding']:11.2f}"
                f"{gib['head']:7.2f}{gib['total']:8.2f}{beside}"
            )
    yield (
        "Official: the table of the Baichuan 2 repository; its 4 bits are NF4 whose scales are"
        " quantised again (0.37 bits less for each weight), here scales are float32."
    )


def open_run(checkpoint: epath.PathLike) -> tuple[epath.Path, Config, Tokenizer]:
    """A run's folder, its config and its tokenizer.

    Raises:
      ValueError: it is no run's folder; says how to make one.
    """
    workdir = _run_folder(checkpoint)
    config = from_json(workdir / "config.json")
    file = workdir / "tokenizer.model"
    return workdir, config, Tokenizer(file if file.exists() else config.data.tokenizer)


def restore_float32(workdir: epath.Path, config: ModelConfig) -> Transformer:
    """The newest weights of a run as they are stored, with a stack of layers."""
    template = jax.eval_shape(lambda key: Transformer(key, config), jax.random.key(0))
    return restore_model(workdir / "checkpoints", template)


def _restore(config: ModelConfig, workdir: epath.Path) -> Transformer:
    """The model as it is served, with a stack of layers."""

    def cast(model: Transformer) -> Transformer:
        if model.norm_head:
            model.head = model.head.replace(norm_head(model.head[...]))
            model.norm_head = False
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)

    return jax.jit(cast, donate_argnums=0)(restore_float32(workdir, config))


def _run_folder(checkpoint: epath.PathLike) -> epath.Path:
    workdir = epath.Path(checkpoint).expanduser().absolute()
    if not (workdir / "config.json").exists():
        raise ValueError(
            f"{checkpoint} is no run's folder. Name one, or make one in a few minutes with"
            " `python -m experiments.quickstart`."
        )
    return workdir


def _batches(stream: Stream, T: int, most: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The first rows of a stream, all unless `most` says how many."""
    size, num_rows = max(1, 2_048 // T), stream.num_rows
    num_rows = num_rows if most is None else min(num_rows, most)
    for start in range(0, num_rows, size):
        yield stream.rows(range(start, min(start + size, num_rows)))


def _packed(
    text: str, tokenizer: Tokenizer, T: int, scratch: str
) -> tuple[Callable[..., Stream], list[str]]:
    """Packs text; returns (names of sets) -> their rows, each once, and the names of all sets."""
    data = DataConfig(sources=text, eval_fraction=0.0, sequence_length=T)
    found = packing.pack(data, tokenizer, scratch)
    for parts in found.sets.values():
        parts["eval"] = parts["train"]

    def stream_of(*names: str) -> Stream:
        sets = {name: found.sets[name] for name in names}
        return Stream(dataclasses.replace(found, sets=sets), "eval", data)

    return stream_of, list(found.sets)


def _open_text(config: Config, workdir: epath.Path, text: str, scratch: str) -> tuple[Stream, str]:
    """Rows of text by index, and what to call them."""
    T = config.data.sequence_length
    if text:
        file = workdir / "tokenizer.model"
        tokenizer = Tokenizer(file if file.exists() else config.data.tokenizer)
        stream_of, names = _packed(text, tokenizer, T, scratch)
        return stream_of(*names), text
    directory = epath.Path(config.data.shards or workdir / "shards")
    if not (directory / shards.MANIFEST).exists():
        raise ValueError(
            f"{directory} has no packed rows, so there is no held-out text of this run: give some"
            " with --text=FILES."
        )
    found = shards.load(directory, tokenizer=None, sequence_length=T)
    return Stream(found, "eval", config.data), f"held-out text, {directory}"
