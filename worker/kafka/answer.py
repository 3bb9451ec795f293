"""When the broker last answered a client of kafka-python 3.0.12, whose interface does not say.

The client tries again for ever by itself, and to whoever polls it a broker that is away looks like one without records.
"""

from __future__ import annotations

from typing import Any


def last_answer(client: Any) -> float:
    """When a consumer or producer got its last response to any request, in monotonic seconds. From any thread."""
    return float(client._metrics.get_sensor("request-latency")._last_record_time) / 1000
