/* The threads of the CPU's operators: `share_out` runs a function over a range on several of them. See pool.c. */
#pragma once
#include <stdint.h>

/* Do the items from `begin` to `end`. context: what `share_out` was given. */
typedef void Range(const void *context, int64_t begin, int64_t end);

/* Call `range` for parts of [0, n) of at most `chunk` items, on the caller and up to num_threads - 1 others; returns when
 * all are done. Who does a part is undefined, so no item may depend on it. */
void share_out(Range *range, const void *context, int64_t n, int64_t chunk, int num_threads);

/* A chunk that gives each thread four parts: one that the system holds back leaves the rest to the others. */
static inline int64_t quarter(int64_t n, int num_threads) {
    const int64_t chunk = n / (4 * (int64_t)num_threads);
    return chunk > 1 ? chunk : 1;
}
