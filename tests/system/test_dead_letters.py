"""A broker that takes no dead letters holds up no frame; the embedded one takes records for topics that are gone."""

from __future__ import annotations

from kafka import KafkaAdminClient

from tests.broker.process import bootstrap as bootstrap  # a fixture
from tests.conftest import picture
from tests.system.conftest import Site


def test_frames_do_not_wait_for_a_dead_letter_topic_that_is_gone(site: Site) -> None:
    worker = site.start()
    first = site.send([("cam", picture(0))])
    assert set(site.predictions(first)) == set(first)
    admin = KafkaAdminClient(bootstrap_servers=site.kafka.bootstrap)
    admin.delete_topics([site.kafka.topics.dead_letters])
    worker.wait_until(lambda: site.kafka.topics.dead_letters not in admin.list_topics(), "the deletion")
    site.send([("broken", b"no image")])
    worker.wait_until(
        lambda: 'driftkeel_bad_frames_total{kind="not_an_image"} 1.0' in worker.metrics(), "the bad frame"
    )
    ids = site.send([(f"cam-{i}", picture(i)) for i in range(8)])
    assert set(ids) <= set(site.predictions(ids))
    assert "a dead letter is given up" not in worker.log.read_text()  # It still waits, as it did all the while.
    # Nor is it lost: who has the partition next sends it again.
    assert worker.stop() == 0
    admin.create_topics({site.kafka.topics.dead_letters: {"num_partitions": 1, "replication_factor": 1}})
    admin.close()
    site.start()
    (letter,) = site.topic.read(site.kafka.topics.dead_letters, lambda rs: len(rs) >= 1)
    assert letter.value == b"no image"
