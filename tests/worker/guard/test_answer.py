import pytest

from schemas.policy import Policy
from schemas.state import StreamHeader
from worker.guard.answer import answering, in_share, named


@pytest.mark.parametrize(
    ("mode", "approved", "trusted", "expected"),
    [
        ("auto", None, True, "adapted"),
        ("auto", None, False, "source"),
        ("auto", 3, True, "adapted"),
        ("shadow", None, True, "source"),
        ("approve", None, True, "source"),
        ("approve", 3, True, "approved"),
        ("approve", 3, False, "approved"),
    ],
)
def test_who_answers(mode: str, approved: int | None, trusted: bool, expected: str) -> None:
    header = StreamHeader(stream="a", bundle="b", method="mgg", approved=approved)
    header.guard.trusted = trusted
    assert answering(Policy(mode=mode), header) == expected


def test_after_a_change_of_bundle_source_answers_until_the_parameters_have_proved_themselves() -> None:
    header = StreamHeader(stream="a", bundle="b", method="mgg", probation=1)
    assert answering(Policy(), header) == "source"


def test_parameters_that_no_update_has_moved_are_called_those_of_source() -> None:
    new, moved = (StreamHeader(stream="a", bundle="b", method="mgg", step=step) for step in (0, 1))
    assert [named(answer, new) for answer in ("adapted", "source", "approved")] == ["source", "source", "approved"]
    assert [named(answer, moved) for answer in ("adapted", "source", "approved")] == ["adapted", "source", "approved"]


def test_a_canary_is_a_share_of_the_streams_that_only_grows() -> None:
    streams = [f"cam-{i}" for i in range(2_000)]
    small, large = ({s for s in streams if in_share(s, share)} for share in (0.1, 0.3))
    assert small < large
    assert 0.07 < len(small) / len(streams) < 0.13
    assert not any(in_share(s, 0.0) for s in streams)
    assert all(in_share(s, 1.0) for s in streams)
    header = StreamHeader(stream=min(small), bundle="b", method="mgg")
    assert answering(Policy(mode="canary", canary_share=0.1), header) == "adapted"
    assert answering(Policy(mode="canary", canary_share=0.0), header) == "source"
    header.guard.trusted = False
    assert answering(Policy(mode="canary", canary_share=0.1), header) == "source"
