"""Both clients against the real HTTP service: results, streams, and every branch of the error tree."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine, tier
from http_service import RunningService, running_service
from tiny_tokenizer import tiny_tokenizer

from aquifer.clients import (
    Answer,
    ApiError,
    AquiferError,
    AsyncClient,
    Client,
    ConnectionFailedError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    Progress,
    Sampling,
    ServerFailedError,
    StreamItem,
    Token,
    TooLongError,
    UnauthorizedError,
)
from aquifer.clients.load import percentile, run_load
from aquifer.server.engine.types import FailedEvent

WaitUntil = Callable[[Callable[[], bool]], None]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(tiny_tokenizer().decode)


@pytest.fixture
def service(engine: FakeEngine) -> Iterator[RunningService]:
    with running_service(engine) as running:
        yield running


class Blocking:
    """AsyncClient with Client's face, so that one set of tests holds both."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url, self._options = url, options

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **options: Any) -> Any:
            async with AsyncClient(self._url, **self._options) as client:
                return await getattr(client, name)(*args, **options)

        return lambda *args, **options: asyncio.run(call(*args, **options))

    def generate_stream(self, *args: Any, **options: Any) -> Iterator[StreamItem]:
        async def collect() -> list[StreamItem]:
            async with AsyncClient(self._url, **self._options) as client:
                return [item async for item in client.generate_stream(*args, **options)]

        return iter(asyncio.run(collect()))


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[..., Client]:
    kind: Callable[..., Client] = request.param
    return kind


def test_generate_returns_a_typed_answer(service: RunningService, connect: Callable[..., Client]) -> None:
    sampling = Sampling(max_new_tokens=50, temperature=0.5, seed=3, stop=("END",))
    answer = connect(service.url).generate("Why?", document="Crate 12. ", sampling=sampling)
    assert answer.text == "Crate 12. Why?"
    assert (answer.finish_reason, answer.seed, answer.kv.codec) == ("eos_token", 3, "higgs:4")
    assert answer.generated_tokens == len(answer.tokens) and isinstance(answer.tokens[0], Token)
    assert answer.cached_tokens.total == 0 and answer.timings.ttft_seconds > 0


def test_stream_gives_progress_then_tokens_then_the_answer(
    service: RunningService, connect: Callable[..., Client]
) -> None:
    items = list(connect(service.url).generate_stream("Why?", document="Crate. ", progress=True))
    kinds = [type(item) for item in items]
    assert kinds == sorted(kinds, key=[Progress, Token, Answer].index)
    answer = items[-1]
    assert isinstance(answer, Answer) and answer.text == "Crate. Why?"
    assert "".join(item.text for item in items if isinstance(item, Token)) == answer.text


def test_leaving_a_stream_cancels_the_request(
    service: RunningService, engine: FakeEngine, wait_until: WaitUntil
) -> None:
    engine.go_on.clear()
    with Client(service.url) as client:
        stream = client.generate_stream("a very long question", progress=True)
        assert isinstance(next(stream), Progress)
        stream.close()  # type: ignore[attr-defined]  # a generator
        wait_until(lambda: bool(engine.cancelled))


def test_documents_are_read_listed_asked_about_and_deleted(
    service: RunningService, connect: Callable[..., Client]
) -> None:
    client = connect(service.url)
    document = client.read("Crate 12. ", document_id="c", pin=True, ttl_seconds=60, wait=True)
    assert (document.document_id, document.status, document.pinned) == ("c", "ready", True)
    assert client.document("c") == client.documents()[0]
    assert client.generate("Why?", document_id="c").text == "Crate 12. Why?"
    assert client.read(token_ids=[5, 6], wait=True).tokens == 3
    assert client.delete("c") == 0
    with pytest.raises(NotFoundError, match="'c'"):
        client.document("c")


def test_info_and_readiness(
    service: RunningService, engine: FakeEngine, connect: Callable[..., Client]
) -> None:
    client = connect(service.url)
    info = client.info()
    assert (info.model, info.max_prompt_tokens) == ("fake", 4000)
    assert "selective" in info.raw["kv_modes"]
    assert client.ready().ready
    engine.store.tiers = [tier("ram", up=False)]
    readiness = client.ready()
    assert (readiness.ready, readiness.tiers) == (False, {"ram": "down"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("overloaded", OverloadedError),
        ("too_long", TooLongError),
        ("internal", ServerFailedError),
        ("shutting_down", OverloadedError),
    ],
)
def test_refusals_are_exceptions_of_their_kind(
    service: RunningService,
    engine: FakeEngine,
    connect: Callable[..., Client],
    kind: Any,
    error: type[ApiError],
    stream: bool,
) -> None:
    engine.refuse_with = FailedEvent(kind, "because")
    client = connect(service.url)
    with pytest.raises(error, match="because") as caught:
        list(client.generate_stream("a")) if stream else client.generate("a")
    assert caught.value.request_id
    assert caught.value.retry_after_seconds == (5 if error is OverloadedError else None)


def test_a_wrong_request_is_invalid(service: RunningService, connect: Callable[..., Client]) -> None:
    with pytest.raises(InvalidRequestError, match=r"parameters\.top_p") as caught:
        connect(service.url).generate("a", sampling=Sampling(top_p=7))
    assert (caught.value.status, caught.value.error_type) == (422, "validation")


def test_an_answer_that_breaks_off_is_an_error(
    service: RunningService, engine: FakeEngine, connect: Callable[..., Client]
) -> None:
    engine.fail_after = 2
    with pytest.raises(ServerFailedError, match="the device is gone"):
        list(connect(service.url).generate_stream("a long question"))


def test_keys_are_sent(engine: FakeEngine, connect: Callable[..., Client]) -> None:
    with running_service(engine, api_keys={"k": "ann"}) as service:
        assert connect(service.url, api_key="k").generate("a").text == "a"
        with pytest.raises(UnauthorizedError):
            connect(service.url).generate("a")


def test_no_server_is_a_connection_failure(
    connect: Callable[..., Client], free_port: Callable[[], int]
) -> None:
    client = connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1"):
        client.info()
    with pytest.raises(ConnectionFailedError):
        list(client.generate_stream("a"))


class _BadGateway(http.server.BaseHTTPRequestHandler):
    """A proxy's answers: an error page, and a stream cut short."""

    def do_GET(self) -> None:
        self._answer(502, b"<html>bad gateway</html>")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b": ping\n\n")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def gateway() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _BadGateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_a_proxy_says_is_still_an_api_error(gateway: str, connect: Callable[..., Client]) -> None:
    with pytest.raises(ServerFailedError, match="bad gateway") as caught:
        connect(gateway).info()
    assert caught.value.status == 502


def test_a_stream_cut_short_is_an_error(gateway: str, connect: Callable[..., Client]) -> None:
    with pytest.raises(ServerFailedError, match="ended before the answer") as caught:
        list(connect(gateway).generate_stream("a"))
    assert caught.value.error_type == "incomplete_generation"


def test_every_error_is_an_aquifer_error() -> None:
    for error in (ApiError, ConnectionFailedError):
        assert issubclass(error, AquiferError)
    for error in (InvalidRequestError, NotFoundError, OverloadedError, ServerFailedError, TooLongError):
        assert issubclass(error, ApiError)


def test_load_reports_what_every_asker_saw(service: RunningService, engine: FakeEngine) -> None:
    report = asyncio.run(run_load(service.url, "Crate. ", "Why?", askers=3, questions=2, max_new_tokens=4))
    assert (report.requests, report.errors, len(engine.requests)) == (6, 0, 6)
    assert 0 < report.ttft_p50_seconds <= report.ttft_p90_seconds <= report.ttft_p99_seconds
    assert report.tokens_per_second > 0 and report.cached_ratio == 0


def test_load_counts_refusals(service: RunningService, engine: FakeEngine) -> None:
    engine.refuse_with = FailedEvent("overloaded", "full")
    report = asyncio.run(run_load(service.url, "Crate. ", "Why?", askers=2, questions=1))
    assert (report.errors, report.ttft_p99_seconds) == (2, 0.0)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.9, 4.0), (0.25, 1.0), (1.0, 4.0)])
def test_percentile_is_the_smallest_value_that_covers_the_share(share: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected
