from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

K8S_BYTES = {"Gi": 1 << 30, "Mi": 1 << 20}


def in_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * K8S_BYTES[quantity[-2:]]


@pytest.fixture(scope="module")
def k8s(root: Path) -> Path:
    return root / "deploy" / "k8s"


@pytest.fixture(scope="module")
def pod(k8s: Path) -> dict[str, Any]:
    return yaml.safe_load((k8s / "base" / "deployment.yaml").read_text())["spec"]["template"]["spec"]


def test_files_named_by_the_kustomizations_exist(k8s: Path) -> None:
    for path in k8s.glob("*/kustomization.yaml"):
        for resource in yaml.safe_load(path.read_text())["resources"]:
            assert (path.parent / resource).exists()


def test_every_manifest_names_its_kind(k8s: Path) -> None:
    manifests = sorted(k8s.glob("*/*.yaml"))
    assert len(manifests) >= 5
    for path in manifests:
        document = yaml.safe_load(path.read_text())
        assert document["apiVersion"]
        assert document["kind"]


def test_variables_of_the_pod_are_settings(pod: dict[str, Any], known_variables: set[str]) -> None:
    named = {entry["name"] for entry in pod["containers"][0]["env"]}
    assert named - {"HF_TOKEN"} <= known_variables


def test_kubernetes_adds_no_variables_that_look_like_settings(pod: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False


def test_pod_runs_unprivileged_on_a_read_only_root(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    context = pod["containers"][0]["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}


def test_secrets_are_referenced_never_written(pod: dict[str, Any]) -> None:
    for entry in pod["containers"][0]["env"]:
        assert set(entry["valueFrom"]) == {"secretKeyRef"}


def test_probes_ask_routes_the_service_answers(pod: dict[str, Any], service: str) -> None:
    container = pod["containers"][0]
    probes = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")
    }
    assert probes["readiness"] == "/ready"
    for path in probes.values():
        assert httpx.get(f"{service}{path}").status_code == 200
