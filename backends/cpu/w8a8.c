/* Linear layers whose weights and activations are both int8: exact int32 sums, then the scales.
 *
 * x is brought to int8 row by row as `Linear` in opset.py says. Weights lie in panels [Y / PANEL][X / 4][PANEL][4]: an
 * int32 lane holds four consecutive codes of one output, and is multiplied with the same four of x, repeated in every
 * lane. Sums of integers do not depend on their order, so that tiles of any size give the same bits.
 */
#include "groups.h"
#include "pool.h"

typedef int16_t vh __attribute__((vector_size(VL * 4)));
typedef int8_t vc __attribute__((vector_size(VL * 4), aligned(1), may_alias));
typedef int32_t vi_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t int_any __attribute__((may_alias));

/* VNNI multiplies unsigned bytes with signed ones: weights are stored with 128 added, and each sum starts at -128 times
 * the sum of its row of x. Elsewhere codes are widened to 16 bits, even ones and odd ones of a lane apart. */
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define OFFSET 128
#define WORDS 1 /* int32 of x for four codes */
#else
#define OFFSET 0
#define WORDS 2
#endif

INLINE vi splat_int(int32_t x) { return x - (vi){0}; }

/* pairs of products of 16-bit numbers, added */
INLINE vi multiply_pairs(vi a, vi b) {
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* acc[lane] += the sum of four products; x: WORDS numbers */
INLINE vi add_products(vi acc, vi weight, const int32_t *x) {
#if OFFSET
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weight, _mm512_set1_epi32(x[0]));
#else
    const vi even = (vi)(((vh)weight << 8) >> 8), odd = (vi)((vh)weight >> 8);
    return acc + multiply_pairs(even, splat_int(x[0])) + multiply_pairs(odd, splat_int(x[1]));
#endif
}

typedef struct {
    const int8_t *weight;
    uint8_t *packed;
    int64_t Y, X;
} Packing;

static void pack_panels(const void *context, int64_t begin, int64_t end) {
    const Packing *c = context;
    const int8_t *weight = c->weight;
    uint8_t *packed = c->packed;
    const int64_t Y = c->Y, X = c->X, num_fours = (X + 3) / 4;
    for (int64_t panel = begin; panel < end; panel++)
        for (int64_t j = 0; j < PANEL; j++) {
            const int64_t y = panel * PANEL + j;
            for (int64_t x = 0; x < num_fours * 4; x++)
                packed[((panel * num_fours + x / 4) * PANEL + j) * 4 + x % 4] =
                    (y < Y && x < X ? weight[y * X + x] : 0) + OFFSET;
        }
}

/* weight int8 [Y, X] into panels; what is past Y and X is zero. */
EXPORT void xllm_pack_w8a8(const int8_t *weight, uint8_t *packed, int64_t Y, int64_t X, int nt) {
    const Packing c = {weight, packed, Y, X};
    const int64_t num_panels = (Y + PANEL - 1) / PANEL;
    share_out(pack_panels, &c, num_panels, quarter(num_panels, nt), nt);
}

/* codes [X], which are zeros before, and the row's scale. */
static float quantise_row(const float *x, int8_t *codes, int64_t X) {
    const int_any *bits = (const int_any *)x; /* without the sign they are in the order of the sizes, NaN the largest */
    int32_t size = 0;
    for (int64_t i = 0; i < X; i++) size = MAX(size, bits[i] & 0x7fffffff);
    float largest;
    memcpy(&largest, &size, 4);
    const int finite = size < 0x7f800000;
    const float factor = finite && largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
    if (factor != 0.0f)
        for (int64_t i = 0; i < X; i++) codes[i] = (int8_t)(int32_t)__builtin_rintf(x[i] * factor);
    return finite ? largest * (float)(1.0 / 127) : NAN;
}

/* Of one tile of x: what R sums start with, R scales, then [num_fours][R][WORDS] codes. */
INLINE int64_t tile_words(int64_t R, int64_t num_fours) { return R * (2 + num_fours * WORDS); }

/* from: which rows of x they are; NULL: the first ones. */
static void pack_tile(const float *x, int64_t stride, const int32_t *from, int32_t *tile, int64_t X, int rows, int R) {
    const int64_t num_fours = (X + 3) / 4;
    int32_t *own = (int32_t *)scratch(0, num_fours);
    for (int r = 0; r < R; r++) {
        float scale = 0.0f;
        memset(own, 0, num_fours * 4);
        if (r < rows) scale = quantise_row(x + (from ? from[r] : r) * stride, (int8_t *)own, X);
        memcpy(tile + R + r, &scale, 4);
        uint32_t total = 0; /* as sums do, it may wrap around */
        for (int64_t i = 0; i < num_fours * 4; i++) total += ((const int8_t *)own)[i];
        tile[r] = (int32_t)(0 - OFFSET * total);
        int32_t *to = tile + 2 * R + r * WORDS;
        for (int64_t i = 0; i < num_fours; i++) {
#if OFFSET
            to[i * R] = own[i];
#else
            const int8_t *c = (const int8_t *)(own + i);
            to[i * R * 2] = (c[0] & 0xffff) | (int32_t)((uint32_t)c[2] << 16);
            to[i * R * 2 + 1] = (c[1] & 0xffff) | (int32_t)((uint32_t)c[3] << 16);
#endif
        }
    }
}

/* sums[R, B * PANEL] of R rows and B panels that are num_fours * PANEL lanes apart. */
INLINE void product_tile(const int32_t *tile, const int32_t *weight, int64_t num_fours, int32_t *sums, const int R,
                         const int B) {
    const int32_t *x = tile + 2 * R;
    vi acc[GEMM_ROWS * 2]; /* a fixed size: only such an array can live in registers */
    UNROLL for (int i = 0; i < R * 2 * B; i++) acc[i] = splat_int(tile[i / (2 * B)]);
    for (int64_t i = 0; i < num_fours; i++)
        UNROLL for (int j = 0; j < 2 * B; j++) {
            const vi w = *(const vi_any *)(weight + (j / 2) * num_fours * PANEL + i * PANEL + j % 2 * VL);
            UNROLL for (int r = 0; r < R; r++) {
                acc[r * 2 * B + j] = add_products(acc[r * 2 * B + j], w, x + (i * R + r) * WORDS);
            }
        }
    UNROLL for (int i = 0; i < R * 2 * B; i++) *(vi_any *)(sums + i * VL) = acc[i];
}

static void product(const int32_t *tile, const int32_t *weight, int64_t num_fours, int32_t *sums, int R, int B) {
    if (B == 4) product_tile(tile, weight, num_fours, sums, 1, 4);
    else if (B == 2) product_tile(tile, weight, num_fours, sums, 2, 2);
    else if (R == 1) product_tile(tile, weight, num_fours, sums, 1, 1);
    else if (R == 2) product_tile(tile, weight, num_fours, sums, 2, 1);
    else if (R == 3) product_tile(tile, weight, num_fours, sums, 3, 1);
    else if (R == 4) product_tile(tile, weight, num_fours, sums, 4, 1);
    else if (R == 6) product_tile(tile, weight, num_fours, sums, 6, 1);
#if GEMM_ROWS > 6
    else if (R == 8) product_tile(tile, weight, num_fours, sums, 8, 1);
    else product_tile(tile, weight, num_fours, sums, 12, 1);
#endif
}

static void finish(const Packed *p, const int32_t *sums, const int32_t *scales, float *y, int64_t y0, int rows,
                   int width) {
    const int64_t n = MIN(width, p->Y - y0);
    for (int r = 0; r < rows; r++) {
        float *out = y + r * p->Y + y0, scale;
        memcpy(&scale, scales + r, 4);
        for (int64_t j = 0; j < n; j++) {
            const float v = (float)sums[r * width + j] * scale * p->scale[y0 + j];
            out[j] = p->bias ? v + p->bias[y0 + j] : v;
        }
    }
}

/* All rows times B panels. */
static void multiply_panels(const Packed *p, const int32_t *tiles, float *y, int64_t T, int64_t panel, int B) {
    const int64_t num_fours = (p->X + 3) / 4;
    const int32_t *weight = (const int32_t *)p->weight + panel * num_fours * PANEL;
    int32_t sums[GEMM_ROWS * PANEL];
    for (int64_t row0 = 0; row0 < T;) {
        const int R = tile_rows(T - row0);
        product(tiles, weight, num_fours, sums, R, B);
        finish(p, sums, tiles + R, y + row0 * p->Y, panel * PANEL, MIN(R, T - row0), B * PANEL);
        tiles += tile_words(R, num_fours);
        row0 += R;
    }
}

typedef struct {
    const Packed *p;
    const float *x;
    int64_t stride;
    int32_t *tiles;
    float *y;
    int64_t T, num_panels;
    int B;
} Product;

static void pack_tiles(const void *context, int64_t begin, int64_t end) {
    const Product *c = context;
    const int64_t words = tile_words(GEMM_ROWS, (c->p->X + 3) / 4);
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t row0 = tile * GEMM_ROWS, left = MIN(GEMM_ROWS, c->T - row0);
        pack_tile(c->x + row0 * c->stride, c->stride, NULL, c->tiles + tile * words, c->p->X, left, tile_rows(left));
    }
}

static void multiply_jobs(const void *context, int64_t begin, int64_t end) {
    const Product *c = context;
    for (int64_t job = begin; job < end; job++) {
        const int64_t panel = job * c->B, left = c->num_panels - panel;
        if (left >= c->B) multiply_panels(c->p, c->tiles, c->y, c->T, panel, c->B);
        else
            for (int64_t i = 0; i < left; i++) multiply_panels(c->p, c->tiles, c->y, c->T, panel + i, 1);
    }
}

/* y [T, Y]; x [T, X] with rows `stride` apart. */
EXPORT void xllm_linear_w8a8(const Packed *p, const float *x, int64_t stride, float *y, int64_t T, int nt) {
    if (T == 0) return;
    const int64_t num_panels = (p->Y + PANEL - 1) / PANEL, num_tiles = (T + GEMM_ROWS - 1) / GEMM_ROWS;
    const int64_t words = tile_words(GEMM_ROWS, (p->X + 3) / 4);
    int32_t *tiles = (int32_t *)scratch(1, num_tiles * words);
    const int B = T == 1 ? 4 : T == 2 ? 2 : 1; /* as many panels as keep the multipliers busy */
    const int64_t num_jobs = (num_panels + B - 1) / B, chunk = MAX(1, num_jobs / (8 * nt));
    const Product c = {p, x, stride, tiles, y, T, num_panels, B};
    if (T * p->X * p->Y <= 262144) nt = 1;
    share_out(pack_tiles, &c, num_tiles, quarter(num_tiles, nt), nt);
    share_out(multiply_jobs, &c, num_jobs, chunk, nt);
}

static void pack_group_tiles(const void *context, int64_t begin, int64_t end) {
    const Groups *g = context;
    const int64_t X = g->hits->p->X, words = tile_words(GEMM_ROWS, (X + 3) / 4);
    for (int64_t tile = begin; tile < end; tile++) {
        const Hit *hit = g->hits + g->tiles[tile].hit;
        const int64_t first = hit->begin + g->tiles[tile].row, left = MIN(GEMM_ROWS, hit->begin + hit->count - first);
        pack_tile(g->rows ? g->x : g->x + first * g->stride, g->stride, g->rows ? g->rows + first : NULL,
                  (int32_t *)g->packed + tile * words, X, left, tile_rows(left));
    }
}

/* A job is four panels of one expert. */
static void multiply_groups(const void *context, int64_t begin, int64_t end) {
    const Groups *g = context;
    const int64_t Y = g->hits->p->Y, num_panels = (Y + PANEL - 1) / PANEL, fours = (num_panels + 3) / 4;
    const int64_t words = tile_words(GEMM_ROWS, (g->hits->p->X + 3) / 4);
    for (int64_t job = begin; job < end; job++) {
        const Hit *hit = g->hits + job / fours;
        const int32_t *tiles = (const int32_t *)g->packed + hit->tile * words;
        const int64_t last = MIN((job % fours + 1) * 4, num_panels);
        const int B = hit->count == 1 ? 4 : hit->count == 2 ? 2 : 1;
        for (int64_t panel = job % fours * 4; panel < last;) {
            const int width = last - panel >= B ? B : 1;
            multiply_panels(hit->p, tiles, g->y + hit->begin * Y, hit->count, panel, width);
            panel += width;
        }
    }
}

/* y [R, Y]: each row times the weight of its expert. See `Groups` for x and rows, `find_groups` for starts. */
EXPORT void xllm_grouped_linear_w8a8(const Packed *experts, int64_t E, const int64_t *starts, const float *x,
                                     int64_t stride, const int32_t *rows, float *y, int nt) {
    if (starts[E] == 0) return;
    Groups g = find_groups(experts, E, starts);
    const int64_t X = experts->X, num_jobs = g.num_hits * ((experts->Y + 4 * PANEL - 1) / (4 * PANEL));
    g.x = x, g.stride = stride, g.rows = rows, g.y = y;
    g.packed = scratch(1, g.num_tiles * tile_words(GEMM_ROWS, (X + 3) / 4));
    if (starts[E] * X * experts->Y <= 262144) nt = 1;
    share_out(pack_group_tiles, &g, g.num_tiles, quarter(g.num_tiles, nt), nt);
    share_out(multiply_groups, &g, num_jobs, MAX(1, num_jobs / (8 * nt)), nt);
}
