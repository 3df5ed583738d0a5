// Memory that waits for its next use, instead of going back to the operating system and coming again page by page.
//
// Results as large as activations are made and freed at every step. The system hands large memory out as pages of
// zeros, one fault each, which costs several times what it costs to write them. Here freed pieces wait. Above 64 MiB
// there are never more bytes in use and waiting together than were once in use at the same time.
//
// Each compiled library that includes this has an instance of its own, which its operator `release_memory` empties;
// batchlab/kernels/memory.py empties them all.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace batchlab {

#if defined(__GNUC__)
// Without this, GCC makes the instance one for the whole process, also for libraries that were built from another text.
#define BATCHLAB_OWN __attribute__((visibility("hidden")))
#else
#define BATCHLAB_OWN
#endif

class BATCHLAB_OWN WaitingMemory {
 public:
  static WaitingMemory& instance() {
    static WaitingMemory* memory = new WaitingMemory;  // never destroyed: tensors may outlive every static object
    return *memory;
  }

  // An uninitialized tensor.
  torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                              torch::headeronly::IntHeaderOnlyArrayRef strides, int64_t bytes,
                              torch::headeronly::ScalarType type) {
    const Piece piece = take(rounded(bytes), bytes);
    return torch::stable::from_blob(piece.data, sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                    [this, size = piece.bytes](void* freed) { give({freed, size}); });
  }

  // Gives what waits back to the system; returns its bytes.
  int64_t release() {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t released = waiting_;
    shrink_to(0);
    most_ = used_;
    return released;
  }

 private:
  struct Piece {
    void* data;
    int64_t bytes;
  };

  static constexpr int64_t kHugePage = 2 << 20;
  static constexpr int64_t kFloor = 64 << 20;
  static constexpr size_t kMostPieces = 1024;  // so that to look through them takes no time, whatever was once in use

  WaitingMemory() {
#if defined(__unix__) || defined(__APPLE__)
    // A process that forks while another of its threads is in here must not leave the child a lock that never opens.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  // By at most an eighth, so that sizes that change a little meet their piece again.
  static int64_t rounded(int64_t bytes) {
    int64_t step = 64;
    while (step * 16 < bytes) step *= 2;
    return std::max<int64_t>(64, (bytes + step - 1) / step * step);
  }

  // Bytes that may wait. The floor lets all the sizes of a small network wait, also those that never meet.
  int64_t room() const { return std::max(most_, kFloor) - used_; }

  // The oldest go first.
  void shrink_to(int64_t bytes) {
    auto piece = pieces_.begin();
    for (; waiting_ > bytes; ++piece) {
      std::free(piece->data);
      waiting_ -= piece->bytes;
    }
    pieces_.erase(pieces_.begin(), piece);
  }

  // The latest piece of this size, parts of which may still be in the cache; else the smallest that is larger by at
  // most a quarter: dropout that keeps now more, now fewer rows soon has pieces that serve every batch.
  std::vector<Piece>::iterator find(int64_t bytes) {
    auto found = pieces_.end();
    for (auto piece = pieces_.end(); piece != pieces_.begin();) {
      --piece;
      if (piece->bytes == bytes) return piece;
      if (piece->bytes < bytes || piece->bytes > bytes + bytes / 4) continue;
      if (found == pieces_.end() || piece->bytes < found->bytes) found = piece;
    }
    return found;
  }

  // `used` of them at first.
  Piece take(int64_t bytes, int64_t used) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = find(bytes);
      used_ += found == pieces_.end() ? bytes : found->bytes;
      most_ = std::max(most_, used_);
      if (found != pieces_.end()) {
        const Piece piece = *found;
        pieces_.erase(found);
        waiting_ -= piece.bytes;
        return piece;
      }
      shrink_to(room());
    }
    void* data = std::aligned_alloc(bytes >= 2 * kHugePage ? kHugePage : 64, aligned(bytes));
    if (data == nullptr) {
      std::lock_guard<std::mutex> lock(mutex_);
      used_ -= bytes;
      STD_TORCH_CHECK(false, "out of memory: ", bytes, " bytes for a result");
    }
#if defined(__linux__)
    // A fault for 2 MiB, not for 4 KiB; but no 2 MiB for the last few numbers.
    if (bytes >= 2 * kHugePage) madvise(data, used / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return {data, bytes};
  }

  static int64_t aligned(int64_t bytes) {
    const int64_t unit = bytes >= 2 * kHugePage ? kHugePage : 64;
    return (bytes + unit - 1) / unit * unit;
  }

  void give(const Piece& piece) {
    std::lock_guard<std::mutex> lock(mutex_);
    used_ -= piece.bytes;
    waiting_ += piece.bytes;
    pieces_.push_back(piece);
    shrink_to(std::min(room(), pieces_.size() > kMostPieces ? waiting_ - pieces_.front().bytes : waiting_));
  }

  std::mutex mutex_;
  std::vector<Piece> pieces_;  // those that wait, oldest first
  int64_t used_ = 0, waiting_ = 0, most_ = 0;
};

}  // namespace batchlab
