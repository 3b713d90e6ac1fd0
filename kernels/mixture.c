/* Mixtures of the softmax of a row and a noise law, in float64, from one reading of the row:

       c(v) = weight softmax(row)(v) + level pi(v) + spike 1(v = anchor)

   and of one or two of them, each over its value at a column of its own, the largest g and the sum of g over columns.
   The terms are probabilities, not logarithms: one exponential a column. A result that underflow or a bad row may have
   spoiled is NaN, and the caller computes that row in logarithms. Sums run over lanes in a fixed order. */

#define DOUBLES 16 /* lanes */
#define LEAST_OWN 1e-100 /* terms below 1e-300 are cut off: so they are no part of a ratio or of its square root, */
#define LEAST_SUM 1e-50  /* nor of the sum */

enum { PLAIN, BARKER, ROOT, MIN, MAX };

struct mixture {
    const struct rows *rows;
    const int64_t *place; /* (count) the row of each site; -1 for a site whose softmax is 0 */
    const double *weight, *level, *spike, *scale; /* (count); spike is NULL without an anchor */
    const double *pi; /* (columns) */
    const int64_t *anchor, *own; /* (count) columns; NULL if there are none */
    int64_t relative; /* whether c is divided by c(own), and 0 there; with a scale of 0 it is 0 and unread */
};

/* One site of a mixture, and the exponentials of the block that was read last. */
struct mixed {
    double weight, level, spike, top, e[SIZE + DOUBLES];
    int64_t row, anchor, own;
};

static inline double fused_double(double a, double b, double c)
{
#if defined(__FMA__) || defined(__FP_FAST_FMA) || defined(__aarch64__)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

/* e^x for x <= 0, relative error 3e-16; at least e^-690, and 0 at -inf. */
static inline double exp_double(double x)
{
    double d = x < -690 ? -690 : x, shifted = fused_double(d, 0x1.71547652b82fep+0, 0x1.8p52), n = shifted - 0x1.8p52;
    double r = fused_double(n, -0x1.a39ef35793c76p-33, fused_double(n, -0x1.62e42feep-1, d)), p = 1.0 / 6227020800;
    p = fused_double(p, r, 1.0 / 479001600); /* Taylor to the 13th power on [-log(2) / 2, log(2) / 2] */
    p = fused_double(p, r, 1.0 / 39916800);
    p = fused_double(p, r, 1.0 / 3628800);
    p = fused_double(p, r, 1.0 / 362880);
    p = fused_double(p, r, 1.0 / 40320);
    p = fused_double(p, r, 1.0 / 5040);
    p = fused_double(p, r, 1.0 / 720);
    p = fused_double(p, r, 1.0 / 120);
    p = fused_double(p, r, 1.0 / 24);
    p = fused_double(p, r, 1.0 / 6);
    p = fused_double(p, r, 0.5);
    p = fused_double(p, r, 1);
    p = fused_double(p, r, 1);
    uint64_t bits, power;
    memcpy(&bits, &p, 8);
    memcpy(&power, &shifted, 8);
    bits += power << 52;
    memcpy(&p, &bits, 8);
    return x == -INFINITY ? 0 : p;
}

/* The exponentials of columns first .. first + count - 1 of a row, 0 for columns that it has not; the buffer is filled
   with zeros to a whole number of lanes. */
static void exponentials(const struct rows *r, struct mixed *m, int64_t first, int64_t count)
{
    int64_t inside = m->row < 0 ? 0 : least(count, r->width - first);
    if (inside > 0) {
        float buffer[SIZE];
        const float *x = load(r, m->row, first, inside, buffer);
        for (int64_t j = 0; j < inside; j++)
            m->e[j] = exp_double((double)x[j] - m->top);
    }
    for (int64_t j = inside > 0 ? inside : 0; j < count + DOUBLES; j++)
        m->e[j] = 0;
}

static double summed_lanes(const double *x, int64_t count)
{
    double lane[DOUBLES] = {0};
    for (int64_t j = 0; j < count; j += DOUBLES)
        for (int k = 0; k < DOUBLES; k++)
            lane[k] += x[j + k];
    for (int half = DOUBLES / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            lane[k] += lane[k + half];
    return lane[0];
}

/* Reads the normaliser of a site's row and divides by c(own), which is returned; 1 if it has none. */
static double prepared(const struct mixture *s, int64_t n, struct mixed *m)
{
    double at = 1, factor = s->scale[n];
    float buffer[SIZE];
    m->row = factor == 0 ? -1 : s->place[n];
    m->own = s->own ? s->own[n] : -1, m->anchor = s->anchor ? s->anchor[n] : -1;
    m->weight = m->row < 0 ? 0 : s->weight[n], m->level = s->level[n], m->spike = s->anchor ? s->spike[n] : 0;
    m->top = -INFINITY;
    if (m->row >= 0) {
        double whole = 0;
        for (int64_t first = 0; first < s->rows->width; first += SIZE) {
            int64_t count = least(SIZE, s->rows->width - first);
            float top = largest(load(s->rows, m->row, first, count, buffer), count);
            m->top = top > m->top ? top : m->top;
        }
        for (int64_t first = 0; first < s->rows->width; first += SIZE) {
            int64_t count = least(SIZE, s->rows->width - first);
            exponentials(s->rows, m, first, count);
            whole += summed_lanes(m->e, count);
        }
        m->weight /= whole;
    }
    if (m->own >= 0 && factor != 0) {
        at = m->level * s->pi[m->own] + (m->own == m->anchor ? m->spike : 0);
        if (m->row >= 0 && m->own < s->rows->width)
            at += m->weight * exp_double((double)*load(s->rows, m->row, m->own, 1, buffer) - m->top);
        at = at > LEAST_OWN ? at : NAN;
        factor /= s->relative ? at : 1;
    }
    m->weight *= factor, m->level *= factor, m->spike *= factor;
    return at;
}

/* Adds c at columns first .. first + count - 1. */
static void added(const struct mixture *s, struct mixed *m, int64_t first, int64_t count, int again, double *c)
{
    int64_t own = m->own - first, anchor = m->anchor - first;
    double before = s->relative && own >= 0 && own < count ? c[own] : 0;
    if (again)
        exponentials(s->rows, m, first, count);
    for (int64_t j = 0; j < count; j++)
        c[j] += m->weight * m->e[j] + m->level * s->pi[first + j];
    if (m->anchor >= 0 && anchor >= 0 && anchor < count)
        c[anchor] += m->spike;
    if (s->relative && own >= 0 && own < count)
        c[own] = before;
}

static inline __attribute__((always_inline)) double rated(double *c, int64_t count, const int rate, double *peak)
{
    double most[DOUBLES] = {0}, lane[DOUBLES] = {0};
    for (int64_t j = 0; j < count; j += DOUBLES)
        for (int k = 0; k < DOUBLES; k++) {
            double x = c[j + k] < 0 ? 0 : c[j + k]; /* a NaN stays one */
            double g = rate == BARKER ? x / (1 + x)
                       : rate == ROOT ? sqrt(x)
                       : rate == MIN  ? (x > 1 ? 1 : x)
                       : rate == MAX  ? (x > 0 && x < 1 ? 1 : x)
                                      : x;
            most[k] = g > most[k] ? g : most[k];
            lane[k] += g;
            c[j + k] = g;
        }
    for (int k = 0; k < DOUBLES; k++)
        *peak = most[k] > *peak ? most[k] : *peak;
    return summed_lanes(lane, DOUBLES);
}

/* Rows log g(c) with c the sum of one or two mixtures where it is positive, and 0 elsewhere; see kernels/rows.py. */
struct mixtures {
    const struct mixture *one, *two; /* two may be NULL */
    int64_t columns, rate, threads;
    const int64_t *without; /* a column of each site that is left out, or NULL */
};

/* Prepares site n, and returns c(own) of the first mixture. */
static double started(const struct mixtures *s, int64_t n, struct mixed m[2])
{
    double own = prepared(s->one, n, m);
    if (s->two)
        prepared(s->two, n, m + 1);
    if (s->rate == MAX && m[0].weight > 0 && m[0].weight < 1e-7)
        m[0].weight = NAN; /* a c that is cut off to 0 would count as impossible */
    return own;
}

/* g at columns first .. first + count - 1 of site n; returns their sum. */
static double block(const struct mixtures *s, int64_t n, struct mixed m[2], int64_t first, int64_t count, int again,
                    double *c, double *peak)
{
    for (int64_t j = 0; j < count + DOUBLES; j++)
        c[j] = 0;
    added(s->one, m, first, count, again || m[0].row < 0, c);
    if (s->two)
        added(s->two, m + 1, first, count, again || m[1].row < 0, c);
    if (s->without && s->without[n] >= first && s->without[n] < first + count)
        c[s->without[n] - first] = 0;
    return s->rate == BARKER ? rated(c, count, BARKER, peak)
           : s->rate == ROOT ? rated(c, count, ROOT, peak)
           : s->rate == MIN  ? rated(c, count, MIN, peak)
           : s->rate == MAX  ? rated(c, count, MAX, peak)
                             : rated(c, count, PLAIN, peak);
}

/* The largest g and the sum of g at each of the sites ``chosen``, and c(own) of the first mixture. With ``strict`` a sum
   that is almost 0 is NaN. */
void mixture_sums(const struct mixtures *s, const int64_t *chosen, int64_t count, int64_t strict, double *own,
                  double *peak, double *sum)
{
#pragma omp parallel for num_threads(s->threads) schedule(static) if (count * s->columns > 1 << 14)
    for (int64_t i = 0; i < count; i++) {
        struct mixed m[2];
        double c[SIZE + DOUBLES];
        own[i] = started(s, chosen[i], m), peak[i] = sum[i] = 0;
        for (int64_t first = 0; first < s->columns; first += SIZE)
            sum[i] += block(s, chosen[i], m, first, least(SIZE, s->columns - first), s->columns > SIZE, c, peak + i);
        if (strict && !(sum[i] > LEAST_SUM))
            sum[i] = NAN;
    }
}

/* The races at the sites ``chosen``, token for token those of kernels/reference.py; -2 where ``mixture_sums`` is NaN. */
void mixture_races(const struct mixtures *s, const int64_t *chosen, int64_t count, const struct address *a, int64_t tag,
                   const int64_t *ids, const int64_t *positions, int64_t *column)
{
    int64_t groups = (s->columns + SIZE - 1) / SIZE;
#pragma omp parallel for num_threads(s->threads) schedule(static) if (count * s->columns > 1 << 14)
    for (int64_t i = 0; i < count; i++) {
        struct mixed m[2];
        double c[SIZE + DOUBLES], lse[groups], peak = 0, whole = 0, running = 0, key;
        int64_t n = chosen[i], winner = 0;
        uint32_t row = (uint32_t)ids[i], position = (uint32_t)positions[i];
        started(s, n, m);
        for (int64_t g = 0; g < groups; g++) {
            double sum = block(s, n, m, g * SIZE, least(SIZE, s->columns - g * SIZE), groups > 1, c, &peak);
            whole += sum, lse[g] = log(sum);
        }
        column[i] = -2;
        if (!(whole > LEAST_SUM))
            continue;
        if (groups > 1) {
            winner = contest(lse, NULL, NULL, groups, 0, a, (uint32_t)tag, position, row, &key);
            block(s, n, m, winner * SIZE, least(SIZE, s->columns - winner * SIZE), 1, c, &peak);
        }
        int64_t last = least(SIZE, s->columns - winner * SIZE) - 1, at = 0;
        for (whole = 0; at <= last; at++)
            whole += c[at];
        while (last > 0 && c[last] == 0)
            last--;
        double target = share_of(a, (uint32_t)tag, position, row) * whole;
        for (at = 0; at < last && (running += c[at]) <= target;)
            at++;
        column[i] = winner * SIZE + at;
    }
}
