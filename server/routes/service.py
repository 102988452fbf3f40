"""What the routes share: the parts of the service, and who is asking."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from aquifer.server.documents import Documents
from aquifer.server.metrics import Metrics
from aquifer.server.settings import Settings
from aquifer.server.tokenization import Tokenizer

if TYPE_CHECKING:
    from aquifer.server.engine.engine import Engine


@dataclass(frozen=True)
class Service:
    """Everything a handler needs; one object per application, in `app.state.service`.

    started: Unix time, seconds
    """

    engine: Engine
    tokenizer: Tokenizer
    documents: Documents
    settings: Settings
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        return self.settings.served_model_name or self.engine.info.model


@dataclass(frozen=True)
class Caller:
    """Who asks, as the gate found out."""

    tenant: str
    request_id: str

    def salt(self, request_salt: str | None) -> str:
        """The cache salt handed to the engine: different for different tenants or request salts (settings
        refuse a tenant with NUL in its name), and empty where there is neither, as for `aquifer ask`."""
        if not self.tenant and not request_salt:
            return ""
        return f"{self.tenant}\0{request_salt or ''}"


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _caller(request: Request) -> Caller:
    return Caller(request.state.tenant, request.state.request_id)


ServiceDep = Annotated[Service, Depends(_service)]
CallerDep = Annotated[Caller, Depends(_caller)]
