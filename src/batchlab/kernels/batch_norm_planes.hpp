// Batch norm where each channel of each sample is a plane of `size` neighbouring numbers: (N, C, size).
//
// Some channels at a time, so that what is read for the statistics is still in the cache when it is normalized. Planes
// are walked in the order of memory; vectors are summed lane by lane, and horizontally only now and then, in double.
#pragma once
#include <algorithm>
#include <type_traits>

#include "batch_norm_math.hpp"

namespace batchlab {

constexpr int64_t kTileBytes = 1 << 20;   // of x, half of a common second-level cache
constexpr int64_t kMostChannels = 128;    // in a tile
constexpr int64_t kLaneAdditions = 64;    // to a lane of float, before it goes into a double

struct Planes {
  int64_t samples, channels, size;
  int64_t at(int64_t sample, int64_t channel) const { return (sample * channels + channel) * size; }
  int64_t tile(int64_t bytes) const {
    return std::clamp<int64_t>(kTileBytes / std::max<int64_t>(1, samples * size * bytes), 1,
                               std::min(kMostChannels, channels));
  }
};

// f(start, number of the accumulator) for whole vectors; rest(start, lane) for the last one, which starts so that it
// ends with the plane: its lanes before `lane` were there already.
template <int width, class F, class G>
inline void sweep(int64_t size, F&& f, G&& rest) {
  int64_t i = 0;
  for (; i + 4 * width <= size; i += 4 * width) {
    f(i, 0);
    f(i + width, 1);
    f(i + 2 * width, 2);
    f(i + 3 * width, 3);
  }
  for (; i + width <= size; i += width) f(i, 0);
  if (i < size) rest(size - width, static_cast<int>(width - (size - i)));
}

// Sums over the planes of channels [from, to): `add(sums, offset, lane, channel)` takes in the vector at an offset.
template <class A, class Add>
inline void sum_planes(const Planes& p, int64_t from, int64_t to, int64_t first, int64_t last, double* one, double* two,
                       Add&& add) {
  constexpr int width = kWidth<A>;
  const int64_t piece = 4 * width * kLaneAdditions;  // of a large plane
  const int64_t often = std::max<int64_t>(1, piece / p.size);
  Sums<A> kept[kMostChannels];
  const auto flush = [&] {
    for (int64_t c = from; c < to; ++c) {
      one[c] += sum(kept[c - from].first);
      two[c] += sum(kept[c - from].second);
      kept[c - from] = {};
    }
  };
  for (int64_t n = first; n < last; ++n) {
    for (int64_t c = from; c < to; ++c) {
      const int64_t plane = p.at(n, c);
      for (int64_t start = 0; start < p.size; start += piece) {
        const int64_t size = std::min(piece, p.size - start), begin = plane + start;
        // Sub-planes shorter than a vector only occur after a whole one: they end with the plane all the same.
        Sums<A> s[4];
        if (size >= width) {
          sweep<width>(
              size, [&](int64_t i, int k) { add(s[k], begin + i, 0, c); },
              [&](int64_t i, int lane) { add(s[1], begin + i, lane, c); });
        } else {
          add(s[0], begin + size - width, static_cast<int>(width - size), c);
        }
        s[0] += s[1];
        s[2] += s[3];
        s[0] += s[2];
        kept[c - from] += s[0];
      }
    }
    if ((n - first) % often == often - 1) flush();
  }
  flush();
}

// f(offset, past) for every vector of the planes of channels [from, to), with f = each(channel); backwards: the last
// ones that were read for the sums are the likeliest to be in the cache. Vectors may overlap: outputs must not be inputs.
// With `past` those that lie at whole vectors of `output` are to go past the caches.
template <class A, bool past, class T, class Each>
inline void each_plane(const Planes& p, const T* output, int64_t from, int64_t to, int64_t first, int64_t last,
                       Each&& each) {
  constexpr int width = kWidth<A>;
  for (int64_t n = last - 1; n >= first; --n) {
    for (int64_t c = from; c < to; ++c) {
      const int64_t plane = p.at(n, c);
      const auto f = each(c);
      const auto near = [&](int64_t i) { f(plane + i, std::false_type()); };
      if constexpr (!past) {
        int64_t i = 0;
        for (; i + width <= p.size; i += width) near(i);
        if (i < p.size) near(p.size - width);
      } else {
        const int64_t bytes = width * sizeof(T), over = reinterpret_cast<uintptr_t>(output + plane) % bytes;
        const int64_t start = over == 0 ? 0 : (bytes - over) / static_cast<int64_t>(sizeof(T));
        if (start > 0) near(0);
        int64_t i = start;
        for (; i + width <= p.size; i += width) f(plane + i, std::true_type());
        if (i < p.size) near(p.size - width);
      }
    }
  }
  if constexpr (past) fence();
}

}  // namespace batchlab
