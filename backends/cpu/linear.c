/* Linear layers: y = x @ weight.T * scale + bias with fp32, int8 or fp8 (e4m3) weights, fp32 sums.
 *
 * Weights are packed once into panels [Y / PANEL][X][PANEL], so that a step of the inner loop reads one line of the
 * panel and multiplies it with R numbers of x, held in R * 2 vector registers (Goto and van de Geijn 2008). Each
 * y is one chain of multiply-adds in the order of X, whatever the number of rows: results do not depend on the batch.
 */
#include "groups.h"
#include "pool.h"

#define DEPTH 512   /* x values per pass when there are many rows: a panel's part stays in the first caches */
#define MANY_ROWS 64 /* from here on a panel of bytes is widened once for all rows */

enum { IS_FP32, IS_INT8, IS_FP8, IS_SCALED }; /* IS_SCALED: fp8 with a scale for each run of inputs */

/* The scales of the runs in a panel, [G][PANEL]. at: which of the inputs comes first. stride: from panel to panel. */
typedef struct {
    const float *scale;
    int64_t at, group, stride;
} Runs;

EXPORT int64_t xllm_panel(void) { return PANEL; }

typedef struct {
    const void *weight;
    void *packed;
    int64_t Y, X, item_bytes;
} Packing;

static void pack_panels(const void *context, int64_t begin, int64_t end) {
    const Packing *c = context;
    const void *weight = c->weight;
    void *packed = c->packed;
    const int64_t X = c->X, item_bytes = c->item_bytes;
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t y0 = panel * PANEL, n = MIN(PANEL, c->Y - y0);
        for (int64_t x = 0; x < X; x++)
            for (int64_t j = 0; j < PANEL; j++) {
                const int64_t to = (panel * X + x) * PANEL + j, from = (y0 + j) * X + x;
                if (item_bytes == 4) ((float *)packed)[to] = j < n ? ((const float *)weight)[from] : 0.0f;
                else ((int8_t *)packed)[to] = j < n ? ((const int8_t *)weight)[from] : 0;
            }
    }
}

/* weight [Y, X] (fp32 or bytes) into panels; columns past Y are zero. */
EXPORT void xllm_pack(const void *weight, void *packed, int64_t Y, int64_t X, int64_t item_bytes, int nt) {
    const Packing c = {weight, packed, Y, X, item_bytes};
    const int64_t num_panels = (Y + PANEL - 1) / PANEL;
    share_out(pack_panels, &c, num_panels, quarter(num_panels, nt), nt);
}

/* x rows [row0, row0 + R) as [depth][R]; rows past T are zero. rows: which of x they are; NULL: as they stand. */
static void pack_rows(const float *x, int64_t stride, const int32_t *rows, float *out, int64_t T, int64_t row0, int64_t X,
                      int R) {
    for (int r = 0; r < R; r++) {
        const int is_there = row0 + r < T;
        const float *in = x + (is_there && rows ? rows[row0 + r] : row0 + r) * stride;
        if (is_there)
            for (int64_t i = 0; i < X; i++) out[i * R + r] = in[i];
        else
            for (int64_t i = 0; i < X; i++) out[i * R + r] = 0.0f;
    }
}

INLINE vf widen(const int8_t *p, const int kind) { return kind == IS_INT8 ? widen_int8(p) : widen_fp8(p); }

/* How many of the inputs i, i + 1, ... up to `depth` are in the run of i, whose scales are at *scale. */
INLINE int64_t run_end(const Runs *runs, int64_t i, int64_t depth, const float **scale) {
    const int64_t run = (runs->at + i) / runs->group;
    *scale = runs->scale + run * PANEL;
    return MIN(depth, (run + 1) * runs->group - runs->at);
}

/* acc[R, B * PANEL] += x[depth, R] (outer) panels[B][depth, PANEL], for B panels that are `panel_stride` items apart. */
INLINE void product_tile(const float *x, const void *weight, int64_t depth, int64_t panel_stride, const Runs *runs,
                         float *sums, int first, const int R, const int B, const int kind) {
    vf acc[GEMM_ROWS * 2]; /* a fixed size: only such an array can live in registers */
    UNROLL for (int i = 0; i < R * 2 * B; i++) acc[i] = first ? (vf){0} : load(sums + i * VL);
    for (int64_t i = 0; i < depth;) {
        const float *scale = NULL;
        const int64_t end = kind == IS_SCALED ? run_end(runs, i, depth, &scale) : depth;
        for (; i < end; i++) {
            vf w[4];
            UNROLL for (int b = 0; b < B; b++)
                UNROLL for (int j = 0; j < 2; j++) {
                    const int64_t at = b * panel_stride + i * PANEL + j * VL;
                    w[b * 2 + j] = kind ? widen((const int8_t *)weight + at, kind) : load((const float *)weight + at);
                    if (kind == IS_SCALED) w[b * 2 + j] *= load(scale + b * runs->stride + j * VL);
                }
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int j = 0; j < 2 * B; j++) acc[r * 2 * B + j] += splat(x[i * R + r]) * w[j];
        }
    }
    UNROLL for (int i = 0; i < R * 2 * B; i++) store(sums + i * VL, acc[i]);
}

#define TILE(R, B)                                                                                         \
    (kind == IS_INT8     ? product_tile(x, weight, depth, panel_stride, runs, sums, first, R, B, IS_INT8)  \
     : kind == IS_FP8    ? product_tile(x, weight, depth, panel_stride, runs, sums, first, R, B, IS_FP8)   \
     : kind == IS_SCALED ? product_tile(x, weight, depth, panel_stride, runs, sums, first, R, B, IS_SCALED) \
                         : product_tile(x, weight, depth, panel_stride, runs, sums, first, R, B, IS_FP32))

static void product(const float *x, const void *weight, int64_t depth, int64_t panel_stride, const Runs *runs, float *sums,
                    int first, int R, int B, int kind) {
    if (B == 2) TILE(1, 2);
    else if (R == 1) TILE(1, 1);
    else if (R == 2) TILE(2, 1);
    else if (R == 3) TILE(3, 1);
    else if (R == 4) TILE(4, 1);
    else if (R == 6) TILE(6, 1);
#if GEMM_ROWS > 6
    else if (R == 8) TILE(8, 1);
    else TILE(12, 1);
#endif
}

static void finish(const Packed *p, const float *sums, float *y, int64_t row0, int64_t T, int64_t y0, int R, int width) {
    const int64_t n = MIN(width, p->Y - y0);
    const float *scale = p->kind == IS_SCALED ? NULL : p->scale;
    const int is_plain = !scale && !p->bias && n == PANEL; /* sums as they are, in whole vectors */
    for (int r = 0; r < R && row0 + r < T; r++) {
        float *out = y + (row0 + r) * p->Y + y0;
        if (is_plain) {
            store(out, load(sums + r * width));
            store(out + VL, load(sums + r * width + VL));
            continue;
        }
        for (int64_t j = 0; j < n; j++) {
            float v = sums[r * width + j];
            if (scale) v *= scale[y0 + j];
            out[j] = p->bias ? v + p->bias[y0 + j] : v;
        }
    }
}

/* A part of a panel as fp32. */
static void widen_panel(const int8_t *part, float *wide, int64_t depth, const Runs *runs, int kind) {
    for (int64_t i = 0; i < depth;) {
        const float *scale = NULL;
        const int64_t end = kind == IS_SCALED ? run_end(runs, i, depth, &scale) : depth;
        for (int64_t at = i * PANEL; at < end * PANEL; at += VL) {
            const vf w = widen(part + at, kind);
            store(wide + at, kind == IS_SCALED ? w * load(scale + at % PANEL) : w);
        }
        i = end;
    }
}

/* All rows times one panel (two panels if T is 1). rows: x packed by pack_rows, tile after tile. */
static void multiply_panel(const Packed *p, const float *rows, float *y, int64_t T, int64_t panel, int B) {
    const int64_t X = p->X, panel_stride = X * PANEL;
    const char *weight = (const char *)p->weight + panel * panel_stride * (p->kind ? 1 : 4);
    const int64_t num_runs = p->kind == IS_SCALED ? (X + p->group - 1) / p->group : 0;
    Runs runs = {p->scale + panel * num_runs * PANEL, 0, p->group, num_runs * PANEL};
    float sums_few[GEMM_ROWS * PANEL * 2];
    if (T <= GEMM_ROWS) {
        const int R = tile_rows(T);
        product(rows, weight, X, panel_stride, &runs, sums_few, 1, R, B, p->kind);
        finish(p, sums_few, y, 0, T, panel * PANEL, R, B * PANEL);
        return;
    }
    const int widened = p->kind && T >= MANY_ROWS;
    const int64_t num_tiles = (T + GEMM_ROWS - 1) / GEMM_ROWS;
    float *sums = scratch(0, num_tiles * GEMM_ROWS * PANEL + DEPTH * PANEL), *wide = sums + num_tiles * GEMM_ROWS * PANEL;
    for (int64_t d = 0; d < X; d += DEPTH) {
        const int64_t depth = MIN(DEPTH, X - d);
        const void *part = weight + d * PANEL * (p->kind ? 1 : 4);
        runs.at = d;
        if (widened) {
            widen_panel(part, wide, depth, &runs, p->kind);
            part = wide;
        }
        for (int64_t row0 = 0; row0 < T;) {
            const int R = tile_rows(T - row0);
            product(rows + row0 * X + d * R, part, depth, 0, &runs, sums + row0 * PANEL, d == 0, R, 1, widened ? IS_FP32 : p->kind);
            if (d + depth == X) finish(p, sums + row0 * PANEL, y, row0, T, panel * PANEL, R, PANEL);
            row0 += R;
        }
    }
}

typedef struct {
    const Packed *p;
    const float *x;
    int64_t stride;
    float *rows, *y;
    int64_t T;
    int B;
} Product;

static void pack_tiles(const void *context, int64_t begin, int64_t end) {
    const Product *c = context;
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t row0 = tile * GEMM_ROWS;
        pack_rows(c->x, c->stride, NULL, c->rows + row0 * c->p->X, c->T, row0, c->p->X,
                  tile_rows(c->T - row0));
    }
}

static void multiply_jobs(const void *context, int64_t begin, int64_t end) {
    const Product *c = context;
    for (int64_t job = begin; job < end; job++) multiply_panel(c->p, c->rows, c->y, c->T, job * c->B, c->B);
}

/* y [T, Y]; x [T, X] with rows `stride` apart. */
EXPORT void xllm_linear(const Packed *p, const float *x, int64_t stride, float *y, int64_t T, int nt) {
    if (T == 0) return;
    const int64_t X = p->X, num_panels = (p->Y + PANEL - 1) / PANEL, num_tiles = (T + GEMM_ROWS - 1) / GEMM_ROWS;
    float *rows = scratch(1, num_tiles * GEMM_ROWS * X);
    const int B = T == 1 ? 2 : 1;
    const int64_t num_jobs = num_panels / B, chunk = MAX(1, num_jobs / (8 * nt));
    const Product c = {p, x, stride, rows, y, T, B};
    if (T * X * p->Y <= 65536) nt = 1;
    share_out(pack_tiles, &c, num_tiles, quarter(num_tiles, nt), nt);
    share_out(multiply_jobs, &c, num_jobs, chunk, nt);
    if (num_jobs * B < num_panels) multiply_panel(p, rows, y, T, num_panels - 1, 1);
}

static void pack_group_tiles(const void *context, int64_t begin, int64_t end) {
    const Groups *g = context;
    for (int64_t tile = begin; tile < end; tile++) {
        const Hit *hit = g->hits + g->tiles[tile].hit;
        const int64_t X = hit->p->X, row = g->tiles[tile].row;
        pack_rows(g->rows ? g->x : g->x + hit->begin * g->stride, g->stride, g->rows ? g->rows + hit->begin : NULL,
                  (float *)g->packed + (hit->tile * GEMM_ROWS + row) * X, hit->count, row, X, tile_rows(hit->count - row));
    }
}

/* A job is two panels of one expert. */
static void multiply_groups(const void *context, int64_t begin, int64_t end) {
    const Groups *g = context;
    const int64_t X = g->hits->p->X, Y = g->hits->p->Y, num_panels = (Y + PANEL - 1) / PANEL, pairs = (num_panels + 1) / 2;
    for (int64_t job = begin; job < end; job++) {
        const Hit *hit = g->hits + job / pairs;
        const int64_t panel = job % pairs * 2;
        const float *rows = (const float *)g->packed + hit->tile * GEMM_ROWS * X;
        float *y = g->y + hit->begin * Y;
        if (hit->count == 1 && panel + 1 < num_panels) multiply_panel(hit->p, rows, y, 1, panel, 2);
        else
            for (int64_t i = panel; i < MIN(panel + 2, num_panels); i++) multiply_panel(hit->p, rows, y, hit->count, i, 1);
    }
}

/* y [R, Y]: each row times the weight of its expert. See `Groups` for x and rows, `find_groups` for starts. */
EXPORT void xllm_grouped_linear(const Packed *experts, int64_t E, const int64_t *starts, const float *x, int64_t stride,
                                const int32_t *rows, float *y, int nt) {
    if (starts[E] == 0) return;
    Groups g = find_groups(experts, E, starts);
    const int64_t X = experts->X, num_jobs = g.num_hits * ((experts->Y + 2 * PANEL - 1) / (2 * PANEL));
    g.x = x, g.stride = stride, g.rows = rows, g.y = y;
    g.packed = scratch(1, g.num_tiles * GEMM_ROWS * X);
    if (starts[E] * X * experts->Y <= 65536) nt = 1;
    share_out(pack_group_tiles, &g, g.num_tiles, quarter(g.num_tiles, nt), nt);
    share_out(multiply_groups, &g, num_jobs, MAX(1, num_jobs / (8 * nt)), nt);
}
