"""`aquifer` as typed into a shell."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from service_process import AQUIFER, ServiceProcess, clean_environment, document

from aquifer.clients import Sampling

QUESTION = "Which crate left last?"


def aquifer(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AQUIFER, *arguments], env=clean_environment(**variables), capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.txt"
    path.write_text(document("On disk"))
    return path


def test_ask_answers_alike_in_its_own_process_and_from_a_server(
    plain_service: ServiceProcess, checkpoint: Path, file: Path
) -> None:
    short = "--max-new-tokens=12"
    alone = aquifer(
        "ask", str(file), QUESTION, f"--model={checkpoint}", "--codec=raw", "--ram-bytes=67108864", short
    )
    served = aquifer("ask", str(file), QUESTION, f"--url={plain_service.url}", short)
    assert (alone.returncode, served.returncode) == (0, 0), alone.stderr + served.stderr
    sampling = Sampling(max_new_tokens=12)
    answer = plain_service.client.generate(QUESTION, document=file.read_text(), sampling=sampling)
    assert alone.stdout == served.stdout == answer.text + "\n"
    assert "prompt tokens" in alone.stderr and "prompt tokens" in served.stderr


def test_ask_says_what_is_wrong_and_ends_with_2(file: Path, free_port: object, tmp_path: Path) -> None:
    assert callable(free_port)
    nobody = f"--url=http://127.0.0.1:{free_port()}"
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for arguments, says in (
        ((str(file), QUESTION, nobody), "127.0.0.1"),
        ((str(latin), QUESTION, nobody), "not UTF-8"),
        (("absent.txt", QUESTION, nobody), "absent.txt"),
    ):
        result = aquifer("ask", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert says in result.stderr.replace("\n", "")
        assert "Traceback" not in result.stderr


def test_doctor_reports_as_json(checkpoint: Path) -> None:
    result = aquifer("doctor", "--json", f"--model={checkpoint}")
    assert result.returncode == 0, result.stderr
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["model"]["status"] == "ok"
    assert findings["redis"]["status"] == "optional" and findings["redis"]["advice"]


def test_config_prints_what_the_sources_add_up_to() -> None:
    shown = aquifer("config", "--port=1234", AQUIFER_RAM_BYTES="2097152", AQUIFER_API_KEYS='{"s3cret": "me"}')
    assert shown.returncode == 0, shown.stderr
    settings = json.loads(shown.stdout)
    assert (settings["port"], settings["ram_bytes"]) == (1234, 2097152)
    assert "s3cret" not in shown.stdout


@pytest.mark.parametrize(
    ("flag", "variables", "says"),
    [
        ("--port=1", {"AQUIFER_RAM_BITES": "5"}, "AQUIFER_RAM_BITES"),
        ("--port=1", {"AQUIFER_RAM_BYTES": "lots"}, "ram_bytes"),
        ("--port=99999", {}, "port"),
    ],
)
def test_a_bad_setting_stops_the_start(flag: str, variables: dict[str, str], says: str) -> None:
    result = aquifer("serve", flag, **variables)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
