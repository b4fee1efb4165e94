"""Quality scores of documents, by a classifier trained on examples of good and of poor text (§2.1).

The score is the probability that a text is like the good examples. It is used in two ways: the
worst documents are dropped, if `min_quality` says so, and mixture.py samples the others by the
tenth of their language that their score is in. Each language with enough examples has a head of
its own. Without a classifier the scores are null, and nothing is dropped.

Shapes: N documents.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from baichuan_jax.data.prepare import linear, text

UNSCORED = 255  # in place of a decile, where there is no score
FIELDS = ("config.quality.positive", "config.quality.negative", "config.quality.classifier")

_BINS = 4_096  # of the histogram of scores, over log-odds
_LARGEST = 16.0  # log-odds; float32 tells no larger probabilities apart


@dataclasses.dataclass
class QualityConfig:
    """What good text is, and how good it has to be."""

    positive: str = ""  # sources of good examples, such as encyclopedias and books
    negative: str = ""  # sources of poor ones, such as raw pages of the web
    classifier: str = ""  # or a classifier that is trained already: a file that `Linear.save` wrote
    min_quality: float = 0.0  # documents that score lower are dropped

    def check(self) -> None:
        """Raises a ValueError that names the field that is wrong."""
        if not 0 <= self.min_quality <= 1:
            raise ValueError(
                f"config.quality.min_quality={self.min_quality} must be between 0 and 1."
            )
        linear.check_choice(FIELDS, self.positive, self.negative, self.classifier)
        if self.min_quality and not (self.positive or self.classifier):
            raise ValueError(
                f"config.quality.min_quality={self.min_quality} needs a classifier, which"
                f" {FIELDS[0]} and {FIELDS[1]} train, or {FIELDS[2]} names."
            )


def score(documents: pa.Table, config: QualityConfig, classifier: str = "") -> pa.Table:
    """Scores documents; a local stage.

    Args:
      documents: with `text` and `language`.
      classifier: the file of what `linear_training.fit` gives; '': nothing is scored.

    Returns:
      One row a document: `reason` ("quality", or null) and `quality` (float32; null without a
      classifier).

    Raises:
      ValueError: the file is no classifier.
    """
    size = len(documents)
    if not classifier:
        return pa.table({"reason": pa.nulls(size, pa.string()), "quality": pa.nulls(size, "f4")})
    model = linear.load(classifier)
    texts, languages = documents["text"], documents["language"].to_pylist()
    scores = np.zeros(size, np.float32)
    for rows in text.batches(texts):
        scores[rows] = model.score(text.join(texts[rows]), languages[rows])
    reasons = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(size, np.int32), mask=scores >= config.min_quality), ["quality"]
    ).cast(pa.string())
    return pa.table({"reason": reasons, "quality": pa.array(scores)})


def histograms(scores: np.ndarray, languages: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Numbers of documents, int64 [bins], by language and score.

    Those of parts of a corpus add up to those of the whole. Documents without a score (NaN) do
    not count.
    """
    names, places = np.unique([name or "" for name in languages], return_inverse=True)
    scored = np.isfinite(scores)
    cells = places[scored] * _BINS + _bins(scores[scored])
    counts = np.bincount(cells, minlength=len(names) * _BINS).reshape(-1, _BINS)
    return {str(name): row for name, row in zip(names, counts, strict=True) if row.any()}


def total(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The histograms of a corpus, from those of its parts."""
    whole: dict[str, np.ndarray] = {}
    for part in parts:
        for name, row in part.items():
            whole[name] = whole.get(name, 0) + row
    return whole


def deciles(
    scores: np.ndarray,
    languages: Sequence[str | None],
    whole: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """The tenth of its language that each document's score is in: uint8 [N], 9 for the best.

    Documents whose scores fall into the same bin of the histogram are in the same tenth, the
    one of their middle; if all score alike, they are in tenth 5.

    Args:
      scores: probabilities; NaN where there is none, which gives `UNSCORED`.
      whole: `histograms` of the whole corpus; None: these documents are all of it.
    """
    whole = histograms(scores, languages) if whole is None else whole
    names, places = np.unique([name or "" for name in languages], return_inverse=True)
    found = np.full(len(scores), UNSCORED, np.uint8)
    for number, name in enumerate(names):
        mine = np.flatnonzero((places == number) & np.isfinite(scores))
        if len(mine):
            counts = whole[str(name)]
            middles = (np.cumsum(counts) - counts / 2) / counts.sum()
            found[mine] = np.minimum(10 * middles, 9)[_bins(scores[mine])]
    return found


def _bins(scores: np.ndarray) -> np.ndarray:
    edge = 1 / (1 + np.exp(_LARGEST))
    p = np.clip(np.asarray(scores, np.float64), edge, 1 - edge)
    share = np.log(p / (1 - p)) / (2 * _LARGEST) + 0.5
    return np.minimum(share * _BINS, _BINS - 1).astype(np.int64)
