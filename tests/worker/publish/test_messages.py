import json
from datetime import UTC, datetime
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from schemas.prediction import ClassScore, Parameters, Prediction
from worker.publish.messages import PredictionWriter

shares = st.floats(0, 1, width=32)


@given(
    stream=st.text(min_size=1),
    label=st.text(),
    step=st.integers(0, 1 << 40),
    parameters=st.sampled_from(get_args(Parameters)),
    confidence=shares,
    accuracy=st.none() | shares,
    waited=st.floats(0, 1e6),
    source=st.sampled_from([None, 0, 1]),
    moment=st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=st.just(UTC)),  # as frames have it
)
def test_bytes_are_what_the_contract_would_write(
    stream: str,
    label: str,
    step: int,
    parameters: Parameters,
    confidence: float,
    accuracy: float | None,
    waited: float,
    source: int | None,
    moment: datetime,
) -> None:
    labels = ["nut", label]
    writer = PredictionWriter(labels, "0123abcd", 'w "1"')
    shared = writer.shared(stream, step, parameters, accuracy, 0.25)
    content = writer.frame(shared, "frames/2/7", moment.isoformat(), [1, 0], [confidence, 0.0], waited, source)
    expected = Prediction(
        id="frames/2/7",
        stream=stream,
        event_time=moment,
        index=1,
        label=label,
        confidence=confidence,
        top=[ClassScore(index=1, label=label, confidence=confidence), ClassScore(index=0, label="nut", confidence=0)],
        source_index=source,
        source_label=None if source is None else labels[source],
        bundle="0123abcd",
        step=step,
        parameters=parameters,
        estimated_accuracy=accuracy,
        worker='w "1"',
        wait_seconds=waited,
        pass_seconds=0.25,
    )
    assert Prediction.model_validate_json(content) == expected
    assert set(json.loads(content)) == set(expected.model_dump())
