/* Causal attention over KV blocks, which a table names or which follow each other from a base on.
 *
 * Work is cut into units: a tile of adjacent queries of one sequence, for one kv head, so that a key is read once for
 * all query heads and tokens of the tile. A tile of few rows with a long context (decode) is cut along the context too,
 * always at multiples of SPLIT, and its parts are merged. Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
 *
 * A quantised cache is multiplied code by code, each widened where it is used; scales of keys then go into the scores,
 * those of values into the weights: one number a position instead of H. Where vectors do not fit, blocks are widened
 * beforehand. Codes of fp8 count FP8_UNIT times too little: the queries and the results make up for it.
 */
#include "kv_codes.h"
#include "pool.h"

#define ROWS 64   /* query rows (tokens * G) of a tile */
#define FEW 16    /* rows up to which the context is cut */
#define SPLIT 512 /* positions per part */
#define CHUNK 64  /* positions per pass of the online softmax */
#define SHORT 4096 /* bytes of a block's head: fewer are over before the processor itself reads ahead */
#define AHEAD 2    /* blocks that are then asked for in advance */
#define MAX_BLOCKS CHUNK
#define TINY_WORK 2048
#define LOWEST -1e30f

typedef struct {
    int32_t seq, first_query, num_queries, part, num_parts, partial;
    int64_t cost; /* query-position pairs */
} Unit;

typedef struct {
    const int32_t *query_start, *seq_lens, *block_table, *kv_base; /* kv_base: NULL, or instead of the table */
    int64_t table_stride, num_seqs, block_size, num_heads, num_kv_heads, head_dim;
    Unit *units;
    int64_t num_units, num_partials, cost;
    float *partials; /* [num_partials, K, FEW, H + 2]: weighted values, then the largest score and the sum */
} Step;

/* The caches of one layer, and the bytes from one block to the next. */
typedef struct {
    const char *keys, *values;
    int64_t k_stride, v_stride;
    int32_t format;
} Cache;

INLINE int64_t item_bytes(int format) { return format == F32 ? 4 : 1; }

EXPORT int64_t xllm_unit_bytes(void) { return sizeof(Unit); }
EXPORT int64_t xllm_partial_floats(int64_t K, int64_t H) { return K * FEW * (H + 2); }
/* How many units xllm_plan makes at most. */
EXPORT int64_t xllm_max_units(const Step *step) {
    const int64_t tile = MAX(1, ROWS / (step->num_heads / step->num_kv_heads));
    int64_t total = 0;
    for (int64_t s = 0; s < step->num_seqs; s++)
        total += 2 + step->seq_lens[s] / SPLIT + (step->query_start[s + 1] - step->query_start[s]) / tile;
    return total;
}

static int dearer_first(const void *a, const void *b) {
    const Unit *x = a, *y = b;
    if (x->cost != y->cost) return x->cost < y->cost ? 1 : -1;
    return x->partial != y->partial ? (x->partial < y->partial ? -1 : 1) : (x->seq > y->seq) - (x->seq < y->seq);
}

/* Fill step->units (room for xllm_max_units) and the counts, the dearest units first. */
EXPORT void xllm_plan(Step *step) {
    const int G = step->num_heads / step->num_kv_heads, tile = MAX(1, ROWS / G);
    int64_t n = 0, partials = 0, total = 0;
    for (int32_t s = 0; s < step->num_seqs; s++) {
        const int32_t length = step->seq_lens[s], num_queries = step->query_start[s + 1] - step->query_start[s];
        if (num_queries > 0 && num_queries * G <= FEW && length > SPLIT) {
            const int32_t num_parts = (length + SPLIT - 1) / SPLIT;
            for (int32_t p = 0; p < num_parts; p++)
                step->units[n++] = (Unit){s, 0, num_queries, p, num_parts, (int32_t)partials++,
                                          (int64_t)MIN(SPLIT, length - p * SPLIT) * num_queries};
            total += (int64_t)length * num_queries;
            continue;
        }
        for (int32_t q = 0; q < num_queries; q += tile) {
            const int32_t count = MIN(tile, num_queries - q);
            const int64_t cost = (int64_t)(length - num_queries + q + count) * count;
            step->units[n++] = (Unit){s, q, count, 0, 1, -1, cost};
            total += cost;
        }
    }
    qsort(step->units, n, sizeof(Unit), dearer_first);
    step->num_units = n, step->num_partials = partials, step->cost = total * G * step->num_kv_heads;
}

/* VL numbers of the cache from `at` on; of a quantised one, their codes, those of fp8 by FP8_UNIT too small. */
INLINE vf load_kv(const void *cache, int at, const int format) {
    return format == F32    ? load((const float *)cache + at)
           : format == INT8 ? widen_int8((const int8_t *)cache + at)
                            : widen_fp8_raw((const int8_t *)cache + at);
}

/* s[r, p] = sum_h q[h, r] * k[h, p] for R rows; U partial sums per score hide the latency of the additions. */
INLINE void scores_tile(const float *q, const void *k, int H, int P, float *s, int stride, const int R, const int U,
                        const int format) {
    for (int p = 0; p < P; p += VL) {
        vf acc[8]; /* a fixed size: only such an array can live in registers */
        UNROLL for (int i = 0; i < R * U; i++) acc[i] = (vf){0};
        for (int h = 0; h < H; h += U) {
            UNROLL for (int u = 0; u < U; u++) {
                const vf key = load_kv(k, (h + u) * P + p, format);
                UNROLL for (int r = 0; r < R; r++) acc[r * U + u] += splat(q[(h + u) * R + r]) * key;
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            vf total = acc[r * U];
            UNROLL for (int u = 1; u < U; u++) total += acc[r * U + u];
            store(s + r * stride + p, total);
        }
    }
}

static void scores_any(const float *q, const float *k, int H, int P, float *s) {
    for (int p = 0; p < P; p++) s[p] = 0;
    for (int h = 0; h < H; h++)
#pragma omp simd
        for (int p = 0; p < P; p++) s[p] += q[h] * k[h * P + p];
}

INLINE void scores_rows(const float *q, const void *k, int H, int P, float *s, int stride, int R, const int format) {
    if (R == 8 && P == 16) scores_tile(q, k, H, 16, s, stride, 8, 1, format);
    else if (R == 8) scores_tile(q, k, H, P, s, stride, 8, 1, format);
    else if (R == 4) scores_tile(q, k, H, P, s, stride, 4, 2, format);
    else if (R == 2) scores_tile(q, k, H, P, s, stride, 2, 4, format);
    else scores_tile(q, k, H, P, s, stride, 1, 4, format);
}

static void scores_fast(const float *q, const void *k, int H, int P, float *s, int stride, int R, int format) {
    if (format == F32) scores_rows(q, k, H, P, s, stride, R, F32);
    else if (format == INT8) scores_rows(q, k, H, P, s, stride, R, INT8);
    else scores_rows(q, k, H, P, s, stride, R, FP8);
}

/* One row of scores over n positions, of which [from, to) are visible: scores -> weights; returns what the older
 * weights must be multiplied by. `masked` and `scaled` are compile-time constants: if scaled, scores are multiplied by
 * key_scales, and weights, once summed, by value_scales. All have room up to a multiple of VL. */
INLINE float softmax_row(float *s, int n, int from, int to, float *m, float *l, const float *key_scales,
                         const float *value_scales, const int masked, const int scaled) {
    vf top = splat(LOWEST), total = {0};
    vi index = iota();
    for (int c = 0; c < n; c += VL, index += VL) {
        vf x = load(s + c);
        if (scaled) x *= load(key_scales + c), store(s + c, x);
        if (masked) x = blend((index >= from) & (index < to), x, splat(LOWEST));
        top = blend(x > top, x, top);
    }
    const float largest_now = largest(top), m_new = largest_now > *m ? largest_now : *m;
    index = iota();
    for (int c = 0; c < n; c += VL, index += VL) {
        vf w = exp2_v(load(s + c) - splat(m_new)), scale = scaled ? load(value_scales + c) : splat(1.0f);
        if (masked) w = blend((index >= from) & (index < to), w, splat(0.0f));
        total += w;
        if (scaled) w *= scale;
        if (scaled && masked) w = blend((index >= from) & (index < to), w, splat(0.0f));
        store(s + c, w);
    }
    const float decay = exp2f(*m - m_new);
    *l = *l * decay + sum(total);
    *m = m_new;
    return decay;
}

/* o[r, h] = o[r, h] * decay[r] + sum_c s[r, c] * v[c, h] for R rows and NV vectors of h; blocks of v in order. */
INLINE void values_tile(float *o, int H, const float *s, int stride, const float *decay, const void *const *v, int h,
                        int P, int n, const int R, const int NV, const int format) {
    vf acc[PV_ROWS * 4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < NV; j++) acc[r * NV + j] = load(o + r * H + h + j * VL) * splat(decay[r]);
    for (int b = 0, c = 0; c < n; b++) {
        const char *value = (const char *)v[b] + h * item_bytes(format);
        for (const int end = MIN(c + P, n); c < end; c++, value += H * item_bytes(format)) {
            vf row[4];
            UNROLL for (int j = 0; j < NV; j++) row[j] = load_kv(value, j * VL, format);
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int j = 0; j < NV; j++) acc[r * NV + j] += splat(s[r * stride + c]) * row[j];
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < NV; j++) store(o + r * H + h + j * VL, acc[r * NV + j]);
}

/* Whole vectors of h; returns how many h that was. */
INLINE int values_vectors(float *o, int H, const float *s, int stride, const float *decay, const void *const *v, int P,
                          int n, int R, const int format) {
    int h = 0;
    for (; h + 4 * VL <= H; h += 4 * VL) {
        if (R == 4) values_tile(o, H, s, stride, decay, v, h, P, n, 4, 4, format);
        else if (R == 2) values_tile(o, H, s, stride, decay, v, h, P, n, 2, 4, format);
        else values_tile(o, H, s, stride, decay, v, h, P, n, 1, 4, format);
    }
    for (; h + VL <= H; h += VL) {
        if (R == 4) values_tile(o, H, s, stride, decay, v, h, P, n, 4, 1, format);
        else if (R == 2) values_tile(o, H, s, stride, decay, v, h, P, n, 2, 1, format);
        else values_tile(o, H, s, stride, decay, v, h, P, n, 1, 1, format);
    }
    return h;
}

/* A quantised cache has a whole number of vectors here. */
static void values_rows(float *o, int H, const float *s, int stride, const float *decay, const void *const *v, int P,
                        int n, int R, int format) {
    int h = format == F32    ? values_vectors(o, H, s, stride, decay, v, P, n, R, F32)
            : format == INT8 ? values_vectors(o, H, s, stride, decay, v, P, n, R, INT8)
                             : values_vectors(o, H, s, stride, decay, v, P, n, R, FP8);
    for (; h < H; h++)
        for (int r = 0; r < R; r++) {
            float total = o[r * H + h] * decay[r];
            for (int c = 0; c < n; c++) total += s[r * stride + c] * ((const float *)v[c / P])[(c % P) * H + h];
            o[r * H + h] = total;
        }
}

/* The codes of a block's head as `load_kv` has them. */
static void widen_codes(const char *codes, float *to, int n, int format) {
    int i = 0;
    if (format == INT8)
        for (; i + VL <= n; i += VL) store(to + i, load_kv(codes, i, INT8));
    else
        for (; i + VL <= n; i += VL) store(to + i, load_kv(codes, i, FP8));
    for (; i < n; i++) to[i] = decode((uint8_t)codes[i], format) / (format == FP8 ? FP8_UNIT : 1.0f);
}

/* The scales of a block's head. A NaN loses its payload: `exp2_v` would count with that. */
static void load_scales(const char *scales, float *to, int P, int format) {
    if (format == INT8)
        for (int p = 0; p < P; p++) {
            const float scale = ((const float_any *)scales)[p];
            to[p] = scale == scale ? scale : NAN;
        }
    else
        for (int p = 0; p < P; p++) to[p] = get_scale((const uint8_t *)scales, p, FP8);
}

static void read_ahead(const char *keys, const char *values, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(keys + i);
    for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(values + i);
}

/* q rows of a unit, scaled, as tiles [rows / R][H][R]; missing rows are zero. */
static void pack_queries(const float *q, float *packed, const Step *step, int rows, int padded, int k, int R,
                         float scale) {
    const int N = step->num_heads, G = N / step->num_kv_heads, H = step->head_dim;
    for (int r = 0; r < padded; r++) {
        float *out = packed + (r / R) * R * H + r % R;
        const float *in = q + ((int64_t)(r / G) * N + k * G + r % G) * H;
        for (int h = 0; h < H; h++) out[h * R] = r < rows ? in[h] * scale : 0.0f;
    }
}

static float weigh(float *s, int n, int from, int to, float *m, float *l, const float *key_scales,
                   const float *value_scales, int masked, int scaled) {
    if (scaled)
        return masked ? softmax_row(s, n, from, to, m, l, key_scales, value_scales, 1, 1)
                      : softmax_row(s, n, 0, n, m, l, key_scales, value_scales, 0, 1);
    return masked ? softmax_row(s, n, from, to, m, l, NULL, NULL, 1, 0)
                  : softmax_row(s, n, 0, n, m, l, NULL, NULL, 0, 0);
}

static void attend(const Step *step, const Unit *unit, int k, const float *q, const Cache *cache, float *out,
                   float scale, int64_t window) {
    const int N = step->num_heads, K = step->num_kv_heads, G = N / K, H = step->head_dim, P = step->block_size;
    const int rows = unit->num_queries * G, fast = P % VL == 0 && H % 4 == 0, format = cache->format;
    const int R = !fast || rows == 1 ? 1 : rows == 2 ? 2 : rows <= 4 ? 4 : 8;
    const int padded = (rows + R - 1) / R * R;
    const int per_chunk = MAX(1, CHUNK / P), chunk = per_chunk * P, stride = (chunk + VL - 1) / VL * VL;
    const int scaled = format != F32, widened = scaled && !(fast && H % VL == 0), as = widened ? F32 : format;
    const int64_t row0 = step->query_start[unit->seq] + unit->first_query;
    const int64_t first = (int64_t)step->seq_lens[unit->seq] - (step->query_start[unit->seq + 1] - row0); /* position */
    const int32_t *table = step->kv_base ? NULL : step->block_table + unit->seq * step->table_stride;
    const int64_t base = step->kv_base ? step->kv_base[unit->seq] : 0;
    const int64_t head_bytes = (int64_t)P * (format == F32 ? H * 4 : H + scale_bytes(format)), head = k * head_bytes;
    const int scattered = scaled && head_bytes < SHORT;
    const float unit_of_codes = format == FP8 ? FP8_UNIT : 1.0f;
    float *packed = scratch(0, (size_t)(ROWS + 8) * (2 * H + stride)), *o = packed + (ROWS + 8) * H;
    float *s = o + (ROWS + 8) * H;
    float *key_scales = scratch(1, 2 * stride + (widened ? (size_t)(P + chunk) * H : 0));
    float *value_scales = key_scales + stride, *wide_keys = value_scales + stride, *wide_values = wide_keys + P * H;
    float m[ROWS + 8], l[ROWS + 8], decay[ROWS + 8];
    const void *values[MAX_BLOCKS];

    pack_queries(q + row0 * N * H, packed, step, rows, padded, k, R, scale * unit_of_codes * 1.44269504f);
    memset(o, 0, (size_t)rows * H * 4);
    for (int r = 0; r < padded; r++) m[r] = LOWEST, l[r] = 0;
    int64_t begin = window && first + 1 > window ? first + 1 - window : 0, end = first + unit->num_queries;
    if (unit->num_parts > 1) {
        begin = MAX(begin, (int64_t)unit->part * SPLIT);
        end = MIN(end, (int64_t)(unit->part + 1) * SPLIT);
    }
    for (int64_t c0 = begin / P * P; c0 < end; c0 += chunk) {
        const int n = (int)MIN(chunk, end - c0), num_blocks = (n + P - 1) / P;
        for (int b = 0; b < num_blocks; b++) {
            const int64_t i = c0 / P + b, block = table ? table[i] : base + i;
            const void *keys = cache->keys + block * cache->k_stride + head;
            values[b] = cache->values + block * cache->v_stride + head;
            if (scattered && (i + AHEAD) * P < end) {
                const int64_t next = table ? table[i + AHEAD] : base + i + AHEAD;
                read_ahead(cache->keys + next * cache->k_stride + head, cache->values + next * cache->v_stride + head,
                           head_bytes);
            }
            if (scaled) {
                load_scales((const char *)keys + P * H, key_scales + b * P, P, format);
                load_scales((const char *)values[b] + P * H, value_scales + b * P, P, format);
            }
            if (widened) {
                widen_codes(keys, wide_keys, P * H, format);
                widen_codes(values[b], wide_values + b * P * H, P * H, format);
                keys = wide_keys, values[b] = wide_values + b * P * H;
            }
            for (int r = 0; r < padded; r += R)
                if (fast) scores_fast(packed + r * H, keys, H, P, s + r * stride + b * P, stride, R, as);
                else scores_any(packed + r * H, keys, H, P, s + r * stride + b * P);
        }
        for (int r = 0; r < rows; r++) {
            const int64_t last = first + r / G; /* the row's own position */
            int from = window ? (int)MAX(0, last + 1 - window - c0) : 0, to = (int)MIN(n, last + 1 - c0);
            from = MAX(from, (int)MAX(0, begin - c0));
            const int masked = from != 0 || to != n || n % VL != 0;
            decay[r] = weigh(s + r * stride, n, from, to, m + r, l + r, key_scales, value_scales, masked, scaled);
        }
        int r = 0;
        for (; r + PV_ROWS <= rows; r += PV_ROWS)
            values_rows(o + r * H, H, s + r * stride, stride, decay + r, values, P, n, PV_ROWS, as);
        for (; r + 2 <= rows; r += 2) values_rows(o + r * H, H, s + r * stride, stride, decay + r, values, P, n, 2, as);
        for (; r < rows; r++) values_rows(o + r * H, H, s + r * stride, stride, decay + r, values, P, n, 1, as);
    }
    for (int r = 0; r < rows; r++) {
        float *to = out + ((row0 + r / G) * N + k * G + r % G) * H;
        if (unit->num_parts > 1) {
            to = step->partials + (((int64_t)unit->partial * K + k) * FEW + r) * (H + 2);
            to[H] = m[r], to[H + 1] = l[r];
            for (int h = 0; h < H; h++) to[h] = o[r * H + h] * unit_of_codes;
            continue;
        }
        const float inverse = unit_of_codes / l[r];
        for (int h = 0; h < H; h++) to[h] = o[r * H + h] * inverse;
    }
}

/* Add up the parts of the unit whose first part is `unit`. */
static void merge(const Step *step, const Unit *unit, int k, float *out) {
    const int N = step->num_heads, K = step->num_kv_heads, G = N / K, H = step->head_dim;
    for (int r = 0; r < unit->num_queries * G; r++) {
        const float *part = step->partials + (((int64_t)unit->partial * K + k) * FEW + r) * (H + 2);
        const int64_t next = (int64_t)K * FEW * (H + 2);
        float *to = out + ((step->query_start[unit->seq] + r / G) * (int64_t)N + k * G + r % G) * H;
        float m = LOWEST, l = 0;
        for (int p = 0; p < unit->num_parts; p++) m = part[p * next + H] > m ? part[p * next + H] : m;
        for (int h = 0; h < H; h++) to[h] = 0;
        for (int p = 0; p < unit->num_parts; p++) {
            const float *from = part + p * next, weight = exp2f(from[H] - m);
            l += from[H + 1] * weight;
            for (int h = 0; h < H; h++) to[h] += from[h] * weight;
        }
        for (int h = 0; h < H; h++) to[h] /= l;
    }
}

typedef struct {
    const Step *step;
    const float *q;
    Cache cache;
    float *out, scale;
    int64_t window;
} Attention;

static void attend_items(const void *context, int64_t begin, int64_t end) {
    const Attention *c = context;
    const int64_t K = c->step->num_kv_heads;
    for (int64_t i = begin; i < end; i++)
        attend(c->step, c->step->units + i / K, i % K, c->q, &c->cache, c->out, c->scale, c->window);
}

/* format: F32, INT8 or FP8. k_stride, v_stride: numbers of it from one block of the cache to the next. */
EXPORT void xllm_attention(const Step *step, const float *q, const char *k_cache, int64_t k_stride, const char *v_cache,
                           int64_t v_stride, int format, float *out, float scale, int64_t window, int nt) {
    const int64_t K = step->num_kv_heads, num_items = step->num_units * K, bytes = item_bytes(format);
    const Attention c = {step, q, {k_cache, v_cache, k_stride * bytes, v_stride * bytes, format}, out, scale, window};
    share_out(attend_items, &c, num_items, 1, step->cost > TINY_WORK ? nt : 1);
    if (step->num_partials == 0) return;
    for (int64_t i = 0; i < num_items; i++) {
        const Unit *unit = step->units + i / K;
        if (unit->num_parts > 1 && unit->part == 0) merge(step, unit, i % K, out);
    }
}
