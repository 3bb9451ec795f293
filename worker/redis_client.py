"""Connections to the store, by URL: one server, a Sentinel set, or a Cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from schemas.errors import ConfigError

TIMEOUT_S = 5


def connect(url: str, opened: Callable[[], None] | None = None) -> Any:
    """A client for `url`. Nothing is sent yet, but for a Cluster, whose layout is read at once.

    `opened` is called for every connection that the client opens.

    redis://, rediss:// (TLS) and unix:// name one server; redis+cluster://host:port,host:port some nodes of a Cluster;
    redis+sentinel://host:port,host:port/service/database the Sentinels of a service. The last two take TLS
    as rediss+cluster and rediss+sentinel, and a user and password before the hosts.

    No retries in the client: the worker's loop retries, and keeps its place in the consumer group meanwhile.
    """
    options: dict[str, Any] = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    scheme, _, kind = urlsplit(url).scheme.partition("+")
    if opened is not None:
        options["redis_connect_func"] = _shake_hands(opened, alone=kind != "cluster")
    if not kind:
        return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options)
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    options |= {"username": unquote(user) or None, "password": unquote(password) or None, "ssl": scheme == "rediss"}
    nodes = [_host_and_port(host, 26379 if kind == "sentinel" else 6379) for host in hosts.split(",")]
    if kind == "cluster":
        startup = [ClusterNode(host, port) for host, port in nodes]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=startup, retry=Retry(NoBackoff(), 1), **options)
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ConfigError("store.url: a Sentinel URL needs the service's name: redis+sentinel://host:port/service/0")
    sentinel: Any = Sentinel(nodes, sentinel_kwargs={"socket_timeout": TIMEOUT_S}, **options)  # type: ignore[no-untyped-call]
    return sentinel.master_for(service, db=int(database or 0), retry=Retry(NoBackoff(), 0))


def _shake_hands(opened: Callable[[], None], alone: bool) -> Callable[[Any], None]:
    """What a client does with a new connection. `alone`: nobody else logs in and chooses the protocol."""

    def shake_hands(connection: Any) -> None:
        if alone:
            connection.on_connect()
        opened()

    return shake_hands


def _host_and_port(text: str, default: int) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host:
        return text, default
    if not port.isdigit():
        raise ConfigError(f"store.url: {text!r} is no host:port")
    return host.strip("[]"), int(port)
