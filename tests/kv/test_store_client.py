"""`KVStoreClient`: blocks of bytes by the tokens that they belong to, without an engine and without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from xllm import KVStoreClient
from xllm.errors import ConfigError

BLOCK_BYTES = 96
TOKENS = list(range(100, 119))  # four blocks of four, and three tokens more
BLOCKS = [bytes([number]) * BLOCK_BYTES for number in range(4)]


def client(folder, namespace="model a", **settings) -> KVStoreClient:
    return KVStoreClient(folder, namespace, **{"block_size": 4, "block_bytes": BLOCK_BYTES, "size": "1MiB",
                                               "refresh_s": 0.0, **settings})


def test_what_one_puts_another_gets(tmp_path):
    with client(tmp_path) as writer, client(tmp_path, size="0") as reader:
        assert reader.match(TOKENS) == 0 and reader.get(TOKENS) == [None] * 4
        assert writer.put(TOKENS, BLOCKS) == 4 and writer.put(TOKENS, BLOCKS) == 0
        assert reader.match(TOKENS) == writer.match(np.array(TOKENS)) == 4 and reader.get(TOKENS) == BLOCKS
        assert reader.match([*TOKENS[:9], 1, *TOKENS[10:]]) == 2 and reader.match([1, *TOKENS]) == 0
        assert reader.match([]) == 0 and reader.get(TOKENS[:3]) == []
        assert reader.counters.num_reads == 4 and writer.counters.written_bytes == 4 * BLOCK_BYTES
        with pytest.raises(ValueError, match="only reads"):
            reader.put(TOKENS, BLOCKS)


def test_pieces_and_buffers(tmp_path):
    with client(tmp_path) as store:
        array = np.arange(2 * BLOCK_BYTES // 4, dtype=np.int32).reshape(2, -1)
        store.put(TOKENS, [array[0], memoryview(array[1])], first_block=1)
        assert store.match(TOKENS) == 0 and store.get(TOKENS)[1] == array[0].tobytes()
        store.put(TOKENS[:4], [bytearray(BLOCK_BYTES)])
        assert store.match(TOKENS) == 3
        out = np.zeros((3, BLOCK_BYTES // 4), dtype=np.int32)
        assert store.get_into(TOKENS, list(out), first_block=1) == 2
        assert np.array_equal(out[:2], array)
        assert store.get_into(TOKENS, [bytearray(BLOCK_BYTES)]) == 1 == store.get_into(TOKENS, list(out[:1]))


def test_nobody_finds_what_is_not_his(tmp_path):
    with client(tmp_path) as store:
        store.put(TOKENS, BLOCKS, cache_salt="tenant")
        assert store.match(TOKENS) == 0 and store.match(TOKENS, cache_salt="tenant") == 4
        assert store.get(TOKENS, cache_salt="other") == [None] * 4
    for settings in ({"namespace": "model b"}, {"namespace": {"model": "a"}}, {"block_size": 2}, {"block_bytes": 48}):
        with client(tmp_path, **settings) as other:
            assert other.match(TOKENS, cache_salt="tenant") == 0
    with client(tmp_path, {"rank": 1, "model": "a"}) as one, client(tmp_path, {"model": "a", "rank": 1}) as same:
        one.put(TOKENS, BLOCKS)
        assert same.match(TOKENS) == 4  # whatever the order of its names


def test_a_key_file(tmp_path):
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    with client(tmp_path / "kv", key_file=key) as store, client(tmp_path / "kv") as other:
        store.put(TOKENS, BLOCKS)
        assert store.match(TOKENS) == 4 and other.match(TOKENS) == 0
    key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"key_file .*chmod 600"):
        client(tmp_path / "kv", key_file=key)


@pytest.mark.parametrize(("settings", "message"), [
    ({"namespace": ""}, "namespace must say"), ({"namespace": {"a": object()}}, "JSON"),
    ({"block_size": 0}, "block_size"), ({"size": "25%"}, "not a share"),
    ({"size": "many"}, "size"), ({"size": "100"}, "holds no block"),
])
def test_settings_that_cannot_be_right(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        client(tmp_path, **settings)


@pytest.mark.parametrize(("tokens", "blocks", "first", "message"), [
    (TOKENS, BLOCKS, 1, "4 blocks from number 1 on, and the 19 tokens fill 4 blocks"),
    (TOKENS, [b"short"], 0, "block 0 has 5 bytes; the blocks of this store have 96"),
    (TOKENS, [np.zeros((BLOCK_BYTES, 2), np.uint8)[:, 0]], 0, "not contiguous"),
    (TOKENS, BLOCKS[:1], -1, "from number -1"), ([1.5] * 4, BLOCKS[:1], 0, "integers"),
    ([-1] * 4, BLOCKS[:1], 0, "must be in"), ([2**31] * 4, BLOCKS[:1], 0, "must be in"),
    ([[1, 2, 3, 4]], BLOCKS[:1], 0, "a sequence"),
])
def test_arguments_that_do_not_fit(tmp_path, tokens, blocks, first, message):
    with client(tmp_path) as store, pytest.raises(ValueError, match=message):
        store.put(tokens, blocks, first_block=first)


def test_it_needs_no_torch(tmp_path):
    code = ("import sys; from xllm import KVStoreClient\n"
            "with KVStoreClient(sys.argv[1], 'm', block_size=1, block_bytes=2, size='1MiB') as store:\n"
            "    store.put([1, 2], [b'ab', b'cd'])\n"
            "assert KVStoreClient(sys.argv[1], 'm', block_size=1, block_bytes=2).get([1, 2]) == [b'ab', b'cd']\n"
            "assert not {'torch', 'zmq', 'msgspec', 'httpx'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
