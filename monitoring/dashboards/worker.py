"""Worker health: do the workers keep up, and what do they wait for?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from monitoring.dashboards.parts import (
    GREEN,
    JOB,
    LAG_IS,
    LAG_STEPS,
    NONE_IS_GOOD,
    RATE,
    RED,
    YELLOW,
    ages,
    board,
    buckets,
    filled,
    lag_seconds,
    lines,
    number,
    variable,
)

OWN = f'{JOB},instance=~"$instance"'


def rate(metric: str, by: str = "instance") -> str:
    return f"sum by ({by}) (rate(driftkeel_{metric}{{{OWN}}}{RATE}))"


def quantile(q: float, metric: str) -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', 'le')})"


def mean(metric: str, by: str) -> str:
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def build() -> Dashboard:
    return filled(
        board("Workers", "workers", "Do the workers keep up, and what do they wait for?").with_variable(
            variable("instance", "Worker", f"label_values(driftkeel_build_info{{{JOB}}}, instance)")
            .multi(True)
            .include_all(True)
            .all_value(".*")
        ),
        number("Workers", "That Prometheus reaches.", f"sum(up{{{OWN}}})", steps=((None, RED), (1, GREEN))),
        number(
            "Partitions",
            "Of the frames topic, read by these workers.",
            f"sum(driftkeel_assigned_partitions{{{OWN}}})",
            steps=((None, RED), (1, GREEN)),
        ),
        number(
            "Lag",
            LAG_IS,
            lag_seconds(OWN),
            "s",
            steps=LAG_STEPS,
        ),
        number(
            "Latency, 99%",
            "From a record's timestamp to its prediction.",
            quantile(0.99, "frame_latency_seconds"),
            "s",
            ((None, GREEN), (1, YELLOW), (10, RED)),
        ),
        number(
            "Errors within ten minutes",
            "Calls that the store or the broker did not answer, and writes refused because another worker has the "
            "stream.",
            f"sum(increase(driftkeel_store_errors_total{{{OWN}}}[10m])) + "
            f"sum(increase(driftkeel_broker_errors_total{{{OWN}}}[10m])) + "
            f"sum(increase(driftkeel_fenced_writes_total{{{OWN}}}[10m]))",
            steps=NONE_IS_GOOD,
        ),
        number(
            "Dead letters within an hour",
            "Records that could not become frames; the topic frames.dlq has them with the reason.",
            f"sum(increase(driftkeel_bad_frames_total{{{OWN}}}[1h]))",
            steps=((None, GREEN), (1, YELLOW)),
        ),
        Row("Do they keep up?"),
        buckets(
            "Latency of frames",
            "From a record's timestamp to its prediction. The dots are exemplars: the slowest frame of a pass, "
            "with its position (needs exemplar storage in Prometheus).",
            rate("frame_latency_seconds_bucket", "le"),
            "s",
            exemplars=True,
        ),
        lines(
            "Latency and wait",
            "Latency counts from the record's timestamp, the wait from a frame's arrival. Far apart: frames "
            "wait in Kafka, the worker lags behind.",
            [
                (quantile(0.5, "frame_latency_seconds"), "latency, median"),
                (quantile(0.99, "frame_latency_seconds"), "latency, 99%"),
                (quantile(0.5, "frame_wait_seconds"), "wait, median"),
                (quantile(0.99, "frame_wait_seconds"), "wait, 99%"),
            ],
            "s",
        ),
        lines(
            "Throughput",
            "Frames predicted per second by worker, and records taken in.",
            [(rate("predictions_total"), "predicted {{instance}}"), (rate("frames_total"), "taken {{instance}}")],
            "reqps",
        ),
        lines(
            "Lag by partition",
            "Records that are not finished yet. One that grows alone: a stream that is too fast for one worker.",
            [(f"sum by (topic, partition) (driftkeel_consumer_lag_records{{{OWN}}})", "{{topic}}/{{partition}}")],
            "short",
        ),
        lines(
            "Frames in memory",
            "Decoded frames that wait for their pass; at batch.max_buffered partitions are paused.",
            [(f"driftkeel_buffered_frames{{{OWN}}}", "{{instance}}")],
            "short",
            width=8,
        ),
        lines(
            "Partitions and streams",
            "Partitions that each worker reads, and streams whose state it has in memory.",
            [
                (f"driftkeel_assigned_partitions{{{OWN}}}", "partitions {{instance}}"),
                (f"driftkeel_resident_streams{{{OWN}}}", "streams {{instance}}"),
            ],
            "short",
            width=8,
        ),
        lines(
            "Since the last turn of the loop",
            "Above 60 s the worker counts as stuck, and its liveness probe fails.",
            [(ages("last_progress", OWN), "{{instance}}")],
            "s",
            width=8,
            limits=((None, GREEN), (60, RED)),
        ),
        Row("What does a step wait for?"),
        lines(
            "Time of a step, by stage",
            "Means: predict and adapt are the pass; publish hands over, settle waits for the broker's "
            "acknowledgements, store for the store. Passes run side by side.",
            [(mean("step_seconds", "stage"), "{{stage}}")],
            "s",
        ),
        lines(
            "Time of store calls",
            "99% of calls, by operation.",
            [(f"histogram_quantile(0.99, {rate('store_seconds_bucket', 'le, operation')})", "{{operation}}")],
            "s",
        ),
        lines(
            "Sizes of passes",
            "Frames of a micro-batch, and streams that share a pass: more streams, less cost for each.",
            [(mean("batch_frames", "job"), "frames"), (mean("pass_streams", "job"), "streams")],
            "short",
            width=8,
        ),
        lines(
            "Adaptations left out",
            "Micro-batches per second that made no update, by reason. overload: the worker saves time to keep "
            "predictions in their latency budget.",
            [(rate("adaptations_left_out_total", "reason"), "{{reason}}")],
            "ops",
            width=8,
        ),
        lines(
            "Size of stored states",
            "Bytes of a state's tensors as written.",
            [(mean("state_bytes", "job"), "mean")],
            "bytes",
            width=8,
        ),
        Row("Errors and resources"),
        lines(
            "Since store and broker last answered",
            "Seconds, of every worker; above 60 s an alert fires. A worker without frames asks both, too. "
            "Ten minutes stand for more, and for no answer since the worker started.",
            [
                (f"clamp_max({ages('store_last_answer', OWN)}, 600)", "store {{instance}}"),
                (f"clamp_max({ages('broker_last_answer', OWN)}, 600)", "broker {{instance}}"),
            ],
            "s",
            width=8,
            limits=((None, GREEN), (60, RED)),
        ),
        lines(
            "Store and broker errors",
            "Per second. The worker waits and tries again; nothing is lost, but lag grows meanwhile.",
            [
                (rate("store_errors_total"), "store {{instance}}"),
                (rate("broker_errors_total", "operation"), "broker, {{operation}}"),
                (rate("fenced_writes_total"), "refused writes {{instance}}"),
            ],
            "ops",
            width=8,
        ),
        lines(
            "Frames without a new prediction",
            "Per second: records that could not become frames, by reason; records whose state had them already, "
            "after a crash or a rebalance; frames that were dropped as too late (batch.drop_late); records that "
            "the topic no longer had when their turn came.",
            [
                (rate("bad_frames_total", "kind"), "{{kind}}"),
                (rate("frames_again_total", "job"), "read again"),
                (rate("frames_dropped_total", "job"), "too late"),
                (rate("records_expired_total", "job"), "lost to retention"),
            ],
            "ops",
            width=8,
        ),
        lines(
            "Processor",
            "Cores in use by worker.",
            [(f"rate(process_cpu_seconds_total{{{OWN}}}{RATE})", "{{instance}}")],
            "short",
            width=8,
        ),
        lines(
            "Memory",
            "Resident memory by worker.",
            [(f"process_resident_memory_bytes{{{OWN}}}", "{{instance}}")],
            "bytes",
            width=8,
        ),
        lines(
            "Time of a scrape",
            "How long the metrics themselves take.",
            [(f"scrape_duration_seconds{{{OWN}}}", "{{instance}}")],
            "s",
            width=8,
        ),
    )
