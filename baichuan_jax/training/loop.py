"""The one visible loop (paper §2.6, appendix C): batches in, checkpoints and metrics out.

A run's folder holds `config.json`, `metrics.jsonl`, TensorBoard events and
`checkpoints/`. A run that was killed goes on from its newest sound checkpoint, bit for
bit as if it had not been.
"""

import collections
import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx
from jax import P
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from baichuan_jax.config import BATCH_AXES, Config, ModelConfig, to_json
from baichuan_jax.data.stream import Stream, difference, prefetch
from baichuan_jax.parallel import flags
from baichuan_jax.parallel.cost import flops_per_token
from baichuan_jax.training import metrics, optimizer
from baichuan_jax.training import step as step_module
from baichuan_jax.training.checkpoint import CheckpointError, Checkpoints, restore_model
from baichuan_jax.training.step import Batch, Loss, TrainState


class NonFiniteError(RuntimeError):
    """Loss or gradient became NaN or infinite; the message says where."""


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run is: updates made, next row of the stream, tokens seen."""

    step: int = 0
    row: int = 0
    tokens: int = 0


def train(
    config: Config,
    workdir: epath.PathLike,
    mesh: Mesh,
    loss: Loss,
    stream: Stream,
    eval_stream: Stream | None,
    token_bytes: np.ndarray,
    first_weights: Callable[[], nnx.Module] | None = None,
) -> TrainState:
    """Trains until `config.training.num_steps`, or until SIGTERM, which saves first.

    Args:
      workdir: the run's folder; one that holds checkpoints is resumed.
      loss: see `training.step`.
      stream: training rows; row `i` is the same whenever it is asked for.
      eval_stream: held-out rows, or None for no evaluation.
      token_bytes: int32 [V], UTF-8 bytes that each token stands for, for bits per byte.
      first_weights: makes the float32 weights, stored on the mesh as `zero.shardings` says, that
        a new run starts from; None: those of `config.checkpoint.init_from`, else random ones.

    Raises:
      NonFiniteError: names the step, the rows of its batch and the first bad tensor.
      ValueError: where data, tokenizer, batch or model differ from those of the run that
        is resumed (see `config.checkpoint.accept_changed_data`).
      CheckpointError: where none can be written or read.
    """
    workdir, training = epath.Path(workdir).expanduser(), config.training
    tx = optimizer.adamw(config.optimizer, training.num_steps)
    rows = NamedSharding(mesh, P(BATCH_AXES, None))
    choice = flags.for_training(mesh)
    for line in choice.lines():
        logging.info("Compiler: %s.", line)
    run_step = step_module.compiled_step(config, loss, tx, choice.options)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        stop_requested = enter(_sigterm())  # until the last save is complete
        keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every_tokens
        checkpoints = enter(
            Checkpoints(workdir / "checkpoints", keep=keep, keep_every_tokens=keep_every)
        )
        state, position = _start(config, mesh, tx, checkpoints, stream, first_weights)
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(to_json(config))
        enter(jax.set_mesh(mesh))
        recorder = enter(_Recorder(config, workdir, mesh))
        evaluate = _evaluator(config, rows, loss, eval_stream, token_bytes)
        batches = prefetch(stream, position.row, training.batch_size, rows)
        enter(contextlib.closing(batches))
        profile = enter(_profiler(config, workdir))
        unread = collections.deque()

        def read() -> None:
            """Waits for the oldest step whose results nobody has seen, and records them."""
            where, results = unread.popleft()
            if not recorder.train(where, results):
                raise NonFiniteError(
                    _explain(config, where, stream, rows, loss, state.model, checkpoints)
                )

        for step in range(position.step + 1, training.num_steps + 1):
            profile(step)
            batch = next(batches)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, results = run_step(state, step, batch)
            position = Position(
                step,
                position.row + training.batch_size,
                position.tokens + training.batch_size * config.data.sequence_length,
            )
            unread.append((position, results))
            last = stop_requested(step) or step == training.num_steps
            save = last or step % config.checkpoint.every_steps == 0
            due = step % training.eval_every == 0 or step == training.num_steps
            measure = evaluate and due  # not at SIGTERM, which leaves no time
            if len(unread) == 2:
                read()  # the step before, while the device works on this one
            if save or measure:
                recorder.pause()
                read()  # nothing is saved or measured that is not finite
            if save:
                meta = {
                    **dataclasses.asdict(position),
                    "data": stream.describe(training.batch_size),
                    "model": dataclasses.asdict(config.model),
                }
                checkpoints.save(step, state, meta, position.tokens)
            if measure:
                recorder.eval(position, evaluate(state.model))
            if last:
                break
    return state


def _start(
    config: Config,
    mesh: Mesh,
    tx: optax.GradientTransformation,
    checkpoints: Checkpoints,
    stream: Stream,
    first_weights: Callable[[], nnx.Module] | None,
) -> tuple[TrainState, Position]:
    """The newest checkpoint of this run; else weights from elsewhere; else random weights."""
    abstract = step_module.abstract_state(config, tx, mesh)
    if checkpoints.newest() is not None:
        state, meta = checkpoints.restore(abstract)
        before = dataclasses.asdict(ModelConfig()) | meta["model"]  # which may lack newer fields
        if changed := difference(before, dataclasses.asdict(config.model)):
            raise ValueError(
                f"{checkpoints.directory} holds another model than config.model:\n{changed}\n"
                "Use another --workdir, or config.checkpoint.init_from for continued training."
            )
        position = Position(meta["step"], meta["row"], meta["tokens"])
        if changed := difference(meta["data"], stream.describe(config.training.batch_size)):
            if not config.checkpoint.accept_changed_data:
                raise ValueError(
                    f"{checkpoints.directory} was trained on other batches:\n{changed}\n"
                    "--config.checkpoint.accept_changed_data=true goes on with the new ones."
                )
            logging.warning("New batches from row %s on:\n%s", f"{position.row:,}", changed)
        logging.info("Resumes at step %d, row %d.", position.step, position.row)
        return state, position
    init_from = config.checkpoint.init_from
    if first_weights is not None:
        model = first_weights()
    elif init_from:
        model = restore_model(epath.Path(init_from) / "checkpoints", abstract.model)
    else:
        model = step_module.create_model(config.model, config.training.seed, mesh)
    if init_from:
        logging.info("Starts from the weights of %s.", init_from)
    return step_module.create_state(model, tx, mesh), Position()


class _Recorder:
    """Metrics of steps into the files of the run and the progress line."""

    def __init__(self, config: Config, workdir: epath.Path, mesh: Mesh):
        self._config, self._devices = config, list(mesh.devices.flat)
        self._schedule = optimizer.schedule(config.optimizer, config.training.num_steps)
        self._flops = flops_per_token(config.model, config.data.sequence_length)
        self._writer = metrics.MetricsWriter(workdir)
        self._progress = metrics.Progress("train", config.training.num_steps, unit="steps")
        self._before: tuple[float, int] | None = None  # time and tokens

    def train(self, where: Position, results: dict) -> bool:
        """Waits for the step's results and records them; false if they are not finite."""
        count = max(float(results["tokens"]), 1.0)
        record = {k: float(results[k]) / count for k in ("loss", "cross_entropy", "max_z")}
        record["accuracy"] = float(results["correct"]) / count
        record["gradient_norm"] = float(results["gradient_norm"])
        record["learning_rate"] = float(self._schedule(where.step - 1))
        now, rate, mfu = time.monotonic(), None, None
        if self._before is not None:
            before, tokens = self._before
            rate = (where.tokens - tokens) / (now - before)
            mfu = metrics.mfu(rate, self._flops, self._devices)
            record |= {"tokens_per_second": rate, "step_seconds": now - before} | (
                {} if mfu is None else {"mfu": mfu}
            )
        self._before = now, where.tokens
        self._progress.update(
            where.step,
            loss=record["loss"],
            **{"tok/s": rate, "MFU": None if mfu is None else f"{mfu:.1%}"},
        )
        finite = np.isfinite([record["loss"], record["gradient_norm"]]).all()
        due = where.step % self._config.training.log_every == 0
        if due or not finite or where.step == self._config.training.num_steps:
            self._writer.write("train", where.step, where.tokens, record)
        return bool(finite)

    def eval(self, where: Position, values: dict[str, float]) -> None:
        self._writer.write("eval", where.step, where.tokens, values)
        self.pause()

    def pause(self) -> None:
        """Something else takes time: the next step that is read is not timed."""
        self._before = None

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *_) -> None:
        self._progress.close()
        self._writer.close()


def _evaluator(
    config: Config,
    rows: NamedSharding,
    loss: Loss,
    stream: Stream | None,
    token_bytes: np.ndarray,
) -> Callable[[nnx.Module], dict[str, float]] | None:
    """A function that measures a model on held-out rows, all or the first `eval_batches`.

    It gives `loss` (cross-entropy, nats per token), `bits_per_byte` (of the text that the
    predicted tokens stand for) and `accuracy`.
    """
    if stream is None:
        return None
    size = config.training.batch_size // config.training.micro_batches
    stop = stream.num_rows
    if config.training.eval_batches:
        stop = min(stop, config.training.eval_batches * config.training.batch_size)

    @jax.jit
    def sums(model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        _, count, values = loss(model, batch)
        sizes = jnp.asarray(token_bytes).at[batch["targets_BT"]].get(out_sharding=rows.spec)
        text = jnp.sum(jnp.where(batch["mask_BT"], sizes, 0), dtype=jnp.float32)
        return {**values, "tokens": count, "bytes": text}

    def evaluate(model: nnx.Module) -> dict[str, float]:
        total = collections.Counter()
        batches = prefetch(stream, 0, size, rows, stop=stop)
        with contextlib.closing(batches):
            for batch in batches:
                total.update({k: float(v) for k, v in sums(model, batch).items()})
        nats = total["cross_entropy"]
        return {
            "loss": nats / max(total["tokens"], 1),
            "bits_per_byte": nats / np.log(2) / max(total["bytes"], 1),
            "accuracy": total["correct"] / max(total["tokens"], 1),
        }

    return evaluate


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """A function that says whether SIGTERM has come; all processes agree on the step."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # signals belong to the main thread
    else:
        came = threading.Event()
        old = signal.signal(signal.SIGTERM, lambda *_: came.set())
        try:
            yield lambda step: came.is_set()
        finally:
            signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def _profiler(config: Config, workdir: epath.Path) -> Iterator[Callable[[int], None]]:
    """A function, called before each step, that traces `profile_steps` from `profile_start` on."""
    start, running = config.training.profile_start, False
    stop = start + config.training.profile_steps

    def before(step: int) -> None:
        nonlocal running
        if step == stop and running:
            jax.profiler.stop_trace()
            running = False
        if step == start and jax.process_index() == 0:
            jax.profiler.start_trace(str(workdir / "profile"))
            running = True

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()


def _explain(
    config: Config,
    where: Position,
    stream: Stream,
    rows: NamedSharding,
    loss: Loss,
    model: nnx.Module,
    checkpoints: Checkpoints,
) -> str:
    """What is known of a step that is not finite. Neither it nor a later one changed a weight."""
    first = where.row - config.training.batch_size
    batch = stream.global_batch(first, config.training.batch_size, rows)
    culprit = step_module.first_nonfinite(loss, model, batch, config.training.micro_batches)
    try:
        checkpoints.wait()
        good = f"step {checkpoints.newest()}" if checkpoints.newest() is not None else "none"
    except CheckpointError as error:
        good = f"none ({error})"
    return (
        f"Step {where.step}: loss or gradient is not finite. First bad tensor: {culprit}. The"
        f" batch is rows {first:,} to {where.row - 1:,} of the stream with"
        f" config.data.seed={config.data.seed}. Last good checkpoint in"
        f" {checkpoints.directory}: {good}."
    )
