"""Trains a `linear.Linear` on two sets of examples, in JAX, within seconds (§2.1, §4).

The examples are cut into windows of tokens, and each step sees a random stretch of each window
of its batch, so that a sentence is scored as well as a page. Half of a batch is positive,
whatever the sizes of the sets. A tenth of the documents, chosen by their text, is held out: it
measures the classifier, and scales its log-odds so that of passages with probability p about
the share p is positive.

The same examples and seed give the same classifier.

Shapes: N windows, T tokens of a window, B windows of a batch, W weights.
"""

import collections
import dataclasses
import hashlib
import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
from etils import epath

from baichuan_jax.data import sources
from baichuan_jax.data.document import Document
from baichuan_jax.data.prepare import language, linear, text
from baichuan_jax.data.prepare.language import LanguageConfig
from baichuan_jax.data.prepare.linear import ANY, BITS, Linear

DOCUMENTS = 1 << 15  # of each set; of more, a random sample
CHARACTERS = 1 << 14  # of each document; of more, a random stretch
WINDOW = 128  # tokens
WINDOWS = 1 << 15  # of each set, and WINDOWS_EACH of each document
WINDOWS_EACH = 16
SHORTEST = 8  # tokens of a stretch
BATCH = 256
EPOCHS = 4
LEARNING_RATE = 1.0
HELD_OUT = 0.1
LEAST = 50  # documents of each set, to train at all
LEAST_OF_LANGUAGE = 500  # documents of a language in each set, for a head of its own


@dataclasses.dataclass(frozen=True)
class Examples:
    """Windows of one set's documents, or of both; the tokens of window n are the first sizes[n]."""

    singles_NT: np.ndarray  # int32, the weights of the tokens
    pairs_NT: np.ndarray  # int32, and of each token with the one after it
    sizes_N: np.ndarray  # int32

    def take(self, places: np.ndarray) -> "Examples":
        return Examples(*(getattr(self, f.name)[places] for f in dataclasses.fields(self)))


def fit(
    positive: str,
    negative: str,
    path: str,
    *,
    fields: tuple[str, str, str],
    simplify: bool = False,
    seed: int = 0,
    **reading: str,
) -> tuple[Linear | None, dict]:
    """The classifier that a config asks for: a trained one, one to be trained, or none.

    Args:
      positive, negative: sources of examples.
      path: of a saved classifier.
      fields: the names of these three, for messages.
      simplify, seed, reading: as for `train`.

    Returns:
      The classifier, and what there is to report about it.

    Raises:
      ValueError: as `linear.check_choice` and `train`.
    """
    linear.check_choice(fields, positive, negative, path)
    if path:
        found = linear.load(epath.Path(path).expanduser())
        return found, {"classifier": path, "fingerprint": found.fingerprint}
    if not positive:
        return None, {}
    return train(positive, negative, fields=fields[:2], simplify=simplify, seed=seed, **reading)


def train(
    positive: str | Sequence[str],
    negative: str | Sequence[str],
    *,
    fields: tuple[str, str] = ("positive", "negative"),
    simplify: bool = False,
    seed: int = 0,
    **reading: str,
) -> tuple[Linear, dict]:
    """Trains a head for all languages, and one for each language with enough examples.

    Args:
      positive, negative: sources of examples, as `data.sources` reads them.
      fields: what to call them in messages.
      simplify: whether traditional Han counts as simplified.
      reading: `text_field`, `language_field` and so on of `sources.documents`.

    Returns:
      The classifier; and for each head, by language ('all' for the one of all): the documents
      of both sets, and `accuracy` and `auc` on those held out of them.

    Raises:
      ValueError: a source cannot be read; a set is empty or too small: names it.
    """
    sets: dict[str, list[Document]] = {}
    for label, (field, given) in enumerate(zip(fields, (positive, negative), strict=True)):
        found = _sample(sources.documents(given, **reading), random.Random(f"{seed}/{label}"))
        if len(found) < LEAST:
            raise ValueError(
                f"{field}: {given} has {len(found)} documents with text; a classifier needs"
                f" {LEAST} or more."
            )
        sets[field] = _with_languages(found)
    languages = [ANY, *_languages(*sets.values())]
    heads, report = [], {}
    for name in languages:
        chosen = [[d for d in found if name in (ANY, d.language)] for found in sets.values()]
        weights_W, bias, measured = _train_head(chosen, fields, simplify, seed)
        heads.append((weights_W, bias))
        report[name or "all"] = measured
    weights, biases = (np.stack(part).astype(np.float32) for part in zip(*heads, strict=True))
    classifier = Linear(weights, biases, tuple(languages), simplify)
    return classifier, {**report, "fingerprint": classifier.fingerprint}


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """How often a positive example scores above a negative one; a tie counts half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positive, negative = np.sum(labels == 1), np.sum(labels == 0)
    above = ranks[labels == 1].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def _sample(documents, rng: random.Random) -> list[Document]:
    """A uniform sample (reservoir), whatever the number of documents."""
    sample, seen = [], 0
    for document in documents:
        if not document.text.strip():
            continue
        seen += 1
        place = len(sample) if len(sample) < DOCUMENTS else rng.randrange(seen)
        if place >= DOCUMENTS:
            continue
        start = rng.randrange(max(1, len(document.text) - CHARACTERS + 1))
        piece = document.text[start : start + CHARACTERS]
        sample[place : place + 1] = [dataclasses.replace(document, text=piece)]
    return sample


def _with_languages(documents: list[Document]) -> list[Document]:
    """With the language that the pipeline finds, as the documents have it that are scored."""
    table = pa.table({name: [getattr(d, name) for d in documents] for name in ("text", "language")})
    found = language.language(table, LanguageConfig())["language"].to_pylist()
    return [dataclasses.replace(d, language=n) for d, n in zip(documents, found, strict=True)]


def _languages(*sets: list[Document]) -> list[str]:
    """The languages that both sets have enough of; none if one language is all there is."""
    counts = [collections.Counter(d.language for d in documents) for documents in sets]
    least = counts[0] & counts[1]  # the smaller number of both
    enough = {name for name, number in least.items() if number >= LEAST_OF_LANGUAGE}
    return sorted(enough - {language.UNKNOWN}) if len(counts[0] | counts[1]) > 1 else []


def _train_head(
    chosen: list[list[Document]], fields: tuple[str, str], simplify: bool, seed: int
) -> tuple[np.ndarray, float, dict]:
    """Weights, bias, and what is measured, of one head."""
    training, held_out, texts = [], [], []
    for field, documents in zip(fields, chosen, strict=True):
        sides = [[], []]
        for document in documents:
            sides[_is_held_out(document.text)].append(document.text)
        examples = [_examples(side, simplify) for side in sides]
        if not len(examples[0].sizes_N) or not len(examples[1].sizes_N):
            raise ValueError(
                f"{field}: its {len(documents)} documents are too few to hold a tenth of them out"
                " (copies are held out together)."
            )
        training.append(examples[0])
        held_out.append(examples[1])
        texts.append(sides[1])
    weights_W, bias = _optimise(training, np.random.default_rng(seed))
    slope, offset = _calibrate(*(_log_odds(weights_W, bias, part) for part in held_out))
    weights_W, bias = slope * weights_W, slope * bias + offset
    head = Linear(weights_W[None].astype(np.float32), np.float32([bias]), simplify=simplify)
    scores = [head.score(text.join(side)) for side in texts]
    labels = np.repeat([1, 0], [len(side) for side in texts])
    return (
        weights_W,
        bias,
        {
            "documents": [len(documents) for documents in chosen],
            "held_out": [len(side) for side in texts],
            "accuracy": round(
                float(np.mean([np.mean(scores[0] > 0.5), np.mean(scores[1] <= 0.5)])), 4
            ),
            "auc": round(auc(np.concatenate(scores), labels), 4),
        },
    )


def _is_held_out(content: str) -> bool:
    share = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest()) / 2**64
    return share < HELD_OUT


def _examples(texts: list[str], simplify: bool) -> Examples:
    """Windows of all texts, evenly over each; of too many, evenly over all."""
    found = []
    for rows in text.batches(texts):
        tokens = text.tokens(text.join(texts[rows]), simplify)
        singles, pairs = linear.features(tokens.hashes)
        counts = np.diff(tokens.rows)
        each = np.minimum(-(-counts // WINDOW), WINDOWS_EACH)
        number = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        room = np.repeat(np.maximum(counts - WINDOW, 0), each)
        starts = np.repeat(tokens.rows[:-1], each)
        starts += room * number // np.maximum(np.repeat(each, each) - 1, 1)
        at_NT = np.minimum(starts[:, None] + np.arange(WINDOW), max(len(singles) - 1, 0))
        pairs = np.append(pairs, 0)
        sizes = np.minimum(np.repeat(counts, each), WINDOW)
        found.append([x.astype(np.int32) for x in (singles[at_NT], pairs[at_NT], sizes)])
    if not found:
        return Examples(*np.zeros((2, 0, WINDOW), np.int32), np.zeros(0, np.int32))
    examples = Examples(*map(np.concatenate, zip(*found, strict=True)))
    size = len(examples.sizes_N)
    return examples.take(np.linspace(0, size - 1, min(size, WINDOWS)).astype(np.int64))


def _optimise(sets: list[Examples], rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Logistic regression: weights [W] and the bias."""
    half = BATCH // 2
    steps = EPOCHS * -(-max(len(part.sizes_N) for part in sets) // half)
    places, first = [], 0
    for part in sets:  # each set is gone through again and again, in a new order each time
        size = len(part.sizes_N)
        rounds = -(-steps * half // size)
        order = np.concatenate([rng.permutation(size) for _ in range(rounds)])[: steps * half]
        places.append(first + order.reshape(steps, half))
        first += size
    places_SB = np.concatenate(places, axis=1)
    every = [
        np.concatenate([getattr(part, f.name) for part in sets])
        for f in dataclasses.fields(Examples)
    ]
    # Stretches of any length from SHORTEST on; each scale of lengths equally often.
    sizes_SB = every[2][places_SB]
    shortest = np.minimum(sizes_SB, SHORTEST)
    lengths_SB = shortest * (sizes_SB / shortest) ** rng.random(places_SB.shape)
    lengths_SB = np.minimum(np.rint(lengths_SB), sizes_SB).astype(np.int32)
    starts_SB = (rng.random(places_SB.shape) * (sizes_SB - lengths_SB + 1)).astype(np.int32)
    with jax.default_device(_device()):
        weights_W, bias = _descend(
            every[0], every[1], places_SB.astype(np.int32), starts_SB, lengths_SB
        )
        return np.asarray(weights_W, np.float64), float(bias)


def _device() -> jax.Device:
    """The CPU where JAX has it: some accelerators add up gradients in any order."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


@jax.jit
def _descend(singles_NT, pairs_NT, places_SB, starts_SB, lengths_SB):
    steps = places_SB.shape[0]
    schedule = optax.linear_schedule(LEARNING_RATE, 0.0, steps)
    tx = optax.adam(schedule)
    labels_B = (jnp.arange(BATCH) < BATCH // 2).astype(jnp.float32)
    params = (jnp.zeros(1 << BITS, jnp.float32), jnp.zeros((), jnp.float32))

    def loss(params, places_B, starts_B, lengths_B):
        z_B = _stretches(*params, singles_NT[places_B], pairs_NT[places_B], starts_B, lengths_B)
        return optax.sigmoid_binary_cross_entropy(z_B, labels_B).mean()

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(loss)(params, *batch)
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(
        step, (params, tx.init(params)), (places_SB, starts_SB, lengths_SB)
    )
    return params


def _stretches(weights_W, bias, singles_BT, pairs_BT, starts_B, lengths_B):
    """Log-odds of stretches of windows, as `Linear` has them."""
    at_T = jnp.arange(singles_BT.shape[1])
    inside = (at_T >= starts_B[:, None]) & (at_T < (starts_B + lengths_B)[:, None])
    paired = inside & (at_T + 1 < (starts_B + lengths_B)[:, None])
    sums_B = jnp.sum(jnp.where(inside, weights_W[singles_BT], 0.0), axis=1)
    sums_B += jnp.sum(jnp.where(paired, weights_W[pairs_BT], 0.0), axis=1)
    return bias + sums_B / (2 * lengths_B - 1)


def _log_odds(weights_W: np.ndarray, bias: float, examples: Examples) -> np.ndarray:
    """Of whole windows, float64 [N]."""
    at_T = np.arange(WINDOW)
    sums = np.where(at_T < examples.sizes_N[:, None], weights_W[examples.singles_NT], 0).sum(1)
    inside = at_T + 1 < examples.sizes_N[:, None]
    sums += np.where(inside, weights_W[examples.pairs_NT], 0).sum(1)
    return bias + sums / (2 * examples.sizes_N - 1)


def _calibrate(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """Slope and offset that make log-odds fit best (Platt), both sets weighing the same.

    The targets stay off 0 and 1, as his do, so that sets that are apart give finite ones.
    """
    z = np.concatenate([positive, negative])
    sizes = np.array([len(positive), len(negative)])
    targets = np.repeat([(sizes[0] + 1) / (sizes[0] + 2), 1 / (sizes[1] + 2)], sizes)
    shares = np.repeat(0.5 / sizes, sizes)
    inputs = np.stack([z, np.ones_like(z)])

    def loss(line):
        return shares @ (np.logaddexp(0, line @ inputs) - targets * (line @ inputs))

    line = np.array([1.0, 0.0])
    for _ in range(100):  # Newton's method; the loss is convex
        p = 1 / (1 + np.exp(-np.clip(line @ inputs, -60, 60)))
        gradient = inputs @ (shares * (p - targets))
        curvature = (inputs * (shares * p * (1 - p))) @ inputs.T + 1e-9 * np.eye(2)
        change = np.linalg.solve(curvature, gradient)
        while np.abs(change).max() > 1e-9 and loss(line - change) > loss(line):
            change = change / 2
        line = line - change
    return float(line[0]), float(line[1])
