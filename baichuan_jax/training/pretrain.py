"""Pre-training from a config alone: mesh, tokenizer, packed rows, loop (paper §2)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from etils import epath

from baichuan_jax.config import ROPE_SCALING_FIELDS, Config, DataConfig, from_json, validate
from baichuan_jax.convert.hugging_face import read_model
from baichuan_jax.convert.release import AmbiguousError, Release, is_release, read_config
from baichuan_jax.data import packing, shards, sources
from baichuan_jax.data.stream import Stream, difference
from baichuan_jax.inference.quantize import is_quantized
from baichuan_jax.model.transformer import Transformer
from baichuan_jax.parallel.mesh import check_fit, make_mesh
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training import loop
from baichuan_jax.training.metrics import Progress
from baichuan_jax.training.step import TrainState, pretraining_loss


def open_data(
    config: DataConfig, tokenizer: Tokenizer, workdir: epath.PathLike, *, replace: bool = False
) -> shards.Manifest:
    """The packed rows: of `config.shards`, or made from `config.sources` in WORKDIR/shards.

    `config.shards` may also be a folder that has them in DIR/shards, such as a run's. Rows that
    `experiments.prepare_data` has made are taken as they are, whatever `config.sources` says.

    Rows that were packed from other inputs are packed anew where `replace` allows it.

    Raises:
      ValueError: names the field, file or row that is wrong, or what changed.
    """
    directory = epath.Path(config.shards or epath.Path(workdir) / "shards").expanduser()
    if "://" in str(directory):
        raise ValueError(
            f"{directory}: ArrayRecord files are read from a file system only. Give"
            " --config.data.shards=DIR on one that all hosts mount."
        )
    prepared = False
    if config.shards:
        directory, prepared = _find_rows(directory)
    if config.shards and (prepared or not config.sources):
        if config.sources:
            logging.info("%s: used as it is; config.data.sources is not read.", directory)
        return shards.load(directory, tokenizer=tokenizer, sequence_length=config.sequence_length)
    if not config.sources:
        raise ValueError(
            "No text to train on: give --config.data.sources=NAME=PATH,… (.jsonl, .parquet, text"
            " folders, tfds:NAME) or --config.data.shards=DIR with rows that are already packed."
        )
    if jax.process_index() == 0:
        total = sources.expected_bytes([config.sources, config.eval_sources])
        with Progress("pack", total, unit="B") as progress:
            packing.pack(
                config,
                tokenizer,
                directory,
                replace=replace,
                progress=lambda documents, size, tokens: progress.update(
                    size, documents=f"{documents:,}", tokens=f"{tokens:,}"
                ),
            )
    else:
        packing.wait(config, tokenizer, directory)
    return shards.load(directory, tokenizer=tokenizer, sequence_length=config.sequence_length)


def _find_rows(directory: epath.Path) -> tuple[epath.Path, bool]:
    """The folder of the rows in what `config.shards` names, and whether they were prepared."""
    for folder in (directory, directory.parent):  # where prepare_data keeps its stages
        if (folder / "stages").is_dir() and (folder / "documents").is_dir():
            if not (folder / "shards" / shards.MANIFEST).exists():
                raise ValueError(
                    f"{folder}: experiments.prepare_data has not finished here. Run its command"
                    " again; it goes on from where it was."
                )
            return folder / "shards", True
    if not (directory / shards.MANIFEST).exists() and (directory / "shards").is_dir():
        directory = directory / "shards"
    if not (directory / shards.MANIFEST).exists():
        return directory, False
    # Prepared rows may have been moved from where they were made.
    return directory, shards.read(directory, shards.MANIFEST).inputs.get("prepared", False)


def checked_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of a config whose fields fit each other and the devices.

    Raises:
      ValueError: names the field that is wrong.
    """
    validate(config)
    mesh = make_mesh(config.mesh)
    check_fit(mesh, config.model, config.training.batch_size // config.training.micro_batches)
    return mesh


def _check_source(config: Config) -> Release | None:
    """Refuses to take the weights of another architecture, or of a quantised run.

    Returns:
      What `init_from` is, if it is a released checkpoint.
    """
    flag = f"config.checkpoint.init_from={config.checkpoint.init_from}"
    path = epath.Path(config.checkpoint.init_from).expanduser()
    if not (path / "config.json").exists():
        raise ValueError(
            f"{flag}: should be the folder of a run, with its config.json and checkpoints, or of a"
            " released checkpoint, on a local disk."
        )
    release = _release(path) if is_release(path) else None
    there = release.config if release else from_json(path / "config.json")
    models = [dataclasses.asdict(c.model) for c in (there, config)]
    for field in ROPE_SCALING_FIELDS:
        models[0][field] = models[1][field]
    if changed := difference(*models):
        raise ValueError(f"{flag} holds another model than config.model:\n{changed}")
    if kind := "" if release else is_quantized(path):
        raise ValueError(
            f"{flag} is quantised, as {kind}, and cannot be trained. Name the run in full precision"
            " that it was made from."
        )
    return release


def _release(path: epath.Path) -> Release:
    try:
        return read_config(path)
    except AmbiguousError as error:
        raise ValueError(
            f"{error} That is a flag of experiments.convert_checkpoint: give the run's folder that"
            " it writes."
        ) from error


def _first_weights(config: Config, mesh: jax.sharding.Mesh) -> Callable[[], Transformer] | None:
    """What the loop cannot read by itself: a release's weights, straight onto the mesh."""
    if release := _check_source(config):
        return functools.partial(read_model, release, config.model, mesh, np.float32)
    return None


def _keep_tokenizer(source: epath.PathLike, copy: epath.Path) -> None:
    """Puts the tokenizer into the run's folder, which is then all that generating needs."""
    content = epath.Path(source).expanduser().read_bytes()
    if copy.exists() and copy.read_bytes() == content:
        return
    partial = copy.parent / f"{copy.name}.partial"
    partial.write_bytes(content)
    partial.replace(copy)


def pretrain(config: Config, workdir: epath.PathLike) -> TrainState:
    """Trains `config.model` on `config.data` in `workdir`, or goes on with a run there.

    Raises:
      ValueError: before any long work; names the field, file or row that is wrong.
      NonFiniteError, CheckpointError: see `loop.train`.
    """
    mesh = checked_mesh(config)
    # The weights' own tokenizer goes before the rows': rows of another one do not fit them.
    for folder in filter(None, (config.checkpoint.init_from, config.data.shards)):
        own = epath.Path(folder).expanduser() / "tokenizer.model"
        if not config.data.tokenizer and own.exists():
            config.data.tokenizer = str(own)
    if not config.data.tokenizer:
        shards_too = f", and config.data.shards={config.data.shards} has none"
        raise ValueError(
            f"config.data.tokenizer is empty{shards_too if config.data.shards else ''}: give a"
            " SentencePiece model, or train one with `python -m experiments.train_tokenizer`."
        )
    tokenizer = Tokenizer(epath.Path(config.data.tokenizer).expanduser())
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{config.data.tokenizer} has {tokenizer.vocab_size:,} tokens, more than"
            f" config.model.vocab_size={config.model.vocab_size:,}."
        )
    workdir = epath.Path(workdir).expanduser()
    workdir.mkdir(parents=True, exist_ok=True)
    resumes = any((workdir / "checkpoints").glob("*"))
    takes = config.checkpoint.init_from and not resumes
    first_weights = _first_weights(config, mesh) if takes else None
    replace = config.checkpoint.accept_changed_data or not (resumes or config.data.shards)
    manifest = open_data(config.data, tokenizer, workdir, replace=replace)
    for reason, count in manifest.dropped.items():
        logging.warning("%s documents were dropped: %s.", f"{count:,}", reason)
    if jax.process_index() == 0:
        _keep_tokenizer(config.data.tokenizer, workdir / "tokenizer.model")
    stream = Stream(manifest, "train", config.data)
    held_out = manifest.total("eval", "rows")
    eval_stream = Stream(manifest, "eval", config.data) if held_out else None
    loss = pretraining_loss(config.model, config.training)
    return loop.train(
        *(config, workdir, mesh, loss, stream, eval_stream, tokenizer.token_bytes, first_weights)
    )
