"""Fleet overview: which streams need a look, and is adaptation helping?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from monitoring.dashboards.parts import (
    ACCURACY,
    ADAPTED,
    CALM,
    GREEN,
    JOB,
    LAG_IS,
    LAG_STEPS,
    NONE_IS_GOOD,
    ORANGE,
    RATE,
    RED,
    SOURCE_MODEL,
    YELLOW,
    board,
    buckets,
    colored,
    filled,
    lag_seconds,
    lines,
    number,
    rows_by,
    stream_age,
)

TO_STREAM = (
    "/d/driftkeel-stream?${datasource:queryparam}&${job:queryparam}&${__url_time_range}&var-stream=${__value.raw}"
)


def condition(name: str) -> str:
    return f'sum(driftkeel_fleet_streams{{condition="{name}",{JOB}}})'


def quantile(q: float, metric: str) -> str:
    return f"histogram_quantile({q}, sum by (le) (driftkeel_fleet_{metric}_ratio_bucket{{{JOB}}}))"


def of_stream(metric: str) -> str:
    return f"max by (stream) (driftkeel_stream_{metric}{{{JOB}}})"


def build() -> Dashboard:
    few_is_good = ((None, GREEN), (1, YELLOW), (5, RED))
    return filled(
        board(
            "Fleet", "fleet", "Which cameras need a look, and is adaptation helping? Click a stream for its own page."
        ),
        number("Streams", "Streams whose state is in a worker's memory.", condition("any"), width=3),
        number(
            "In trouble",
            "Streams of which an update was refused or undone in the last five minutes, or that source answers "
            "because it is estimated to do better; and blind cameras.",
            condition("in_trouble"),
            steps=few_is_good,
            width=3,
        ),
        number(
            "Drifting",
            "Streams whose drift score is above half of its alarm: something at the camera is changing now.",
            condition("drifting"),
            steps=((None, GREEN), (1, YELLOW)),
            width=3,
        ),
        number(
            "Source answers",
            "Streams that the source model answers: by policy, not adapted yet, or because it does better.",
            condition("answered_by_source"),
            width=3,
        ),
        number(
            "Frozen",
            "Streams that somebody has frozen.",
            condition("frozen"),
            steps=((None, GREEN), (1, YELLOW)),
            width=3,
        ),
        number(
            "Frames per second",
            "Frames predicted by all workers.",
            f"sum(rate(driftkeel_predictions_total{{{JOB}}}{RATE}))",
            "reqps",
            width=3,
        ),
        number(
            "Lag",
            LAG_IS,
            lag_seconds(JOB),
            "s",
            steps=LAG_STEPS,
            width=3,
        ),
        number(
            "Alerts firing",
            "Alerts that fire now, of this site or of none; the runbook of each is named in its annotations.",
            'count(ALERTS{alertname=~"Driftkeel.*",alertstate="firing",job=~"$job|"}) or vector(0)',
            steps=NONE_IS_GOOD,
            width=3,
        ),
        Row("Accuracy, as estimated without labels"),
        colored(
            lines(
                "Estimated accuracy of the fleet",
                "Median and worst tenth of all streams: of the parameters that adapt, and of the source model on "
                "the same frames. Where the blue curves lie above the brown ones, adaptation helps.",
                [
                    (quantile(0.5, "estimated_accuracy"), "adapted, median"),
                    (quantile(0.1, "estimated_accuracy"), "adapted, worst tenth"),
                    (quantile(0.5, "source_accuracy"), "source, median"),
                    (quantile(0.1, "source_accuracy"), "source, worst tenth"),
                ],
                "percentunit",
                most=1.0,
            ),
            {
                "adapted, median": ADAPTED,
                "adapted, worst tenth": "light-blue",
                "source, median": SOURCE_MODEL,
                "source, worst tenth": "#C4A484",
            },
        ),
        buckets(
            "Streams by estimated accuracy",
            "How many streams lie in which range now. A cloud that comes loose below is a group of cameras with "
            "something in common.",
            f"sum by (le) (driftkeel_fleet_estimated_accuracy_ratio_bucket{{{JOB}}})",
            "percentunit",
        ),
        rows_by(
            "stream",
            "Streams that need it most",
            "The streams with series of their own: in trouble, drifting, new, or with the lowest estimated "
            "accuracy. A stream's name leads to its page.",
            [
                ("Accuracy", of_stream("estimated_accuracy_ratio"), "percentunit", ACCURACY),
                ("Source", of_stream("source_accuracy_ratio"), "percentunit", ACCURACY),
                ("Drift score", of_stream("drift_score"), "percentunit", ((None, GREEN), (0.5, YELLOW), (1, RED))),
                (
                    "Differs from source",
                    of_stream("flip_ratio"),
                    "percentunit",
                    ((None, GREEN), (0.3, YELLOW), (0.6, RED)),
                ),
                ("Distance", of_stream("source_distance"), "short", CALM),
                ("Source answers", of_stream("answers_source"), "bool_yes_no", ((None, GREEN), (1, YELLOW))),
                ("Blind", of_stream("blind"), "bool_yes_no", ((None, GREEN), (1, RED))),
                ("Held back", of_stream("held_back"), "bool_yes_no", ((None, GREEN), (1, YELLOW))),
                ("Updates", of_stream("step"), "short", CALM),
                (
                    "Last frames",
                    stream_age("last_decision", JOB, " by (stream)"),
                    "s",
                    ((None, GREEN), (60, YELLOW), (600, RED)),
                ),
            ],
            TO_STREAM,
        ),
        Row("What is decided"),
        lines(
            "Decisions",
            "Update events per second by decision and kind of reason. Skipped for not_finite, gradient or "
            "distance: the guard refuses what may do harm.",
            [
                (
                    f"sum by (decision, reason) (rate(driftkeel_updates_total{{{JOB}}}{RATE})) > 0",
                    "{{decision}}: {{reason}}",
                )
            ],
            "ops",
            stacked=True,
        ),
        colored(
            lines(
                "Who answers",
                "Predictions per second by the parameters that made them.",
                [(f"sum by (parameters) (rate(driftkeel_answers_total{{{JOB}}}{RATE}))", "{{parameters}}")],
                "reqps",
                stacked=True,
            ),
            {"adapted": ADAPTED, "source": SOURCE_MODEL, "approved": "purple"},
        ),
        colored(
            lines(
                "Streams by condition",
                "The counts above over time. `adapting` counts where drift detection is on.",
                [
                    (
                        'sum by (condition) (driftkeel_fleet_streams{condition!~"any|shown",' + JOB + "})",
                        "{{condition}}",
                    )
                ],
                "short",
            ),
            {"in_trouble": RED, "drifting": ORANGE},
        ),
        lines(
            "Commands",
            "Commands that people have given within ten minutes, by action and outcome.",
            [
                (
                    f"sum by (action, outcome) (increase(driftkeel_commands_total{{{JOB}}}[10m]))",
                    "{{action}}: {{outcome}}",
                )
            ],
            "short",
        ),
    )
