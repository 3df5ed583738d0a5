// Which thread takes which part of the input, and in which order: sums first, then what is made of them.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <numeric>

#include "batch_norm_layout.hpp"
#include "batch_norm_planes.hpp"
#include "batch_norm_tensors.hpp"
#include "call.hpp"

namespace batchlab {

constexpr int64_t kNumbersPerThread = 32768;
constexpr int64_t kFewestColumns = 1024;  // of a row at a time: of rows 2^n apart, few fit into a cache's sets
constexpr int kMostLooks = 3;            // a pivot that is bad after two corrections is as good as the numbers allow

inline int64_t grain(const Layout& layout, int64_t units) {
  return std::max<int64_t>(1, units * kNumbersPerThread / std::max<int64_t>(layout.numbers(), 1));
}

// Two sums a channel, in double.
struct Totals {
  Scratch<double> one, two;
  explicit Totals(int64_t channels) : one(channels), two(channels) {
    std::fill_n(one + 0, channels, 0.0);
    std::fill_n(two + 0, channels, 0.0);
  }
};

// A part of the rows: those of several short rows each, or what is left of these.
struct Section {
  Rows rows;
  int64_t origin;  // where it begins
  Rows before;     // the rows that end there

  // Where a number would be if all rows were as long as whole vectors: what `ReluMask` has for it.
  template <class A>
  static int64_t padded(int64_t columns) {
    return (columns + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
  }
  template <class A>
  int64_t place(int64_t row, int64_t column) const {
    return before.rows * padded<A>(before.columns) + row * padded<A>(rows.columns) + column;
  }
};

inline Section main_rows(const Layout& layout) { return {layout.main, 0, {0, 0}}; }
inline Section other_rows(const Layout& layout) {
  return {layout.rest, layout.main.rows * layout.main.columns, layout.main};
}

// Sums of blocks of one section into `totals`: each chunk of rows on its own, in an order that does not depend on the
// number of threads.
using SumBlock = Call<void(const Section& section, const Block& block, double* one, double* two, void* scratch)>;
using SettleChannels = Call<bool(int64_t from, int64_t to, const Totals& totals)>;
using FinishBlock = Call<void(const Section& section, const Block& block)>;

template <class A>
void sum_section(const Layout& layout, const Section& section, Totals& totals, SumBlock sum_block) {
  const Rows& r = section.rows;
  if (r.rows == 0) return;
  const int64_t padded = (r.columns + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
  // Each chunk has 16 bytes a column to write and to read: little beside its own rows.
  const int64_t chunks =
      std::clamp<int64_t>(r.rows * r.columns / kNumbersPerThread, 1, std::clamp<int64_t>(r.rows / 128, 1, 64));
  Scratch<double> sums(2 * r.columns * chunks);
  std::fill_n(sums + 0, 2 * r.columns * chunks, 0.0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(2 * padded);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* one = sums + 2 * r.columns * chunk;
      const Block block{r.rows * chunk / chunks, r.rows * (chunk + 1) / chunks, 0, r.columns};
      sum_block(section, block, one, one + r.columns, scratch + 0);
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* one = sums + 2 * r.columns * chunk;
    if (layout.part == 1) {
      for (int64_t q = 0; q < r.columns; q += layout.channels)
        for (int64_t c = 0; c < layout.channels; ++c) {
          totals.one[c] += one[q + c];
          totals.two[c] += one[r.columns + q + c];
        }
    } else {
      for (int64_t q = 0; q < r.columns; ++q) {
        totals.one[q / layout.part] += one[q];
        totals.two[q / layout.part] += one[r.columns + q];
      }
    }
  }
}

// The vectors of a block, which go to `output` and perhaps to others like it.
template <class A, class T, class Each, class Some>
void each_in_block(const Section& section, const Block& block, const T* output, const Layout& layout, const Walk& walk,
                   Each&& each, Some&& some) {
  const int64_t bytes = kWidth<A> * sizeof(T);
  const auto whole = [&](int64_t numbers) { return numbers * static_cast<int64_t>(sizeof(T)) % bytes == 0; };
  const bool past = beyond_cache<T>(layout) && reinterpret_cast<uintptr_t>(output) % bytes == 0 && whole(section.rows.columns) &&
                    whole(section.origin);
  with_known(past, rows_read_ahead<T>(layout), [&](auto far, auto reads_ahead) {
    each_row<A>(
        block, walk,
        [&](int64_t row, int64_t last, int64_t q, auto vectors) {
          each(section, row, last, q, vectors, far, reads_ahead);
        },
        [&](int64_t row, int64_t last, int64_t q, int64_t count) { some(section, row, last, q, count); });
    if (far.value) fence();
  });
}

// Columns that are summed, settled and finished together because all their rows stay in the cache until then; all of
// them if that would be few, or if a channel has several.
inline int64_t columns_together(const Layout& layout, int64_t bytes) {
  const int64_t columns = layout.main.columns;
  if (layout.part > 1 || columns != layout.channels) return columns;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t together = kTileBytes / std::max<int64_t>(1, layout.main.rows * bytes);
  if (threads > 1 && columns >= 256 * threads) together = std::min(together, columns / threads);
  together = together / 64 * 64;
  return together < kFewestColumns ? columns : std::min(together, columns);
}

// Rows: sum, settle each channel, finish. settle(first channel, last channel, totals) is false if those are to be summed
// again.
template <class A>
void in_rows(const Layout& layout, int64_t bytes, SumBlock sum_block, SettleChannels settle, FinishBlock finish) {
  const int64_t columns = layout.main.columns, together = columns_together(layout, bytes);
  Totals totals(layout.channels);
  const auto clear = [&](int64_t from, int64_t to) {
    std::fill(totals.one + from, totals.one + to, 0.0);
    std::fill(totals.two + from, totals.two + to, 0.0);
  };
  if (together < columns) {
    const Section section = main_rows(layout);
    const int64_t tiles = (columns + together - 1) / together;
    torch::stable::parallel_for(0, tiles, grain(layout, tiles), [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(2 * (together + kWidth<A>));
      for (int64_t tile = begin; tile < end; ++tile) {
        const Block block{0, section.rows.rows, tile * together, std::min(columns, (tile + 1) * together)};
        for (int look = 1;; ++look) {
          sum_block(section, block, totals.one + 0, totals.two + 0, scratch + 0);
          if (settle(block.from, block.to, totals) || look == kMostLooks) break;
          clear(block.from, block.to);
        }
        finish(section, block);
      }
    });
    return;
  }
  const Section sections[] = {main_rows(layout), other_rows(layout)};
  for (int look = 1;; ++look) {
    for (const Section& section : sections) sum_section<A>(layout, section, totals, sum_block);
    if (settle(0, layout.channels, totals) || look == kMostLooks) break;
    clear(0, layout.channels);  // again for all: the channels that are in order lose nothing
  }
  for (const Section& section : {sections[1], sections[0]}) {
    if (section.rows.rows == 0) continue;
    torch::stable::parallel_for(0, section.rows.rows, grain(layout, layout.main.rows + layout.rest.rows),
                                [&](int64_t begin, int64_t end) {
                                  finish(section, Block{begin, end, 0, section.rows.columns});
                                });
  }
}

// How planes are cut into pieces of work: tiles of channels, and samples too where there are fewer tiles than threads.
// Tiles are as good as equal, and as many for each thread: the last to finish is waited for. They begin where a line of
// the cache does, of floats, if there are enough channels: what lies in two tiles is written in two parts.
struct Cut {
  static constexpr int64_t kLine = 16;
  int64_t channels, tiles, chunks = 1;
  int64_t unit;  // channels from one beginning of a line to the next
  Cut(const Layout& layout, int64_t bytes, bool far)
      : channels(layout.channels), unit(kLine / std::gcd(kLine, layout.size)) {
    const Planes p{layout.samples, layout.channels, layout.size};
    int64_t tile = p.tile(far && Ahead::pays(p) ? 2 * bytes : bytes);
    const int64_t threads = torch::stable::get_num_threads();
    if (threads > 1) tile = std::min(tile, std::max<int64_t>(1, channels / (2 * threads)));
    if (tile > unit) tile = tile / unit * unit;
    tiles = (channels + tile - 1) / tile;
    if (tiles > threads) tiles = std::min((tiles + threads - 1) / threads * threads, channels);
    if (tiles * unit > channels) unit = 1;
    if (threads > 1 && tiles < 2 * threads && layout.numbers() > 2 * kNumbersPerThread)
      chunks = std::clamp<int64_t>(2 * threads / tiles, 1, layout.samples);
  }
  // Where a tile begins; the one behind the last: the end.
  int64_t channel(int64_t tile) const { return tile == tiles ? channels : channels * tile / tiles / unit * unit; }
};

// For each tile of planes: sum, settle, apply. settle(first channel, last channel, sums) looks at all of them at once, and
// is false if some need more: then settle_one(channel, sums) looks at each, and is false if it is to be summed again.
using SumTile = Call<void(int64_t from, int64_t to, int64_t first, int64_t last, double* one, double* two)>;
using Settle = Call<bool(int64_t from, int64_t to, const double* one, const double* two)>;
using SettleOne = Call<bool(int64_t channel, double one, double two)>;
using FinishTile = Call<void(int64_t from, int64_t to, int64_t first, int64_t last)>;

inline void in_tiles(const Layout& layout, int64_t bytes, bool far, SumTile sum_tile, Settle settle,
                     SettleOne settle_one, FinishTile finish) {
  const Cut cut(layout, bytes, far);
  const int64_t channels = layout.channels;
  const auto settle_all = [&](int64_t from, int64_t to, double* one, double* two) {
    if (settle(from, to, one + from, two + from)) return;
    for (int64_t c = from; c < to; ++c)
      for (int look = 1; !settle_one(c, one[c], two[c]) && look < kMostLooks; ++look) {
        one[c] = two[c] = 0;
        sum_tile(c, c + 1, 0, layout.samples, one, two);
      }
  };
  if (cut.chunks == 1) {
    Totals totals(channels);
    torch::stable::parallel_for(0, cut.tiles, grain(layout, cut.tiles), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t from = cut.channel(t), to = cut.channel(t + 1);
        sum_tile(from, to, 0, layout.samples, totals.one + 0, totals.two + 0);
        settle_all(from, to, totals.one + 0, totals.two + 0);
        finish(from, to, 0, layout.samples);
      }
    });
    return;
  }
  const int64_t pieces = cut.tiles * cut.chunks;
  Scratch<double> sums(2 * channels * cut.chunks);
  std::fill_n(sums + 0, 2 * channels * cut.chunks, 0.0);
  const auto piece = [&](int64_t i, auto&& f) {
    const int64_t chunk = i % cut.chunks, from = cut.channel(i / cut.chunks), to = cut.channel(i / cut.chunks + 1);
    f(chunk, from, to, layout.samples * chunk / cut.chunks, layout.samples * (chunk + 1) / cut.chunks);
  };
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      piece(i, [&](int64_t chunk, int64_t from, int64_t to, int64_t first, int64_t last) {
        double* one = sums + 2 * channels * chunk;
        sum_tile(from, to, first, last, one, one + channels);
      });
  });
  for (int64_t chunk = 1; chunk < cut.chunks; ++chunk)
    for (int64_t i = 0; i < 2 * channels; ++i) sums[i] += sums[2 * channels * chunk + i];
  settle_all(0, channels, sums + 0, sums + channels);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      piece(i, [&](int64_t, int64_t from, int64_t to, int64_t first, int64_t last) { finish(from, to, first, last); });
  });
}

// One pass over all of the input.
inline void everywhere(const Layout& layout, int64_t bytes, FinishTile tile, FinishBlock block) {
  if (layout.rows) {
    const int64_t rows = layout.main.rows + layout.rest.rows;
    for (const Section& section : {main_rows(layout), other_rows(layout)}) {
      if (section.rows.rows == 0) continue;
      torch::stable::parallel_for(0, section.rows.rows, grain(layout, rows), [&](int64_t begin, int64_t end) {
        block(section, Block{begin, end, 0, section.rows.columns});
      });
    }
    return;
  }
  const Cut cut(layout, bytes, false);
  const int64_t pieces = layout.samples * cut.tiles;
  torch::stable::parallel_for(0, pieces, grain(layout, pieces), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / cut.tiles, t = i % cut.tiles;
      tile(cut.channel(t), cut.channel(t + 1), n, n + 1);
    }
  });
}

}  // namespace batchlab
