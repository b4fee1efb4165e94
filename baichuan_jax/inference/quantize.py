"""A model's linear layers in 8 or 4 bits: made, measured, saved and restored.

Quantised are the matrices that the official code quantises, the five linears of a layer; here
they are four arrays, as gate and up are one. Embedding, norms and head stay as they are.

A quantised checkpoint is a run's folder like any other: `config.json`, `tokenizer.model` and
`checkpoints/<step>` with the weights by name, one array for each layer and not a stack, so that
neither saving nor restoring holds anything twice. Its metadata say the kind, and that the head
is already normalised.

Legend: L layers.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax import P
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from baichuan_jax.config import Config, ModelConfig, from_json, to_json
from baichuan_jax.convert.folder import check_target, new_folder
from baichuan_jax.model import quantized
from baichuan_jax.model.quantized import Quantized
from baichuan_jax.model.transformer import Block, Transformer, norm_head
from baichuan_jax.training import manifest
from baichuan_jax.training.checkpoint import Checkpoints, by_name, restore_model

# Of a layer's matrices, how many dimensions are inputs.
_NUM_INPUTS = {"attention.qkv": 1, "attention.out": 2, "mlp.gate_up": 1, "mlp.down": 1}
_META = "quantized"  # the entry of a checkpoint's metadata
_COPIED = ("tokenizer.model", "generation_config.json")
_LARGEST = 1e37  # the inverses of much larger scales are zero in float32


def quantize(model: Transformer, kind: str) -> Transformer:
    """Replaces the four matrices of each layer, in place, one after the other.

    Each is freed before the next one is quantised, if nothing but the model holds it.

    Args:
      model: its layers are a sequence of blocks or a stack. Under a mesh, results are stored as
        the weights are computed with: over `tensor` only.
      kind: 'int8', 'nf4' or 'int4'; see `baichuan_jax.model.quantized`.

    Returns:
      The same model.

    Raises:
      ValueError: an unknown kind; a model that is quantised already; a mesh that splits inputs
        inside a block; a weight that is no float or not finite (the model is then quantised in
        part). Names the weight.
    """
    for name, weight, num_inputs, _ in _weights(model.layers):
        if isinstance(weight, Quantized):
            raise ValueError(f"{name} is quantised already, as {weight.kind}.")
        one = jax.ShapeDtypeStruct(weight.shape[weight.ndim - len(weight.spec) :], weight.dtype)
        quantized.check(name, one, num_inputs, kind, weight.spec)
    for name, weight, _, put in _weights(model.layers):
        put(quantize_weight(name, weight[...], kind, weight.spec))
    return model


def quantize_weight(name: str, weight: jax.Array, kind: str, spec: P) -> Quantized:
    """Quantises one matrix of a layer, or of a stack of layers, by its name.

    Raises:
      ValueError: as `quantize`.
    """
    num_inputs = _NUM_INPUTS[_path(name)]
    one = jax.ShapeDtypeStruct(weight.shape[weight.ndim - len(spec) :], weight.dtype)
    quantized.check(name, one, num_inputs, kind, spec)
    small, sound = _quantize_weight(weight, num_inputs, kind, spec)
    if not sound:
        raise ValueError(f"{name} holds NaN, infinity or a number beyond {_LARGEST:g}.")
    return small


def is_linear(name: str) -> bool:
    """Whether a parameter is one of the matrices that are quantised."""
    return _path(name) in _NUM_INPUTS


def _path(name: str) -> str:
    """'attention.qkv' of 'layers.3.attention.qkv'."""
    return ".".join(name.split(".")[-2:])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_weight(weight, num_inputs, kind, spec):
    def one(weight):
        return quantized.quantize_array(weight, num_inputs, kind, spec)

    # Not by the scales: XLA's CPU backend loses NaNs in a maximum.
    sound = jnp.all(jnp.abs(weight) < _LARGEST)
    return one(weight) if weight.ndim == len(spec) else jax.lax.map(one, weight), sound


def _weights(
    layers: Sequence[Block] | Block,
) -> Iterator[tuple[str, nnx.Param | Quantized, int, Callable[[Quantized], None]]]:
    """Name, weight and number of input dimensions of each matrix, and what replaces it."""
    stacked = isinstance(layers, Block)
    for index, block in enumerate([layers] if stacked else layers):
        for path, num_inputs in _NUM_INPUTS.items():
            part, attribute = path.split(".")
            holder = getattr(block, part)
            name = f"layers.{path}" if stacked else f"layers.{index}.{path}"
            put = functools.partial(setattr, holder, attribute)
            yield name, getattr(holder, attribute), num_inputs, put


def _unstacked(model: Transformer) -> Transformer:
    """A copy of the tree, not of the arrays, whose layers are a tuple of blocks."""
    model = jax.tree.map(lambda x: x, model)
    if isinstance(model.layers, Block):
        stack, num_layers = model.layers, model.layers.mlp_norm.gain.shape[0]

        def layer(index: int) -> Block:
            return jax.tree.map(lambda x: x[index], stack)

        model.layers = tuple(map(layer, range(num_layers)))
    return model


def memory(model: Transformer) -> dict[str, int]:
    """Bytes of a model's weights: 'linears', 'embedding', 'head', 'norms' and 'total'.

    Shapes and dtypes are enough, as `abstract` gives them. Counted once over all devices.
    """
    parts = dict.fromkeys(("linears", "embedding", "head", "norms"), 0)
    for name, leaf in by_name(model).items():
        part = name if name in parts else "norms" if "norm" in name else "linears"
        parts[part] += leaf.size * jnp.dtype(leaf.dtype).itemsize
    return parts | {"total": sum(parts.values())}


def abstract(config: ModelConfig, kind: str = "", dtype: jnp.dtype = jnp.bfloat16) -> Transformer:
    """A model with shapes in place of arrays and its layers as a tuple of blocks.

    Under a mesh they have shardings, too: each weight is laid out as it is computed with.

    Args:
      kind: of the quantisation; '' for none.
      dtype: of all that is not quantised.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def place(shape: tuple[int, ...], dtype: jnp.dtype, spec: P) -> jax.ShapeDtypeStruct:
        sharding = None if mesh.empty else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def one(param: nnx.Param) -> nnx.Param:
        return param.replace(place(param.shape, dtype, param.spec))

    model = jax.eval_shape(lambda key: _unstacked(Transformer(key, config)), jax.random.key(0))
    model = jax.tree.map(one, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for name, weight, num_inputs, put in _weights(model.layers) if kind else ():
        quantized.check(name, weight, num_inputs, kind, weight.spec)
        inputs, out = weight.shape[:num_inputs], weight.shape[num_inputs:]
        shapes = quantized.stored_shapes(kind, inputs, out)
        specs = quantized.stored_specs(kind, num_inputs, weight.spec)
        stored = [place(x.shape, x.dtype, spec) for x, spec in zip(shapes, specs, strict=True)]
        put(Quantized(*stored, kind, inputs, weight.spec))
    return model


def check_save(
    config: Config,
    kind: str,
    to: epath.PathLike,
    *,
    source: epath.PathLike | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
) -> None:
    """What `save_quantized` would refuse, told before a model is quantised.

    Args:
      kind: of the quantisation.
      dtype: of all that is not quantised.

    Raises:
      ValueError, OSError: as `save_quantized`.
    """
    _files_to_copy(source, config)
    check_target(to, memory(abstract(config.model, kind, dtype))["total"])


def save_quantized(
    model: Transformer,
    config: Config,
    to: epath.PathLike,
    *,
    source: epath.PathLike | None = None,
    step: int = 0,
    tokens: int = 0,
) -> None:
    """Writes a quantised model as a run's folder, its head normalised. For one process.

    The folder appears when it is complete.

    Args:
      model: by `quantize`. Its head is normalised here where `model.norm_head` asks for it.
      config: of the model; `config.model.norm_head` goes on telling the architecture.
      to: a folder on a local disk that is empty or does not exist.
      source: the folder from which `tokenizer.model` and `generation_config.json` are copied,
        whichever are there. A missing tokenizer is copied from `config.data.tokenizer`.
      step, tokens: how long the model was trained, where that is known.

    Raises:
      ValueError: a model that is not quantised; no tokenizer; a folder in an object store.
      FileExistsError: the folder is not empty.
      OSError, CheckpointError: it cannot be written. Nothing is left in it.
    """
    kinds = {getattr(weight, "kind", "") for _, weight, _, _ in _weights(model.layers)}
    if len(kinds) != 1 or not all(kinds):
        raise ValueError("The model is not quantised, or not in all layers alike: see `quantize`.")
    files = _files_to_copy(source, config)
    model = _unstacked(model)
    if model.norm_head:
        head = jax.jit(norm_head)(model.head[...].astype(jnp.float32))
        model.head = model.head.replace(head.astype(model.head.dtype))
    meta = {_META: {"kind": kinds.pop(), "head": "normalised" if config.model.norm_head else "raw"}}
    with new_folder(to, memory(model)["total"]) as folder:
        for name, file in files.items():
            file.copy(folder / name)
        with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(step, {"model": model}, meta, tokens)
        (folder / "config.json").write_text(to_json(config))


def is_quantized(path: epath.PathLike, step: int | None = None) -> str:
    """The kind of a run folder's checkpoint; '' where it is not quantised or there is none.

    Args:
      step: which checkpoint; by default the newest.
    """
    found = _checkpoint(epath.Path(path).expanduser().absolute(), step)
    meta = ocp.checkpointables_metadata(found).custom_metadata if found else None
    return (meta or {}).get(_META, {}).get("kind", "")


def restore_quantized(
    path: epath.PathLike, *, step: int | None = None, dtype: jnp.dtype | None = None
) -> Transformer:
    """Reads what `save_quantized` wrote, onto the current mesh or else one device.

    Args:
      path: the run's folder.
      step: which checkpoint; by default the newest.
      dtype: of all that is not quantised, except that the gains of norms are then float32, as
        in each served model; by default as it was saved, bit for bit.

    Returns:
      The model; its layers are a tuple of blocks and `norm_head` is False, as the head is
      normalised already.

    Raises:
      ValueError: a checkpoint that is not quantised, or is of another shape than `config.json`
        says; a mesh that splits inputs inside a block.
      CheckpointError: a damaged checkpoint.
    """
    path = epath.Path(path).expanduser().absolute()  # Orbax wants it so
    kind = is_quantized(path, step)
    if not kind:
        raise ValueError(f"{path}: its checkpoint is not quantised.")
    saved = ocp.metadata(_checkpoint(path, step), "model").metadata
    model = abstract(from_json(path / "config.json").model, kind)
    model.norm_head = False

    def as_saved(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if name not in saved or name.endswith((".values", ".scales")):
            return leaf
        asked = jnp.float32 if dtype and name.endswith(".gain") else dtype
        kept = asked or saved[name].dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding)

    leaves = [as_saved(name, leaf) for name, leaf in by_name(model).items()]
    model = jax.tree.unflatten(jax.tree.structure(model), leaves)
    return restore_model(path / "checkpoints", model, step)


def _files_to_copy(source: epath.PathLike | None, config: Config) -> dict[str, epath.Path]:
    """By their names in the new folder."""
    folders = [epath.Path(source).expanduser()] if source else []
    files = {name: folder / name for folder in folders for name in _COPIED}
    if config.data.tokenizer and not (folders and files["tokenizer.model"].exists()):
        files["tokenizer.model"] = epath.Path(config.data.tokenizer).expanduser()
    if not files.get("tokenizer.model", epath.Path()).is_file():
        named = config.data.tokenizer or "(empty)"
        raise ValueError(
            f"There is no tokenizer to save with the model: neither is tokenizer.model in"
            f" {source or 'a source folder (none is given)'}, nor is there a file"
            f" config.data.tokenizer={named}."
        )
    return {name: file for name, file in files.items() if file.exists()}


def _checkpoint(path: epath.Path, step: int | None) -> epath.Path | None:
    """The folder of a checkpoint, by default the newest."""
    folder = path / "checkpoints"
    if step is not None:
        found = [folder / f"{step:08d}"]
    else:
        found = folder.iterdir() if folder.exists() else []
    complete = [p for p in found if p.name.isdigit() and manifest.is_complete(p)]
    return max(complete, key=lambda p: int(p.name), default=None)
