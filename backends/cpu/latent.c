/* Latent attention in its absorbed form: for each query of each head, the cached latents weighted by its scores.
 *
 * Queries have been brought to the latents' width, and what is summed here is brought back elsewhere (latent.py), so
 * that a position is read once for all heads of a unit. A unit is one token, HEADS heads and at most SPLIT positions;
 * parts of a longer context are merged. The units follow from the lengths as they are at the call, which so may be part
 * of a captured step. Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
 *
 * Letters: X tokens, N heads, L width of a latent, W of all that a position has (scores are over W, sums over L), P
 * positions of a block.
 */
#include "kv_codes.h"
#include "pool.h"

#define HEADS 16
#define SPLIT 512 /* positions of a part */
#define CHUNK 32  /* positions per pass of the online softmax: with W of 576 they fit the second level of cache */
#define COLUMNS 4 /* positions whose scores are computed at once */
#define TINY_WORK 2048
#define LOWEST -1e30f

typedef struct {
    const float *q; /* [X, N, W], scaled: the tokens of the sequences with at most `most` queries, in their order */
    const char *cache;
    const int32_t *block_table, *kv_base, *query_start, *seq_lens; /* kv_base: NULL, or instead of the table */
    float *sums; /* [X, N, L] */
    int64_t table_stride, block_bytes, num_seqs, most, num_heads, width, whole, block_size, format; /* F32, INT8, FP8 */
} Latents;

typedef struct {
    Latents given;
    int64_t num_tokens;
    int32_t *seq, *seen, *first_part; /* of a token: its sequence, how many positions it sees, and the number of parts
        before its own; of the last with an end */
    float *partials; /* [parts, N, L + 2]: sums, then the largest score and the sum of the weights */
} Units;

/* s[r, c] = sum_h q[r, h] * k[c][h], for R heads and C positions. */
INLINE void dots(const float *q, int64_t W, const float *const *k, float *s, const int R, const int C) {
    vf acc[PV_ROWS * COLUMNS];
    int64_t h = 0;
    UNROLL for (int i = 0; i < R * C; i++) acc[i] = (vf){0};
    for (; h + VL <= W; h += VL) {
        vf key[COLUMNS];
        UNROLL for (int c = 0; c < C; c++) key[c] = load(k[c] + h);
        UNROLL for (int r = 0; r < R; r++) {
            const vf x = load(q + r * W + h);
            UNROLL for (int c = 0; c < C; c++) acc[r * C + c] += x * key[c];
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) {
            float total = sum(acc[r * C + c]);
            for (int64_t i = h; i < W; i++) total += q[r * W + i] * k[c][i];
            s[r * CHUNK + c] = total;
        }
}

static void score(const float *q, int64_t W, const float *const *k, int n, float *s, int heads) {
    int r = 0;
    for (; r + PV_ROWS <= heads; r += PV_ROWS) {
        int c = 0;
        for (; c + COLUMNS <= n; c += COLUMNS) dots(q + r * W, W, k + c, s + r * CHUNK + c, PV_ROWS, COLUMNS);
        for (; c < n; c++) dots(q + r * W, W, k + c, s + r * CHUNK + c, PV_ROWS, 1);
    }
    for (; r < heads; r++) {
        int c = 0;
        for (; c + COLUMNS <= n; c += COLUMNS) dots(q + r * W, W, k + c, s + r * CHUNK + c, 1, COLUMNS);
        for (; c < n; c++) dots(q + r * W, W, k + c, s + r * CHUNK + c, 1, 1);
    }
}

/* n scores of a head, in units of log2 e, into weights; returns what the older sums must be multiplied by. */
static float weigh(float *s, int n, float *m, float *l) {
    vf top = splat(LOWEST), total = {0};
    vi index = iota();
    for (int c = 0; c < n; c += VL, index += VL) {
        const vf x = blend(index < n, load(s + c), splat(LOWEST));
        top = blend(x > top, x, top);
    }
    const float now = largest(top), m_new = now > *m ? now : *m;
    index = iota();
    for (int c = 0; c < n; c += VL, index += VL) {
        const vf w = blend(index < n, exp2_v(load(s + c) - splat(m_new)), splat(0.0f));
        total += w;
        store(s + c, w);
    }
    const float decay = exp2f(*m - m_new);
    *l = *l * decay + sum(total);
    *m = m_new;
    return decay;
}

/* o[r, h] = o[r, h] * decay[r] + sum_c w[r, c] * k[c][h], for R heads and NV vectors of h. */
INLINE void add_tile(float *o, int64_t L, const float *w, const float *decay, const float *const *k, int n, int64_t h,
                     const int R, const int NV) {
    vf acc[PV_ROWS * 4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < NV; j++) acc[r * NV + j] = load(o + r * L + h + j * VL) * splat(decay[r]);
    for (int c = 0; c < n; c++) {
        vf row[4];
        UNROLL for (int j = 0; j < NV; j++) row[j] = load(k[c] + h + j * VL);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < NV; j++) acc[r * NV + j] += splat(w[r * CHUNK + c]) * row[j];
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < NV; j++) store(o + r * L + h + j * VL, acc[r * NV + j]);
}

INLINE void add_rows(float *o, int64_t L, const float *w, const float *decay, const float *const *k, int n,
                     const int R) {
    int64_t h = 0;
    for (; h + 4 * VL <= L; h += 4 * VL) add_tile(o, L, w, decay, k, n, h, R, 4);
    for (; h + VL <= L; h += VL) add_tile(o, L, w, decay, k, n, h, R, 1);
    for (; h < L; h++)
        for (int r = 0; r < R; r++) {
            float total = o[r * L + h] * decay[r];
            for (int c = 0; c < n; c++) total += w[r * CHUNK + c] * k[c][h];
            o[r * L + h] = total;
        }
}

/* Position `place` of a quantised block, W numbers. */
static void read_codes(const char *block, int64_t P, int64_t place, float *to, int64_t W, const int format) {
    const int8_t *codes = (const int8_t *)block + place * W;
    const float scale = get_scale((const uint8_t *)block + P * W, place, format);
    int64_t i = 0;
    if (format == INT8)
        for (; i + VL <= W; i += VL) store(to + i, widen_int8(codes + i) * splat(scale));
    else
        for (; i + VL <= W; i += VL) store(to + i, widen_fp8(codes + i) * splat(scale));
    for (; i < W; i++) to[i] = decode((uint8_t)codes[i], format) * scale;
}

/* The token whose parts `part` is among. */
static int64_t token_of(const Units *u, int64_t part) {
    int64_t low = 0, high = u->num_tokens;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (u->first_part[middle] <= part) low = middle;
        else high = middle;
    }
    return low;
}

static void attend(const Units *u, int64_t part, int64_t first_head) {
    const Latents *a = &u->given;
    const int64_t W = a->whole, L = a->width, N = a->num_heads, P = a->block_size, x = token_of(u, part);
    const int heads = (int)MIN(HEADS, N - first_head), num_parts = u->first_part[x + 1] - u->first_part[x];
    const int64_t begin = (part - u->first_part[x]) * SPLIT, end = MIN(u->seen[x], begin + SPLIT);
    const int32_t *table = a->kv_base ? NULL : a->block_table + u->seq[x] * a->table_stride;
    const int64_t base = a->kv_base ? a->kv_base[u->seq[x]] : 0;
    const float *q = a->q + (x * N + first_head) * W;
    const int is_coded = a->format != F32;
    float *o = scratch(0, (size_t)HEADS * (L + CHUNK) + (is_coded ? CHUNK * W : 0)), *s = o + HEADS * L;
    float *decoded = s + HEADS * CHUNK;
    float m[HEADS], l[HEADS], decay[HEADS];
    const float *k[CHUNK];

    memset(o, 0, (size_t)heads * L * 4);
    for (int r = 0; r < heads; r++) m[r] = LOWEST, l[r] = 0;
    for (int64_t c0 = begin; c0 < end; c0 += CHUNK) {
        const int n = (int)MIN(CHUNK, end - c0);
        for (int c = 0; c < n; c++) {
            const int64_t i = (c0 + c) / P, block = table ? table[i] : base + i;
            const char *from = a->cache + block * a->block_bytes;
            k[c] = is_coded ? decoded + c * W : (const float *)from + (c0 + c) % P * W;
            if (is_coded) read_codes(from, P, (c0 + c) % P, decoded + c * W, W, (int)a->format);
        }
        score(q, W, k, n, s, heads);
        for (int r = 0; r < heads; r++) {
            for (int c = 0; c < n; c++) s[r * CHUNK + c] *= 1.44269504f;
            decay[r] = weigh(s + r * CHUNK, n, m + r, l + r);
        }
        int r = 0;
        for (; r + PV_ROWS <= heads; r += PV_ROWS) add_rows(o + r * L, L, s + r * CHUNK, decay + r, k, n, PV_ROWS);
        for (; r < heads; r++) add_rows(o + r * L, L, s + r * CHUNK, decay + r, k, n, 1);
    }
    for (int r = 0; r < heads; r++) {
        const int64_t n = first_head + r;
        float *to = num_parts > 1 ? u->partials + (part * N + n) * (L + 2) : a->sums + (x * N + n) * L;
        const float factor = num_parts > 1 ? 1.0f : 1.0f / l[r];
        for (int64_t h = 0; h < L; h++) to[h] = o[r * L + h] * factor;
        if (num_parts > 1) to[L] = m[r], to[L + 1] = l[r];
    }
}

/* Add up the parts of head n of token x. */
static void merge(const Units *u, int64_t x, int64_t n) {
    const Latents *a = &u->given;
    const int64_t L = a->width, next = a->num_heads * (L + 2), num_parts = u->first_part[x + 1] - u->first_part[x];
    const float *part = u->partials + ((int64_t)u->first_part[x] * a->num_heads + n) * (L + 2);
    float *to = a->sums + (x * a->num_heads + n) * L, m = LOWEST, l = 0;
    for (int64_t p = 0; p < num_parts; p++) m = MAX(m, part[p * next + L]);
    memset(to, 0, (size_t)L * 4);
    for (int64_t p = 0; p < num_parts; p++) {
        const float *from = part + p * next, weight = exp2f(from[L] - m);
        l += from[L + 1] * weight;
        for (int64_t h = 0; h < L; h++) to[h] += from[h] * weight;
    }
    for (int64_t h = 0; h < L; h++) to[h] /= l;
}

static void attend_items(const void *context, int64_t begin, int64_t end) {
    const Units *u = context;
    const int64_t groups = (u->given.num_heads + HEADS - 1) / HEADS;
    for (int64_t i = begin; i < end; i++) attend(u, i / groups, i % groups * HEADS);
}

static void merge_items(const void *context, int64_t begin, int64_t end) {
    const Units *u = context;
    for (int64_t i = begin; i < end; i++) {
        const int64_t x = i / u->given.num_heads;
        if (u->first_part[x + 1] - u->first_part[x] > 1) merge(u, x, i % u->given.num_heads);
    }
}

EXPORT void xllm_latent_sums(const Latents *a, int nt) {
    const int32_t *starts = a->query_start;
    int64_t num_tokens = 0, num_parts = 0, pairs = 0;
    for (int64_t s = 0; s < a->num_seqs; s++)
        if (starts[s + 1] - starts[s] <= a->most) num_tokens += starts[s + 1] - starts[s];
    int32_t *seq = (int32_t *)scratch(1, 3 * (size_t)num_tokens + 1);
    Units u = {*a, num_tokens, seq, seq + num_tokens, seq + 2 * num_tokens, NULL};
    for (int64_t s = 0, x = 0; s < a->num_seqs; s++) {
        const int32_t num_queries = starts[s + 1] - starts[s];
        for (int32_t i = 0; num_queries <= a->most && i < num_queries; i++, x++) {
            u.seq[x] = (int32_t)s, u.seen[x] = a->seq_lens[s] - num_queries + i + 1;
            u.first_part[x] = (int32_t)num_parts;
            num_parts += (u.seen[x] + SPLIT - 1) / SPLIT;
            pairs += u.seen[x];
        }
    }
    u.first_part[num_tokens] = (int32_t)num_parts;
    const int64_t groups = (a->num_heads + HEADS - 1) / HEADS, rows = num_tokens * a->num_heads;
    const size_t partial_bytes = (size_t)num_parts * a->num_heads * (a->width + 2) * 4;
    if (num_parts > num_tokens && !(u.partials = malloc(partial_bytes))) abort();
    share_out(attend_items, &u, num_parts * groups, 1, pairs * a->num_heads > TINY_WORK ? nt : 1);
    if (u.partials) share_out(merge_items, &u, rows, quarter(rows, nt), nt);
    free(u.partials);
}
