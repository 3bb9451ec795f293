"""One stream: how well is it predicted, what does adaptation do to it, and why?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from monitoring.dashboards.parts import (
    ACCURACY,
    ADAPTED,
    BLUE,
    GREEN,
    GREY,
    JOB,
    ORANGE,
    RED,
    SOURCE_MODEL,
    YELLOW,
    annotation,
    band,
    board,
    colored,
    filled,
    lines,
    number,
    states,
    stream_age,
    variable,
)
from monitoring.streams import DECISIONS

COLORS = {
    "applied": BLUE,
    "partial": "light-blue",
    "skipped": GREY,
    "rolled_back": RED,
    "reset": ORANGE,
    "imported": "purple",
    "approved": GREEN,
    "frozen": YELLOW,
    "unfrozen": GREEN,
    "policy": "purple",
    "carried": "purple",
    "deleted": RED,
}


OWN = f'stream="$stream",{JOB}'


def of(metric: str) -> str:
    return f"driftkeel_stream_{metric}{{{OWN}}}"


def newest(metric: str) -> str:
    """One value, also in the moment after a stream has moved to another worker."""
    return f"max({of(metric)})"


def build() -> Dashboard:
    yes_no = {0.0: ("no", GREEN), 1.0: ("yes", YELLOW)}
    return filled(
        board("Stream", "stream", "One camera: how good are its predictions, what does adaptation do to it, and why?")
        .with_variable(variable("stream", "Stream", f"label_values(driftkeel_stream_step{{{JOB}}}, stream)"))
        .annotation(
            annotation("Refused or undone", f"changes({of('last_trouble_timestamp_seconds')}[$__interval]) > 0", RED)
        )
        .annotation(annotation("Set back", f"resets({of('step')}[$__interval]) > 0", ORANGE)),
        number(
            "Estimated accuracy",
            "Accuracy of the adapted parameters over recent frames, estimated without labels. Only with adapt.method "
            "mgg.",
            newest("estimated_accuracy_ratio"),
            "percentunit",
            ACCURACY,
        ),
        number(
            "Accuracy of source",
            "The same estimate for the source model on the same frames. Higher than the first number: adaptation does "
            "harm.",
            newest("source_accuracy_ratio"),
            "percentunit",
            ACCURACY,
        ),
        number(
            "Who answers",
            "Which parameters answer now. Source answers by policy, before the first update, or because it is "
            "estimated to do better.",
            newest("answers_source"),
            names={0.0: ("adapted", BLUE), 1.0: ("source", SOURCE_MODEL)},
        ),
        number(
            "Frozen",
            "Whether a command has frozen the stream: no updates until somebody unfreezes it.",
            newest("frozen"),
            names=yes_no,
        ),
        number("Updates", "Updates that the stream's parameters have seen since the source model.", newest("step")),
        number(
            "Last frames",
            "Time since the newest frames were decided on. Long: the camera is silent, or its frames wait in Kafka.",
            stream_age("last_decision", OWN),
            "s",
            ((None, GREEN), (60, YELLOW), (600, RED)),
        ),
        Row("How good are its predictions?"),
        colored(
            band(
                lines(
                    "Estimated accuracy",
                    "Blue: the adapted parameters, with the 90% interval of the estimate. Brown: the source model on "
                    "the same frames. Blue above brown: adaptation helps. Both fall: the camera has changed. Only blue "
                    "falls: adaptation has gone wrong.",
                    [
                        (newest("estimated_accuracy_ratio"), "adapted"),
                        (newest("estimated_accuracy_low_ratio"), "low"),
                        (newest("estimated_accuracy_high_ratio"), "high"),
                        (newest("source_accuracy_ratio"), "source"),
                    ],
                    "percentunit",
                    most=1.0,
                ),
                "low",
                "high",
            ),
            {"adapted": ADAPTED, "source": SOURCE_MODEL},
        ),
        lines(
            "Entropy",
            "Entropy of the predictions: high means that the model is unsure. Entropy of their mean: near 0 means that "
            "nearly all answers are of one class, which is a collapse unless the camera shows only that class.",
            [(newest("entropy_nats"), "of predictions"), (newest("marginal_entropy_nats"), "of their mean")],
            "none",
        ),
        lines(
            "Confidence and difference from source",
            "Mean calibrated confidence of recent predictions, and the share of them for which source gives another "
            "class.",
            [(newest("confidence_ratio"), "confidence"), (newest("flip_ratio"), "differs from source")],
            "percentunit",
            most=1.0,
        ),
        lines(
            "Drift score",
            "Evidence that the stream is drifting now. At 100% drift is detected, and the score begins again.",
            [(newest("drift_score"), "score")],
            "percentunit",
            limits=((None, GREEN), (0.5, YELLOW), (1, RED)),
        ),
        Row("What does adaptation do, and why?"),
        states(
            "Decisions and state",
            "decision: the newest one. answers: which parameters answer. adapting: whether drift detection has the "
            "stream adapt. frozen: by a command. updates: held back by policy, or because all frames are of one class. "
            "frames: whether they are unlike those that source was trained for. guard: whether it trusts the adapted "
            "parameters. camera: blind if frames are blank or repeat.",
            [
                (newest("decision"), "decision"),
                (newest("answers_source"), "answers"),
                (newest("adapting"), "adapting"),
                (newest("frozen"), "frozen"),
                (newest("held_back"), "updates"),
                (newest("shifted"), "frames"),
                (newest("trusted"), "guard"),
                (newest("blind"), "camera"),
            ],
            {
                "decision": {float(i): (name, COLORS[name]) for i, name in enumerate(DECISIONS)},
                "answers": {0.0: ("adapted", BLUE), 1.0: ("source", SOURCE_MODEL)},
                "adapting": {0.0: ("settled", GREEN), 1.0: ("adapting", BLUE)},
                "frozen": {0.0: ("no", GREY), 1.0: ("frozen", YELLOW)},
                "updates": {0.0: ("wanted", GREY), 1.0: ("held back", YELLOW)},
                "frames": {0.0: ("as source knows", GREEN), 1.0: ("shifted", ORANGE)},
                "guard": {0.0: ("doubts", RED), 1.0: ("trusts", GREEN)},
                "camera": {0.0: ("sees", GREEN), 1.0: ("blind", RED)},
            },
        ),
        lines(
            "Gradient norms",
            "raw: norm of the unsupervised gradient. generated: norm of what the generator made of it, which moves the "
            "parameters. If raw climbs tenfold, divergence may follow.",
            [(newest("raw_gradient_norm"), "raw"), (newest("generated_gradient_norm"), "generated")],
            "none",
            width=8,
            log_scale=True,
        ),
        lines(
            "Cosine of raw and generated gradient",
            "Near 1 the generator follows the raw gradient, near 0 it takes a way of its own, below 0 it goes against "
            "it.",
            [(newest("gradient_cosine"), "cosine")],
            "none",
            width=8,
            least=-1.0,
            most=1.0,
        ),
        lines(
            "Distance from source",
            "How far the adapted parameters are from source. Normally it grows while the camera drifts and then levels "
            "off. A steady climb is divergence.",
            [(newest("source_distance"), "distance")],
            "none",
            width=8,
        ),
        lines(
            "Updates",
            "Updates that the stream's parameters have seen. A fall is a rollback or a reset.",
            [(newest("step"), "updates")],
            "short",
        ),
        lines(
            "Since the last update and the last frames",
            "If the time since the update grows while frames come, the stream is frozen or held back, has settled, its "
            "updates are refused, or it has too few frames. Decisions and state says which.",
            [
                (stream_age("last_update", OWN), "update"),
                (stream_age("last_decision", OWN), "frames"),
            ],
            "s",
        ),
    )
