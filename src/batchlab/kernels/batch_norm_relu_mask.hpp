// Where a (leaky) ReLU lets a gradient through: a bit a number.
//
// With a residual the input alone does not tell. The output does, and is as large as the input; these bits are a
// thirty-second of that in float32 (a sixteenth where vectors are of four), and all that the backward pass needs.
#pragma once
#include "batch_norm_threads.hpp"

namespace batchlab {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words of several vectors' bits are read by bytes, too");

// The bits of a vector at a multiple of its width have bytes of their own: whoever writes whole vectors shares none with
// another thread, however narrow vectors are.
//
// Planes: place `i` is that of the number at offset i. Rows: as if each were as long as whole vectors (`Section::place`).
template <class A>
struct ReluMask {
  static constexpr int width = kWidth<A>;
  static constexpr int group = (width + 7) / 8;  // bytes of a vector
  uint8_t* bytes = nullptr;

  // To read a vector in the middle of two, some bytes behind the last one are read, too.
  static constexpr int64_t kBehind = 4;
  static int64_t size(const Layout& layout) {
    const auto vectors = [](int64_t numbers) { return (numbers + width - 1) / width; };
    const int64_t all = layout.rows ? layout.main.rows * vectors(layout.main.columns) +
                                          layout.rest.rows * vectors(layout.rest.columns)
                                    : vectors(layout.numbers());
    return all * group + kBehind;
  }

  // The bits of the vector that begins at any place; what is above them is of others.
  uint32_t read(int64_t place) const {
    const uint64_t at = static_cast<uint64_t>(place);
    if constexpr (width >= 8) {
      const uint8_t* from = bytes + at / 8;
      return (from[0] | from[1] << 8 | from[2] << 16 | static_cast<uint32_t>(from[3]) << 24) >> at % 8;
    } else {
      const uint8_t* from = bytes + at / width;
      return (from[0] & ((1u << width) - 1) | static_cast<uint32_t>(from[1]) << width) >> at % width;
    }
  }

  // Of neighbouring vectors, the first at a multiple of the width: all their bits in one word of memory.
  uint8_t* whole(int64_t place) const { return bytes + static_cast<uint64_t>(place) / width * group; }
  template <int vectors>
  struct Words {
    static_assert(vectors * group <= 8);
    static constexpr int bytes = vectors * group;
    using Word = std::conditional_t<bytes == 8, uint64_t, std::conditional_t<bytes == 4, uint32_t,
                 std::conditional_t<bytes == 2, uint16_t, uint8_t>>>;
    static_assert(sizeof(Word) == bytes);
    Word word = 0;
    uint32_t operator[](int v) const { return static_cast<uint32_t>(word >> 8 * group * v); }
    void set(int v, uint32_t bits) { word = static_cast<Word>(word | static_cast<Word>(bits) << 8 * group * v); }
  };
  template <int vectors>
  Words<vectors> read_whole(int64_t place) const {
    Words<vectors> words;
    std::memcpy(&words.word, whole(place), words.bytes);
    return words;
  }
  template <int vectors>
  void write_whole(int64_t place, Words<vectors> words) const {
    std::memcpy(whole(place), &words.word, words.bytes);
  }
  void write_whole(int64_t place, uint32_t bits) const {
    Words<1> one;
    one.set(0, bits);
    write_whole(place, one);
  }

  // Of a vector at any place, and nothing beside it: another thread may write the neighbouring bits.
  void write_among_others(int64_t place, uint32_t bits) const {
    for (int i = 0; i < width; ++i) {
      const int64_t at = place + i;
      uint8_t* to = bytes + at / width * group + at % width / 8;
      const uint8_t bit = static_cast<uint8_t>(1 << at % width % 8);
      if (bits >> i & 1)
        __atomic_fetch_or(to, bit, __ATOMIC_RELAXED);
      else
        __atomic_fetch_and(to, static_cast<uint8_t>(~bit), __ATOMIC_RELAXED);
    }
  }
};

// 1 where a mask lets a gradient through, 0 elsewhere: for gradients of gradients, number by number.
template <class A, class T>
void unpack(const Layout& layout, ReluMask<A> mask, T* to) {
  const auto write = [&](int64_t offset, int64_t place) {
    constexpr int width = kWidth<A>;
    const bool passes = mask.bytes[place / width * mask.group + place % width / 8] >> place % width % 8 & 1;
    const Lanes<A> value = all<A>(passes);
    store_some(to + offset, value, 1);
  };
  if (!layout.rows)
    for (int64_t i = 0; i < layout.numbers(); ++i) write(i, i);
  else
    for (const Section& section : {main_rows(layout), other_rows(layout)})
      for (int64_t row = 0; row < section.rows.rows; ++row)
        for (int64_t q = 0; q < section.rows.columns; ++q)
          write(section.origin + row * section.rows.columns + q, section.place<A>(row, q));
}

}  // namespace batchlab
