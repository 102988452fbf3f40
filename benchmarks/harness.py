"""What every benchmark shares: how time is taken, and how figures are shown and kept.

A measurement runs all contestants in turn, again and again, so that whatever else the machine does
meets all of them alike; the figure of each is the median of its runs. Clocks are device events on CUDA
and a monotonic clock elsewhere, always around work that has ended.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

Role = Literal["ours", "peer", "limit"]
Run = Callable[[], float]
"""One run of one contestant; returns the seconds it took. What it prepares outside of them is not counted."""

_BUSY_SHARE = 0.5
"""Of the cores: with more of them at work before a benchmark begins, its times are not its own."""

_FILE_WIDTH = 160
"""Columns of a table that does not go to a terminal."""

PACKAGES = ("torch", "transformers", "redis", "hiredis")


class LeftOutError(Exception):
    """A contestant cannot take part here; the message says why in one line."""


@dataclass(frozen=True, eq=False)
class Contestant:
    """Something to be timed: `run` does it once."""

    name: str
    role: Role
    run: Run


@dataclass(frozen=True)
class Row:
    """One line of a result. figures: numbers by name, the unit at the end of the name: `_seconds`,
    `_bytes`, `_gb_per_second` (1e9 bytes), `_tokens_per_second`; `times`, `percent` have none."""

    name: str
    role: Role
    figures: dict[str, float]


@dataclass
class Report:
    """The result of one benchmark. rows: what was measured; the first of ours is what ratios refer to, unless
    `compare` names another.
    left_out: contestants that could not take part, with the reason. notes: what a reader must know.
    load_average: how busy the machine was before; another job on the same cores spoils figures, and
    ratios less."""

    benchmark: str
    setup: dict[str, str | int | float | None]
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])

    def __post_init__(self) -> None:
        cores = os.cpu_count() or 1
        if self.load_average > _BUSY_SHARE * cores:
            self.notes.append(
                f"other jobs were running (load average {self.load_average:.1f} on {cores} cores): "
                "trust ratios, not times"
            )

    def measure(self, contestants: Sequence[Contestant], repeat: int) -> dict[str, Row]:
        """Run the contestants in turn, `repeat` times after one run to warm up, and add a row for each:
        the median of its seconds and their spread. One that raises LeftOutError is left out.

        Returns the new rows by name, for figures that follow from the seconds.
        """
        samples: dict[Contestant, list[float]] = {contestant: [] for contestant in contestants}
        try:
            for turn in range(repeat + 1):
                if turn == 1:  # what stands now is not searched for garbage again, as in a service
                    gc.collect()
                    gc.freeze()
                self._take_turns(samples, counted=turn > 0)
        finally:
            gc.unfreeze()
        rows = {}
        for contestant, runs in samples.items():
            figures = {"seconds": statistics.median(runs), "spread_percent": spread(runs)}
            rows[contestant.name] = Row(contestant.name, contestant.role, figures)
        self.rows += rows.values()
        return rows

    def _take_turns(self, samples: dict[Contestant, list[float]], *, counted: bool) -> None:
        """Run each contestant once; leave out for good who raises LeftOutError."""
        for contestant in list(samples):
            try:
                seconds = contestant.run()
            except LeftOutError as error:
                self.left_out[contestant.name] = str(error)
                del samples[contestant]
                continue
            if counted:
                samples[contestant].append(seconds)

    def compare(self, name: str | None = None) -> None:
        """Give every row the ratio of its seconds to those of one of our rows: `times` as long as that.

        name: of that row; None: the first."""
        ours = [row for row in self.rows if row.role == "ours" and name in (None, row.name)]
        for row in self.rows if ours else []:
            row.figures["times"] = row.figures["seconds"] / ours[0].figures["seconds"]

    def as_json(self) -> str:
        return json.dumps(asdict(self) | environment(), ensure_ascii=False)


def spread(runs: Sequence[float]) -> float:
    """How far the runs lie apart: the inner four fifths of them, in percent of the median."""
    if len(runs) < 2:
        return 0.0
    tenths = statistics.quantiles(runs, n=10, method="inclusive")
    return 100 * (tenths[-1] - tenths[0]) / statistics.median(runs)


def clocked(device: torch.device, work: Callable[[], object]) -> Run:
    """A run that times `work`."""
    return clocked_fresh(device, lambda: work)


def clocked_fresh(device: torch.device, prepare: Callable[[], Callable[[], object]]) -> Run:
    """A run that times what `prepare` returns, and not `prepare` itself, which makes fresh data."""

    def run() -> float:
        work = prepare()
        if device.type != "cuda":
            started = perf_counter()
            work()
            return perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return run


def show(report: Report, json_file: Path | None) -> None:
    """Print the table, what was left out, the notes, and last one line of JSON; append that to a file."""
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    names = list(dict.fromkeys(name for row in report.rows for name in row.figures))
    shown = " ".join(f"{key}={value}" for key, value in report.setup.items() if value is not None)
    table = Table("", *(_heading(name) for name in names), box=None, title=f"{report.benchmark}: {shown}")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report.rows:
        style = {"ours": "bold", "peer": None, "limit": "dim"}[row.role]
        label = row.name if row.role == "ours" else f"{row.role}: {row.name}"
        cells = (_cell(name, row.figures.get(name)) for name in names)
        table.add_row(label, *cells, style=style)
    console.print(table)
    for name, reason in report.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    line = report.as_json()
    if json_file is not None:
        with json_file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def environment() -> dict[str, object]:
    """Where and when: enough to repeat a measurement and to judge it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["aquifer", *sys.argv[1:]]),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def hardware() -> str:
    """The machine in words."""
    cpus = f"{os.cpu_count()}-core {platform.machine()} CPU"
    if not torch.cuda.is_available():
        return f"{cpus}, no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {cpus}"


def _heading(name: str) -> str:
    units = {
        "seconds": "ms",
        "bytes": "MB",
        "gb_per_second": "GB/s",
        "gflop_per_second": "GFLOP/s",
        "tokens_per_second": "tokens/s",
        "percent": "%",
    }
    for suffix, unit in units.items():
        if name == suffix:
            return unit
        if name.endswith(f"_{suffix}"):
            return f"{name.removesuffix(f'_{suffix}').replace('_', ' ')} {unit}"
    return name.replace("_", " ")


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.endswith("_per_second"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if name.endswith("seconds"):
        value *= 1e3
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f}"
    if name == "times":
        return f"{value:.3g}x"
    if name.endswith("percent"):
        return f"{value:.1f}"
    return f"{value:,.6g}"
