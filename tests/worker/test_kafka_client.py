"""Security settings on their way to the client; TLS against the real broker behind a proxy that ends it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trustme
from kafka import KafkaAdminClient

from schemas.config import Kafka
from schemas.errors import ConfigError, UnreachableError
from tests.servers import TlsProxy, write_certificates
from worker.embedded import free_port, start_broker
from worker.kafka_client import connection, create_topics, require_topics
from worker.publish import Message, Publisher


def test_tls_with_a_client_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = write_certificates(authority, tmp_path)
    port = free_port()
    broker = start_broker(port=free_port(), advertised=port)
    proxy = TlsProxy(broker.port, authority, port, client_certificate=True)
    settings = Kafka(bootstrap=f"127.0.0.1:{port}", security_protocol="SSL", connect_timeout_s=3, **files)
    create_topics(settings, 2)
    require_topics(settings)
    publisher = Publisher(settings, "w", threading.Event())
    publisher.send(Message("updates", b"cam", b"1", []))
    publisher.settle(lambda: None)
    publisher.close()
    with pytest.raises(UnreachableError):
        require_topics(settings.model_copy(update={"ssl_cafile": None}))
    proxy.close()
    broker.child.stop(0)


def test_sasl_settings_reach_the_client(tmp_path: Path) -> None:
    """The embedded broker knows no SASL; its handshake is the client's own."""
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
        ({"security_protocol": "SSL", "ssl_cafile": "nowhere.pem"}, "cannot be used"),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        connection(Kafka(**changes))


@pytest.mark.skipif("DRIFTKEEL_TEST_BOOTSTRAP" not in os.environ, reason="the embedded broker cannot add partitions")
def test_partitions_added_while_running(kafka_settings: Kafka) -> None:
    """With a real broker: the consumer finds new partitions by itself."""
    from kafka import TopicPartition

    from tests.worker.test_consume import Notes, wait_for
    from worker import consume
    from worker.consume import FrameConsumer
    from worker.offsets import Offsets

    consume.METADATA_MAX_AGE_MS = 1_000
    consumer = FrameConsumer(kafka_settings, Offsets(), Notes(), threading.Event())
    wait_for(consumer, 3)
    admin = KafkaAdminClient(bootstrap_servers=kafka_settings.bootstrap)
    admin.create_partitions({kafka_settings.topics.frames: 5})
    admin.close()
    wait_for(consumer, 5)
    assert TopicPartition(kafka_settings.topics.frames, 4) in consumer.consumer.assignment()
    consumer.close()
