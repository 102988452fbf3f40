"""SIGTERM: what was accepted is answered, nothing new is taken, and the process ends well."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from service_process import ServiceProcess, document

from aquifer.clients import Answer, Client, ConnectionFailedError, Sampling, Token

LONG = Sampling(max_new_tokens=400)


def test_sigterm_lets_running_requests_finish(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service()
    with ThreadPoolExecutor(2) as pool:
        stream = service.client.generate_stream("Go on.", sampling=LONG)
        first = next(stream)
        assert isinstance(first, Token)
        whole = pool.submit(
            service.client.generate, "And on.", document=document("Late", num_tokens=600), sampling=LONG
        )
        # Both are on their way: neither can have ended, being hundreds of tokens long.
        while service.metric("requests_running") < 2:
            assert not whole.done()
        service.http.close()
        service.signal(signal.SIGTERM)
        *_, end = stream
        assert isinstance(end, Answer)
        for answer in (end, whole.result()):
            assert (answer.generated_tokens, answer.finish_reason) == (400, "length")
    assert service.wait() == 0, service.log
    with Client(service.url) as late, pytest.raises(ConnectionFailedError):
        late.ready()
    assert "Traceback" not in service.log
