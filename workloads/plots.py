"""Pictures of a comparison: score against budget, score against bits, recall per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from aquifer.workloads.comparison import Summary

_MARKS = "osD^vPX*<>hp"
# Pairs of a dark and a light colour: all dark ones first.
_COLOURS = [colormaps["tab20"](2 * (number % 10) + number // 10) for number in range(20)]
_Styles = dict[str, dict[str, object]]


def plot_comparison(summaries: Sequence[Summary], path: Path) -> None:
    """Draw a row of three panels per task; the format follows from the file's name.

    Methods that differ in their budget only are one line.
    Raises ValueError for an unknown format, OSError where the file cannot be written.
    """
    tasks = list(dict.fromkeys(summary.task for summary in summaries))
    styles = _styles(summaries)
    figure = Figure(figsize=(14, 3.4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 3, squeeze=False)
    for (by_budget, by_bits, by_layer), task in zip(panels, tasks, strict=True):
        families: dict[str, list[Summary]] = {}
        for summary in summaries:
            if summary.task == task:
                families.setdefault(_family(summary.method), []).append(summary)
        by_budget.set_ylabel(f"{task}: score")
        by_budget.set_xscale("log")
        by_budget.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        _score_panel(by_budget, families, styles, "budget", "share of the prompt attended to")
        _score_panel(by_bits, families, styles, "bits", "bits stored per value, device and host")
        _recall_panel(by_layer, families, styles)
    handles = [Line2D([], [], label=family, **style) for family, style in styles.items()]  # type: ignore[arg-type]  # colour and marker
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=64)


def _styles(summaries: Sequence[Summary]) -> _Styles:
    families = list(dict.fromkeys(_family(summary.method) for summary in summaries))
    return {
        family: {"color": _COLOURS[number % 20], "marker": _MARKS[number % len(_MARKS)]}
        for number, family in enumerate(families)
    }


def _family(method: str) -> str:
    """The method without its budget."""
    name, *knobs = method.split(":")
    return ":".join((name, *knobs[1:]))


def _score_panel(
    axes: Axes, families: dict[str, list[Summary]], styles: _Styles, cost: str, label: str
) -> None:
    for family, members in families.items():
        members = sorted(members, key=lambda summary: float(getattr(summary, cost)))
        axes.errorbar(
            [getattr(summary, cost) for summary in members],
            [summary.score for summary in members],
            yerr=[summary.error or 0.0 for summary in members],
            capsize=2,
            alpha=0.8,
            **styles[family],  # type: ignore[arg-type]  # colour and marker
        )
    axes.set_xlabel(label)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)


def _recall_panel(axes: Axes, families: dict[str, list[Summary]], styles: _Styles) -> None:
    for family, members in families.items():
        for summary in members:
            if layers := summary.recall_by_layer:
                axes.plot(range(len(layers)), layers, alpha=0.8, **styles[family])  # type: ignore[arg-type]
    axes.set_xlabel("layer")
    axes.set_ylabel("oracle recall")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
