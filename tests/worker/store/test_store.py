import contextlib
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
import redis

from schemas.config import Store
from schemas.errors import StateError, UnreachableError
from worker.control.stored import listed
from worker.embedded import free_port
from worker.store.compress import pack
from worker.store.store import Overview, StateStore, Which, Write

OpenStore = Callable[[Store], StateStore]


def write(stream: str, token: int, tensors: bytes | None = b"t", number: int = 1) -> Write:
    return Write(stream, token, number, b"header", b"event", tensors)


def test_claim_write_claim(store: StateStore) -> None:
    (first,) = store.claim(["cam"], "w1")
    assert (first.token, first.header, first.tensors, first.event) == (1, None, None, None)
    assert store.write([write("cam", 1)]) == [True]
    (second,) = store.claim(["cam"], "w2")
    assert (second.token, second.header, second.tensors, second.event) == (2, b"header", b"t", b"event")
    assert (first.before, second.before) == ("", "w1")


@pytest.mark.parametrize("which", ["known", "last"])
def test_where_only_known_streams_are_claimed_new_ones_are_not_begun(store: StateStore, which: Which) -> None:
    store.claim(["known"], "w")
    assert [claimed.token for claimed in store.claim(["known", "new"], "w", which)] == [2, 0]
    assert list(store.streams()) == ["known"]


def test_a_zombie_is_refused_and_changes_nothing(store: StateStore) -> None:
    store.claim(["cam"], "old")
    store.claim(["cam"], "new")
    assert store.write([write("cam", 2, b"good")]) == [True]
    assert store.write([Write("cam", 1, 2, b"bad", b"bad", b"bad")]) == [False]
    (claimed,) = store.claim(["cam"], "new")
    assert (claimed.header, claimed.tensors) == (b"header", b"good")


def test_a_write_that_comes_twice_counts_once_and_a_late_one_undoes_nothing(store: StateStore) -> None:
    store.claim(["cam"], "w")
    first = Write("cam", 1, 9, b"h9", b"e9", b"t9", snapshot=b"s9")
    assert store.write([first]) == [True]
    assert store.write([first]) == [True]
    assert len(store.snapshots("cam")) == 1
    assert store.write([Write("cam", 1, 10, b"h10", b"e10", b"t10")]) == [True]
    assert store.write([first]) == [False]
    found = store.read("cam")
    assert (found.header, found.tensors, found.event) == (b"h10", b"t10", b"e10")
    # After a claim the numbers begin anew: a reset may have set them back.
    assert store.claim(["cam"], "w")[0].token == 2
    assert store.write([Write("cam", 2, 1, b"h1", b"e1", b"t1")]) == [True]


def test_a_number_that_none_wrote_refuses_the_write_and_goes_with_the_next_claim(
    store: StateStore, client: redis.Redis
) -> None:
    store.claim(["cam", "other"], "w")
    client.hset(store.keys("cam")[0], "written", "none")
    assert store.write([write("cam", 1), write("other", 1)]) == [False, True]
    assert store.claim(["cam"], "w")[0].token == 2
    assert store.write([write("cam", 2)]) == [True]


def test_a_number_that_another_wrote_is_no_write(store: StateStore, client: redis.Redis) -> None:
    """The worker took its state for stored, and went on to commit the frames in it."""
    store.claim(["cam"], "w")
    assert store.write([write("cam", 1)]) == [True]
    client.hset(store.keys("cam")[0], "written", 2)
    second = Write("cam", 1, 2, b"header 2", b"event 2", None)
    assert store.write([second]) == [False]
    assert store.claim(["cam"], "w")[0].header == b"header"
    assert store.write([replace(second, token=2), replace(second, token=2)]) == [True, True]


def test_a_mark_that_another_has_moved_on_is_left(store: StateStore) -> None:
    partition = ("frames", 0)
    for offset, seen, noted in [(7, None, 7), (90, None, 90), (80, 7, 90), (80, 90, 80), (81, 7, 81)]:
        store.mark("group", {partition: offset}, {} if seen is None else {partition: seen})
        assert store.marks("group", [partition]) == {partition: noted}


@pytest.mark.parametrize("mark", ["", "-1", "1.5", "9" * 19, "9" * 5_000])
def test_a_mark_that_is_no_offset_is_none(store: StateStore, client: redis.Redis, mark: str) -> None:
    partitions = [("frames", 0), ("frames", 1)]
    store.mark("group", dict.fromkeys(partitions, 7))
    client.set(store._mark_key("group", partitions[0]), mark)
    assert store.marks("group", partitions) == {partitions[1]: 7}
    store.mark("group", {partitions[0]: 8})
    assert store.marks("group", partitions) == {partitions[0]: 8, partitions[1]: 7}


def test_what_positions_are_of_is_noted_once(store: StateStore, client: redis.Redis) -> None:
    assert (store.cluster("frames"), client.exists(store.cluster_key("frames"))) == ("", 0)
    assert [store.cluster("frames", found) for found in ("one", "two", "")] == ["one", "one", "one"]
    assert [store.topic_id("frames", found) for found in ("", "a", "b")] == ["", "a", "a"]
    client.set(store.cluster_key("long"), b"7" * 10_000)
    client.rpush(store.cluster_key("list"), "theirs")
    assert [store.cluster(topic, "one") for topic in ("long", "list")] == ["", ""]


def test_what_was_not_left_by_a_deletion_is_none_and_nobody_s_stream(store: StateStore, client: redis.Redis) -> None:
    key = store._all_keys("cam")[-1]
    client.rpush(key, "theirs")
    assert store.deleted("cam") is None
    (claimed,) = store.claim(["cam"], "w")
    assert (claimed.token, "is a list, which no worker wrote" in claimed.foreign) == (0, True)
    assert client.lrange(key, 0, -1) == [b"theirs"]


def test_a_lost_key_refuses_the_old_token(store: StateStore, client: redis.Redis) -> None:
    store.claim(["cam"], "w")
    client.delete(store.keys("cam")[0])
    assert store.write([write("cam", 1)]) == [False]


def test_a_deleted_stream_leaves_nothing_and_its_workers_stay_refused(store: StateStore, client: redis.Redis) -> None:
    store.claim(["cam", "cam"], "paused")
    assert store.write([Write("cam", 2, 1, b"h", b"e", b"t", snapshot=b"s", approved=b"a")]) == [True]
    assert client.exists(*store.keys("cam")) == 4
    assert not store.delete("cam", 1, b"last")
    assert not store.delete("none", 0, b"last")
    assert client.exists(*store.keys("cam")) == 4
    assert store.deleted("cam") is None
    assert store.delete("cam", 2, b"last")
    assert client.exists(*store.keys("cam")) == 0
    assert "cam" not in store.streams()
    assert store.deleted("cam") == b"last"
    assert list(store.deleted_streams()) == ["cam"]
    assert store.write([write("cam", 2, number=2)]) == [False]
    (claimed,) = store.claim(["cam"], "next")
    assert (claimed.token, claimed.header, claimed.tensors, claimed.approved) == (3, None, None, None)
    assert claimed.event == b"last"
    assert store.deleted("cam") is None
    assert store.write([write("cam", 2, number=2), write("cam", 3)]) == [False, True]


def test_what_an_earlier_version_left_of_a_deleted_stream_still_counts(store: StateStore, client: redis.Redis) -> None:
    client.set(store._all_keys("cam")[-1], 7, ex=100)
    assert store.deleted("cam") == b""
    (claimed,) = store.claim(["cam"], "next")
    assert (claimed.token, claimed.header, claimed.event) == (8, None, None)


@pytest.mark.parametrize("part", range(4))
def test_a_key_of_another_type_is_not_touched(store: StateStore, client: redis.Redis, part: int) -> None:
    store.claim(["cam", "other"], "w")
    key = store.keys("cam")[part]
    client.delete(key)
    client.geoadd(key, (1, 2, "theirs"))
    whole = Write("cam", 1, 1, b"h", b"e", b"t", snapshot=b"s", approved=b"a")
    assert store.write([whole, write("other", 1)]) == [False, True]
    assert not store.delete("cam", 1, b"last")
    said = f"key {key} in the store is a zset, which no worker wrote; rename or delete it"
    claims = store.claim(["cam", "other"], "w")
    assert [(c.token, c.foreign) for c in claims] == [(0, said), (2, "")]
    assert (store.read("cam").foreign, store.overview(["cam"])[0].foreign) == (said, said)
    assert client.zcard(key) == 1
    assert part == 0 or client.hget(store.keys("cam")[0], "header") is None
    with pytest.raises(StateError, match="no list of snapshots") if part == 2 else contextlib.nullcontext():
        assert store.snapshots("cam") == []
    with pytest.raises(StateError, match="no list of snapshots") if part == 2 else contextlib.nullcontext():
        assert store.snapshot("cam", 1) == (0, b"", b"")


@pytest.mark.parametrize("token", [10**15, 2**63 - 1, 10**20, "007"])
def test_a_token_that_cannot_be_raised_is_nobody_s(store: StateStore, client: redis.Redis, token: int | str) -> None:
    key = store.keys("cam")[0]
    client.hset(key, "token", token)
    claims = store.claim(["cam", "other"], "w")
    assert [(c.token, bool(c.foreign)) for c in claims] == [(0, True), (1, False)]
    assert (bool(store.read("cam").foreign), bool(store.overview(["cam"])[0].foreign)) == (True, True)
    assert client.hgetall(key) == {b"token": str(token).encode()}
    client.delete(key)
    client.set(store._all_keys("cam")[-1], f"{token}\nlast")
    assert store.claim(["cam"], "w")[0].token == 1
    client.hset(key, "token", 10**15 - 2)
    assert store.claim(["cam"], "w")[0].token == 10**15 - 1


def test_header_alone_keeps_the_tensors(store: StateStore) -> None:
    store.claim(["cam"], "w")
    store.write([write("cam", 1, b"tensors")])
    store.write([Write("cam", 1, 2, b"header 2", b"event 2", None)])
    (claimed,) = store.claim(["cam"], "w")
    assert (claimed.header, claimed.tensors, claimed.event) == (b"header 2", b"tensors", b"event 2")


def test_many_streams_in_one_go_keep_their_order(store: StateStore) -> None:
    streams = [f"cam-{i}" for i in range(50)]
    store.claim(streams[:10], "w")
    assert [c.token for c in store.claim(streams, "w")] == [2] * 10 + [1] * 40
    writes = [write(s, 2 if i < 5 else 1) for i, s in enumerate(streams)]
    assert store.write(writes) == [True] * 5 + [False] * 5 + [True] * 40


@pytest.mark.parametrize("stream", ["a}b{c", "{", "süd/kamera 1", "x:y:*", "%7B"])
def test_any_stream_id_has_a_key_and_hash_tag_of_its_own(store: StateStore, stream: str) -> None:
    keys = store.keys(stream)
    assert all(key.count("{") == key.count("}") == 1 for key in keys)
    assert len({key[key.index("{") : key.index("}")] for key in keys}) == 1
    store.claim([stream], "w")
    assert store.write([write(stream, 1)]) == [True]
    assert store.claim([stream + "x"], "w")[0].header is None
    assert set(store.streams()) == {stream, stream + "x"}


@pytest.mark.parametrize("inside", [b"a b", b"cam%ff", b"x:y", b"cam}:x", b"\xff", b"x" * 1_001])
def test_a_key_that_no_stream_would_have_is_no_stream(
    store: StateStore, store_settings: Store, inside: bytes, client: redis.Redis
) -> None:
    """One such key was a stream of the full store, and ended `driftkeel streams list`."""
    store.claim(["a b"], "w")
    client.set(store_settings.prefix.encode() + b":{" + inside + b"}", "x")
    assert (list(store.streams()), store.count()) == (["a b"], 1)
    assert [found.stream for found in listed(store)] == ["a b"]


def test_a_stream_that_goes_while_all_are_listed_is_left_out(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.claim(["cam"], "w")
    monkeypatch.setattr(store, "streams", lambda: iter(["cam", "gone"]))
    assert [found.stream for found in listed(store)] == ["cam"]


def test_states_that_inflate_are_not_all_in_memory_at_once(store: StateStore, store_settings: Store) -> None:
    """What is a thousandth of it in the store, of all streams that a worker meets at a time."""
    streams, inflated = [f"cam-{i}" for i in range(16)], bytes(store_settings.max_state_bytes // 32)
    store.claim(streams, "w")
    packed = pack(inflated, "deflate")
    assert store.write([replace(write(s, 1), tensors=packed, approved=packed) for s in streams]) == [True] * 16
    snapshots = [replace(write("cam-0", 1, number=n), tensors=packed, snapshot=b"s") for n in range(2, 7)]
    assert store.write(snapshots) == [True] * 5
    tracemalloc.start()
    try:
        for claimed in store.claim(streams, "next"):
            assert claimed.tensors == claimed.approved == inflated
        assert len(store.snapshots("cam-0")) == 5
        assert tracemalloc.get_traced_memory()[1] < 8 * len(inflated)
    finally:
        tracemalloc.stop()


def test_no_more_of_a_state_is_read_than_it_may_have(
    open_store: OpenStore, store_settings: Store, client: redis.Redis
) -> None:
    """A value of hundreds of megabytes takes the store longer than a worker waits for it, again and again."""
    store = open_store(store_settings.model_copy(update={"max_state_bytes": 100_000}))
    noise = random.Random(0).randbytes(100_000)
    packed = pack(noise, "deflate")
    assert len(packed) > len(noise)
    store.claim(["cam", "other"], "w")
    assert store.write([replace(write(s, 1), tensors=packed, approved=packed) for s in ("cam", "other")]) == [True] * 2
    for key in (store.keys("cam")[1], store.keys("cam")[3]):
        client.setrange(key, 300_000, b"x")
    for cam, other in (store.claim(["cam", "other"], "w"), (store.read("cam"), store.read("other"))):
        assert (cam.packed, cam.packed_approved, cam.header) == (b"", b"", b"header")
        assert other.tensors == other.approved == noise


LONG = 40 << 20
PUT = {
    "header": lambda client, keys: client.hset(keys[0], "header", bytes(LONG)),
    "event": lambda client, keys: client.hset(keys[0], "event", bytes(LONG)),
    "owner": lambda client, keys: client.hset(keys[0], "owner", bytes(LONG)),
    "snapshot": lambda client, keys: client.lset(keys[2], 0, b"\1\0\0\0s" + bytes(LONG)),
    "what is said of a snapshot": lambda client, keys: client.lset(keys[2], 0, b"\0\0\0\1" + bytes(LONG)),
    "deleted": lambda client, keys: client.set(f"{keys[0]}:deleted", b"7\n" + bytes(LONG)),
    "name": lambda client, keys: client.set(keys[0][:-1] + "x" * LONG + "}", 1),
}


@pytest.mark.parametrize("what", PUT)
def test_what_is_longer_than_it_may_be_is_not_fetched(
    open_store: OpenStore, store_settings: Store, client: redis.Redis, what: str
) -> None:
    """Each of these was fetched whole, and the memory of every worker and command that met the stream grew by it."""
    store = open_store(store_settings.model_copy(update={"max_state_bytes": 1 << 20}))
    store.claim(["cam", "other"], "w")
    assert store.write([replace(write(s, 1), snapshot=b"s") for s in ("cam", "other")]) == [True, True]
    PUT[what](client, store.keys("cam"))
    tracemalloc.start()
    try:
        assert [found.owner for found in store.overview(["cam", "other"])] == ["" if what == "owner" else "w", "w"]
        for cam, other in (store.claim(["cam", "other"], "w"), (store.read("cam"), store.read("other"))):
            assert (cam.header, cam.event) == (
                b"" if what == "header" else b"header",
                b"" if what == "event" else b"event",
            )
            assert (other.header, other.event) == (b"header", b"event")
        assert store.snapshots("cam") == [b"" if what == "what is said of a snapshot" else b"s"]
        assert store.snapshot("cam", 1) == (1, *((b"", b"") if "snapshot" in what else (b"s", b"t")))
        assert store.snapshot("other", 1) == (1, b"s", b"t")
        assert {name for name, _, _ in store.ends()} == set(store.streams()) == {"cam", "other"}
        assert store.deleted("cam") == (b"" if what == "deleted" else None)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_mark_without_end_is_not_fetched(store: StateStore, client: redis.Redis) -> None:
    client.set(store._mark_key("group", ("frames", 0)), b"7" * LONG)
    tracemalloc.start()
    try:
        assert store.marks("group", [("frames", 0)]) == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_tokens_go_on_behind_a_last_event_that_is_too_long(store: StateStore, client: redis.Redis) -> None:
    client.set(store._all_keys("cam")[-1], b"7\n" + bytes(LONG))
    (claimed,) = store.claim(["cam"], "next")
    assert (claimed.token, claimed.header) == (8, None)
    assert len(claimed.event or b"") < 16


def test_unreachable_store_names_its_address_and_no_password(open_store: OpenStore) -> None:
    port = free_port()
    store = open_store(Store(url=f"redis://user:geheim@127.0.0.1:{port}/0"))
    with pytest.raises(UnreachableError) as caught:
        store.ping()
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_snapshots_are_kept_newest_first_and_bounded(
    open_store: OpenStore, store_settings: Store, client: redis.Redis
) -> None:
    store = open_store(store_settings.model_copy(update={"snapshots": 2}))
    store.claim(["cam"], "w")
    said = [b"s%d" % i * 40_000 for i in range(4)]
    for i in range(4):
        store.write([Write("cam", 1, i, b"h%d" % i, b"e", b"t%d" % i, snapshot=said[i] if i != 1 else None)])
    assert store.snapshots("cam") == [said[3], said[2]]
    found = [store.snapshot("cam", back) for back in (1, 2, 3)]
    assert found == [(2, said[3], b"t3"), (2, said[2], b"t2"), (2, b"", b"")]
    assert store.snapshots("unknown") == []
    assert store.snapshot("unknown", 1) == (0, b"", b"")
    client.lpush(store.keys("cam")[2], b"cut")
    assert store.snapshots("cam")[0] == b""


def test_idle_tensors_expire_and_the_header_stays(
    open_store: OpenStore, store_settings: Store, client: redis.Redis
) -> None:
    store = open_store(store_settings.model_copy(update={"idle_ttl_s": 100}))
    store.claim(["cam"], "w")
    store.write([replace(write("cam", 1), snapshot=b"s", approved=b"a")])
    meta, tensors, snapshots, approved = store.keys("cam")
    for key in (tensors, snapshots):
        assert 0 < client.ttl(key) <= 100
        client.expire(key, 10)
    store.write([write("cam", 1, None, number=2)])
    assert all(client.ttl(key) > 10 for key in (tensors, snapshots))
    assert (client.ttl(meta), client.ttl(approved)) == (-1, -1)
    open_store(store_settings).write([write("cam", 1, None, number=3)])
    assert (client.ttl(tensors), client.ttl(snapshots)) == (-1, -1)
    client.delete(tensors)
    assert store.write([Write("cam", 1, 4, b"h4", b"e4", None)]) == [None]
    assert store.read("cam").header == b"header"
    assert store.write([Write("cam", 1, 4, b"h4", b"e4", b"t4")]) == [True]
    assert store.write([Write("cam", 1, 4, b"h4", b"e4", None)]) == [True]


def test_ends_are_headers_and_events_of_all(
    store: StateStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.store.store.KEYS_AT_ONCE", 3)
    streams = [f"cam-{number}" for number in range(40)]
    store.claim(streams, "w")
    store.write([write(stream, 1) for stream in streams[1:]])
    client.set(store.keys("foreign")[0], "theirs")
    nothing = [("cam-0", None, b""), ("foreign", None, b"")]
    assert sorted(set(store.ends())) == sorted([*nothing, *((stream, b"header", b"event") for stream in streams[1:])])


def test_approved_parameters_stay_until_others_are_approved(store: StateStore) -> None:
    store.claim(["cam"], "w")
    store.write([Write("cam", 1, 1, b"h", b"e", b"t", approved=b"a1")])
    store.write([write("cam", 1, number=2)])
    assert store.read("cam").approved == b"a1"
    store.write([Write("cam", 1, 3, b"h", b"e", None, approved=b"a2")])
    assert store.claim(["cam"], "w")[0].approved == b"a2"


@pytest.mark.parametrize("tensors", [b"t", None])
def test_what_rests_on_approved_parameters_is_not_written_without_them(
    store: StateStore, client: redis.Redis, tensors: bytes | None
) -> None:
    store.claim(["cam"], "w")
    resting = Write("cam", 1, 2, b"h2", b"e2", tensors, keeps_approved=True)
    assert store.write([Write("cam", 1, 1, b"h1", b"e1", b"t", approved=b"a"), resting]) == [True, True]
    client.delete(store.keys("cam")[3])
    again = replace(resting, number=3, header=b"h3")
    assert store.write([again, replace(again, token=2)]) == [None, False]
    assert store.read("cam").header == b"h2"
    assert store.write([replace(again, approved=b"a", keeps_approved=False)]) == [True]
    assert (store.read("cam").header, store.read("cam").approved) == (b"h3", b"a")


def test_what_rests_on_a_write_that_the_store_has_lost_is_not_written(store: StateStore, client: redis.Redis) -> None:
    """A store that came back with an older state: later headers do not fit the tensors that it has."""
    store.claim(["cam"], "w")
    whole = Write("cam", 1, 2, b"h2", b"e2", b"t2", approved=b"a", after=0)
    assert store.write([whole]) == [True]
    client.hset(store.keys("cam")[0], "written", 1)
    resting = Write("cam", 1, 3, b"h3", b"e3", None, after=2)
    assert store.write([resting, replace(resting, tensors=b"t3", keeps_approved=True)]) == [None, None]
    assert (store.read("cam").header, store.read("cam").tensors) == (b"h2", b"t2")
    assert store.write([replace(resting, tensors=b"t3")]) == [True]
    assert store.write([replace(resting, number=4, after=3), replace(resting, number=5, after=None)]) == [True, True]
    store.claim(["cam"], "w")  # What is there rests on no write of this claim.
    assert store.write([replace(resting, token=2, after=0)]) == [True]


def test_reading_claims_nothing(store: StateStore) -> None:
    assert store.read("cam").token == 0
    store.claim(["cam"], "w7")
    store.write([write("cam", 1)])
    assert (store.read("cam").token, store.read("cam").tensors) == (1, b"t")
    assert store.overview(["none", "cam"]) == [Overview(0, "", None, 0, 0), Overview(1, "w7", b"header", 1, 0)]
    assert store.write([write("cam", 1)]) == [True]
