// Batch norm where each channel of each sample is a plane of `size` neighbouring numbers: (N, C, size).
//
// Some channels at a time, so that what is read for the statistics is still in the cache when it is normalized. Planes
// are walked in the order of memory; vectors are summed lane by lane, and horizontally only now and then, in double.
#pragma once
#include <algorithm>
#include <type_traits>

#include "batch_norm_math.hpp"
#include "processor.hpp"

namespace batchlab {

constexpr int64_t kTileBytes = 1 << 20;   // of what is read twice, half of a common second-level cache
constexpr int64_t kMostChannels = 128;    // in a tile
constexpr int64_t kLaneAdditions = 64;    // to a lane of float, before it goes into a double
constexpr int64_t kOneChain = 16;         // vectors of a plane whose sums may wait for each other: the next plane's do not

struct Planes {
  int64_t samples, channels, size;
  int64_t numbers() const { return samples * channels * size; }
  int64_t at(int64_t sample, int64_t channel) const { return (sample * channels + channel) * size; }
  int64_t tile(int64_t bytes) const {
    return std::clamp<int64_t>(kTileBytes / std::max<int64_t>(1, samples * size * bytes), 1,
                               std::min(kMostChannels, channels));
  }
};

// Large inputs are read ahead of their use, too: while a tile is written past the caches, the next one is read into the
// half that is left for it. If a channel alone is more than that, the next sample's planes are what is read ahead.
struct Ahead {
  static constexpr int64_t kLeastPlane = 128;  // numbers; with shorter ones it depends on the processor

  static bool pays(const Planes& p) {
    return p.size >= kLeastPlane || p.numbers() >= pays_from().short_planes_ahead_numbers;
  }

  int64_t next_tile = 0, next_sample = 0;  // distance in numbers; 0: not read ahead

  // Of tiles [from, to) in samples [first, last), `bytes` to be read for each number.
  Ahead(const Planes& p, int64_t bytes, int64_t from, int64_t to, int64_t first, int64_t last) {
    const int64_t width = (to - from) * p.size;
    if (!pays(p)) return;
    if (width * (last - first) * bytes > kTileBytes / 2)
      next_sample = p.channels * p.size;
    else if (to < p.channels || last - first == 1)
      next_tile = width;
  }

  // Where samples are walked from the last to the first.
  int64_t backwards() const { return next_tile - next_sample; }
};

// The lanes of the last vector of a plane that the ones before it have not had: it starts so that it ends with the plane.
template <class A>
struct Last {
  int64_t start;  // in the plane; its end if there is no such vector
  int lane;       // the first one that is new
  explicit Last(int64_t size) : start(size), lane(0) {
    const int64_t over = size % kWidth<A>;
    if (over == 0) return;
    start = size - kWidth<A>;
    lane = static_cast<int>(kWidth<A> - over);
  }
};

// Sums of a plane, or of a piece of one: `add(sums, parameters, offset)` takes in the vector at an offset, and
// `add_last(sums, parameters, offset)` only what is new in it.
template <class A, class Parameters, class Add, class AddLast>
inline void sum_plane(Sums<A>& sums, int64_t begin, int64_t size, const Last<A>& last, const Parameters& of, Add&& add,
                      AddLast&& add_last) {
  constexpr int width = kWidth<A>;
  int64_t i = 0;
  if (size < kOneChain * width) {
    Sums<A> s = sums;
#pragma GCC unroll 1
    for (; i + width <= size; i += width) add(s, of, begin + i);
    if (last.lane) add_last(s, of, begin + last.start);
    sums = s;
    return;
  }
  Sums<A> s[4];
  for (; i + 4 * width <= size; i += 4 * width)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) add(s[k], of, begin + i + k * width);
  for (; i + width <= size; i += width) add(s[0], of, begin + i);
  if (last.lane) add_last(s[1], of, begin + last.start);
  s[0] += s[1];
  s[2] += s[3];
  s[0] += s[2];
  sums += s[0];
}

// Sums over the planes of channels [from, to) of samples [first, last). The functions are copies and hold copies, as in
// `each_plane`: so what is the same for all vectors of a plane is loaded once.
template <class A, class Parameters, class Add, class AddLast>
inline void sum_planes(const Planes& p, int64_t from, int64_t to, int64_t first, int64_t last, double* one, double* two,
                       Parameters parameters, Add add, AddLast add_last) {
  const int64_t piece = 4 * kWidth<A> * kLaneAdditions;  // of a large plane
  const int64_t often = std::max<int64_t>(1, piece / p.size);
  Sums<A> kept[kMostChannels];
  const auto flush = [&] {
    for (int64_t c = from; c < to; ++c) {
      one[c] += sum(kept[c - from].first);
      two[c] += sum(kept[c - from].second);
      kept[c - from] = {};
    }
  };
  // Of a plane in several pieces only the last one may have a part of a vector.
  const Last<A> none(0), of_plane((p.size - 1) % piece + 1);
  for (int64_t n = first; n < last; ++n) {
    for (int64_t c = from; c < to; ++c) {
      const auto of = parameters(c);
      int64_t begin = p.at(n, c), left = p.size;
      for (; left > piece; left -= piece, begin += piece) sum_plane(kept[c - from], begin, piece, none, of, add, add_last);
      sum_plane(kept[c - from], begin, left, of_plane, of, add, add_last);
    }
    if ((n - first) % often == often - 1) flush();
  }
  flush();
}

// What each vector of the planes [from, to) becomes: `value(parameters(channel), offset)`, given to `write(offset, value,
// past)`. Backwards: the samples that were read last for the sums are the likeliest to be in the cache. Vectors may
// overlap: outputs must not be inputs.
//
// The planes of a sample are neighbours, and are written as if they were one: at multiples of a vector, so that none lies
// in two lines of the cache, and a vector that two channels share has some lanes of both. With `past` these go past
// the caches.
//
// The functions are copies and should hold copies: what is written through a pointer could be, for all the compiler
// knows, what they refer to, and would be loaded again for every vector.
template <class A, bool past, class T, class Parameters, class Value, class Write>
inline void each_plane(const Planes& p, const T* output, int64_t from, int64_t to, int64_t first, int64_t last,
                       Parameters parameters, Value value, Write write) {
  constexpr int width = kWidth<A>;
  constexpr int64_t bytes = width * sizeof(T);
  for (int64_t n = last - 1; n >= first; --n) {
    int64_t end = p.at(n, from), i = end;
    const int64_t over = reinterpret_cast<uintptr_t>(output + i) % bytes;
    if (over != 0) {
      write(i, value(parameters(from), i), std::false_type());
      i += (bytes - over) / static_cast<int64_t>(sizeof(T));
    }
    for (int64_t c = from;;) {
      const auto of = parameters(c);
      end += p.size;
      for (; i + width <= end; i += width) write(i, value(of, i), std::bool_constant<past>());
      if (++c == to) break;
      if (i < end) {
        write(i, join(value(of, i), value(parameters(c), i), static_cast<int>(end - i)), std::bool_constant<past>());
        i += width;
      }
    }
    if (i < end) write(end - width, value(parameters(to - 1), end - width), std::false_type());
  }
  if constexpr (past) fence();
}

}  // namespace batchlab
