"""`aquifer eval`: quality of answers, alone, side by side with other offloading methods, and taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar, cast

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from aquifer.server.console import progress_bar
from aquifer.server.flags import fail, takes_settings
from aquifer.server.settings import Settings

if TYPE_CHECKING:
    from aquifer.workloads.comparison import ComparePlan, Record, Summary
    from aquifer.workloads.evaluation import Progress
    from aquifer.workloads.offload import Method
    from aquifer.workloads.tasks import TaskName

T = TypeVar("T")

# ruff: noqa: UP045  (typer cannot read `X | None` inside Annotated)


class _TaskByDefault(TyperGroup):
    """`aquifer eval TASK` measures one task, as if the command `task` stood before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["task", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=_TaskByDefault, no_args_is_help=True, help="Measure the quality of answers: `aquifer eval TASK`."
)

Tasks = Annotated[str, typer.Option(help="text2json, needles, table: any of them, with commas")]
Tokens = Annotated[int, typer.Option(min=512, help="of a generated prompt")]
Samples = Annotated[int, typer.Option(min=1, help="per task")]
Data = Annotated[
    Optional[Path],
    typer.Option(exists=True, dir_okay=False, help="JSON Lines with `problem` and `answer`"),
]
Chat = Annotated[bool, typer.Option(help="wrap prompts in the model's chat template")]
JsonFile = Annotated[
    Optional[Path],
    typer.Option("--json", dir_okay=False, help="records, sample by sample; what it holds is not run again"),
]


@eval_app.command("task")
@takes_settings
def evaluate(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="text2json, needles, table or perplexity")],
    kv: Annotated[str, typer.Option(help="full, raw, higgs:BITS, aqua:BITS or aqua:BITS:int8")] = "full",
    tokens: Annotated[int, typer.Option(min=256, help="of a generated prompt")] = 4096,
    samples: Annotated[int, typer.Option(min=1)] = 50,
    seed: int = 1,
    data: Data = None,
    batch: Annotated[int, typer.Option(min=1, help="prompts on the device together")] = 16,
    chat: Chat = False,
    mode: Annotated[str, typer.Option(help="resident, streamed, selective, verified or auto")] = "resident",
    budget: Annotated[
        Optional[float], typer.Option(min=0.001, max=1.0, help="of the prompt, for selective and verified")
    ] = None,
    json_file: Annotated[
        Optional[Path],
        typer.Option("--json", help="write the result, sample by sample"),
    ] = None,
) -> None:
    """Measure the quality of answers made from restored KV."""
    from typing import get_args

    from aquifer.server.engine.types import KVMode
    from aquifer.workloads import evaluation

    if task not in get_args(evaluation.EvalTask):
        fail(f"no task {task!r}; there are {', '.join(get_args(evaluation.EvalTask))}")
    if mode not in get_args(KVMode):
        fail(f"no mode {mode!r}; there are {', '.join(get_args(KVMode))}")
    plan = evaluation.EvalPlan(
        cast(evaluation.EvalTask, task),
        kv,
        tokens,
        samples,
        seed,
        data,
        batch,
        chat,
        cast(KVMode, mode),
        budget,
    )
    result = _with_progress(lambda show: evaluation.evaluate(plan, settings, show))
    if json_file is not None:
        evaluation.write_json(result, json_file)
    table = Table("figure", "value", box=None, show_header=False)
    for name, value in asdict(result).items():
        if value is not None and name != "sample_scores":
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


@eval_app.command()
@takes_settings
def compare(
    settings: Settings,
    methods: Annotated[
        str,
        typer.Option(
            help="NAME[:BUDGET][:KNOB=VALUE...], with commas; NAME is full, window, oracle, landmarks, "
            "chunks, shadowkv or quest"
        ),
    ] = "full,oracle:0.05,landmarks:0.05,chunks:0.05,shadowkv,quest:0.05,window:0.05",
    tasks: Tasks = "text2json,needles,table",
    tokens: Tokens = 8192,
    samples: Samples = 8,
    seed: int = 1,
    data: Data = None,
    chat: Chat = False,
    json_file: JsonFile = None,
    plot: Annotated[Optional[Path], typer.Option(dir_okay=False, help="picture to draw, PNG or SVG")] = None,
) -> None:
    """Compare offloading methods: each answers from a part of the same KV cache."""
    from aquifer.workloads.comparison import ComparePlan, methods_of, summarize
    from aquifer.workloads.plots import plot_comparison

    try:
        plan = ComparePlan(_tasks(tasks), methods_of(methods), tokens, samples, seed, data, chat)
    except ValueError as error:
        fail(str(error))
    summaries = summarize(_records(plan, settings, json_file))
    if plot is not None:
        try:
            plot_comparison(summaries, plot)
        except (ValueError, OSError) as error:
            fail(f"the plot was not drawn: {error}")
    _print_summaries(summaries)


@eval_app.command()
@takes_settings
def explain(
    settings: Settings,
    method: Annotated[str, typer.Argument(help="as in `compare --methods`")],
    tasks: Tasks = "text2json,needles,table",
    tokens: Tokens = 8192,
    samples: Samples = 8,
    seed: int = 1,
    data: Data = None,
    chat: Chat = False,
    json_file: JsonFile = None,
) -> None:
    """Find what breaks a method: swap its rows for exact ones, its ranking for the true one, and both."""
    from aquifer.workloads.comparison import ComparePlan, methods_of, summarize, swaps_of

    try:
        swaps = swaps_of(method)
        every = (*methods_of("full"), *swaps)
        plan = ComparePlan(_tasks(tasks), every, tokens, samples, seed, data, chat)
    except ValueError as error:
        fail(str(error))
    _print_repairs(summarize(_records(plan, settings, json_file)), swaps)


@eval_app.command("modes")
@takes_settings
def compare_modes(
    settings: Settings,
    tasks: Tasks = "text2json,needles,table",
    tokens: Tokens = 2048,
    samples: Samples = 8,
    seed: int = 1,
    new_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="stop answers after so many; default: when they end")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="requests of one mode that run together")] = 4,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", dir_okay=False, help="write the results")
    ] = None,
) -> None:
    """Compare the service's decode modes: same tokens? how many drafts accepted? how much device memory?"""
    from aquifer.workloads import modes

    try:
        plan = modes.ModesPlan(_tasks(tasks), tokens, samples, seed, new_tokens, batch)
    except ValueError as error:
        fail(str(error))
    refusals = (ValueError, OSError, RuntimeError)
    results = _with_progress(lambda show: modes.compare_modes(plan, settings, show), refusals)
    if json_file is not None:
        modes.write_results(results, json_file)
    columns = ("mode", "identical", "tokens", "score", "accepted", "checks/token", "device bytes/token")
    table = Table(*columns, box=None)
    for result in results:
        table.add_row(
            result.mode,
            f"{result.identical} of {result.prompts}",
            f"{result.generated_tokens:,}",
            "" if result.score is None else f"{result.score:.1f}",
            "" if result.accepted is None else f"{result.accepted:.1%}",
            "" if result.checks_per_token is None else f"{result.checks_per_token:.3f}",
            ", ".join(f"{use} {count:,.0f}" for use, count in result.device_bytes_per_token.items()),
        )
    _output().print(table)


def _tasks(names: str) -> tuple[TaskName, ...]:
    from aquifer.workloads.registry import MAKERS

    tasks = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    if unknown := [task for task in tasks if task not in MAKERS]:
        raise ValueError(f"no task {unknown[0]!r}; there are {', '.join(MAKERS)}")
    return cast("tuple[TaskName, ...]", tasks)


def _records(plan: ComparePlan, settings: Settings, json_file: Path | None) -> list[Record]:
    from aquifer.workloads.comparison import compare as run

    return _with_progress(lambda show: run(plan, settings, json_file, show))


def _with_progress(
    run: Callable[[Progress], T], refusals: tuple[type[Exception], ...] = (ValueError, OSError)
) -> T:
    """Run an evaluation behind a progress bar; its refusals end the command with their message."""
    from aquifer.server.logs import configure_logging

    configure_logging("error")
    with progress_bar("{task.description}") as bar:
        shown = bar.add_task("loading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(shown, description=what, completed=done, total=total)

        try:
            return run(show)
        except refusals as error:
            fail(str(error))


def _print_summaries(summaries: Sequence[Summary]) -> None:
    columns = ("task", "method", "score", "±", "of full", "±", "stopped", "recall", "budget", "bits")
    table = Table(*columns, "device bytes/token", "bytes fetched/step", box=None)
    for s in summaries:
        table.add_row(
            s.task,
            s.method,
            f"{s.score:.1f}",
            "" if s.error is None else f"{s.error:.1f}",
            "" if s.kept is None else f"{s.kept:.1%}",
            "" if s.kept_error is None else f"{s.kept_error:.1%}",
            f"{s.stopped:.0%}",
            "" if s.recall is None else f"{s.recall:.3f}",
            f"{s.budget:.2%}",
            f"{s.bits:.2f}",
            f"{s.device_bytes:,.0f}",
            f"{s.fetched_bytes:,.0f}",
        )
    _output().print(table)


def _print_repairs(summaries: Sequence[Summary], swaps: Sequence[Method]) -> None:
    """Scores of a method and its swaps, with what each swap adds to the score of the method as it is."""
    table = Table("task", "full", "method", *("" for _ in swaps[1:]), box=None)
    names = ["as it is", *(swap.label.removeprefix(swaps[0].label) for swap in swaps[1:])]
    for column, name in zip(table.columns[2:], names, strict=True):
        column.header = name.strip()
    for task in dict.fromkeys(summary.task for summary in summaries):
        scores = {summary.method: summary.score for summary in summaries if summary.task == task}
        own = scores[swaps[0].label]
        repaired = [f"{scores[swap.label]:.1f} ({scores[swap.label] - own:+.1f})" for swap in swaps[1:]]
        table.add_row(task, f"{scores['full']:.1f}", f"{own:.1f}", *repaired)
    _output().print(table)


def _output() -> Console:
    """Wide enough for a table that is redirected to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=200)
