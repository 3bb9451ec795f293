from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.metrics import FrameHistogram, WorkerMetrics

UNITLESS = {"norm", "cosine", "distance", "step", "frames", "streams"}


def families(metrics: WorkerMetrics):
    return list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))


def test_names_follow_the_conventions() -> None:
    metrics = WorkerMetrics(10)
    for family in families(metrics):
        if family.name.endswith(("_created", "_info")):
            continue
        assert family.name.startswith("driftkeel_")
        assert family.documentation
        assert not family.name.endswith(("_ms", "_percent", "_milliseconds"))
        if family.type in ("histogram", "gauge"):
            unit = family.name.rsplit("_", 1)[-1]
            assert unit in {"seconds", "bytes", "ratio", "nats", "records", *UNITLESS}, family.name


def test_stream_series_are_bounded_and_removed() -> None:
    metrics = WorkerMetrics(max_streams=3)
    for i in range(10):
        if metrics.labels_stream(f"cam-{i}"):
            metrics.stream_step.labels(f"cam-{i}").set(i)
    text = generate_latest(metrics.registry).decode()
    assert text.count("driftkeel_stream_step{") == 3
    metrics.forget_stream("cam-1")
    assert 'stream="cam-1"' not in generate_latest(metrics.registry).decode()
    assert metrics.labels_stream("cam-9")


def test_lag_of_lost_partitions_disappears() -> None:
    metrics = WorkerMetrics(0)
    metrics.set_lag({("frames", 0): 5, ("frames", 1): 6})
    metrics.set_lag({("frames", 1): 7})
    text = generate_latest(metrics.registry).decode()
    assert 'partition="0"' not in text
    assert 'driftkeel_consumer_lag_records{partition="1",topic="frames"} 7.0' in text


def test_frame_histograms_look_like_the_clients_own() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    buckets, values = (0.1, 0.25, 1.0), [0.0, 0.1, 0.11, 0.5, 1.0, 7.0]
    FrameHistogram("driftkeel_x_seconds", "X.", buckets, registries[0]).observe_many(values)
    own = Histogram("driftkeel_x_seconds", "X.", buckets=buckets, registry=registries[1])
    for value in values:
        own.observe(value)
    ours, theirs = (generate_latest(registry).decode() for registry in registries)
    assert ours.splitlines() == [line for line in theirs.splitlines() if "_created" not in line]
