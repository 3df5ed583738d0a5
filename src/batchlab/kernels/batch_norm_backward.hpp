// Backward: the gradient before the activation, its sums, and the gradient of the input.
#pragma once
#include "batch_norm_forward.hpp"

namespace batchlab {

template <class T, class Kind, Source source>
struct Gradient {
  using A = typename Computed<T>::type;
  Kind kind;
  const T* gradient;
  const T* x;
  const T* other;  // the output or the residual, where the source needs it
  ReluMask<A> mask;

  // `passes`: the bits of the mask.
  template <class Load>
  Lanes<A> operator()(Load&& load, const Affine<A>& affine, Lanes<A> value, uint32_t passes) const {
    const Lanes<A> g = load(gradient);
    if constexpr (source == Source::mask) return kind.before_mask(g, passes);
    if constexpr (source == Source::output) return kind.before_output(g, load(other));
    Lanes<A> pre = affine(value);
    if constexpr (source == Source::input_and_residual) pre += load(other);
    return kind.before(g, pre);
  }

  // The bits of the vector at a place of the mask, or at one that is a multiple of its width.
  uint32_t passes(int64_t place) const { return source == Source::mask ? mask.read(place) : 0; }
  template <int vectors = 1>
  auto passes_whole(int64_t place) const {
    if constexpr (source == Source::mask)
      return mask.template read_whole<vectors>(place);
    else
      return typename ReluMask<A>::template Words<vectors>{};
  }
};

template <class T, class Kind, Source source>
struct Backward {
  using A = typename Computed<T>::type;
  Gradient<T, Kind, source> before;
  T* input_gradient;
  T* residual_gradient;  // or null
  ChannelNumbers<A> numbers;
  ChannelNumbers<A> factors;  // b and c of InputGradient
  double count;               // of the values that the statistics are of; infinite if these were given
  T* kept = nullptr;          // where the gradient before the activation stays between the passes, if it does

  // The first pass leaves the gradient before the activation for the second, where memory can hold it without rounding
  // and it goes through the caches: where the residual's gradient will be, which it is, so that the second pass reads two
  // tensors and not three; or, if it takes an exponential, where the input's gradient will be. That in rows alone: there
  // no vector is read again after it was written.
  static constexpr bool can_keep = std::is_same_v<T, A> && (source != Source::input || std::is_same_v<Kind, Chosen>);
  T* pays_to_keep(const Layout& layout) const {
    if (!can_keep || beyond_cache<T>(layout)) return nullptr;
    if (residual_gradient) return residual_gradient;
    if constexpr (source == Source::input && std::is_same_v<Kind, Chosen>)
      if (layout.rows && before.kind.is_long()) return input_gradient;
    return nullptr;
  }

  Affine<A> affine(int64_t c) const {
    return {all(numbers[kMean][c]), all(numbers[kScale][c]), all(numbers[kShift][c])};
  }

  bool given() const { return std::isinf(count); }

  int64_t tensors() const { return (before.other != nullptr ? 4 : 3) + (residual_gradient != nullptr ? 1 : 0); }
  int64_t bytes() const { return static_cast<int64_t>(sizeof(T)) * (before.other != nullptr ? 3 : 2); }

  // What the sums and the gradient are found from.
  template <class F>
  void each_input(F&& f) const {
    f(before.x);
    f(before.gradient);
    if (source == Source::output || source == Source::input_and_residual) f(before.other);
  }

  // Gradients of the input and of the residual.
  struct Both {
    Lanes<A> input, residual;
    friend Both join(const Both& low, const Both& high, int first) {
      return {batchlab::join(low.input, high.input, first), batchlab::join(low.residual, high.residual, first)};
    }
  };

  // The gradient before the activation in the second pass.
  template <class Load>
  Lanes<A> again(Load&& load, const Affine<A>& a, Lanes<A> value, uint32_t passes) const {
    if constexpr (can_keep)
      if (kept) return load(kept);
    return before(load, a, value, passes);
  }

  Both vector(const Affine<A>& a, const InputGradient<A>& change, int64_t offset, uint32_t passes) const {
    const auto load = [&](const T* of) { return Memory<T>::load(of + offset); };
    const Lanes<A> value = load(before.x), g = again(load, a, value, passes);
    return {change(a, g, value), g};
  }

  template <bool past>
  void write(int64_t offset, const Both& both) const {
    put<past>(input_gradient + offset, both.input);
    // Its memory begins at a multiple of a vector where that of the other gradient does: both come from `empty_as`.
    if (residual_gradient && !kept) put<past>(residual_gradient + offset, both.residual);
  }

  void sum_tile(const Layout& layout, int64_t from, int64_t to, int64_t first, int64_t last, double* one,
                double* two) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    const Last<A> end(layout.size);
    const int64_t ahead = beyond_cache<T>(layout) ? Ahead(p, bytes(), from, to, first, last).next_sample : 0;
    const auto take = [here = *this](const Affine<A>& a, int64_t offset, auto&& f) {
      const auto load = [&](const T* of) { return Memory<T>::load(of + offset); };
      const Lanes<A> value = load(here.before.x), g = here.before(load, a, value, here.before.passes(offset));
      if constexpr (can_keep)
        if (here.kept) Memory<T>::store(here.kept + offset, g);
      f(g, value - a.mean);
    };
    with_known(ahead != 0, [&](auto reads_ahead) {
      sum_planes<A>(
          p, from, to, first, last, one, two, [here = *this](int64_t c) { return here.affine(c); },
          [take, here = *this, ahead, reads_ahead](Sums<A>& s, const Affine<A>& a, int64_t offset) {
            if (reads_ahead.value) here.each_input([&](const T* of) { begin_to_read(of + offset + ahead); });
            take(a, offset, [&](Lanes<A> g, Lanes<A> d) { s.products(g, d); });
          },
          [take, end](Sums<A>& s, const Affine<A>& a, int64_t offset) {
            take(a, offset, [&](Lanes<A> g, Lanes<A> d) {
              s.products(from_lane<A>(g, end.lane), from_lane<A>(d, end.lane));
            });
          });
    });
  }

  void finish_tile(const Layout& layout, int64_t from, int64_t to, int64_t first, int64_t last) const {
    const Planes p{layout.samples, layout.channels, layout.size};
    const int64_t ahead = Ahead(p, bytes(), from, to, first, last).backwards();
    with_known(beyond_cache<T>(layout), ahead != 0, [&](auto past, auto reads_ahead) {
      each_plane<A, past.value>(
          p, input_gradient, from, to, first, last,
          [here = *this](int64_t c) {
            return std::pair(here.affine(c),
                             InputGradient<A>{all(here.factors[0][c]), all(here.factors[1][c]), here.given()});
          },
          [here = *this, ahead, reads_ahead](const auto& of, int64_t offset) {
            if (reads_ahead.value) here.each_input([&](const T* input) { begin_to_read(input + offset + ahead); });
            return here.vector(of.first, of.second, offset, here.before.passes(offset));
          },
          [here = *this](int64_t offset, const Both& both, auto past) {
            here.template write<past.value>(offset, both);
          });
    });
  }

  // Parameters of columns: mean, scale, shift, b, c; `padded` apart.
  struct Columns {
    const A* data;
    int64_t padded;
    bool given;
    Lanes<A> operator()(int which, int64_t q) const { return Memory<A>::load(data + which * padded + q); }
    Affine<A> affine(int64_t q) const { return {(*this)(0, q), (*this)(1, q), (*this)(2, q)}; }
    InputGradient<A> change(int64_t q) const {
      return {(*this)(3, q), (*this)(4, q), given};
    }
  };
  static constexpr int kColumnNumbers = 5;

  template <int vectors, bool reads_ahead>
  void add(Sums<A>* s, const Columns& columns, const Section& section, int64_t row, int64_t last, int64_t q) const {
    Affine<A> a[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) a[v] = columns.affine(q + v * kWidth<A>);
    const int64_t padded_step = Section::padded<A>(section.rows.columns), ahead = rows_ahead<T>(section.rows);
    int64_t place = section.place<A>(row, q);
    for (int64_t at = section.origin + row * section.rows.columns + q; row < last;
         ++row, at += section.rows.columns, place += padded_step) {
      const auto passes = before.template passes_whole<vectors>(place);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const int64_t offset = at + v * kWidth<A>;
        if (reads_ahead) each_input([&](const T* of) { begin_to_read(of + offset + ahead); });
        const auto load = [&](const T* of) { return Memory<T>::load(of + offset); };
        const Lanes<A> value = load(before.x), g = before(load, a[v], value, passes[v]);
        if constexpr (can_keep)
          if (kept) Memory<T>::store(kept + offset, g);
        s[v].products(g, value - a[v].mean);
      }
    }
  }

  void add_some(Sums<A>& s, const Columns& columns, const Section& section, int64_t row, int64_t last, int64_t q,
                int64_t count) const {
    const Affine<A> a = columns.affine(q);
    for (; row < last; ++row) {
      const int64_t offset = section.origin + row * section.rows.columns + q;
      const auto load = [&](const T* of) { return load_some(of + offset, count); };
      const Lanes<A> value = load(before.x), g = before(load, a, value, before.passes_whole(section.place<A>(row, q))[0]);
      if constexpr (can_keep)
        if (kept) store_some(kept + offset, g, count);
      s.products(g, value - a.mean);
    }
  }

  void sum_block(const Layout& layout, const Columns& columns, const Section& section, const Block& block, double* one,
                 double* two, A* scratch) const {
    with_known(rows_read_ahead<T>(layout), [&](auto reads_ahead) {
      sum_rows<A>(
          block, walk_of_rows<T, A>(layout, tensors(), 5), one, two, scratch,
          [&](Sums<A>* s, int64_t row, int64_t last, int64_t q, auto vectors) {
            add<vectors.value, reads_ahead.value>(s, columns, section, row, last, q);
          },
          [&](Sums<A>& s, int64_t row, int64_t last, int64_t q, int64_t count) {
            add_some(s, columns, section, row, last, q, count);
          });
    });
  }

  void block(const Layout& layout, const Columns& columns, const Section& section, const Block& of) const {
    const int64_t width = section.rows.columns;
    each_in_block<A>(
        section, of, input_gradient, layout, walk_of_rows<T, A>(layout, tensors(), 5),
        [&](const Section& s, int64_t row, int64_t last, int64_t q, auto vectors, auto past, auto reads_ahead) {
          const Backward here = *this;
          const int64_t step = width, ahead = rows_ahead<T>(s.rows);
          Affine<A> a[vectors.value];
          InputGradient<A> f[vectors.value];
#pragma GCC unroll 8
          for (int v = 0; v < vectors.value; ++v) {
            a[v] = columns.affine(q + v * kWidth<A>);
            f[v] = columns.change(q + v * kWidth<A>);
          }
          const int64_t padded_step = Section::padded<A>(step);
          int64_t place = s.place<A>(last - 1, q);
          for (int64_t at = s.origin + (last - 1) * step + q; row < last; --last, at -= step, place -= padded_step) {
            const auto passes = here.before.template passes_whole<vectors.value>(place);
#pragma GCC unroll 8
            for (int v = 0; v < vectors.value; ++v) {
              const int64_t offset = at + v * kWidth<A>;
              if (reads_ahead.value) here.each_input([&](const T* of) { begin_to_read(of + offset - ahead); });
              here.template write<past.value>(offset, here.vector(a[v], f[v], offset, passes[v]));
            }
          }
        },
        [&](const Section& s, int64_t row, int64_t last, int64_t q, int64_t count) {
          const Affine<A> a = columns.affine(q);
          const InputGradient<A> f = columns.change(q);
          for (; row < last; ++row) {
            const int64_t offset = s.origin + row * width + q;
            const auto load = [&](const T* of) { return load_some(of + offset, count); };
            const Lanes<A> value = load(before.x), g = again(load, a, value, before.passes_whole(s.place<A>(row, q))[0]);
            store_some(input_gradient + offset, f(a, g, value), count);
            if (residual_gradient && !kept) store_some(residual_gradient + offset, g, count);
          }
        });
  }

  // Σ g and Σ g (x - mean) of channels [from, to), the first at 0, to the factors and to Σ g x̂ and Σ g.
  void prepare(int64_t from, int64_t to, const double* __restrict one, const double* __restrict two,
               A* __restrict of_weight, A* __restrict of_bias) const {
    const A *__restrict inverse = numbers[kInverse] + from, *__restrict rest = numbers[kRest] + from;
    const A* __restrict scale = numbers[kScale] + from;
    A *__restrict b = factors[0] + from, *__restrict c = factors[1] + from;
    const double share = given() ? 0 : 1 / count;
    for (int64_t i = 0; i < to - from; ++i) {
      const double centered = two[i] * inverse[i] - rest[i] * one[i], slope = -scale[i] * centered * inverse[i] * share;
      b[i] = static_cast<A>(slope);
      c[i] = static_cast<A>(-scale[i] * (one[i] - centered * rest[i]) * share);
      of_weight[from + i] = static_cast<A>(centered);
      of_bias[from + i] = static_cast<A>(one[i]);
    }
  }
};

// All the numbers that the columns of rows need.
template <class T, class Problem>
struct GradientColumns {
  using A = typename Computed<T>::type;
  const Layout& layout;
  const Problem& problem;
  int64_t padded;
  Scratch<A> data;
  GradientColumns(const Layout& layout_, const Problem& problem_)
      : layout(layout_),
        problem(problem_),
        padded(layout_.rows ? padded_columns<A>(layout_) : 0),
        data(Problem::kColumnNumbers * padded) {
    if (!layout.rows) return;
    for (int i = 0; const int which : {kMean, kScale, kShift})
      spread(layout, problem.numbers[which], data + padded * i++, 0, layout.channels);
  }
  void fill(int64_t from, int64_t to) const {
    for (int which = 0; which < 2; ++which)
      spread(layout, problem.factors[which], data + padded * (3 + which), from, to);
  }
  typename Problem::Columns operator()() const { return {data + 0, padded, problem.given()}; }
};

// Sums of all channels, and what follows from them: summed(first channel, last channel, Σ g, Σ g (x - mean)) for some, then
// what the tiles or blocks become.
using Summed = Call<void(int64_t from, int64_t to, const double* one, const double* two)>;

template <class T, class Problem>
void with_sums(const Layout& layout, const Problem& problem, Summed summed, bool finish) {
  using A = typename Computed<T>::type;
  if (!layout.rows) {
    in_tiles(
        layout, problem.bytes(), beyond_cache<T>(layout),
        [&](int64_t a, int64_t b, int64_t first, int64_t last, double* one, double* two) {
          problem.sum_tile(layout, a, b, first, last, one, two);
        },
        [&](int64_t from, int64_t to, const double* one, const double* two) {
          summed(from, to, one, two);
          return true;
        },
        [](int64_t, double, double) { return true; },
        [&](int64_t a, int64_t b, int64_t first, int64_t last) {
          if (finish) problem.finish_tile(layout, a, b, first, last);
        });
    return;
  }
  const GradientColumns<T, Problem> columns(layout, problem);
  in_rows<A>(
      layout, 2 * sizeof(T),
      [&](const Section& section, const Block& block, double* one, double* two, void* scratch) {
        problem.sum_block(layout, columns(), section, block, one, two, static_cast<A*>(scratch));
      },
      [&](int64_t from, int64_t to, const Totals& totals) {
        summed(from, to, totals.one + from, totals.two + from);
        if (finish) columns.fill(from, to);
        return true;
      },
      [&](const Section& section, const Block& block) {
        if (finish) problem.block(layout, columns(), section, block);
      });
}

// The input's gradient from factors that are there.
template <class T, class Problem>
void without_sums(const Layout& layout, const Problem& problem) {
  const GradientColumns<T, Problem> columns(layout, problem);
  if (layout.rows) columns.fill(0, layout.channels);
  everywhere(
      layout, 2 * sizeof(T),
      [&](int64_t a, int64_t b, int64_t first, int64_t last) { problem.finish_tile(layout, a, b, first, last); },
      [&](const Section& section, const Block& block) { problem.block(layout, columns(), section, block); });
}

// f(the problem) with everything that is known of it compiled in. The gradient in front of the activation is found from
// a mask, from the output, from the input, or, with a residual that the output does not tell of, from both.
template <class T, class F>
void with_problem(const Tensor& x, const Tensor& gradient, const std::optional<Tensor>& output,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& mask,
                  const ChannelNumbers<typename Computed<T>::type>& numbers, int64_t activation, F&& f) {
  using A = typename Computed<T>::type;
  const T* from = static_cast<const T*>(x.const_data_ptr());
  const T* behind = static_cast<const T*>(gradient.const_data_ptr());
  with_activation<T>(activation, [&](auto kind) {
    using Kind = decltype(kind);
    const auto go = [&](auto source, const T* other) {
      constexpr Source s = decltype(source)::value;
      const ReluMask<A> bits{const_cast<uint8_t*>(data_or_null<uint8_t>(mask))};
      f(Backward<T, Kind, s>{{kind, behind, from, other, bits}, nullptr, nullptr, numbers, {}, 0});
    };
    if constexpr (!std::is_same_v<Kind, Nothing>)
      if (mask) return go(std::integral_constant<Source, Source::mask>{}, nullptr);
    if constexpr (!std::is_same_v<Kind, Nothing>)
      if (output) return go(std::integral_constant<Source, Source::output>{}, data_or_null<T>(output));
    if constexpr (std::is_same_v<Kind, Chosen>)
      if (residual) return go(std::integral_constant<Source, Source::input_and_residual>{}, data_or_null<T>(residual));
    constexpr bool any = std::is_same_v<Kind, Nothing>;
    STD_TORCH_CHECK(any || !residual, "batch_norm: a ReLU's gradient needs the output");
    go(std::integral_constant<Source, Source::input>{}, nullptr);
  });
}

}  // namespace batchlab
