"""The service on a free port, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from tiny_tokenizer import tiny_tokenizer

from aquifer.cachestore.records import RecordStore
from aquifer.cachestore.redis_link import RedisLink
from aquifer.server.app import create_app
from aquifer.server.logs import configure_logging
from aquifer.server.metrics import Metrics
from aquifer.server.settings import Settings
from aquifer.server.tokenization import Tokenizer


@dataclass
class RunningService:
    url: str
    http: httpx.Client
    engine: Any
    settings: Settings
    metrics: Metrics

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def document_status(self, document_id: str) -> str:
        return str(self.http.get(f"/documents/{document_id}").json()["status"])

    def metric(self, name: str, **labels: str) -> float | None:
        """A metric's value as a scrape shows it."""
        self.http.get("/metrics").raise_for_status()
        return self.metrics.registry.get_sample_value(name, labels)


@contextmanager
def running_service(
    engine: Any, *, redis_url: str | None = None, hf_tokenizer: Any = None, **settings: Any
) -> Iterator[RunningService]:
    configure_logging("error")
    chosen = Settings(port=0, **settings)
    metrics = Metrics()
    tokenizer = Tokenizer(hf_tokenizer or tiny_tokenizer(), engine.info.max_prompt_tokens)
    link = RedisLink(redis_url) if redis_url else None
    app = create_app(engine, tokenizer, RecordStore(link), chosen, metrics)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=30) as http:
            yield RunningService(url, http, engine, chosen, metrics)
    finally:
        server.should_exit = True
        thread.join()
        if link is not None:
            link.close()
