"""Security settings on their way to the client; TLS against the real broker behind a proxy that ends it."""

from __future__ import annotations

import gc
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import SaslAuthenticationFailedError
from pydantic import SecretStr

from monitoring.metrics import WorkerMetrics
from schemas.config import Kafka, Topics
from schemas.errors import ConfigError, UnreachableError
from tests.broker.process import start_own_broker
from tests.servers import TlsProxy, write_certificates
from tests.worker.consume.test_consume import Notes, wait_for
from worker.consume.consumer import FrameConsumer
from worker.consume.offsets import Offsets
from worker.embedded import free_port, start_broker
from worker.kafka import client as kafka_client
from worker.kafka.client import connection, create_topics, require_topics
from worker.publish.publisher import Message, Publisher


def test_tls_with_a_client_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = write_certificates(authority, tmp_path)
    port = free_port()
    broker = start_broker(port=free_port(), advertised=port)
    proxy = TlsProxy(broker.port, authority, port, client_certificate=True)
    settings = Kafka(bootstrap=f"127.0.0.1:{port}", security_protocol="SSL", **files)
    create_topics(settings, 2)
    require_topics(settings)
    publisher = Publisher(settings, "w", threading.Event())
    publisher.send(Message("updates", b"cam", b"1", []))
    publisher.settle(lambda: None)
    publisher.close()
    with pytest.raises(UnreachableError):
        require_topics(settings.model_copy(update={"ssl_cafile": None, "connect_timeout_s": 1}))
    proxy.close()
    broker.child.stop(0)


def test_a_producer_that_is_closed_sends_nothing_later(tmp_path: Path) -> None:
    """What a worker has given up is published by the stream's next owner, not by a thread that it left behind."""
    port = free_port()
    broker = start_own_broker(tmp_path, port=port)
    settings = Kafka(bootstrap=broker.bootstrap)
    create_topics(settings, 1)
    producer = kafka_client.open_client(KafkaProducer, **connection(settings))
    producer.send("frames", b"1").get(120)
    broker.child.process.kill()
    broker.child.process.wait()
    given_up = producer.send("frames", b"2")
    sender = producer._sender
    assert not kafka_client.close_producer(producer, 0)
    assert not sender.is_alive()
    assert given_up.failed()
    del producer
    gc.collect()  # The tests fail if its finalizer raises.
    again = start_own_broker(tmp_path, port=port)
    producer = kafka_client.open_client(KafkaProducer, **connection(settings))
    assert producer.send("frames", b"3").get(120).offset == 1
    assert kafka_client.close_producer(producer, 10)
    again.child.stop(0)


def test_sasl_settings_reach_the_client(tmp_path: Path) -> None:
    files = write_certificates(trustme.CA(), tmp_path)
    settings = Kafka(
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="worker",
        sasl_password="geheim",
        **files,
    )
    arguments = connection(settings)
    assert arguments["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (arguments["sasl_plain_username"], arguments["sasl_plain_password"]) == ("worker", "geheim")
    assert arguments["ssl_context"].check_hostname
    assert set(arguments) <= set(KafkaAdminClient.DEFAULT_CONFIG)
    assert "geheim" not in str(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"security_protocol": "SASL_PLAINTEXT", "sasl_username": "x"}, "needs sasl_mechanism"),
        ({"security_protocol": "SSL", "ssl_cafile": "nowhere.pem"}, r"kafka\.ssl_cafile nowhere\.pem cannot be used: "),
        (
            {"security_protocol": "SSL", "ssl_certfile": "none.pem", "ssl_keyfile": "key.pem"},
            r"kafka\.ssl_certfile none\.pem with ssl_keyfile key\.pem cannot be used: ",
        ),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connection(Kafka(**changes))


@pytest.fixture
def kafka_with_users(tmp_path: Path) -> Iterator[Kafka]:
    """Settings of a broker that asks who comes, over TLS."""
    authority = trustme.CA()
    files = write_certificates(authority, tmp_path)
    identity = tmp_path / "broker.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(identity)
    broker = start_own_broker(users={"worker": "geheim"}, certificate=identity)
    yield Kafka(
        bootstrap=broker.bootstrap,
        security_protocol="SASL_SSL",
        sasl_mechanism="PLAIN",
        sasl_username="worker",
        sasl_password="geheim",
        ssl_cafile=files["ssl_cafile"],
    )
    broker.child.stop(0)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_login_is_accepted(kafka_with_users: Kafka, mechanism: str) -> None:
    settings = kafka_with_users.model_copy(update={"sasl_mechanism": mechanism})
    create_topics(settings, 2)
    publisher = Publisher(settings, "w", threading.Event())
    publisher.send(Message("updates", b"cam", b"1", []))
    publisher.settle(lambda: None)
    publisher.close()
    consumer = FrameConsumer(settings, Offsets(), Notes(), threading.Event(), WorkerMetrics(1))
    wait_for(consumer, 2)
    consumer.close()


def test_a_wrong_password_is_told_in_one_line(kafka_with_users: Kafka) -> None:
    with pytest.raises(ConfigError, match=r"refuses the login: .* correct kafka[.]sasl_mechanism") as told:
        require_topics(kafka_with_users.model_copy(update={"sasl_password": SecretStr("falsch")}))
    assert "\n" not in str(told.value)
    assert "falsch" not in str(told.value)


def test_why_nobody_is_reached_is_told_in_one_line(kafka_with_users: Kafka) -> None:
    nobody, no_tls = Kafka(bootstrap=f"127.0.0.1:{free_port()}"), {"security_protocol": "SASL_PLAINTEXT"}
    without = start_own_broker()
    one_sided = kafka_with_users.model_copy(update={"bootstrap": without.bootstrap})
    for settings, reason, likely in (
        (nobody, "ECONNREFUSED", ""),
        (kafka_with_users.model_copy(update={"ssl_cafile": None}), "CERTIFICATE_VERIFY_FAILED", ""),
        (kafka_with_users.model_copy(update=no_tls), "socket disconnected", "listener wants TLS"),
        (one_sided, "Handshake failed", "listener is without TLS, and kafka.security_protocol is SASL_SSL"),
    ):
        with pytest.raises(UnreachableError, match=reason) as told:
            require_topics(settings.model_copy(update={"connect_timeout_s": 0}))
        assert str(told.value).count("Unable to bootstrap") == 1
        assert "\n" not in str(told.value)
        assert ("likely" in str(told.value)) == bool(likely)
        assert likely in str(told.value)
    without.child.stop(0)


def test_nobody_of_ours_has_topics_created(bootstrap: str) -> None:
    """The embedded broker creates those that somebody asks for, as Kafka does by default."""
    missing = f"frames-{uuid.uuid4().hex[:8]}"
    settings = Kafka(bootstrap=bootstrap, connect_timeout_s=60)
    publisher = Publisher(settings, "w", threading.Event())
    publisher.send(Message(missing, b"cam", b"1", [], expendable=True))
    consumer = kafka_client.open_client(KafkaConsumer, **connection(settings))
    consumer.subscribe([missing])
    consumer.poll(100)
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    assert missing not in admin.list_topics()
    for client in (admin, consumer, publisher):
        client.close()


def test_topics_that_come_a_moment_later_are_waited_for(bootstrap: str, caplog: pytest.LogCaptureFixture) -> None:
    """`driftkeel produce` beside a `driftkeel local` that has only begun."""
    tag = uuid.uuid4().hex[:8]
    names = {field: f"{field}-{tag}" for field in Topics.model_fields}
    settings = Kafka(bootstrap=bootstrap, topics=Topics(**names), connect_timeout_s=120)

    class Creator(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kafka_client.log.removeHandler(self)
            create_topics(settings, 2)

    kafka_client.log.addHandler(Creator())
    require_topics(settings, only=[names["frames"], names["updates"]])
    (said,) = [record.getMessage() for record in caplog.records if "has no topic" in record.getMessage()]
    assert said.startswith(
        f"the broker at {bootstrap} has no topic {names['frames']} and no topic {names['updates']} yet; waiting "
    )
    assert said.endswith(" s for them")


def test_topics_that_never_come_are_named_in_the_end(bootstrap: str) -> None:
    settings = Kafka(bootstrap=bootstrap, connect_timeout_s=0.5)
    with pytest.raises(ConfigError, match="has no topic nowhere; create it first"):
        require_topics(settings, only=["nowhere"])


def test_every_topic_that_is_missing_is_created_by_the_advice(bootstrap: str) -> None:
    settings = Kafka(bootstrap=bootstrap, connect_timeout_s=0.5)
    advice = "--create --topic nowhere --partitions 1; kafka-topics.sh --create --topic never --partitions 1"
    with pytest.raises(ConfigError, match=f"has no topic nowhere and no topic never; create them .*{advice}"):
        require_topics(settings, only=["nowhere", "never"])


def test_a_topic_of_commands_is_to_have_one_partition_and_to_keep_all(bootstrap: str) -> None:
    commands = f"commands-{uuid.uuid4().hex[:8]}"
    settings = Kafka(bootstrap=bootstrap, topics=Topics(commands=commands), connect_timeout_s=0.5)
    with pytest.raises(ConfigError, match=f"--topic {commands} --partitions 1 --config retention.ms=-1"):
        require_topics(settings, only=[commands])


def test_who_is_told_to_stop_waits_for_no_topics(bootstrap: str) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(UnreachableError, match="has no topic nowhere"):
        require_topics(Kafka(bootstrap=bootstrap, connect_timeout_s=600), stop, only=["nowhere"])


def test_threads_that_listen_to_the_client_at_once_leave_its_log_as_it_was() -> None:
    """The loop and the thread of dead letters may both look for a broker that is away."""
    before = kafka_client.SPEAKER.level
    with ExitStack() as first, ExitStack() as second:
        heard = first.enter_context(kafka_client._listening())
        other = second.enter_context(kafka_client._listening())
        first.close()
        kafka_client.SPEAKER.warning("%s", SaslAuthenticationFailedError())
        assert (len(heard), len(other)) == (0, 1)
    assert kafka_client.SPEAKER.level == before
