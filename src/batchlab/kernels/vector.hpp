// Vectors of the machine's width, by the compiler's own vector types: one source for AVX-512, AVX2, NEON and the rest.
//
// Arithmetic is float for float, bfloat16 and half, and double for double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace batchlab {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class A>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int width = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integers __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Vector<double> {
  static constexpr int width = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integers __attribute__((vector_size(kVectorBytes)));
};

// What numbers of type T are computed with.
template <class T>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};

template <class A>
using Lanes = typename Vector<A>::type;
template <class A>
constexpr int kWidth = Vector<A>::width;

// A list of equal values becomes one broadcast; a loop over lanes does not.
template <class A, size_t... lane>
inline Lanes<A> all_of(A value, std::index_sequence<lane...>) {
  return Lanes<A>{((void)lane, value)...};
}
template <class A>
inline Lanes<A> all(A value) {
  return all_of<A>(value, std::make_index_sequence<kWidth<A>>());
}

template <class A, size_t... lane>
inline typename Vector<A>::integers numbered(std::index_sequence<lane...>) {
  return typename Vector<A>::integers{static_cast<int>(lane)...};
}

// A bit for each lane of a comparison's result, which is -1 or 0.
template <class Integers>
inline uint32_t bits_of_lanes(Integers lanes) {
#if defined(__AVX__) && !defined(__AVX512F__)
  if constexpr (sizeof(lanes[0]) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)lanes));
#elif defined(__SSE2__) && !defined(__AVX512F__)
  if constexpr (sizeof(lanes[0]) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes));
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)lanes));
#else
  uint32_t bits = 0;
  for (int i = 0; i < static_cast<int>(sizeof(lanes) / sizeof(lanes[0])); ++i)
    bits |= static_cast<uint32_t>(lanes[i] & 1) << i;
  return bits;
#endif
}

// A bit for each lane above zero, and with `or_nan` also for NaN.
template <bool or_nan>
inline uint32_t bits_above_zero(Lanes<float> x) {
  const Lanes<float> zero = {};
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)zero, or_nan ? _CMP_NLE_UQ : _CMP_GT_OQ);
#else
  return bits_of_lanes(or_nan ? ~(x <= zero) : x > zero);
#endif
}
template <bool or_nan>
inline uint32_t bits_above_zero(Lanes<double> x) {
  const Lanes<double> zero = {};
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)x, (__m512d)zero, or_nan ? _CMP_NLE_UQ : _CMP_GT_OQ);
#else
  return bits_of_lanes(or_nan ? ~(x <= zero) : x > zero);
#endif
}

template <class A, size_t... lane>
inline typename Vector<A>::integers bit_of_each(std::index_sequence<lane...>) {
  return typename Vector<A>::integers{(1 << lane)...};
}

// Lanes of `one` where their bit is set, of `other` elsewhere.
inline Lanes<float> choose(uint32_t bits, Lanes<float> one, Lanes<float> other) {
#if defined(__AVX512F__)
  return (Lanes<float>)_mm512_mask_blend_ps(static_cast<__mmask16>(bits), (__m512)other, (__m512)one);
#else
  const auto each = bit_of_each<float>(std::make_index_sequence<kWidth<float>>());
  return (each & static_cast<int32_t>(bits)) != 0 ? one : other;
#endif
}
inline Lanes<double> choose(uint32_t bits, Lanes<double> one, Lanes<double> other) {
#if defined(__AVX512F__)
  return (Lanes<double>)_mm512_mask_blend_pd(static_cast<__mmask8>(bits), (__m512d)other, (__m512d)one);
#else
  const auto each = bit_of_each<double>(std::make_index_sequence<kWidth<double>>());
  return (each & static_cast<int32_t>(bits)) != 0 ? one : other;
#endif
}

// Lanes from `first` on keep their value, those before become 0 (an and, so that inf and NaN go too).
template <class A>
inline Lanes<A> from_lane(Lanes<A> lanes, int first) {
  using Integers = typename Vector<A>::integers;
  const Integers keep = numbered<A>(std::make_index_sequence<kWidth<A>>()) >= first;
  return (Lanes<A>)((Integers)lanes & keep);
}

// Lanes of `low` before `first`, of `high` from there on.
inline Lanes<float> join(Lanes<float> low, Lanes<float> high, int first) {
  return numbered<float>(std::make_index_sequence<kWidth<float>>()) >= first ? high : low;
}
inline Lanes<double> join(Lanes<double> low, Lanes<double> high, int first) {
  return numbered<double>(std::make_index_sequence<kWidth<double>>()) >= first ? high : low;
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// One vector of numbers in memory, at any address.
template <class T>
struct Memory;

template <class A>
struct Plain {
  typedef A loose __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
  static Lanes<A> load(const A* from) { return (Lanes<A>)(*reinterpret_cast<const loose*>(from)); }
  static Lanes<A> packed(Lanes<A> lanes) { return lanes; }
  static void store(A* to, Lanes<A> lanes) { *reinterpret_cast<loose*>(to) = (loose)lanes; }
};
template <>
struct Memory<float> : Plain<float> {};
template <>
struct Memory<double> : Plain<double> {};

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <>
struct Memory<BFloat16> {
  static Lanes<float> load(const BFloat16* from) {
    const Halves bits = (Halves)(*reinterpret_cast<const LooseHalves*>(from));
    return (Lanes<float>)(__builtin_convertvector(bits, Words) << 16);
  }
  static Halves packed(Lanes<float> lanes) {
    const Words bits = (Words)lanes;
    // To the nearest, ties to even; a NaN must not round up to infinity.
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words result = (lanes == lanes) ? rounded : ((bits >> 16) | 0x40);
    return __builtin_convertvector(result, Halves);
  }
  static void store(BFloat16* to, Lanes<float> lanes) {
    *reinterpret_cast<LooseHalves*>(to) = (LooseHalves)packed(lanes);
  }
};

template <>
struct Memory<Half> {
#if defined(__AVX512F__)
  static Lanes<float> load(const Half* from) {
    return (Lanes<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Halves packed(Lanes<float> lanes) {
    return (Halves)_mm512_cvtps_ph((__m512)lanes, _MM_FROUND_TO_NEAREST_INT);
  }
#elif defined(__F16C__)
  static Lanes<float> load(const Half* from) {
    return (Lanes<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Halves packed(Lanes<float> lanes) {
    return (Halves)_mm256_cvtps_ph((__m256)lanes, _MM_FROUND_TO_NEAREST_INT);
  }
#else
  static Lanes<float> load(const Half* from) {
    Lanes<float> lanes;
    for (int i = 0; i < kWidth<float>; ++i) lanes[i] = static_cast<float>(bit_cast<_Float16>(from[i].bits));
    return lanes;
  }
  static Halves packed(Lanes<float> lanes) {
    Halves result;
    for (int i = 0; i < kWidth<float>; ++i) result[i] = bit_cast<uint16_t>(static_cast<_Float16>(lanes[i]));
    return result;
  }
#endif
  static void store(Half* to, Lanes<float> lanes) {
    *reinterpret_cast<LooseHalves*>(to) = (LooseHalves)packed(lanes);
  }
};

// Past the caches, straight to memory: what is too large to stay in them need not be read before it is overwritten.
// The address must be a multiple of the vector's size; `fence` comes before anybody else looks.
template <class V, class T>
inline void stream(T* to, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)value);
#endif
  std::memcpy(static_cast<void*>(to), &value, sizeof(V));
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Begin to read a line of memory, so that it is in the second-level cache when it is asked for. Any address will do.
inline void begin_to_read(const void* from) { __builtin_prefetch(from, 0, 2); }

// To memory through the caches, or past them.
template <bool past, class T, class V>
inline void put(T* to, V lanes) {
  if constexpr (past)
    stream(to, Memory<T>::packed(lanes));
  else
    Memory<T>::store(to, lanes);
}

// `count` numbers, fewer than a vector; the other lanes are 0.
template <class T>
inline auto load_some(const T* from, int64_t count) {
#if defined(__AVX512F__)
  const auto which = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    return (Lanes<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(which), from);
  else if constexpr (std::is_same_v<T, double>)
    return (Lanes<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(which), from);
  else
#endif
  {
    using A = typename Computed<T>::type;
    T buffer[kWidth<A>] = {};
    std::memcpy(static_cast<void*>(buffer), from, count * sizeof(T));
    return Memory<T>::load(buffer);
  }
}

template <class T, class V>
inline void store_some(T* to, V lanes, int64_t count) {
#if defined(__AVX512F__)
  const auto which = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(which), (__m512)lanes);
  else if constexpr (std::is_same_v<T, double>)
    return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(which), (__m512d)lanes);
  else
#endif
  {
    using A = typename Computed<T>::type;
    T buffer[kWidth<A>];
    Memory<T>::store(buffer, lanes);
    std::memcpy(static_cast<void*>(to), buffer, count * sizeof(T));
  }
}

inline double sum(Lanes<double> lanes) {
  double total = 0;
  for (int i = 0; i < kWidth<double>; ++i) total += lanes[i];
  return total;
}
// In double: what was summed in float over few numbers is not rounded again.
inline double sum(Lanes<float> lanes) {
  typedef float Part __attribute__((vector_size(kVectorBytes / 2)));
  Part low, high;
  std::memcpy(&low, &lanes, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof low, sizeof high);
  typedef double Wide __attribute__((vector_size(kVectorBytes)));
  return sum((Lanes<double>)(__builtin_convertvector(low, Wide) + __builtin_convertvector(high, Wide)));
}

// e^x within 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, Taylor's series to r^7/7! (the next is 5e-9).
// Infinity from 88.4 on, where n is 128, so that a sigmoid of -inf is 0.
inline Lanes<float> exponential(Lanes<float> x) {
  const Lanes<float> least = all(-87.0f), most = all(89.0f);
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Lanes<float> magic = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const Lanes<float> n = (x * 1.44269504f + magic) - magic;
  const Lanes<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // In pairs (Estrin's scheme): half as many steps that wait for each other as one after the other.
  const Lanes<float> r2 = r * r;
  const Lanes<float> low01 = r + 1.0f, low23 = r * (1.0f / 6) + 0.5f;
  const Lanes<float> high45 = r * (1.0f / 120) + 1.0f / 24, high67 = r * (1.0f / 5040) + 1.0f / 720;
  const Lanes<float> high = high67 * r2 + high45;
  const Lanes<float> p = high * (r2 * r2) + (low23 * r2 + low01);
  using Integers = Vector<float>::integers;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * (Lanes<float>)power;  // a product, and not a sum of exponents: NaN stays NaN
}

inline Lanes<double> exponential(Lanes<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace batchlab
