/* Reading and drawing rows of float32 logits where they lie, for CPUs. Of each group of columns

       peak = max x        mass = sum e^(x - peak)        tilt = sum e^(x - peak) (x - peak)

   and of a group that won, the column at which the running sum of e^(x - peak) passes a given share of the whole.
   Sums run over 64 lanes in a fixed order, never reassociated, so they are the same for any number of threads and in
   any batch. A NaN or +inf in a group makes its mass NaN. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 64
#define SIZE 1024 /* of the widest group */

/* e^x for -87 <= x <= 0, relative error 1.5e-7: 2^n 2^f with n the whole number nearest to x log2 e. */
static inline float exp_below(float x)
{
    float shifted = x * 0x1.715476p+0f + 0x1.8p+23f; /* n is in its low bits */
    float f = x * 0x1.715476p+0f - (shifted - 0x1.8p+23f);
    float p = 0x1.5bba0ep-10f; /* 2^f on [-1/2, 1/2], relative error 9e-8 */
    p = p * f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.0f;
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

static void group(const float *x, int64_t width, float *peak, float *mass, float *tilt)
{
    float top[LANES], sum[LANES], lean[LANES];
    int64_t whole = width / LANES * LANES;
    for (int k = 0; k < LANES; k++)
        top[k] = -INFINITY, sum[k] = 0, lean[k] = 0;
    for (int64_t j = 0; j < whole; j += LANES)
        for (int k = 0; k < LANES; k++)
            top[k] = x[j + k] > top[k] ? x[j + k] : top[k];
    for (int64_t j = whole; j < width; j++)
        top[j - whole] = x[j] > top[j - whole] ? x[j] : top[j - whole];
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            top[k] = top[k + half] > top[k] ? top[k + half] : top[k];
    float m = top[0];
    float shift = m == -INFINITY ? 0 : m; /* an empty group has mass e^-87 a column, which is set to 0 below */
    for (int64_t j = 0; j < whole; j += LANES)
        for (int k = 0; k < LANES; k++) {
            float d = bounded(x[j + k] - shift), e = exp_below(d);
            sum[k] += e;
            lean[k] += e * d;
        }
    for (int64_t j = whole; j < width; j++) {
        float d = bounded(x[j] - shift), e = exp_below(d);
        sum[j - whole] += e;
        lean[j - whole] += e * d;
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            sum[k] += sum[k + half], lean[k] += lean[k + half];
    int empty = m == -INFINITY && sum[0] == sum[0];
    *peak = m;
    *mass = empty ? 0 : sum[0];
    *tilt = empty ? 0 : lean[0];
}

/* `count` rows, each `width` floats from base + offset[row], in groups of `size`; results are (count, groups). */
void row_pass(const float *base, const int64_t *offset, int64_t count, int threads, int64_t width, int64_t size,
              float *peak, float *mass, float *tilt)
{
    int64_t groups = (width + size - 1) / size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < count; n++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t left = width - g * size, at = n * groups + g;
            group(base + offset[n] + g * size, left < size ? left : size, peak + at, mass + at, tilt + at);
        }
}

/* One column of group[n] of each row, by inverse CDF: the first whose running sum exceeds share[n] of the whole. */
void row_column(const float *base, const int64_t *offset, int64_t count, int threads, int64_t width, int64_t size,
                const int64_t *group, const double *share, int64_t *column)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < count; n++) {
        float weight[SIZE];
        const float *x = base + offset[n] + group[n] * size;
        int64_t left = width - group[n] * size, end = left < size ? left : size, last = 0, at = 0;
        float m = -INFINITY;
        for (int64_t j = 0; j < end; j++)
            m = x[j] > m ? x[j] : m;
        for (int64_t j = 0; j < end; j++) {
            float d = x[j] - m;
            weight[j] = d < -87.0f ? 0 : exp_below(d);
        }
        double whole = 0, running = 0;
        for (int64_t j = 0; j < end; j++) {
            whole += weight[j];
            last = weight[j] > 0 ? j : last;
        }
        /* rounding may carry the share to the whole: then the last column with mass is meant */
        while (at < last && (running += weight[at]) <= share[n] * whole)
            at++;
        column[n] = at;
    }
}

/* The lowest column of group[n] of each row with its largest logit, and the largest logit of the group's others. */
void row_largest(const float *base, const int64_t *offset, int64_t count, int threads, int64_t width, int64_t size,
                 const int64_t *group, int64_t *column, float *second)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < count; n++) {
        const float *x = base + offset[n] + group[n] * size;
        int64_t left = width - group[n] * size, end = left < size ? left : size, at = 0;
        float m = -INFINITY, other = -INFINITY;
        for (int64_t j = 0; j < end; j++)
            m = x[j] > m ? x[j] : m;
        while (at < end - 1 && x[at] != m)
            at++;
        for (int64_t j = 0; j < at; j++)
            other = x[j] > other ? x[j] : other;
        for (int64_t j = at + 1; j < end; j++)
            other = x[j] > other ? x[j] : other;
        column[n] = at;
        second[n] = other;
    }
}
