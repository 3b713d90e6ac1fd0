/* Reading and drawing rows of logits where they lie, for CPUs. Of each group of columns

       peak = max x        mass = sum e^(x - peak)        tilt = sum e^(x - peak) (x - peak)

   and of a group that won, the column at which the running sum of e^(x - peak) passes a given share of the whole.
   Sums run over 64 lanes in a fixed order, never reassociated, so they are the same for any number of threads and in
   any batch. A NaN or +inf in a group makes its mass NaN. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 64
#define FEW 32 /* columns that are summed one after another */
#define SIZE 1024 /* of the widest group */

enum { FLOAT32, BFLOAT16, FLOAT16 };

struct term;

/* What is done to a row on its way, in this order; see kernels/rows.py. */
struct rows {
    const void *base;
    const int64_t *offset; /* (count) where each row begins, in elements */
    int64_t kind, stride, width, size, count, threads;
    const int64_t *hidden; /* (hidden_count) columns set to -inf */
    int64_t hidden_count;
    const int64_t *own; /* (count) a column to which shift is added, or NULL */
    const float *shift;
    float temperature;
    const float *floor; /* (count) what a logit must reach, or NULL */
    float weight; /* of the row in a sum with the terms */
    int64_t term_count;
    const struct term *terms;
};

struct term {
    const struct rows *rows;
    float weight;
};

/* a b + c, rounded once where the processor does that in one step: there AVX-512, AVX2 and NEON give the same numbers,
   and plain x86-64 others in the last bits. Nothing is fused but by this function; see _FLAGS in compiled.py. */
static inline float fused(float a, float b, float c)
{
#if defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

#define LOG2E 0x1.715476p+0f
#define MAGIC 0x1.8p+23f /* a float32 of this size has no bits after the point */
/* 2^f on [-1/2, 1/2], relative error 9e-8. */
static const float EXP2[6] = {0x1.5bba0ep-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};

/* e^x for -87 <= x <= 0, relative error 1.5e-7: 2^n 2^f with n the whole number nearest to x log2 e. */
static inline float exp_below(float x)
{
    float shifted = fused(x, LOG2E, MAGIC); /* n is in its low bits */
    float f = fused(x, LOG2E, MAGIC - shifted), p = EXP2[0];
    p = fused(p, f, EXP2[1]); /* one by one: a loop inside keeps compilers from vectors */
    p = fused(p, f, EXP2[2]);
    p = fused(p, f, EXP2[3]);
    p = fused(p, f, EXP2[4]);
    p = fused(p, f, EXP2[5]);
    uint32_t bits, power;
    memcpy(&bits, &p, 4);
    memcpy(&power, &shifted, 4);
    bits += power << 23;
    memcpy(&p, &bits, 4);
    return p;
}

/* At least -87, below which a float32 sum of at least 1 sees nothing; a NaN stays one. */
static inline float bounded(float x)
{
    return x < -87.0f ? -87.0f : x;
}

static inline float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* IEEE half precision: the exponent is rebased by a product, which is exact for subnormal numbers too. */
static inline float from_half(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    float finite = from_bits(magnitude) * 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &finite, 4);
    return from_bits(((h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits) | sign);
}

static int64_t own_of(const struct rows *r, int64_t n, int64_t first)
{
    return r->own ? r->own[n] - first : -1;
}

/* Whether a logit of columns first .. first + count - 1 of row n is replaced or shifted. */
static int touched(const struct rows *r, int64_t n, int64_t first, int64_t count)
{
    int64_t own = own_of(r, n, first);
    int found = own >= 0 && own < count;
    for (int64_t h = 0; h < r->hidden_count; h++)
        found |= r->hidden[h] >= first && r->hidden[h] < first + count;
    return found;
}

/* Whether something is done to columns first .. first + count - 1 of row n on their way. */
static int adjusted(const struct rows *r, int64_t n, int64_t first, int64_t count)
{
    return r->temperature != 1 || r->floor || r->weight != 1 || r->term_count || touched(r, n, first, count);
}

/* The same columns as floats before any sum: where they lie, or in the buffer. */
static const float *taken(const struct rows *r, int64_t n, int64_t first, int64_t count, float *buffer)
{
    int64_t own = own_of(r, n, first), at = r->offset[n] + first * r->stride;
    int edited = touched(r, n, first, count);
    if (r->kind == FLOAT32) {
        const float *x = (const float *)r->base + at;
        if (r->stride == 1 && !edited)
            return x;
        if (r->stride == 1)
            memcpy(buffer, x, count * sizeof(float));
        else
            for (int64_t j = 0; j < count; j++)
                buffer[j] = x[j * r->stride];
    } else {
        const uint16_t *x = (const uint16_t *)r->base + at;
        uint16_t near[SIZE];
        if (r->stride != 1) {
            for (int64_t j = 0; j < count; j++)
                near[j] = x[j * r->stride];
            x = near;
        }
        if (r->kind == BFLOAT16)
            for (int64_t j = 0; j < count; j++)
                buffer[j] = from_bits((uint32_t)x[j] << 16);
        else
            for (int64_t j = 0; j < count; j++)
                buffer[j] = from_half(x[j]);
    }
    if (!edited)
        return buffer;
    for (int64_t h = 0; h < r->hidden_count; h++)
        if (r->hidden[h] >= first && r->hidden[h] < first + count)
            buffer[r->hidden[h] - first] = -INFINITY;
    if (own >= 0 && own < count)
        buffer[own] += r->shift[n];
    return buffer;
}

static const float *load(const struct rows *r, int64_t n, int64_t first, int64_t count, float *buffer);

/* Whether the rows are logits as they were given, in which +inf is a fault; in a sum it may be a token that only rows of
   negative weight rule out. */
static int plain(const struct rows *r)
{
    return r->weight == 1 && r->term_count == 0;
}

/* The weighted sum of a row and its terms at one column, where a part is not finite: NaN where a given logit is a NaN or
   +inf, else -inf where a row of positive weight is, as the others then have no say, else the sum. */
static __attribute__((noinline)) float column_sum(const struct rows *r, int64_t n, int64_t column, float sum)
{
    float x[1];
    int bad = 0, out = 0;
    if (r->weight != 0) {
        const float y = *taken(r, n, column, 1, x);
        bad |= !(y < INFINITY);
        out |= r->weight > 0 && y == -INFINITY;
    }
    for (int64_t k = 0; k < r->term_count; k++) {
        const struct term *term = &r->terms[k];
        const float y = *load(term->rows, n, column, 1, x);
        bad |= plain(term->rows) ? !(y < INFINITY) : y != y;
        out |= (term->weight > 0 && y == -INFINITY) || (term->weight < 0 && y == INFINITY);
    }
    return bad ? NAN : out ? -INFINITY : sum;
}

/* Columns first .. first + count - 1 of row n as floats: where they lie, or in the buffer. */
static const float *load(const struct rows *r, int64_t n, int64_t first, int64_t count, float *buffer)
{
    const float *x = taken(r, n, first, count, buffer);
    if (r->weight != 1 || r->term_count) {
        float more[SIZE];
        const float own = r->weight;
        int odd = 0;
        for (int64_t j = 0; j < count; j++)
            odd |= x[j] == INFINITY;
        for (int64_t j = 0; j < count; j++)
            buffer[j] = own == 0 ? 0.0f : own * x[j];
        for (int64_t k = 0; k < r->term_count; k++) {
            const float *y = load(r->terms[k].rows, n, first, count, more), weight = r->terms[k].weight;
            for (int64_t j = 0; j < count; j++) {
                buffer[j] += weight * y[j]; /* rounded twice, as in torch, so that tokens are equal */
                odd |= (y[j] == INFINITY) | (buffer[j] != buffer[j]);
            }
        }
        for (int64_t j = 0; odd && j < count; j++)
            if (!(fabsf(buffer[j]) < INFINITY))
                buffer[j] = column_sum(r, n, first + j, buffer[j]);
        x = buffer;
    }
    if (r->temperature != 1) {
        for (int64_t j = 0; j < count; j++)
            buffer[j] = x[j] / r->temperature;
        x = buffer;
    }
    if (r->floor) {
        const float floor = r->floor[n];
        for (int64_t j = 0; j < count; j++)
            buffer[j] = x[j] < floor ? -INFINITY : x[j];
        x = buffer;
    }
    return x;
}

static inline float largest_few(const float *x, int64_t count)
{
    float m = -INFINITY;
    for (int64_t j = 0; j < count; j++)
        m = x[j] > m ? x[j] : m;
    return m;
}

#include "row_wide.c"
#ifndef WIDTH

/* The largest of float32 columns side by side that is no NaN. */
static float largest(const float *x, int64_t count)
{
    float top[LANES];
    int64_t whole = count / LANES * LANES;
    if (count <= FEW)
        return largest_few(x, count);
    for (int k = 0; k < LANES; k++)
        top[k] = -INFINITY;
    for (int64_t j = 0; j < whole; j += LANES)
        for (int k = 0; k < LANES; k++)
            top[k] = x[j + k] > top[k] ? x[j + k] : top[k];
    for (int64_t j = whole; j < count; j++)
        top[j - whole] = x[j] > top[j - whole] ? x[j] : top[j - whole];
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            top[k] = top[k + half] > top[k] ? top[k + half] : top[k];
    return top[0];
}

static inline __attribute__((always_inline)) void summed(const float *x, int64_t width, float *peak, float *mass,
                                                         float *tilt, const int leans)
{
    float sum[LANES], lean[LANES];
    int64_t whole = width / LANES * LANES;
    for (int k = 0; k < LANES; k++)
        sum[k] = 0, lean[k] = 0;
    float m = largest(x, width), shift = m == -INFINITY ? 0 : m;
    for (int64_t j = 0; j < whole; j += LANES)
        for (int k = 0; k < LANES; k++) {
            float d = bounded(x[j + k] - shift), e = exp_below(d);
            sum[k] += e;
            if (leans)
                lean[k] = fused(e, d, lean[k]);
        }
    for (int64_t j = whole; j < width; j++) {
        float d = bounded(x[j] - shift), e = exp_below(d);
        sum[j - whole] += e;
        if (leans)
            lean[j - whole] = fused(e, d, lean[j - whole]);
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            sum[k] += sum[k + half], lean[k] += lean[k + half];
    int empty = m == -INFINITY && sum[0] == sum[0];
    *peak = m;
    *mass = empty ? 0 : sum[0];
    if (leans)
        *tilt = empty ? 0 : lean[0];
}

/* One group of float32 columns side by side. */
static void group_of(const void *x, int64_t count, int kind, float *peak, float *mass, float *tilt)
{
    (void)kind;
    tilt ? summed(x, count, peak, mass, tilt, 1) : summed(x, count, peak, mass, NULL, 0);
}

#endif

/* A few columns: one pass in order, for which lanes would cost more than the sums. */
static inline void summed_few(const float *x, int64_t width, float *peak, float *mass, float *tilt)
{
    float m = largest_few(x, width), sum = 0, lean = 0;
    float shift = m == -INFINITY ? 0 : m;
    for (int64_t j = 0; j < width; j++) {
        float d = bounded(x[j] - shift), e = exp_below(d);
        sum += e;
        lean = fused(e, d, lean);
    }
    int empty = m == -INFINITY && sum == sum;
    *peak = m;
    *mass = empty ? 0 : sum;
    if (tilt)
        *tilt = empty ? 0 : lean;
}

/* The statistics of columns first .. first + count - 1 of row n; the tilt where it is asked for. */
static void sums(const struct rows *r, int64_t n, int64_t first, int64_t count, float *peak, float *mass, float *tilt)
{
#ifdef WIDTH
    if (count > FEW && r->stride == 1 && !adjusted(r, n, first, count)) {
        const char *base = (const char *)r->base + (r->offset[n] + first) * bytes_of((int)r->kind);
        group_of(base, count, (int)r->kind, peak, mass, tilt);
        return;
    }
#endif
    float buffer[SIZE];
    const float *x = load(r, n, first, count, buffer);
    if (count <= FEW)
        summed_few(x, count, peak, mass, tilt);
    else
        group_of(x, count, FLOAT32, peak, mass, tilt);
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Every group of every row, (count, groups); the tilt unless it is NULL. */
void row_pass(const struct rows *r, float *peak, float *mass, float *tilt)
{
    int64_t groups = (r->width + r->size - 1) / r->size;
#pragma omp parallel for num_threads(r->threads) schedule(static) if (r->count * r->width > 1 << 16)
    for (int64_t n = 0; n < r->count; n++) {
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = g * r->size, at = n * groups + g;
            sums(r, n, first, least(r->size, r->width - first), peak + at, mass + at, tilt ? tilt + at : NULL);
        }
    }
}

/* The lowest column of group[n] of each row with its largest logit, and the largest logit of the group's others. */
void row_largest(const struct rows *r, const int64_t *group, int64_t *column, float *second)
{
#pragma omp parallel for num_threads(r->threads) schedule(static) if (r->count * r->size > 1 << 16)
    for (int64_t n = 0; n < r->count; n++) {
        float buffer[SIZE];
        int64_t first = group[n] * r->size, count = least(r->size, r->width - first), at = 0;
        const float *x = load(r, n, first, count, buffer);
        const float m = largest(x, count);
        while (at < count - 1 && x[at] != m)
            at++;
        float before = largest(x, at), after = largest(x + at + 1, count - at - 1);
        column[n] = at;
        second[n] = after > before ? after : before;
    }
}

/* The lowest column with the largest logit of each row; -1 for a row without mass or with a NaN or +inf. */
void row_best(const struct rows *r, int64_t *column)
{
#pragma omp parallel for num_threads(r->threads) schedule(static) if (r->count * r->width > 1 << 16)
    for (int64_t n = 0; n < r->count; n++) {
        float buffer[SIZE], most = -INFINITY;
        int64_t best = -1;
        int bad = 0;
        for (int64_t first = 0; first < r->width; first += r->size) {
            int64_t count = least(r->size, r->width - first), at = 0;
            const float *x = load(r, n, first, count, buffer);
            const float m = largest(x, count);
            for (int64_t j = 0; j < count; j++)
                bad |= x[j] != x[j];
            if (m > most) {
                while (x[at] != m)
                    at++;
                most = m, best = first + at;
            }
        }
        column[n] = bad || most == INFINITY ? -1 : best;
    }
}
