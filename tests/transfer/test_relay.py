"""`Relay` against a slow model that knows each number by its layer, field, head and position."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.transfer.layouts import Engine, Layers, by_layer, layouts, places, stored
from xllm.errors import TransferError
from xllm.kv_layout import FieldLayout, KVLayout
from xllm.transfer.relay import LaidPiece, Relay

CPU, CUDA, NPU = ("KHP", "KPH"), ("KPH", "KPH"), ("PKH", "PKH")
BLOCK_SIZES = [(4, 4), (2, 8), (8, 2), (1, 4), (4, 1), (4, 8), (8, 4)]
MODELS = [
    (Layers(2, 4, (3, 3)),),
    (Layers(1, 1, (2, 2)), Layers(2, 8, (1, 3))),  # as models whose layers differ in their heads
    (Layers(2, 2, (5, 5)), Layers(1, 4, (2, 2))),
    (Layers(2, 1, (7,)),),  # latents
]
FORMATS = ["fp32", "bf16", "int8", "fp8"]


@st.composite
def ends(draw: st.DrawFn) -> tuple[Engine, Engine, str]:
    """Two engines, and the number format of the second."""
    format, sizes = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(BLOCK_SIZES))
    engines = []
    for block_size in sizes:
        has_tiles = format in ("int8", "fp8") and draw(st.booleans())
        orders = draw(st.sampled_from([CPU, CUDA] if has_tiles else [CPU, CUDA, NPU]))
        engines.append(Engine(block_size, draw(st.sampled_from([1, 2, 4])), orders, has_tiles))
    return engines[0], engines[1], format


@settings(max_examples=120)
@given(ends(), st.sampled_from(MODELS), st.integers(0, 5), st.integers(1, 6), st.data())
@example((Engine(2, 4, CPU), Engine(4, 1, CPU), "fp32"), MODELS[1], 1, 4, None)  # shares differ by layer
def test_every_byte_comes_once_and_is_right(engines, model, first, num_blocks, data):
    source, target, format = engines
    given_blocks = range(first, first + num_blocks)
    cut = 1 if data is None else data.draw(st.integers(0, num_blocks), label="blocks of the first call")
    p, q = source.block_size, target.block_size
    touched = range(first * p // q, -(-(first + num_blocks) * p // q))
    senders = [(layout, by_layer(layout, stored(layout, given_blocks))) for layout in layouts(source, model, format)]
    for theirs in layouts(target, model, format):
        num_peers = 0
        landed = np.zeros((len(touched), stored(theirs, range(1)).shape[1]), dtype=np.uint8)
        times = np.zeros(landed.shape, dtype=np.int64)
        for mine, layers in senders:
            relay = Relay(mine, theirs)
            assert relay.block_bytes == landed.shape[1]
            sent = [relay.pieces(layer, first + low, layer_BX[low:high]) if relay.shares else []
                    for layer, layer_BX in enumerate(layers) for low, high in ((0, cut), (cut, num_blocks))]
            assert relay.shares == any(sent), "a rank that shares sends something"
            num_peers += relay.shares
            for pieces in sent:
                assert_apart(pieces)
                for piece in pieces:
                    at = piece.block - touched.start, slice(piece.offset, piece.offset + len(piece.data))
                    landed[at] = piece.data
                    times[at] += 1
        assert {Relay(mine, theirs).num_peers for mine, _ in senders} == {num_peers}
        assert_whole(theirs, landed, times, touched, range(first * p, (first + num_blocks) * p))


def assert_apart(pieces: list[LaidPiece]) -> None:
    """What lies side by side in a block is one piece."""
    for one, other in pairwise(sorted((piece.block, piece.offset, len(piece.data)) for piece in pieces)):
        assert one[0] != other[0] or one[1] + one[2] < other[1]


def assert_whole(layout: KVLayout, landed: np.ndarray, times: np.ndarray, blocks: range, positions: range) -> None:
    """The bytes of these positions came once and are right, and no others came."""
    right, due = stored(layout, blocks), np.zeros(times.shape, dtype=np.int64)
    for row, block in zip(due, blocks, strict=True):
        for (_, _, _, position, _), offset, size in places(layout, block):
            row[offset : offset + size] = position in positions
    np.testing.assert_array_equal(times, due)
    np.testing.assert_array_equal(landed, np.where(due, right, 0))


def one_layout(**changes) -> KVLayout:
    engine = Engine(changes.pop("block_size", 4), changes.pop("num_ranks", 1), CUDA)
    layers = Layers(changes.pop("num_layers", 2), changes.pop("num_heads", 4), changes.pop("widths", (3, 3)))
    return layouts(engine, (layers,), changes.pop("format", "fp32"), **changes)[0]


@pytest.mark.parametrize(("changes", "said"), [
    ({"block_size": 6}, "KV blocks of 4 tokens here and 6 there do not divide"),
    ({"num_layers": 3}, "the model has 2 layers here and 3 there"),
    ({"num_heads": 8}, "layer 0 has other heads, widths or numbers here than there"),
    ({"widths": (3, 4)}, "layer 0 has other heads, widths or numbers here than there"),
    ({"widths": (6,)}, "layer 0 has other heads, widths or numbers here than there"),
    ({"format": "bf16"}, "KV is stored there as bf16.1, and is sent as fp32.1"),
], ids=str)
def test_what_does_not_fit_is_named(changes, said):
    with pytest.raises(TransferError, match=said):
        Relay(one_layout(), one_layout(**changes))


@pytest.mark.parametrize("changes", [
    {"offset": -1}, {"offset": 10**6}, {"head_stride": 10**6}, {"head_stride": -4}, {"position_stride": 10**12},
    {"number_stride": -1}, {"num_heads": 0}, {"num_heads": 5}, {"first_head": -1}, {"first_head": 1},
], ids=str)
def test_fields_that_lie_outside_their_layer_are_refused(changes):
    """A layout comes from another machine: nothing may be read or written by it that is not there."""
    good = one_layout()
    (run,) = good.runs
    bad = replace(good, runs=(replace(run, fields=(replace(run.fields[0], **changes), *run.fields[1:])),))
    for source, target in ((good, bad), (bad, good)):
        with pytest.raises(TransferError, match=r"of layer 0 .* (lies outside|has no such heads)"):
            Relay(source, target)


@pytest.mark.parametrize("change", [{"layer_bytes": 10**15}, {"num_layers": -2}, {"num_layers": 10**15},
                                    {"fields": ()}],
                         ids=str)
def test_layers_that_make_no_sense_are_refused(change):
    good = one_layout()
    bad = replace(good, runs=(replace(good.runs[0], **change),))
    for source, target in ((good, bad), (bad, good)):
        with pytest.raises(TransferError):
            Relay(source, target)


@pytest.mark.parametrize("changes", [{"block_size": 0}, {"block_size": -4}, {"num_ranks": 0}, {"rank": 1},
                                     {"rank": -1}, {"runs": ()}], ids=str)
def test_layouts_that_make_no_sense_are_refused(changes):
    good = one_layout()
    for source, target in ((good, replace(good, **changes)), (replace(good, **changes), good)):
        with pytest.raises(TransferError):
            Relay(source, target)


def test_no_blocks_are_no_pieces():
    for block_size in (4, 2, 8):
        relay = Relay(one_layout(), one_layout(block_size=block_size))
        assert relay.pieces(0, 3, np.zeros((0, one_layout().runs[0].layer_bytes), dtype=np.uint8)) == []


def test_a_field_of_no_numbers_is_refused():
    empty = FieldLayout(offset=0, head_stride=0, position_stride=0, number_stride=0, width=0, item_bytes=4,
                        num_heads=1, total_heads=1)
    layout = one_layout()
    layout = replace(layout, runs=(replace(layout.runs[0], fields=(empty,)),))
    with pytest.raises(TransferError):
        Relay(layout, layout)
