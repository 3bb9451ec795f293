"""Frames from Kafka: records, partitions, offsets."""
