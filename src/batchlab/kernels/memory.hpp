// Memory that waits for its next use, instead of going back to the operating system and coming again page by page.
//
// Results as large as activations are made and freed at every step. The system hands large memory out as pages of
// zeros, one fault each, which costs several times what it costs to write them. Here freed pieces wait. There are never
// more bytes in use and waiting together than were once in use at the same time.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace batchlab {

class WaitingMemory {
 public:
  static WaitingMemory& instance() {
    static WaitingMemory* memory = new WaitingMemory;  // never destroyed: tensors may outlive every static object
    return *memory;
  }

  // An uninitialized tensor. Sizes are rounded up by at most an eighth, so that those that change a little meet their
  // piece again.
  torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                              torch::headeronly::IntHeaderOnlyArrayRef strides, int64_t bytes,
                              torch::headeronly::ScalarType type) {
    const int64_t size = rounded(bytes);
    return torch::stable::from_blob(take(size), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                    [this, size](void* freed) { give(freed, size); });
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

  WaitingMemory() {
#if defined(__unix__) || defined(__APPLE__)
    // A process that forks while another of its threads is in here must not leave the child a lock that never opens.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
#endif
  }

  static int64_t rounded(int64_t bytes) {
    int64_t step = 64;
    while (step * 16 < bytes) step *= 2;
    return std::max<int64_t>(64, (bytes + step - 1) / step * step);
  }

  // Oldest first.
  void shrink_to(int64_t bytes) {
    while (waiting_ > bytes) {
      std::free(pieces_.front().data);
      waiting_ -= pieces_.front().bytes;
      pieces_.pop_front();
    }
  }

  void* take(int64_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      used_ += bytes;
      most_ = std::max(most_, used_);
      for (auto piece = pieces_.rbegin(); piece != pieces_.rend(); ++piece) {
        if (piece->bytes != bytes) continue;
        void* data = piece->data;  // the latest one: parts of it may still be in the cache
        pieces_.erase(std::next(piece).base());
        waiting_ -= bytes;
        return data;
      }
      shrink_to(most_ - used_);
    }
    void* data = std::aligned_alloc(bytes >= 2 * kHugePage ? kHugePage : 64, aligned(bytes));
    if (data == nullptr) {
      std::lock_guard<std::mutex> lock(mutex_);
      used_ -= bytes;
      STD_TORCH_CHECK(false, "out of memory: ", bytes, " bytes for a result");
    }
#if defined(__linux__)
    if (bytes >= 2 * kHugePage) madvise(data, aligned(bytes), MADV_HUGEPAGE);  // a fault for 2 MiB, not for 4 KiB
#endif
    return data;
  }

  static int64_t aligned(int64_t bytes) {
    const int64_t unit = bytes >= 2 * kHugePage ? kHugePage : 64;
    return (bytes + unit - 1) / unit * unit;
  }

  void give(void* data, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    used_ -= bytes;
    waiting_ += bytes;
    pieces_.push_back({data, bytes});
    shrink_to(most_ - used_);
  }

  std::mutex mutex_;
  std::list<Piece> pieces_;
  int64_t used_ = 0, waiting_ = 0, most_ = 0;
};

}  // namespace batchlab
