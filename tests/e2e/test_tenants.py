"""Tenants, and requests with different salts, share neither cache nor documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis_server import RedisServer
from service_process import ServiceProcess, document

from aquifer.clients import Answer, Client, NotFoundError, Sampling, UnauthorizedError

KEYS = {"key-of-alpha": "alpha", "key-of-beta": "beta"}


@pytest.fixture(scope="module")
def service(start_service: Callable[..., ServiceProcess], module_redis: RedisServer) -> ServiceProcess:
    # With every cache there is: the device's too.
    return start_service(api_keys=KEYS, redis_url=module_redis.url, gpu_cache=True)


@pytest.fixture
def alpha(service: ServiceProcess) -> Iterator[Client]:
    with Client(service.url, api_key="key-of-alpha") as client:
        yield client


@pytest.fixture
def beta(service: ServiceProcess) -> Iterator[Client]:
    with Client(service.url, api_key="key-of-beta") as client:
        yield client


def ask(client: Client, text: str, cache_salt: str | None = None) -> Answer:
    sampling = Sampling(max_new_tokens=4)
    return client.generate("How many?", document=text, sampling=sampling, cache_salt=cache_salt)


def test_a_tenant_never_hits_what_another_stored(alpha: Client, beta: Client) -> None:
    text = document("Between tenants")
    assert ask(alpha, text).cached_tokens.total == 0
    own = ask(alpha, text)
    assert own.cached_tokens.total == own.prompt_tokens // 256 * 256
    others = ask(beta, text)
    assert others.cached_tokens.total == 0
    assert others.text == own.text


def test_a_salt_keeps_requests_of_one_tenant_apart(alpha: Client) -> None:
    text = document("Salted")
    ask(alpha, text, "red")
    assert ask(alpha, text, "red").cached_tokens.total > 0
    assert ask(alpha, text, "blue").cached_tokens.total == 0
    assert ask(alpha, text).cached_tokens.total == 0


def test_a_tenant_never_sees_anothers_documents(alpha: Client, beta: Client) -> None:
    alpha.read(document("A secret"), document_id="secret", wait=True)
    assert [known.document_id for known in alpha.documents()] == ["secret"]
    assert beta.documents() == []
    with pytest.raises(NotFoundError):
        beta.document("secret")
    with pytest.raises(NotFoundError):
        beta.generate("How many?", document_id="secret")
    with pytest.raises(NotFoundError):
        beta.delete("secret")
    # The same name is free for another tenant's own text.
    own = beta.read(document("Nothing secret", num_tokens=300), document_id="secret", wait=True)
    assert own.tokens < alpha.document("secret").tokens
    assert beta.delete("secret") == 1
    assert alpha.document("secret").status == "ready"


@pytest.mark.parametrize("key", [None, "", "key-of-alph", "key-of-alphaa", "alpha"])
def test_without_a_tenants_key_nothing_is_answered(service: ServiceProcess, key: str | None) -> None:
    with Client(service.url, api_key=key) as stranger:
        with pytest.raises(UnauthorizedError):
            ask(stranger, "text")
        with pytest.raises(UnauthorizedError):
            stranger.documents()
        assert stranger.ready().ready, "probes need no key"
