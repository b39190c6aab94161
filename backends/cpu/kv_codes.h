/* Numbers of one byte with a scale for each group: the maths of `reference/kv_codes.py`, bit for bit. */
#pragma once
#include "vectors.h"

enum { F32, BF16, F16, INT8, FP8 }; /* `FORMATS`: of stored blocks, and of a cache */
#define EXPONENT 0x7f800000         /* bits from which on an absolute value is inf or NaN */
#define TINY 0x0d800000             /* 2^-100: a group below it is kept as zeros */

typedef float float_any __attribute__((aligned(1), may_alias));

INLINE int32_t bits(float x) {
    int32_t i;
    memcpy(&i, &x, 4);
    return i;
}
INLINE float from_bits(int32_t i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}
INLINE int32_t magnitude(float x) { return bits(x) & 0x7fffffff; }

/* ---------------------------------------------------------------- a group's scale */

INLINE int64_t scale_bytes(int format) { return format == INT8 ? 4 : 1; }

/* The largest magnitude of n numbers, as bits: so NaN is the largest. */
INLINE int32_t largest_bits(const float *x, int64_t n) {
    int32_t top = 0;
    for (int64_t i = 0; i < n; i++) top = MAX(top, magnitude(x[i]));
    return top;
}

/* 16 significant bits, rounded up: a code times its scale is exact, and the block's own copy finds the same scale. */
INLINE float int8_scale(int32_t top) {
    if (top >= EXPONENT) return NAN;
    return top < TINY ? 0.0f : from_bits((bits(from_bits(top) / 127.0f) + 0xff) & ~0xff);
}

/* E8M0 (OCP microscaling formats, 2023), such that the largest number comes to lie in (232, 464]. */
INLINE uint8_t fp8_exponent(int32_t top) {
    if (top >= EXPONENT) return 255;
    return top < TINY ? 0 : (uint8_t)((top >> 23) - 8 + ((top & 0x7fffff) > 0x680000));
}

/* Store the scale of group g, whose largest magnitude is `top`; returns what `encode` takes for its numbers. */
INLINE float put_scale(uint8_t *scales, int64_t g, int32_t top, int format) {
    const int zeros = top >= EXPONENT || top < TINY;
    if (format == INT8) {
        const float scale = int8_scale(top);
        ((float_any *)scales)[g] = scale;
        return zeros ? 0.0f : scale;
    }
    scales[g] = fp8_exponent(top);
    return zeros ? 0.0f : from_bits((254 - scales[g]) << 23);
}

INLINE float get_scale(const uint8_t *scales, int64_t g, int format) {
    if (format == INT8) return ((const float_any *)scales)[g];
    return scales[g] == 255 ? NAN : from_bits(scales[g] << 23);
}

/* ---------------------------------------------------------------- codes */

/* |x| <= 464 to float8_e4m3fn, nearest, ties to even. */
INLINE uint8_t to_e4m3(float x) {
    const int32_t u = magnitude(x), sign = (uint32_t)bits(x) >> 24 & 0x80;
    const int32_t normal = ((u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120 << 3);
    const int32_t subnormal = bits(from_bits(u) + 16384.0f) - bits(16384.0f); /* last bit 2^-9 */
    return (uint8_t)(sign | (u < 0x3c800000 ? subnormal : normal));           /* 2^-6 */
}
INLINE float from_e4m3(uint8_t code) {
    const int32_t u = code & 0x7f, sign = (int32_t)((uint32_t)(code & 0x80) << 24);
    const int32_t finite = u < 8 ? bits((float)u * 0.001953125f) : (u << 20) + (120 << 23);
    return from_bits(sign | (u == 0x7f ? 0x7fc00000 : finite));
}

/* `divisor` is from `put_scale`: int8's scale, the inverse of fp8's, or 0 for a group whose codes are all zero. */
INLINE uint8_t encode(float x, float divisor, int format) {
    if (format == FP8) return to_e4m3(divisor == 0.0f ? 0.0f : x * divisor);
    const float y = rintf(x / (divisor == 0.0f ? 1.0f : divisor));
    return (uint8_t)(int8_t)(int32_t)(divisor == 0.0f ? 0.0f : y);
}
INLINE float decode(uint8_t code, int format) { return format == INT8 ? (float)(int8_t)code : from_e4m3(code); }
