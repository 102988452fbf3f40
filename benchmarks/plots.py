"""`aquifer bench plot`: the JSON lines of benchmarks as one picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"ours": "tab:blue", "peer": "tab:gray", "limit": "tab:green"}
_INCHES = (9.0, 0.35, 1.1)
"""Width of the picture; height of a bar; height of a panel's title and axis."""

_TITLE_CHARACTERS = 95
"""In a line above a panel: the names of the bars leave no room for more."""

_FAR_APART = 20.0
"""Times that are drawn on a logarithmic scale, the longest against the shortest. Others begin at zero."""


def plot(lines: Path, out: Path) -> None:
    """One panel for each line of the file, in order; one for throughput of one machine and length.

    Throughput is drawn against the number of contexts, kernels as percent of their limit, everything
    else as bars of time. Raises ValueError where the file holds no benchmark.
    """
    from matplotlib import pyplot

    shared = _sharing(_read(lines))
    heights = [_INCHES[2] + _INCHES[1] * max(4, len(reports[0]["rows"])) for reports in shared]
    figure, panels = pyplot.subplots(
        len(shared),
        1,
        figsize=(_INCHES[0], sum(heights)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axes, reports in zip(panels[:, 0], shared, strict=True):
        _panel(axes, reports)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _read(lines: Path) -> list[dict[str, Any]]:
    reports = []
    for number, line in enumerate(lines.read_text(encoding="utf-8").splitlines(), 1):
        try:
            report = json.loads(line)
            if not report["rows"]:
                continue
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{lines}:{number}: not the last line of a benchmark") from error
        reports.append(report)
    if not reports:
        raise ValueError(f"{lines} holds no benchmark")
    return reports


def _sharing(reports: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Those of each panel."""
    panels: dict[object, list[dict[str, Any]]] = {}
    for number, report in enumerate(reports):
        panel: object = number
        if report["benchmark"] == "throughput":
            panel = report["hardware"], report["setup"].get("geometry"), report["setup"].get("tokens")
        panels.setdefault(panel, []).append(report)
    return list(panels.values())


def _panel(axes: Axes, reports: Sequence[dict[str, Any]]) -> None:
    report = reports[0]
    alike = set.intersection(*(set(other["setup"].items()) for other in reports))
    setup = {
        key: value for key, value in report["setup"].items() if value is not None and (key, value) in alike
    }
    shown = ", ".join(f"{key} {value}" for key, value in setup.items() if key != "repeat")
    title = textwrap.fill(f"{report['benchmark']}: {shown}", _TITLE_CHARACTERS)
    axes.set_title(f"{title}\n{report['hardware']}", fontsize=8, loc="left")
    rows = report["rows"]
    if report["benchmark"] == "throughput":
        _lines(axes, reports)
    elif report["benchmark"] == "kernels":
        _bars(axes, rows, "of_limit_percent", "percent of the limit")
    elif report["benchmark"] == "longdoc":
        _bars(axes, rows, "ttft_p50_seconds", "seconds to the first token, median", logarithmic=True)
    else:
        _bars(axes, rows, "seconds", "seconds, median", logarithmic=True)


def _bars(
    axes: Axes, rows: Sequence[dict[str, Any]], figure: str, label: str, *, logarithmic: bool = False
) -> None:
    """logarithmic: where short bars could not be told apart otherwise."""
    kept = [row for row in rows if figure in row["figures"]][::-1]
    values = [row["figures"][figure] for row in kept]
    names = [row["name"] if row["role"] == "ours" else f"{row['role']}: {row['name']}" for row in kept]
    bars = axes.barh(names, values, color=[_COLOURS[row["role"]] for row in kept])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=7)
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel(label, fontsize=8)
    axes.margins(x=0.12)
    axes.set_ylim(-0.8, len(kept) - 0.2)  # margins grow with the bars
    if logarithmic and values and max(values) > _FAR_APART * min(values):
        axes.set_xscale("log")


def _lines(axes: Axes, reports: Sequence[dict[str, Any]]) -> None:
    cases: dict[str, dict[float, float]] = {}  # what was measured again replaces what was before
    for report in reports:
        when = f" ({report['date'][:10]})" if len(reports) > 1 else ""
        for row in report["rows"]:  # "case, 6 contexts"
            figures = row["figures"]
            points = cases.setdefault(row["name"].rpartition(",")[0] + when, {})
            points[figures["contexts"]] = figures["tokens_per_second"]
    for case, points in cases.items():
        axes.plot(*zip(*points.items(), strict=True), marker="o", label=case)
    axes.set_xlabel("contexts answered at once", fontsize=8)
    axes.set_ylabel("tokens per second", fontsize=8)
    axes.legend(fontsize=8)
