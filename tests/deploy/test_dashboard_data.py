"""Every query of the dashboard, asked of a real Prometheus that scrapes a real service."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

Query = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def expressions(root: Path) -> dict[str, str]:
    """'panel id/refId title' -> PromQL as Grafana would send it, over the last two minutes."""
    dashboard = json.loads((root / "deploy" / "grafana" / "dashboards" / "aquifer.json").read_text())
    return {
        f"{panel['id']}/{target['refId']} {panel['title']}": target["expr"]
        .replace("$__rate_interval", "2m")
        .replace("$instance", ".*")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }


@pytest.fixture(scope="module")
def query(prometheus: str) -> Iterator[Query]:
    with httpx.Client(base_url=prometheus) as client:

        def ask(expression: str) -> list[dict[str, Any]]:
            answer = client.post("/api/v1/query", data={"query": expression}).json()
            assert answer["status"] == "success", answer
            return answer["data"]["result"]

        yield ask


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return held


@pytest.fixture(scope="module")
def idle(query: Query, expressions: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The answers before the first request, once two scrapes make rates possible."""
    assert wait_until(lambda: bool(query("count_over_time(up[1m]) >= 2"))), "the service was not scraped"
    return {name: query(expression) for name, expression in expressions.items()}


@pytest.fixture(scope="module")
def busy(
    idle: dict[str, list[dict[str, Any]]], service: str, query: Query, expressions: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The answers after questions about one document: cold, warm, in a mode off the device, and streamed."""
    document = "".join(f"Order {n}: {n * 7 % 90} crates from dock {n % 12}.\n" for n in range(60))
    with httpx.Client(base_url=service, timeout=120) as client:
        for question in ("Which dock ships order 7?", "How many crates are in order 9?"):
            body = {"document": document, "inputs": question, "parameters": {"max_new_tokens": 8}}
            client.post("/generate", json=body).raise_for_status()
        client.post("/generate", json=body | {"kv": {"mode": "verified"}}).raise_for_status()
        body["parameters"]["max_new_tokens"] = 12
        with client.stream("POST", "/generate_stream", json=body) as stream:
            assert any(line.startswith("data:") for line in stream.iter_lines())
    # The first answer of each panel is kept: a panel that never answers must not outlast the window
    # over which the others have data.
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in expressions}

    def complete() -> bool:
        for name in [name for name, result in answers.items() if not result]:
            answers[name] = query(expressions[name])
        return all(answers.values())

    wait_until(complete, seconds=30)
    return answers


def test_an_idle_service_shows_no_undefined_values(idle: dict[str, list[dict[str, Any]]]) -> None:
    values = {name: [float(series["value"][1]) for series in result] for name, result in idle.items()}
    assert any(values.values())
    assert {name: found for name, found in values.items() if not all(map(math.isfinite, found))} == {}


def test_every_panel_has_data_after_some_requests(busy: dict[str, list[dict[str, Any]]]) -> None:
    assert [name for name, result in busy.items() if not result] == []
    for name, result in busy.items():
        assert all(math.isfinite(float(series["value"][1])) for series in result), name


def test_warm_requests_show_as_hits_of_the_ram_tier(
    busy: dict[str, list[dict[str, Any]]], query: Query
) -> None:
    assert busy
    sources = {
        series["metric"]["source"]: float(series["value"][1])
        for series in query("sum by (source) (aquifer_prompt_tokens_total)")
    }
    assert sources["computed"] > 0
    assert sources["ram"] > 0
    (hits,) = query('aquifer_tier_lookups_total{tier="ram", result="hit"}')
    assert float(hits["value"][1]) > 0


def test_queries_of_the_readme_have_answers(
    busy: dict[str, list[dict[str, Any]]], query: Query, root: Path
) -> None:
    assert busy
    (block,) = re.findall(r"```promql\n(.*?)```", (root / "deploy" / "README.md").read_text(), re.DOTALL)
    queries = [line for line in block.splitlines() if not line.startswith("#")]
    assert len(queries) == 4
    assert [line for line in queries if not query(line)] == []


def test_alerts_and_dashboard_name_only_metrics_that_the_service_exposes(
    service: str, root: Path, expressions: dict[str, str]
) -> None:
    exposed = set(re.findall(r"^(aquifer_\w+)", httpx.get(f"{service}/metrics").text, re.MULTILINE))
    rules = (root / "deploy" / "prometheus" / "alerts.yml").read_text()
    named = set(re.findall(r"\baquifer_\w+", rules + " ".join(expressions.values())))
    assert len(named) > 15
    assert named <= exposed


def test_alert_rules_are_evaluated_without_errors(prometheus: str) -> None:
    def rules() -> list[dict[str, Any]]:
        (group,) = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
        return group["rules"]

    assert wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert {rule["name"]: rule.get("lastError", "") for rule in rules() if rule["health"] != "ok"} == {}
