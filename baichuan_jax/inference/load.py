"""A model from a folder, ready to generate: three lines in a notebook.

  from baichuan_jax.inference.load import load
  model = load("/models/Baichuan2-7B-Chat")
  print(model.generate("登鹳雀楼->王之涣\\n夜雨寄北->"), model.chat("你好"))

The folder is a run of this project, quantised or not, or a released checkpoint as Hugging Face
has it. Weights go to the devices one layer's matrix at a time.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from baichuan_jax import chat
from baichuan_jax.chat import ChatFormat, chat_format, chat_prompt, prompt_budget
from baichuan_jax.config import Config, MeshConfig, ModelConfig, from_json
from baichuan_jax.convert.folder import read_json
from baichuan_jax.convert.hugging_face import check_tokenizer, release_rows
from baichuan_jax.convert.layout import our_shapes
from baichuan_jax.convert.release import Release, is_release, read_config
from baichuan_jax.convert.weights import WeightsReader
from baichuan_jax.inference import weights
from baichuan_jax.inference.engine import Engine
from baichuan_jax.inference.quantize import (
    check_save,
    is_quantized,
    restore_quantized,
    save_quantized,
)
from baichuan_jax.inference.request import Request
from baichuan_jax.inference.sampling import Sampling
from baichuan_jax.model.quantized import BLOCK
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import make_mesh
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training import manifest
from baichuan_jax.training.checkpoint import sound_weights
from baichuan_jax.training.metrics import Progress

_MAX_NEW_TOKENS = 256  # where the folder has no generation_config.json


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How a model generates where nothing else is asked for."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    max_new_tokens: int = _MAX_NEW_TOKENS


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its tokenizer. One thread uses it.

    Attributes:
      name: of its folder.
      config: of the model; its head is normalised already in the engine's weights.
      format: of conversations; None where the tokenizer has no role tokens.
      defaults: of continued texts: generation_config.json of the folder; greedy without one.
      chat_defaults: of replies: the same; without one the released chat models'.
    """

    name: str
    config: Config
    engine: Engine
    tokenizer: Tokenizer
    format: ChatFormat | None
    defaults: Defaults
    chat_defaults: Defaults

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its output together."""
        return self.engine.max_length

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        **sampling,
    ) -> str | list[str]:
        """Continues a text, or several at one time.

        Args:
          max_new_tokens: None: the defaults'. Never more than the context leaves.
          sampling: fields of `Sampling`; the others are the defaults'.

        Returns:
          What comes after the text, or after each of them.

        Raises:
          ValueError: names the field and what would be right.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        stop = stop if isinstance(stop, str) else tuple(stop)
        wanted = _positive(max_new_tokens, self.defaults)
        drawn = dataclasses.replace(self.defaults.sampling, **sampling)
        requests = []
        for i, text in enumerate(texts):
            ids = self.tokenizer.encode(text)
            if not ids:
                raise ValueError(f"Prompt {i} is empty: there is nothing to continue.")
            limit = self.limit(len(ids), wanted)
            requests.append(Request(ids, limit, drawn, stop=stop))
        texts = [output.text for output in self.engine.generate(requests)]
        return texts[0] if isinstance(prompt, str) else texts

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int | None = None,
        **sampling,
    ) -> str:
        """The reply to a conversation.

        Args:
          messages: of 'role' and 'content', see `chat.chat_prompt`; or what the user says first.
          max_new_tokens, sampling: as for `generate`.

        Raises:
          ValueError: names the message and the field; or the model has no chat format.
        """
        if self.format is None:
            raise ValueError(f"{self.name}: its tokenizer has no role tokens, so it cannot chat.")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        wanted = _positive(max_new_tokens, self.chat_defaults)
        budget = prompt_budget(self.max_length, wanted)
        prompt = chat_prompt(messages, self.tokenizer, self.format, budget)
        if prompt.dropped_rounds:
            logging.warning(
                "The oldest %d rounds of the conversation do not fit.", prompt.dropped_rounds
            )
        drawn = dataclasses.replace(self.chat_defaults.sampling, **sampling)
        # The assistant's own beginning is gone on with, if there is one.
        continues = messages[-1]["role"] == "assistant" and bool(messages[-1]["content"])
        limit = self.limit(len(prompt.ids), wanted)
        request = Request(prompt.ids, limit, drawn, continues=continues)
        return self.engine.generate([request])[0].text

    def stream(self, request: Request) -> Iterator[str]:
        """The text of a request, piece by piece. Not going on to its end cancels it."""
        output, shown = self.engine.submit(request), 0
        try:
            while output.finish_reason is None:
                self.engine.step()
                if text := output.text[shown:]:
                    shown += len(text)
                    yield text
        finally:
            self.engine.cancel(output)

    def limit(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """`max_new_tokens`, or what the context leaves of it; at least 1."""
        return max(1, min(max_new_tokens, self.max_length - prompt_tokens))


def _positive(max_new_tokens: int | None, defaults: Defaults) -> int:
    if max_new_tokens is None:
        return defaults.max_new_tokens
    whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be a positive whole number.")
    return max_new_tokens


def load(
    path: epath.PathLike,
    *,
    dtype: str = "",
    quantize: str = "",
    slots: int = 8,
    max_length: int = 0,
    cache_dtype: str = "",
    mesh: MeshConfig | None = None,
    step: int | None = None,
    position: str = "",
    version: int = 0,
) -> LanguageModel:
    """Loads a run's folder or a released checkpoint.

    Args:
      dtype: of weights and computation; '': bfloat16, or float32 on a CPU, where it is faster.
      quantize: 'int8', 'nf4' or 'int4' for the matrices of the layers; '': as they are.
      slots: requests that run at one time.
      max_length: most tokens of a prompt and its output together; 0: the model's context.
      cache_dtype: of keys and values, 'int8' or a float dtype; '': as `dtype`.
      mesh: of the devices; None: on accelerators, tensor parallel over as many as divide the
        heads; on a CPU, one device.
      step: which checkpoint of a run; None: the newest sound one.
      position, version: of a released checkpoint, where its config.json does not tell.

    Raises:
      ValueError: names the file, tensor, field or argument, and what would be right.
      OSError, CheckpointError: what cannot be read.
    """
    path = Path(path).expanduser().absolute()  # Orbax wants it so
    for name, value in (("dtype", dtype), ("cache_dtype", cache_dtype)):
        allowed = ("", "bfloat16", "float32", *(["int8"] if name == "cache_dtype" else []))
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}.")
    config, release = _config(path, position, version)
    tokenizer = _tokenizer(path, config, release)
    version = config.model.version
    defaults, chat_defaults = _defaults(path, version)
    on_cpu = jax.default_backend() == "cpu"
    kind = quantize or ("" if release else is_quantized(path, step))
    devices = make_mesh(mesh, jax.devices()) if mesh else _default_mesh(config.model, kind, on_cpu)
    chosen = dtype or ("float32" if on_cpu else "bfloat16")
    with jax.set_mesh(devices):
        model = _model(path, config, release, jnp.dtype(chosen), quantize, step)
    if max_length > config.data.sequence_length:
        logging.warning(
            "max_length=%d is more than the %d tokens that the model was trained on.",
            max_length,
            config.data.sequence_length,
        )
    engine = Engine(
        model,
        config.model,
        eos_id=tokenizer.eos_id,
        tokenizer=tokenizer,
        slots=slots,
        max_length=max_length or config.data.sequence_length,
        cache_dtype=jnp.dtype(cache_dtype) if cache_dtype else None,
        mesh=devices,
    )
    try:
        form = chat_format(tokenizer, version)
    except ValueError:
        form = None
    name = path.resolve().name
    return LanguageModel(name, config, engine, tokenizer, form, defaults, chat_defaults)


def quantize_folder(
    source: epath.PathLike,
    target: epath.PathLike,
    kind: str,
    *,
    dtype: str = "bfloat16",
    step: int | None = None,
    position: str = "",
    version: int = 0,
) -> None:
    """Writes a run's folder, or a released checkpoint, as a quantised run's folder.

    Args:
      kind: 'int8', 'nf4' or 'int4'.
      dtype: of what is not quantised.
      step, position, version: as for `load`.

    Raises:
      ValueError, OSError, CheckpointError: as `load`, or the target cannot be written. Nothing
        is left in it.
    """
    path = Path(source).expanduser().absolute()
    config, release = _config(path, position, version)
    tokens = 0
    if not release:  # the step is chosen here, so that the model and the name agree
        found = sound_weights(path / "checkpoints", step)
        step, tokens = int(found.name), manifest.read(found)[0]
    _tokenizer(path, config, release)
    check_save(config, kind, target, source=path, dtype=jnp.dtype(dtype))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = _model(path, config, release, jnp.dtype(dtype), kind, step)
        save_quantized(model, config, target, source=path, step=step or 0, tokens=tokens)


def _config(path: Path, position: str, version: int) -> tuple[Config, Release | None]:
    if ":/" in str(path):
        raise ValueError(f"{path}: models are loaded from a local disk; copy the folder first.")
    release = read_config(path, position=position, version=version) if is_release(path) else None
    if release is None and (position or version):
        raise ValueError(
            f"position={position!r}, version={version}: {path} is a run, and its config.json says"
            " both. They are for released checkpoints."
        )
    if release is None and not (path / "config.json").is_file():
        lacking = f"{path}/config.json is missing" if path.is_dir() else f"There is no {path}"
        raise FileNotFoundError(f"{lacking}: give a run's folder, or one with a released model.")
    return (release.config if release else from_json(path / "config.json")), release


def _tokenizer(path: Path, config: Config, release: Release | None) -> Tokenizer:
    file = path / "tokenizer.model"
    if not file.exists() and config.data.tokenizer:
        file = Path(config.data.tokenizer).expanduser()
    if not file.exists():
        raise FileNotFoundError(
            f"{path / 'tokenizer.model'} is missing: copy the model's SentencePiece file there."
        )
    tokenizer = Tokenizer(file)
    if release:
        check_tokenizer(tokenizer, config.model, path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size:,} tokens, more than the"
            f" {config.model.vocab_size:,} of the model in {path}: they do not belong together."
        )
    return tokenizer


def _defaults(path: Path, version: int) -> tuple[Defaults, Defaults]:
    """Of continued texts, and of replies."""
    file = path / "generation_config.json"
    if not file.exists():
        return Defaults(), _read_defaults(file, chat.chat_defaults(version))
    given = _read_defaults(file, read_json(file))
    return given, given


def _read_defaults(file: Path, fields: Mapping) -> Defaults:
    fields = {name: value for name, value in fields.items() if value is not None}
    sampled = fields.get("do_sample", False)
    names = ("temperature", "top_k", "top_p") if sampled else ()
    given = {name: fields[name] for name in (*names, "repetition_penalty") if name in fields}
    if sampled:
        given = {"temperature": 1.0} | given
    sampling = Sampling(**given)
    max_new_tokens = fields.get("max_new_tokens", _MAX_NEW_TOKENS)
    try:
        sampling.check(1)
        if not isinstance(sampled, bool):
            raise ValueError(f"do_sample={sampled!r} must be true or false.")
        max_new_tokens = _positive(max_new_tokens, Defaults())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Defaults(sampling, max_new_tokens)


def _default_mesh(model: ModelConfig, kind: str, on_cpu: bool) -> jax.sharding.Mesh:
    """On accelerators, as many devices as split heads, tables and quantised blocks evenly."""
    sizes = [model.num_heads, model.intermediate_size, model.hidden_size, model.padded_vocab_size]
    if kind in ("nf4", "int4"):  # no block of inputs lies on two devices
        for size in (model.intermediate_size, model.hidden_size):
            sizes.append(size // BLOCK if size % BLOCK == 0 else 1)
    tensor = 1 if on_cpu else math.gcd(len(jax.devices()), *sizes)
    return make_mesh(MeshConfig(1, 1, tensor), jax.devices()[:tensor])


def _model(
    path: Path,
    config: Config,
    release: Release | None,
    dtype: jnp.dtype,
    kind: str,
    step: int | None,
) -> Transformer:
    model = config.model
    saved_kind = "" if release else is_quantized(path, step)
    if saved_kind:
        if kind not in ("", saved_kind):
            raise ValueError(f"{path} is quantised as {saved_kind}: it cannot become {kind}.")
        return restore_quantized(path, step=step, dtype=dtype)
    if release:
        read = release_rows(release)
    else:
        reader = WeightsReader(sound_weights(path / "checkpoints", step))
        reader.check(model)
        read = reader.read
    total = sum(math.prod(shape) for shape in our_shapes(model).values())
    with Progress("load", total, unit="parameters") as progress:
        progress.update(0)
        return weights.serve(
            model, read, dtype, kind, lambda done, name: progress.update(done, tensor=name)
        )
