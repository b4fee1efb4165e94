"""Documents in the report: the largest clusters, what was dropped, what was cut from texts."""

from collections.abc import Sequence

from baichuan_jax.data.prepare.corpus import Corpus
from baichuan_jax.data.prepare.markdown import Lines, code, heading
from baichuan_jax.data.prepare.survey import Survey, documents

_SHOWN = 160  # characters of a document
_CONTEXT = 40  # characters before and after a passage that was cut
_CLUSTERS, _OF_CLUSTER = 10, 3  # clusters that are shown, and documents of each
_ENDS = "\n。！？；…"  # of sentences
_MASKED = "privacy"  # what this stage edits is not for showing


def clusters(corpus: Corpus, told: dict[str, dict]) -> Lines:
    """The largest clusters of each kind of duplicates, by what the stages told."""
    lines: Lines = []
    if groups := told.get("exact", {}).get("largest"):
        lines += heading("Exact copies", 3)
        shown = [(f"{group['copies']:,} copies", [group["document"]]) for group in groups]
        lines += _listed(_before(corpus, "exact"), shown)
    if groups := told.get("spans", {}).get("largest"):
        lines += heading("Paragraphs that most documents have", 3)
        for group in groups[:_CLUSTERS]:
            lines.append(f"- {group['documents']:,} documents: {code(group['text'], _SHOWN)}")
    if groups := told.get("documents", {}).get("largest"):
        lines += heading("Near-duplicate documents", 3)
        lines += ["The first document of each is the one that is kept.", ""]
        shown = [
            (f"{group['size']:,} documents", [group["kept"], *group["members"]]) for group in groups
        ]
        lines += _listed(_before(corpus, "documents"), shown)
    semantic = told.get("clusters", {})
    if groups := semantic.get("largest"):
        lines += heading("Clusters of embeddings", 3)
        shares = ", ".join(f"{100 * x:.2f}% at {e}" for e, x in semantic["dropped_at"].items())
        lines += [
            f"{semantic['documents']:,} documents in {semantic['clusters']:,} clusters. Semantic"
            f" deduplication would drop, by its epsilon, {shares}. The clusters with most"
            " documents, and what is nearest to their centres:",
            "",
        ]
        shown = []
        for group in groups:
            sources = ", ".join(f"{source} {n:,}" for source, n in group["sources"].items())
            shown.append((f"{group['documents']:,} documents ({sources})", group["examples"]))
        lines += _listed(_before(corpus, "clusters"), shown)
    return [*heading("The largest clusters"), *lines[1:]] if lines else []


def dropped_and_cut(corpus: Corpus, found: Survey) -> Lines:
    """Examples of what each stage dropped, by reason, and of what it cut from other texts."""
    lines = [
        *heading("Examples"),
        f"Chosen by a hash. Each is the start of a document as the stage found it, {_SHOWN}"
        " characters at most; what `privacy` masks later is not masked here.",
    ]
    for stage in corpus.stages:
        before = _before(corpus, stage)
        dropped = {reason: ids for (by, reason), ids in found.dropped.items() if by == stage}
        edited = found.edited.get(stage, []) if stage != _MASKED else []
        texts = documents(before, [n for ids in (*dropped.values(), edited) for n in ids])
        for reason, ids in sorted(dropped.items()):
            lines += heading(f"{stage}: {reason}", 3)
            lines += [_shown(texts[number]) for number in ids]
        if edited:
            after = documents(before.after(stage), edited)
            lines += heading(f"{stage}: cut from documents that stay", 3)
            for number in edited:
                passage = cut(texts[number]["text"], after[number]["text"])
                lines.append(_shown(texts[number] | {"text": passage}, len(passage)))
    return lines


def cut(before: str, after: str) -> str:
    """The first passage that an edit took out of a text, as [-…-] between what stands beside it."""
    both = enumerate(zip(before, after, strict=False))
    start = next((n for n, (a, b) in both if a != b), min(len(before), len(after)))
    end = len(before)
    for size in (256, 64, 16, 4):  # of what follows the passage, enough to find it again
        follows = after[start : start + size]
        if follows and (place := before.find(follows, start)) >= 0:
            end = place
            break
    # What begins like its successor stood some characters earlier, where a sentence begins.
    for shift in range(min(start, end - start) + 1):
        if shift and before[start - shift] != before[end - shift]:
            break
        if shift == start or before[start - shift - 1] in _ENDS:
            start, end = start - shift, end - shift
            break
    context, rest = before[max(0, start - _CONTEXT) : start], before[end : end + _CONTEXT]
    passage = before[start:end]
    passage = f"{passage[:_SHOWN]}…" if len(passage) > _SHOWN else passage
    return f"{context}[-{passage}-]{rest}"


def _before(corpus: Corpus, stage: str) -> Corpus:
    return Corpus(corpus.directory, corpus.stages[: corpus.stages.index(stage)])


def _listed(corpus: Corpus, groups: Sequence[tuple[str, list[int]]]) -> Lines:
    groups = [(title, ids[:_OF_CLUSTER]) for title, ids in groups[:_CLUSTERS]]
    texts = documents(corpus, [number for _, ids in groups for number in ids])
    lines = []
    for title, ids in groups:
        lines.append(f"- {title}:")
        lines += [f"  {_shown(texts[number])}" for number in ids]
    return lines


def _shown(document: dict[str, str], size: int = _SHOWN) -> str:
    origin = code(document["origin"], _SHOWN)
    return f"- {document['source']}, {origin}: {code(document['text'], size)}"
