"""Ports for what is to be started."""

from __future__ import annotations

import pytest

from worker import embedded


def test_a_port_that_was_given_out_is_not_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever got it may not have bound it yet."""
    monkeypatch.setattr(embedded, "PORTS", range(19_000, 19_040))
    ports = [embedded.free_port() for _ in range(25)]
    assert len(set(ports)) == len(ports)
