/* Vectors, exponentials and scratch memory for the CPU's compiled operators.
 *
 * The operators are called through ctypes (kernels.py). Contracts: opset.py. Cache layout: reference/kv.py.
 *
 * Plain C with GNU vector types, so that one source serves AVX-512, AVX2 and NEON. All tensors are fp32 and rows are
 * contiguous. A row's result never depends on the rows around it: the order of its sums is fixed by its own length.
 * Nothing here assumes finite maths: NaN in an input reaches the output that depends on it, and no other.
 *
 * Letters: T tokens, S sequences, N query heads, K kv heads, G = N / K, H head dim, P tokens per block, V vocabulary.
 */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h> /* compilers widen bytes badly by themselves */
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#if defined(__AVX__) && !defined(__AVX512F__)
#define GEMM_ROWS 6 /* 16 registers */
#define PV_ROWS 2
#else
#define GEMM_ROWS 12 /* 32 registers */
#define PV_ROWS 4
#endif
#define PANEL (2 * VL)
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 16")
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef int8_t vb __attribute__((vector_size(VL), aligned(1), may_alias));

INLINE vf load(const float *p) { return *(const vf_any *)p; }
INLINE void store(float *p, vf v) { *(vf_any *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf blend(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE float sum(vf v) {
    float s = 0;
    for (int i = 0; i < VL; i++) s += v[i];
    return s;
}
INLINE float largest(vf v) {
    float m = v[0];
    for (int i = 1; i < VL; i++) m = v[i] > m ? v[i] : m;
    return m;
}
INLINE vi iota(void) {
    vi v;
    for (int i = 0; i < VL; i++) v[i] = i;
    return v;
}

/* 2^x to 2 ulp for x in [-126, 127], clamped below: x = n + f, |f| <= 1/2, Taylor series of 2^f, n into the exponent. */
INLINE vf exp2_v(vf x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = blend(x < splat(-126.0f), splat(-126.0f), x);
    vf shifted = x + splat(magic);
    vf f = x - (shifted - splat(magic));
    vf y = splat(1.5403530e-4f);
    y = y * f + splat(1.3333558e-3f);
    y = y * f + splat(9.6181291e-3f);
    y = y * f + splat(5.5504109e-2f);
    y = y * f + splat(2.4022651e-1f);
    y = y * f + splat(6.9314718e-1f);
    y = y * f + splat(1.0f);
    return (vf)((vi)y + (((vi)shifted - (vi)splat(magic)) << 23));
}

/* e^x, relative error below 1e-6 over the whole range: ln 2 in two parts (Cody and Waite), then 2^f. Exactly 0 below -87. */
INLINE vf exp_v(vf x) {
    const float magic = 12582912.0f;
    x = blend(x > splat(88.0f), splat(88.0f), x);
    vf shifted = x * splat(1.44269504f) + splat(magic);
    vf n = shifted - splat(magic);
    vf r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
    vf y = exp2_v(r * splat(1.44269504f));
    y = (vf)((vi)y + (((vi)shifted - (vi)splat(magic)) << 23));
    return blend(x < splat(-87.0f), splat(0.0f), y);
}

/* Eight bits of e4m3 as they stand in half precision or fp32 have an exponent that is too small by the difference of the
 * biases, subnormal numbers too; multiplying with FP8_UNIT mends it exactly. NaN has no code here: it is in the scale. */
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
#define FP8_UNIT 256.0f
#else
#define FP8_UNIT 1.0f
#endif
INLINE vf widen_fp8_raw(const int8_t *p) {
#if defined(__AVX512F__)
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
    return (vf)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80)));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p));
    return (vf)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbf80)));
#else
    const vi bits = (__builtin_convertvector(*(const vb *)p, vi) << 20) & (int32_t)0x87f00000;
    return (vf)bits * splat(0x1p120f);
#endif
}
INLINE vf widen_fp8(const int8_t *p) { return widen_fp8_raw(p) * splat(FP8_UNIT); }

INLINE vf widen_int8(const int8_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const vb *)p, vi), vf);
#endif
}

/* Memory that belongs to the calling thread and only grows. */
static inline float *scratch(int which, size_t num_floats) {
    static __thread float *memory[3];
    static __thread size_t size[3];
    if (size[which] < num_floats) {
        free(memory[which]);
        size_t bytes = (num_floats * 4 + 4095) / 4096 * 4096;
        if (posix_memalign((void **)&memory[which], 64, bytes)) abort();
        size[which] = bytes / 4;
    }
    return memory[which];
}
