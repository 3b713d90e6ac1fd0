/* The statistics of a group by vectors of 16 floats (AVX-512), 8 (AVX2) or 4 (NEON), read where it lies in any of the
   three formats: the lanes, the order of their sums and the fused products of ``summed`` in row_pass.c, so that all
   give the same numbers. */

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>
#define WIDTH 16
typedef __m512 vec;

INLINE vec all(float x) { return _mm512_set1_ps(x); }
INLINE vec floats(const void *x) { return _mm512_loadu_ps(x); }
INLINE vec brains(const void *x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x)), 16));
}
INLINE vec halves(const void *x) { return _mm512_cvtph_ps(_mm256_loadu_si256(x)); }
INLINE vec larger(vec x, vec y) { return _mm512_max_ps(x, y); }
INLINE vec fused_vec(vec x, vec y, vec z) { return _mm512_fmadd_ps(x, y, z); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#define WIDTH 8
typedef __m256 vec;

INLINE vec all(float x) { return _mm256_set1_ps(x); }
INLINE vec floats(const void *x) { return _mm256_loadu_ps(x); }
INLINE vec brains(const void *x)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(x)), 16));
}
INLINE vec halves(const void *x) { return _mm256_cvtph_ps(_mm_loadu_si128(x)); }
INLINE vec larger(vec x, vec y) { return _mm256_max_ps(x, y); }
INLINE vec fused_vec(vec x, vec y, vec z) { return _mm256_fmadd_ps(x, y, z); }

#elif defined(__aarch64__) && defined(__ARM_NEON)

#include <arm_neon.h>
#define WIDTH 4
typedef float32x4_t vec;

INLINE vec all(float x) { return vdupq_n_f32(x); }
INLINE vec floats(const void *x) { return vld1q_f32(x); }
INLINE vec brains(const void *x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }
INLINE vec halves(const void *x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
INLINE vec larger(vec x, vec y) { return vbslq_f32(vcgtq_f32(x, y), x, y); } /* y where one is a NaN, as on x86 */
INLINE vec fused_vec(vec x, vec y, vec z) { return vfmaq_f32(z, x, y); }

#endif

#ifdef WIDTH

#define PARTS (LANES / WIDTH)
#define STEP 4 /* vectors in flight: their sums and the constants fit into 16 registers */

typedef int32_t bits_vec __attribute__((vector_size(4 * WIDTH)));

INLINE int64_t bytes_of(int kind) { return kind == FLOAT32 ? 4 : 2; }

/* WIDTH columns as floats. */
INLINE vec columns(const void *base, int64_t j, int kind)
{
    const char *x = (const char *)base + j * bytes_of(kind);
    return kind == FLOAT32 ? floats(x) : kind == BFLOAT16 ? brains(x) : halves(x);
}

/* The last ``count % WIDTH`` columns of at least WIDTH, and -inf in the lanes after them. */
INLINE vec last_of(const void *base, int64_t count, int kind)
{
    float near[2 * WIDTH];
    vec x = columns(base, count - WIDTH, kind), none = all(-INFINITY);
    memcpy(near, &x, sizeof(x));
    memcpy(near + WIDTH, &none, sizeof(none));
    memcpy(&x, near + WIDTH - count % WIDTH, sizeof(x));
    return x;
}

/* The first ``left`` lanes, and zeros. */
INLINE vec first_of(vec x, int64_t left)
{
    static const int32_t mask[2 * WIDTH] = {[0 ... WIDTH - 1] = -1};
    bits_vec keep;
    memcpy(&keep, mask + WIDTH - (left < WIDTH ? left : WIDTH), sizeof(keep));
    return (vec)((bits_vec)x & keep);
}

INLINE vec exp_vec(vec x)
{
    vec shifted = fused_vec(x, all(LOG2E), all(MAGIC)), f = fused_vec(x, all(LOG2E), all(MAGIC) - shifted);
    vec p = all(EXP2[0]);
    for (int k = 1; k < 6; k++)
        p = fused_vec(p, f, all(EXP2[k]));
    return (vec)((bits_vec)p + ((bits_vec)shifted << 23));
}

/* The sum of 64 lanes, halved and halved again. */
INLINE float folded(vec *x)
{
    float lane[WIDTH];
    for (int half = PARTS / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            x[k] = x[k] + x[k + half];
    memcpy(lane, x, sizeof(lane));
    for (int half = WIDTH / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            lane[k] += lane[k + half];
    return lane[0];
}

/* The largest column that is no NaN; ``last`` as of last_of. */
INLINE float largest_of(const void *base, int64_t count, const int kind, vec last)
{
    vec top[STEP];
    float lane[WIDTH];
    int64_t j = 0;
    for (int q = 0; q < STEP; q++)
        top[q] = all(-INFINITY);
    for (; j + STEP * WIDTH <= count; j += STEP * WIDTH)
        for (int q = 0; q < STEP; q++) {
            top[q] = larger(columns(base, j + q * WIDTH, kind), top[q]);
            if (q * WIDTH * bytes_of(kind) % 64 == 0) /* of the group that comes next */
                __builtin_prefetch((const char *)base + (j + q * WIDTH) * bytes_of(kind) + 4096);
        }
    for (; j + WIDTH <= count; j += WIDTH)
        top[0] = larger(columns(base, j, kind), top[0]);
    top[1] = larger(last, top[1]);
    top[0] = larger(larger(top[3], top[1]), larger(top[2], top[0]));
    memcpy(lane, top, sizeof(lane));
    for (int half = WIDTH / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            lane[k] = lane[k + half] > lane[k] ? lane[k + half] : lane[k];
    return lane[0];
}

/* The largest of float32 columns side by side that is no NaN. */
static float largest(const float *x, int64_t count)
{
    return count <= FEW ? largest_few(x, count) : largest_of(x, count, FLOAT32, last_of(x, count, FLOAT32));
}

INLINE void wide(const void *base, int64_t count, const int kind, const int leans, float *peak, float *mass,
                 float *tilt)
{
    vec sum[PARTS], lean[PARTS], last = last_of(base, count, kind);
    int64_t whole = count / LANES * LANES;
    float m = largest_of(base, count, kind, last);
    const vec shift = all(m == -INFINITY ? 0 : m), low = all(-87.0f);
    for (int p = 0; p < PARTS; p += STEP) {
        vec s[STEP], l[STEP];
        for (int q = 0; q < STEP; q++)
            s[q] = l[q] = all(0);
        for (int64_t j = p * WIDTH; j < whole; j += LANES)
            for (int q = 0; q < STEP; q++) {
                vec d = larger(low, columns(base, j + q * WIDTH, kind) - shift), e = exp_vec(d);
                s[q] = s[q] + e;
                if (leans)
                    l[q] = fused_vec(e, d, l[q]);
            }
        for (int q = 0; q < STEP; q++) {
            int64_t j = whole + (p + q) * WIDTH, left = count - j;
            if (left > 0) {
                vec d = larger(low, (left < WIDTH ? last : columns(base, j, kind)) - shift);
                vec e = first_of(exp_vec(d), left);
                s[q] = s[q] + e;
                if (leans)
                    l[q] = fused_vec(e, d, l[q]);
            }
            sum[p + q] = s[q], lean[p + q] = l[q];
        }
    }
    float total = folded(sum);
    int empty = m == -INFINITY && total == total;
    *peak = m;
    *mass = empty ? 0 : total;
    if (leans)
        *tilt = empty ? 0 : folded(lean);
}

/* One group where it lies, its columns side by side. */
static void group_of(const void *base, int64_t count, int kind, float *peak, float *mass, float *tilt)
{
    if (kind == FLOAT32)
        tilt ? wide(base, count, FLOAT32, 1, peak, mass, tilt) : wide(base, count, FLOAT32, 0, peak, mass, NULL);
    else if (kind == BFLOAT16)
        tilt ? wide(base, count, BFLOAT16, 1, peak, mass, tilt) : wide(base, count, BFLOAT16, 0, peak, mass, NULL);
    else
        tilt ? wide(base, count, FLOAT16, 1, peak, mass, tilt) : wide(base, count, FLOAT16, 0, peak, mass, NULL);
}

#endif
