"""Where settings come from, which source wins, and what stops the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from aquifer.server.settings import Settings, load_settings


def test_flags_beat_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "aquifer.yaml"
    file.write_text("port: 1\nmax_new_tokens: 11\nthreads: 3\n")
    monkeypatch.setenv("AQUIFER_CONFIG", str(file))
    monkeypatch.setenv("AQUIFER_PORT", "2")
    monkeypatch.setenv("AQUIFER_MAX_NEW_TOKENS", "22")
    settings = load_settings(max_new_tokens="33", host=None)
    assert (settings.max_new_tokens, settings.port, settings.threads) == (33, 2, 3)
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize("name", ["AQUIFER_RAM_BYTE", "aquifer_ram_byte", "aquifer_config"])
def test_a_typo_in_the_environment_stops_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"unknown setting {name}"):
        load_settings()


def test_a_typo_in_the_file_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "aquifer.yaml"
    file.write_text("prot: 1\n")
    monkeypatch.setenv("AQUIFER_CONFIG", str(file))
    with pytest.raises(ValidationError, match="prot"):
        load_settings()


def test_a_file_that_is_no_yaml_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "aquifer.yaml"
    file.write_text("port: [1\n")
    monkeypatch.setenv("AQUIFER_CONFIG", str(file))
    with pytest.raises(ValueError, match=r"aquifer\.yaml, which is no YAML"):
        load_settings()


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUIFER_CONFIG", str(tmp_path / "aquifer.yaml"))
    with pytest.raises(ValueError, match=r"aquifer\.yaml, which is no file"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("ram_bytes", "5"),
        ("codec", "zip:9"),
        ("device", "tpu"),
        ("prefill_chunk_tokens", "300"),
        ("redis_ttl_seconds", "0"),
        ("load_gate", "sometimes"),
    ],
)
def test_a_bad_value_stops_the_start_and_is_named(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name):
        load_settings(**{name: value})


@pytest.mark.parametrize("variable", ["AQUIFER_REDIS_URL", "REDIS_URL"])
def test_redis_is_found_under_both_names(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "redis://cache:6379")
    assert load_settings().redis_url == "redis://cache:6379"


def test_an_empty_redis_url_means_none_whatever_other_programs_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://cache:6379")
    monkeypatch.setenv("AQUIFER_REDIS_URL", "")
    assert load_settings().redis_url == ""


def test_api_keys_are_a_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUIFER_API_KEYS", '{"secret": "ann"}')
    assert load_settings().api_keys == {"secret": "ann"}


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize("keys", [{"": "ann"}, {"k": ""}, {"k": "a\0b"}])
def test_keys_and_tenants_must_be_fit_to_tell_apart(keys: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="api_keys"):
        Settings(api_keys=keys)
