/* Keyed randomness for CPUs: coins, draws and whole reverse steps, token for token those of kernels/reference.py.

   Every word is a function of (seed, tag, column block, position, step, row id), see kernels/philox.py, so nothing here
   depends on the number of threads or on the other rows. */

#include "row_pass.c"

#define RUN 32 /* columns that are summed together before one of them is looked for */

enum { GROUP, WITHIN, COIN };

/* What the words of one run's step have in common. */
struct address {
    uint64_t seed;
    uint32_t step;
};

/* Four words of Philox-4x32-10 (Salmon et al., 2011). */
static inline void philox(uint64_t seed, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, uint32_t word[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * x0, p2 = (uint64_t)0xCD9E8D57u * x2;
        x0 = (uint32_t)(p2 >> 32) ^ x1 ^ k0, x1 = (uint32_t)p2;
        x2 = (uint32_t)(p0 >> 32) ^ x3 ^ k1, x3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    word[0] = x0, word[1] = x1, word[2] = x2, word[3] = x3;
}

static inline double uniform53(uint32_t high, uint32_t low)
{
    return ((double)(((uint64_t)high << 21) | (low >> 11)) + 0.5) * 0x1p-53;
}

static inline double gumbel32(uint32_t word)
{
    double u = ((double)word + 0.5) * 0x1p-32, most = 1 - 0x1p-24;
    return -log(-log1p(-(u < most ? u : most)));
}

/* The first or the second uniform of a coin. */
static inline double coin(const struct address *a, uint32_t tag, uint32_t position, uint32_t row, int second)
{
    uint32_t word[4];
    philox(a->seed, (uint32_t)COIN << 30 | tag << 20, position, a->step, row, word);
    return uniform53(word[2 * second], word[2 * second + 1]);
}

/* Both uniforms of every coin, (batch, length) each. */
void uniforms(const struct address *a, int64_t tag, int64_t batch, int64_t length, const int64_t *ids,
              const int64_t *positions, double *u, double *v, int64_t threads)
{
#pragma omp parallel for num_threads(threads) if (batch * length > 1 << 14)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < length; i++) {
            uint32_t word[4];
            philox(a->seed, (uint32_t)COIN << 30 | (uint32_t)tag << 20, (uint32_t)positions[i], a->step,
                   (uint32_t)ids[b], word);
            u[b * length + i] = uniform53(word[0], word[1]);
            v[b * length + i] = uniform53(word[2], word[3]);
        }
}

/* Coins that show heads with the probabilities given, (batch, length). Returns 1 if one is outside [0, 1], else 0. */
int64_t flips(const struct address *a, int64_t tag, int64_t batch, int64_t length, const int64_t *ids, const double *p,
              uint8_t *heads, int64_t threads)
{
    int wrong = 0;
#pragma omp parallel for num_threads(threads) reduction(| : wrong) if (batch * length > 1 << 14)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < length; i++) {
            int64_t n = b * length + i;
            wrong |= !(p[n] >= 0 && p[n] <= 1 + 1e-9);
            heads[n] = p[n] > 0 && coin(a, (uint32_t)tag, (uint32_t)i, (uint32_t)ids[b], 0) < p[n];
        }
    return wrong;
}

/* The group that wins a row's race and its key: NaN if a group is bad, -inf if none has mass. The groups' log-sum-exps
   are lse, or else those of peak and mass. */
static int64_t contest(const double *lse, const float *peak, const float *mass, int64_t groups, int64_t first,
                       const struct address *a, uint32_t tag, uint32_t position, uint32_t row, double *key)
{
    double best = -INFINITY;
    int64_t winner = 0;
    uint32_t word[4];
    for (int64_t g = 0; g < groups; g++) {
        int64_t at = first + g;
        if (g == 0 || (at & 3) == 0)
            philox(a->seed, (uint32_t)GROUP << 30 | tag << 20 | (uint32_t)(at >> 2), position, a->step, row, word);
        double value = (lse ? lse[g] : (double)peak[g] + log((double)mass[g])) + gumbel32(word[at & 3]);
        if (value != value)
            return *key = value, 0;
        if (value > best)
            best = value, winner = g;
    }
    *key = best;
    return winner;
}

/* The uniform by which a column of the winning group is found. */
static inline double share_of(const struct address *a, uint32_t tag, uint32_t position, uint32_t row)
{
    uint32_t word[4];
    philox(a->seed, (uint32_t)WITHIN << 30 | tag << 20, position, a->step, row, word);
    return uniform53(word[0], word[1]);
}

/* The race among groups whose log-sum-exps are lse (count, groups): keys, winners, and the uniforms for use in them. */
void contests(const double *lse, const struct address *a, int64_t tag, int64_t count, int64_t groups, const int64_t *ids,
              const int64_t *positions, int64_t first_group, double *key, int64_t *group, double *share)
{
    for (int64_t n = 0; n < count; n++) {
        uint32_t row = (uint32_t)ids[n], position = (uint32_t)positions[n];
        group[n] = contest(lse + n * groups, NULL, NULL, groups, first_group, a, (uint32_t)tag, position, row, key + n);
        share[n] = share_of(a, (uint32_t)tag, position, row);
    }
}

#include "mixture.c"

/* Whether a row is a law: it has mass, and neither a NaN nor +inf. */
static int lawful(const float *mass, int64_t groups)
{
    int some = 0;
    for (int64_t g = 0; g < groups; g++) {
        if (mass[g] != mass[g])
            return 0;
        some |= mass[g] > 0;
    }
    return some;
}

/* A column of one group by inverse CDF: the first whose running sum exceeds the share of the whole. */
static int64_t within(const struct rows *r, int64_t n, int64_t group, double share)
{
    float buffer[SIZE], weight[SIZE + RUN];
    double part[SIZE / RUN + 1], whole = 0, running = 0;
    int64_t first = group * r->size, count = least(r->size, r->width - first), runs = (count + RUN - 1) / RUN, at = 0;
    const float *x = load(r, n, first, count, buffer);
    const float m = largest(x, count);
    for (int64_t j = 0; j < count; j++) {
        float d = x[j] - m;
        weight[j] = d < -87.0f ? 0 : exp_below(bounded(d));
    }
    for (int64_t j = count; j < runs * RUN; j++)
        weight[j] = 0;
    for (int64_t k = 0; k < runs; k++) {
        double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int64_t j = 0; j < RUN; j += 8)
            for (int i = 0; i < 8; i++)
                lane[i] += weight[k * RUN + j + i];
        part[k] = ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
        whole += part[k];
    }
    double target = share * whole;
    int64_t run = 0;
    while (run < runs - 1 && running + part[run] <= target)
        running += part[run++];
    while (run > 0 && part[run] == 0) /* rounding may carry the share to the whole: then the last column with mass is meant */
        run--;
    int64_t last = (run + 1) * RUN - 1;
    for (at = run * RUN; weight[last] == 0; last--)
        ;
    while (at < last && (running += weight[at]) <= target)
        at++;
    return at;
}

static void groups_of(const struct rows *r, int64_t n, int64_t groups, float *peak, float *mass)
{
    for (int64_t g = 0; g < groups; g++)
        sums(r, n, g * r->size, least(r->size, r->width - g * r->size), peak + g, mass + g, NULL);
}

/* A column of row n, whose groups have been read. */
static int64_t column_of(const struct rows *r, int64_t n, int64_t groups, const float *peak, const float *mass,
                         const struct address *a, uint32_t tag, uint32_t position, uint32_t row)
{
    double key = 0;
    int64_t group = groups == 1 ? 0 : contest(NULL, peak, mass, groups, 0, a, tag, position, row, &key);
    return group * r->size + within(r, n, group, share_of(a, tag, position, row));
}

/* The race of each row: its key, and the column counted from the row's first; -1 for a row that is no law. Rows are
   read here unless peak and mass, (count, groups), say what a reading told. Without keys (NULL) a single group needs no
   race. */
void races(const struct rows *r, const struct address *a, int64_t tag, const int64_t *ids, const int64_t *positions,
           int64_t first_group, const float *peak, const float *mass, double *key, int64_t *column)
{
    int64_t groups = (r->width + r->size - 1) / r->size;
#pragma omp parallel for num_threads(r->threads) if (r->count * r->width > 1 << 16)
    for (int64_t n = 0; n < r->count; n++) {
        float own_peak[groups], own_mass[groups];
        const float *p = peak ? peak + n * groups : own_peak, *m = peak ? mass + n * groups : own_mass;
        uint32_t row = (uint32_t)ids[n], position = (uint32_t)positions[n];
        if (!peak)
            groups_of(r, n, groups, own_peak, own_mass);
        double winning = INFINITY;
        int64_t group = 0;
        if (key || groups > 1)
            group = contest(NULL, p, m, groups, first_group, a, (uint32_t)tag, position, row, &winning);
        else if (!lawful(m, 1))
            winning = -INFINITY;
        if (key)
            key[n] = winning;
        column[n] = -1;
        if (winning > -INFINITY)
            column[n] = group * r->size + within(r, n, group, share_of(a, (uint32_t)tag, position, row));
    }
}

/* What the choices of a reverse step need but for its rows; see Step in kernels/rows.py. */
struct step {
    const int64_t *ids, *tokens; /* (batch), (count) */
    const uint8_t *where, *data; /* (count); data is NULL where that choice is to be made */
    const double *odds, *kept, *noise;
    int64_t last, length;
    struct address address;
    uint32_t accept, data_tag, token, noise_tag;
};

/* The choices accept, data, token and noise of the sites that ``where`` holds. */
void finish_step(const struct rows *r, const struct step *s, int64_t *out, uint8_t *bad)
{
    int64_t groups = (r->width + r->size - 1) / r->size;
    const struct address *a = &s->address;
#pragma omp parallel for num_threads(r->threads) schedule(dynamic, 64) if (r->count > 512)
    for (int64_t n = 0; n < r->count; n++) {
        int64_t z = s->tokens[n];
        uint32_t row = (uint32_t)s->ids[n / s->length], position = (uint32_t)(n % s->length);
        out[n] = z, bad[n] = 0;
        if (!s->where[n])
            continue;
        float peak[groups], mass[groups];
        if (s->odds) {
            float buffer[1], own = -INFINITY;
            groups_of(r, n, groups, peak, mass);
            if (!lawful(mass, groups)) {
                bad[n] = 1;
                continue;
            }
            if (z >= 0 && z < r->width)
                own = *load(r, n, z, 1, buffer);
            double top = -INFINITY, total = 0;
            for (int64_t g = 0; g < groups; g++) {
                double lse = (double)peak[g] + log((double)mass[g]);
                top = lse > top ? lse : top;
            }
            for (int64_t g = 0; g < groups; g++)
                total += exp((double)peak[g] + log((double)mass[g]) - top);
            double share = exp((double)own - top) / total;
            if (!(coin(a, s->accept, position, row, 0) < 1 / (1 + share / s->odds[n])))
                continue;
        }
        if (s->data ? s->data[n] : coin(a, s->data_tag, position, row, 0) < s->kept[n]) {
            if (!s->odds) {
                groups_of(r, n, groups, peak, mass);
                if (!lawful(mass, groups)) {
                    bad[n] = 1;
                    continue;
                }
            }
            out[n] = column_of(r, n, groups, peak, mass, a, s->token, position, row);
        } else {
            double v = coin(a, s->noise_tag, position, row, 1);
            int64_t low = 0, high = s->last; /* how many cumulated masses below the last do not exceed v */
            while (low < high) {
                int64_t middle = (low + high) / 2;
                if (s->noise[middle] <= v)
                    low = middle + 1;
                else
                    high = middle;
            }
            out[n] = low;
        }
    }
}
