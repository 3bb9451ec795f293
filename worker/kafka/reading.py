"""Has consumers wait longer for brokers that stop reading when a fetch's time is over.

`fetch_max_wait_ms` is how long a fetch may wait for records that are still to come. Records that are there Kafka reads
however long that takes. The embedded broker does not: once a partition has some tens of thousands of records, it
answers every fetch with nothing, for ever. So a consumer waits longer once it gets nothing where there are records.
"""

from __future__ import annotations

import logging
from typing import Any

from kafka import TopicPartition

log = logging.getLogger("driftkeel.kafka")
IN_VAIN = 3  # so many more empty answers, where there are records, than answers with records
LONGEST_MS = 5_000  # long before a request times out


def wait_while_read(consumer: Any) -> None:
    """Have a KafkaConsumer double its wait whenever most answers for a partition are empty although it has records."""
    fetcher = consumer._fetcher
    parse, in_vain = fetcher._parse_fetched_data, dict[TopicPartition, int]()

    def parse_and_count(fetched: Any) -> Any:
        partition, found = fetched.topic_partition, fetched.partition_data
        if not found.error_code:
            empty = not found.records and found.high_watermark > fetched.fetched_offset
            in_vain[partition] = max(0, in_vain.get(partition, 0) + (1 if empty else -1))
            if in_vain[partition] >= IN_VAIN:
                _wait_longer(fetcher.config, partition)
                in_vain.clear()
        return parse(fetched)

    fetcher._parse_fetched_data = parse_and_count


def _wait_longer(config: dict[str, Any], partition: TopicPartition) -> None:
    if config["fetch_max_wait_ms"] < LONGEST_MS:
        config["fetch_max_wait_ms"] = min(LONGEST_MS, 2 * max(1, config["fetch_max_wait_ms"]))
        log.warning(
            "the broker takes longer to read partition %d of %s than a fetch waits; from now on one waits %d ms",
            partition.partition,
            partition.topic,
            config["fetch_max_wait_ms"],
        )
