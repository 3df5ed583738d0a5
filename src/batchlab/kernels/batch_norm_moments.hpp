// Moments of channels: sums around a pivot near the mean, and what they settle to.
#pragma once
#include "batch_norm_dispatch.hpp"
#include "batch_norm_threads.hpp"

namespace batchlab {

template <class T>
inline double as_double(T value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
  else if constexpr (std::is_same_v<T, Half>)
    return load_some(&value, 1)[0];
  else
    return value;
}

template <class T>
struct Moments {
  using A = typename Computed<T>::type;
  const T* x;
  const Layout& layout;
  Scratch<A> pivot;

  Moments(const T* x_, const Layout& layout_) : x(x_), layout(layout_), pivot(layout_.channels) {}

  // The mean of some of the first values: near the mean of all, or `settle` finds out that it is not.
  void choose_pivot(int64_t from, int64_t to) {
    constexpr int width = kWidth<A>;
    if (!layout.rows) {  // planes have a vector at least
      for (int64_t c = from; c < to; ++c)
        set_pivot(c, static_cast<A>(sum(Memory<T>::load(x + c * layout.size)) / width));
      return;
    }
    const int64_t some = std::min<int64_t>(layout.count / layout.part, 8);
    const int64_t stride = layout.channels * layout.part;
    int64_t c = from;
    if (layout.part == 1)
      for (; c + width <= to; c += width) {
        Lanes<A> total = {};
        for (int64_t row = 0; row < some; ++row) total += Memory<T>::load(x + row * stride + c);
        const Lanes<A> mean = total / static_cast<A>(some), zero = {};
        Memory<A>::store(pivot + c, mean - mean == zero ? mean : zero);
      }
    for (; c < to; ++c) {
      A total = 0;
      for (int64_t row = 0; row < some; ++row) total += static_cast<A>(as_double(x[row * stride + c * layout.part]));
      set_pivot(c, total / some);
    }
  }

  void set_pivot(int64_t c, A value) { pivot[c] = std::isfinite(value) ? value : A(0); }

  void sum_tile(int64_t from, int64_t to, int64_t first, int64_t last, double* one, double* two) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    const Last<A> end(layout.size);
    const int64_t ahead = beyond_cache<T>(layout) ? Ahead(p, sizeof(T), from, to, first, last).next_sample : 0;
    const auto distance = [from = x](Lanes<A> near, int64_t offset) { return Memory<T>::load(from + offset) - near; };
    with_known(ahead != 0, [&](auto reads_ahead) {
      sum_planes<A>(
          p, from, to, first, last, one, two, [pivots = pivot + 0](int64_t c) { return all(pivots[c]); },
          [distance, from = x, ahead, reads_ahead](Sums<A>& s, Lanes<A> near, int64_t offset) {
            if (reads_ahead.value) begin_to_read(from + offset + ahead);
            s.powers(distance(near, offset));
          },
          [distance, end](Sums<A>& s, Lanes<A> near, int64_t offset) {
            s.powers(from_lane<A>(distance(near, offset), end.lane));
          });
    });
  }

  // Of some vectors of columns in the rows of a section; `columns` are the pivots.
  template <int vectors, bool reads_ahead>
  void add(Sums<A>* s, const A* columns, const Section& section, int64_t row, int64_t last, int64_t q) const {
    Lanes<A> k[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) k[v] = Memory<A>::load(columns + q + v * kWidth<A>);
    const int64_t width = section.rows.columns, ahead = rows_ahead<T>(section.rows);
    const T* from = x + section.origin + q + row * width;
    for (; row < last; ++row, from += width)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        if (reads_ahead) begin_to_read(from + v * kWidth<A> + ahead);
        s[v].powers(Memory<T>::load(from + v * kWidth<A>) - k[v]);
      }
  }
  void add_some(Sums<A>& s, const A* columns, const Section& section, int64_t row, int64_t last, int64_t q,
                int64_t count) const {
    const Lanes<A> k = Memory<A>::load(columns + q);
    const int64_t width = section.rows.columns;
    const T* from = x + section.origin + q;
    for (; row < last; ++row) s.powers(load_some(from + row * width, count) - k);
  }

  void sum_block(const A* columns, const Section& section, const Block& block, double* one, double* two,
                 A* scratch) const {
    with_known(rows_read_ahead<T>(layout), [&](auto reads_ahead) {
      sum_rows<A>(
          block, walk_of_rows<T, A>(layout, 2, 3), one, two, scratch,
          [&](Sums<A>* s, int64_t row, int64_t last, int64_t q, auto vectors) {
            add<vectors.value, reads_ahead.value>(s, columns, section, row, last, q);
          },
          [&](Sums<A>& s, int64_t row, int64_t last, int64_t q, int64_t count) {
            add_some(s, columns, section, row, last, q, count);
          });
    });
  }

  // Means and variances of channels [from, to), the first at 0, from their sums. False if one of them needs more than
  // this: `settle` then.
  bool settle_all(int64_t from, int64_t to, const double* __restrict one, const double* __restrict two, double eps,
                  double* __restrict mean, double* __restrict rest, double* __restrict variance) const {
    const A* __restrict pivots = pivot + from;
    const double n = static_cast<double>(layout.count), least = eps >= 1e-30 || sizeof(A) == 8 ? 0 : 1e-30;
    int64_t open = 0;
    for (int64_t i = 0; i < to - from; ++i) {
      const double near = pivots[i], shift = one[i] / n, whole = near + shift, part = whole - near;
      const double square = shift * shift, found = two[i] / n - square, v = found > 0 ? found : 0;
      mean[i] = whole;
      rest[i] = (near - (whole - part)) + (shift - part);
      variance[i] = v;
      open += !((one[i] - one[i] == 0) & (two[i] - two[i] == 0) & (16 * v >= square) & (v >= least));
    }
    return open == 0;
  }

  // Mean and variance of a channel from its sums. False: the pivot was too far off, a better one is set.
  bool settle(int64_t c, double one, double two, double eps, double& mean, double& rest, double& variance) {
    const double n = static_cast<double>(layout.count), shift = one / n, from = pivot[c];
    mean = from + shift;
    // What the sum's rounding lost (Knuth's two-sum): in float64 it is all there is beyond the mean.
    const double part = mean - from;
    rest = std::isfinite(mean) ? (from - (mean - part)) + (shift - part) : 0;
    variance = std::max(two / n - shift * shift, 0.0);
    if (two != two) variance = two;
    if (std::isfinite(one) && std::isfinite(two)) {
      const bool lost = sizeof(A) == 4 && eps < 1e-30 && two / n < 1e-30;  // squares too small for float: no pivot helps
      if (!lost && 16 * variance < shift * shift) {
        const A better = static_cast<A>(mean);
        if (better != pivot[c]) {
          pivot[c] = better;
          return false;
        }
      }
      if (variance >= 1e-30 || eps >= 1e-30 || sizeof(A) == 8) return true;
    } else if (sizeof(A) == 8) {
      return true;  // inf or NaN in the input
    }
    rest = 0;
    in_double(c, mean, variance);  // sums or squares beyond what float can hold, or an input with inf or NaN
    return true;
  }

  void in_double(int64_t c, double& mean, double& variance) const {
    const double n = static_cast<double>(layout.count);
    double total = 0, squares = 0;
    each_of(c, [&](double value) { total += value; });
    mean = total / n;
    each_of(c, [&](double value) { squares += (value - mean) * (value - mean); });
    variance = squares / n;
  }

  template <class F>
  void each_of(int64_t c, F&& f) const {
    const int64_t size = layout.rows ? layout.part : layout.size, samples = layout.count / size;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < size; ++i) f(as_double(x[(n * layout.channels + c) * size + i]));
  }
};

// Moments of all channels, and what follows from them: settled(first channel, last channel, mean, rest, variance) for
// some, then ready(first channel, last channel), then what the tiles or blocks of these become.
using Settled =
    Call<void(int64_t from, int64_t to, const double* mean, const double* rest, const double* variance)>;
using Ready = Call<void(int64_t from, int64_t to)>;

template <class T>
void with_moments(const T* x, const Layout& layout, double eps, Settled settled, Ready ready, FinishTile finish_tile,
                  FinishBlock finish_block) {
  using A = typename Computed<T>::type;
  Moments<T> moments(x, layout);
  moments.choose_pivot(0, layout.channels);
  const auto settle = [&](int64_t from, int64_t to, const double* one, const double* two) {
    const int64_t size = to - from;
    Scratch<double> found(3 * size);
    double *mean = found + 0, *rest = found + size, *variance = found + 2 * size;
    if (!moments.settle_all(from, to, one, two, eps, mean, rest, variance)) return false;
    settled(from, to, mean, rest, variance);
    return true;
  };
  const auto settle_one = [&](int64_t c, double one, double two) {
    double mean, rest, variance;
    const bool done = moments.settle(c, one, two, eps, mean, rest, variance);
    settled(c, c + 1, &mean, &rest, &variance);
    return done;
  };
  if (!layout.rows) {
    in_tiles(
        layout, sizeof(T), beyond_cache<T>(layout),
        [&](int64_t a, int64_t b, int64_t first, int64_t last, double* one, double* two) {
          moments.sum_tile(a, b, first, last, one, two);
        },
        settle, settle_one, finish_tile);
    return;
  }
  Scratch<A> pivots(padded_columns<A>(layout));
  spread(layout, moments.pivot + 0, pivots + 0, 0, layout.channels);
  in_rows<A>(
      layout, sizeof(T),
      [&](const Section& section, const Block& block, double* one, double* two, void* scratch) {
        moments.sum_block(pivots + 0, section, block, one, two, static_cast<A*>(scratch));
      },
      [&](int64_t from, int64_t to, const Totals& totals) {
        bool done = settle(from, to, totals.one + from, totals.two + from);
        if (!done) {
          done = true;
          for (int64_t c = from; c < to; ++c) done &= settle_one(c, totals.one[c], totals.two[c]);
        }
        if (!done) spread(layout, moments.pivot + 0, pivots + 0, from, to);
        ready(from, to);
        return done;
      },
      finish_block);
}

}  // namespace batchlab
