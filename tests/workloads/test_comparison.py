"""`eval compare` and `eval explain` end to end, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from aquifer.server.cli_eval import eval_app
from aquifer.server.settings import Settings
from aquifer.workloads.comparison import (
    ComparePlan,
    Record,
    compare,
    methods_of,
    summarize,
    swaps_of,
)
from aquifer.workloads.plots import plot_comparison

METHODS = "full,window:0.2,oracle:0.2,landmarks:0.2:mean=off,shadowkv:0.1:rank=8:outliers=64"
SIZE = ["--tokens", "1024", "--samples", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama").cpu()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def silent(what: str, done: int, total: int) -> None:
    pass


def run(*arguments: str) -> tuple[int, str]:
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(eval_app, [*arguments, "--device", "cpu", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    return result.exit_code, result.output


def test_compare_prints_a_table_and_writes_records_and_a_plot(tmp_path: Path, checkpoint: str) -> None:
    file, plot = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--tasks", "table", "--methods", METHODS, "--json", str(file), "--plot", str(plot)]
    status, output = run("compare", "--model", checkpoint, *SIZE, *flags)
    assert status == 0, output
    records = json.loads(file.read_text())["records"]
    assert len(records) == 5
    assert {record["method"] for record in records} >= {"full", "landmarks:0.2:mean=off"}
    assert all(0 <= record["score"] <= 1 for record in records)
    assert "window:0.2" in output and "recall" in output and "of full" in output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_explain_shows_what_each_swap_repairs(tmp_path: Path, checkpoint: str) -> None:
    file = tmp_path / "out.json"
    method = "shadowkv:0.1:rank=8:outliers=64"
    status, output = run(
        "explain", method, "--model", checkpoint, "--tasks", "needles", *SIZE, "--json", str(file)
    )
    assert status == 0, output
    for word in ("as it is", "+ exact rows", "+ true scores", "+ both"):
        assert word in output
    by_method = {record["method"]: record for record in json.loads(file.read_text())["records"]}
    assert set(by_method) == {"full", *(swap.label for swap in swaps_of(method))}
    assert by_method[f"{method} + true scores"]["recall"] == [1.0, 1.0, 1.0]
    assert max(by_method[f"{method} + exact rows"]["recall"]) < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--tasks", "chess"], "there are text2json, needles, table"),
        (["compare", "--methods", "full,chess"], "there are full, window, oracle"),
        (["compare", "--methods", "full,full"], "named twice: full"),
        (["compare", "--methods", ","], "no method is named"),
        (["explain", "full"], "chooses no tokens"),
        (["chess"], "text2json, needles, table, perplexity"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str) -> None:
    status, output = run(*arguments)
    assert status == 2
    assert message in output


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, checkpoint: str) -> None:
    settings, file = Settings(model=checkpoint, device="cpu"), tmp_path / "out.json"
    first = compare(ComparePlan(("needles",), methods_of("full"), 1024, 1), settings, file, silent)
    kept = json.loads(file.read_text())
    kept["records"][0]["score"] = 0.123  # so that a second run of the same sample would be seen
    file.write_text(json.dumps(kept))
    plan = ComparePlan(("needles",), methods_of("full,window:0.2"), 1024, 2)
    records = compare(plan, settings, file, silent)
    assert [(r.sample, r.method) for r in records] == [
        (0, "full"),
        (0, "window:0.2"),
        (1, "full"),
        (1, "window:0.2"),
    ]
    assert records[0].score == 0.123 and records[0].recall == first[0].recall


@pytest.mark.parametrize(
    "content", ['{"model": "other", "tokens": 1024, "seed": 1, "chat": false, "records": []}', "x", "[]"]
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, checkpoint: str, content: str) -> None:
    file = tmp_path / "out.json"
    file.write_text(content)
    plan = ComparePlan(("needles",), methods_of("full"), 1024, 1)
    with pytest.raises(ValueError, match=r"out\.json"):
        compare(plan, Settings(model=checkpoint, device="cpu"), file, silent)
    assert file.read_text() == content


def test_samples_come_from_a_file_in_the_published_format(tmp_path: Path, checkpoint: str) -> None:
    line = {"problem": "The shipment of 240 crates left. " * 20, "answer": '[{"name": "crates"}]'}
    (tmp_path / "set.jsonl").write_text(json.dumps(line) + "\n")
    plan = ComparePlan(("text2json",), methods_of("full,window:0.5"), data=tmp_path / "set.jsonl")
    records = compare(plan, Settings(model=checkpoint, device="cpu"), None, silent)
    assert [(r.method, r.sample) for r in records] == [("full", 0), ("window:0.5", 0)]
    assert 100 < records[0].prompt_tokens < 600


def test_a_file_is_of_one_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name it with --tasks"):
        ComparePlan(("text2json", "table"), methods_of("full"), data=tmp_path / "set.jsonl")


def test_a_prompt_beyond_the_model_is_refused(checkpoint: str) -> None:
    plan = ComparePlan(("needles",), methods_of("full"), 4090, 1)
    with pytest.raises(ValueError, match="the model takes 4096 tokens"):
        compare(plan, Settings(model=checkpoint, device="cpu"), None, silent)


def record(method: str, sample: int, score: float, recall: list[float]) -> Record:
    return Record("table", sample, method, score, True, 1000, 10, recall, 0.05, 5.4, 640.0, 1000)


def test_a_summary_is_the_mean_with_its_error() -> None:
    records = [record("a", 0, 0.5, [0.5, 1.0]), record("a", 1, 1.0, [0.7, 1.0]), record("b", 0, 1.0, [])]
    a, b = summarize(records)
    assert (a.score, a.samples, a.stopped) == (75.0, 2, 1.0)
    assert a.error == pytest.approx(25.0)
    assert a.recall_by_layer == pytest.approx([0.6, 1.0]) and a.recall == pytest.approx(0.8)
    assert (b.error, b.recall) == (None, None)


def test_what_is_kept_is_measured_in_pairs() -> None:
    full = [record("full", 0, 1.0, []), record("full", 1, 0.5, []), record("full", 2, 0.0, [])]
    like_full = [record("a", n, whole.score, []) for n, whole in enumerate(full)]
    half = [record("b", n, whole.score / 2, []) for n, whole in enumerate(full)]
    uneven = [record("c", 0, 1.0, []), record("c", 1, 0.0, [])]
    whole, a, b, c = summarize([*full, *like_full, *half, *uneven])
    assert (whole.kept, whole.kept_error) == (1.0, 0.0)
    # All lose alike what the full cache loses: scores differ between samples, what is kept does not.
    assert (a.kept, a.kept_error) == (1.0, 0.0) and a.error == whole.error
    assert b.kept == pytest.approx(0.5) and b.kept_error == pytest.approx(0.0)
    assert c.kept == pytest.approx(2 / 3) and c.kept_error == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    "full", [[], [record("full", 0, 1.0, [])], [record("full", n, 0.0, []) for n in (0, 1)]]
)
def test_without_a_full_score_of_every_sample_nothing_is_said_to_be_kept(full: list[Record]) -> None:
    summary = summarize([*full, record("a", 0, 1.0, []), record("a", 1, 1.0, [])])[-1]
    assert (summary.kept, summary.kept_error) == (None, None)


def test_an_unknown_picture_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="xyz"):
        plot_comparison(summarize([record("a", 0, 1.0, [1.0])]), tmp_path / "plot.xyz")
