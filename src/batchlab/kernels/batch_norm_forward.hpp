// Forward: what moments make of a channel, and the output.
#pragma once
#include "batch_norm_moments.hpp"
#include "batch_norm_relu_mask.hpp"

namespace batchlab {

// Numbers of a channel: rows of the tensor `saved`, which the backward pass is given, and what follows from them with
// weight and bias, which each pass finds for itself (and what the running statistics alone need). What the mean lost by
// rounding is saved in standard deviations: of numbers that are near the least there are, the rest is less than that.
enum Number { kMean, kRest, kInverse, kScale, kShift, kVariance, kLost };
constexpr int kSaved = kInverse + 1;

template <class A>
struct ChannelNumbers {
  A* saved;
  A* found;  // (2, channels), in the forward pass 4
  int64_t channels;
  A* operator[](int which) const {
    return which < kSaved ? saved + which * channels : found + (which - kSaved) * channels;
  }
};

template <class A>
struct Parameters {
  const A* weight;
  const A* bias;
  double eps;

  // Scale and shift of channels [from, to). Forward and backward have to find the same bits, for what a ReLU lets through
  // is computed twice: of floats the product is exact in double, so that nothing depends on what compilers contract.
  void scale_and_shift(const ChannelNumbers<A>& numbers, int64_t from, int64_t to) const {
    const A *__restrict rest = numbers[kRest] + from, *__restrict inverse = numbers[kInverse] + from;
    A *__restrict scale = numbers[kScale] + from, *__restrict shift = numbers[kShift] + from;
    const A *__restrict w = weight ? weight + from : nullptr, *__restrict b = bias ? bias + from : nullptr;
    for (int64_t i = 0; i < to - from; ++i) {
      const A s = w ? inverse[i] * w[i] : inverse[i];
      scale[i] = s;
      // x - mean is exact or nearly so; what the mean has beyond its rounding is taken off behind the scale.
      shift[i] = static_cast<A>((b ? b[i] : 0) - static_cast<double>(rest[i]) * (w ? w[i] : A(1)));
    }
  }

  // From mean and variance of channels [from, to), the first at 0, to what is applied, in double.
  void prepare(const ChannelNumbers<A>& numbers, int64_t from, int64_t to, const double* __restrict mean,
               const double* __restrict rest, const double* __restrict variance) const {
    A *__restrict high = numbers[kMean] + from, *__restrict low = numbers[kRest] + from;
    A *__restrict inverse = numbers[kInverse] + from, *__restrict kept = numbers[kVariance] + from;
    A* __restrict lost = numbers[kLost] + from;
    const double more = eps;
    for (int64_t i = 0; i < to - from; ++i) {
      const A rounded = static_cast<A>(mean[i]);
      high[i] = rounded;
      const double beyond = (mean[i] - rounded) + rest[i], one = 1 / std::sqrt(variance[i] + more);
      lost[i] = static_cast<A>(beyond);
      low[i] = static_cast<A>(beyond * one);
      inverse[i] = static_cast<A>(one);
      kept[i] = static_cast<A>(variance[i]);
    }
    scale_and_shift(numbers, from, to);
  }
};

template <class T, class Kind, bool has_residual, bool keeps_mask = false>
struct Apply {
  using A = typename Computed<T>::type;
  Kind kind;
  const T* x;
  const T* residual;
  T* y;
  ReluMask<A> mask;

  Lanes<A> before(const Affine<A>& affine, int64_t offset) const {
    Lanes<A> pre = affine(Memory<T>::load(x + offset));
    if constexpr (has_residual) pre += Memory<T>::load(residual + offset);
    return pre;
  }
  Lanes<A> vector(const Affine<A>& affine, int64_t offset) const { return kind.value(before(affine, offset)); }
  void some(const Affine<A>& affine, int64_t offset, int64_t place, int64_t count) const {
    Lanes<A> pre = affine(load_some(x + offset, count));
    if constexpr (has_residual) pre += load_some(residual + offset, count);
    const Lanes<A> value = kind.value(pre);
    store_some(y + offset, value, count);
    if constexpr (keeps_mask) mask.write_whole(place, kind.passes(value));
  }

  void tile(const Layout& layout, const ChannelNumbers<A>& numbers, int64_t from, int64_t to, int64_t first,
            int64_t last) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    const int64_t ahead = Ahead(p, sizeof(T), from, to, first, last).backwards();
    const int64_t once = last - first == 1 ? ahead : -p.at(1, 0);  // what no sums were taken of is read here only
    with_known(beyond_cache<T>(layout), ahead != 0, [&](auto past, auto reads_ahead) {
      each_plane<A, past.value>(
          p, y, from, to, first, last,
          [numbers](int64_t c) {
            return Affine<A>{all(numbers[kMean][c]), all(numbers[kScale][c]), all(numbers[kShift][c])};
          },
          [here = *this, ahead, once, reads_ahead](const Affine<A>& affine, int64_t offset) {
            if (reads_ahead.value) begin_to_read(here.x + offset + ahead);
            if (reads_ahead.value && has_residual) begin_to_read(here.residual + offset + once);
            return here.vector(affine, offset);
          },
          [kind = kind, y = y, mask = mask](int64_t offset, Lanes<A> value, auto far) {
            put<far.value>(y + offset, value);
            if constexpr (keeps_mask) {
              const uint32_t bits = kind.passes(value);
              if (offset % kWidth<A> == 0)
                mask.write_whole(offset, bits);
              else
                mask.write_among_others(offset, bits);
            }
          });
    });
  }

  // `columns` are mean, scale and shift of all columns, `padded` apart.
  void block(const Layout& layout, const A* columns, int64_t padded, const Section& section, const Block& of) const {
    const int64_t width = section.rows.columns;
    const auto affine = [&](int64_t q) {
      return Affine<A>{Memory<A>::load(columns + q), Memory<A>::load(columns + padded + q),
                       Memory<A>::load(columns + 2 * padded + q)};
    };
    each_in_block<A>(
        section, of, y, layout, walk_of_rows<T, A>(layout, has_residual ? 3 : 2, 3),
        [&](const Section& s, int64_t row, int64_t last, int64_t q, auto vectors, auto past, auto reads_ahead) {
          const Apply here = *this;
          const int64_t step = width, ahead = rows_ahead<T>(s.rows);
          Affine<A> a[vectors.value];
#pragma GCC unroll 8
          for (int v = 0; v < vectors.value; ++v) a[v] = affine(q + v * kWidth<A>);
          const int64_t padded_step = Section::padded<A>(step);
          int64_t place = s.place<A>(last - 1, q);
          for (int64_t at = s.origin + (last - 1) * step + q; row < last; --last, at -= step, place -= padded_step) {
            typename ReluMask<A>::template Words<vectors.value> passes;
#pragma GCC unroll 8
            for (int v = 0; v < vectors.value; ++v) {
              const int64_t offset = at + v * kWidth<A>;
              if (reads_ahead.value) begin_to_read(here.x + offset - ahead);
              if (reads_ahead.value && has_residual) begin_to_read(here.residual + offset - ahead);
              if constexpr (keeps_mask) {
                const Lanes<A> pre = here.before(a[v], offset);
                const uint32_t bits = here.kind.passes(pre);
                put<past.value>(here.y + offset, here.kind.before_mask(pre, bits));  // its value: a ReLU multiplies
                passes.set(v, bits);
              } else {
                put<past.value>(here.y + offset, here.vector(a[v], offset));
              }
            }
            if constexpr (keeps_mask) here.mask.write_whole(place, passes);
          }
        },
        [&](const Section& s, int64_t row, int64_t last, int64_t q, int64_t count) {
          const Affine<A> a = affine(q);
          for (; row < last; ++row) some(a, s.origin + row * width + q, s.place<A>(row, q), count);
        });
  }
};

// f(what applies the given activation) with everything that is known of it compiled in.
template <class T, class F>
void with_apply(const Tensor& x, const std::optional<Tensor>& residual, Tensor& y,
                ReluMask<typename Computed<T>::type> mask, int64_t activation, F&& f) {
  const T* from = static_cast<const T*>(x.const_data_ptr());
  const T* of_residual = data_or_null<T>(residual);
  T* to = static_cast<T*>(y.mutable_data_ptr());
  with_activation<T>(activation, [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (!std::is_same_v<Kind, Nothing>)
      if (mask.bytes) return f(Apply<T, Kind, true, true>{kind, from, of_residual, to, mask});
    if (residual)
      f(Apply<T, Kind, true>{kind, from, of_residual, to, {}});
    else
      f(Apply<T, Kind, false>{kind, from, nullptr, to, {}});
  });
}

// Mean, scale and shift of the columns.
template <class A>
struct AffineColumns {
  const Layout& layout;
  const ChannelNumbers<A>& numbers;
  int64_t padded;
  Scratch<A> data;
  AffineColumns(const Layout& layout_, const ChannelNumbers<A>& numbers_)
      : layout(layout_),
        numbers(numbers_),
        padded(layout_.rows ? padded_columns<A>(layout_) : 0),
        data(3 * padded) {}
  void fill(int64_t from, int64_t to) const {
    for (int i = 0; const int which : {kMean, kScale, kShift})
      spread(layout, numbers[which], data + padded * i++, from, to);
  }
};

// y with the batch's own statistics; its numbers, and the mask if there is one, are filled in.
template <class T, class A>
void normalize(const Tensor& x, const std::optional<Tensor>& residual, Tensor& y, const Parameters<A>& parameters,
               const ChannelNumbers<A>& numbers, ReluMask<A> mask, int64_t activation) {
  Layout layout = layout_of<A>(x);
  if (residual && activation != 0) layout.use_with_residual();
  const AffineColumns<A> columns(layout, numbers);
  with_apply<T>(x, residual, y, mask, activation, [&](const auto& apply) {
    with_moments<T>(
        apply.x, layout, parameters.eps,
        [&](int64_t from, int64_t to, const double* mean, const double* rest, const double* variance) {
          parameters.prepare(numbers, from, to, mean, rest, variance);
        },
        [&](int64_t from, int64_t to) { columns.fill(from, to); },
        [&](int64_t a, int64_t b, int64_t first, int64_t last) { apply.tile(layout, numbers, a, b, first, last); },
        [&](const Section& section, const Block& block) {
          apply.block(layout, columns.data + 0, columns.padded, section, block);
        });
  });
}

// y with the numbers that are there, and the mask if there is one.
template <class T, class A>
void normalize_given(const Tensor& x, const std::optional<Tensor>& residual, Tensor& y,
                     const ChannelNumbers<A>& numbers, ReluMask<A> mask, int64_t activation) {
  Layout layout = layout_of<A>(x);
  layout.cache_bytes = kEvaluationCacheBytes;
  const AffineColumns<A> columns(layout, numbers);
  if (layout.rows) columns.fill(0, layout.channels);
  with_apply<T>(x, residual, y, mask, activation, [&](const auto& apply) {
    everywhere(
        layout, sizeof(T),
        [&](int64_t a, int64_t b, int64_t first, int64_t last) { apply.tile(layout, numbers, a, b, first, last); },
        [&](const Section& section, const Block& block) {
          apply.block(layout, columns.data + 0, columns.padded, section, block);
        });
  });
}

// A running statistic takes in what the batch had.
template <class A>
void move(const std::optional<Tensor>& running, int64_t channels, double momentum, const A* batch, double factor,
          const A* more) {
  if (!running) return;
  const auto average = [&](auto* values) {
    for (int64_t c = 0; c < channels; ++c) {
      const double value = (static_cast<double>(batch[c]) + (more ? more[c] : 0)) * factor;
      const double old = values[c];  // from the nearer end, as torch.lerp: momentum 1 gives the batch's value itself
      values[c] = static_cast<std::remove_reference_t<decltype(values[0])>>(
          momentum < 0.5 ? old + momentum * (value - old) : value - (1 - momentum) * (value - old));
    }
  };
  if (running->scalar_type() == ScalarType::Double)
    average(static_cast<double*>(running->mutable_data_ptr()));
  else
    average(static_cast<float*>(running->mutable_data_ptr()));
}

}  // namespace batchlab
