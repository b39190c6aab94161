/* Norms, activation, and the fused rotary embedding with its cache write. */
#include "cpu_kv_codes.h"

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

EXPORT void xllm_rms_norm(const float *x, const float *weight, float *out, int64_t T, int64_t D, float eps, int nt) {
#pragma omp parallel for num_threads(nt) schedule(static) if (T * D > 65536)
    for (int64_t t = 0; t < T; t++) norm_row(x + t * D, weight, out + t * D, D, eps);
}

EXPORT void xllm_add_rms_norm(float *x, float *residual, const float *weight, int64_t T, int64_t D, float eps, int nt) {
#pragma omp parallel for num_threads(nt) schedule(static) if (T * D > 65536)
    for (int64_t t = 0; t < T; t++) {
        float *r = residual + t * D;
        for (int64_t d = 0; d < D; d++) r[d] += x[t * D + d];
        norm_row(r, weight, x + t * D, D, eps);
    }
}

EXPORT void xllm_silu_mul(const float *gate_up, float *out, int64_t T, int64_t F, int nt) {
#pragma omp parallel for num_threads(nt) schedule(static) if (T * F > 32768)
    for (int64_t t = 0; t < T; t++) {
        const float *gate = gate_up + t * 2 * F, *up = gate + F;
        float *o = out + t * F;
        int64_t f = 0;
        for (; f + VL <= F; f += VL) {
            vf g = load(gate + f);
            store(o + f, g / (splat(1.0f) + exp_v(-g)) * load(up + f));
        }
        for (; f < F; f++) o[f] = gate[f] / (1.0f + expf(-gate[f])) * up[f];
    }
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

/* format: F32, INT8 or FP8. k_stride, v_stride: numbers of it from one block of the cache to the next. */
EXPORT void xllm_qkv_rope_write(const float *qkv, const int32_t *positions, const float *cos_sin, char *k_cache,
                                int64_t k_stride, char *v_cache, int64_t v_stride, int format, const int32_t *slots,
                                float *q_out, const float *q_norm, const float *k_norm, float eps, int64_t T, int64_t N,
                                int64_t K, int64_t H, int64_t P, int nt) {
    const int64_t item_bytes = format == F32 ? 4 : 1;
#pragma omp parallel for num_threads(nt) schedule(static) if (T * (N + 2 * K) * H > 32768)
    for (int64_t t = 0; t < T; t++) {
        const float *x = qkv + t * (N + 2 * K) * H, *angle = cos_sin + positions[t] * H;
        float normed[H], turned[H];
        for (int64_t n = 0; n < N; n++, x += H) {
            if (q_norm) norm_row(x, q_norm, normed, H, eps);
            rotate(q_norm ? normed : x, angle, q_out + (t * N + n) * H, H);
        }
        if (slots[t] < 0) continue;
        const int64_t block = slots[t] / P, offset = slots[t] % P;
        char *keys = k_cache + block * k_stride * item_bytes, *values = v_cache + block * v_stride * item_bytes;
        for (int64_t k = 0; k < K; k++, x += H) {
            if (k_norm) norm_row(x, k_norm, normed, H, eps);
            rotate(k_norm ? normed : x, angle, turned, H);
            put(turned, keys, k, offset, offset, H, P, P, format);
        }
        for (int64_t k = 0; k < K; k++, x += H) put(x, values, k, offset * H, offset, H, P, 1, format);
    }
}
