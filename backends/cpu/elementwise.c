/* Norms, activation, and the fused rotary embedding with its cache write. */
#include "kv_codes.h"
#include "pool.h"

EXPORT void xllm_exp(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i + VL <= n; i += VL) store(y + i, exp_v(load(x + i)));
}

/* ---------------------------------------------------------------- norms and activation */

INLINE void norm_row(const float *x, const float *weight, float *out, int64_t D, float eps) {
    vf squares = {0};
    int64_t d = 0;
    float tail = 0;
    for (; d + VL <= D; d += VL) squares += load(x + d) * load(x + d);
    for (; d < D; d++) tail += x[d] * x[d];
    float r = 1.0f / sqrtf((sum(squares) + tail) / (float)D + eps);
    for (d = 0; d + VL <= D; d += VL) store(out + d, load(x + d) * splat(r) * load(weight + d));
    for (; d < D; d++) out[d] = x[d] * r * weight[d];
}

typedef struct {
    const float *x, *weight;
    float *residual, *out;
    int64_t D;
    float eps;
} Norm;

static void norm_rows(const void *context, int64_t begin, int64_t end) {
    const Norm *c = context;
    for (int64_t t = begin; t < end; t++) norm_row(c->x + t * c->D, c->weight, c->out + t * c->D, c->D, c->eps);
}

static void add_norm_rows(const void *context, int64_t begin, int64_t end) {
    const Norm *c = context;
    for (int64_t t = begin; t < end; t++) {
        float *restrict r = c->residual + t * c->D, *restrict x = c->out + t * c->D;
        for (int64_t d = 0; d < c->D; d++) r[d] += x[d];
        norm_row(r, c->weight, x, c->D, c->eps);
    }
}

EXPORT void xllm_rms_norm(const float *x, const float *weight, float *out, int64_t T, int64_t D, float eps, int nt) {
    const Norm c = {x, weight, NULL, out, D, eps};
    if (T * D <= 65536) nt = 1;
    share_out(norm_rows, &c, T, quarter(T, nt), nt);
}

EXPORT void xllm_add_rms_norm(float *x, float *residual, const float *weight, int64_t T, int64_t D, float eps, int nt) {
    const Norm c = {NULL, weight, residual, x, D, eps};
    if (T * D <= 65536) nt = 1;
    share_out(add_norm_rows, &c, T, quarter(T, nt), nt);
}

typedef struct {
    const float *gate_up;
    float *out;
    int64_t F;
} Activation;

static void activate_rows(const void *context, int64_t begin, int64_t end) {
    const Activation *c = context;
    const int64_t F = c->F;
    for (int64_t t = begin; t < end; t++) {
        const float *gate = c->gate_up + t * 2 * F, *up = gate + F;
        float *o = c->out + t * F;
        int64_t f = 0;
        for (; f + VL <= F; f += VL) {
            vf g = load(gate + f);
            store(o + f, g / (splat(1.0f) + exp_v(-g)) * load(up + f));
        }
        for (; f < F; f++) o[f] = gate[f] / (1.0f + expf(-gate[f])) * up[f];
    }
}

EXPORT void xllm_silu_mul(const float *gate_up, float *out, int64_t T, int64_t F, int nt) {
    const Activation c = {gate_up, out, F};
    if (T * F <= 32768) nt = 1;
    share_out(activate_rows, &c, T, quarter(T, nt), nt);
}

/* ---------------------------------------------------------------- qkv_rope_write */

INLINE void rotate(const float *x, const float *cos, float *out, int64_t H) {
    const int64_t half = H / 2;
    const float *sin = cos + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
}

/* H numbers, `step` apart, into one head of a block of an fp32 cache. */
INLINE void put_numbers(const float *x, float *to, int64_t H, int64_t step) {
    if (step == 1) memcpy(to, x, H * 4);
    else
        for (int64_t h = 0; h < H; h++) to[h * step] = x[h];
}

/* The same into a quantised one, whose head is P * H codes and P scales; `first`: the first number's place there. */
INLINE void put_codes(const float *x, uint8_t *head, int64_t first, int64_t offset, int64_t H, int64_t P, int64_t step,
                      const int format) {
    const float divisor = put_scale(head + P * H, offset, largest_bits(x, H), format);
    uint8_t codes[H];
    for (int64_t h = 0; h < H; h++) codes[h] = encode(x[h], divisor, format);
    if (step == 1) memcpy(head + first, codes, H);
    else
        for (int64_t h = 0; h < H; h++) head[first + h * step] = codes[h];
}

/* Store a position's key or value in one head of a block: `step` numbers apart, the first at `first`. */
INLINE void put(const float *x, char *block, int64_t k, int64_t first, int64_t offset, int64_t H, int64_t P,
                int64_t step, int format) {
    if (format == F32) put_numbers(x, (float *)block + k * P * H + first, H, step);
    else if (format == INT8) put_codes(x, (uint8_t *)block + k * P * (H + 4), first, offset, H, P, step, INT8);
    else put_codes(x, (uint8_t *)block + k * P * (H + 1), first, offset, H, P, step, FP8);
}

typedef struct {
    const float *qkv;
    const int32_t *positions, *slots;
    const float *cos_sin, *q_norm, *k_norm;
    char *k_cache, *v_cache;
    int64_t k_bytes, v_bytes; /* from one block to the next */
    float *q_out;
    int64_t N, K, H, P;
    float eps;
    int format;
} Rope;

static void rope_rows(const void *context, int64_t begin, int64_t end) {
    const Rope *c = context;
    const int64_t N = c->N, K = c->K, H = c->H, P = c->P;
    const float *q_norm = c->q_norm, *k_norm = c->k_norm, eps = c->eps;
    const int32_t *slots = c->slots;
    const int format = c->format;
    for (int64_t t = begin; t < end; t++) {
        const float *x = c->qkv + t * (N + 2 * K) * H, *angle = c->cos_sin + c->positions[t] * H;
        float normed[H], turned[H];
        for (int64_t n = 0; n < N; n++, x += H) {
            if (q_norm) norm_row(x, q_norm, normed, H, eps);
            rotate(q_norm ? normed : x, angle, c->q_out + (t * N + n) * H, H);
        }
        if (slots[t] < 0) continue;
        const int64_t block = slots[t] / P, offset = slots[t] % P;
        char *keys = c->k_cache + block * c->k_bytes, *values = c->v_cache + block * c->v_bytes;
        for (int64_t k = 0; k < K; k++, x += H) {
            if (k_norm) norm_row(x, k_norm, normed, H, eps);
            rotate(k_norm ? normed : x, angle, turned, H);
            put(turned, keys, k, offset, offset, H, P, P, format);
        }
        for (int64_t k = 0; k < K; k++, x += H) put(x, values, k, offset * H, offset, H, P, 1, format);
    }
}

/* format: F32, INT8 or FP8. k_stride, v_stride: numbers of it from one block of the cache to the next. */
EXPORT void xllm_qkv_rope_write(const float *qkv, const int32_t *positions, const float *cos_sin, char *k_cache,
                                int64_t k_stride, char *v_cache, int64_t v_stride, int format, const int32_t *slots,
                                float *q_out, const float *q_norm, const float *k_norm, float eps, int64_t T, int64_t N,
                                int64_t K, int64_t H, int64_t P, int nt) {
    const int64_t item_bytes = format == F32 ? 4 : 1;
    const Rope c = {qkv, positions, slots, cos_sin, q_norm, k_norm, k_cache, v_cache, k_stride * item_bytes,
                    v_stride * item_bytes, q_out, N, K, H, P, eps, format};
    if (T * (N + 2 * K) * H <= 32768) nt = 1;
    share_out(rope_rows, &c, T, quarter(T, nt), nt);
}

/* ---------------------------------------------------------------- latent_rope_write */

/* Rotate the pairs (x[2i], x[2i + 1]); they are left as `rotate` leaves its own. */
INLINE void rotate_pairs(const float *x, const float *cos, float *out, int64_t R) {
    const int64_t half = R / 2;
    const float *sin = cos + half;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
}

typedef struct {
    const float *latents, *q, *cos_sin, *norm;
    const int32_t *positions, *slots;
    char *cache;
    float *q_out;
    int64_t latent_stride, block_bytes, N, L, R, D, P; /* D: of a head of q, what is not rotated */
    float eps;
    int format, interleaved;
} LatentRope;

static void latent_rope_rows(const void *context, int64_t begin, int64_t end) {
    const LatentRope *c = context;
    const int64_t N = c->N, L = c->L, R = c->R, D = c->D, P = c->P;
    for (int64_t t = begin; t < end; t++) {
        const float *x = c->latents + t * c->latent_stride, *angle = c->cos_sin + c->positions[t] * R;
        for (int64_t n = t * N; n < (t + 1) * N; n++) {
            const float *head = c->q + n * (D + R);
            float *to = c->q_out + n * (D + R);
            memcpy(to, head, D * 4);
            if (c->interleaved) rotate_pairs(head + D, angle, to + D, R);
            else rotate(head + D, angle, to + D, R);
        }
        if (c->slots[t] < 0) continue;
        float kept[L + R];
        norm_row(x, c->norm, kept, L, c->eps);
        if (c->interleaved) rotate_pairs(x + L, angle, kept + L, R);
        else rotate(x + L, angle, kept + L, R);
        const int64_t block = c->slots[t] / P, offset = c->slots[t] % P;
        put(kept, c->cache + block * c->block_bytes, 0, offset * (L + R), offset, L + R, P, 1, c->format);
    }
}

/* format: F32, INT8 or FP8. latent_stride: from one token to the next. block_stride: numbers of the cache's format from
 * one block to the next. */
EXPORT void xllm_latent_rope_write(const float *latents, int64_t latent_stride, const float *q,
                                   const int32_t *positions, const float *cos_sin, char *cache, int64_t block_stride,
                                   int format, const int32_t *slots, float *q_out, const float *norm, float eps, int interleaved,
                                   int64_t T, int64_t N, int64_t L, int64_t R, int64_t D, int64_t P, int nt) {
    const LatentRope c = {latents, q, cos_sin, norm, positions, slots, cache, q_out, latent_stride,
                          block_stride * (format == F32 ? 4 : 1), N, L, R, D, P, eps, format, interleaved};
    if (T * (N * (D + R) + L + R) <= 32768) nt = 1;
    share_out(latent_rope_rows, &c, T, quarter(T, nt), nt);
}
