"""How fast packed rows come back: tokens per second of one core, and the time to go on late.

`python -m experiments.benchmark --what=data` prints it.
"""

import dataclasses
import time

from baichuan_jax.config import DataConfig
from baichuan_jax.data import shards
from baichuan_jax.data.stream import Stream


@dataclasses.dataclass
class Loader:
    """What was measured.

    Attributes:
      tokens_per_second: of process CPU time, rows of T tokens.
      resume_seconds: from nothing to the first batch of a run that goes on, wall time.
      rows: read for the first figure.
    """

    tokens_per_second: float
    resume_seconds: float
    rows: int


def measure(
    manifest: shards.Manifest, *, batch_size: int = 8, rows: int = 1_024, late: int = 10**7
) -> Loader:
    """Reads shuffled and mixed rows as training does.

    Args:
      late: the first row of the run that goes on.
    """
    config = DataConfig(sequence_length=manifest.sequence_length)
    began = time.perf_counter()
    again = shards.load(
        manifest.directory, tokenizer=None, sequence_length=manifest.sequence_length
    )
    stream = Stream(again, "train", config)
    stream.rows(range(late, late + batch_size))
    resume_seconds = time.perf_counter() - began
    began = time.process_time()
    for start in range(0, rows, batch_size):
        stream.rows(range(start, start + batch_size))
    seconds = time.process_time() - began
    read = -(-rows // batch_size) * batch_size
    return Loader(read * manifest.sequence_length / seconds, resume_seconds, read)
