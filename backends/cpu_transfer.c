/* KV blocks of one layer between the cache and their stored form. The format is `reference/stored_kv.py`'s, bit for bit.
 *
 * One thread, the caller's: these run beside the computing threads, and OpenMP would keep another pool for the caller.
 *
 * A head's part of a block is a matrix [R, C]: keys are [H, P], values [P, H]. Quantised formats have one scale for a
 * group: a column of keys or a row of values, which is one position either way.
 */
#include "cpu_vectors.h"

enum { F32, BF16, F16, INT8, FP8 }; /* `FORMATS`; the first three are dtypes of a cache as well */
#define EXPONENT 0x7f800000         /* bits from which on an absolute value is inf or NaN */
#define TINY 0x0d800000             /* 2^-100: a group below it is stored as zeros */

typedef uint16_t half_any __attribute__((aligned(1), may_alias));
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

/* ---------------------------------------------------------------- numbers */

/* Nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
    const uint32_t u = (uint32_t)bits(x);
    return (uint16_t)(magnitude(x) > EXPONENT ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE float from_bf16(uint16_t h) { return from_bits((int32_t)((uint32_t)h << 16)); }

INLINE uint16_t to_f16(float x) {
    const int32_t u = magnitude(x), sign = (uint32_t)bits(x) >> 16 & 0x8000;
    const int32_t normal = (u - (112 << 23) + 0xfff + (u >> 13 & 1)) >> 13;
    const int32_t subnormal = bits(from_bits(u) + 0.5f) - bits(0.5f); /* a sum that has 2^-24 as its last bit */
    const int32_t finite = u < 0x38800000 ? subnormal : normal;       /* 2^-14 */
    return (uint16_t)(sign | (u > EXPONENT ? 0x7e00 : u >= 0x47800000 ? 0x7c00 : finite)); /* 2^16 */
}
INLINE float from_f16(uint16_t h) {
    const int32_t u = h & 0x7fff, sign = (int32_t)((uint32_t)(h & 0x8000) << 16);
    const int32_t finite = u < 0x400 ? bits((float)u * 5.9604645e-8f) : (u << 13) + (112 << 23); /* 2^-24 */
    return from_bits(sign | (u < 0x7c00 ? finite : (u << 13) | EXPONENT));
}

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

static void widen(const void *from, int dtype, float *to, int64_t n) {
    const half_any *h = from;
    if (dtype == BF16)
        for (int64_t i = 0; i < n; i++) to[i] = from_bf16(h[i]);
    else if (dtype == F16)
        for (int64_t i = 0; i < n; i++) to[i] = from_f16(h[i]);
    else memcpy(to, from, n * 4);
}

static void narrow(const float *from, void *to, int dtype, int64_t n) {
    half_any *h = to;
    if (dtype == BF16)
        for (int64_t i = 0; i < n; i++) h[i] = to_bf16(from[i]);
    else if (dtype == F16)
        for (int64_t i = 0; i < n; i++) h[i] = to_f16(from[i]);
    else memcpy(to, from, n * 4);
}

/* ---------------------------------------------------------------- groups */

/* The largest magnitude of each group, as bits: so NaN is the largest. */
static void largest_bits(const float *x, int64_t R, int64_t C, int by_row, int32_t *top) {
    if (by_row) {
        for (int64_t r = 0; r < R; r++, x += C) {
            int32_t m = 0;
            for (int64_t c = 0; c < C; c++) m = MAX(m, magnitude(x[c]));
            top[r] = m;
        }
        return;
    }
    memset(top, 0, C * 4);
    for (int64_t r = 0; r < R; r++, x += C)
        for (int64_t c = 0; c < C; c++) top[c] = MAX(top[c], magnitude(x[c]));
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
INLINE float fp8_scale(uint8_t exponent) { return exponent == 255 ? NAN : from_bits(exponent << 23); }

/* divisors: 0 for a group whose codes are all zero. */
static void encode(const float *x, uint8_t *codes, const float *divisors, int64_t R, int64_t C, int by_row, int format) {
    for (int64_t r = 0; r < R; r++, x += C, codes += C) {
        const float *d = by_row ? divisors + r : divisors;
        const int64_t step = !by_row;
        if (format == INT8)
            for (int64_t c = 0; c < C; c++) {
                const float scale = d[c * step], y = rintf(x[c] / (scale == 0.0f ? 1.0f : scale));
                codes[c] = (uint8_t)(int8_t)(int32_t)(scale == 0.0f ? 0.0f : y);
            }
        else
            for (int64_t c = 0; c < C; c++) {
                const float factor = d[c * step];
                codes[c] = to_e4m3(factor == 0.0f ? 0.0f : x[c] * factor);
            }
    }
}

static void decode(const uint8_t *codes, float *x, const float *scales, int64_t R, int64_t C, int by_row, int format) {
    for (int64_t r = 0; r < R; r++, x += C, codes += C) {
        const float *s = by_row ? scales + r : scales;
        const int64_t step = !by_row;
        if (format == INT8)
            for (int64_t c = 0; c < C; c++) x[c] = (float)(int8_t)codes[c] * s[c * step];
        else
            for (int64_t c = 0; c < C; c++) x[c] = from_e4m3(codes[c]) * s[c * step];
    }
}

/* ---------------------------------------------------------------- blocks */

typedef struct {
    char *cache; /* blocks of [K, R, C], cache_stride bytes from one to the next */
    char *stored;
    const int64_t *block_ids, *slots;
    int64_t cache_stride, stored_stride, num_blocks, num_heads, R, C;
    int32_t by_row, dtype, format;
} Transfer;

INLINE int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

static void export_block(const Transfer *t, const char *from, char *to) {
    const int64_t n = t->R * t->C, num_groups = t->by_row ? t->R : t->C, bytes = t->format == INT8 ? 4 : 1;
    float *wide = scratch(0, n + 2 * num_groups), *divisors = wide + n;
    int32_t *top = (int32_t *)(divisors + num_groups);
    uint8_t *codes = (uint8_t *)to, *scales = codes + t->num_heads * n;
    for (int64_t k = 0; k < t->num_heads; k++, from += n * size_of(t->dtype), codes += n, scales += num_groups * bytes) {
        const float *x = (const float *)from;
        if (t->dtype != F32) widen(from, t->dtype, wide, n), x = wide;
        largest_bits(x, t->R, t->C, t->by_row, top);
        for (int64_t g = 0; g < num_groups; g++) {
            if (t->format == INT8) {
                const float scale = int8_scale(top[g]);
                ((float_any *)scales)[g] = scale;
                divisors[g] = top[g] >= EXPONENT ? 0.0f : scale;
            } else {
                scales[g] = fp8_exponent(top[g]);
                divisors[g] = top[g] >= EXPONENT || top[g] < TINY ? 0.0f : from_bits((254 - scales[g]) << 23);
            }
        }
        encode(x, codes, divisors, t->R, t->C, t->by_row, t->format);
    }
}

static void import_block(const Transfer *t, const char *from, char *to) {
    const int64_t n = t->R * t->C, num_groups = t->by_row ? t->R : t->C, bytes = t->format == INT8 ? 4 : 1;
    float *wide = scratch(0, n + num_groups), *s = wide + n;
    const uint8_t *codes = (const uint8_t *)from, *scales = codes + t->num_heads * n;
    for (int64_t k = 0; k < t->num_heads; k++, to += n * size_of(t->dtype), codes += n, scales += num_groups * bytes) {
        for (int64_t g = 0; g < num_groups; g++)
            s[g] = t->format == INT8 ? ((const float_any *)scales)[g] : fp8_scale(scales[g]);
        decode(codes, t->dtype == F32 ? (float *)to : wide, s, t->R, t->C, t->by_row, t->format);
        if (t->dtype != F32) narrow(wide, to, t->dtype, n);
    }
}

/* Between two dtypes of a cache: by way of fp32, in pieces. */
static void convert(const char *from, int from_dtype, char *to, int to_dtype, int64_t n) {
    float wide[1024];
    for (int64_t i = 0; i < n; i += 1024) {
        const int64_t count = MIN(1024, n - i);
        widen(from + i * size_of(from_dtype), from_dtype, wide, count);
        narrow(wide, to + i * size_of(to_dtype), to_dtype, count);
    }
}

EXPORT void xllm_export_blocks(const Transfer *t) {
    const int64_t n = t->num_heads * t->R * t->C;
    for (int64_t b = 0; b < t->num_blocks; b++) {
        const char *from = t->cache + t->block_ids[b] * t->cache_stride;
        char *to = t->stored + t->slots[b] * t->stored_stride;
        if (t->format == t->dtype) memcpy(to, from, n * size_of(t->dtype));
        else if (t->format <= F16) convert(from, t->dtype, to, t->format, n);
        else export_block(t, from, to);
    }
}

EXPORT void xllm_import_blocks(const Transfer *t) {
    const int64_t n = t->num_heads * t->R * t->C;
    for (int64_t b = 0; b < t->num_blocks; b++) {
        const char *from = t->stored + t->slots[b] * t->stored_stride;
        char *to = t->cache + t->block_ids[b] * t->cache_stride;
        if (t->format == t->dtype) memcpy(to, from, n * size_of(t->dtype));
        else if (t->format <= F16) convert(from, t->format, to, t->dtype, n);
        else import_block(t, from, to);
    }
}
