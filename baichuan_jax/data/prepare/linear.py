"""A linear classifier over hashed tokens and pairs of tokens, for quality and safety (§2.1, §4).

    log-odds = bias + mean over the features of their weights

The features of a text are its tokens and each two tokens after each other. A feature's weight
is found by the upper bits of its hash, so there is no vocabulary, and text in any language is
scored as fast as its tokens are found. `linear_training` makes the weights.

Shapes: N texts, K tokens, S spans, H heads, W weights of a head.
"""

import dataclasses
import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from baichuan_jax.data.prepare import text
from baichuan_jax.data.prepare.corpus import whole
from baichuan_jax.data.prepare.text import Joined, Spans, Tokens

BITS = 20  # of a hash: W = 2^20, 4 MB a head
ANY = ""  # the language of the head for all that has no head of its own

_SHIFT = np.uint64(64 - BITS)
_PAIR_MULTIPLIER = np.uint64(0xC2B2AE3D27D4EB4F)  # the second 64-bit prime of xxHash


@dataclasses.dataclass(frozen=True)
class Linear:
    """Weights of one head for each language that has one, and of one for all others."""

    weights: np.ndarray  # float32 [H, W]
    biases: np.ndarray  # float32 [H]
    languages: tuple[str, ...] = (ANY,)  # [H]; ANY first
    simplify: bool = False  # traditional Han counts as simplified

    def score(self, joined: Joined, languages: Sequence[str | None] | None = None) -> np.ndarray:
        """float32 [N]: the probability that each text is like the positive examples.

        An empty text has what the bias says.

        Args:
          languages: of the texts; None: the head for all languages scores all of them.
        """
        return self.score_tokens(text.tokens(joined, self.simplify), languages)

    def score_tokens(
        self, tokens: Tokens, languages: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """As `score`, for tokens that are there already (found with this `simplify`)."""
        return self._probabilities(tokens, tokens.rows, self._heads(languages, len(tokens.rows)))

    def score_spans(
        self, joined: Joined, spans: Spans, languages: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """float32 [S]: as `score`, for sentences or paragraphs; `languages` are of the texts."""
        tokens = text.tokens(joined, self.simplify)
        bounds = np.searchsorted(tokens.starts, np.append(spans.starts, len(joined.codes)))
        heads = self._heads(languages, len(spans.rows))
        return self._probabilities(tokens, bounds, np.repeat(heads, np.diff(spans.rows)))

    def _heads(self, languages: Sequence[str | None] | None, num_rows: int) -> np.ndarray:
        heads = np.zeros(num_rows - 1, np.int64)
        if languages is not None:
            places = {language: head for head, language in enumerate(self.languages)}
            heads[:] = [places.get(language, 0) for language in languages]
        return heads

    def _probabilities(self, tokens: Tokens, bounds: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Of stretches of tokens, which lie between the bounds and leave none out."""
        counts = np.diff(bounds)
        singles, pairs = features(tokens.hashes)
        if heads.any():  # all heads are one table
            first_weights = np.repeat(heads << BITS, counts)
            singles, pairs = singles + first_weights, pairs + first_weights[:-1]
        table = self.weights.reshape(-1)
        values = table[singles]
        of_pairs = table[pairs]
        ends = bounds[(bounds > 0) & (bounds <= len(pairs))] - 1
        of_pairs[ends] = 0.0  # no pair reaches into the next stretch
        values[:-1] += of_pairs
        log_odds = self.biases.astype(np.float64)[heads]
        full = counts > 0
        sums = np.add.reduceat(values, bounds[:-1][full], dtype=np.float64) if full.any() else 0
        log_odds[full] += sums / (2 * counts[full] - 1)
        return (1 / (1 + np.exp(-np.clip(log_odds, -60, 60)))).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the scores."""
        digest = hashlib.blake2b(self._settings().encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.weights))
        digest.update(np.ascontiguousarray(self.biases))
        return digest.hexdigest()

    def _settings(self) -> str:
        settings = {"languages": self.languages, "simplify": self.simplify, "bits": BITS}
        return json.dumps(settings, sort_keys=True)

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz file, whole or not at all; the same classifier gives the same bytes."""
        settings = {"settings": self._settings(), "fingerprint": self.fingerprint}
        with whole(epath.Path(path)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, weights=self.weights, biases=self.biases, **settings)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Linear":
        """Reads what `save` wrote; nothing in the file is executed.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no classifier of this version, or damaged.
        """
        try:
            with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as fields:
                settings = json.loads(str(fields["settings"]))
                found = cls(
                    fields["weights"],
                    fields["biases"],
                    tuple(settings["languages"]),
                    settings["simplify"],
                )
                fingerprint = str(fields["fingerprint"])
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
            raise ValueError(f"{path} is no saved classifier: {error}.") from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}.") from None
        heads = len(found.languages)
        if found.weights.shape != (heads, 1 << BITS) or found.biases.shape != (heads,):
            raise ValueError(
                f"{path} has weights {found.weights.shape} and biases {found.biases.shape} for"
                f" {heads} languages; they should be ({heads}, {1 << BITS}) and ({heads},)."
            )
        if found.fingerprint != fingerprint:
            raise ValueError(f"{path} is damaged: its weights are not those that were saved.")
        return found


def load(path: epath.PathLike) -> Linear:
    """`Linear.load`, once in a process for as long as the file stays as it is."""
    stat = epath.Path(path).stat()
    return _load(str(path), stat.length, stat.mtime)


@functools.lru_cache(maxsize=4)
def _load(path: str, *_: float) -> Linear:
    return Linear.load(path)


def check_choice(fields: tuple[str, str, str], positive: str, negative: str, path: str) -> None:
    """Raises a ValueError unless a config asks for one classifier that it can have, or for none.

    Args:
      fields: the names of what follows.
      positive, negative: sources of examples, to train one.
      path: of one that is saved.
    """
    if path and (positive or negative):
        raise ValueError(
            f"{fields[2]}={path} is trained already: leave {fields[0]} and {fields[1]} empty."
        )
    if bool(positive) != bool(negative):
        (given, other), value = (fields[:2], positive) if positive else (fields[1::-1], negative)
        raise ValueError(f"{given}={value} needs {other}, too: a classifier is trained on both.")
    if path:
        try:
            load(epath.Path(path).expanduser())
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{fields[2]}={path}: {error}") from None


def features(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features' weights, by number, of tokens after each other.

    Args:
      hashes: uint64 [K] of `text.tokens`.

    Returns:
      int64 [K] of each token, and int64 [K - 1] of each token with the one after it.
    """
    pairs = hashes[:-1] * _PAIR_MULTIPLIER
    pairs += hashes[1:]
    pairs >>= _SHIFT
    return (hashes >> _SHIFT).view(np.int64), pairs.view(np.int64)
