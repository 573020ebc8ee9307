// Memory for large outputs that is kept when it is freed and handed out again: a fresh allocation
// of tens of megabytes costs more in page faults than the kernel that fills it.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace ddfast {

// A free list, the most recently freed block last. It holds at most `limit` bytes.
class buffer_pool {
 public:
  static buffer_pool &instance() {
    static buffer_pool *pool = new buffer_pool;  // never destroyed: tensors may outlive the module
    return *pool;
  }

  // A block of at least `bytes`; its true size goes to *granted.
  void *take(std::size_t bytes, std::size_t *granted) {
    const std::size_t page = std::size_t(2) << 20;
    bytes = (bytes + page - 1) / page * page;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (std::size_t i = free_.size(); i-- > 0;) {
        // A much larger block stays for a request of its own size.
        if (free_[i].size < bytes || free_[i].size > bytes + bytes / 4) continue;
        const block found = free_[i];
        free_.erase(free_.begin() + std::ptrdiff_t(i));
        held_ -= found.size;
        *granted = found.size;
        return found.data;
      }
    }
    void *data = nullptr;
    if (posix_memalign(&data, page, bytes) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    (void)madvise(data, bytes, MADV_HUGEPAGE);  // a hint: one page fault per 2 MiB
#endif
    *granted = bytes;
    return data;
  }

  void give_back(void *data, std::size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (size > limit) return std::free(data);
    free_.push_back({data, size});
    held_ += size;
    while (held_ > limit) {
      std::free(free_.front().data);
      held_ -= free_.front().size;
      free_.erase(free_.begin());
    }
  }

  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const block &b : free_) std::free(b.data);
    free_.clear();
    held_ = 0;
  }

  std::size_t held() {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

  static constexpr std::size_t limit = std::size_t(1) << 30;

 private:
  struct block {
    void *data;
    std::size_t size;
  };
  std::mutex mutex_;
  std::vector<block> free_;
  std::size_t held_ = 0;
};

// Owns one block while a tensor lives on it.
class buffer {
 public:
  explicit buffer(std::size_t bytes) : bytes_(bytes), data_(buffer_pool::instance().take(bytes, &granted_)) {}
  ~buffer() { buffer_pool::instance().give_back(data_, granted_); }
  buffer(const buffer &) = delete;
  buffer &operator=(const buffer &) = delete;
  void *data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::size_t granted_ = 0;
  void *data_;
};

}  // namespace ddfast
