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

/* e^x for x <= 0, relative error 1e-7; below -87, where a float32 sum of at least 1 sees nothing, e^-87. */
static inline float exp_below(float x)
{
    float y = (x < -87.0f ? -87.0f : x) * 0x1.715476p+0f; /* log2 e */
    float shifted = y + 0x1.8p+23f;                       /* the nearest whole number is in its low bits */
    float f = y - (shifted - 0x1.8p+23f);
    float p = 0x1.41fbbap-13f; /* 2^f on [-1/2, 1/2] */
    p = p * f + 0x1.5f3e54p-10f;
    p = p * f + 0x1.3b2d4cp-7f;
    p = p * f + 0x1.c6aee8p-5f;
    p = p * f + 0x1.ebfbdcp-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
    uint32_t bits, power;
    memcpy(&bits, &p, 4);
    memcpy(&power, &shifted, 4);
    bits += power << 23;
    memcpy(&p, &bits, 4);
    return p;
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
            float d = x[j + k] - shift, e = exp_below(d);
            sum[k] += e;
            lean[k] += e * (d < -87.0f ? -87.0f : d);
        }
    for (int64_t j = whole; j < width; j++) {
        float d = x[j] - shift, e = exp_below(d);
        sum[j - whole] += e;
        lean[j - whole] += e * (d < -87.0f ? -87.0f : d);
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            sum[k] += sum[k + half], lean[k] += lean[k + half];
    int empty = m == -INFINITY && sum[0] == sum[0];
    *peak = m;
    *mass = empty ? 0 : sum[0];
    *tilt = empty ? 0 : lean[0];
}

/* Rows begin..end - 1, each `width` floats from base + offset[row]; results are (rows, groups). */
void row_pass(const float *base, const int64_t *offset, int64_t begin, int64_t end, int64_t width, int64_t size,
              float *peak, float *mass, float *tilt)
{
    int64_t groups = (width + size - 1) / size;
    for (int64_t n = begin; n < end; n++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t left = width - g * size, at = n * groups + g;
            group(base + offset[n] + g * size, left < size ? left : size, peak + at, mass + at, tilt + at);
        }
}

/* One column of group[n] of each row, by inverse CDF: the first whose running sum exceeds share[n] of the whole. */
void row_column(const float *base, const int64_t *offset, int64_t begin, int64_t end, int64_t width, int64_t size,
                const int64_t *group, const double *share, int64_t *column)
{
    float weight[SIZE];
    for (int64_t n = begin; n < end; n++) {
        const float *x = base + offset[n] + group[n] * size;
        int64_t left = width - group[n] * size, count = left < size ? left : size, last = 0, at = 0;
        float m = -INFINITY;
        for (int64_t j = 0; j < count; j++)
            m = x[j] > m ? x[j] : m;
        for (int64_t j = 0; j < count; j++) {
            float d = x[j] - m;
            weight[j] = d < -87.0f ? 0 : exp_below(d);
        }
        double whole = 0, running = 0;
        for (int64_t j = 0; j < count; j++) {
            whole += weight[j];
            last = weight[j] > 0 ? j : last;
        }
        /* rounding may carry the share to the whole: then the last column with mass is meant */
        while (at < last && (running += weight[at]) <= share[n] * whole)
            at++;
        column[n] = at;
    }
}
