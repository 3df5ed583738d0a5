// What is best on the processor that this runs on, where processors differ.
#pragma once
#include <cstdint>
#include <limits>

namespace batchlab {

// Sizes of a tensor from which on something pays.
struct PaysFrom {
  // Of training: to write outputs past the caches. With a residual and its gradient six tensors are in use instead of
  // four, and planes leave the caches sooner. Of several threads each has a cache of its own, where rows stay longer.
  int64_t past_caches_bytes, past_caches_with_residual_bytes, rows_of_threads_past_caches_bytes;
  // To begin to read early what is walked in short stretches, which processors do by themselves, but only to an end:
  // rows of neighbouring columns, and planes of fewer than `Ahead::kLeastPlane` numbers.
  int64_t rows_ahead_bytes, short_planes_ahead_numbers;
  // To walk rows one by one, counting all that a pass reads and writes: memory likes to be used in its order, while a
  // cache does not mind to be walked a few columns at a time, whose parameters then stay in registers.
  int64_t rows_one_by_one_bytes;
};

// Measured in whole training steps of small networks, and layer by layer. Intel's (a Xeon with 2 MiB of second-level
// cache a core) read on over short stretches until memory itself is waited for, and lose by any help before. AMD's (an
// EPYC, Zen 5) stop at every stretch, and what is in their third-level cache comes back soon.
inline const PaysFrom& pays_from() {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
  static const bool amd = __builtin_cpu_is("amd");
#else
  constexpr bool amd = false;
#endif
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  static constexpr PaysFrom of_amd{5 << 20, (10 << 20) / 3, 8 << 20, 4 << 20, 1 << 20, 32 << 20};
  static constexpr PaysFrom of_others{1 << 20, 1 << 20, 1 << 20, 20 << 20, kNever, kNever};
  return amd ? of_amd : of_others;
}

}  // namespace batchlab
