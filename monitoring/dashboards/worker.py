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
        number("Workers", "Workers that Prometheus reaches.", f"sum(up{{{OWN}}})", steps=((None, RED), (1, GREEN))),
        number(
            "Partitions",
            "Partitions of the frames topic that these workers have. If all workers together have fewer than the "
            "topic, some cameras get no predictions.",
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
            "99 of 100 predictions come sooner than this after their record's timestamp.",
            quantile(0.99, "frame_latency_seconds"),
            "s",
            ((None, GREEN), (1, YELLOW), (10, RED)),
        ),
        number(
            "Errors within ten minutes",
            "Calls that the store or the broker refused or did not answer, and writes that were refused because "
            "another worker has the stream. A few during a rebalance are normal.",
            f"sum(increase(driftkeel_store_errors_total{{{OWN}}}[10m])) + "
            f"sum(increase(driftkeel_broker_errors_total{{{OWN}}}[10m])) + "
            f"sum(increase(driftkeel_fenced_writes_total{{{OWN}}}[10m]))",
            steps=NONE_IS_GOOD,
        ),
        number(
            "Dead letters within an hour",
            "Records that are not valid frames and have no prediction. The dead-letter topic has them, with the reason "
            "in a header.",
            f"sum(increase(driftkeel_bad_frames_total{{{OWN}}}[1h]))",
            steps=((None, GREEN), (1, YELLOW)),
        ),
        Row("Do they keep up?"),
        buckets(
            "Latency of frames",
            "Time from a record's timestamp to its prediction. The dots are exemplars: the slowest frame of a pass, "
            "with its position. They need exemplar storage in Prometheus.",
            rate("frame_latency_seconds_bucket", "le"),
            "s",
            exemplars=True,
        ),
        lines(
            "Latency and wait",
            "Latency counts from the record's timestamp, wait from the frame's arrival at the worker. If they are far "
            "apart, frames wait in Kafka because the worker is behind, or a clock is wrong.",
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
            "Frames predicted and records taken per second, worker by worker. If more are taken for long, the others "
            "are bad, read again or dropped: see Frames without a new prediction.",
            [(rate("predictions_total"), "predicted {{instance}}"), (rate("frames_total"), "taken {{instance}}")],
            "reqps",
        ),
        lines(
            "Lag by partition",
            "Records that are not finished yet. If a single partition grows, it has a stream that is too fast for one "
            "worker, or too many streams.",
            [(f"sum by (topic, partition) (driftkeel_consumer_lag_records{{{OWN}}})", "{{topic}}/{{partition}}")],
            "short",
        ),
        lines(
            "Frames in memory",
            "Decoded frames that wait for a pass of the model. At batch.max_buffered the worker takes no more from "
            "Kafka.",
            [(f"driftkeel_buffered_frames{{{OWN}}}", "{{instance}}")],
            "short",
            width=8,
        ),
        lines(
            "Partitions and streams",
            "Partitions that each worker has, and streams whose state is in its memory.",
            [
                (f"driftkeel_assigned_partitions{{{OWN}}}", "partitions {{instance}}"),
                (f"driftkeel_resident_streams{{{OWN}}}", "streams {{instance}}"),
            ],
            "short",
            width=8,
        ),
        lines(
            "Since the main loop last ran",
            "Above 60 s the worker counts as stuck: its liveness probe fails, and an alert fires.",
            [(ages("last_progress", OWN), "{{instance}}")],
            "s",
            width=8,
            limits=((None, GREEN), (60, RED)),
        ),
        Row("What does a step wait for?"),
        lines(
            "Time of a step, by stage",
            "Mean durations. predict and adapt: the pass of the model. publish: predictions are handed over. settle: "
            "the broker acknowledges them; if it is long, check the broker. store: states are written; if it is long, "
            "check the store. all: the whole step. Steps overlap.",
            [(mean("step_seconds", "stage"), "{{stage}}")],
            "s",
        ),
        lines(
            "Time of store calls",
            "99 of 100 calls to the store are quicker than this, by operation.",
            [(f"histogram_quantile(0.99, {rate('store_seconds_bucket', 'le, operation')})", "{{operation}}")],
            "s",
        ),
        lines(
            "Sizes of passes",
            "Mean number of frames in a micro-batch, and of streams that share a pass. The more streams share one, the "
            "less each costs.",
            [(mean("batch_frames", "job"), "frames"), (mean("pass_streams", "job"), "streams")],
            "short",
            width=8,
        ),
        lines(
            "Adaptations left out",
            "Micro-batches per second that made no update on purpose, by reason. overload: the worker saves time so "
            "that predictions stay within batch.latency_budget_ms. settled: adapt.mode is on_demand. resting: after a "
            "rollback or reset. policy: frozen, quiet hours, or the hour's updates are used up.",
            [(rate("adaptations_left_out_total", "reason"), "{{reason}}")],
            "ops",
            width=8,
        ),
        lines(
            "Size of stored states",
            "Mean size of a stream's tensors as written to the store, compressed.",
            [(mean("state_bytes", "job"), "mean")],
            "bytes",
            width=8,
        ),
        Row("Errors and resources"),
        lines(
            "Since store and broker last answered",
            "How long each worker has had no answer. Above 60 s an alert fires. Workers without frames ask too. The "
            "chart ends at ten minutes, which also stand for no answer since the worker started.",
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
            "Failed calls per second. The worker tries again, so nothing is lost, but lag grows meanwhile.",
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
            "Records per second, by reason. Dead letters by their kind, such as damaged. read again: folded in before, "
            "after a crash or a rebalance; these have a prediction. too late: dropped because of batch.drop_late. lost "
            "to retention: the topic deleted them before they were read.",
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
            "Processor cores that each worker uses. If it is high and lag grows, start more workers.",
            [(f"rate(process_cpu_seconds_total{{{OWN}}}{RATE})", "{{instance}}")],
            "short",
            width=8,
        ),
        lines(
            "Memory",
            "Memory that each worker uses. Above its container's limit it is killed.",
            [(f"process_resident_memory_bytes{{{OWN}}}", "{{instance}}")],
            "bytes",
            width=8,
        ),
        lines(
            "Time of a scrape",
            "How long Prometheus takes to read a worker's metrics. Seconds: the machine is busy, or too many streams "
            "have series (metrics.max_stream_labels).",
            [(f"scrape_duration_seconds{{{OWN}}}", "{{instance}}")],
            "s",
            width=8,
        ),
    )
