"""Checkpoints: written while training goes on, restored onto any mesh.

A checkpoint is the folder `DIRECTORY/<step>`, written by Orbax and readable with Orbax
alone: `model` holds the weights and `training` the rest of the state, both as plain
dictionaries from a name (`layers.attention.qkv`) to an array, and the custom metadata
hold the run's `meta`. Orbax commits the folder in one move. After that each process hashes its
share of the files into its own part of a manifest; only when all parts are there is the
folder a checkpoint. An interrupted save therefore never counts as one, and damage that
came later is found out before anything is restored.

All processes of a run call every method here at the same point of the program.
"""

import concurrent.futures
import json
import re
import shutil

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from baichuan_jax.training import manifest

_FOLDER = re.compile(r"(\d{8,})(\.orbax-checkpoint-tmp.*)?")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read."""


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving waits for the last save.

    Args:
      directory: a folder, local or of an object store, that all processes share.
      keep: how many of the newest checkpoints are kept.
      keep_every_tokens: besides, the first checkpoint past every so many tokens; 0: none.

    Raises:
      CheckpointError: where `directory` cannot be written.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, keep_every_tokens: int = 0):
        self.directory = _absolute(directory)
        self._keep, self._keep_every_tokens = keep, keep_every_tokens
        self._damaged: set[int] = set()  # found out by `restore`
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, int, concurrent.futures.Future] | None = None
        problems = _of_all_processes(self._try_to_write())
        if problems:
            raise CheckpointError(
                f"Checkpoints cannot be written to {self.directory}: {problems[0]}. It must be a"
                " folder that this run may write to."
            )
        for _, path in _unfinished(self.directory) if jax.process_index() == 0 else []:
            logging.warning(
                "%s is what an interrupted save left. It is ignored, and deleted after the next"
                " save.",
                path,
            )

    def _try_to_write(self) -> list[str]:
        probe = self.directory / f"write-test-{jax.process_index()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("This process can write here.")
            probe.unlink()
        except Exception as error:  # each file system has its own kinds
            return [manifest.describe(error)]
        return []

    def save(self, step: int, state, meta: dict, tokens: int) -> None:
        """Starts to write a checkpoint and returns when `state` may change again.

        Waits for the save before it, and says so here if that one failed.

        Args:
          step: of the state; the folder's name.
          state: a pytree of arrays with an attribute or key `model`.
          meta: what JSON can hold: the next row, the data's fingerprint, the config, ...
          tokens: seen so far in training.

        Raises:
          CheckpointError: of this save or of the one before it; or where a sound checkpoint
            of this step exists, which is never overwritten.
        """
        self.wait()
        path = self._path(step)
        if manifest.is_complete(path) and step not in self._damaged:
            raise CheckpointError(
                f"{path} holds a checkpoint already, and it is not overwritten. Move it away, or"
                " write to another directory."
            )
        parts = _split(by_name(state))
        needed = sum(leaf.nbytes for part in parts.values() for leaf in part.values())
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = False  # fails here, at once
        try:
            with context:
                response = ocp.save_checkpointables_async(
                    path, parts, overwrite=True, custom_metadata=meta
                )
        except Exception as error:
            raise self._failure(step, needed, [manifest.describe(error)]) from error
        self._damaged.discard(step)
        writing = self._executor.submit(_finish, response, path, step, tokens)
        self._writing = step, needed, writing

    def wait(self) -> None:
        """Returns when the last save is a checkpoint, and the superfluous ones are deleted.

        Raises:
          CheckpointError: where that save failed, in whichever process.
        """
        if self._writing is None:
            return
        (step, needed, writing), self._writing = self._writing, None
        error = writing.exception()
        problems = _of_all_processes([manifest.describe(error)] if error else [])
        if problems:
            raise self._failure(step, needed, problems) from error
        if jax.process_index() == 0:
            self._delete_superfluous()

    def close(self) -> None:
        """Waits for the last save."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def newest(self) -> int | None:
        """The newest checkpoint's step, None without any. Its hashes are not looked at."""
        return max(_steps(self.directory), default=None)

    def restore(self, abstract_state, step: int | None = None):
        """Reads a checkpoint onto the devices of `abstract_state`.

        Args:
          abstract_state: the state's tree with shapes, dtypes and shardings in place of arrays,
            as `jax.eval_shape` gives it. Under `jax.set_mesh` abstract meshes become that mesh,
            and what has no sharding is replicated.
          step: which one; by default the newest sound one. Damaged ones are reported.

        Returns:
          (state, meta), as they were saved, bit for bit.

        Raises:
          CheckpointError: where no checkpoint is sound; lists what is wrong with each. Or of a
            save that was under way.
          ValueError: where the state has other parameters, shapes or dtypes than the checkpoint.
        """
        self.wait()
        path, self._damaged = _newest_sound(self.directory, step)
        parts = _split(by_name(abstract_state))
        for name, part in parts.items():
            _check_fit(path, name, part, exact=True)
        logging.info("Restores %s.", path)
        parts = ocp.load_checkpointables(path, jax.tree.map(_concrete, parts))
        arrays = _join(parts)
        leaves = [arrays[name] for name in by_name(abstract_state)]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return state, ocp.checkpointables_metadata(path).custom_metadata

    def _path(self, step: int) -> epath.Path:
        return self.directory / f"{step:08d}"

    def _sound(self) -> list[int]:
        """The steps that are sound, in order, as far as is known without reading all of them."""
        steps = [step for step in _steps(self.directory) if step not in self._damaged]
        return [step for step in steps if not manifest.problems(self._path(step))]

    def _failure(self, step: int, needed: int, problems: list[str]) -> CheckpointError:
        """The error of a save, after clearing away what it left."""
        if jax.process_index() == 0:
            for partial_step, path in _unfinished(self.directory):
                if partial_step == step:
                    _delete(path)
        free = "an unknown number"
        if "://" not in str(self.directory):
            free = f"{shutil.disk_usage(self.directory).free:,}"
        intact = "There is no earlier checkpoint."
        if sound := self._sound():
            intact = f"The newest checkpoint, {self._path(sound[-1])}, is intact."
        return CheckpointError(
            f"The checkpoint of step {step} could not be written to {self.directory}:"
            f" {'; '.join(problems)}. It needs about {needed:,} bytes, and {free} are free."
            f" {intact}"
        )

    def _delete_superfluous(self) -> None:
        """Deletes checkpoints that need not be kept, and what interrupted saves left.

        Damaged checkpoints do not count among those that are kept, nor are they deleted.
        """
        sound = self._sound()
        kept = set(sound[-self._keep :])
        passed = 0
        for step in sound:
            tokens, _ = manifest.read(self._path(step))
            if self._keep_every_tokens and tokens // self._keep_every_tokens > passed:
                passed = tokens // self._keep_every_tokens
                kept.add(step)
        for step in sound:
            if step not in kept:
                _delete(self._path(step))
        for _, path in _unfinished(self.directory):
            _delete(path)


def restore_model(directory: epath.PathLike, abstract_model, step: int | None = None):
    """Reads only the model's weights: for continued pre-training and for inference.

    Args:
      directory: of the checkpoints.
      abstract_model: as in `Checkpoints.restore`; the weights are cast to its dtypes.
      step: which one; by default the newest whose weights are sound.

    Raises:
      CheckpointError: where no checkpoint is sound; lists what is wrong with each.
      ValueError: where the model has other parameters or shapes than the checkpoint.
    """
    path = sound_weights(directory, step)
    named = by_name(abstract_model)
    _check_fit(path, "model", named, exact=False)
    logging.info("Restores the weights of %s.", path)
    named = ocp.load_checkpointables(path, {"model": jax.tree.map(_concrete, named)})["model"]
    leaves = [named[name] for name in by_name(abstract_model)]
    return jax.tree.unflatten(jax.tree.structure(abstract_model), leaves)


def sound_weights(directory: epath.PathLike, step: int | None = None) -> epath.Path:
    """The folder of a checkpoint whose weights are sound; arguments as in `restore_model`.

    Raises:
      CheckpointError: where no checkpoint is sound; lists what is wrong with each.
    """
    path, _ = _newest_sound(_absolute(directory), step, without=("training/",))
    return path


def by_name(tree) -> dict:
    """The leaves by their place in the tree, the same in each version of Flax and Optax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def _split(named: dict) -> dict[str, dict]:
    """The model's weights, and all else of the state: they can be read one without the other."""
    parts = {"model": {}, "training": {}}
    for name, leaf in named.items():
        inside = name.removeprefix("model.")
        parts["training" if inside == name else "model"][inside] = leaf
    return {part: leaves for part, leaves in parts.items() if leaves}  # Orbax wants no empty one


def _join(parts: dict[str, dict]) -> dict:
    model = {f"model.{name}": leaf for name, leaf in parts["model"].items()}
    return model | parts.get("training", {})


def _concrete(leaf) -> jax.ShapeDtypeStruct:
    """The leaf with a sharding that names devices; see `Checkpoints.restore`."""
    mesh, sharding = jax.sharding.get_mesh(), leaf.sharding
    if sharding is None and mesh.empty:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    elif sharding is None:
        sharding = jax.sharding.NamedSharding(mesh, jax.P())
    elif isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        sharding = jax.sharding.NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_fit(path: epath.Path, part: str, named: dict, exact: bool) -> None:
    """Refuses a tree that the checkpoint does not hold; `exact` minds dtypes, too."""
    saved = ocp.metadata(path, part).metadata
    for name in sorted(saved.keys() | named.keys()):
        where = f"{path}: {part} {name}"
        if name not in named:
            raise ValueError(f"{where} is in the checkpoint, but not in the state to restore.")
        if name not in saved:
            raise ValueError(f"{where} is in the state to restore, but not in the checkpoint.")
        for what in ["shape", "dtype"] if exact else ["shape"]:
            there, here = getattr(saved[name], what), getattr(named[name], what)
            if there != here:
                raise ValueError(
                    f"{where} has {what} {there} in the checkpoint, but {here} in the state to"
                    " restore: they come from different configs."
                )


def _finish(response, path: epath.Path, step: int, tokens: int) -> None:
    """In the background: awaits Orbax's commit, then hashes this process's share of the files."""
    response.result()
    manifest.write(path, step, tokens)


def _delete(path: epath.Path) -> None:
    try:
        # The manifest goes first, so that a deletion cut short leaves no checkpoint.
        for part in path.glob("manifest-*"):
            part.unlink()
        path.rmtree(missing_ok=True)
    except Exception as error:
        logging.warning("%s could not be deleted: %s", path, manifest.describe(error))


def _folders(directory: epath.Path) -> list[tuple[int, epath.Path]]:
    """Step and folder of all saves in order, Orbax's temporary folders among them."""
    if not directory.exists():
        return []
    matches = [(_FOLDER.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _steps(directory: epath.Path) -> list[int]:
    """The steps with a complete manifest, in order."""
    return [step for step, path in _folders(directory) if manifest.is_complete(path)]


def _unfinished(directory: epath.Path) -> list[tuple[int, epath.Path]]:
    """Step and folder of saves, or of deletions, that did not come to their end."""
    return [(step, path) for step, path in _folders(directory) if not manifest.is_complete(path)]


def _newest_sound(
    directory: epath.Path, step: int | None, without: tuple[str, ...] = ()
) -> tuple[epath.Path, set[int]]:
    """The newest sound checkpoint, or that of `step`, and the damaged steps met on the way."""
    steps = {int(path.name) for _, path in _folders(directory) if path.name.isdigit()}
    damaged, reports = set(), []
    for candidate in sorted(steps, reverse=True) if step is None else [step]:
        path = directory / f"{candidate:08d}"
        problems = manifest.problems(path, without) or manifest.changes(path, without)
        problems = _of_all_processes(problems)
        if not problems:
            return path, damaged
        damaged.add(candidate)
        reports.append(f"{path}: {'; '.join(dict.fromkeys(problems))}")
        logging.warning("Not a sound checkpoint: %s.", reports[-1])
    found = "\n  ".join(reports) or "it holds none"
    raise CheckpointError(f"No sound checkpoint in {directory}:\n  {found}")


def _of_all_processes(lines: list[str]) -> list[str]:
    """What the processes say, put together, so that all of them decide alike."""
    if jax.process_count() == 1:
        return lines
    text = np.frombuffer(json.dumps(lines).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - text.size)))
    each = [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
    return [line for lines in each for line in lines]


def _absolute(directory: epath.PathLike) -> epath.Path:
    return epath.Path(directory).expanduser().absolute()
