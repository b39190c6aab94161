/* Edits of logits, argmax and sampling: one row at a time, no sorting. See opset.py for the order of work. */
#include "pool.h"
#include "vectors.h"

#define STRETCH 256 /* tokens per partial sum of the CDF */

/* Smallest index of the largest value; NaN never wins; 0 if nothing does. */
static int64_t argmax_row(const float *x, int64_t V) {
    vf top = splat(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= V; i += VL) {
        const vf v = load(x + i);
        top = blend(v > top, v, top);
    }
    float best = largest(top);
    for (; i < V; i++) best = x[i] > best ? x[i] : best;
    for (i = 0; i < V; i++)
        if (x[i] == best) return i;
    return 0;
}

typedef struct {
    const float *logits, *temperature, *top_p, *min_p;
    const int64_t *top_k;
    const double *uniform;
    int64_t *out, V;
} Sampling;

static void argmax_rows(const void *context, int64_t begin, int64_t end) {
    const Sampling *c = context;
    for (int64_t s = begin; s < end; s++) c->out[s] = argmax_row(c->logits + s * c->V, c->V);
}

EXPORT void xllm_argmax(const float *logits, int64_t *out, int64_t S, int64_t V, int nt) {
    const Sampling c = {.logits = logits, .out = out, .V = V};
    if (S * V <= 65536) nt = 1;
    share_out(argmax_rows, &c, S, quarter(S, nt), nt);
}

/* Bits that order like the floats. */
INLINE uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The key at which the running weight, from the largest key down, reaches `target`; *above: the weight of larger keys.
 * A radix select over 11, 11 and 10 bits. weights NULL: every key weighs 1. */
static uint32_t threshold(const float *x, const float *weights, int64_t n, double target, double *above) {
    static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
    uint32_t prefix = 0, mask = 0;
    *above = 0;
    for (int pass = 0; pass < 3; pass++) {
        const int shift = shifts[pass], num_bins = 1 << widths[pass];
        double bins[2048];
        for (int b = 0; b < num_bins; b++) bins[b] = 0;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t key = ordered(x[i]);
            if ((key & mask) == prefix) bins[(key >> shift) & (num_bins - 1)] += weights ? weights[i] : 1.0;
        }
        int b = num_bins - 1, lowest = b; /* lowest: the last bin with any weight, should rounding never reach target */
        for (; b >= 0; b--) {
            if (bins[b] > 0) lowest = b;
            if (*above + bins[b] >= target && bins[b] > 0) break;
            *above += bins[b];
        }
        if (b < 0) {
            b = lowest;
            *above -= bins[b];
        }
        prefix |= (uint32_t)b << shift;
        mask |= (uint32_t)(num_bins - 1) << shift;
    }
    return prefix;
}

/* exp((x - top) / temperature) of each x >= floor, else 0. Equal values weigh the same to the last bit wherever they
 * stand in the row: which of them top_p keeps is decided by their ids. */
INLINE vf weights_of(vf x, vf top, vf inverse, vf floor) {
    return blend(x >= floor, exp_v((x - top) * inverse), splat(0.0f));
}

/* Those of a row into w; the sums of stretches into sums; returns the total. */
static double weigh(const float *x, float *w, double *sums, int64_t V, float top, float temperature, float floor) {
    const vf inverse = splat(1.0f / temperature), tops = splat(top), floors = splat(floor);
    double total = 0;
    for (int64_t start = 0; start < V; start += STRETCH) {
        const int64_t end = MIN(start + STRETCH, V);
        vf part = {0};
        int64_t i = start;
        for (; i + VL <= end; i += VL) {
            const vf kept = weights_of(load(x + i), tops, inverse, floors);
            store(w + i, kept);
            part += kept;
        }
        if (i < end) {
            vf rest = splat(-INFINITY);
            for (int64_t j = i; j < end; j++) rest[j - i] = x[j];
            rest = weights_of(rest, tops, inverse, floors);
            for (int64_t j = i; j < end; j++) w[j] = rest[j - i];
            part += rest;
        }
        double stretch = 0;
        for (int j = 0; j < VL; j++) stretch += part[j];
        sums[start / STRETCH] = stretch;
        total += stretch;
    }
    return total;
}

/* Zero the weights that min_p and top_p drop; returns the number of tokens kept, compacted in id order. */
static int64_t filter(float *w, int32_t *ids, int64_t V, double total, float min_p, float top_p) {
    /* Tokens below (1 - top_p) * total / V sum to less than what top_p leaves out, so none of them is in the set. */
    const float bound = top_p < 1.0f ? (float)((1.0 - (double)top_p) * total / (double)V * 0.999) : 0.0f;
    const float floor = MAX(min_p, bound);
    int64_t n = 0;
    for (int64_t i = 0; i < V; i++)
        if (w[i] >= floor && w[i] > 0) ids[n] = (int32_t)i, w[n++] = w[i];
    if (top_p >= 1.0f || n == 0) return n;
    double above;
    const uint32_t key = threshold(w, w, n, (double)top_p * total, &above);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t mine = ordered(w[i]);
        if (mine < key) continue;
        if (mine == key) { /* equals enter one by one, in id order, until the sum is reached */
            if (above >= (double)top_p * total && kept > 0) continue;
            above += w[i];
        }
        ids[kept] = ids[i], w[kept++] = w[i];
    }
    return kept;
}

static int64_t walk(const float *w, const int32_t *ids, int64_t n, double target) {
    double cdf = 0;
    for (int64_t i = 0; i < n; i++) {
        cdf += w[i];
        if (cdf > target) return ids ? ids[i] : i;
    }
    for (int64_t i = n - 1; i >= 0; i--)
        if (w[i] > 0) return ids ? ids[i] : i; /* rounding: the last possible token */
    return 0;
}

static int64_t sample_row(const float *x, int64_t V, float temperature, int64_t top_k, float top_p, float min_p,
                          double uniform) {
    const int64_t best = argmax_row(x, V);
    if (!(temperature > 0) || !(x[best] > -INFINITY)) return best;
    const int64_t num_stretches = (V + STRETCH - 1) / STRETCH;
    float *w = scratch(2, 2 * V + 2 * num_stretches + 4);
    int32_t *ids = (int32_t *)(w + V);
    double *sums = (double *)(w + (2 * V + 1) / 2 * 2);
    float floor = -INFINITY;
    if (top_k > 0 && top_k < V) {
        double above;
        const uint32_t key = threshold(x, NULL, V, (double)top_k, &above), bits = key >> 31 ? key & 0x7fffffffu : ~key;
        memcpy(&floor, &bits, 4);
    }
    const double total = weigh(x, w, sums, V, x[best], temperature, floor);
    if (min_p > 0 || top_p < 1.0f) {
        const int64_t n = filter(w, ids, V, total, min_p, top_p);
        double kept = 0;
        for (int64_t i = 0; i < n; i++) kept += w[i];
        return n ? walk(w, ids, n, uniform * kept) : best;
    }
    double before = 0;
    int64_t stretch = 0, last = 0;
    for (int64_t i = 0; i < num_stretches; i++) last = sums[i] > 0 ? i : last;
    for (; stretch < last && before + sums[stretch] <= uniform * total; stretch++) before += sums[stretch];
    const int64_t start = stretch * STRETCH;
    return start + walk(w + start, NULL, MIN(STRETCH, V - start), uniform * total - before);
}

static void sample_rows(const void *context, int64_t begin, int64_t end) {
    const Sampling *c = context;
    for (int64_t s = begin; s < end; s++)
        c->out[s] = sample_row(c->logits + s * c->V, c->V, c->temperature[s], c->top_k[s], c->top_p[s], c->min_p[s],
                               c->uniform[s]);
}

EXPORT void xllm_sample(const float *logits, const float *temperature, const int64_t *top_k, const float *top_p,
                        const float *min_p, const double *uniform, int64_t *out, int64_t S, int64_t V, int nt) {
    const Sampling c = {logits, temperature, top_p, min_p, top_k, uniform, out, V};
    share_out(sample_rows, &c, S, 1, S * V > 16384 ? nt : 1);
}

typedef struct {
    float *logits;
    int64_t stride;
    const int32_t *masks;
    const int64_t *rows;
    int64_t V, W;
} Masking;

static void mask_rows(const void *context, int64_t begin, int64_t end) {
    const Masking *c = context;
    const int64_t V = c->V, W = c->W;
    for (int64_t x = begin; x < end; x++) {
        float *row = c->logits + c->rows[x] * c->stride;
        const uint32_t *mask = (const uint32_t *)c->masks + x * W;
        for (int64_t w = 0; w * 32 < V; w++) {
            const uint32_t word = w < W ? mask[w] : 0;
            if (word == UINT32_MAX) continue;
            for (int64_t t = w * 32; t < MIN(V, w * 32 + 32); t++)
                if (!(word >> (t - w * 32) & 1)) row[t] = -INFINITY;
        }
    }
}

/* -inf where a mask has a zero; bits past the vocabulary are not looked at, tokens past the mask are forbidden. */
EXPORT void xllm_apply_token_bitmask(float *logits, int64_t stride, const int32_t *masks, const int64_t *rows,
                                     int64_t X, int64_t V, int64_t W, int nt) {
    const Masking c = {logits, stride, masks, rows, V, W};
    if (X * V <= 65536) nt = 1;
    share_out(mask_rows, &c, X, quarter(X, nt), nt);
}

/* volatile: a sum must not be fused with the product before it, nor a product with the sum behind it. */
static void penalise_token(float *logit, int32_t count, float repetition, double frequency, double presence) {
    const volatile float repeated = *logit > 0 ? *logit / repetition : *logit * repetition;
    const float value = repetition != 1.0f ? repeated : *logit;
    const volatile double often = frequency * count;
    *logit = count ? value - (float)(often + presence) : value;
}

/* counts: of each token of the history, how often it was generated; set and used through the history alone. */
static void penalise_row(float *row, const int32_t *ids, int64_t start, int64_t middle, int64_t end, int32_t *counts,
                         float repetition, double frequency, double presence) {
    for (int64_t i = start; i < end; i++) counts[ids[i]] = 0;
    for (int64_t i = middle; i < end; i++) counts[ids[i]]++;
    for (int64_t i = start; i < end; i++) {
        if (counts[ids[i]] >= 0) penalise_token(row + ids[i], counts[ids[i]], repetition, frequency, presence);
        counts[ids[i]] = -1;
    }
}

typedef struct {
    float *logits;
    int64_t stride;
    const int64_t *rows;
    const int32_t *ids, *starts, *output_starts;
    const float *repetition;
    const double *frequency, *presence;
    int64_t V;
} Penalties;

static void penalise_rows(const void *context, int64_t begin, int64_t end) {
    const Penalties *c = context;
    for (int64_t x = begin; x < end; x++)
        penalise_row(c->logits + c->rows[x] * c->stride, c->ids, c->starts[x], c->output_starts[x], c->starts[x + 1],
                     (int32_t *)scratch(2, c->V), c->repetition[x], c->frequency[x], c->presence[x]);
}

EXPORT void xllm_penalise(float *logits, int64_t stride, const int64_t *rows, const int32_t *ids,
                          const int32_t *starts, const int32_t *output_starts, const float *repetition,
                          const double *frequency, const double *presence, int64_t X, int64_t V, int nt) {
    const Penalties c = {logits, stride, rows, ids, starts, output_starts, repetition, frequency, presence, V};
    share_out(penalise_rows, &c, X, 1, X > 1 && starts[X] - starts[0] > 16384 ? nt : 1);
}
