"""Pictures of a comparison: score against budget, score against bits, recall per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aquifer.workloads.comparison import Summary

_MARKS = "osD^vPX*<>hp"


def plot_comparison(summaries: Sequence[Summary], path: Path) -> None:
    """Draw one row of panels per task; the format follows from the file's name.

    Raises ValueError for an unknown format, OSError where the file cannot be written.
    """
    tasks = list(dict.fromkeys(summary.task for summary in summaries))
    figure = Figure(figsize=(15, 3.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 3, squeeze=False)
    colours = _colours(summaries)
    for row, task in zip(panels, tasks, strict=True):
        of_task = [summary for summary in summaries if summary.task == task]
        _score_panel(row[0], of_task, colours, "budget", "share of the prompt attended to")
        row[0].set_xscale("log")
        _score_panel(row[1], of_task, colours, "bits", "bits stored per value, device and host")
        _recall_panel(row[2], of_task, colours)
        row[0].set_ylabel(f"{task}: score")
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=70)


def _colours(summaries: Sequence[Summary]) -> dict[str, str]:
    methods = dict.fromkeys(summary.method for summary in summaries)
    families = list(dict.fromkeys(_family(method) for method in methods))
    return {method: f"C{families.index(_family(method)) % 10}" for method in methods}


def _family(method: str) -> str:
    """Methods that differ in their budget only."""
    name, *knobs = method.split(":")
    return ":".join((name, *knobs[1:]))


def _score_panel(
    axes: Axes, summaries: Sequence[Summary], colours: dict[str, str], cost: str, label: str
) -> None:
    families: dict[str, list[Summary]] = {}
    for summary in summaries:
        families.setdefault(_family(summary.method), []).append(summary)
    for number, (family, members) in enumerate(families.items()):
        members = sorted(members, key=lambda summary: float(getattr(summary, cost)))
        axes.errorbar(
            [getattr(summary, cost) for summary in members],
            [summary.score for summary in members],
            yerr=[summary.error or 0.0 for summary in members],
            color=colours[members[0].method],
            marker=_MARKS[number % len(_MARKS)],
            capsize=2,
            label=family,
        )
    axes.set_xlabel(label)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)


def _recall_panel(axes: Axes, summaries: Sequence[Summary], colours: dict[str, str]) -> None:
    """Of a family's budgets the one in the middle: recall hardly differs between them."""
    families: dict[str, list[Summary]] = {}
    for summary in summaries:
        if summary.recall_by_layer:
            families.setdefault(_family(summary.method), []).append(summary)
    for number, members in enumerate(families.values()):
        middle = sorted(members, key=lambda summary: summary.budget)[len(members) // 2]
        axes.plot(
            range(len(middle.recall_by_layer)),
            middle.recall_by_layer,
            color=colours[middle.method],
            marker=_MARKS[number % len(_MARKS)],
            label=f"{middle.method} ({fmean(middle.recall_by_layer):.2f})",
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("oracle recall")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    if families:
        axes.legend(fontsize="x-small", framealpha=0.5)
