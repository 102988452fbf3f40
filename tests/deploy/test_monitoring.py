"""The monitoring files by themselves: what Prometheus' own tool says, and the dashboard's structure."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict[str, Any]:
    return json.loads((root / "deploy" / "grafana" / "dashboards" / "aquifer.json").read_text())


@pytest.fixture(scope="module")
def datasource(root: Path) -> dict[str, Any]:
    path = root / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    return source


@pytest.fixture(scope="module")
def scrape(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "deploy" / "prometheus" / "prometheus.yml").read_text())


def test_prometheus_accepts_the_configuration(root: Path) -> None:
    assert "1 rule files found" in promtool("check", "config", root / "deploy/prometheus/prometheus.yml")


def test_alerts_fire_when_they_must_and_only_then(root: Path) -> None:
    promtool("test", "rules", root / "tests/deploy/alerts_test.yml")


def test_every_alert_is_tested_and_says_what_to_do(root: Path) -> None:
    groups = yaml.safe_load((root / "deploy/prometheus/alerts.yml").read_text())["groups"]
    rules = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    cases = yaml.safe_load((root / "tests/deploy/alerts_test.yml").read_text())["tests"]
    fired = {
        case["alertname"] for test in cases for case in test["alert_rule_test"] if case.get("exp_alerts")
    }
    assert fired == set(rules)
    for rule in rules.values():
        assert {"summary", "action"} == set(rule["annotations"])


def test_prometheus_scrapes_the_compose_service_on_its_port(
    scrape: dict[str, Any], compose: dict[str, Any]
) -> None:
    (job,) = scrape["scrape_configs"]
    (target,) = job["dns_sd_configs"]
    assert target["names"] == ["aquifer"]
    assert compose["services"]["aquifer"]["ports"][0].endswith(f":{target['port']}")


def test_data_source_points_at_the_compose_prometheus(
    datasource: dict[str, Any], scrape: dict[str, Any], compose: dict[str, Any]
) -> None:
    host, port = datasource["url"].removeprefix("http://").split(":")
    assert compose["services"][host]["ports"][0].endswith(f":{port}")
    # Otherwise Grafana asks for rates over windows that hold a single sample.
    assert datasource["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]


def test_grafana_reads_the_folders_that_are_mounted(compose: dict[str, Any], root: Path) -> None:
    grafana = compose["services"]["grafana"]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    path = root / "deploy" / "grafana" / "provisioning" / "dashboards" / "aquifer.yml"
    (provider,) = yaml.safe_load(path.read_text())["providers"]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(mounts["./deploy/grafana/dashboards"])
    assert (root / "deploy" / "grafana" / "dashboards" / home.name).is_file()


def test_panels_have_a_place_of_their_own_on_the_grid(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def test_panels_name_their_unit_and_the_provisioned_data_source(
    dashboard: dict[str, Any], datasource: dict[str, Any]
) -> None:
    expected = {"type": datasource["type"], "uid": datasource["uid"]}
    for variable in dashboard["templating"]["list"]:
        assert variable["datasource"] == expected
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) > 15
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == expected
        assert panel["targets"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == expected


def test_queries_follow_the_chosen_instances(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            selectors = re.findall(r"aquifer_\w+(\{[^}]*\})?", target["expr"])
            assert selectors
            assert all('instance=~"$instance"' in selector for selector in selectors)
