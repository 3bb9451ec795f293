"""Keys and values in the store are what earlier versions left there: workers of two versions share them."""

from __future__ import annotations

import redis
import torch

from schemas.config import Store
from schemas.state_tensors import decode_snapshot, decode_state, decode_tensors
from tests.schemas.test_golden import TENSORS, golden
from worker.store.compress import unpack
from worker.store.store import StateStore, Write

MOST = 1 << 20


def test_what_an_earlier_version_left_is_found(store: StateStore, store_settings: Store, client: redis.Redis) -> None:
    base, said, packed = f"{store_settings.prefix}:{{cam%207}}", golden("snapshot.json"), golden("tensors.deflate")
    values = {"token": 4, "owner": "line-1-a", "header": golden("header.json"), "event": golden("event.json")}
    client.hset(base, mapping={**values, "written": 14})
    client.set(f"{base}:tensors", packed)
    client.set(f"{base}:approved", golden("tensors.safetensors"))  # without compression
    client.lpush(f"{base}:snapshots", len(said).to_bytes(4, "little") + said + packed)
    client.set(f"{store_settings.prefix}:{{gone}}:deleted", b"9\n" + golden("event.json"))
    client.set(f"{store_settings.prefix}:mark:line%2F1/frames/3", 8)

    assert store.marks("line/1", [("frames", 3)]) == {("frames", 3): 8}
    assert list(store.streams()) == ["cam 7"]
    assert store.deleted("gone") == golden("event.json")
    (overview,) = store.overview(["cam 7"])
    assert (overview.token, overview.owner, overview.snapshots) == (4, "line-1-a", 1)
    found, gone = store.claim(["cam 7", "gone"], "w")
    assert (found.token, found.event, gone.token, gone.event) == (5, golden("event.json"), 10, golden("event.json"))
    state = decode_state(found.header or b"", found.tensors or b"", TENSORS, MOST)
    assert torch.equal(state.tensors["affine"], TENSORS["affine"])
    assert torch.equal(decode_tensors(found.approved or b"", 9, TENSORS)["memory"], TENSORS["memory"])
    assert store.snapshots("cam 7") == [said]
    count, about, kept = store.snapshot("cam 7", 1)
    assert count == 1
    snapshot, _ = decode_snapshot(about, unpack(kept, MOST), TENSORS, "0123456789abcdef")
    assert snapshot.header == state.header


def test_what_is_written_lies_where_an_earlier_version_looks(
    store: StateStore, store_settings: Store, client: redis.Redis
) -> None:
    base = f"{store_settings.prefix}:{{cam%207}}"
    store.claim(["cam 7"], "w")
    assert store.write([Write("cam 7", 1, 3, b"header", b"event", b"tensors", b"said", b"approved")]) == [True]
    store.mark("line/1", {("frames", 3): 8})
    written = {b"token": b"1", b"owner": b"w", b"header": b"header", b"event": b"event", b"written": b"3"}
    assert client.hgetall(base) == written
    assert client.get(f"{base}:tensors") == b"tensors"
    assert client.get(f"{base}:approved") == b"approved"
    assert client.lrange(f"{base}:snapshots", 0, -1) == [b"\4\0\0\0saidtensors"]
    assert client.get(f"{store_settings.prefix}:mark:line%2F1/frames/3") == b"8"
    assert store.delete("cam 7", 1, b"last")
    assert client.get(f"{base}:deleted") == b"1\nlast"
    assert client.keys(f"{store_settings.prefix}:{{*") == [f"{base}:deleted".encode()]
