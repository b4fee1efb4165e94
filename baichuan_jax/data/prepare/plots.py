"""The pictures of the report: the paper's Figure 2 for this corpus, scores, sampling."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from baichuan_jax.data.prepare.survey import OTHER, Survey

# Colours that people with any kind of colour vision tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_GREYS = {OTHER: "#7a7a7a", "und": "#bdbdbd"}
_REMOVED = "#e8e8e8"
_NAME = 20  # characters of a group's name in a legend
_BARS = 48


def colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour a group of documents, of a language the same in all pictures."""
    named = [group for group in groups if group not in _GREYS]
    found = {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(named)}
    return {group: found.get(group) or _GREYS[group] for group in groups}


def funnel(
    path: epath.Path,
    stages: Sequence[str],
    kept: Mapping[str, Mapping[str, Sequence[float]]],
    paper: Mapping[str, float],
) -> None:
    """A bar a stage: what is left of the text after it, by groups, and what it removed.

    Args:
      stages: those to draw, the raw corpus first.
      kept: for each panel, by its title, the percent of the raw text after each stage by group.
      paper: by stage, the percent left in the paper.
    """
    rows = max(len(stages), 2 + max(map(len, kept.values())))  # of bars, or of the legend
    size = (9, len(kept) * (0.5 + 0.38 * rows) + 0.4)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(len(kept), sharex=True, squeeze=False).ravel()
    for axes, (title, groups) in zip(panels, kept.items(), strict=True):
        _funnel(axes, stages, groups, paper)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        handles, names = axes.get_legend_handles_labels()
        bars = [number for number, handle in enumerate(handles) if handle not in axes.lines]
        order = [*bars, *(number for number in range(len(handles)) if number not in bars)]
        axes.legend(
            [handles[number] for number in order], [names[number] for number in order],
            loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, handlelength=1.2,
        )  # fmt: skip
    panels[-1].set_xlabel("percent of the raw text (UTF-8 bytes)")
    _save(figure, path)


def _funnel(
    axes: Axes,
    stages: Sequence[str],
    kept: Mapping[str, Sequence[float]],
    paper: Mapping[str, float],
) -> None:
    places, left = np.arange(len(stages)), np.zeros(len(stages))
    for group, colour in colours(list(kept)).items():
        shares = np.array(kept[group])
        axes.barh(places, shares, 0.68, left, color=colour, label=_short(group))
        left += shares
    removed = -np.diff(left, prepend=left[0])
    lost = np.maximum(removed, 0)
    axes.barh(places, lost, 0.68, left, color=_REMOVED, label="removed here")
    for place, share in enumerate(left):
        note = f"{share:.1f}%" + (f"   −{removed[place]:.2f}" if removed[place] > 0.004 else "")
        end = (share + lost[place], place)
        axes.annotate(note, end, (4, 0), textcoords="offset points", va="center", fontsize=9)
    if marked := [place for place, stage in enumerate(stages) if stage in paper]:
        shares = [paper[stages[place]] for place in marked]
        axes.plot(shares, marked, "k|", markersize=14, markeredgewidth=1.8, label="left, paper")
    axes.set_yticks(places, ["raw", *stages[1:]])
    axes.invert_yaxis()
    axes.set_xlim(0, 122)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def scores(path: epath.Path, survey: Survey) -> None:
    """A small histogram for each score: documents by language, in grey those dropped.

    Scores that are the same for all documents but a thousandth on each side are left out.
    """
    varied = [
        (name, found)
        for name, found in survey.scores.items()
        if found.quantile(0.001) < found.quantile(0.999)
    ]
    columns = 4
    rows = max(1, math.ceil(len(varied) / columns))
    figure = Figure(figsize=(11, 0.5 + 1.75 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    palette = colours(survey.languages)
    drawn = {}
    for axes, ((stage, name), found) in zip(grid, varied, strict=False):
        counts, edges = found.histogram(outside=0.001, most=_BARS)
        if counts[-1].any():
            drawn["dropped by this stage"] = axes.stairs(
                _visible(counts[-1]), edges, baseline=0.5, fill=True, color=_REMOVED
            )
        for language, row in zip(survey.languages, counts, strict=False):
            if row.any():
                drawn[language] = axes.stairs(
                    _visible(row), edges, baseline=0.5, color=palette[language], linewidth=1.1
                )
        axes.set_title(f"{stage}: {name}", fontsize=8, loc="left")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(varied) :]:
        axes.set_visible(False)
    order = [name for name in (*survey.languages, "dropped by this stage") if name in drawn]
    figure.legend(
        [drawn[name] for name in order], order, loc="outside upper center", ncols=8, frameon=False
    )
    figure.supylabel("documents", fontsize=8)
    _save(figure, path)


def repeats(path: epath.Path, counts: Sequence[int]) -> None:
    """How many documents are sampled 0, 1, 2, … times."""
    figure = Figure(figsize=(5, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(np.arange(len(counts)), counts, 0.7, color=_COLOURS[0])
    axes.bar_label(bars, [f"{n:,}" for n in counts], fontsize=8, padding=2)
    axes.set_xticks(np.arange(len(counts)))
    axes.set(xlabel="times in the training data", ylabel="documents", ylim=(0, None))
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    _save(figure, path)


def _visible(counts: np.ndarray) -> np.ndarray:
    """Less than half a document, a bin shared between two bars, is nothing."""
    return np.where(counts < 0.5, 0.5, counts)


def _save(figure: Figure, path: epath.Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.getvalue())
