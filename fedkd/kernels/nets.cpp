// Forward and backward passes and whole stretches of training of small nets, one device per thread at a time.
//
// Activations are held feature by feature with the sample index innermost: [channel, row, column, sample]. A convolution
// then is a product of a weight and a long contiguous run, without any im2col, and flattening costs nothing. Samples are
// padded with zeros to whole vectors. Written with the compiler's vector types, so that one source serves every width.
//
// Compiled once for each of float and double, as the macro REAL says. Per step nothing is allocated but the
// taps of a convolution.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#define WIDTH 64
#define REGISTERS 24
#else
#define WIDTH 32
#define REGISTERS 12
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

using i64 = int64_t;

template <class T> struct Lanes {
    static constexpr int N = WIDTH / sizeof(T);
    typedef T V __attribute__((vector_size(WIDTH), aligned(WIDTH), may_alias));
    typedef T U __attribute__((vector_size(WIDTH), aligned(sizeof(T)), may_alias));
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Int I __attribute__((vector_size(WIDTH), aligned(WIDTH), may_alias));
};

template <class T> INLINE typename Lanes<T>::V load(const T* p) { return *(const typename Lanes<T>::U*)p; }
template <class T> INLINE void store(T* p, typename Lanes<T>::V v) { *(typename Lanes<T>::U*)p = v; }
// x - 0 is x, whatever x is: the compiler drops it. x + 0 is not (-0 + 0 is 0), and an addition per broadcast costs a third of
// what the units for products can do.
template <class T> INLINE typename Lanes<T>::V fill(T x) { return x - typename Lanes<T>::V{}; }
// The vector turned round by S places.
template <class T, int S> INLINE typename Lanes<T>::V round(typename Lanes<T>::V v) {
    constexpr int N = Lanes<T>::N;
#ifdef __clang__
    typename Lanes<T>::V to{};
    UNROLL for (int i = 0; i < N; i++) to[i] = v[(i + S) % N];
    return to;
#else
    typename Lanes<T>::I from{};
    UNROLL for (int i = 0; i < N; i++) from[i] = (i + S) % N;
    return __builtin_shuffle(v, from);
#endif
}
// Halves are added to halves: in order, one after the other, a sum would wait for each of its terms.
template <class T, int S = Lanes<T>::N / 2> INLINE T total(typename Lanes<T>::V v) {
    v += round<T, S>(v);
    if constexpr (S > 1) return total<T, S / 2>(v);
    return v[0];
}
template <class T> i64 whole(i64 n) { return (n + Lanes<T>::N - 1) / Lanes<T>::N * Lanes<T>::N; }

// ---- products ------------------------------------------------------------------------------------------------------
// C[M, N] (+)= A[M, K] B[K, N] (+ bias[M]); A is read element by element with the strides (row, step), B and C in vectors.
// `rest` elements of the last vector of a row of C are real. `below` clips at zero.
template <class T> struct Product {
    const T *a, *b, *bias;
    T* c;
    i64 row, step, ldb, ldc, depth;
    bool add, below;
};

template <class T, int MR, int NV> INLINE void tile(const Product<T>& p, i64 m, i64 n, int rest) {
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    V acc[MR][NV];
    UNROLL for (int r = 0; r < MR; r++)
        UNROLL for (int j = 0; j < NV; j++) acc[r][j] = p.bias ? fill<T>(p.bias[m + r]) : V{};
    const T* a = p.a + m * p.row;
    const T* b = p.b + n;
    for (i64 k = 0; k < p.depth; k++, a += p.step, b += p.ldb) {
        V x[NV];
        UNROLL for (int j = 0; j < NV; j++) x[j] = load(b + j * W);
        UNROLL for (int r = 0; r < MR; r++) {
            V w = fill<T>(a[r * p.row]);
            UNROLL for (int j = 0; j < NV; j++) acc[r][j] += w * x[j];
        }
    }
    UNROLL for (int r = 0; r < MR; r++) {
        T* c = p.c + (m + r) * p.ldc + n;
        UNROLL for (int j = 0; j < NV; j++) {
            V v = acc[r][j];
            if (p.below) v = v < V{} ? V{} : v;  // NaN stays NaN, as in torch
            if (j == NV - 1 && rest < W) {
                for (int i = 0; i < rest; i++) c[j * W + i] = p.add ? c[j * W + i] + v[i] : v[i];
            } else {
                store(c + j * W, p.add ? load(c + j * W) + v : v);
            }
        }
    }
}

template <class T, int MR, int NV> INLINE i64 rows(const Product<T>& p, i64 m, i64 M, i64 n, int rest) {
    for (; m + MR <= M; m += MR) tile<T, MR, NV>(p, m, n, rest);
    return m;
}

template <class T, int NV> void band(const Product<T>& p, i64 M, i64 n, int rest) {
    constexpr int MR = REGISTERS / NV;
    i64 m = rows<T, MR, NV>(p, 0, M, n, rest);
    if constexpr (MR > 8) m = rows<T, 8, NV>(p, m, M, n, rest);
    if constexpr (MR > 4) m = rows<T, 4, NV>(p, m, M, n, rest);
    if constexpr (MR > 2) m = rows<T, 2, NV>(p, m, M, n, rest);
    rows<T, 1, NV>(p, m, M, n, rest);
}

template <class T> void product(const Product<T>& p, i64 M, i64 N) {
    constexpr int W = Lanes<T>::N;
    i64 n = 0;
    for (; n + 4 * W <= N; n += 4 * W) band<T, 4>(p, M, n, W);
    i64 left = N - n;
    if (left <= 0) return;
    int rest = int(left % W ? left % W : W);
    switch ((left + W - 1) / W) {
        case 1: band<T, 1>(p, M, n, rest); break;
        case 2: band<T, 2>(p, M, n, rest); break;
        case 3: band<T, 3>(p, M, n, rest); break;
        default: band<T, 4>(p, M, n, rest);
    }
}

// dst[cols, ldd] = transpose of src[rows, lds]; rows beyond `real` count as zeros.
template <class T> void turn(const T* src, i64 rows, i64 real, i64 cols, i64 lds, T* dst, i64 ldd) {
    constexpr int B = 8;
    i64 r = 0;
    for (; r + B <= real; r += B) {
        i64 c = 0;
        for (; c + B <= cols; c += B) {
            T block[B][B];
            for (int i = 0; i < B; i++)
                for (int j = 0; j < B; j++) block[j][i] = src[(r + i) * lds + c + j];
            for (int j = 0; j < B; j++) std::memcpy(dst + (c + j) * ldd + r, block[j], sizeof block[j]);
        }
        for (; c < cols; c++)
            for (int i = 0; i < B; i++) dst[c * ldd + r + i] = src[(r + i) * lds + c];
    }
    for (; r < rows; r++)
        for (i64 c = 0; c < cols; c++) dst[c * ldd + r] = r < real ? src[r * lds + c] : T(0);
}

#if WIDTH == 32 && !defined(__clang__)  // clang has no __builtin_shuffle
typedef float F8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t I8 __attribute__((vector_size(32)));
// The compiler does not find the eight-by-eight transpose by itself, and small nets spend a tenth of their time on it.
template <> void turn<float>(const float* src, i64 rows, i64 real, i64 cols, i64 lds, float* dst, i64 ldd) {
    i64 r = 0;
    for (; r + 8 <= real; r += 8) {
        i64 c = 0;
        for (; c + 8 <= cols; c += 8) {
            F8 a[8], b[8];
            for (int i = 0; i < 8; i++) a[i] = *(const F8*)(src + (r + i) * lds + c);
            for (int i = 0; i < 8; i += 2) {
                b[i] = __builtin_shuffle(a[i], a[i + 1], I8{0, 8, 1, 9, 4, 12, 5, 13});
                b[i + 1] = __builtin_shuffle(a[i], a[i + 1], I8{2, 10, 3, 11, 6, 14, 7, 15});
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = __builtin_shuffle(b[i + j], b[i + j + 2], I8{0, 1, 8, 9, 4, 5, 12, 13});
                    a[i + 2 * j + 1] = __builtin_shuffle(b[i + j], b[i + j + 2], I8{2, 3, 10, 11, 6, 7, 14, 15});
                }
            for (int j = 0; j < 4; j++) {
                *(F8*)(dst + (c + j) * ldd + r) = __builtin_shuffle(a[j], a[j + 4], I8{0, 1, 2, 3, 8, 9, 10, 11});
                *(F8*)(dst + (c + j + 4) * ldd + r) = __builtin_shuffle(a[j], a[j + 4], I8{4, 5, 6, 7, 12, 13, 14, 15});
            }
        }
        for (; c < cols; c++)
            for (int i = 0; i < 8; i++) dst[c * ldd + r + i] = src[(r + i) * lds + c];
    }
    for (; r < rows; r++)
        for (i64 c = 0; c < cols; c++) dst[c * ldd + r] = r < real ? src[r * lds + c] : 0.f;
}
#endif

// ---- exponentials --------------------------------------------------------------------------------------------------
INLINE Lanes<double>::V exponential(Lanes<double>::V x) {
    for (int i = 0; i < Lanes<double>::N; i++) x[i] = std::exp(x[i]);
    return x;
}
// exp(x) = 2^n exp(f), |f| <= ln(2)/2, by the polynomial of Cephes' expf (error below 2 units in the last place).
INLINE Lanes<float>::V exponential(Lanes<float>::V x) {
    using V = Lanes<float>::V;
    using I = Lanes<float>::I;
    V low = fill<float>(-87.3f), high = fill<float>(88.7f);
    V y = x < low ? low : x;
    y = y > high ? high : y;
    V t = y * 1.44269504088896341f;
    V shifted = t + 12582912.f;  // 1.5 * 2^23 rounds to the nearest integer
    V n = shifted - 12582912.f;
    V f = y - n * 0.693359375f + n * 2.12194440e-4f;
    V p = fill<float>(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.f;
    I e = (I)shifted - (I)fill<float>(12582912.f);
    V scale = (V)((e + 127) << 23);
    V out = p * scale;
    out = x < low ? V{} : out;
    return x != x ? x : out;
}

// ---- layers --------------------------------------------------------------------------------------------------------
enum Kind : i64 { LINEAR = 0, CONV = 1, RELU = 2, MAXPOOL = 3, AVGPOOL = 4, NORM = 5, DROPOUT = 6 };

// As the caller describes it: 20 integers. w, b: numbers of parameters, -1: none. mean, var: numbers of buffers.
struct Layer {
    i64 kind, c, h, w, o, oh, ow, kh, kw, sh, sw, ph, pw, weight, bias, mean, var, drop, clip, spare;
    i64 in() const { return c * h * w; }
    i64 out() const { return o * oh * ow; }
};

struct Net {
    const Layer* layer;
    i64 layers;
    const double* extra;  // two per layer: eps and momentum of a normalisation, p of a dropout
};

// Where a pass keeps things, for at most `cap` samples: out[l] is the output of layer l, out[-1] the input.
template <class T> struct Space {
    i64 cap;                      // samples, whole vectors
    std::vector<T*> out, grad;    // [features, cap]; grad may share memory
    std::vector<T*> aux;          // padded input of a convolution; positions of maxima; statistics
    T *rowwise, *scratch;         // inputs sample by sample; accumulators
    T* memory = nullptr;
    size_t count = 0;

    static constexpr i64 LINE = 64;
    static i64 whole_line(i64 n) { i64 m = LINE / i64(sizeof(T)); return (n + m - 1) / m * m; }

    // Every slot starts on a line of its own.
    static i64 aux_size(const Layer& l, i64 cap) {
        switch (l.kind) {
            case CONV: return l.c * (l.h + 2 * l.ph) * (l.w + 2 * l.pw) * cap;
            case MAXPOOL: return l.out() * cap;
            case NORM: return 2 * l.c;
            case DROPOUT: return l.in() * cap;
            default: return 0;
        }
    }
    static i64 kept(const Net& net, i64 cap) {
        i64 n = whole_line(net.layer[0].in() * cap);
        for (i64 l = 0; l < net.layers; l++)
            n += whole_line(net.layer[l].out() * cap) + whole_line(aux_size(net.layer[l], cap));
        return n;
    }
    static i64 passing(const Net& net, i64 cap) {
        i64 widest = net.layer[0].in(), rows = 0, tiles = 0;
        for (i64 l = 0; l < net.layers; l++) {
            const Layer& x = net.layer[l];
            widest = std::max(widest, x.out());
            if (x.kind == LINEAR) rows = std::max(rows, cap * whole<T>(x.in()));
            if (x.kind == CONV) tiles = std::max(tiles, (x.o + 2) * (x.c * x.kh * x.kw + 3) * Lanes<T>::N);
        }
        return 2 * whole_line(widest * cap) + whole_line(rows) + whole_line(tiles);
    }
    void lay(const Net& net, i64 samples, T* keep, T* pass) {
        cap = samples;
        out.assign(net.layers + 1, nullptr);
        aux.assign(net.layers, nullptr);
        grad.assign(2, nullptr);
        out[0] = keep;
        keep += whole_line(net.layer[0].in() * cap);
        i64 widest = net.layer[0].in(), rows = 0;
        for (i64 l = 0; l < net.layers; l++) {
            const Layer& x = net.layer[l];
            out[l + 1] = keep;
            keep += whole_line(x.out() * cap);
            aux[l] = keep;
            keep += whole_line(aux_size(x, cap));
            widest = std::max(widest, x.out());
            if (x.kind == LINEAR) rows = std::max(rows, cap * whole<T>(x.in()));
        }
        grad[0] = pass;
        grad[1] = pass + whole_line(widest * cap);
        rowwise = grad[1] + whole_line(widest * cap);
        scratch = rowwise + whole_line(rows);
    }
};

template <class T> T* room(i64 n) { return static_cast<T*>(::operator new(size_t(n) * sizeof(T), std::align_val_t(64))); }
template <class T> struct Owned {
    T* p;
    explicit Owned(i64 n) : p(room<T>(n)) { std::memset(p, 0, size_t(n) * sizeof(T)); }
    ~Owned() { ::operator delete(p, std::align_val_t(64)); }
    Owned(const Owned&) = delete;
};

// ---- convolution ---------------------------------------------------------------------------------------------------
// Where each tap's input lies from the first input of a run: [channel, row, column] in the padded input.
std::vector<i64> tap_places(const Layer& l, i64 cap) {
    i64 hp = l.h + 2 * l.ph, wp = l.w + 2 * l.pw;
    std::vector<i64> place;
    place.reserve(l.c * l.kh * l.kw);
    for (i64 c = 0; c < l.c; c++)
        for (i64 i = 0; i < l.kh; i++)
            for (i64 j = 0; j < l.kw; j++) place.push_back(((c * hp + i) * wp + j) * cap);
    return place;
}

template <class T, int MR, int NV>
INLINE void conv_tile(const T* x, const i64* place, i64 taps, const T* weight, const T* bias, T* y, i64 hop, bool clip) {
    // x points at the run's first input, y at its first output; place: where each tap's input lies from there.
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    V acc[MR][NV];
    UNROLL for (int r = 0; r < MR; r++)
        UNROLL for (int j = 0; j < NV; j++) acc[r][j] = bias ? fill<T>(bias[r]) : V{};
    for (i64 t = 0; t < taps; t++) {
        const T* p = x + place[t];
        V v[NV];
        UNROLL for (int n = 0; n < NV; n++) v[n] = load(p + n * W);
        UNROLL for (int r = 0; r < MR; r++) {
            V a = fill<T>(weight[r * taps + t]);
            UNROLL for (int n = 0; n < NV; n++) acc[r][n] += a * v[n];
        }
    }
    UNROLL for (int r = 0; r < MR; r++)
        UNROLL for (int n = 0; n < NV; n++) {
            V v = acc[r][n];
            if (clip) v = v < V{} ? V{} : v;
            store(y + r * hop + n * W, v);
        }
}

template <class T, int NV>
void conv_band(const Layer& l, const T* x, const i64* place, const T* weight, const T* bias, T* y, i64 hop, bool clip) {
    constexpr int MR = REGISTERS / NV;
    i64 taps = l.c * l.kh * l.kw, o = 0;
#define ROWS(R)                                                                                                      \
    for (; o + R <= l.o; o += R)                                                                                     \
        conv_tile<T, R, NV>(x, place, taps, weight + o * taps, bias ? bias + o : nullptr, y + o * hop, hop, clip);
    ROWS(MR)
    if constexpr (MR > 4) { ROWS(4) }
    if constexpr (MR > 2) { ROWS(2) }
    ROWS(1)
#undef ROWS
}

template <class T>
void conv_forward(const Layer& l, const T* x, T* pad, const T* weight, const T* bias, T* y, i64 cap, bool clip) {
    constexpr int W = Lanes<T>::N;
    i64 hp = l.h + 2 * l.ph, wp = l.w + 2 * l.pw;
    const T* in = x;
    if (l.ph || l.pw) {
        for (i64 c = 0; c < l.c; c++)
            for (i64 i = 0; i < hp; i++) {
                T* to = pad + (c * hp + i) * wp * cap;
                i64 s = i - l.ph;
                if (s < 0 || s >= l.h) {
                    std::memset(to, 0, size_t(wp * cap) * sizeof(T));
                    continue;
                }
                std::memset(to, 0, size_t(l.pw * cap) * sizeof(T));
                std::memcpy(to + l.pw * cap, x + (c * l.h + s) * l.w * cap, size_t(l.w * cap) * sizeof(T));
                std::memset(to + (l.pw + l.w) * cap, 0, size_t(l.pw * cap) * sizeof(T));
            }
        in = pad;
    }
    i64 ldx = wp * cap, hop = l.oh * l.ow * cap;
    std::vector<i64> place = tap_places(l, cap);
    bool runs = l.sw == 1;
    i64 length = runs ? l.ow * cap : cap;
    for (i64 i = 0; i < l.oh; i++)
        for (i64 j = 0; j < (runs ? 1 : l.ow); j++) {
            const T* from = in + i * l.sh * ldx + j * l.sw * cap;
            T* to = y + (i * l.ow + j) * cap;
            i64 n = 0;
            for (; n + 4 * W <= length; n += 4 * W)
                conv_band<T, 4>(l, from + n, place.data(), weight, bias, to + n, hop, clip);
            switch ((length - n) / W) {
                case 1: conv_band<T, 1>(l, from + n, place.data(), weight, bias, to + n, hop, clip); break;
                case 2: conv_band<T, 2>(l, from + n, place.data(), weight, bias, to + n, hop, clip); break;
                case 3: conv_band<T, 3>(l, from + n, place.data(), weight, bias, to + n, hop, clip); break;
                default: break;
            }
        }
}

// How many output channels and taps a block of the weights' gradient takes: their sums must fit the registers.
#if REGISTERS == 24
#define BLOCK_OUT 6
#define BLOCK_TAPS 4
#else
#define BLOCK_OUT 3
#define BLOCK_TAPS 4
#endif

// The next part of `left` things that are taken at most `most` at a time, in as few and as equal parts as may be.
INLINE i64 even_part(i64 left, i64 most) {
    i64 parts = (left + most - 1) / most;
    return (left + parts - 1) / parts;
}

// acc[r][t] += the sum over `lines` lines of `vectors` vectors of g[r] x[t]; lines lie gl and xl elements apart.
template <class T, int OR, int NT>
INLINE void conv_dot(const T* const* g, const T* const* x, i64 lines, i64 vectors, i64 gl, i64 xl, typename Lanes<T>::V* acc) {
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    V a[OR][NT];
    UNROLL for (int r = 0; r < OR; r++)
        UNROLL for (int t = 0; t < NT; t++) a[r][t] = acc[r * NT + t];
    for (i64 i = 0; i < lines; i++)
        for (i64 n = 0; n < vectors; n++) {
            V v[NT];
            UNROLL for (int t = 0; t < NT; t++) v[t] = load(x[t] + i * xl + n * W);
            UNROLL for (int r = 0; r < OR; r++) {
                V d = load(g[r] + i * gl + n * W);
                UNROLL for (int t = 0; t < NT; t++) a[r][t] += d * v[t];
            }
        }
    UNROLL for (int r = 0; r < OR; r++)
        UNROLL for (int t = 0; t < NT; t++) acc[r * NT + t] = a[r][t];
}

template <class T, int OR, int NT = BLOCK_TAPS>
void conv_dots(int taps, const T* const* g, const T* const* x, i64 lines, i64 vectors, i64 gl, i64 xl, typename Lanes<T>::V* acc) {
    if constexpr (NT > 1)
        if (taps < NT) return conv_dots<T, OR, NT - 1>(taps, g, x, lines, vectors, gl, xl, acc);
    conv_dot<T, OR, NT>(g, x, lines, vectors, gl, xl, acc);
}

template <class T, int OR = BLOCK_OUT>
void conv_block(int outs, int taps, const T* const* g, const T* const* x, i64 lines, i64 vectors, i64 gl, i64 xl,
                typename Lanes<T>::V* acc) {
    if constexpr (OR > 1)
        if (outs < OR) return conv_block<T, OR - 1>(outs, taps, g, x, lines, vectors, gl, xl, acc);
    conv_dots<T, OR>(taps, g, x, lines, vectors, gl, xl, acc);
}

template <class T>
void conv_weights(const Layer& l, const T* in, const T* g, T* gw, T* gb, i64 cap, T* scratch, bool add) {
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    i64 wp = l.w + 2 * l.pw, taps = l.c * l.kh * l.kw, hop = l.oh * l.ow * cap;
    V* acc = (V*)scratch;
    for (i64 n = 0; n < l.o * taps; n++) acc[n] = V{};
    // Where columns do not stride, a line of outputs is one long run; a few lines at a time pay for fetching the sums.
    bool runs = l.sw == 1;
    i64 vectors = (runs ? l.ow * cap : cap) / W, ahead = runs ? std::max<i64>(1, 700 / (vectors * l.o)) : 1;
    std::vector<i64> place = tap_places(l, cap);
    for (i64 i = 0; i < l.oh; i += ahead)
        for (i64 j = 0; j < (runs ? 1 : l.ow); j++) {
            i64 lines = std::min(ahead, l.oh - i);
            const T* from = in + (i * l.sh * wp + j * l.sw) * cap;
            const T* rows = g + (i * l.ow + j) * cap;
            V* at = acc;
            // The gradients of these lines stay in the first cache while the taps pass by.
            for (i64 t = 0; t < taps;) {
                int k = int(even_part(taps - t, BLOCK_TAPS));
                const T* xs[BLOCK_TAPS];
                for (int n = 0; n < k; n++) xs[n] = from + place[t + n];
                for (i64 o = 0; o < l.o;) {
                    int r = int(even_part(l.o - o, BLOCK_OUT));
                    const T* gs[BLOCK_OUT];
                    for (int n = 0; n < r; n++) gs[n] = rows + (o + n) * hop;
                    conv_block<T>(r, k, gs, xs, lines, vectors, l.ow * cap, l.sh * wp * cap, at);
                    at += r * k;
                    o += r;
                }
                t += k;
            }
        }
    V* at = acc;
    for (i64 t = 0; t < taps;) {
        i64 k = even_part(taps - t, BLOCK_TAPS);
        for (i64 o = 0; o < l.o;) {
            i64 r = even_part(l.o - o, BLOCK_OUT);
            for (i64 n = 0; n < r; n++)
                for (i64 m = 0; m < k; m++) {
                    T& to = gw[(o + n) * taps + t + m];
                    T sum = total<T>(*at++);
                    to = add ? to + sum : sum;
                }
            o += r;
        }
        t += k;
    }
    if (gb)
        for (i64 o = 0; o < l.o; o++) {
            // Four sums at a time: one alone would wait for each of its additions.
            V sum[4]{};
            i64 n = 0;
            for (; n + 4 * W <= hop; n += 4 * W)
                UNROLL for (int q = 0; q < 4; q++) sum[q] += load(g + o * hop + n + q * W);
            for (; n < hop; n += W) sum[0] += load(g + o * hop + n);
            gb[o] = (add ? gb[o] : T(0)) + total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
        }
}

template <class T, int MR, int NV>
INLINE void back_tile(const Layer& l, const T* g, const T* weight, T* to, i64 c, i64 y, i64 x, i64 cap) {
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    i64 kk = l.kh * l.kw, taps = l.c * kk;
    // Output rows i with 0 <= y + ph - i * sh < kh.
    i64 top = y + l.ph, left = x + l.pw;
    i64 i0 = std::max<i64>(0, (top - l.kh + l.sh) / l.sh), i1 = std::min(l.oh - 1, top / l.sh);
    i64 j0 = std::max<i64>(0, (left - l.kw + l.sw) / l.sw), j1 = std::min(l.ow - 1, left / l.sw);
    if (top - l.kh + 1 <= 0) i0 = 0;
    if (left - l.kw + 1 <= 0) j0 = 0;
    V acc[MR][NV];
    UNROLL for (int r = 0; r < MR; r++)
        UNROLL for (int n = 0; n < NV; n++) acc[r][n] = V{};
    for (i64 o = 0; o < l.o; o++)
        for (i64 i = i0; i <= i1; i++) {
            const T* p = g + ((o * l.oh + i) * l.ow + j0) * cap;
            const T* w = weight + o * taps + c * kk + (top - i * l.sh) * l.kw + left - j0 * l.sw;
            for (i64 j = j0; j <= j1; j++, p += cap, w -= l.sw) {
                V v[NV];
                UNROLL for (int n = 0; n < NV; n++) v[n] = load(p + n * W);
                UNROLL for (int r = 0; r < MR; r++) {
                    V a = fill<T>(w[r * kk]);
                    UNROLL for (int n = 0; n < NV; n++) acc[r][n] += a * v[n];
                }
            }
        }
    UNROLL for (int r = 0; r < MR; r++)
        UNROLL for (int n = 0; n < NV; n++) store(to + r * l.h * l.w * cap + n * W, acc[r][n]);
}

template <class T, int NV> void back_band(const Layer& l, const T* g, const T* weight, T* to, i64 y, i64 x, i64 cap) {
    constexpr int MR = REGISTERS / NV;
    i64 c = 0, plane = l.h * l.w * cap;
#define ROWS(R) for (; c + R <= l.c; c += R) back_tile<T, R, NV>(l, g, weight, to + c * plane, c, y, x, cap);
    ROWS(MR)
    if constexpr (MR > 6) { ROWS(6) }
    if constexpr (MR > 4) { ROWS(4) }
    if constexpr (MR > 2) { ROWS(2) }
    ROWS(1)
#undef ROWS
}

template <class T> void conv_backward(const Layer& l, const T* g, const T* weight, T* gx, i64 cap) {
    constexpr int W = Lanes<T>::N;
    for (i64 y = 0; y < l.h; y++)
        for (i64 x = 0; x < l.w; x++) {
            T* to = gx + (y * l.w + x) * cap;
            i64 n = 0;
            for (; n + 4 * W <= cap; n += 4 * W) back_band<T, 4>(l, g + n, weight, to + n, y, x, cap);
            switch ((cap - n) / W) {
                case 1: back_band<T, 1>(l, g + n, weight, to + n, y, x, cap); break;
                case 2: back_band<T, 2>(l, g + n, weight, to + n, y, x, cap); break;
                case 3: back_band<T, 3>(l, g + n, weight, to + n, y, x, cap); break;
                default: break;
            }
        }
}

// ---- the other layers ----------------------------------------------------------------------------------------------
template <class T> void maxpool_forward(const Layer& l, const T* x, T* y, T* where, i64 cap) {
    using V = typename Lanes<T>::V;
    using I = typename Lanes<T>::I;
    constexpr int W = Lanes<T>::N;
    for (i64 c = 0; c < l.c; c++)
        for (i64 i = 0; i < l.oh; i++)
            for (i64 j = 0; j < l.ow; j++) {
                const T* from = x + ((c * l.h + i * l.sh) * l.w + j * l.sw) * cap;
                i64 to = ((c * l.oh + i) * l.ow + j) * cap;
                for (i64 n = 0; n < cap; n += W) {
                    V best = load(from + n);
                    I tap{};
                    for (i64 a = 0; a < l.kh; a++)
                        for (i64 b = 0; b < l.kw; b++) {
                            V v = load(from + (a * l.w + b) * cap + n);
                            // A NaN wins, as in torch.
                            I wins = (v > best) | (v != v);
                            best = wins ? v : best;
                            tap = wins ? I{} + typename Lanes<T>::Int(a * l.kw + b) : tap;
                        }
                    store(y + to + n, best);
                    store(where + to + n, (V)tap);
                }
            }
}

// y: the layer's output where the one before it clips at zero, else null. Its maxima are above zero exactly where that layer's
// outputs were, so that it clips the gradients here, where they are few.
template <class T> void maxpool_backward(const Layer& l, const T* g, const T* where, const T* y, T* gx, i64 cap) {
    using V = typename Lanes<T>::V;
    using I = typename Lanes<T>::I;
    constexpr int W = Lanes<T>::N;
    bool apart = l.sh >= l.kh && l.sw >= l.kw;
    bool covers = apart && l.sh == l.kh && l.sw == l.kw && l.oh * l.sh == l.h && l.ow * l.sw == l.w;
    if (!covers) std::memset(gx, 0, size_t(l.in() * cap) * sizeof(T));
    for (i64 c = 0; c < l.c; c++)
        for (i64 i = 0; i < l.oh; i++)
            for (i64 j = 0; j < l.ow; j++) {
                T* to = gx + ((c * l.h + i * l.sh) * l.w + j * l.sw) * cap;
                i64 from = ((c * l.oh + i) * l.ow + j) * cap;
                for (i64 n = 0; n < cap; n += W) {
                    V d = load(g + from + n);
                    if (y) d = load(y + from + n) > V{} ? d : V{};
                    I tap = (I)load(where + from + n);
                    for (i64 a = 0; a < l.kh; a++)
                        for (i64 b = 0; b < l.kw; b++) {
                            T* p = to + (a * l.w + b) * cap + n;
                            V v = tap == I{} + typename Lanes<T>::Int(a * l.kw + b) ? d : V{};
                            store(p, apart ? v : load(p) + v);
                        }
                }
            }
}

template <class T> void avgpool_forward(const Layer& l, const T* x, T* y, i64 cap) {
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    T share = T(1) / T(l.kh * l.kw);
    for (i64 c = 0; c < l.c; c++)
        for (i64 i = 0; i < l.oh; i++)
            for (i64 j = 0; j < l.ow; j++)
                for (i64 n = 0; n < cap; n += W) {
                    const T* from = x + ((c * l.h + i * l.sh) * l.w + j * l.sw) * cap + n;
                    V sum{};
                    for (i64 a = 0; a < l.kh; a++)
                        for (i64 b = 0; b < l.kw; b++) sum += load(from + (a * l.w + b) * cap);
                    store(y + ((c * l.oh + i) * l.ow + j) * cap + n, sum * share);
                }
}

template <class T> void avgpool_backward(const Layer& l, const T* g, T* gx, i64 cap) {
    constexpr int W = Lanes<T>::N;
    T share = T(1) / T(l.kh * l.kw);
    std::memset(gx, 0, size_t(l.in() * cap) * sizeof(T));
    for (i64 c = 0; c < l.c; c++)
        for (i64 i = 0; i < l.oh; i++)
            for (i64 j = 0; j < l.ow; j++)
                for (i64 a = 0; a < l.kh; a++)
                    for (i64 b = 0; b < l.kw; b++) {
                        T* to = gx + ((c * l.h + i * l.sh + a) * l.w + j * l.sw + b) * cap;
                        const T* from = g + ((c * l.oh + i) * l.ow + j) * cap;
                        for (i64 n = 0; n < cap; n += W) store(to + n, load(to + n) + load(from + n) * share);
                    }
}

// Batch normalisation over n real samples; aux keeps mean and 1 / sqrt(var + eps) per channel.
template <class T>
void norm_forward(const Layer& l, double eps, double momentum, const T* x, T* y, T* aux, const T* gamma, const T* beta, T* mean,
                  T* var, i64 cap, i64 n, bool training) {
    constexpr int W = Lanes<T>::N;
    i64 area = l.h * l.w;
    for (i64 c = 0; c < l.c; c++) {
        const T* from = x + c * area * cap;
        T m, v;
        if (training) {
            T sum = 0, square = 0;
            for (i64 a = 0; a < area; a++) {
                T part = 0;
                for (i64 b = 0; b < n; b++) part += from[a * cap + b];
                sum += part;
            }
            T count = T(n * area);
            m = sum / count;
            for (i64 a = 0; a < area; a++) {
                T part = 0;
                for (i64 b = 0; b < n; b++) {
                    T d = from[a * cap + b] - m;
                    part += d * d;
                }
                square += part;
            }
            v = square / count;
            T factor = T(momentum);
            mean[c] = mean[c] * (1 - factor) + factor * m;
            var[c] = var[c] * (1 - factor) + factor * v * (count / std::max(count - 1, T(1)));
        } else {
            m = mean[c];
            v = var[c];
        }
        T inverse = T(1) / std::sqrt(v + T(eps));
        aux[2 * c] = m;
        aux[2 * c + 1] = inverse;
        T scale = gamma ? inverse * gamma[c] : inverse;
        T shift = (beta ? beta[c] : T(0)) - m * scale;
        for (i64 a = 0; a < area * cap; a += W) store(y + c * area * cap + a, load(from + a) * scale + shift);
    }
}

template <class T>
void norm_backward(const Layer& l, const T* x, const T* g, T* gx, const T* aux, const T* gamma, T* ggamma, T* gbeta, i64 cap, i64 n,
                   bool training, bool add) {
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    i64 area = l.h * l.w;
    for (i64 c = 0; c < l.c; c++) {
        // Gradients of padding are zero, so that sums over whole vectors are sums over real samples.
        const T *xs = x + c * area * cap, *gs = g + c * area * cap;
        T m = aux[2 * c], inverse = aux[2 * c + 1];
        V s{}, d{};
        for (i64 a = 0; a < area * cap; a += W) {
            V v = load(gs + a);
            s += v;
            d += v * (load(xs + a) - m);
        }
        T sum = total<T>(s), dot = total<T>(d) * inverse;
        if (ggamma) ggamma[c] = (add ? ggamma[c] : T(0)) + dot;
        if (gbeta) gbeta[c] = (add ? gbeta[c] : T(0)) + sum;
        if (!gx) continue;
        T scale = gamma ? inverse * gamma[c] : inverse, count = T(n * area);
        T* to = gx + c * area * cap;
        if (!training) {
            for (i64 a = 0; a < area * cap; a += W) store(to + a, load(gs + a) * scale);
            continue;
        }
        T even = sum / count, slope = dot * inverse / count;
        for (i64 a = 0; a < area; a++)
            for (i64 b = 0; b < cap; b++) {
                i64 k = a * cap + b;
                to[k] = b < n ? scale * (gs[k] - even - (xs[k] - m) * slope) : T(0);
            }
    }
}

// ---- a whole net ---------------------------------------------------------------------------------------------------
template <class T> struct Weights {
    T* const* p;  // parameters by number
    T* const* b;  // buffers by number
};

template <class T> T* of(T* const* list, i64 n) { return n < 0 || !list ? nullptr : list[n]; }

// space.out[0] must hold the input. keep: values in [samples, features] order for each dropout layer, or null.
template <class T> void forward(const Net& net, const Weights<T>& w, Space<T>& space, i64 n, bool training, const T* const* masks) {
    constexpr int W = Lanes<T>::N;
    using V = typename Lanes<T>::V;
    i64 cap = space.cap;
    for (i64 k = 0; k < net.layers; k++) {
        const Layer& l = net.layer[k];
        const T* x = space.out[k];
        T* y = space.out[k + 1];
        switch (l.kind) {
            case LINEAR: {
                Product<T> p{of(w.p, l.weight), x, of(w.p, l.bias), y, l.in(), 1, cap, cap, l.in(), false, l.clip != 0};
                product(p, l.o, cap);
                break;
            }
            case CONV: conv_forward(l, x, space.aux[k], of(w.p, l.weight), of(w.p, l.bias), y, cap, l.clip != 0); break;
            case RELU:
                for (i64 a = 0; a < l.in() * cap; a += W) {
                    V v = load(x + a);
                    store(y + a, v < V{} ? V{} : v);
                }
                break;
            case MAXPOOL: maxpool_forward(l, x, y, space.aux[k], cap); break;
            case AVGPOOL: avgpool_forward(l, x, y, cap); break;
            case NORM:
                norm_forward(l, net.extra[2 * k], net.extra[2 * k + 1], x, y, space.aux[k], of(w.p, l.weight), of(w.p, l.bias),
                             of(w.b, l.mean), of(w.b, l.var), cap, n, training);
                break;
            case DROPOUT:
                if (!training || !masks) {
                    std::memcpy(y, x, size_t(l.in() * cap) * sizeof(T));
                    break;
                }
                turn(masks[l.drop], cap, n, l.in(), l.in(), space.aux[k], cap);
                for (i64 a = 0; a < l.in() * cap; a += W) store(y + a, load(x + a) * load(space.aux[k] + a));
                break;
            default: break;
        }
    }
}

// On entry grad[0] holds the gradient of the output [features, cap], zero for padding. `rows`: the input sample by sample
// [cap, lines], where the caller has it. `grads` null: those of the weights are not wanted. Returns the gradient of the
// input if `want_x`, else null.
template <class T>
T* backward(const Net& net, const Weights<T>& w, T* const* grads, Space<T>& space, i64 n, bool training, bool dropped, const T* rows,
            i64 lines, bool add, bool want_x) {
    constexpr int W = Lanes<T>::N;
    using V = typename Lanes<T>::V;
    i64 cap = space.cap;
    T *g = space.grad[0], *other = space.grad[1];
    bool clipped = false;  // whether the layer that came before has clipped this one's gradients
    for (i64 k = net.layers - 1; k >= 0; k--) {
        const Layer& l = net.layer[k];
        const T *x = space.out[k], *y = space.out[k + 1];
        bool further = want_x || k > 0;
        if (l.clip && !clipped)
            for (i64 a = 0; a < l.out() * cap; a += W) store(g + a, load(y + a) > V{} ? load(g + a) : V{});
        clipped = false;
        switch (l.kind) {
            case LINEAR: {
                i64 in = l.in(), ld = whole<T>(in);
                const T* by_row = rows;
                if (grads && (k > 0 || !rows)) {
                    turn(x, in, in, cap, cap, space.rowwise, ld);
                    by_row = space.rowwise;
                } else {
                    ld = lines;
                }
                if (grads) {
                    Product<T> p{g, by_row, nullptr, grads[l.weight], cap, 1, ld, in, n, add, false};
                    product(p, l.o, in);
                }
                if (grads && l.bias >= 0)
                    for (i64 o = 0; o < l.o; o++) {
                        V sum{};
                        for (i64 a = 0; a < cap; a += W) sum += load(g + o * cap + a);
                        grads[l.bias][o] = (add ? grads[l.bias][o] : T(0)) + total<T>(sum);
                    }
                if (further) {
                    Product<T> q{of(w.p, l.weight), g, nullptr, other, 1, in, cap, cap, l.o, false, false};
                    product(q, in, cap);
                }
                break;
            }
            case CONV:
                if (grads)
                    conv_weights(l, l.ph || l.pw ? space.aux[k] : x, g, grads[l.weight], of(grads, l.bias), cap, space.scratch, add);
                if (further) conv_backward(l, g, of(w.p, l.weight), other, cap);
                break;
            case RELU:
                for (i64 a = 0; a < l.in() * cap; a += W) store(other + a, load(y + a) > V{} ? load(g + a) : V{});
                break;
            case MAXPOOL:
                clipped = k > 0 && net.layer[k - 1].clip;
                maxpool_backward(l, g, space.aux[k], clipped ? y : nullptr, other, cap);
                break;
            case AVGPOOL: avgpool_backward(l, g, other, cap); break;
            case NORM:
                norm_backward(l, x, g, further ? other : nullptr, space.aux[k], of(w.p, l.weight), of(grads, l.weight),
                              of(grads, l.bias), cap, n, training, add);
                break;
            case DROPOUT:
                for (i64 a = 0; a < l.in() * cap; a += W)
                    store(other + a, dropped ? load(g + a) * load(space.aux[k] + a) : load(g + a));
                break;
            default: break;
        }
        std::swap(g, other);
    }
    return want_x ? g : nullptr;
}

// ---- losses --------------------------------------------------------------------------------------------------------
enum LossKind : i64 { LABELS = 0, SOFT = 1, ABSOLUTE = 2 };

// z [classes, cap] -> gradient g of the mean over n samples; returns that mean. labels [n], teacher rows [n][classes].
template <class T>
T loss(i64 kind, const T* z, T* g, i64 classes, i64 cap, i64 n, const i64* labels, const T* const* teacher, T* scratch) {
    using V = typename Lanes<T>::V;
    constexpr int W = Lanes<T>::N;
    T share = T(1) / T(n), sum = 0;
    if (kind == ABSOLUTE) {
        for (i64 b = 0; b < cap; b++)
            for (i64 c = 0; c < classes; c++) {
                T d = b < n ? z[c * cap + b] - teacher[b][c] : T(0);
                sum += std::abs(d);
                g[c * cap + b] = d > 0 ? share / T(classes) : (d < 0 ? -share / T(classes) : d);
            }
        return sum * share / T(classes);
    }
    T *top = scratch, *norm = scratch + cap;
    for (i64 b = 0; b < cap; b += W) {
        V high = load(z + b);
        for (i64 c = 1; c < classes; c++) {
            V v = load(z + c * cap + b);
            high = v > high ? v : high;
        }
        V all{};
        for (i64 c = 0; c < classes; c++) {
            V e = exponential(load(z + c * cap + b) - high);
            store(g + c * cap + b, e);
            all += e;
        }
        store(top + b, high);
        store(norm + b, all);
        V scale = share / all;
        for (i64 c = 0; c < classes; c++) store(g + c * cap + b, load(g + c * cap + b) * scale);
    }
    if (kind == LABELS) {
        for (i64 b = 0; b < n; b++) {
            sum += std::log(norm[b]) + top[b] - z[labels[b] * cap + b];
            g[labels[b] * cap + b] -= share;
        }
    } else {
        for (i64 b = 0; b < n; b++) {
            T lse = std::log(norm[b]) + top[b], mass = 0;
            for (i64 c = 0; c < classes; c++) {
                T t = teacher[b][c];
                mass += t;
                sum += t * (lse - z[c * cap + b]);
            }
            for (i64 c = 0; c < classes; c++) g[c * cap + b] = g[c * cap + b] * mass - share * teacher[b][c];
        }
    }
    for (i64 c = 0; c < classes; c++)
        for (i64 b = n; b < cap; b++) g[c * cap + b] = 0;
    return sum * share;
}

// ---- optimisers ----------------------------------------------------------------------------------------------------
struct Descent {
    i64 kind;  // 0 sgd, 1 adam, 2 adamw
    i64 nesterov;
    double momentum, decay, beta1, beta2, eps;
};

template <class T>
void descend(const Descent& d, T* w, const T* g0, T* first, T* second, i64 n, double rate, double steps) {
    T lr = T(rate), decay = T(d.decay);
    if (d.kind == 0) {
        T mu = T(d.momentum);
        if (!first) {
            if (decay == 0)
                for (i64 i = 0; i < n; i++) w[i] -= lr * g0[i];
            else
                for (i64 i = 0; i < n; i++) w[i] -= lr * (g0[i] + decay * w[i]);
            return;
        }
        for (i64 i = 0; i < n; i++) {
            T g = g0[i] + decay * w[i];
            T m = first[i] * mu + g;
            first[i] = m;
            w[i] -= lr * (d.nesterov ? g + mu * m : m);
        }
        return;
    }
    T keep1 = T(1 - d.beta1), beta2 = T(d.beta2), keep2 = T(1 - d.beta2), eps = T(d.eps);
    T step = T(rate / (1 - std::pow(d.beta1, steps)));
    T scale = T(std::sqrt(1 - std::pow(d.beta2, steps)));
    T shrink = d.kind == 2 ? T(1) - lr * decay : T(1);
    T couple = d.kind == 1 ? decay : T(0);
    for (i64 i = 0; i < n; i++) {
        T g = g0[i] + couple * w[i];
        first[i] += keep1 * (g - first[i]);
        second[i] = second[i] * beta2 + keep2 * g * g;
        w[i] = w[i] * shrink - step * first[i] / (std::sqrt(second[i]) / scale + eps);
    }
}

// ---- entries -------------------------------------------------------------------------------------------------------
template <class F> void spread(i64 count, i64 threads, F work) {
    // Devices are independent, so that which thread takes which changes no number.
    std::atomic<i64> next{0};
    auto run = [&] { work([&] { return next.fetch_add(1); }); };
    std::vector<std::thread> others;
    for (i64 t = 1; t < std::min(threads, count); t++) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}

struct Training {
    const Layer* layer;
    const double* extra;
    i64 layers, devices, params, buffers, steps, batch, threads, chunk, loss_kind, classes, shared;
    const i64* sizes_of;       // [params] elements
    const i64* buffer_sizes;   // [buffers]
    void* const* weights;      // [params] -> [devices, elements]
    void* const* first;        // the same, or null
    void* const* second;
    void* const* stats;        // [buffers] -> [devices, elements]
    double* done;              // [devices] steps that the optimiser has taken, or null
    const void* pool;          // [records, features]
    const i64* index;          // [devices (1 if shared), steps, batch] rows of the pool
    const i64* labels;         // the same shape, or null
    const void* table;         // teacher [devices (1 if one_table), rows, classes], or null
    const i64* positions;      // [devices (1 if shared), steps, batch] rows of the table, or null
    i64 rows, one_table;
    const i64* sizes;          // [devices, steps] real records of a step
    const i64* length;         // [devices] steps
    const double* rates;       // [devices, steps]
    void* const* masks;        // [dropout layers] -> [devices, steps, batch, features], or null
    double* losses;            // [devices] sums over steps
    Descent descent;
};

template <class T> void fetch(const T* pool, const i64* index, i64 n, i64 features, T* rows, i64 lines) {
    for (i64 b = 0; b < n; b++) std::memcpy(rows + b * lines, pool + index[b] * features, size_t(features) * sizeof(T));
}

template <class T> void train(const Training& j) {
    Net net{j.layer, j.layers, j.extra};
    bool whole_batch = false;
    i64 drops = 0;
    for (i64 l = 0; l < j.layers; l++) {
        whole_batch |= j.layer[l].kind == NORM;
        drops += j.layer[l].kind == DROPOUT;
    }
    i64 features = j.layer[0].in(), lines = whole<T>(features);
    i64 part = whole_batch ? j.batch : std::min(j.batch, j.chunk);
    i64 cap = whole<T>(part), parts = (j.batch + part - 1) / part;
    i64 weights = 0;
    for (i64 p = 0; p < j.params; p++) weights += Space<T>::whole_line(j.sizes_of[p]);
    // Batches that all devices walk alike are turned once.
    i64 held = j.shared ? j.steps * parts : 0;
    Owned<T> common_rows(std::max<i64>(1, held * cap * lines)), common(std::max<i64>(1, held * features * cap));
    if (j.shared) {
        std::atomic<i64> made{0};
        spread(held, j.threads, [&](auto next) {
            for (i64 s = next(); s < held; s = next()) {
                i64 t = s / parts, begin = s % parts * part;
                i64 n = std::max<i64>(0, std::min(part, j.sizes[t] - begin));
                T* rows = common_rows.p + s * cap * lines;
                fetch((const T*)j.pool, j.index + t * j.batch + begin, n, features, rows, lines);
                turn(rows, cap, n, features, lines, common.p + s * features * cap, cap);
            }
        });
    }
    spread(j.devices, j.threads, [&](auto next) {
        Owned<T> keep(Space<T>::kept(net, cap)), pass(Space<T>::passing(net, cap));
        Owned<T> gradient(weights), rows(cap * lines), lse(2 * cap);
        Space<T> space;
        space.lay(net, cap, keep.p, pass.p);
        T* own_input = space.out[0];
        std::vector<T*> w(j.params), g(j.params), m1(j.params), m2(j.params), buffers(j.buffers);
        std::vector<const T*> masks(drops), teacher(cap);
        T* at = gradient.p;
        for (i64 p = 0; p < j.params; p++, at += Space<T>::whole_line(j.sizes_of[p - 1])) g[p] = at;
        for (i64 k = next(); k < j.devices; k = next()) {
            for (i64 p = 0; p < j.params; p++) {
                i64 shift = k * j.sizes_of[p];
                w[p] = (T*)j.weights[p] + shift;
                m1[p] = j.first ? (T*)j.first[p] + shift : nullptr;
                m2[p] = j.second ? (T*)j.second[p] + shift : nullptr;
            }
            for (i64 b = 0; b < j.buffers; b++) buffers[b] = (T*)j.stats[b] + k * j.buffer_sizes[b];
            Weights<T> net_weights{w.data(), buffers.data()};
            double sum = 0;
            for (i64 t = 0; t < j.length[k]; t++) {
                i64 size = j.sizes[k * j.steps + t], walk = (j.shared ? t : k * j.steps + t) * j.batch;
                T mean = 0;
                for (i64 c = 0, begin = 0; begin < size; c++, begin += part) {
                    i64 n = std::min(part, size - begin), from = walk + begin;
                    const T* by_row = rows.p;
                    if (j.shared) {
                        by_row = common_rows.p + (t * parts + c) * cap * lines;
                        space.out[0] = common.p + (t * parts + c) * features * cap;
                    } else {
                        space.out[0] = own_input;
                        fetch((const T*)j.pool, j.index + from, n, features, rows.p, lines);
                        turn(rows.p, cap, n, features, lines, own_input, cap);
                    }
                    for (i64 d = 0; d < drops; d++) {
                        i64 width = 0, seen = 0;
                        for (i64 l = 0; l < j.layers; l++)
                            if (j.layer[l].kind == DROPOUT && seen++ == d) width = j.layer[l].in();
                        masks[d] = (const T*)j.masks[d] + ((k * j.steps + t) * j.batch + begin) * width;
                    }
                    forward(net, net_weights, space, n, true, drops ? masks.data() : nullptr);
                    if (j.table) {
                        const T* table = (const T*)j.table + (j.one_table ? 0 : k * j.rows * j.classes);
                        for (i64 b = 0; b < n; b++) teacher[b] = table + j.positions[from + b] * j.classes;
                    }
                    T part_mean = loss(j.loss_kind, space.out[j.layers], space.grad[0], j.classes, cap, n,
                                       j.labels ? j.labels + from : nullptr, teacher.data(), lse.p);
                    if (n != size) {
                        // The loss is a mean over the whole batch, of which this is a part.
                        T share = T(n) / T(size);
                        part_mean *= share;
                        for (i64 a = 0; a < j.classes * cap; a++) space.grad[0][a] *= share;
                    }
                    mean += part_mean;
                    backward(net, net_weights, g.data(), space, n, true, drops > 0, by_row, lines, begin > 0, false);
                }
                sum += mean;
                double steps = j.done ? (j.done[k] += 1) : 0;
                for (i64 p = 0; p < j.params; p++)
                    descend(j.descent, w[p], g[p], m1[p], m2[p], j.sizes_of[p], j.rates[k * j.steps + t], steps);
            }
            j.losses[k] = sum;
        }
    });
}

// A forward pass of many devices; what a backward pass needs is left in `kept` (devices * kept(net, cap) elements), if given.
struct Pass {
    const Layer* layer;
    const double* extra;
    i64 layers, devices, params, buffers, samples, threads, shared, want_x;
    const i64* sizes_of;
    const i64* buffer_sizes;
    void* const* weights;
    void* const* stats;
    const void* x;             // [devices (1 if shared), samples, features]
    void* out;                 // forward: [devices, samples, classes]; backward: the gradient of that
    void* kept;
    void* const* grads;        // [params] -> [devices, elements]
    void* gx;                  // [devices, samples, features]
};

template <class T> void bind(const Pass& j, i64 k, std::vector<T*>& w, std::vector<T*>& b) {
    for (i64 p = 0; p < j.params; p++) w[p] = (T*)j.weights[p] + k * j.sizes_of[p];
    for (i64 p = 0; p < j.buffers; p++) b[p] = (T*)j.stats[p] + k * j.buffer_sizes[p];
}

template <class T> void pass_forward(const Pass& j) {
    constexpr i64 PART = 32;
    Net net{j.layer, j.layers, j.extra};
    i64 features = j.layer[0].in(), classes = j.layer[j.layers - 1].out();
    i64 part = j.kept ? j.samples : std::min(j.samples, PART), cap = whole<T>(part);
    i64 parts = (j.samples + part - 1) / part, kept = Space<T>::kept(net, cap);
    // One input for all devices is turned once.
    Owned<T> common(j.shared && !j.kept ? parts * features * cap : 1);
    if (j.shared && !j.kept)
        for (i64 c = 0; c < parts; c++) {
            i64 begin = c * part, n = std::min(part, j.samples - begin);
            turn((const T*)j.x + begin * features, cap, n, features, features, common.p + c * features * cap, cap);
        }
    spread(j.devices, j.threads, [&](auto next) {
        Owned<T> own(j.kept ? 1 : kept), pass(Space<T>::passing(net, cap));
        Space<T> space;
        std::vector<T*> w(j.params), b(j.buffers);
        for (i64 k = next(); k < j.devices; k = next()) {
            bind(j, k, w, b);
            space.lay(net, cap, j.kept ? (T*)j.kept + k * kept : own.p, pass.p);
            T* own_input = space.out[0];
            const T* x = (const T*)j.x + (j.shared ? 0 : k * j.samples * features);
            for (i64 c = 0; c < parts; c++) {
                i64 begin = c * part, n = std::min(part, j.samples - begin);
                if (j.shared && !j.kept) {
                    space.out[0] = common.p + c * features * cap;
                } else {
                    space.out[0] = own_input;
                    turn(x + begin * features, cap, n, features, features, own_input, cap);
                }
                forward(net, Weights<T>{w.data(), b.data()}, space, n, false, (const T* const*)nullptr);
                T* to = (T*)j.out + (k * j.samples + begin) * classes;
                const T* from = space.out[j.layers];
                for (i64 i = 0; i < n; i++)
                    for (i64 f = 0; f < classes; f++) to[i * classes + f] = from[f * cap + i];
            }
        }
    });
}

template <class T> void pass_backward(const Pass& j) {
    Net net{j.layer, j.layers, j.extra};
    i64 features = j.layer[0].in(), classes = j.layer[j.layers - 1].out(), cap = whole<T>(j.samples);
    i64 kept = Space<T>::kept(net, cap);
    spread(j.devices, j.threads, [&](auto next) {
        Owned<T> pass(Space<T>::passing(net, cap));
        Space<T> space;
        std::vector<T*> w(j.params), b(j.buffers), g(j.params);
        for (i64 k = next(); k < j.devices; k = next()) {
            bind(j, k, w, b);
            if (j.grads)
                for (i64 p = 0; p < j.params; p++) g[p] = (T*)j.grads[p] + k * j.sizes_of[p];
            space.lay(net, cap, (T*)j.kept + k * kept, pass.p);
            turn((const T*)j.out + k * j.samples * classes, cap, j.samples, classes, classes, space.grad[0], cap);
            T* gx = backward(net, Weights<T>{w.data(), b.data()}, j.grads ? g.data() : nullptr, space, j.samples, false, false,
                             (const T*)nullptr, i64(0), false, j.want_x != 0);
            if (gx)
                for (i64 i = 0; i < j.samples; i++)
                    for (i64 f = 0; f < features; f++)
                        ((T*)j.gx)[(k * j.samples + i) * features + f] = gx[f * cap + i];
        }
    });
}

template <class T> i64 kept(const Layer* layer, i64 layers, i64 samples) {
    return Space<T>::kept(Net{layer, layers, nullptr}, whole<T>(samples));
}

}  // namespace

extern "C" {
void fedkd_train(const Training* j) { train<REAL>(*j); }
void fedkd_forward(const Pass* j) { pass_forward<REAL>(*j); }
void fedkd_backward(const Pass* j) { pass_backward<REAL>(*j); }
int64_t fedkd_kept(const Layer* layer, int64_t layers, int64_t samples) { return kept<REAL>(layer, layers, samples); }
}
