"""Records of one kind in groups, as shuffles send them."""

import itertools
from collections.abc import Iterator

import numpy as np


def by_key(keys: np.ndarray, records: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The records of each key, in their order; the keys from the lowest on.

    Args:
      keys: integers [N], of the records.
      records: [N], of any dtype.
    """
    order = np.argsort(keys, kind="stable")
    keys, records = keys[order], records[order]
    cuts = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    for start, end in itertools.pairwise([0, *cuts.tolist(), len(keys)]):
        if start < end:
            yield int(keys[start]), records[start:end]
