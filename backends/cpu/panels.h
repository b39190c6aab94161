/* What the linear layers of all kinds share: the packed weight, and how many rows a tile of its product has. */
#pragma once
#include "vectors.h"

/* `Packed` of structs.py. kind: the number format of the weight, where more than one is possible. group: how many inputs
 * share a scale, where not all of an output do. */
typedef struct {
    const void *weight;
    const float *scale, *bias; /* or NULL */
    int64_t X, Y;
    int32_t kind, group;
} Packed;

/* How many rows the next tile takes when `left` rows are left; tiles hold at least as many rows as are left or are full. */
static inline int tile_rows(int64_t left) {
    static const int sizes[] = {1, 2, 3, 4, 6, 8, 12};
    if (left >= GEMM_ROWS) return GEMM_ROWS;
    int i = 0;
    while (sizes[i] < left) i++;
    return sizes[i];
}
