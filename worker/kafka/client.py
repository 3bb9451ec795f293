"""How all of the worker's Kafka clients are opened, waited for and closed, with errors that a person can act on."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import KafkaError, KafkaTimeoutError, SaslAuthenticationFailedError, UnsupportedSaslMechanismError

from schemas.config import Kafka, Topics
from schemas.errors import ConfigError, LoginError, UnreachableError
from worker.kafka.batches import pass_over_unreadable
from worker.kafka.nodes import wait_for_gone_nodes
from worker.kafka.reading import wait_while_read
from worker.kafka.records import forgive_header_names
from worker.kafka.sockets import leave_no_sockets
from worker.kafka.unpack import bound_unpacking

log = logging.getLogger("driftkeel.kafka")
Result = TypeVar("Result")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
FORCED_CLOSE_S = 5.0  # for a producer's thread to give up what it has
REFUSALS = (SaslAuthenticationFailedError, UnsupportedSaslMechanismError)
SPEAKER = logging.getLogger("kafka.net.manager")
_speaking = threading.Lock()
_listeners, _levels = 0, (0, 0)


def connection(settings: Kafka) -> dict[str, Any]:
    """Arguments for every client: address, timeouts, security."""
    arguments: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap.split(","),
        "security_protocol": settings.security_protocol,
        "bootstrap_timeout_ms": 5_000,
        "reconnect_backoff_max_ms": 2_000,
    }
    if settings.security_protocol.endswith("SSL"):
        arguments["ssl_context"] = _tls(settings)
    if settings.security_protocol.startswith("SASL"):
        if not (settings.sasl_mechanism and settings.sasl_username and settings.sasl_password):
            raise ConfigError(
                f"kafka.security_protocol {settings.security_protocol} needs "
                "sasl_mechanism, sasl_username and sasl_password"
            )
        arguments["sasl_mechanism"] = settings.sasl_mechanism
        arguments["sasl_plain_username"] = settings.sasl_username
        arguments["sasl_plain_password"] = settings.sasl_password.get_secret_value()
    return arguments


def _tls(settings: Kafka) -> ssl.SSLContext:
    used = f"kafka.ssl_cafile {settings.ssl_cafile}"
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
        if settings.ssl_certfile:
            used = f"kafka.ssl_certfile {settings.ssl_certfile} with ssl_keyfile {settings.ssl_keyfile or 'not set'}"
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{used} cannot be used: {error}") from error
    return context


def open_client(kind: Any, **arguments: Any) -> Any:
    """A client of class `kind`, with the patches of this folder that all clients need.

    - If it cannot reach its broker, its thread and its sockets are closed, which kafka-python leaves open.
    - It never asks for a topic to be created. kafka-python 3.0.12 does so whenever it looks for one, whatever its
      configuration says, and most brokers obey: a deleted topic would come back at once, with default partitions.
    - A consumer returns `worker.kafka.batches.Unreadable` values in place of what cannot be read. Its poll raises
      ConfigError for records in a compression that is not installed.

    Raises KafkaError or OSError; one of REFUSALS where the broker answers and refuses the login.
    """
    forgive_header_names()
    bound_unpacking()
    leave_no_sockets()
    wait_for_gone_nodes()
    opened: list[Any] = []

    def remember(**options: Any) -> Any:
        opened.append(kind.DEFAULT_CONFIG["kafka_client"](**options))
        opened[-1].cluster.config["allow_auto_create_topics"] = False
        return opened[-1]

    with _listening() as heard:
        try:
            client = kind(kafka_client=remember, **arguments)
            if isinstance(client, KafkaConsumer):
                pass_over_unreadable(client)
                wait_while_read(client)
            return client
        except (KafkaError, OSError) as error:
            for connections in opened:
                connections.close()
            if refusals := [reason for reason in heard if isinstance(reason, REFUSALS)]:
                raise refusals[-1] from error
            if isinstance(error, KafkaTimeoutError):
                raise KafkaTimeoutError(_unreached(error, heard, arguments)) from error
            raise


def open_reader(settings: Kafka, **more: Any) -> Any:
    """A consumer outside of any group, which commits nothing; the caller assigns its partitions. Raises as
    `open_client`."""
    options = {"enable_auto_commit": False, "fetch_max_wait_ms": settings.fetch_max_wait_ms, **more}
    return open_client(KafkaConsumer, **connection(settings), **options)


def open_admin(settings: Kafka) -> Any:
    """A client that looks at topics and groups. Raises as `open_client`."""
    return open_client(KafkaAdminClient, **connection(settings))


def _unreached(error: KafkaError, heard: list[KafkaError], arguments: dict[str, Any]) -> str:
    """Why a client gave up. Its own error says only that it did."""
    reasons = [reason for reason in heard if reason != error]
    text = ": ".join(str(part) for reason in [error, *reasons[-1:]] for part in reason.args[:1])
    text += _of_tls(text, arguments.get("security_protocol", "PLAINTEXT"))
    # The client may see the end of the connection before the answer that comes with it.
    return f"{text}, or the login is refused" if "sasl_mechanism" in arguments else text


def _of_tls(text: str, protocol: str) -> str:
    """A hint where it is likely that one side uses TLS and the other does not, of which no error says a word."""
    if protocol.endswith("SSL"):
        alone = "Handshake failed" in text and not any(word in text.upper() for word in ("CERTIFICATE", "ALERT"))
        return f": likely that listener is without TLS, and kafka.security_protocol is {protocol}" if alone else ""
    if "socket disconnected" in text:
        return f": likely that listener wants TLS, and kafka.security_protocol is {protocol}"
    return ""


def close_producer(producer: Any, patience_s: float) -> bool:
    """Close a producer. It waits for at most `patience_s` until the broker has everything; returns whether it has.

    The client's own close raises where the broker has not, and leaves its thread and connections open: what was given
    up would still be sent when the broker is back.
    """
    try:
        producer.close(timeout=patience_s)
    except KafkaTimeoutError:
        producer._sender.force_close()
        producer._sender.join(FORCED_CLOSE_S)
        producer._closed = True  # Otherwise its finalizer waits again, and raises where nobody can catch it.
        return False
    return True


@contextlib.contextmanager
def _listening() -> Iterator[list[KafkaError]]:
    """Collects the errors that a client logs while it is opened. It retries until its time is over, and the error that
    it raises then does not say why."""
    found: list[KafkaError] = []

    def note(record: logging.LogRecord) -> bool:
        found.extend(part for part in record.args or () if isinstance(part, KafkaError))
        return record.levelno >= level

    level = _speak()
    SPEAKER.addFilter(note)
    try:
        yield found
    finally:
        SPEAKER.removeFilter(note)
        _fall_silent()


def _speak() -> int:
    """Have the client log its warnings. Returns the level from which on they were logged before. Several threads may
    listen at the same time."""
    global _listeners, _levels
    with _speaking:
        if not _listeners:
            _levels = SPEAKER.getEffectiveLevel(), SPEAKER.level
            SPEAKER.setLevel(min(_levels[0], logging.WARNING))
        _listeners += 1
        return _levels[0]


def _fall_silent() -> None:
    global _listeners
    with _speaking:
        _listeners -= 1
        if not _listeners:
            SPEAKER.setLevel(_levels[1])


def check_checksum_speed() -> None:
    """Warn where the client would compute checksums in Python, forty times slower. Nothing else says so."""
    if importlib.util.find_spec("crc32c") is None:
        log.warning("the package crc32c is missing, Kafka traffic will be slow; pip install 'kafka-python[crc32c]'")


def until_reached(
    action: Callable[[], Result], what: str, timeout_s: float, stop: threading.Event | None = None
) -> Result:
    """Call `action` until it succeeds, with growing pauses, and log what it waits for.

    Raises UnreachableError when `timeout_s` is over or `stop` is set, ConfigError where the login is refused.
    """
    deadline, pause = time.monotonic() + timeout_s, FIRST_PAUSE_S
    stop = stop or threading.Event()
    while True:
        try:
            return action()
        except REFUSALS as error:
            raise ConfigError(
                f"{what} refuses the login: {error}; correct kafka.sasl_mechanism, sasl_username and sasl_password"
            ) from error
        except LoginError as error:
            raise ConfigError(str(error)) from error
        except (KafkaError, OSError, UnreachableError) as error:
            reason = " ".join(str(error).split()).removeprefix(f"{what} ") or type(error).__name__
        left = deadline - time.monotonic()
        if left <= 0 or stop.is_set():
            raise UnreachableError(f"{what} cannot be reached: {reason}; is it running, and is the address right?")
        log.warning("%s cannot be reached (%s); trying again", what, reason)
        stop.wait(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def require_topics(settings: Kafka, stop: threading.Event | None = None, only: Sequence[str] | None = None) -> None:
    """Wait until the broker answers and has the topics of a worker, or `only` these, and log what it waits for.

    A site's topics may be created a moment after its broker has started. Raises UnreachableError, also where `stop` is
    set meanwhile; or ConfigError that names the topics which are still missing after the time for connecting.
    """
    deadline, stop = time.monotonic() + settings.connect_timeout_s, stop or threading.Event()
    what = f"the broker at {settings.bootstrap}"
    admin = until_reached(lambda: open_admin(settings), what, settings.connect_timeout_s, stop)
    topics = settings.topics
    needed = only or [topics.frames, topics.predictions, topics.updates, topics.dead_letters]
    pause = FIRST_PAUSE_S
    try:
        while missing := _missing(admin, needed, what, deadline, stop):
            left, names = deadline - time.monotonic(), " and no topic ".join(missing)
            them = "them" if missing[1:] else "it"
            if stop.is_set():
                raise UnreachableError(f"{what} has no topic {names}, and was not waited for any longer")
            if left <= 0:
                advice = "; ".join(f"kafka-topics.sh --create --topic {_creation(name, topics)}" for name in missing)
                advice = f"create {them} first ({advice}), or correct kafka.topics"
                raise ConfigError(f"{what} has no topic {names}; {advice}")
            if pause == FIRST_PAUSE_S:  # Once.
                log.warning("%s has no topic %s yet; waiting %.0f s for %s", what, names, left, them)
            stop.wait(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)
    finally:
        admin.close()


def _creation(missing: str, topics: Topics) -> str:
    """The arguments that create a missing topic, as in docs/deploy.md."""
    settings = {
        topics.frames: "--partitions 12",
        topics.commands: "--partitions 1 --config retention.ms=-1",
    }
    return f"{missing} {settings.get(missing, '--partitions 1')}"


def _missing(
    admin: KafkaAdminClient, needed: Sequence[str], what: str, deadline: float, stop: threading.Event
) -> list[str]:
    known = until_reached(lambda: set(admin.list_topics()), what, deadline - time.monotonic(), stop)
    return [topic for topic in needed if topic not in known]


def create_topics(settings: Kafka, frame_partitions: int) -> None:
    """Create the five topics: frames with the given partitions, the others with one each.

    Commands are retained for ever, because they also hold for streams that come later.
    """
    topics = settings.topics
    wanted = {
        topics.frames: {"num_partitions": frame_partitions, "replication_factor": 1},
        **{
            topic: {"num_partitions": 1, "replication_factor": 1}
            for topic in (topics.predictions, topics.updates, topics.dead_letters)
        },
        topics.commands: {"num_partitions": 1, "replication_factor": 1, "configs": {"retention.ms": "-1"}},
    }
    what = f"the broker at {settings.bootstrap}"
    with contextlib.closing(until_reached(lambda: open_admin(settings), what, settings.connect_timeout_s)) as admin:
        admin.create_topics(wanted, wait_for_metadata=True)
