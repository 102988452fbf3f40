"""The service as its users run it: `aquifer serve`, a process of its own over a tiny checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import greedy_reference, tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel
from waiting import wait_until

from aquifer.clients import Client

SHARPNESS = 20.0
AQUIFER = str(Path(sys.executable).with_name("aquifer"))


def readable_model() -> PreTrainedModel:
    """A tiny model whose answers hang on the whole document, are printable ASCII and never end by
    themselves: half a character would be shown as a replacement sign, and differences would be hidden.
    """
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    head = model.get_output_embeddings().weight
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(head.shape[0])]
    silent = [
        token for token, text in enumerate(texts) if not (text and text.isascii() and text.isprintable())
    ]
    with torch.no_grad():
        head[silent] = 0.0
        for layer in model.model.layers:
            # Sharp attention: it otherwise takes the mean of all tokens, and every answer is the same.
            layer.self_attn.q_proj.weight.mul_(SHARPNESS)
    return model


def document(title: str, num_tokens: int = 1100) -> str:
    """Freight records of about so many tokens, different from the first word on for every title."""
    draw = random.Random(title)
    lines = [f"{title}: freight records.\n"]
    count = 0
    while count < num_tokens:
        lines.append(
            f"Crate {draw.randrange(1000)} left at {draw.randrange(24)}:{draw.randrange(60):02d};"
            f" it's due in {draw.randrange(90)} days and has {draw.randrange(5000)} kg.\n"
        )
        count += len(tiny_tokenizer().encode(lines[-1], add_special_tokens=False))
    return "".join(lines)


def prompt_ids(text: str, inputs: str) -> list[int]:
    """What the service makes of a document and a question."""
    tokenizer = tiny_tokenizer()
    encoded = (tokenizer.encode(part, add_special_tokens=False) for part in (text, inputs))
    return [tokenizer.bos_token_id, *(token for ids in encoded for token in ids)]


def plain_answer(model: PreTrainedModel, text: str, inputs: str, new_tokens: int) -> list[int]:
    """Token ids that plain `generate` of transformers answers with."""
    return greedy_reference(model, prompt_ids(text, inputs), new_tokens)


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of the service, with one thread per process."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AQUIFER_") and name != "REDIS_URL"
    }
    return {**inherited, "OMP_NUM_THREADS": "1", **variables}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of the command line; None is left out."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


class ServiceProcess:
    """One running service; `client` and `http` talk to it. Its log grows in `log_file`."""

    def __init__(self, folder: Path, *, api_keys: dict[str, str] | None = None, **settings: Any) -> None:
        """Starts it in a folder of its own, and waits until it accepts connections. settings: as in
        server/settings.py."""
        self.log_file = folder / "service.log"
        port_file = folder / "port"
        port_file.unlink(missing_ok=True)
        environment = clean_environment(**({"AQUIFER_API_KEYS": json.dumps(api_keys)} if api_keys else {}))
        command = [AQUIFER, "serve", "--port", "0", "--port-file", str(port_file)]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *as_flags(settings)], cwd=folder, env=environment, stdout=log, stderr=log
            )
        try:
            # On a GPU it compiles its kernels first.
            wait_until(lambda: port_file.exists() or self._has_ended, seconds=240, poll_seconds=0.02)
            assert not self._has_ended, f"the service did not start:\n{self.log}"
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self.port = int(port_file.read_text())
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Client(self.url, timeout_seconds=60)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def peak_memory_bytes(self) -> int:
        """The most that was ever resident."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024

    def metric(self, name: str, **labels: str) -> float:
        """A metric as a scrape shows it now. KeyError when it is not there."""
        text = self.http.get("/metrics").raise_for_status().text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"aquifer_{name}" and sample.labels == labels:
                    return float(sample.value)
        raise KeyError(f"{name} {labels}")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        return self._process.wait(timeout=60)

    def kill(self) -> None:
        """As `kill -9`: no goodbye."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it as an orchestrator would, and hold it to a clean end. Nothing, where it has ended."""
        self.client.close()
        self.http.close()
        if self._has_ended:
            return
        self._process.terminate()
        try:
            assert self.wait() == 0, f"the service ended with {self._process.returncode}:\n{self.log}"
        finally:
            self._process.kill()

    @property
    def _has_ended(self) -> bool:
        return self._process.poll() is not None
