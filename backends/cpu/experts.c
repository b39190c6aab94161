/* Mixtures of experts: which experts a token has, its rows in the order of the experts, and their sum.
 *
 * The products are in linear.c and w8a8.c. Letters: T tokens, E experts, K experts a token, R = T * K rows.
 */
#include "pool.h"
#include "vectors.h"

/* `RouteStruct` of kernels.py; what they mean: `RouteRule` of expert_choice.py. */
typedef struct {
    const float *logits, *bias; /* bias: or NULL */
    int32_t *ids;
    float *weights;
    int64_t T, E, K, sigmoid, num_groups, num_kept_groups, summed_per_group, renormalise;
    float scale;
} Route;

/* The places of the `count` largest of n values, the first of equals first; the sum of those values. Marks them as NaN. */
static float choose(float *values, int64_t n, int64_t count, int32_t *places) {
    float total = 0.0f;
    for (int64_t k = 0; k < count; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++)
            if (values[i] == values[i] && (best < 0 || values[i] > values[best])) best = i;
        if (best < 0) best = 0;
        places[k] = (int32_t)best;
        total += values[best];
        values[best] = NAN;
    }
    return total;
}

/* scores [E], room for whole vectors; 0 if there is one that is not a number. */
static int score(const Route *c, const float *logits, float *scores) {
    const int64_t E = c->E, padded = (E + VL - 1) / VL * VL;
    float largest = -INFINITY, total = 0.0f;
    int good = 1;
    for (int64_t e = 0; e < E; e++) {
        good &= logits[e] == logits[e];
        largest = MAX(largest, logits[e]);
    }
    if (!good || (!c->sigmoid && (largest == INFINITY || largest == -INFINITY))) return 0;
    for (int64_t e = 0; e < padded; e++) scores[e] = e < E ? logits[e] : -INFINITY;
    if (c->sigmoid) {
        for (int64_t e = 0; e < padded; e += VL)
            store(scores + e, splat(1.0f) / (splat(1.0f) + exp_v(splat(0.0f) - load(scores + e))));
        return 1;
    }
    for (int64_t e = 0; e < padded; e += VL) store(scores + e, exp_v(load(scores + e) - splat(largest)));
    for (int64_t e = 0; e < E; e++) total += scores[e];
    for (int64_t e = 0; e < E; e++) scores[e] /= total;
    return 1;
}

/* -inf for all that are not of the best groups. room: for E values, G merits, and G places. */
static void keep_groups(const Route *c, float *wanted, float *room) {
    const int64_t G = c->num_groups, width = c->E / G, summed = MIN(c->summed_per_group, width);
    float *merits = room + c->E;
    int32_t *places = (int32_t *)(merits + G);
    memcpy(room, wanted, c->E * 4);
    for (int64_t g = 0; g < G; g++) {
        int32_t unused[width];
        merits[g] = choose(room + g * width, width, summed, unused);
    }
    choose(merits, G, c->num_kept_groups, places);
    for (int64_t g = 0; g < G; g++)
        if (merits[g] == merits[g])
            for (int64_t i = 0; i < width; i++) wanted[g * width + i] = -INFINITY;
}

static void route_tokens(const void *context, int64_t begin, int64_t end) {
    const Route *c = context;
    const int64_t E = c->E, K = c->K, padded = (E + VL - 1) / VL * VL;
    float *scores = scratch(0, 3 * padded + 2 * c->num_groups), *wanted = scores + padded, *room = wanted + padded;
    for (int64_t t = begin; t < end; t++) {
        int32_t *ids = c->ids + t * K;
        float *weights = c->weights + t * K, total = 0.0f;
        if (!score(c, c->logits + t * E, scores)) {
            for (int64_t k = 0; k < K; k++) {
                ids[k] = (int32_t)k;
                weights[k] = NAN;
            }
            continue;
        }
        for (int64_t e = 0; e < E; e++) wanted[e] = c->bias ? scores[e] + c->bias[e] : scores[e];
        if (c->num_groups > 1) keep_groups(c, wanted, room);
        choose(wanted, E, K, ids);
        for (int64_t k = 0; k < K; k++) total += scores[ids[k]];
        const float divisor = c->renormalise ? total + 1e-20f : 1.0f;
        for (int64_t k = 0; k < K; k++) weights[k] = scores[ids[k]] / divisor * c->scale;
    }
}

EXPORT void xllm_route(const Route *c, int nt) { share_out(route_tokens, c, c->T, quarter(c->T, nt), c->T < 32 ? 1 : nt); }

/* Sort the rows of ids [T, K] by expert, in their order: tokens[i] is whose row stands at place i, places [T, K] the reverse,
 * and those of expert e end at starts[e + 1]. */
EXPORT void xllm_sort_rows(const int32_t *ids, int64_t T, int64_t K, int64_t E, int64_t *starts, int32_t *tokens,
                           int32_t *places) {
    memset(starts, 0, (E + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < T * K; i++) starts[ids[i] + 1]++;
    for (int64_t e = 0; e < E; e++) starts[e + 1] += starts[e];
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++) {
            const int64_t place = starts[ids[t * K + k]]++;
            tokens[place] = (int32_t)t;
            places[t * K + k] = (int32_t)place;
        }
    memmove(starts + 1, starts, E * sizeof(int64_t)); /* each was moved on to its end, which is the next one's start */
    starts[0] = 0;
}

typedef struct {
    const float *y, *weights;
    const int32_t *places;
    float *out;
    int64_t K, X;
} Sum;

static void sum_rows(const void *context, int64_t begin, int64_t end) {
    const Sum *c = context;
    for (int64_t t = begin; t < end; t++) {
        float *out = c->out + t * c->X;
        for (int64_t k = 0; k < c->K; k++) {
            const float *y = c->y + c->places[t * c->K + k] * c->X, weight = c->weights[t * c->K + k];
            if (k == 0)
                for (int64_t i = 0; i < c->X; i++) out[i] = weight * y[i];
            else
                for (int64_t i = 0; i < c->X; i++) out[i] += weight * y[i];
        }
    }
}

/* out [T, X]: the weighted sum of each token's rows of y [R, X], which stand at `places`. */
EXPORT void xllm_combine(const float *y, const int32_t *places, const float *weights, float *out, int64_t T, int64_t K,
                         int64_t X, int nt) {
    const Sum c = {y, weights, places, out, K, X};
    if (T * K * X <= 16384) nt = 1;
    share_out(sum_rows, &c, T, quarter(T, nt), nt);
}
