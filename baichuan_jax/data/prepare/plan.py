"""What preparing so many tokens takes: core-hours, shuffle, memory, accelerators (§2.1).

Nothing is run: rates that were measured on one core, times what each stage has left to read. A
stage reads what the stages before it kept, by the funnel of the paper's Figure 2, or one of the
same shape that keeps another share.
"""

import dataclasses
import math
import textwrap
from collections.abc import Iterator

from baichuan_jax.parallel import chips

# Peak dense bfloat16 TFLOP/s of one accelerator.
ACCELERATORS = {chip.name: chip.flops * chip.per_chip / 1e12 for chip in chips.known()}

# Figure 2: percent of the raw text that each step removes; it keeps 31.68 %. Its unit is not
# told; this project counts UTF-8 bytes. Its heuristics are language, clean and privacy here.
PAPER_REMOVED = {
    "exact": 29.89,
    "clean": 1.77,
    "sentences": 3.06,
    "spans": 14.47,
    "documents": 19.13,
}

# Where the rates and the memory come from.
MEASURED = (
    "an AMD EPYC, Zen 5, AVX-512; 2026-11-24, `experiments.benchmark --what=data`; older servers:"
    " about half"
)
UNITS = {"group": "keys", "verify": "pairs", "components": "pairs", "compare": "FLOP"}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one core does in a second, by `UNITS` (else MB of text); see `MEASURED`.

    Those in MB are of whole stages, with all that they read and write.
    """

    ingest: float = 75
    language: float = 84
    exact: float = 360
    clean: float = 27
    privacy: float = 108
    sentences: float = 32
    spans: float = 30
    documents: float = 56  # without the candidates, which have rates of their own
    group: float = 9e6  # by band keys
    verify: float = 5e6  # candidates, by their signatures
    components: float = 5e6
    decontaminate: float = 66
    safety: float = 88
    embed: float = 23  # hashed n-grams, projected
    compare: float = 38e9  # cosines inside clusters
    quality: float = 74
    tokens: float = 6.4
    pack: float = 21


def _assumed(value: float, meaning: str) -> float:
    return dataclasses.field(default=value, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What the plan takes for granted about the text and the machines."""

    bytes_per_token: float = _assumed(4.2, "UTF-8, Chinese and English mixed")
    document_bytes: float = _assumed(4667.0, "of a raw document")
    sentence_bytes: float = _assumed(60.0, "of a sentence or paragraph")
    kept: float = _assumed(0.3168, "of the text after all stages (Figure 2)")
    compression: float = _assumed(2.5, "of text by zstd")
    pairs_per_document: float = _assumed(2.0, "candidates of the bands; one of four is accepted")
    edited: float = _assumed(0.07, "of the documents after `exact`: rewritten, and stored again")
    dimensions: int = _assumed(256, "of embeddings")
    iterations: int = _assumed(20, "of k-means, on 256 documents for each cluster")
    model_tokens: int = _assumed(512, "of a document that models read")
    embedding_flop: float = _assumed(6e7, "a token: 30 M parameters without a head")
    perplexity_flop: float = _assumed(1e8, "a token: the same with a head of 32,000")
    efficiency: float = _assumed(0.4, "of an accelerator's peak")
    disk: float = _assumed(30.0, "MB/s of shuffle for each core, written and read again")
    token_bytes: float = _assumed(1.7, "of a token, compressed")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the plan."""

    name: str
    text: float = 0.0  # bytes it reads
    core_hours: float = 0.0
    shuffle: float = 0.0  # bytes
    memory: float = 0.5  # GB of each worker, with shards of 64 MB
    accelerator_hours: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What so many tokens take.

    Attributes:
      storage: bytes that stay, by what they are.
      driver: bytes that the driver's process holds while it joins duplicates.
      sample: bytes that it holds while it fits the centroids of k-means.
    """

    rows: list[Row]
    storage: dict[str, float]
    driver: float
    sample: float

    def total(self, name: str) -> float:
        """The sum of a column."""
        return sum(getattr(row, name) for row in self.rows)

    def hours(self, cores: int, disk: float) -> float:
        """Wall time of all but the accelerators' work, where every core is always busy."""
        return (
            self.total("core_hours") / cores + self.total("shuffle") / (disk * 1e6 * cores) / 3600
        )


def plan(
    tokens: float,
    assumptions: Assumptions = Assumptions(),
    rates: Rates = Rates(),
    accelerator: str = "h100",
) -> Plan:
    """The plan for so many raw tokens.

    Raises:
      ValueError: names the argument and what would be right.
    """
    a = assumptions
    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens={tokens} must be a positive number, such as 1e12.")
    for name in ("kept", "edited"):
        if not 0 < getattr(a, name) <= 1:
            raise ValueError(f"{name}={getattr(a, name)} must be above 0 and at most 1.")
    for name, value in dataclasses.asdict(a).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be positive.")
    if accelerator not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise ValueError(f"accelerator={accelerator!r} must be one of {known}.")

    raw = tokens * a.bytes_per_token
    left = raw
    before = {}  # what each stage reads
    for stage, share in PAPER_REMOVED.items():
        before[stage] = left
        left -= raw * share * (1 - a.kept) / sum(PAPER_REMOVED.values())

    def hours(size: float, *rates: float) -> float:
        """Core-hours of stages that each read so many bytes."""
        return sum(size / 1e6 / rate for rate in rates) / 3600

    def accelerated(flop: float) -> float:
        return flop / (a.efficiency * ACCELERATORS[accelerator] * 1e12) / 3600

    raw_documents = raw / a.document_bytes
    compared = before["documents"] / a.document_bytes
    bands, pairs = 20 * compared, a.pairs_per_document * compared
    documents = left / a.document_bytes
    clusters = math.sqrt(documents)
    points = min(documents, 256 * clusters)
    fit = a.iterations * points * 2 * clusters * a.dimensions
    assign = documents * 2 * clusters * a.dimensions
    inside = documents * documents / clusters * a.dimensions  # of each pair one cosine
    r = rates
    rows = [
        Row("ingest", raw, hours(raw, r.ingest), memory=0.3),
        Row("language", raw, hours(raw, r.language), memory=0.4),
        Row("exact", raw, hours(raw, r.exact), 24 * raw_documents, 0.4),
        Row("filters, privacy", before["clean"], hours(before["clean"], r.clean, r.privacy)),
        Row("sentence quality", before["sentences"], hours(before["sentences"], r.sentences)),
        Row(
            "sentences, paragraphs",
            before["spans"],
            hours(before["spans"], r.spans),
            (16 + 5) * before["spans"] / a.sentence_bytes,  # hashes, then verdicts
        ),
        Row(
            "near-duplicate documents",
            before["documents"],
            hours(before["documents"], r.documents)
            + (bands / r.group + pairs / r.verify + pairs / r.components) / 3600,
            16 * bands + (16 + 144) * pairs,  # keys, pairs, and a signature beside each pair
        ),
        Row("decontamination", left, hours(left, r.decontaminate)),
        Row("safety, quality", left, hours(left, r.safety, r.quality)),
        Row(
            "embeddings, clusters",
            left,
            hours(left, r.embed) + inside / r.compare / 3600,
            (2 * a.dimensions + 16 + 20) * documents,
            accelerator_hours=accelerated(fit + assign),
        ),
        Row("tokens, packing", left, hours(left, r.tokens, r.pack), memory=0.8),
        Row(
            "embeddings by a model *",
            accelerator_hours=accelerated(documents * a.model_tokens * a.embedding_flop),
            memory=0,
        ),
        Row(
            "perplexity *",
            accelerator_hours=accelerated(documents * a.model_tokens * a.perplexity_flop),
            memory=0,
        ),
    ]
    storage = {
        "documents": raw / a.compression,
        "edited texts": a.edited * before["clean"] / a.compression,
        "signatures": 168 * compared,
        "embeddings": (2 * a.dimensions + 16) * documents,
        "tokens": left / a.bytes_per_token * a.token_bytes,
        "packed rows": left / a.bytes_per_token * a.token_bytes,
    }
    # Of an edge 105 bytes, measured; of a point its float16 numbers, and again as a device has it.
    return Plan(rows, storage, 105 * pairs / 4, 2 * 2 * a.dimensions * points)


def lines(
    tokens: float,
    cores: int = 1_000,
    assumptions: Assumptions = Assumptions(),
    rates: Rates = Rates(),
    accelerator: str = "h100",
) -> Iterator[str]:
    """The plan as a table, with its assumptions below; raises as `plan`."""
    if cores < 1:
        raise ValueError(f"cores={cores} must be positive.")
    a = assumptions
    found = plan(tokens, a, rates, accelerator)
    raw = tokens * a.bytes_per_token
    yield (
        f"{tokens:,.0f} raw tokens = {size(raw)} of text, {raw / a.document_bytes:,.0f} documents;"
        f" kept {a.kept:.2%}: {tokens * a.kept:,.0f} tokens"
    )
    yield ""
    yield (
        f"{'stage':27}{'reads':>10}{'core-hours':>12}{'shuffle':>10}{'GB/worker':>11}"
        f"{accelerator + '-hours':>14}"
    )
    for row in found.rows:
        text, shuffle, memory = size(row.text), size(row.shuffle), f"{row.memory:.1f}"
        yield (
            f"{row.name:27}{text:>10}{_number(row.core_hours):>12}{shuffle:>10}"
            f"{memory if row.memory else '':>11}{_number(row.accelerator_hours):>14}"
        )
    totals = {name: found.total(name) for name in ("core_hours", "shuffle", "accelerator_hours")}
    most = max(row.memory for row in found.rows)
    yield (
        f"{'total':27}{'':10}{_number(totals['core_hours']):>12}{size(totals['shuffle']):>10}"
        f"{most:>11.1f}{_number(totals['accelerator_hours']):>14}"
    )
    yield "* only with a model of ours; the first one then takes the place of the hashed embeddings"
    yield ""
    yield (
        f"On {cores:,} cores {_number(found.hours(cores, a.disk))} hours, shuffle included, if all"
        " are always busy."
    )
    yield (
        f"The driver's process holds {size(found.driver)} while it joins near duplicates, and"
        f" {size(found.sample)} of embeddings while it fits the centroids of k-means."
    )
    stays = ", ".join(f"{name} {size(stored)}" for name, stored in found.storage.items())
    yield f"Storage {size(sum(found.storage.values()))}: {stays}."
    yield ""
    yield "Assumed (each has a flag):"
    for field in dataclasses.fields(a):
        yield f"  {field.name:20}{getattr(a, field.name):<10g}{field.metadata['meaning']}"
    yield f"One core does in a second ({MEASURED}):"
    yield from textwrap.wrap(
        ", ".join(
            f"{field.name} {getattr(rates, field.name):g} {UNITS.get(field.name, 'MB')}"
            for field in dataclasses.fields(rates)
        ),
        width=98,
        initial_indent="  ",
        subsequent_indent="  ",
    )


def size(count: float) -> str:
    """Bytes for the eye: '4.20 TB'; nothing for none."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e6:.2f} MB" if count else ""


def _number(count: float) -> str:
    """Three digits at least, and no more behind the point than that takes."""
    return f"{count:,.{max(0, min(4, 2 - math.floor(math.log10(count))))}f}" if count else ""
