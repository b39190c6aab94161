/* Which experts have rows, and in which tiles those are packed: what the grouped products of linear.c and w8a8.c share. */
#pragma once
#include "panels.h"

/* Rows `begin` to `begin + count` of the result are products with p. They lie packed from tile number `tile` on. */
typedef struct {
    const Packed *p;
    int64_t begin, count, tile;
} Hit;

/* The tile that begins with row number `row` of a hit. */
typedef struct {
    int32_t hit, row;
} Tile;

/* x: rows `stride` apart; row i of the result is made of x[rows[i]], or of x[i] if rows is NULL. packed: GEMM_ROWS rows a
 * tile. */
typedef struct {
    const float *x;
    int64_t stride;
    const int32_t *rows;
    float *y;
    Hit *hits;
    Tile *tiles;
    int64_t num_hits, num_tiles;
    void *packed;
} Groups;

/* The groups of rows that are sorted by expert: those of expert e end where starts[e + 1] says. They are in scratch memory
 * number 2 of the calling thread. */
static inline Groups find_groups(const Packed *experts, int64_t E, const int64_t *starts) {
    Groups g = {0};
    for (int64_t e = 0; e < E; e++) {
        const int64_t count = starts[e + 1] - starts[e];
        g.num_hits += count > 0;
        g.num_tiles += (count + GEMM_ROWS - 1) / GEMM_ROWS;
    }
    g.hits = (Hit *)scratch(2, (g.num_hits * sizeof(Hit) + g.num_tiles * sizeof(Tile)) / 4 + 1);
    g.tiles = (Tile *)(g.hits + g.num_hits);
    int64_t hit = 0, tile = 0;
    for (int64_t e = 0; e < E; e++) {
        const int64_t count = starts[e + 1] - starts[e];
        if (count == 0) continue;
        g.hits[hit] = (Hit){experts + e, starts[e], count, tile};
        for (int64_t row = 0; row < count; row += GEMM_ROWS) g.tiles[tile++] = (Tile){(int32_t)hit, (int32_t)row};
        hit++;
    }
    return g;
}
