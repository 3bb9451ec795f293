"""Connections to the store, by URL: one server, a Sentinel set, or a Cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from schemas.config import Store
from schemas.errors import ConfigError

TIMEOUT_S = 5


def connect(settings: Store, opened: Callable[[], None] | None = None) -> Any:
    """A client for `settings.url`. It sends nothing yet, except to a Cluster, whose layout is read at once.

    redis://, rediss:// (TLS) and unix:// name one server; redis+cluster://host:port,host:port some nodes of a Cluster;
    redis+sentinel://host:port,host:port/service/database the Sentinels of a service. The last two with TLS are
    rediss+cluster and rediss+sentinel. A user and a password before the hosts are those of the servers; those of
    Sentinels are `settings.sentinel_username` and `sentinel_password`. `opened` is called for every connection that is
    opened.

    The client itself does not retry: the worker's loop does, and keeps its place in the consumer group meanwhile.
    """
    try:
        return _connect(settings, opened)
    except (ValueError, TypeError) as error:
        # The client's own message is left out, as it may quote parts of a password.
        raise ConfigError(
            f"store.url {settings.address} cannot be used: its port, its database or an option behind '?' is wrong; "
            "a password with / ? # @ or % in it must be percent-encoded"
        ) from error


def _connect(settings: Store, opened: Callable[[], None] | None) -> Any:
    url = settings.url.get_secret_value()
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    options: dict[str, Any] = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
    tls = _tls(settings) if scheme == "rediss" else {}
    if opened is not None:
        options["redis_connect_func"] = _shake_hands(opened, alone=kind != "cluster")
    if not kind:
        if scheme != "unix":
            int(parts.path.strip("/") or 0)  # Raises here: the client takes database 0 where this is no number.
        client: Any = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options, **tls)
        # Raises TypeError for an unknown option in the URL, which otherwise the first call would.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
        return client
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    options |= {"username": unquote(user) or None, "password": unquote(password) or None}
    nodes = [_host_and_port(host, 26379 if kind == "sentinel" else 6379) for host in hosts.split(",")]
    if tls:
        tls["ssl"] = True
    if kind == "cluster":
        startup = [ClusterNode(host, port) for host, port in nodes]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=startup, retry=Retry(NoBackoff(), 1), **options, **tls)
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ConfigError("store.url: a Sentinel URL needs the service's name: redis+sentinel://host:port/service/0")
    secret = settings.sentinel_password
    asking = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),  # By default the client tries a Sentinel ten times before it asks the next one.
        "username": settings.sentinel_username,
        "password": secret and secret.get_secret_value(),
        **tls,
    }
    sentinel: Any = Sentinel(nodes, sentinel_kwargs=asking, **options, **tls)  # type: ignore[no-untyped-call]
    return sentinel.master_for(service, db=int(database or 0), retry=Retry(NoBackoff(), 0))


def _tls(settings: Store) -> dict[str, Any]:
    files = {
        "ssl_ca_certs": settings.ssl_cafile,
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
    }
    missing = [path for path in files.values() if path and not Path(path).is_file()]
    if missing:
        raise ConfigError(f"store: there is no file {missing[0]}; correct store.ssl_cafile, ssl_certfile, ssl_keyfile")
    return files


def _shake_hands(opened: Callable[[], None], alone: bool) -> Callable[[Any], None]:
    """What a client does with a new connection. `alone`: logging in and choosing the protocol is left to this."""

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
