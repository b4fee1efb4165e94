"""The paper's Figure 2 for any corpus: what is left of it after every stage."""

import collections
from collections.abc import Callable, Sequence

from baichuan_jax.data.prepare.plan import PAPER_REMOVED
from baichuan_jax.data.prepare.survey import OTHER

Size = tuple[int, int]  # documents, UTF-8 bytes
Set = tuple[str, str]  # source, language
By = Callable[[Set], str]  # the group that a set counts with


class Funnel:
    """Sizes after each stage, from the stages' records.

    Attributes:
      stages: their names, the first being that of the raw corpus.
      sets: by stage, the size of each set.
      dropped: by stage, the size of what it dropped for each reason.
    """

    def __init__(self, records: Sequence[dict]):
        self.stages = [record["name"] for record in records]
        self.sets: dict[str, dict[Set, Size]] = {}
        self.dropped: dict[str, dict[str, Size]] = {}
        for record in records:
            counts, name = record["counts"], record["name"]
            self.sets[name] = {
                (key[0], key[1] or "und"): (n, size) for *key, n, size in counts["sets"]
            }
            self.dropped[name] = {reason: (n, size) for reason, n, size in counts["reasons"]}
        # The first stage names languages; if it drops none, the raw corpus counts by its names.
        if self.stages[1:2] == ["language"] and not self.dropped["language"]:
            self.sets[self.stages[0]] = self.sets["language"]

    @property
    def raw(self) -> Size:
        return self.size(self.stages[0])

    def size(self, stage: str) -> Size:
        """Documents and bytes after a stage."""
        return _sum(self.sets[stage].values())

    def before(self, stage: str) -> Size:
        """Documents and bytes that a stage was given; none for the first."""
        place = self.stages.index(stage)
        return self.size(self.stages[place - 1]) if place else (0, 0)

    def sizes(self, stage: str, by: By) -> dict[str, Size]:
        """Sizes of groups of sets after a stage."""
        groups = collections.defaultdict(list)
        for key, size in self.sets[stage].items():
            groups[by(key)].append(size)
        return {name: _sum(sizes) for name, sizes in groups.items()}

    def removed(self, stage: str) -> float:
        """Percent of the raw text that a stage dropped or cut; negative where text grew."""
        before = self.before(stage) if stage != self.stages[0] else self.raw
        return percent(before[1] - self.size(stage)[1], self.raw[1])

    def shown(self) -> list[str]:
        """The stages that changed anything, and those that the paper has."""
        return [
            stage
            for stage in self.stages
            if stage == self.stages[0]
            or stage in PAPER_REMOVED
            or self.size(stage) != self.before(stage)
        ]


def largest(funnel: Funnel, which: int, limit: int) -> By:
    """Groups of sets by source (0) or language (1): the `limit` largest, all others together.

    The size of a group is the largest that it has after any stage, for languages get known on
    the way.
    """
    most: collections.Counter[str] = collections.Counter()
    for stage in funnel.stages:
        for name, (_, size) in funnel.sizes(stage, lambda key: key[which]).items():
            most[name] = max(most[name], size)
    names = {name for name, _ in most.most_common(limit)}
    return lambda key: key[which] if key[which] in names else OTHER


def paper_left() -> dict[str, float]:
    """By stage, percent of the raw text that is left in the paper."""
    left, found = 100.0, {}
    for stage, removed in PAPER_REMOVED.items():
        left -= removed
        found[stage] = round(left, 2)
    return found


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def _sum(sizes) -> Size:
    sizes = list(sizes)
    return sum(n for n, _ in sizes), sum(size for _, size in sizes)
