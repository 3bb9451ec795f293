"""Business view: what is adaptation worth?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from monitoring.dashboards.parts import (
    ACCURACY,
    ADAPTED,
    GREEN,
    JOB,
    RATE,
    RED,
    SOURCE_MODEL,
    YELLOW,
    board,
    colored,
    filled,
    lines,
    number,
)

RANGE = "[$__range]"


def correct(by: str, window: str, function: str = "increase") -> str:
    return f'sum({function}(driftkeel_estimated_correct_frames_total{{by="{by}",{JOB}}}{window}))'


def judged(window: str, function: str = "increase") -> str:
    return f"sum({function}(driftkeel_estimated_frames_total{{{JOB}}}{window}))"


def accuracy(by: str, window: str, function: str = "increase") -> str:
    return f"{correct(by, window, function)} / {judged(window, function)}"


def build() -> Dashboard:
    saved = f"{correct('answered', RANGE)} - {correct('source', RANGE)}"
    gained = f"({correct('answered', RATE, 'rate')} - {correct('source', RATE, 'rate')})"
    helps = ((None, RED), (0, YELLOW), (0.001, GREEN))
    return filled(
        board(
            "Business",
            "business",
            "What is adaptation worth? All numbers are estimates without labels: they compare the answers that were "
            "given with those that the source model would have given on the same frames.",
        ).time("now-24h", "now"),
        number(
            "Frames saved",
            "Frames in the chosen time that were answered rightly thanks to adaptation: right answers, minus those "
            "that the source model would have had. Below 0: adaptation did harm.",
            saved,
            "short",
            helps,
            width=6,
        ),
        number(
            "Accuracy as answered",
            "Estimated share of right answers among those given in the chosen time.",
            accuracy("answered", RANGE),
            "percentunit",
            ACCURACY,
            width=6,
        ),
        number(
            "Accuracy of source",
            "Estimated share that the source model would have answered rightly on the same frames.",
            accuracy("source", RANGE),
            "percentunit",
            ACCURACY,
            width=6,
        ),
        number(
            "Errors avoided",
            "Share of the source model's errors that adaptation avoided.",
            f"({saved}) / ({judged(RANGE)} - {correct('source', RANGE)})",
            "percentunit",
            helps,
            width=6,
        ),
        colored(
            lines(
                "Estimated accuracy",
                "Blue: the answers given. Brown: those of the source model. The area between them is what adaptation "
                "is worth.",
                [
                    (accuracy("answered", RATE, "rate"), "answered"),
                    (accuracy("source", RATE, "rate"), "source"),
                ],
                "percentunit",
                width=24,
                most=1.0,
            ),
            {"answered": ADAPTED, "source": SOURCE_MODEL},
        ),
        lines(
            "Frames saved per hour",
            "Frames per hour that are right thanks to adaptation, at the present rate. Below 0: the source model would "
            "do better.",
            [(f"3600 * {gained}", "saved per hour")],
            "short",
            least=None,
            limits=((None, RED), (0, GREEN)),
        ),
        lines(
            "Frames",
            "Frames predicted per second, and how many of them have both estimates. Only these count in the numbers "
            "above.",
            [
                (f"sum(rate(driftkeel_predictions_total{{{JOB}}}{RATE}))", "predicted"),
                (judged(RATE, "rate"), "with both estimates"),
            ],
            "reqps",
        ),
    )
