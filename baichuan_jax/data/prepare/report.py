"""What a prepared corpus tells about itself: `report.md` and `plots/*.png`.

The numbers are the stages' records; scores and examples come from one look at the attribute
tables (survey.py).
"""

import collections
import json
from collections.abc import Sequence

from etils import epath

from baichuan_jax.data.prepare import examples, plots
from baichuan_jax.data.prepare.config import OPTIONAL
from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.funnel import By, Funnel, largest, paper_left, percent
from baichuan_jax.data.prepare.markdown import Lines, code, heading, table
from baichuan_jax.data.prepare.plan import PAPER_REMOVED
from baichuan_jax.data.prepare.survey import OTHER, Survey, survey

_LANGUAGES, _SOURCES = 5, 24  # told apart; the others are summed up
_DRAWN = 5  # sources in the picture, each in a colour
_GROUPS_ABREAST = 3  # in a table
_WORST = 10  # files with bad rows
_COUNTING = ("language", "clean", "privacy", "sentences", "safety")  # tell sums of their counts


def report(
    workdir: epath.PathLike, corpus: Corpus, records: Sequence[dict], seed: int = 0
) -> epath.Path:
    """Writes the report of a prepared corpus.

    Args:
      workdir: gets `report.md` and `plots/`; has `rejects.jsonl` where rows were rejected.
      corpus: after all its stages.
      records: of the stages in their order, ingest first, as `stages/NAME.json` has them.
      seed: which examples are shown depends on it.

    Returns:
      The path of `report.md`.
    """
    workdir = epath.Path(workdir)
    funnel = Funnel(records)
    told = {record["name"]: record["told"] for record in records}
    by_language = largest(funnel, 1, _LANGUAGES)
    languages = [name for name in _names(funnel, by_language) if name != OTHER]
    found = survey(corpus, languages, seed)
    unit = _Unit(funnel.raw[1])
    lines = [
        *_summary(funnel, told, unit),
        *_funnel(workdir, funnel, by_language, unit),
        *_groups("By language", funnel, by_language, unit),
        *_groups("By source", funnel, largest(funnel, 0, _SOURCES), unit),
        *_reasons(funnel, unit),
        *_counted(told),
        *_decontamination(told.get("decontaminate", {})),
        *examples.clusters(corpus, told),
        *_sampling(workdir, told.get("mixture", {}), unit),
        *_shards(told.get("pack", {})),
        *_scores(workdir, found, told),
        *_rejects(workdir),
        *_times(records, funnel),
        *examples.dropped_and_cut(corpus, found),
    ]
    path = workdir / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


class _Unit:
    """Writes bytes in the unit in which the raw corpus has at least ten."""

    def __init__(self, raw: int):
        units = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
        self.name = next((name for name, size in units.items() if raw >= 10 * size), "kB")
        self._size = units[self.name]

    def __call__(self, size: float) -> str:
        return f"{size / self._size:,.2f}"


def _summary(funnel: Funnel, told: dict[str, dict], unit: _Unit) -> Lines:
    (raw, raw_bytes), (left, left_bytes) = funnel.raw, funnel.size(funnel.stages[-1])
    text = (
        f"{raw:,} documents of {unit(raw_bytes)} {unit.name} came in; {left:,} of"
        f" {unit(left_bytes)} {unit.name} are left, {percent(left_bytes, raw_bytes):.2f}% of the"
        " text."
    )
    if tokens := told.get("tokens"):
        ratio = tokens["bytes"] / max(1, tokens["tokens"])
        text += f" They are {tokens['tokens']:,} tokens of {ratio:.2f} bytes."
    if bad := told["ingest"].get("bad_rows"):
        text += f" {bad:,} rows could not be read."
    return ["# The prepared corpus", "", text]


def _funnel(workdir: epath.Path, funnel: Funnel, by_language: By, unit: _Unit) -> Lines:
    shown, left = funnel.shown(), paper_left()
    panels = {"by language": by_language, "by source": largest(funnel, 0, _DRAWN)}
    kept = {title: _kept(funnel, by, shown) for title, by in panels.items()}
    plots.funnel(workdir / "plots" / "funnel.png", shown, kept, left)
    rows = []
    for stage in shown:
        number, size = funnel.size(stage)
        paper = f"{left[stage]:.2f}" if stage in left else ""
        paper_removed = f"{PAPER_REMOVED[stage]:.2f}" if stage in left else ""
        removed = f"{funnel.removed(stage):.2f}" if stage != shown[0] else ""
        share = f"{percent(size, funnel.raw[1]):.2f}"
        rows.append((stage, f"{number:,}", unit(size), share, removed, paper, paper_removed))
    rows[0] = ("raw", *rows[0][1:-2], "100.00", "")
    unchanged = [stage for stage in funnel.stages if stage not in shown]
    absent = [stage for stage in OPTIONAL if stage not in funnel.stages]
    header = (
        "after stage", "documents", unit.name, "% left", "% removed",
        "paper, % left", "paper, % removed",
    )  # fmt: skip
    return [
        *heading("The funnel"),
        "![What is left after each stage, by language and by source](plots/funnel.png)",
        "",
        *table(header, rows),
        "",
        "Percent are of the raw text in UTF-8 bytes; the paper's Figure 2 does not tell its unit,"
        " and its heuristics stand beside `clean`."
        + (f" Nothing was removed by: {', '.join(unchanged)}." if unchanged else "")
        + (f" Left out, or without anything to go by: {', '.join(absent)}." if absent else ""),
    ]


def _kept(funnel: Funnel, by: By, stages: Sequence[str]) -> dict[str, list[float]]:
    """By group, the percent of the raw text that it has after each stage."""
    sizes = [funnel.sizes(stage, by) for stage in stages]
    return {
        name: [percent(size.get(name, (0, 0))[1], funnel.raw[1]) for size in sizes]
        for name in _names(funnel, by)
    }


def _groups(title: str, funnel: Funnel, by: By, unit: _Unit) -> Lines:
    """Documents, size and percent of each group after every stage."""
    names, shown = _names(funnel, by), funnel.shown()
    sizes = {stage: funnel.sizes(stage, by) for stage in shown}
    whole = {name: max(sizes[stage].get(name, (0, 0))[1] for stage in shown) for name in names}
    lines = heading(title, 3)
    for start in range(0, len(names), _GROUPS_ABREAST):
        part = names[start : start + _GROUPS_ABREAST]
        header = ["after stage"]
        for name in part:
            header += [f"{name}: documents", unit.name, "%"]
        rows = []
        for stage in shown:
            row = ["raw" if stage == funnel.stages[0] else stage]
            for name in part:
                number, size = sizes[stage].get(name, (0, 0))
                row += [f"{number:,}", unit(size), f"{percent(size, whole[name]):.2f}"]
            rows.append(row)
        lines += ["", *table(header, rows)] if start else table(header, rows)
    return lines


def _reasons(funnel: Funnel, unit: _Unit) -> Lines:
    rows = []
    for stage in funnel.shown()[1:]:
        dropped = funnel.dropped[stage]
        for reason, (number, size) in sorted(dropped.items(), key=lambda item: -item[1][1]):
            share = percent(size, funnel.raw[1])
            rows.append((stage, reason, f"{number:,}", unit(size), f"{share:.2f}"))
        cut = funnel.before(stage)[1] - funnel.size(stage)[1] - sum(s for _, s in dropped.values())
        if cut:
            share = f"{percent(cut, funnel.raw[1]):.2f}"
            rows.append((stage, "(edited in documents that stay)", "", unit(cut), share))
    header = ("stage", "reason", "documents", unit.name, "% of raw")
    return [
        *heading("What was dropped, and why"),
        *table(header, rows, left=2),
        "",
        "Examples of each stand at the end.",
    ]


def _counted(told: dict[str, dict]) -> Lines:
    rows = [
        (stage, name.replace("_", " "), f"{value:,}")
        for stage in _COUNTING
        for name, value in told.get(stage, {}).items()
        if isinstance(value, int)
    ]
    header = ("stage", "what it counted", "number")
    return ["", *table(header, rows, left=2)] if rows else []


def _decontamination(told: dict) -> Lines:
    if not told.get("sets"):
        return []
    rows = [
        (name, *(f"{of_set[field]:,}" for field in ("items", "long_enough", "seen", "documents")))
        for name, of_set in told["sets"].items()
    ]
    header = ("evaluation set", "items", "long enough to find", "found", "documents dropped")
    return [*heading("Evaluation sets in the corpus"), *table(header, rows)]


def _sampling(workdir: epath.Path, told: dict, unit: _Unit) -> Lines:
    if not told:
        return []
    plots.repeats(workdir / "plots" / "repeats.png", told["counts"])
    rows = [
        (
            name,
            f"{of_set['documents']:,}",
            f"{of_set['kept']:,}",
            f"{of_set['repeated']:,}",
            unit(of_set["bytes"]),
            unit(of_set["effective_bytes"]),
            f"{of_set['scale']:.3g}",
        )
        for name, of_set in told["sets"].items()
    ]
    header = (
        "set", "documents", "sampled", "more than once", unit.name, f"{unit.name} sampled", "scale",
    )  # fmt: skip
    return [
        *heading("Sampling"),
        *table(header, rows),
        "",
        "A document's weight is the product of its factors and its set's scale; the weights are"
        " among the scores below.",
        "",
        "![How often documents are sampled](plots/repeats.png)",
    ]


def _shards(told: dict) -> Lines:
    if "sets" not in told:
        return []
    total = sum(told["weights"].values())
    rows = [
        (
            name,
            split,
            f"{part['documents']:,}",
            f"{part['tokens']:,}",
            f"{part['rows']:,}",
            f"{100 * part['padding']:.2f}",
            f"{percent(told['weights'][name], total):.2f}" if split == "train" else "",
        )
        for name, of_set in told["sets"].items()
        for split, part in of_set.items()
    ]
    header = ("set", "split", "documents", "tokens", "rows", "% padding", "% of the mix")
    return [
        *heading("The shards"),
        *table(header, rows, left=2),
        "",
        "Documents are counted as often as they are sampled.",
    ]


def _scores(workdir: epath.Path, found: Survey, told: dict[str, dict]) -> Lines:
    if not found.scores:
        return []
    plots.scores(workdir / "plots" / "scores.png", found)
    rows = []
    for (stage, name), scores in found.scores.items():
        quantiles = [f"{scores.quantile(share):.3g}" for share in (0, 0.05, 0.5, 0.95, 1)]
        total = int(scores.counts[:-1].sum())
        rows.append((f"{stage}: {name}", f"{total:,}", *quantiles))
    header = ("score", "documents", "least", "5%", "median", "95%", "most")
    return [
        *heading("Scores"),
        "![Histograms of the scores](plots/scores.png)",
        "",
        "The pictures leave out a thousandth of the documents on each side. Quantiles, to 1%:",
        "",
        *table(header, rows),
        *_classifiers(told),
    ]


def _classifiers(told: dict[str, dict]) -> Lines:
    rows = [
        (
            stage,
            language,
            *(f"{number:,}" for number in measured["documents"]),
            f"{sum(measured['held_out']):,}",
            f"{100 * measured['accuracy']:.2f}",
            f"{measured['auc']:.4f}",
        )
        for stage in ("safety", "quality")
        for language, measured in told.get(stage, {}).items()
        if isinstance(measured, dict)
    ]
    header = (
        "classifier", "language", "positive examples", "negative", "held out of both",
        "% right of these", "AUC",
    )  # fmt: skip
    return ["", "The classifiers:", "", *table(header, rows, left=2)] if rows else []


def _rejects(workdir: epath.Path) -> Lines:
    path = workdir / "rejects.jsonl"
    reasons: collections.Counter[str] = collections.Counter()
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    if path.exists():
        with path.open("r") as lines:
            for line in lines:
                reject = json.loads(line)
                reasons[reject["reason"]] += 1
                files[reject["path"]][reject["reason"]] += 1
    if not reasons:
        return [*heading("Rows that could not be read"), "None."]
    worst = sorted(files.items(), key=lambda item: (-item[1].total(), item[0]))[:_WORST]
    return [
        *heading("Rows that could not be read"),
        f"All are listed in `{path.name}`.",
        "",
        *table(("reason", "rows"), [(r, f"{n:,}") for r, n in reasons.most_common()]),
        "",
        f"The worst of {len(files):,} files:" if len(files) > len(worst) else "By file:",
        "",
        *table(
            ("file", "rows", "most of them"),
            [(code(f, 200), f"{c.total():,}", c.most_common(1)[0][0]) for f, c in worst],
        ),
    ]


def _times(records: Sequence[dict], funnel: Funnel) -> Lines:
    total = sum(record["seconds"] for record in records)
    spent = [
        (record["name"], record["seconds"], funnel.before(record["name"])[1] or funnel.raw[1])
        for record in records
    ]
    rows = [
        (name, f"{s:,.1f}", f"{percent(s, total):.1f}", f"{size / s / 1e6:,.1f}" if s else "")
        for name, s, size in [*spent, ("all", total, funnel.raw[1])]
    ]
    return [
        *heading("Time"),
        *table(("stage", "seconds", "%", "MB/s"), rows),
        "",
        "Wall-clock time of all workers together; of a stage that was resumed, since then. MB/s"
        " are of the text that the stage was given.",
    ]


def _names(funnel: Funnel, by: By) -> list[str]:
    """The groups of sets, the largest first, all others at last."""
    sizes: collections.Counter[str] = collections.Counter()
    for stage in funnel.stages:
        for name, (_, size) in funnel.sizes(stage, by).items():
            sizes[name] = max(sizes[name], size)
    return sorted(sizes, key=lambda name: (name == OTHER, -sizes[name], name))
