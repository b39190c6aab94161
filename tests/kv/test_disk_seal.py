"""A disk store with a key: whoever may write to its files, and knows the format, gets nothing believed."""

import contextlib
import hashlib
import os
import struct
import zlib

import pytest

from tests.kv.disk_helper import (
    FINGERPRINT,
    GEOMETRY,
    LIFE,
    NUM_SLOTS,
    PAYLOAD_BYTES,
    Life,
    digest_of,
    flip,
    give_away,
    holds,
    listed,
    open_store,
    payload_of,
    segments,
    served,
    write,
)
from xllm.errors import ConfigError
from xllm.kv.disk_format import HEADER_BYTES, HEADER_DTYPE, MAX_SEQUENCE, pack_header
from xllm.kv.disk_seal import HEADER_TAG_BYTES, PAYLOAD_TAG_BYTES, Seal, read_key

KEY = bytes(range(32))
SEAL = Seal(KEY)
OFFSETS = {name: HEADER_DTYPE.fields[name][1] for name in HEADER_DTYPE.names}
CRC_BYTES = HEADER_BYTES - 4


@pytest.fixture
def sealed(tmp_path):
    """A folder whose slot i holds block i under the key."""
    store = open_store(tmp_path, seal=SEAL)
    for slot in range(NUM_SLOTS):
        write(store, slot, slot)
    store.close()
    return tmp_path


def place(folder, slot: int, header: bytes, payload: bytes | None = None) -> None:
    """What somebody writes into a slot behind the store's back."""
    path = segments(folder)[slot // 2]
    with open(path, "r+b") as file:
        file.seek(GEOMETRY.header_offset(slot % 2))
        file.write(header)
        if payload is not None:
            file.seek(GEOMETRY.payload_offset(slot % 2))
            file.write(payload)


def taken(folder, slot: int) -> tuple[bytes, bytes]:
    """(header, payload) as they lie there."""
    content = segments(folder)[slot // 2].read_bytes()
    header, payload = GEOMETRY.header_offset(slot % 2), GEOMETRY.payload_offset(slot % 2)
    return content[header:header + HEADER_BYTES], content[payload:payload + PAYLOAD_BYTES]


def with_crc(header: bytes) -> bytes:
    return header[:CRC_BYTES] + struct.pack("<I", zlib.crc32(header[:CRC_BYTES]) or 1)


def misses_of(folder, seal=SEAL) -> tuple[set[int], dict[str, int], set[int]]:
    """(slots served, misses by kind, slots that a scan lists)"""
    store = open_store(folder, seal=seal)
    found = set(listed(store))
    result = served(store), {kind: count for kind, count in store.counters.misses.items() if count}, found
    store.close()
    return result


def with_the_same_crc(payload: bytes) -> bytes:
    """Other bytes whose CRC-32 is that of `payload`: four bytes are enough to bring it to any value."""
    changed = bytearray(payload)
    changed[:8] = b"another "
    wanted = zlib.crc32(payload)
    table, top = [], {}
    for number in range(256):
        crc = number
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
        table.append(crc)
        top[crc >> 24] = number
    state = wanted ^ 0xFFFFFFFF
    indices = []
    for _ in range(4):  # backwards through the register
        index = top[state >> 24]
        indices.append(index)
        state = (state ^ table[index]) << 8 & 0xFFFFFFFF
    register = zlib.crc32(changed[:-4]) ^ 0xFFFFFFFF
    for place_, index in enumerate(reversed(indices)):
        changed[len(changed) - 4 + place_] = (register ^ index) & 0xFF
        register = register >> 8 ^ table[index]
    assert zlib.crc32(changed) == wanted and bytes(changed) != payload
    return bytes(changed)


# --- what belongs there


def test_a_restart_finds_its_own_blocks(sealed):
    assert misses_of(sealed) == (set(range(NUM_SLOTS)), {}, set(range(NUM_SLOTS)))


def test_a_life_with_a_key_is_as_one_without(tmp_path):
    contents = []
    for name, seal in (("none", None), ("key", SEAL)):
        life = Life(tmp_path / name, seal)
        life.run(LIFE)
        contents.append(listed(life.store))
        assert life.store.counters.misses == dict.fromkeys(life.store.counters.misses, 0)
        life.store.close()
    assert contents[0] == contents[1]


def test_without_a_key_the_bytes_are_what_they_were(filled):
    header, _ = taken(filled, 1)
    crc = zlib.crc32(payload_of(1))
    fields = struct.pack("<8sq16s16s32sQII28x", b"xLLM-KVB", 1, digest_of(1), digest_of(0), FINGERPRINT, PAYLOAD_BYTES,
                         1, crc)
    assert header == fields + struct.pack("<I", zlib.crc32(fields))


def test_tags_are_keyed_blake2b_over_every_field(sealed):
    master = hashlib.blake2b(KEY, person=b"xLLM-KV key").digest()
    key = hashlib.blake2b(b"", key=master, person=b"xLLM-KV store").digest()
    header, payload = taken(sealed, 3)
    tag = hashlib.blake2b(payload, key=key, digest_size=PAYLOAD_TAG_BYTES, person=b"xLLM-KV payload").digest()
    assert header[OFFSETS["payload_tag"]:OFFSETS["tag"]] == tag
    tag = hashlib.blake2b(header[:OFFSETS["tag"]], key=key, digest_size=HEADER_TAG_BYTES, person=b"xLLM-KV header")
    assert header[OFFSETS["tag"]:OFFSETS["crc"]] == tag.digest()


# --- who has not the key


@pytest.mark.parametrize("seal", [Seal(), Seal(bytes(32)), Seal(KEY, b"rank 1 of 2"), Seal(KEY + b"\0")],
                         ids=["none", "zeros", "rank", "longer"])
def test_a_block_that_was_planted(sealed, seal):
    """Format, fingerprint, digest and checksums are all right: only the key is not theirs."""
    evil = payload_of(77)
    place(sealed, 1, pack_header(GEOMETRY, seal, 1, 9, digest_of(1), digest_of(0), memoryview(evil)), evil)
    assert misses_of(sealed) == ({0, 2, 3, 4}, {"foreign": 1}, {0, 2, 3, 4})


def test_every_bit_of_a_header_counts(sealed):
    """Flipped one by one, with the checksum that belongs to what is left."""
    header, _ = taken(sealed, 1)
    with contextlib.closing(open_store(sealed, seal=SEAL)) as store:
        for bit in range(8 * CRC_BYTES):
            changed = bytearray(header)
            changed[bit // 8] ^= 1 << bit % 8
            place(sealed, 1, with_crc(bytes(changed)))
            before = dict(store.counters.misses)
            assert not holds(store, 1, 1), bit
            kind = "corrupt" if bit < 64 else "foreign"  # without its magic it is no header
            assert store.counters.misses == {**before, kind: before[kind] + 1}, bit
            assert set(listed(store)) == {0, 2, 3, 4}, bit
        place(sealed, 1, header)
        assert holds(store, 1, 1)


@pytest.mark.parametrize("offset", [0, 1, 2999, PAYLOAD_BYTES - 1])
def test_a_flipped_payload_is_corrupt(sealed, offset):
    flip(segments(sealed)[0], GEOMETRY.payload_offset(1) + offset)
    assert misses_of(sealed)[:2] == ({0, 2, 3, 4}, {"corrupt": 1})


def test_a_payload_that_fits_the_checksum_is_forged(sealed):
    header, payload = taken(sealed, 1)
    place(sealed, 1, header, with_the_same_crc(payload))
    assert misses_of(sealed)[:2] == ({0, 2, 3, 4}, {"forged": 1})


def test_a_payload_with_its_new_checksum_in_the_header(sealed):
    header, _ = taken(sealed, 1)
    evil = payload_of(77)
    at = OFFSETS["payload_crc"]
    place(sealed, 1, with_crc(header[:at] + struct.pack("<I", zlib.crc32(evil)) + header[at + 4:]), evil)
    assert misses_of(sealed)[:2] == ({0, 2, 3, 4}, {"foreign": 1})


# --- blocks of the store itself, elsewhere


def test_a_block_in_another_slot(sealed):
    for source, target in ((0, 1), (4, 3)):
        place(sealed, target, *taken(sealed, source))
    assert misses_of(sealed) == ({0, 2, 4}, {"foreign": 2}, {0, 2, 4})


@pytest.mark.parametrize(("field", "value"), [
    ("slot", struct.pack("<I", 1)), ("digest", digest_of(1)), ("parent", digest_of(0)),
    ("sequence", struct.pack("<q", 99)), ("fingerprint", bytes(32)), ("payload_bytes", struct.pack("<Q", 1)),
])
def test_a_block_that_is_relabelled(sealed, field, value):
    header, payload = taken(sealed, 0)
    for name, bytes_ in {"slot": struct.pack("<I", 1), field: value}.items():
        header = header[:OFFSETS[name]] + bytes_ + header[OFFSETS[name] + len(bytes_):]
    place(sealed, 1, with_crc(header), payload)
    assert misses_of(sealed)[:2] == ({0, 2, 3, 4}, {"foreign": 1})


def test_halves_of_two_blocks(sealed):
    """A header that is good and a payload that is good, which do not belong together."""
    place(sealed, 1, taken(sealed, 1)[0], taken(sealed, 0)[1])
    assert misses_of(sealed)[:2] == ({0, 2, 3, 4}, {"corrupt": 1})


def test_an_old_block_of_the_slot(sealed):
    """It comes back whole, where it was: it serves its own digest and no other."""
    old = taken(sealed, 1)
    store = open_store(sealed, seal=SEAL)
    write(store, 1, 11)
    place(sealed, 1, *old)
    assert not holds(store, 1, 11) and store.counters.misses["wrong_digest"] == 1
    assert holds(store, 1, 1)
    store.close()


def test_a_block_of_another_rank(tmp_path):
    """Ranks share digests, slots, fingerprint and key file, and hold other bytes."""
    folders = [tmp_path / str(rank) for rank in range(2)]
    for rank, folder in enumerate(folders):
        store = open_store(folder, seal=Seal(KEY, b"rank %d of 2" % rank))
        for slot in range(2):
            write(store, slot, slot)
        store.close()
    place(folders[1], 0, *taken(folders[0], 0))
    assert misses_of(folders[1], Seal(KEY, b"rank 1 of 2"))[:2] == ({1}, {"foreign": 1, "torn": 3})


# --- keys that change


@pytest.mark.parametrize(("before", "after"), [(None, SEAL), (SEAL, None), (SEAL, Seal(bytes(range(1, 33))))],
                         ids=["a-key", "no-key", "another-key"])
def test_a_store_of_another_key_is_foreign_and_its_slots_are_used(tmp_path, before, after):
    store = open_store(tmp_path, seal=before)
    for slot in range(NUM_SLOTS):
        write(store, slot, slot)
    store.close()
    store = open_store(tmp_path, seal=after)
    entries = store.scan()
    assert len(entries) == 0 and entries.num_foreign == NUM_SLOTS
    assert served(store) == set() and store.counters.misses["foreign"] == NUM_SLOTS
    write(store, 2, 30)
    assert holds(store, 2, 30) and listed(store) == {2: digest_of(30)}
    store.close()
    assert len(segments(tmp_path)) == 3, "no file more than before"
    assert misses_of(tmp_path, before) == ({0, 1, 3, 4}, {"foreign": 1}, {0, 1, 3, 4})


@pytest.mark.parametrize("sequence", [-1, MAX_SEQUENCE, 2**63 - 1])
def test_a_sequence_number_that_leaves_none_after_it(filled, sequence):
    """Whoever plants it, where no key forbids it, must not stop the store from writing."""
    payload = payload_of(1)
    place(filled, 1, pack_header(GEOMETRY, Seal(), 1, sequence, digest_of(1), digest_of(0), memoryview(payload)))
    store = open_store(filled)
    assert set(listed(store)) == {0, 2, 3, 4}
    write(store, 1, 1)
    assert served(store) == set(range(NUM_SLOTS))
    store.close()


# --- the key's file


def test_a_key_is_every_byte_of_its_file(tmp_path):
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(KEY + b"\n")
    assert read_key(path) == KEY + b"\n"
    path.chmod(0o400)
    assert read_key(path) == KEY + b"\n"
    link = tmp_path / "link"
    link.symlink_to(path)  # as secrets are mounted
    assert read_key(link) == KEY + b"\n"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o660, 0o644, 0o666, 0o601])
def test_a_key_that_others_can_reach(tmp_path, mode):
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"disk_cache_key_file {path} has mode {mode:04o}.*chmod 600 {path}"):
        read_key(path)


@pytest.mark.parametrize(("make", "says"), [
    (lambda path: path.write_bytes(KEY[:31]), "has 31 bytes.*at least 32"),
    (lambda path: path.write_bytes(b""), "has 0 bytes"),
    (lambda path: path.write_bytes(bytes(4097)), "longer than 4096"),
    (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    (lambda path: os.mkfifo(path), "no regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    (lambda path: None, "cannot be read: No such file"),
])
def test_what_is_no_key(tmp_path, make, says):
    path = tmp_path / "key"
    make(path)
    if path.is_file():
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=says):
        read_key(path)


def test_a_key_of_somebody_else(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    user = give_away(path, monkeypatch)
    with pytest.raises(ConfigError, match=f"belongs to user {user}"):
        read_key(path)
