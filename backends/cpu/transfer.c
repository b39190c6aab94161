/* KV blocks of one layer between the cache and their stored form. The format is `reference/stored_kv.py`'s, bit for bit.
 *
 * One thread, the caller's: these run beside the computing threads.
 *
 * A head's part of a block is a matrix [R, C]: keys are [H, P], values [P, H]. Quantised formats have one scale for a
 * group: a column of keys or a row of values, which is one position either way. A block of a quantised cache is stored
 * as it is: only how many bytes it has counts.
 */
#include "kv_codes.h"

typedef uint16_t half_any __attribute__((aligned(1), may_alias));

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

/* The largest magnitude of each group, as bits. */
static void largest_of_groups(const float *x, int64_t R, int64_t C, int by_row, int32_t *top) {
    if (by_row) {
        for (int64_t r = 0; r < R; r++) top[r] = largest_bits(x + r * C, C);
        return;
    }
    memset(top, 0, C * 4);
    for (int64_t r = 0; r < R; r++, x += C)
        for (int64_t c = 0; c < C; c++) top[c] = MAX(top[c], magnitude(x[c]));
}

static void encode_matrix(const float *x, uint8_t *codes, const float *divisors, int64_t R, int64_t C, int by_row,
                          int format) {
    for (int64_t r = 0; r < R; r++, x += C, codes += C) {
        const float *d = by_row ? divisors + r : divisors;
        const int64_t step = !by_row;
        if (format == INT8)
            for (int64_t c = 0; c < C; c++) codes[c] = encode(x[c], d[c * step], INT8);
        else
            for (int64_t c = 0; c < C; c++) codes[c] = encode(x[c], d[c * step], FP8);
    }
}

static void decode_matrix(const uint8_t *codes, float *x, const float *scales, int64_t R, int64_t C, int by_row,
                          int format) {
    for (int64_t r = 0; r < R; r++, x += C, codes += C) {
        const float *s = by_row ? scales + r : scales;
        const int64_t step = !by_row;
        if (format == INT8)
            for (int64_t c = 0; c < C; c++) x[c] = decode(codes[c], INT8) * s[c * step];
        else
            for (int64_t c = 0; c < C; c++) x[c] = decode(codes[c], FP8) * s[c * step];
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

INLINE int64_t size_of(int dtype) { return dtype == F32 ? 4 : dtype <= F16 ? 2 : 1; }

static void export_block(const Transfer *t, const char *from, char *to) {
    const int64_t n = t->R * t->C, num_groups = t->by_row ? t->R : t->C, bytes = scale_bytes(t->format);
    float *wide = scratch(0, n + 2 * num_groups), *divisors = wide + n;
    int32_t *top = (int32_t *)(divisors + num_groups);
    uint8_t *codes = (uint8_t *)to, *scales = codes + t->num_heads * n;
    for (int64_t k = 0; k < t->num_heads; k++, from += n * size_of(t->dtype), codes += n, scales += num_groups * bytes) {
        const float *x = (const float *)from;
        if (t->dtype != F32) widen(from, t->dtype, wide, n), x = wide;
        largest_of_groups(x, t->R, t->C, t->by_row, top);
        for (int64_t g = 0; g < num_groups; g++) divisors[g] = put_scale(scales, g, top[g], t->format);
        encode_matrix(x, codes, divisors, t->R, t->C, t->by_row, t->format);
    }
}

static void import_block(const Transfer *t, const char *from, char *to) {
    const int64_t n = t->R * t->C, num_groups = t->by_row ? t->R : t->C, bytes = scale_bytes(t->format);
    float *wide = scratch(0, n + num_groups), *s = wide + n;
    const uint8_t *codes = (const uint8_t *)from, *scales = codes + t->num_heads * n;
    for (int64_t k = 0; k < t->num_heads; k++, to += n * size_of(t->dtype), codes += n, scales += num_groups * bytes) {
        for (int64_t g = 0; g < num_groups; g++) s[g] = get_scale(scales, g, t->format);
        decode_matrix(codes, t->dtype == F32 ? (float *)to : wide, s, t->R, t->C, t->by_row, t->format);
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
