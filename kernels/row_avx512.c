/* The statistics of a group by AVX-512, read where it lies in any of the three formats: the lanes, the order of their
   sums and hence the numbers of ``summed`` in row_pass.c, without a buffer between. */

#include <immintrin.h>

/* Sixteen columns as floats; those that ``some`` leaves out are -inf. */
static inline __attribute__((always_inline)) __m512 sixteen(const void *base, int64_t j, int kind, __mmask16 some)
{
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    if (kind == FLOAT32)
        return _mm512_mask_loadu_ps(nothing, some, (const float *)base + j);
    __m256i half = _mm256_maskz_loadu_epi16(some, (const uint16_t *)base + j);
    __m512 x = kind == BFLOAT16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
                                : _mm512_cvtph_ps(half);
    return _mm512_mask_mov_ps(nothing, some, x);
}

static inline __attribute__((always_inline)) __m512 exp_sixteen(__m512 x)
{
    const __m512 log2e = _mm512_set1_ps(0x1.715476p+0f), magic = _mm512_set1_ps(0x1.8p+23f);
    __m512 shifted = _mm512_fmadd_ps(x, log2e, magic), f = _mm512_fmsub_ps(x, log2e, _mm512_sub_ps(shifted, magic));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0x1.5bba0ep-10f), f, _mm512_set1_ps(0x1.3cea88p-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6b752p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebf9bcp-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42ap-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

static inline float folded(__m512 x, int largest)
{
    float lane[16];
    _mm512_storeu_ps(lane, x);
    for (int half = 8; half; half /= 2)
        for (int k = 0; k < half; k++)
            lane[k] = !largest ? lane[k] + lane[k + half] : lane[k + half] > lane[k] ? lane[k + half] : lane[k];
    return lane[0];
}

static inline __attribute__((always_inline)) void wide(const void *base, int64_t count, const int kind,
                                                       const int leans, float *peak, float *mass, float *tilt)
{
    __m512 top[4], sum[4], lean[4];
    const __m512 low = _mm512_set1_ps(-87.0f);
    int64_t whole = count / LANES * LANES;
    __mmask16 rest[4];
    for (int q = 0; q < 4; q++) {
        int64_t left = count - whole - 16 * q;
        rest[q] = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
        top[q] = _mm512_set1_ps(-INFINITY), sum[q] = _mm512_setzero_ps(), lean[q] = _mm512_setzero_ps();
    }
    for (int64_t j = 0; j < whole; j += LANES)
        for (int q = 0; q < 4; q++) {
            top[q] = _mm512_max_ps(sixteen(base, j + 16 * q, kind, 0xffff), top[q]);
            _mm_prefetch((const char *)base + (j + 16 * q) * (kind == FLOAT32 ? 4 : 2) + 4096, _MM_HINT_T0);
        }
    for (int q = 0; q < 4; q++)
        if (rest[q])
            top[q] = _mm512_max_ps(sixteen(base, whole + 16 * q, kind, rest[q]), top[q]);
    float m = folded(_mm512_max_ps(_mm512_max_ps(top[3], top[1]), _mm512_max_ps(top[2], top[0])), 1);
    const __m512 shift = _mm512_set1_ps(m == -INFINITY ? 0 : m);
    for (int64_t j = 0; j < whole; j += LANES)
        for (int q = 0; q < 4; q++) {
            __m512 d = _mm512_max_ps(low, _mm512_sub_ps(sixteen(base, j + 16 * q, kind, 0xffff), shift));
            __m512 e = exp_sixteen(d);
            sum[q] = _mm512_add_ps(sum[q], e);
            if (leans)
                lean[q] = _mm512_fmadd_ps(e, d, lean[q]);
        }
    for (int q = 0; q < 4; q++)
        if (rest[q]) {
            __m512 d = _mm512_max_ps(low, _mm512_sub_ps(sixteen(base, whole + 16 * q, kind, rest[q]), shift));
            __m512 e = exp_sixteen(d);
            sum[q] = _mm512_mask_add_ps(sum[q], rest[q], sum[q], e);
            if (leans)
                lean[q] = _mm512_mask3_fmadd_ps(e, d, lean[q], rest[q]);
        }
    float all = folded(_mm512_add_ps(_mm512_add_ps(sum[0], sum[2]), _mm512_add_ps(sum[1], sum[3])), 0);
    int empty = m == -INFINITY && all == all;
    *peak = m;
    *mass = empty ? 0 : all;
    if (leans) {
        float a = folded(_mm512_add_ps(_mm512_add_ps(lean[0], lean[2]), _mm512_add_ps(lean[1], lean[3])), 0);
        *tilt = empty ? 0 : a;
    }
}

/* One group where it lies, its columns side by side. */
static void group_where_it_lies(const void *base, int64_t count, int kind, float *peak, float *mass, float *tilt)
{
    if (kind == FLOAT32)
        tilt ? wide(base, count, FLOAT32, 1, peak, mass, tilt) : wide(base, count, FLOAT32, 0, peak, mass, NULL);
    else if (kind == BFLOAT16)
        tilt ? wide(base, count, BFLOAT16, 1, peak, mass, tilt) : wide(base, count, BFLOAT16, 0, peak, mass, NULL);
    else
        tilt ? wide(base, count, FLOAT16, 1, peak, mass, tilt) : wide(base, count, FLOAT16, 0, peak, mass, NULL);
}
