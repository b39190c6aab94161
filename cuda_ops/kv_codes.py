"""KV numbers of one byte, in kernels: `backends/reference/kv_codes.py` says what they are, bit for bit.

fp8 is made and read in integers, since not every device converts it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cuda_ops.launch import INTERPRETED

BY_FOUR = tl.constexpr(not INTERPRETED)  # an interpreted kernel has no assembly

# `widen` in PTX, for two of four codes in $2: half the instructions that the compiler makes of it. x has the codes in
# the high or low bytes of its halves. e4m3 becomes what `widen_e4m3` multiplies. int8 is put into the low bits of 1024
# in fp16; in bf16, which has too few, its sign goes into those of -128, the others into those of 128, and the sum is
# the number. All multiply and add at once, which devices before 9.0 can do in bf16 as well; to add -0 does nothing.
E4M3_TO_BF16 = """prmt.b32 x, $2, 0, {high}; shr.u32 y, x, 4; and.b32 y, y, 0x07F007F0;
lop3.b32 y, y, x, 0x80008000, 0xF8; fma.rn.bf16x2 {out}, y, t, u;
"""
E4M3_TO_FP16 = """prmt.b32 x, $2, 0, {high}; and.b32 y, x, 0x7F007F00; shr.u32 y, y, 1;
lop3.b32 y, y, x, 0x80008000, 0xF8; fma.rn.f16x2 {out}, y, t, u;
"""
INT8_TO_BF16 = """prmt.b32 x, $2, 0, {low}; lop3.b32 y, x, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 x, x, 0x00800080, 0xC300C300, 0xEA; fma.rn.bf16x2 {out}, y, t, x;
"""
INT8_TO_FP16 = """xor.b32 x, $2, 0x80808080; prmt.b32 x, x, 0x64646464, {low}; fma.rn.f16x2 {out}, x, t, u;
"""


def _four(pair: str, factor: int, addend: int = 0x80008000) -> tl.constexpr:
    halves = pair.format(out="$0", low="0x4140", high="0x1404"), pair.format(out="$1", low="0x4342", high="0x3424")
    constants = f".reg .b32 x, y, t, u; mov.b32 t, {factor:#x}; mov.b32 u, {addend:#x};"
    return tl.constexpr("\n".join(("{", constants, *halves, "}")))


WIDEN_E4M3_BF16 = _four(E4M3_TO_BF16, 0x7B807B80)  # 2^120
WIDEN_E4M3_FP16 = _four(E4M3_TO_FP16, 0x5C005C00)  # 2^8
WIDEN_INT8_BF16 = _four(INT8_TO_BF16, 0x3F803F80)  # 1
WIDEN_INT8_FP16 = _four(INT8_TO_FP16, 0x3C003C00, 0xE480E480)  # 1, and -1024 - 128


@triton.jit
def to_e4m3(y):
    """float8_e4m3fn codes, uint8, of |y| <= 464, rounded to nearest even."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the codes are multiples of 2^-9, which is what a number next to 2^14 is rounded to.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(codes):
    """fp32 of codes in int32, NaN among them."""
    size = codes & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    y = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    y = tl.where(size == 0x7F, float("nan"), y)
    return tl.where(codes < 128, y, -y)


@triton.jit
def widen_e4m3(codes, dtype: tl.constexpr):
    """int8 bits of e4m3 as numbers of a wider dtype, exactly; NaN has no code here.

    Its bits, put where the wider dtype has its own, have an exponent that is too small by the difference of the biases.
    """
    if dtype == tl.float32:
        return ((codes.to(tl.int32) << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif dtype == tl.bfloat16:
        small = ((codes.to(tl.int16) << 4) & -0x7810).to(tl.bfloat16, bitcast=True)
        return small * tl.full(small.shape, 1.329227995784916e36, tl.bfloat16)
    else:
        small = ((codes.to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True)
        return small * tl.full(small.shape, 256.0, tl.float16)


@triton.jit
def widen(codes, dtype: tl.constexpr, FP8: tl.constexpr, MOVABLE: tl.constexpr):
    """Codes, as int8, in a dtype that holds them exactly.

    MOVABLE: the compiler may do it as late as for each warp that multiplies them, where it loads some codes singly.
    """
    if BY_FOUR and dtype == tl.bfloat16:
        to_bf16: tl.constexpr = WIDEN_E4M3_BF16 if FP8 else WIDEN_INT8_BF16
        return tl.inline_asm_elementwise(to_bf16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=MOVABLE, pack=4)
    elif BY_FOUR and dtype == tl.float16:
        to_fp16: tl.constexpr = WIDEN_E4M3_FP16 if FP8 else WIDEN_INT8_FP16
        return tl.inline_asm_elementwise(to_fp16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=MOVABLE, pack=4)
    elif FP8:
        return widen_e4m3(codes, dtype)
    else:
        return codes.to(dtype)


@triton.jit
def size_bits(x):
    """The bits of fp32 numbers without their signs: in the order of the sizes, NaN and inf the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def group_scale(largest, FP8: tl.constexpr):
    """From the `size_bits` of a group's largest number: (its scale as it is kept, as a number, whether it has codes).

    A group without has codes of 0, and 1 for the second.
    """
    finite, empty = largest < 0x7F800000, largest < 0x0D800000  # 2^-100
    if FP8:
        exponent = tl.where(empty, 0, ((largest + 0x17FFFF) >> 23) - 8)
        kept = tl.where(finite, exponent, 255).to(tl.uint8)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    else:
        numbers = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
        bits = tl.div_rn(numbers, tl.full(numbers.shape, 127.0, tl.float32)).to(tl.int32, bitcast=True)
        bits = tl.where(empty, 0, (bits + 0xFF) & ~0xFF)  # up to 16 significant bits
        kept = tl.where(finite, bits, 0x7FC00000).to(tl.float32, bitcast=True)
        scale = bits.to(tl.float32, bitcast=True)
    usable = finite & (empty == 0)
    return kept, tl.where(usable, scale, 1.0), usable


@triton.jit
def encode(x, scale, usable, FP8: tl.constexpr):
    """uint8 codes of fp32 numbers in groups of these scales, which broadcast along them."""
    if FP8:
        inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # of a power of two
        return to_e4m3(tl.where(usable, x * inverse, 0.0))
    else:
        y = tl.where(usable, tl.div_rn(x, tl.broadcast_to(scale, x.shape)), 0.0)
        # Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
        return ((y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.uint8)
