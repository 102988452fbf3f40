"""The ways to reach Redis: users, unix socket, TLS, cluster; and URLs that cannot work."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from structlog.testing import capture_logs

from aquifer.cachestore import RecordStore, RedisLink, RedisTier, chain_keys, make_namespace

RECORD_BYTES = 5 << 20
KEYS = chain_keys(make_namespace("model", "codec", ""), range(128), segment_tokens=8).segments


def round_trip(tier: RedisTier) -> None:
    """Write and read records of one part and of several through every operation."""
    records = [os.urandom(RECORD_BYTES if index == 0 else 1000) for index in range(len(KEYS))]
    for key, record in zip(KEYS, records, strict=True):
        assert tier.put(key, record)
    leases = tier.get(KEYS)
    assert [lease and bytes(lease.data) for lease in leases] == records
    assert tier.contains(KEYS) == [True] * len(KEYS)
    stats = tier.stats()
    assert stats.up
    assert stats.entries >= len(KEYS)
    assert stats.used_bytes > sum(map(len, records))
    assert tier.delete(KEYS) == len(KEYS)
    assert tier.contains(KEYS) == [False] * len(KEYS)
    assert tier.stats().errors == 0


def test_options_in_the_url(redis_server: Any, make_tier: Any) -> None:
    round_trip(make_tier(f"{redis_server.url}/3?max_connections=5&socket_timeout=4"))
    with Redis(port=redis_server.port, db=3) as raw:
        raw.set("only here", "x")
    assert make_tier(f"{redis_server.url}/3").stats().entries == 1
    assert make_tier(f"{redis_server.url}/4").stats().entries == 0


def test_unix_socket(redis_server: Any, make_tier: Any) -> None:
    round_trip(make_tier(f"unix://{redis_server.socket}"))


def test_password(start_redis: Any, make_tier: Any) -> None:
    server = start_redis("--requirepass", "s3cret/with:signs")
    round_trip(make_tier(f"redis://:s3cret%2Fwith%3Asigns@127.0.0.1:{server.port}"))
    assert not make_tier(server.url).up


def test_a_wrong_password_leaves_the_tier_down_and_out_of_the_log(start_redis: Any, make_tier: Any) -> None:
    server = start_redis("--requirepass", "right")
    with capture_logs() as logs:
        tier = make_tier(f"redis://:wr0ng@127.0.0.1:{server.port}")
    assert not tier.up
    assert tier.get(KEYS[:1]) == [None]
    assert "wr0ng" not in str(logs)
    assert f"127.0.0.1:{server.port}" in str(logs)


def test_a_user_with_just_the_rights_that_serving_needs(redis_server: Any, make_tier: Any) -> None:
    with Redis(port=redis_server.port) as admin:
        rights = ["+set", "+get", "+getex", "+exists", "+unlink", "+info", "+dbsize", "~aquifer:*"]
        admin.execute_command("ACL", "SETUSER", "aquifer", "on", ">pw", *rights)
    round_trip(make_tier(f"redis://aquifer:pw@127.0.0.1:{redis_server.port}"))


def test_a_user_without_rights_leaves_the_tier_down_until_they_are_granted(
    redis_server: Any, make_tier: Any, wait_until: Any
) -> None:
    with Redis(port=redis_server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "aquifer", "on", ">pw", "+ping", "~aquifer:*")
        tier = make_tier(f"redis://aquifer:pw@127.0.0.1:{redis_server.port}")
        assert not tier.up
        admin.execute_command("ACL", "SETUSER", "aquifer", "+@all")
    wait_until(lambda: tier.up)
    assert tier.put(KEYS[0], b"record")


def test_rights_that_are_taken_away_are_an_outage(redis_server: Any, make_tier: Any, wait_until: Any) -> None:
    with Redis(port=redis_server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "aquifer", "on", ">pw", "+@all", "~aquifer:*")
        tier = make_tier(f"redis://aquifer:pw@127.0.0.1:{redis_server.port}")
        assert tier.put(KEYS[0], b"record")
        admin.execute_command("ACL", "SETUSER", "aquifer", "-getex")
        assert tier.get(KEYS[:1]) == [None]
        assert not tier.up
        admin.execute_command("ACL", "SETUSER", "aquifer", "+getex")
    wait_until(lambda: tier.up)
    assert tier.get(KEYS[:1]) != [None]
    assert tier.stats().corrupt == 0


def test_a_user_who_may_not_ask_for_statistics_can_still_serve(redis_server: Any, make_tier: Any) -> None:
    with Redis(port=redis_server.port) as admin:
        rights = ["+set", "+get", "+getex", "+exists", "+unlink", "~aquifer:*"]
        admin.execute_command("ACL", "SETUSER", "aquifer", "on", ">pw", *rights)
    tier = make_tier(f"redis://aquifer:pw@127.0.0.1:{redis_server.port}")
    assert tier.put(KEYS[0], b"record")
    assert tier.stats().capacity_bytes is None
    assert tier.up


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority")
    openssl("req", *key, "-keyout", "redis.key", "-out", "redis.csr", "-subj", "/CN=localhost")
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    authority = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"]
    openssl("x509", "-req", "-in", "redis.csr", *authority, "-extfile", "names", "-out", "redis.crt")
    return tmp_path


def test_tls_checks_the_certificate(
    start_redis: Any, make_tier: Any, free_port: Any, certificates: Path
) -> None:
    port = free_port()
    start_redis(
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *(
            "--tls-cert-file",
            str(certificates / "redis.crt"),
            "--tls-key-file",
            str(certificates / "redis.key"),
        ),
        *("--tls-ca-cert-file", str(certificates / "ca.crt")),
    )
    round_trip(make_tier(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates / 'ca.crt'}"))
    assert not make_tier(f"rediss://127.0.0.1:{port}").up


@pytest.fixture
def cluster(start_redis: Any, free_port: Any, wait_until: Any) -> list[Any]:
    """Three primaries that share the 16384 slots."""
    buses = [free_port() for _ in range(3)]
    servers = [start_redis("--cluster-enabled", "yes", "--cluster-port", str(bus)) for bus in buses]
    clients = [Redis(port=server.port, decode_responses=True) for server in servers]
    borders = [0, 5461, 10923, 16384]
    for index, client in enumerate(clients):
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", borders[index], borders[index + 1] - 1)
        client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port, buses[0])
    for client in clients:
        wait_until(lambda client=client: client.cluster("INFO")["cluster_state"] == "ok")
        wait_until(lambda client=client: client.cluster("INFO")["cluster_known_nodes"] == "3")
        client.close()
    return servers


def test_cluster(cluster: list[Any], make_tier: Any) -> None:
    tier = make_tier(cluster[0].url + "?cluster=true")
    round_trip(tier)
    for key in KEYS:
        tier.put(key, b"record")
    per_node = []
    for server in cluster:
        with Redis(port=server.port) as client:
            per_node.append(client.dbsize())
    assert sum(per_node) == len(KEYS) == tier.stats().entries
    assert min(per_node) > 0, "keys of one prompt spread over the nodes"


def test_named_records_in_a_cluster(cluster: list[Any], make_link: Any) -> None:
    url = cluster[0].url + "?cluster=true"
    here, elsewhere = RecordStore(make_link(url)), RecordStore(make_link(url))
    for name in ("a/1", "a/2", "b/{1}"):
        here.put(name, name.encode(), 60)
    assert elsewhere.list("a/") == ["a/1", "a/2"]
    assert elsewhere.get("b/{1}") == b"b/{1}"


def test_a_slot_that_moved_is_refused_once_and_then_found(cluster: list[Any], make_tier: Any) -> None:
    tier, reader = (make_tier(cluster[0].url + "?cluster=true") for _ in range(2))
    clients = [Redis(port=server.port, decode_responses=True) for server in cluster]
    slot = clients[0].execute_command("CLUSTER", "KEYSLOT", KEYS[0].redis_name)
    new_owner = clients[2 if slot < 10923 else 0]
    for client in [new_owner, *clients]:
        client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", new_owner.cluster("MYID"))
    assert not tier.put(KEYS[0], b"record")
    assert tier.up
    assert tier.put(KEYS[0], b"record")
    assert reader.get(KEYS[:1]) == [None]
    assert reader.stats().corrupt == 0
    (lease,) = reader.get(KEYS[:1])
    assert bytes(lease.data) == b"record"
    for client in clients:
        client.close()


def test_a_lost_cluster_node_is_a_miss_and_recovery_is_automatic(
    cluster: list[Any], make_tier: Any, wait_until: Any
) -> None:
    tier = make_tier(cluster[0].url + "?cluster=true", timeout_seconds=1.0)
    for key in KEYS:
        assert tier.put(key, b"record")
    cluster[1].pause()
    try:
        assert tier.get(KEYS).count(None) > 0
        assert not tier.up
    finally:
        cluster[1].resume()
    wait_until(lambda: tier.up)
    wait_until(lambda: None not in tier.get(KEYS))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost", "scheme"),
        ("redis://localhost?sokcet_timeout=1", "sokcet_timeout"),
        ("redis://:pw@localhost?cluster=maybe", "cluster=maybe"),
    ],
)
def test_a_url_that_cannot_work_stops_the_start(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RedisLink(url)
    assert "pw" not in str(caught.value)
