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
            "Fleet",
            "fleet",
            "Which cameras need attention, and does adaptation help? Click a stream in the table to open its page.",
        ),
        number("Streams", "Cameras that the workers have in memory.", condition("any"), width=3),
        number(
            "In trouble",
            "Streams that need a look: an update was refused or undone in the last five minutes, the guard lets source "
            "answer because it believes that source does better, or the camera is blind.",
            condition("in_trouble"),
            steps=few_is_good,
            width=3,
        ),
        number(
            "Drifting",
            "Streams with a drift score above 50%: something at the camera is changing now.",
            condition("drifting"),
            steps=((None, GREEN), (1, YELLOW)),
            width=3,
        ),
        number(
            "Source answers",
            "Streams that the source model answers: by policy, before their first update, or because it is estimated "
            "to do better.",
            condition("answered_by_source"),
            width=3,
        ),
        number(
            "Frozen",
            "Streams that a command has frozen. They do not adapt until somebody unfreezes them.",
            condition("frozen"),
            steps=((None, GREEN), (1, YELLOW)),
            width=3,
        ),
        number(
            "Frames per second",
            "Frames that all workers together predict.",
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
            "Alerts of this site that fire now, and those that belong to no site. Each names its runbook in its "
            "annotations.",
            'count(ALERTS{alertname=~"Driftkeel.*",alertstate="firing",job=~"$job|"}) or vector(0)',
            steps=NONE_IS_GOOD,
            width=3,
        ),
        Row("Accuracy, as estimated without labels"),
        colored(
            lines(
                "Estimated accuracy of the fleet",
                "Median and worst tenth of all streams. Blue: the adapted parameters. Brown: the source model on the "
                "same frames. If blue is above brown, adaptation helps. If both fall, the cameras have changed.",
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
            "How many streams have which estimated accuracy. A group that separates downwards has something in common: "
            "look for what these cameras share.",
            f"sum by (le) (driftkeel_fleet_estimated_accuracy_ratio_bucket{{{JOB}}})",
            "percentunit",
        ),
        rows_by(
            "stream",
            "Streams that need it most",
            "Streams in trouble, drifting ones, new ones, and those with the lowest estimated accuracy: all that have "
            "series of their own (metrics.max_stream_labels). Click a name to open its page.",
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
            "Update events per second, by decision and kind of reason. Skipped for not_finite, gradient, distance or "
            "turned: the guard refuses an update that might do harm. Rolled back or reset: it undoes what did.",
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
                "Predictions per second, by the parameters that made them: adapted, source, or approved by a person.",
                [(f"sum by (parameters) (rate(driftkeel_answers_total{{{JOB}}}{RATE}))", "{{parameters}}")],
                "reqps",
                stacked=True,
            ),
            {"adapted": ADAPTED, "source": SOURCE_MODEL, "approved": "purple"},
        ),
        colored(
            lines(
                "Streams by condition",
                "The numbers at the top over time. adapting is counted only with adapt.mode on_demand.",
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
            "Commands from people within ten minutes, by action: carried out (done) or refused.",
            [
                (
                    f"sum by (action, outcome) (increase(driftkeel_commands_total{{{JOB}}}[10m]))",
                    "{{action}}: {{outcome}}",
                )
            ],
            "short",
        ),
    )
