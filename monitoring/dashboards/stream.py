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
        board("Stream", "stream", "One camera: how well is it predicted, what does adaptation do to it, and why?")
        .with_variable(variable("stream", "Stream", f"label_values(driftkeel_stream_step{{{JOB}}}, stream)"))
        .annotation(
            annotation("Refused or undone", f"changes({of('last_trouble_timestamp_seconds')}[$__interval]) > 0", RED)
        )
        .annotation(annotation("Set back", f"resets({of('step')}[$__interval]) > 0", ORANGE)),
        number(
            "Estimated accuracy",
            "Of the parameters that adapt, over recent frames, without labels.",
            newest("estimated_accuracy_ratio"),
            "percentunit",
            ACCURACY,
        ),
        number(
            "Source would have",
            "The same estimate for the source model on the same frames.",
            newest("source_accuracy_ratio"),
            "percentunit",
            ACCURACY,
        ),
        number(
            "Who answers",
            "Whose parameters answer now: source by policy, before the first update, or because it does better.",
            newest("answers_source"),
            names={0.0: ("adapted", BLUE), 1.0: ("source", SOURCE_MODEL)},
        ),
        number("Frozen", "Whether somebody has frozen the stream.", newest("frozen"), names=yes_no),
        number("Updates", "That its parameters have seen since the source model.", newest("step")),
        number(
            "Last frames",
            "How long ago its newest frames were judged. Long: the camera is silent, or its partition waits.",
            stream_age("last_decision", OWN),
            "s",
            ((None, GREEN), (60, YELLOW), (600, RED)),
        ),
        Row("How well is it predicted?"),
        colored(
            band(
                lines(
                    "Estimated accuracy",
                    "Of the adapted parameters with its 90% interval, and of source on the same frames. Where blue "
                    "is above brown, adaptation helps.",
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
            "Of the predictions: high is unsure. Of their mean: near 0, one class is all the model says any more, "
            "which is collapse unless the camera shows one class only.",
            [(newest("entropy_nats"), "of predictions"), (newest("marginal_entropy_nats"), "of their mean")],
            "none",
        ),
        lines(
            "Confidence and difference from source",
            "Mean calibrated confidence, and the share of recent predictions that source does not share.",
            [(newest("confidence_ratio"), "confidence"), (newest("flip_ratio"), "differs from source")],
            "percentunit",
            most=1.0,
        ),
        lines(
            "Drift score",
            "How much drift detection has seen of a move; at 100% it alarms, and begins again.",
            [(newest("drift_score"), "score")],
            "percentunit",
            limits=((None, GREEN), (0.5, YELLOW), (1, RED)),
        ),
        Row("What does adaptation do, and why?"),
        states(
            "Decisions and state",
            "The newest decision at each scrape; who answers; whether drift detection has the stream adapt; "
            "whether it is frozen, held back by its policy or by frames of one class, shifted, trusted by the guard, "
            "and sees.",
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
            "Of the unsupervised gradient, and of what the generator made of it. A raw norm that climbs tenfold "
            "comes before divergence.",
            [(newest("raw_gradient_norm"), "raw"), (newest("generated_gradient_norm"), "generated")],
            "none",
            width=8,
            log_scale=True,
        ),
        lines(
            "Cosine of raw and generated gradient",
            "Near 1 the generator follows the raw gradient, near 0 it goes its own way, below 0 against it.",
            [(newest("gradient_cosine"), "cosine")],
            "none",
            width=8,
            least=-1.0,
            most=1.0,
        ),
        lines(
            "Distance from source",
            "Of the norm affine. It grows while the stream moves and then levels off; a steady climb is divergence.",
            [(newest("source_distance"), "distance")],
            "none",
            width=8,
        ),
        lines(
            "Updates",
            "That its parameters have seen; a fall is a rollback or a reset.",
            [(newest("step"), "updates")],
            "short",
        ),
        lines(
            "Since the last update and the last frames",
            "Long since an update while frames come: frozen, settled, refused, or too few frames.",
            [
                (stream_age("last_update", OWN), "update"),
                (stream_age("last_decision", OWN), "frames"),
            ],
            "s",
        ),
    )
