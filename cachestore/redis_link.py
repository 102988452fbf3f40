"""One Redis server or cluster behind a circuit breaker.

    up --(round trip fails)--> down --(probe succeeds, tried once a second)--> up

While it is down every call returns at once, so that an outage costs a request one timeout at most.
Nothing that redis-py raises gets past this file.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs, urlencode, urlsplit

import structlog
from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, parse_url
from redis.exceptions import RedisClusterException, RedisError, ResponseError
from redis.retry import Retry

from aquifer.cachestore.redis_wire import Bulk, Command, RefusedError, Reply, ReplyReader, pack

log = structlog.get_logger(__name__)

Receive = Callable[[int, Reply | Bulk, ReplyReader], None]

# Refusals that mean "this server cannot serve us now", not "this command is wrong".
_OUTAGE_CODES = frozenset({"READONLY", "NOPERM", "NOAUTH", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "BUSY"})
# What a round trip may raise. RedisClusterException stands outside redis-py's own RedisError.
_FAILURES = (RedisError, RedisClusterException, RefusedError, OSError)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server tells about itself, summed over the primaries of a cluster."""

    used_bytes: int
    capacity_bytes: int | None
    entries: int
    evictions: int


class RedisLink:
    """Sends commands in bulk over pooled connections; None instead of replies when Redis is not there.

    url: redis://, rediss:// or unix://, user and password in it; `?cluster=true` for Redis Cluster
    connect_timeout_seconds, timeout_seconds: for connecting, and for each wait on the socket
    probe_seconds: how often to try again while it is down
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_seconds: float = 1.0,
        timeout_seconds: float = 2.0,
        probe_seconds: float = 1.0,
    ) -> None:
        """Tries Redis once; an unreachable one leaves the link down. Raises ValueError for a bad URL."""
        plain_url, self._is_cluster = _split_cluster_flag(url)
        self._address = _address_without_password(plain_url)
        self._options: dict[str, Any] = {
            "socket_connect_timeout": connect_timeout_seconds,
            "socket_timeout": timeout_seconds,
            # RESP2: nothing here needs more, and RESP3 adds a handshake and push messages.
            "protocol": 2,
            # redis-py refuses to open a 101st; whoever calls bounds how many it uses at a time.
            "max_connections": 10_000,
            **parse_url(plain_url),
        }
        _check_options(self._options, plain_url)
        self._probe_seconds = probe_seconds
        self._client: Redis | RedisCluster | None = None
        self._lock = threading.Lock()
        self._up = True
        self._errors = 0
        self._closed = threading.Event()
        self._prober: threading.Thread | None = None
        self._ping()

    @property
    def up(self) -> bool:
        return self._up

    @property
    def errors(self) -> int:
        """Round trips that failed and commands that Redis refused, since the start."""
        return self._errors

    def execute(self, commands: Sequence[Command]) -> list[Any] | None:
        """Send commands in one go, without a transaction, and return their replies as Redis gave them.

        The key is the first argument of each command. A command that Redis refused (wrong type,
        memory full) has its RefusedError as the reply. None: Redis is down, or went down now.
        """
        replies: list[Any] = [None] * len(commands)

        def keep(index: int, head: Reply | Bulk, reader: ReplyReader) -> None:
            replies[index] = reader.value(head.length) if isinstance(head, Bulk) else head

        return replies if self.stream(commands, keep, window=len(commands)) else None

    def stream(self, commands: Sequence[Command], receive: Receive, *, window: int) -> bool:
        """Send commands with `window` of them in flight, and receive the replies as they arrive.

        receive(index, head, reader) is called in the order of `commands`; where the head is a Bulk,
        it reads that string to its end. The window bounds what Redis has to hold in its output
        buffer: it would answer a thousand large reads into memory at once.
        False: Redis is down, or went down before all replies had come.
        """
        if not self._up:
            return False
        try:
            self._exchange(commands, receive, window)
        except _FAILURES as error:
            self._go_down(error)
            return False
        return True

    def server_info(self) -> ServerInfo | None:
        """Ask for memory, keys and evictions. None when down, or when the user may not ask."""
        if not self._up:
            return None
        try:
            client = self._connected()
            if isinstance(client, RedisCluster):
                infos = list(client.info(target_nodes=RedisCluster.PRIMARIES).values())
                entries = client.dbsize(target_nodes=RedisCluster.PRIMARIES)
            else:
                infos = [client.info()]
                entries = client.dbsize()
        except ResponseError:
            return None  # no permission for INFO is no outage
        except _FAILURES as error:
            self._go_down(error)
            return None
        return ServerInfo(
            used_bytes=sum(info["used_memory"] for info in infos),
            capacity_bytes=sum(info["maxmemory"] for info in infos) or None,
            entries=entries,
            evictions=sum(info["evicted_keys"] for info in infos),
        )

    def close(self) -> None:
        """Close every connection. The link stays down for good."""
        self._closed.set()
        with self._lock:
            self._up = False
            prober, client = self._prober, self._client
        if prober is not None:
            prober.join()
        if client is not None:
            client.close()

    def _exchange(self, commands: Sequence[Command], receive: Receive, window: int) -> None:
        client = self._connected()
        moved = False
        lanes: dict[ConnectionPool, _Lane] = {}
        with ExitStack() as opened:
            lane_of = []
            for command in commands:
                pool = _pool_for(client, command[1])
                if pool not in lanes:
                    lanes[pool] = opened.enter_context(_Lane(pool))
                lanes[pool].commands.append(command)
                lane_of.append(lanes[pool])
            for lane in lanes.values():
                lane.top_up(window)
            for index, lane in enumerate(lane_of):
                head = lane.reader.head()
                if isinstance(head, RefusedError):
                    if head.code in _OUTAGE_CODES:
                        raise head
                    moved |= head.code in {"MOVED", "ASK"}
                    with self._lock:
                        self._errors += 1
                receive(index, head, lane.reader)
                lane.answered += 1
                lane.top_up(window)
        if moved and isinstance(client, RedisCluster):
            # Slots are moving between nodes. What was refused stays refused; the next call knows better.
            client.nodes_manager.initialize()

    def _connected(self) -> Redis | RedisCluster:
        with self._lock:
            if self._client is None:
                # No retries: the breaker decides when to try again, and a request does not wait.
                options, retry = dict(self._options), Retry(NoBackoff(), 0)
                if self._is_cluster:
                    # Connects at once, to learn the topology; which is why it is made here.
                    is_tls = options.pop("connection_class", Connection) is not Connection
                    self._client = RedisCluster(**options, ssl=is_tls, retry=retry)
                else:
                    self._client = Redis(connection_pool=ConnectionPool(**options, retry=retry))
            return self._client

    def _go_down(self, error: Exception) -> None:
        with self._lock:
            self._errors += 1
            if not self._up or self._closed.is_set():
                return
            self._up = False
            self._prober = threading.Thread(target=self._probe_until_up, name="redis-probe", daemon=True)
            self._prober.start()
        log.warning("redis is down; serving without it", address=self._address, error=str(error))

    def _probe_until_up(self) -> None:
        while not self._closed.wait(self._probe_seconds):
            if self._answers() is None:
                with self._lock:
                    self._up = not self._closed.is_set()
                log.info("redis is up again", address=self._address)
                return

    def _ping(self) -> None:
        if (error := self._answers()) is not None:
            self._go_down(error)

    def _answers(self) -> Exception | None:
        """Do what serving needs on every node: None if it works, otherwise what went wrong."""
        try:
            client = self._connected()
            if isinstance(client, RedisCluster):
                client.nodes_manager.initialize()  # another node may have taken over
                client.ping(target_nodes=RedisCluster.PRIMARIES)
            # A read that refreshes a TTL, not PING: a user without rights or a read-only replica
            # answers PING and still cannot serve.
            self._exchange([("GETEX", b"aquifer:probe", "PERSIST")], _expect_nothing, window=1)
        except _FAILURES as error:
            return error
        return None


def _expect_nothing(index: int, head: Reply | Bulk, reader: ReplyReader) -> None:
    if head is not None:
        raise head if isinstance(head, RefusedError) else ConnectionError("the probe key holds a value")


def _pool_for(client: Redis | RedisCluster, key: Any) -> ConnectionPool:
    if isinstance(client, RedisCluster):
        client = client.get_redis_connection(client.get_node_from_key(key))
    return client.connection_pool


class _Lane:
    """One connection, the commands meant for it, and how far it has come with them.

    redis-py makes the connection (login, TLS, timeouts); what goes over it is redis_wire's.
    Its pipelines would hold every reply until the last one is there, and its cluster pipelines send
    each command of a node that timed out once more, one by one, each with a timeout of its own.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self.commands: list[Command] = []
        self.answered = 0
        self._sent = 0
        self._pool = pool
        self._connection = pool.get_connection()
        # Between two exchanges nothing is left unread, so that redis-py and this reader can take turns.
        connected = cast(socket.socket, self._connection._sock)
        self.reader = ReplyReader(connected)

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.answered < self._sent:
            self._connection.disconnect()  # its next reply would be taken for somebody else's
        self._pool.release(self._connection)

    def top_up(self, window: int) -> None:
        """Send on, if half of the window has come back."""
        if self._sent - self.answered <= window // 2:
            batch = self.commands[self._sent : self.answered + window]
            if batch:
                self._connection.send_packed_command(pack(batch))
                self._sent += len(batch)


def _split_cluster_flag(url: str) -> tuple[str, bool]:
    """Take `cluster=true` out of the query; redis-py does not know it."""
    base, _, query_text = url.partition("?")
    query = parse_qs(query_text, keep_blank_values=True)
    flag = query.pop("cluster", ["false"])[0].lower()
    if flag not in {"true", "false", "1", "0"}:
        raise ValueError(f"cluster={flag} in the Redis URL: say true or false")
    plain = f"{base}?{urlencode(query, doseq=True)}" if query else base
    return plain, flag in {"true", "1"}


def _address_without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _check_options(options: dict[str, Any], url: str) -> None:
    """Make one connection object, without connecting, so that a misspelt option stops the start."""
    connection_class = options.get("connection_class", Connection)
    of_the_pool = {"connection_class", "max_connections"}
    arguments = {name: value for name, value in options.items() if name not in of_the_pool}
    try:
        connection_class(**arguments)
    except (TypeError, RedisError) as error:
        raise ValueError(f"bad Redis URL {_address_without_password(url)}: {error}") from error
