"""`aquifer bench kernels` and `plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from typer.testing import CliRunner

from aquifer.server.cli import app

PNG = b"\x89PNG\r\n"


def test_every_kernel_has_a_share_of_its_limit(bench: Callable[..., Any]) -> None:
    outcome = bench("kernels", "--tokens", "512")
    kernels = [row for row in outcome.line["rows"] if row["role"] == "ours"]
    assert len(kernels) == 12
    assert all(row["figures"]["of_limit_percent"] > 0 for row in kernels)
    assert all(row["figures"]["gb_per_second"] > 0 for row in kernels)
    limits = {row["name"]: row["figures"] for row in outcome.line["rows"] if row["role"] == "limit"}
    predict = outcome.rows["predict"]
    assert predict["gflop_per_second"] == pytest.approx(2 * 512 * 64 * 32 / predict["seconds"] / 1e9)
    assert set(limits) == {"copy in memory", "large GEMM"}
    said = " ".join(note for note in outcome.line["notes"] if "is the limit of" in note)
    assert all(row["name"] in said for row in kernels)


def test_lines_of_every_kind_become_one_picture(
    bench_once: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Throughput measured twice behind contexts of one length is drawn in one panel."""
    lines, picture = tmp_path / "lines.jsonl", tmp_path / "speed.png"
    once = ("--json", str(lines))
    bench_once("store", "--tokens", "256", "--repeat", "1", *once)
    bench_once("kernels", "--tokens", "256", "--repeat", "1", *once)
    bench_once(
        "throughput", "--tokens", "256", "--contexts", "1,2", "--new-tokens", "2", "--repeat", "1", *once
    )
    bench_once("longdoc", "--documents", "1", "--tokens", "300", "--new-tokens", "2", "--path", "gpu", *once)
    kept = lines.read_text().splitlines()
    assert len(kept) == 4
    lines.write_text("\n".join([*kept, kept[2]]))
    drawn: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    result = CliRunner().invoke(app, ["bench", "plot", str(lines), "--out", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(PNG)
    (figure,) = drawn
    titles = [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes]
    assert titles == ["store", "kernels", "throughput", "longdoc"]


@pytest.mark.parametrize("text", ["", "no json\n", '{"other": 1}\n'])
def test_a_file_without_benchmarks_is_refused(text: str, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(text)
    result = CliRunner().invoke(app, ["bench", "plot", str(lines), "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 2
    assert "lines.jsonl" in result.output
    assert not (tmp_path / "x.png").exists()
