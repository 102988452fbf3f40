"""The `aquifer` command as a user meets it: what it prints, what it refuses, how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import Result
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from aquifer.server.cli import app

AQUIFER = str(Path(sys.executable).with_name("aquifer"))
SMALL = [
    "--ram-bytes",
    str(64 << 20),
    "--gpu-kv-bytes",
    str(64 << 20),
    "--threads",
    "1",
    "--load-gate",
    "always",
    "--dtype",
    "float32",
]
DOCUMENT = "The shipment of 240 crates left Rotterdam on 12 March. " * 40


def run(*arguments: str, **environment: str) -> Result:
    """A command in this process. A failure that it does not explain to its user goes through to the test."""
    own: dict[str, str | None] = {name: None for name in os.environ if name.startswith("AQUIFER_")}
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, arguments, env={**own, **environment}, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Server:
    """`aquifer serve` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        port_file = folder / "port"
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [AQUIFER, "serve", "--port", "0", "--port-file", str(port_file), *SMALL, *arguments],
                stderr=log,
            )
        while not port_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{port_file.read_text()}"


@pytest.fixture
def start(tmp_path: Path, checkpoint: Path) -> Iterator[Any]:
    servers: list[Server] = []

    def make(*arguments: str) -> Server:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        servers.append(Server(folder, "--model", str(checkpoint), *arguments))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_help_lists_the_commands() -> None:
    result = subprocess.run([AQUIFER, "--help"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    for command in ("serve", "ask", "config", "doctor", "calibrate", "eval", "demo", "train-reference"):
        assert command in result.stdout


def test_config_prints_what_flags_and_environment_add_up_to() -> None:
    result = run("config", "--port", "9", "--no-gpu-cache", AQUIFER_MAX_NEW_TOKENS="7")
    shown = json.loads(result.stdout)
    assert (shown["port"], shown["gpu_cache"], shown["max_new_tokens"]) == (9, False, 7)


def test_config_shows_no_secret() -> None:
    environment = {
        "AQUIFER_API_KEYS": '{"s3cret": "ann"}',
        "AQUIFER_REDIS_URL": "redis://user:s3cret@host:1/0",
    }
    result = run("config", **environment)
    assert "s3cret" not in result.stdout
    assert json.loads(result.stdout)["redis_url"] == "redis://user:***@host:1/0"


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["config", "--ram-bytes", "5"], {}, ["ram_bytes", "1048576"]),
        (["config"], {"AQUIFER_RAM_BYTE": "5"}, ["unknown setting AQUIFER_RAM_BYTE"]),
        (["config"], {"AQUIFER_CONFIG": "/no/such/file.yaml"}, ["/no/such/file.yaml"]),
        (["serve", "--model", "/no/such/folder"], {"HF_HUB_OFFLINE": "1"}, ["/no/such/folder"]),
    ],
)
def test_a_bad_setting_ends_the_command_with_a_message(
    arguments: list[str], environment: dict[str, str], words: list[str]
) -> None:
    result = run(*arguments, **environment)
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr


def test_doctor_finds_the_model_and_redis(checkpoint: Path, redis_server: Any) -> None:
    result = run("doctor", "--json", "--model", str(checkpoint), "--redis-url", redis_server.url)
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert set(findings) == {"python", "gpu", "triton", "memory", "redis", "model", "predictors"}
    assert findings["model"]["status"] == "ok"
    assert "answers" in findings["redis"]["found"]
    assert findings["redis"]["advice"].startswith("set maxmemory")
    assert findings["predictors"]["status"] == "optional"
    assert "aquifer calibrate" in findings["predictors"]["advice"]
    assert result.exit_code == 0


def test_doctor_says_how_to_get_what_is_missing(tmp_path: Path) -> None:
    result = run("doctor", "--json", "--model", str(tmp_path), "--redis-url", "redis://:pw@127.0.0.1:1")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["model"]["status"] == "missing" and findings["model"]["advice"]
    assert "does not answer" in findings["redis"]["found"] and "pw" not in findings["redis"]["found"]
    assert result.exit_code == 1


def test_ask_leaves_in_redis_what_it_read(tmp_path: Path, checkpoint: Path, redis_server: Any) -> None:
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    flags = ["--max-new-tokens", "6", "--redis-url", redis_server.url, "--codec", "raw"]
    cold, warm = (
        run("ask", str(file), "How many?", "--model", str(checkpoint), *SMALL, *flags) for _ in range(2)
    )
    assert cold.exit_code == 0, cold.stderr
    assert ", 0 of them cached" in cold.stderr
    assert cold.stdout.strip()
    assert warm.stdout == cold.stdout
    assert ", 1,536 of them cached" in warm.stderr


def test_ask_explains_what_went_wrong(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in run("ask", str(binary), "?").stderr
    text = tmp_path / "text"
    text.write_text("a")
    result = run("ask", str(text), "?", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, "http://127.0.0.1:1" in result.stderr) == (2, True)


def test_sigterm_finishes_running_answers_and_others_know_the_documents(
    tmp_path: Path, checkpoint: Path, start: Any, redis_server: Any
) -> None:
    """Others: a server that starts then, and `ask`, with it or without."""
    shared = ["--redis-url", redis_server.url, "--codec", "raw"]
    question = {"inputs": "How many?", "document_id": "manifest", "parameters": {"max_new_tokens": 150}}
    first = start(*shared)
    body = {"document": DOCUMENT, "document_id": "manifest", "wait": True}
    document = httpx.post(f"{first.url}/documents", json=body, timeout=60).json()
    assert document["status"] == "ready" and document["stored_bytes"] > 0
    with httpx.stream("POST", f"{first.url}/generate_stream", json=question, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        first.process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line.startswith("data:")]
    last = json.loads(events[-1].removeprefix("data:"))
    assert last["details"]["generated_tokens"] == 1 + len(events)
    assert first.process.wait(timeout=60) == 0
    assert "Traceback" not in first.log.read_text()
    second = start(*shared)
    after = httpx.post(f"{second.url}/generate", json=question, timeout=60).json()
    assert after["generated_text"] == last["generated_text"]
    assert after["details"]["cached_tokens"]["redis"] == 1536
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    short = ["ask", str(file), "How many?", "--max-new-tokens", "6"]
    through = run(*short, "--url", second.url)
    here = run(*short, "--model", str(checkpoint), *SMALL, *shared)
    assert through.stdout == here.stdout != "\n"
    for asked in (through, here):
        assert asked.exit_code == 0 and ", 1,536 of them cached" in asked.stderr


def test_calibrate_makes_predictors_that_doctor_finds(tmp_path: Path, checkpoint: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = [f"Record {number}. {DOCUMENT}" for number in range(12)]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    folder = tmp_path / "predictors"
    sizes = ["--tokens", "6000", "--sequence-tokens", "512", "--threads", "1"]
    model = ["--model", str(checkpoint)]
    made = run("calibrate", "--texts", str(texts), "--out", str(folder), *model, *sizes)
    assert made.exit_code == 0, made.stderr
    assert "values explained" in made.stdout
    found = run("doctor", "--json", *model, "--predictors", str(folder))
    predictors = next(f for f in json.loads(found.stdout) if f["name"] == "predictors")
    assert predictors["status"] == "ok" and "tokens of texts.jsonl" in predictors["found"]

    card = json.loads((folder / "card.json").read_text())
    for fit in card["layers"]:
        del fit["key_spread"], fit["value_spread"]  # as in cards from before predictions in integers
    (folder / "card.json").write_text(json.dumps(card))
    asked = [*model, "--predictors", str(folder), "--codec", "aqua:3:int8"]
    found = run("doctor", "--json", *asked)
    predictors = next(f for f in json.loads(found.stdout) if f["name"] == "predictors")
    assert predictors["status"] == "missing" and "AQUIFER_CODEC=aqua:3" in predictors["advice"]
    refused = run("serve", *asked, *SMALL)
    assert refused.exit_code == 2
    message = " ".join(refused.stderr.split())
    assert "AQUIFER_CODEC=aqua:3:int8: predicting in integers" in message and "use aqua:3" in message


def test_doctor_tells_of_a_damaged_card(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "card.json").write_text("{}")
    found = run("doctor", "--json", "--model", str(checkpoint), "--predictors", str(tmp_path))
    predictors = next(f for f in json.loads(found.stdout) if f["name"] == "predictors")
    assert predictors["status"] == "optional" and "card.json is damaged" in predictors["found"]


def test_calibrate_names_the_line_that_is_no_text(tmp_path: Path, checkpoint: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n{"txt": "b"}\n')
    result = run(
        "calibrate",
        "--texts",
        str(texts),
        "--out",
        str(tmp_path),
        "--model",
        str(checkpoint),
        "--threads",
        "1",
    )
    assert result.exit_code == 2
    assert "texts.jsonl:2" in result.stderr


def test_eval_writes_figures_of_answers_from_restored_kv(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "result.json"
    plan = ["--kv", "higgs:4", "--tokens", "512", "--samples", "1", "--json", str(file)]
    sizes = [flag for flag in SMALL if flag not in ("--load-gate", "always")]
    result = run("eval", "text2json", "--model", str(checkpoint), *plan, *sizes)
    assert result.exit_code == 0, result.stderr
    figures = json.loads(file.read_text())
    assert figures["restored_tokens"] == 256 and 4 < figures["bits_per_value"] < 8
    assert "score" in result.stdout


def test_eval_names_the_tasks_there_are() -> None:
    result = run("eval", "chess")
    assert result.exit_code == 2
    assert "text2json, needles, table, perplexity" in result.stderr
