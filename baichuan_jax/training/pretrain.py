"""Pre-training from a config alone: mesh, tokenizer, packed rows, loop (paper §2)."""

import dataclasses

import jax
from absl import logging
from etils import epath

from baichuan_jax.config import Config, DataConfig, from_json, validate
from baichuan_jax.data import packing, shards, sources
from baichuan_jax.data.stream import Stream, difference
from baichuan_jax.parallel.mesh import check_fit, make_mesh
from baichuan_jax.tokenizer import Tokenizer
from baichuan_jax.training import loop
from baichuan_jax.training.metrics import Progress
from baichuan_jax.training.step import TrainState, pretraining_loss


def open_data(
    config: DataConfig, tokenizer: Tokenizer, workdir: epath.PathLike, *, replace: bool = False
) -> shards.Manifest:
    """The packed rows: of `config.shards`, or made from `config.sources` in WORKDIR/shards.

    Rows that were packed from other inputs are packed anew where `replace` allows it.

    Raises:
      ValueError: names the field, file or row that is wrong, or what changed.
    """
    directory = epath.Path(config.shards or epath.Path(workdir) / "shards")
    if "://" in str(directory):
        raise ValueError(
            f"{directory}: ArrayRecord files are read from a file system only. Give"
            " --config.data.shards=DIR on one that all hosts mount."
        )
    if config.shards and not config.sources:
        return shards.load(
            config.shards, tokenizer=tokenizer, sequence_length=config.sequence_length
        )
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


def checked_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of a config whose fields fit each other and the devices.

    Raises:
      ValueError: names the field that is wrong.
    """
    validate(config)
    mesh = make_mesh(config.mesh)
    check_fit(mesh, config.model, config.training.batch_size // config.training.micro_batches)
    return mesh


def _check_source(config: Config) -> None:
    """Refuses to take the weights of a run with another architecture."""
    path = epath.Path(config.checkpoint.init_from) / "config.json"
    if not path.exists():
        raise ValueError(
            f"config.checkpoint.init_from={config.checkpoint.init_from}: should be the folder of"
            " a run, with its config.json and checkpoints."
        )
    source, model = (dataclasses.asdict(c.model) for c in (from_json(path), config))
    if changed := difference(source, model):
        raise ValueError(
            f"config.checkpoint.init_from={config.checkpoint.init_from} holds another model than"
            f" config.model:\n{changed}"
        )


def pretrain(config: Config, workdir: epath.PathLike) -> TrainState:
    """Trains `config.model` on `config.data` in `workdir`, or goes on with a run there.

    Raises:
      ValueError: before any long work; names the field, file or row that is wrong.
      NonFiniteError, CheckpointError: see `loop.train`.
    """
    mesh = checked_mesh(config)
    if not config.data.tokenizer:
        raise ValueError(
            "config.data.tokenizer is empty: give a SentencePiece model, or train one with"
            " `python -m experiments.train_tokenizer`."
        )
    tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{config.data.tokenizer} has {tokenizer.vocab_size:,} tokens, more than"
            f" config.model.vocab_size={config.model.vocab_size:,}."
        )
    workdir = epath.Path(workdir).expanduser()
    workdir.mkdir(parents=True, exist_ok=True)
    resumes = any((workdir / "checkpoints").glob("*"))
    if config.checkpoint.init_from and not resumes:
        _check_source(config)
    replace = config.checkpoint.accept_changed_data or not (resumes or config.data.shards)
    manifest = open_data(config.data, tokenizer, workdir, replace=replace)
    for reason, count in manifest.dropped.items():
        logging.warning("%s documents were dropped: %s.", f"{count:,}", reason)
    source, copy = epath.Path(config.data.tokenizer), workdir / "tokenizer.model"
    if jax.process_index() == 0 and source.expanduser() != copy:
        copy.write_bytes(source.read_bytes())  # the folder is then all that generating needs
    stream = Stream(manifest, "train", config.data)
    held_out = manifest.total("eval", "rows")
    eval_stream = Stream(manifest, "eval", config.data) if held_out else None
    loss = pretraining_loss(config.model, config.training)
    return loop.train(config, workdir, mesh, loss, stream, eval_stream, tokenizer.token_bytes)
