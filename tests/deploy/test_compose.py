from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import redis
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema.validators import validator_for

from aquifer.server.settings import load_settings


def test_compose_file_follows_the_compose_specification(compose: dict[str, Any]) -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    errors = validator_for(schema)(schema).iter_errors(compose)
    assert [error.message for error in errors] == []


def test_empty_passwords_are_refused(root: Path) -> None:
    text = (root / "docker-compose.yml").read_text()
    for name in ("REDIS_PASSWORD", "GRAFANA_ADMIN_PASSWORD"):
        uses = re.findall(rf"\$\{{{name}[^}}]*\}}", text)
        assert uses
        assert all(use.startswith(f"${{{name}:?") for use in uses)


def test_env_example_lists_exactly_the_variables_of_the_compose_file(root: Path) -> None:
    used = set(re.findall(r"\$\{(\w+)", (root / "docker-compose.yml").read_text()))
    offered = set(re.findall(r"^(\w+)=", (root / ".env.example").read_text(), re.MULTILINE))
    assert offered == used


@pytest.mark.parametrize(
    ("name", "model", "device"), [("aquifer", "reference", "cpu"), ("aquifer-gpu", "/model", "cuda")]
)
def test_service_variables_are_settings(
    compose: dict[str, Any], name: str, model: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in compose["services"][name]["environment"].items():
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    assert (settings.model, settings.device) == (model, device)
    assert settings.redis_url is not None
    assert settings.redis_url.endswith("@redis:6379/0")


def test_only_loopback_ports_are_published_and_redis_has_none(compose: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert ports["redis"] == []
    published = [port for listed in ports.values() for port in listed]
    assert len(published) == 4
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)


def test_every_image_is_pinned_to_a_full_version(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"])


def test_every_service_restarts_and_is_health_checked(compose: dict[str, Any], root: Path) -> None:
    # The service's own check is part of its image.
    assert "\nHEALTHCHECK " in (root / "deploy" / "Dockerfile").read_text()
    for service in compose["services"].values():
        assert service["restart"] == "unless-stopped"
        assert "build" in service or service["healthcheck"]["test"]


def test_dependencies_wait_for_health(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, needed in (("aquifer", "redis"), ("aquifer-gpu", "redis"), ("grafana", "prometheus")):
        assert services[name]["depends_on"] == {needed: {"condition": "service_healthy"}}


def test_gpu_variant_is_off_by_default_and_answers_to_the_scraped_name(compose: dict[str, Any]) -> None:
    variant = compose["services"]["aquifer-gpu"]
    assert variant["profiles"] == ["gpu"]
    (device,) = variant["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert variant["networks"]["default"]["aliases"] == ["aquifer"]


def test_mounted_files_exist_and_named_volumes_are_declared(compose: dict[str, Any], root: Path) -> None:
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            if isinstance(mount, dict):
                assert mount["bind"]["create_host_path"] is False
                continue
            source = mount.split(":")[0]
            assert (root / source).is_dir() if source.startswith("./") else source in compose["volumes"]


def test_build_targets_are_stages_of_the_dockerfile(compose: dict[str, Any], root: Path) -> None:
    for name in ("aquifer", "aquifer-gpu"):
        build = compose["services"][name]["build"]
        dockerfile = (root / build["dockerfile"]).read_text()
        assert re.search(rf"^FROM .* AS {build['target']}$", dockerfile, re.MULTILINE)
        for argument in build["args"]:
            assert re.search(rf"^ARG {argument}\b", dockerfile, re.MULTILINE)


def test_redis_needs_the_password_and_evicts_the_least_recently_used(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.ping()
        config = client.config_get("*")
        assert (config["maxmemory"], config["maxmemory-policy"]) == (str(2 << 30), "allkeys-lru")
        assert (config["save"], config["appendonly"]) == ("", "no")
    port = client.connection_pool.connection_kwargs["port"]
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
