from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> str:
    return (root / "deploy" / "Dockerfile").read_text()


def stage(dockerfile: str, name: str) -> str:
    (text,) = re.findall(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", dockerfile, re.MULTILINE | re.DOTALL)
    return text


def test_final_stages_run_as_an_unprivileged_user(dockerfile: str) -> None:
    for name in ("cpu", "cuda"):
        assert stage(dockerfile, name).rstrip().splitlines()[-1] == "USER 10001:10001"


def test_default_stage_is_the_cpu_one(dockerfile: str) -> None:
    assert re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE)[-1] == "cpu"


def test_image_installs_runtime_dependencies_under_the_constraints(dockerfile: str) -> None:
    installs = re.findall(r"pip install [^\n\\]*", stage(dockerfile, "build"))
    assert len(installs) == 3
    assert all("constraint constraints.txt" in line or line.endswith("--no-deps .") for line in installs)
    assert "optional-dependencies" not in dockerfile
    assert "[dev]" not in dockerfile


def test_constraints_name_no_build_so_that_both_targets_can_use_them(root: Path) -> None:
    pins = [line for line in (root / "constraints.txt").read_text().splitlines() if line[:1].isalpha()]
    assert any(pin.startswith("torch==") for pin in pins)
    assert [pin for pin in pins if "+" in pin] == []


def test_image_variables_are_settings(dockerfile: str, known_variables: set[str]) -> None:
    named = set(re.findall(r"\bAQUIFER_\w+", dockerfile))
    assert named
    assert named <= known_variables


def test_build_context_holds_every_package_and_nothing_private(root: Path) -> None:
    admitted = {
        line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["package-dir"].values()) <= admitted
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= admitted
    assert not admitted & {".env", ".git", "tests", "checkpoints"}
