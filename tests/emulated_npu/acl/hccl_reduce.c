/* Reductions of HCCL, in the order of the ranks, rounded to the type after each. */
#include "hccl.h"

#include <math.h>

size_t size_of(HcclDataType type) {
    switch (type) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_UINT32: case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
    default: return 0;
    }
}
/* The documents of a 910B: no unsigned numbers and no float64, and no products of int16 and bfloat16. */
bool can_reduce(HcclDataType type, HcclReduceOp op) {
    switch (type) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_FP32: return true;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_BFP16: return op != HCCL_REDUCE_PROD;
    default: return false;
    }
}

static float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static float from_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }
static uint16_t to_bf16(float f) {
    const uint32_t bits = float_to_bits(f);
    if (isnan(f)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float from_fp16(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
    const float size = exponent ? ldexpf((float)(fraction | 0x400), (int)exponent - 25) : ldexpf((float)fraction, -24);
    return sign ? -size : size;
}
static uint16_t to_fp16(float f) {
    const uint32_t bits = float_to_bits(f);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const float size = fabsf(f);
    if (isnan(f)) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | (uint16_t)rintf(size * 0x1p24f); /* subnormal */
    const uint32_t rest = bits & 0x7fffffff, rounded = rest + 0xfff + (rest >> 13 & 1);
    return sign | (uint16_t)((rounded >> 13) - (112 << 10));
}

#define COMBINE(a, b) (op == HCCL_REDUCE_SUM ? (a) + (b) : op == HCCL_REDUCE_PROD ? (a) * (b) : op == HCCL_REDUCE_MAX ? ((a) > (b) ? (a) : (b)) : ((a) < (b) ? (a) : (b)))
static float combine(float a, float b, HcclReduceOp op) {
    if (isnan(a) || isnan(b)) return NAN;
    return COMBINE(a, b);
}
#define WHOLE(type, wide) do { \
        type *x = into; const type *y = from; \
        for (uint64_t i = 0; i < count; i++) x[i] = (type)COMBINE((wide)x[i], (wide)y[i]); \
    } while (0)
#define HALF(read, write) do { \
        uint16_t *x = into; const uint16_t *y = from; \
        for (uint64_t i = 0; i < count; i++) x[i] = write(combine(read(x[i]), read(y[i]), op)); \
    } while (0)

void reduce(void *into, const void *from, uint64_t count, HcclDataType type, HcclReduceOp op) {
    switch (type) {
    case HCCL_DATA_TYPE_INT8: WHOLE(int8_t, int32_t); break;
    case HCCL_DATA_TYPE_INT16: WHOLE(int16_t, int32_t); break;
    case HCCL_DATA_TYPE_INT32: /* sums wrap, which is undefined for signed numbers; their order is not */
        if (op == HCCL_REDUCE_SUM || op == HCCL_REDUCE_PROD) WHOLE(uint32_t, uint32_t);
        else WHOLE(int32_t, int32_t);
        break;
    case HCCL_DATA_TYPE_INT64:
        if (op == HCCL_REDUCE_SUM || op == HCCL_REDUCE_PROD) WHOLE(uint64_t, uint64_t);
        else WHOLE(int64_t, int64_t);
        break;
    case HCCL_DATA_TYPE_FP16: HALF(from_fp16, to_fp16); break;
    case HCCL_DATA_TYPE_BFP16: HALF(from_bf16, to_bf16); break;
    case HCCL_DATA_TYPE_FP32: {
        float *x = into;
        const float *y = from;
        for (uint64_t i = 0; i < count; i++) x[i] = combine(x[i], y[i], op);
        break;
    }
    default: break;
    }
}
