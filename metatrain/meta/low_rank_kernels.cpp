// Runs a recorded low-rank program task by task: low_rank_translate.py has translated it to the operations below.
//
// One task's intermediate results are some hundred kilobytes, so they stay in a core's cache from the first operation to
// the last; torch, which runs each operation over a chunk of tasks, reads and writes them from memory. Threads take
// blocks of tasks, and each has an arena of its own: nothing is shared but what is read, and the sums over all tasks.
//
// Vectors are GCC's (and Clang's) vector extensions, so that one source serves every processor.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
// glibc has vector variants of these (libmvec), which GCC takes only where they are declared so.
extern "C" {
__attribute__((__simd__("notinbranch"))) float expf(float) noexcept;
__attribute__((__simd__("notinbranch"))) double exp(double) noexcept;
#if __GLIBC_PREREQ(2, 35)
__attribute__((__simd__("notinbranch"))) float erff(float) noexcept;
__attribute__((__simd__("notinbranch"))) double erf(double) noexcept;
#endif
}
#endif

namespace {

using Index = std::int64_t;

#if defined(__AVX512F__)
constexpr Index BYTES = 64, WIDE = 4;  // of a vector; vectors of a row of a product's tile
#elif defined(__AVX__)
constexpr Index BYTES = 32, WIDE = 2;
#else
constexpr Index BYTES = 16, WIDE = 2;
#endif
constexpr Index TALL = 6;    // rows of a product's tile: TALL x WIDE sums fill the registers
constexpr Index DOT_TALL = WIDE == 4 ? 5 : 2;  // the same of products of rows with rows: DOT_TALL x 4
constexpr Index DEEP = 128;  // of a product's inner axis at a time: that much of the right side stays in the first cache

template <class T>
constexpr Index LANES = BYTES / Index(sizeof(T));

template <class T, Index W>
using Vector __attribute__((vector_size(W * sizeof(T)))) = T;

// From and to any address. By copies: Clang takes no alignment from an alias.
template <class T, Index W>
inline Vector<T, W> load(const T *from) {
    Vector<T, W> value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <class T, Index W>
inline void store(T *to, Vector<T, W> value) {
    __builtin_memcpy(to, &value, sizeof value);
}

// ---- what Python hands over: keep in step with low_rank_translate.py ----

enum Kind : Index {
    PRODUCT, MULTIPLY, ADD, ADD_PRODUCT, SCALE, ADD_NUMBER, RSQRT, SUM, DOT, ACTIVATE, LOSS_SLOPE, LOSS_CURVATURE
};
enum Activation : Index { RELU, TANH, SILU, GELU };
enum Loss : Index { SQUARED, ABSOLUTE, HUBER, LOGISTIC };

struct Place {
    Index base, offset, stride[3];  // in numbers
};

struct Operation {
    Index kind;
    Index variant;  // which activation or loss; of a product, 1: the next one is added to it, and taken with it
    Index alpha_rate, beta_rate;  // which of the rates multiplies the factor beside it; negative: none
    double alpha, beta;
    Index size[3];
    Place at[4];  // at[0] is written; a base below 0: not there
};

struct Base {
    void *start;
    Index a_task;  // numbers from one task's part to the next one's; 0: shared
};

// ---- the next task's inputs, on their way to the cache while this one is computed ----

// They come from memory, where a core waits for each line some hundred times as long as it computes with it. Products
// ask for them, a line every few rounds of their inner loop.
struct Ahead {
    const char *at;
    Index every;  // a mask of rounds: -1 for none but the first
};

// ---- products ----

template <class T>
struct Factors {
    const T *a;
    Index a_row, a_column;
    const T *b;
    Index b_row, b_column;
    Index k;
};

// c [m, n] = alpha (a b + a' b') + beta d, of which the second factors (k = 0) and d (null) may be missing.
template <class T>
struct Product {
    Index m, n;
    Factors<T> first, second;
    const T *d;
    Index d_row, d_column;
    T *c;
    Index c_row, c_column;
    T alpha, beta;
    Ahead *ahead;
};

#if defined(__AVX512F__)
// The first so many lanes: the others are 0, and are not written.
inline Vector<float, 16> load_part(const float *from, Index lanes) {
    return reinterpret_cast<Vector<float, 16>>(_mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), from));
}
inline Vector<double, 8> load_part(const double *from, Index lanes) {
    return reinterpret_cast<Vector<double, 8>>(_mm512_maskz_loadu_pd(__mmask8((1u << lanes) - 1), from));
}
inline void store_part(float *to, Vector<float, 16> value, Index lanes) {
    _mm512_mask_storeu_ps(to, __mmask16((1u << lanes) - 1), reinterpret_cast<__m512>(value));
}
inline void store_part(double *to, Vector<double, 8> value, Index lanes) {
    _mm512_mask_storeu_pd(to, __mmask8((1u << lanes) - 1), reinterpret_cast<__m512d>(value));
}
constexpr bool PARTS = true;
#else
template <class T, Index W>
inline Vector<T, W> load_part(const T *, Index);
constexpr bool PARTS = false;
#endif

// Some columns of a product, from j on, of which the last vector has so many lanes, and a stretch of its inner axis:
// b begins there, and in it rows follow each other in one piece.
template <class T>
struct Part {
    Index j, lanes;
    Factors<T> factors[2];
    bool more;  // add to c what is not the first stretch
};

// c [MR, NV·W] = alpha a b + beta d
template <class T, Index W, Index NV, Index MR, bool WHOLE>
inline __attribute__((always_inline)) void tile(const Product<T> &p, const Part<T> &part, Index i) {
    using V = Vector<T, W>;
    const auto get = [&](const T *from, Index v) {
        if constexpr (WHOLE) return load<T, W>(from + v * W);
        else return v + 1 < NV ? load<T, W>(from + v * W) : load_part(from + v * W, part.lanes);
    };
    const T *d = part.more ? p.c : p.d;
    const Index d_row = part.more ? p.c_row : p.d_row;
    const T beta = part.more ? T(1) : p.beta;
    V sum[MR][NV];
#pragma GCC unroll 8
    for (Index r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (Index v = 0; v < NV; ++v) sum[r][v] = V{};
    const char *ahead = p.ahead->at;
    const Index every = p.ahead->every;
    for (const Factors<T> &f : part.factors) {
        const T *a = f.a + i * f.a_row, *b = f.b;
        const Index a_row = f.a_row, a_column = f.a_column, b_row = f.b_row, depth = f.k;
        for (Index k = 0; k < depth; ++k) {
            if (!(k & every)) __builtin_prefetch(ahead, 0, 2), ahead += 64;
            V right[NV];
#pragma GCC unroll 8
            for (Index v = 0; v < NV; ++v) right[v] = get(b + k * b_row, v);
#pragma GCC unroll 8
            for (Index r = 0; r < MR; ++r) {
                const T left = a[r * a_row + k * a_column];
#pragma GCC unroll 8
                for (Index v = 0; v < NV; ++v) sum[r][v] += left * right[v];
            }
        }
    }
    p.ahead->at = ahead;
#pragma GCC unroll 8
    for (Index r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (Index v = 0; v < NV; ++v) {
            V out = p.alpha * sum[r][v];
            if (d) out += beta * get(d + (i + r) * d_row + part.j, v);
            T *to = p.c + (i + r) * p.c_row + part.j + v * W;
            if (WHOLE || v + 1 < NV) store<T, W>(to, out);
            else if constexpr (!WHOLE) store_part(to, out, part.lanes);
        }
}

// All rows, in pieces of like height: 20 are 4 x 5, not 3 x 6 and 2.
template <class T, Index W, Index NV, bool WHOLE>
__attribute__((noinline)) void rows(const Product<T> &p, const Part<T> &part) {
    const Index pieces = (p.m + TALL - 1) / TALL;
    for (Index piece = 0; piece < pieces; ++piece) {
        const Index i = piece * p.m / pieces, height = (piece + 1) * p.m / pieces - i;
        switch (height) {
            case 6: tile<T, W, NV, 6, WHOLE>(p, part, i); break;
            case 5: tile<T, W, NV, 5, WHOLE>(p, part, i); break;
            case 4: tile<T, W, NV, 4, WHOLE>(p, part, i); break;
            case 3: tile<T, W, NV, 3, WHOLE>(p, part, i); break;
            case 2: tile<T, W, NV, 2, WHOLE>(p, part, i); break;
            default: tile<T, W, NV, 1, WHOLE>(p, part, i);
        }
    }
}

template <class T, Index W, bool WHOLE>
inline void columns(const Product<T> &p, const Part<T> &part, Index vectors) {
    if constexpr (WIDE == 4) {
        if (vectors == 4) return rows<T, W, 4, WHOLE>(p, part);
        if (vectors == 3) return rows<T, W, 3, WHOLE>(p, part);
    }
    if (vectors == 2) return rows<T, W, 2, WHOLE>(p, part);
    rows<T, W, 1, WHOLE>(p, part);
}

// Columns of less than a vector, in ever narrower ones.
template <class T, Index W>
inline void narrow(const Product<T> &p, Part<T> part, Index count) {
    for (; count >= W; count -= W, part.j += W) {
        rows<T, W, 1, true>(p, part);
        for (Factors<T> &f : part.factors) f.b += W;
    }
    if constexpr (W > 1) narrow<T, W / 2>(p, part, count);
}

template <class T>
void with_rows(const Product<T> &p) {
    constexpr Index W = LANES<T>, width = WIDE * W;
    alignas(64) T pieces[DEEP * width];
    Index k = 0;
    do {
        // Second factors come only with a first that is one stretch.
        Part<T> stretch{0, W, {p.first, p.second}, k > 0};
        stretch.factors[0].a += k * p.first.a_column;
        stretch.factors[0].b += k * p.first.b_row;
        stretch.factors[0].k = std::min(p.first.k - k, DEEP);
        for (Index j = 0; j < p.n;) {
            const Index count = std::min(p.n - j, width), vectors = PARTS ? (count + W - 1) / W : count / W;
            Part<T> part = stretch;
            part.j = j;
            T *piece = pieces;
            for (Factors<T> &f : part.factors) {
                f.b += j;
                if (count < width || f.b_row <= width || p.m <= 2 * TALL || piece + f.k * width > pieces + DEEP * width)
                    continue;
                // Rows far apart fall on the same few lines of the first cache: a copy of them does not.
                for (Index row = 0; row < f.k; ++row)
                    for (Index v = 0; v < WIDE; ++v)
                        store<T, W>(piece + row * width + v * W, load<T, W>(f.b + row * f.b_row + v * W));
                f.b = piece, f.b_row = width, piece += f.k * width;
            }
            if (!vectors) {
                narrow<T, (PARTS ? 1 : W / 2)>(p, part, count);
                break;
            }
            if (PARTS && count % W) {
                part.lanes = count % W;
                if constexpr (PARTS) columns<T, W, false>(p, part, vectors);
                j += count;
            } else {
                columns<T, W, true>(p, part, vectors);
                j += vectors * W;
            }
        }
        k += DEEP;
    } while (k < p.first.k);
}

// A tile of products of rows with rows, both in one piece along the inner axis.
template <class T, Index MR, Index NR>
inline __attribute__((always_inline)) void dot_tile(const Product<T> &p, Index i, Index j) {
    constexpr Index W = LANES<T>;
    using V = Vector<T, W>;
    V sum[MR][NR];
#pragma GCC unroll 8
    for (Index r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (Index s = 0; s < NR; ++s) sum[r][s] = V{};
    const T *a = p.first.a + i * p.first.a_row, *b = p.first.b + j * p.first.b_column;
    Index k = 0;
    for (; k + W <= p.first.k; k += W) {
        V right[NR];
#pragma GCC unroll 8
        for (Index s = 0; s < NR; ++s) right[s] = load<T, W>(b + s * p.first.b_column + k);
#pragma GCC unroll 8
        for (Index r = 0; r < MR; ++r) {
            const V left = load<T, W>(a + r * p.first.a_row + k);
#pragma GCC unroll 8
            for (Index s = 0; s < NR; ++s) sum[r][s] += left * right[s];
        }
    }
#pragma GCC unroll 8
    for (Index r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (Index s = 0; s < NR; ++s) {
            T total = 0;
            for (Index lane = 0; lane < W; ++lane) total += sum[r][s][lane];
            for (Index rest = k; rest < p.first.k; ++rest) total += a[r * p.first.a_row + rest] * b[s * p.first.b_column + rest];
            total *= p.alpha;
            if (p.d) total += p.beta * p.d[(i + r) * p.d_row + (j + s) * p.d_column];
            p.c[(i + r) * p.c_row + (j + s) * p.c_column] = total;
        }
}

template <class T, Index MR>
inline void dot_rows(const Product<T> &p, Index i) {
    Index j = 0;
    for (; j + 4 <= p.n; j += 4) dot_tile<T, MR, 4>(p, i, j);
    for (; j < p.n; ++j) dot_tile<T, MR, 1>(p, i, j);
}

template <class T>
void rows_with_rows(const Product<T> &p) {
    const Index pieces = (p.m + DOT_TALL - 1) / DOT_TALL;
    for (Index piece = 0; piece < pieces; ++piece) {
        const Index i = piece * p.m / pieces, height = (piece + 1) * p.m / pieces - i;
        switch (height) {
            case 5: dot_rows<T, 5>(p, i); break;
            case 4: dot_rows<T, 4>(p, i); break;
            case 3: dot_rows<T, 3>(p, i); break;
            case 2: dot_rows<T, 2>(p, i); break;
            default: dot_rows<T, 1>(p, i);
        }
    }
}

template <class T>
void at_any_strides(const Product<T> &p) {
    for (Index i = 0; i < p.m; ++i)
        for (Index j = 0; j < p.n; ++j) {
            T total = 0;
            for (Index k = 0; k < p.first.k; ++k)
                total += p.first.a[i * p.first.a_row + k * p.first.a_column] * p.first.b[k * p.first.b_row + j * p.first.b_column];
            total *= p.alpha;
            if (p.d) total += p.beta * p.d[i * p.d_row + j * p.d_column];
            p.c[i * p.c_row + j * p.c_column] = total;
        }
}

template <class T>
void product(const Product<T> &p) {
    const bool one_column = p.n == 1, c_in_rows = p.c_column == 1 && (!p.d || p.d_column == 1);
    if (one_column || (p.first.b_column == 1 && c_in_rows)) with_rows(p);
    else if (p.first.a_column == 1 && p.first.b_row == 1) rows_with_rows(p);
    else at_any_strides(p);
}

// ---- transposing, in squares of vectors ----

template <class T>
inline void transpose_square(const T *from, Index from_row, T *to, Index to_row) {
    constexpr Index W = LANES<T>;
    using V = Vector<T, W>;
    using I = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    using Mask __attribute__((vector_size(W * sizeof(T)))) = I;
    Mask low, high;
    for (Index lane = 0; lane < W; ++lane) {
        low[lane] = I(lane / 2 + (lane % 2) * W);
        high[lane] = I(lane / 2 + W / 2 + (lane % 2) * W);
    }
    V row[W], next[W];
#pragma GCC unroll 16
    for (Index r = 0; r < W; ++r) row[r] = load<T, W>(from + r * from_row);
#pragma GCC unroll 4
    for (Index round = 1; round < W; round *= 2) {
#pragma GCC unroll 16
        for (Index r = 0; r < W / 2; ++r) {
#if defined(__clang__)
            for (Index lane = 0; lane < W; ++lane) {
                next[2 * r][lane] = lane % 2 ? row[r + W / 2][lane / 2] : row[r][lane / 2];
                next[2 * r + 1][lane] = lane % 2 ? row[r + W / 2][lane / 2 + W / 2] : row[r][lane / 2 + W / 2];
            }
#else
            next[2 * r] = __builtin_shuffle(row[r], row[r + W / 2], low);
            next[2 * r + 1] = __builtin_shuffle(row[r], row[r + W / 2], high);
#endif
        }
#pragma GCC unroll 16
        for (Index r = 0; r < W; ++r) row[r] = next[r];
    }
#pragma GCC unroll 16
    for (Index r = 0; r < W; ++r) store<T, W>(to + r * to_row, row[r]);
}

// to[i, j] = from[i, j], [m, n], where rows of `to` and columns of `from` are in one piece.
template <class T>
void transpose(const T *from, Index from_column, T *to, Index to_row, Index m, Index n) {
    constexpr Index W = LANES<T>;
    const Index whole_m = m - m % W, whole_n = n - n % W;
    for (Index j = 0; j < whole_n; j += W)
        for (Index i = 0; i < whole_m; i += W) transpose_square(from + j * from_column + i, from_column, to + i * to_row + j, to_row);
    for (Index j = 0; j < n; ++j)
        for (Index i = j < whole_n ? whole_m : 0; i < m; ++i) to[i * to_row + j] = from[j * from_column + i];
}

// ---- elementwise ----

template <int IN, class T, class F>
inline void inner(Index n, T *out, const T *const *x, const Index *stride, F f) {
    // Strides of 0 and 1 are known to the compiler, so that it makes vectors of them.
    const auto run = [&](auto a, auto b, auto c) {
#pragma GCC ivdep
        for (Index i = 0; i < n; ++i) {
            if constexpr (IN == 1) out[i] = f(x[0][a * i]);
            if constexpr (IN == 2) out[i] = f(x[0][a * i], x[1][b * i]);
            if constexpr (IN == 3) out[i] = f(x[0][a * i], x[1][b * i], x[2][c * i]);
        }
    };
    using Zero = std::integral_constant<Index, 0>;
    using One = std::integral_constant<Index, 1>;
    const Index a = stride[0], b = IN > 1 ? stride[1] : 1, c = IN > 2 ? stride[2] : 1;
    if (a == 1 && b == 1 && c == 1) return run(One{}, One{}, One{});
    if (IN > 1 && a == 1 && b == 0 && c == 1) return run(One{}, Zero{}, One{});
    if (IN > 1 && a == 0 && b == 1 && c == 1) return run(Zero{}, One{}, One{});
    if (IN > 2 && a == 1 && b == 1 && c == 0) return run(One{}, One{}, Zero{});
    if (IN > 2 && a == 1 && b == 0 && c == 0) return run(One{}, Zero{}, Zero{});
    if (IN > 2 && a == 0 && b == 1 && c == 0) return run(Zero{}, One{}, Zero{});
    if (IN == 1 && a == 0) return run(Zero{}, One{}, One{});
    run(a, b, c);
}

template <int IN, class T, class F>
inline void elementwise(const Operation &op, T *const *p, F f) {
    const Place *at = op.at;
    for (Index i = 0; i < op.size[0]; ++i)
        for (Index j = 0; j < op.size[1]; ++j) {
            T *out = p[0] + i * at[0].stride[0] + j * at[0].stride[1];
            const T *x[IN];
            Index stride[IN];
            for (int s = 0; s < IN; ++s) {
                x[s] = p[s + 1] + i * at[s + 1].stride[0] + j * at[s + 1].stride[1];
                stride[s] = at[s + 1].stride[2];
            }
            if (at[0].stride[2] == 1) {
                inner<IN>(op.size[2], out, x, stride, f);
                continue;
            }
            for (Index k = 0; k < op.size[2]; ++k) {
                T *one = out + k * at[0].stride[2];
                if constexpr (IN == 1) *one = f(x[0][k * stride[0]]);
                if constexpr (IN == 2) *one = f(x[0][k * stride[0]], x[1][k * stride[1]]);
                if constexpr (IN == 3) *one = f(x[0][k * stride[0]], x[1][k * stride[1]], x[2][k * stride[2]]);
            }
        }
}

// out = alpha Σ a, over the axes along which `out` has no stride.
template <class T>
void sum(const Operation &op, T *const *p, T alpha) {
    const Place &to = op.at[0], &from = op.at[1];
    const auto size = [&](int axis) { return to.stride[axis] ? op.size[axis] : Index(1); };
    for (Index i = 0; i < size(0); ++i)
        for (Index j = 0; j < size(1); ++j)
            for (Index k = 0; k < size(2); ++k) p[0][i * to.stride[0] + j * to.stride[1] + k * to.stride[2]] = 0;
    for (Index i = 0; i < op.size[0]; ++i)
        for (Index j = 0; j < op.size[1]; ++j) {
            T *out = p[0] + i * to.stride[0] + j * to.stride[1];
            const T *a = p[1] + i * from.stride[0] + j * from.stride[1];
            const Index n = op.size[2], step = from.stride[2];
            if (!to.stride[2]) {
                T total = 0;
                if (step == 1) for (Index k = 0; k < n; ++k) total += a[k];
                else for (Index k = 0; k < n; ++k) total += a[k * step];
                *out += alpha * total;
            } else if (to.stride[2] == 1 && step == 1) {
#pragma GCC ivdep
                for (Index k = 0; k < n; ++k) out[k] += alpha * a[k];
            } else {
                for (Index k = 0; k < n; ++k) out[k * to.stride[2]] += alpha * a[k * step];
            }
        }
}

// *out += alpha Σ a b
template <class T>
void dot(const Operation &op, T *const *p, T alpha) {
    T total = 0;
    const Place &a = op.at[1], &b = op.at[2];
    for (Index i = 0; i < op.size[0]; ++i)
        for (Index j = 0; j < op.size[1]; ++j) {
            const T *x = p[1] + i * a.stride[0] + j * a.stride[1], *y = p[2] + i * b.stride[0] + j * b.stride[1];
            const Index n = op.size[2];
            if (a.stride[2] == 1 && b.stride[2] == 1) for (Index k = 0; k < n; ++k) total += x[k] * y[k];
            else for (Index k = 0; k < n; ++k) total += x[k * a.stride[2]] * y[k * b.stride[2]];
        }
    *p[0] += alpha * total;
}

// ---- activations and losses: as low_rank_elementwise.py has them ----

inline float exponential(float x) { return expf(x); }
inline double exponential(double x) { return std::exp(x); }
inline float error_function(float x) { return erff(x); }
inline double error_function(double x) { return std::erf(x); }

template <class T>
inline T logistic(T x) {
    return T(1) / (T(1) + exponential(-x));
}

// Near 0 a fraction of polynomials (Cephes, S. L. Moshier), elsewhere by the exponential function.
template <class T>
inline T hyperbolic_tangent(T x) {
    const T s = x * x;
    T near;
    if constexpr (sizeof(T) == 4)
        near = ((((T(-5.70498872745e-3) * s + T(2.06390887954e-2)) * s - T(5.37397155531e-2)) * s +
                 T(1.33314422036e-1)) * s - T(3.33332819422e-1)) * s * x + x;
    else
        near = x + x * s * ((T(-9.64399179425052238628e-1) * s - T(9.92877231001918586564e1)) * s -
                            T(1.61468768441708447952e3)) /
                       (((s + T(1.12811678491632931402e2)) * s + T(2.23548839060100448583e3)) * s +
                        T(4.84406305325125486048e3));
    const T size = x < 0 ? -x : x;
    const T far = T(1) - T(2) / (exponential(size + size) + T(1));
    return size < T(0.625) ? near : (x < 0 ? -far : far);
}

template <class T, class F>
inline void activate(Index n, T *h, T *slope, T *curvature, F f) {
    // f: h → value, slope, curvature. NaN goes through.
    if (curvature) {
#pragma GCC ivdep
        for (Index i = 0; i < n; ++i) f(h[i], h[i], slope[i], curvature[i]);
    } else {
        T unused;
#pragma GCC ivdep
        for (Index i = 0; i < n; ++i) f(h[i], h[i], slope[i], unused);
    }
}

template <class T>
void activation(const Operation &op, T *const *p) {
    const Index n = op.size[2];
    T *h = p[0], *slope = p[1], *curvature = op.at[2].base < 0 ? nullptr : p[2];
    switch (op.variant) {
        case RELU:
            activate(n, h, slope, curvature, [](T x, T &y, T &first, T &second) {
                y = x < 0 ? T(0) : x, first = x > 0 ? T(1) : T(0), second = 0;
            });
            break;
        case TANH:
            activate(n, h, slope, curvature, [](T x, T &y, T &first, T &second) {
                const T t = hyperbolic_tangent(x);
                y = t, first = T(1) - t * t, second = T(-2) * t * (T(1) - t * t);
            });
            break;
        case SILU:
            activate(n, h, slope, curvature, [](T x, T &y, T &first, T &second) {
                const T s = logistic(x), falling = s * (T(1) - s);
                y = x * s, first = s + x * falling, second = falling * (x * (T(1) - T(2) * s) + T(2));
            });
            break;
        default:
            activate(n, h, slope, curvature, [](T x, T &y, T &first, T &second) {
                const T below = T(0.5) * (T(1) + error_function(x * T(0.70710678118654752440)));
                const T density = exponential(x * x * T(-0.5)) * T(0.39894228040143267794);
                y = x * below, first = below + x * density, second = density * (T(2) - x * x);
            });
    }
}

template <class T>
void loss_slope(const Operation &op, T *const *p, T delta) {
    switch (op.variant) {
        case SQUARED: return elementwise<2>(op, p, [](T s, T y) { return T(2) * (s - y); });
        case ABSOLUTE: return elementwise<2>(op, p, [](T s, T y) { return s - y > 0 ? T(1) : s - y < 0 ? T(-1) : T(0); });
        case HUBER:
            return elementwise<2>(op, p, [delta](T s, T y) {
                const T e = s - y;
                return e < -delta ? -delta : e > delta ? delta : e;
            });
        default: return elementwise<2>(op, p, [](T s, T y) { return logistic(s) - y; });
    }
}

template <class T>
void loss_curvature(const Operation &op, T *const *p, T delta) {
    if (op.variant == HUBER)
        return elementwise<2>(op, p, [delta](T s, T y) { return s - y < delta && y - s < delta ? T(1) : T(0); });
    elementwise<2>(op, p, [](T s, T) {
        const T share = logistic(s);
        return share * (T(1) - share);
    });
}

// ---- the program ----

template <class T>
Factors<T> factors(const Operation &op, T *const *p) {
    const Place &a = op.at[1], &b = op.at[2];
    return {p[1], a.stride[0], a.stride[1], p[2], b.stride[0], b.stride[1], op.size[2]};
}

template <class T>
void run(const Operation &op, T *const *p, const double *rates, Ahead *ahead) {
    const T alpha = T(op.alpha * (op.alpha_rate < 0 ? 1.0 : rates[op.alpha_rate]));
    const T beta = T(op.beta * (op.beta_rate < 0 ? 1.0 : rates[op.beta_rate]));
    const Place *at = op.at;
    switch (op.kind) {
        case PRODUCT: {
            Product<T> of{op.size[0], op.size[1], factors(op, p), Factors<T>{}, op.at[3].base < 0 ? nullptr : p[3],
                          at[3].stride[0], at[3].stride[1], p[0], at[0].stride[0], at[0].stride[1], alpha, beta, ahead};
            if (op.variant) of.second = factors(*(&op + 1), p + 4);
            return product(of);
        }
        case MULTIPLY: return elementwise<2>(op, p, [](T a, T b) { return a * b; });
        case ADD: return elementwise<2>(op, p, [alpha](T a, T b) { return a + alpha * b; });
        case ADD_PRODUCT: return elementwise<3>(op, p, [alpha](T a, T b, T c) { return a + alpha * b * c; });
        case SCALE:
            if (op.alpha == 0) return elementwise<1>(op, p, [](T) { return T(0); });  // whatever was there: not a rate of 0
            if (alpha == 1 && at[0].stride[2] == 1 && at[1].stride[1] == 1 && at[1].stride[2] > 1 && op.size[0] == 1)
                return transpose(p[1], at[1].stride[2], p[0], at[0].stride[1], op.size[1], op.size[2]);
            return elementwise<1>(op, p, [alpha](T a) { return alpha * a; });
        case ADD_NUMBER:
            if (beta == 0) return elementwise<1>(op, p, [alpha](T) { return alpha; });  // whatever was there
            return elementwise<1>(op, p, [alpha, beta](T a) { return beta * a + alpha; });
        case RSQRT: return elementwise<1>(op, p, [](T a) { return T(1) / std::sqrt(a); });
        case SUM: return sum(op, p, alpha);
        case DOT: return dot(op, p, alpha);
        case ACTIVATE: return activation(op, p);
        case LOSS_SLOPE: return loss_slope(op, p, alpha);
        case LOSS_CURVATURE: return loss_curvature(op, p, alpha);
        default: return;
    }
}

// Memory of threads, kept from call to call. Its pages are huge where the system has such: reading through small ones
// can take longer than computing with what was read.
class Arenas {
  public:
    struct Free {
        void operator()(void *place) const { std::free(place); }
    };
    using Arena = std::pair<std::unique_ptr<void, Free>, std::size_t>;

    Arena take(std::size_t bytes) {
        constexpr std::size_t PAGE = std::size_t(2) << 20;
        bytes = (bytes + PAGE - 1) / PAGE * PAGE;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (auto arena = idle_.begin(); arena != idle_.end(); ++arena)
                if (arena->second >= bytes) {
                    Arena found = std::move(*arena);
                    idle_.erase(arena);
                    return found;
                }
            idle_.clear();  // all are too small
        }
        void *place = std::aligned_alloc(PAGE, bytes);
        if (!place) throw std::bad_alloc();
#if defined(__linux__)
        madvise(place, bytes, MADV_HUGEPAGE);
#endif
        return Arena(std::unique_ptr<void, Free>(place), bytes);
    }

    void give_back(Arena arena) {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(arena));
    }

  private:
    std::mutex mutex_;
    std::vector<Arena> idle_;
};

Arenas arenas;

template <class T>
struct Call {
    const Operation *program;
    Index operations;
    const Base *bases;
    Index places;
    const double *rates;
    std::vector<Index> inputs;  // bases of which every task has a part
    Index every;                // rounds of products' inner loops to a line of the next task's inputs
};

// Which tasks are whose. Threads take blocks of tasks as they come to them, for cores are not equally quick: others use
// them too, or share their arithmetic. What blocks sum up is added in the order of the blocks, so that the result is the
// same bit for bit whichever thread took which.
template <class T>
class Blocks {
  public:
    // `least` tasks make adding their sums up cheap.
    Blocks(Index tasks, Index threads, Index least, T *sums, Index summed)
        : count(among(tasks, threads, least, summed)), tasks_(tasks), sums_(sums), summed_(summed), waits_(count) {
        std::fill(sums, sums + summed, T(0));
        if (count > 1) held_ = arenas.take(std::size_t(count * summed) * sizeof(T));  // pages that stay unused cost nothing
    }
    ~Blocks() {
        if (held_.first) arenas.give_back(std::move(held_));
    }

    const Index count;

    // The next block; `count` or more: there is none.
    Index take() { return next_.fetch_add(1, std::memory_order_relaxed); }
    Index first(Index block) const { return block * tasks_ / count; }

    void add(Index block, const T *part) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (block != added_) {
            std::copy(part, part + summed_, place(block));
            waits_[block] = true;
            return;
        }
        do {
            for (Index i = 0; i < summed_; ++i) sums_[i] += part[i];
            if (++added_ < count) part = place(added_);
        } while (added_ < count && waits_[added_]);
    }

  private:
    static Index among(Index tasks, Index threads, Index least, Index summed) {
        constexpr Index EACH = 8, FEW = 3, ROOM = Index(64) << 20;  // blocks a thread; bytes of their sums
        if (threads == 1) return 1;
        const Index room = ROOM / std::max(summed * Index(sizeof(T)), Index(1));
        const Index blocks = std::min({EACH * threads, tasks / std::max(least, Index(1)), room});
        return blocks < FEW * threads ? threads : blocks;
    }
    T *place(Index block) { return static_cast<T *>(held_.first.get()) + block * summed_; }

    const Index tasks_;
    std::atomic<Index> next_{0};
    T *const sums_;
    const Index summed_;
    std::mutex mutex_;
    Index added_ = 0;          // blocks whose sums are in `sums`
    std::vector<bool> waits_;  // those whose sums lie at their places
    Arenas::Arena held_;
};

// What one thread has: all that it needs is there before it begins.
template <class T>
struct Lane {
    Arenas::Arena held;
    std::vector<T *> start;  // of each base, for the task at hand; the first is the thread's arena
};

template <class T>
inline void find(const Operation &op, const std::vector<T *> &start, T **p) {
    for (int x = 0; x < 4; ++x)
        if (op.at[x].base >= 0) p[x] = start[op.at[x].base] + op.at[x].offset;
}

// One task, and the inputs of `next` on their way meanwhile; below 0: of none.
template <class T>
void run_task(const Call<T> &call, Lane<T> &lane, Index task, Index next) {
    const auto part = [&](Index base, Index of) {
        return static_cast<T *>(call.bases[base].start) + of * call.bases[base].a_task;
    };
    for (Index i = 1; i < call.places; ++i) lane.start[i] = part(i, task);
    Ahead ahead{reinterpret_cast<const char *>(lane.start[0]), -1};
    const char *end = ahead.at;
    std::size_t input = next < 0 ? call.inputs.size() : 0;
    for (Index i = 0; i < call.operations; ++i) {
        if (ahead.at >= end) {
            const bool more = input < call.inputs.size();
            ahead.every = more ? call.every - 1 : -1;
            if (more) {
                const Index base = call.inputs[input++];
                ahead.at = reinterpret_cast<const char *>(part(base, next));
                end = ahead.at + call.bases[base].a_task * Index(sizeof(T));
            }
        }
        const Operation &op = call.program[i];
        T *p[8] = {};
        find(op, lane.start, p);
        if (op.kind == PRODUCT && op.variant) find(call.program[++i], lane.start, p + 4);
        run(op, p, call.rates, &ahead);
    }
}

template <class T>
void take(const Call<T> &call, Blocks<T> &blocks, Index summed, Lane<T> &lane) noexcept {
    T *const sums = lane.start[0];
    for (Index block = blocks.take(), after; block < blocks.count; block = after) {
        std::fill(sums, sums + summed, T(0));
        const Index end = blocks.first(block + 1);
        after = blocks.count;
        for (Index task = blocks.first(block); task < end; ++task) {
            const bool last = task + 1 == end;
            if (last) after = blocks.take();
            run_task(call, lane, task, !last ? task + 1 : after < blocks.count ? blocks.first(after) : -1);
        }
        blocks.add(block, sums);
    }
}

template <class T>
void all_tasks(const Operation *program, Index operations, const Base *bases, Index places, const double *rates,
               Index tasks, Index threads, Index length, T *sums, Index summed) {
    constexpr Index width = WIDE * LANES<T>;
    Call<T> call{program, operations, bases, places, rates, {}, 1};
    Index rounds = 0, lines = 0;
    for (const Operation *op = program; op != program + operations; ++op)
        if (op->kind == PRODUCT)
            rounds += (op->size[0] + TALL - 1) / TALL * ((op->size[1] + width - 1) / width) * op->size[2];
    for (Index i = 0; i < places; ++i)
        if (bases[i].a_task) call.inputs.push_back(i), lines += bases[i].a_task * Index(sizeof(T)) / 64;
    while (call.every < 64 && 2 * call.every * lines < rounds) call.every *= 2;

    // To add a number up takes an eighth of a round: some hundredths of a block's time at most.
    Blocks<T> blocks(tasks, threads, 6 * summed / std::max(rounds, Index(1)), sums, summed);
    std::vector<Lane<T>> lanes;
    for (Index i = 0; i < threads; ++i) {
        lanes.push_back({arenas.take(std::size_t(length) * sizeof(T)), std::vector<T *>(places)});
        lanes.back().start[0] = static_cast<T *>(lanes.back().held.first.get());
    }
    std::vector<std::thread> others;
    others.reserve(lanes.size());
    try {
        for (Index i = 1; i < threads; ++i)
            others.emplace_back([&, &lane = lanes[i]] { take(call, blocks, summed, lane); });
    } catch (const std::exception &) {
        // No more threads are to be had: slower, and the same.
    }
    take(call, blocks, summed, lanes[0]);
    for (std::thread &other : others) other.join();
    for (Lane<T> &lane : lanes) arenas.give_back(std::move(lane.held));
}

}  // namespace

extern "C" {

std::int64_t metatrain_operation_bytes() { return sizeof(Operation); }

// Runs `program` for every task, in so many threads, each with an arena of `length` numbers, which is bases[0]. `sums`
// becomes what tasks add to its first `summed` numbers. Returns whether there was memory enough.
std::int64_t metatrain_run(const Operation *program, Index operations, const Base *bases, Index places,
                           const double *rates, Index tasks, Index threads, Index length, NUMBER *sums, Index summed) {
    try {
        all_tasks<NUMBER>(program, operations, bases, places, rates, tasks, threads, length, sums, summed);
        return 1;
    } catch (const std::bad_alloc &) {
        return 0;
    }
}
}
