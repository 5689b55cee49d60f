// Fetches what will probably be read next, while there is nothing else to do.
//
// Between two products the memory bus is idle: threads wait for the last of them, XLA computes what
// is small. The products of a step read the same weights in the same order at every step, the
// chosen experts aside, so what followed a product the last two times is fetched after it.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "vectors.h"

namespace grok1 {

// Memory that is read from its beginning on. Without a size it is told apart, and not foretold.
struct Stream {
  const char* begin = nullptr;
  int64_t size = 0;
};

class Forecast {
 public:
  static Forecast& get() {
    // Never destroyed: the pool's threads may outlive the process's static objects.
    static Forecast* forecast = new Forecast;
    return *forecast;
  }

  // Says that `stream` is being read now, and that `most` bytes of the next one can stay near.
  void note(Stream stream, int64_t most) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (successors_.size() >= kMostKnown) successors_.clear();
    Successor& successor = successors_[last_];
    successor.was_right = successor.stream.begin == stream.begin;
    successor.stream = stream;
    last_ = stream.begin;
    auto found = successors_.find(last_);
    bool is_known = found != successors_.end() && found->second.was_right;
    Stream next = is_known ? found->second.stream : Stream{};
    auto begin = reinterpret_cast<intptr_t>(next.begin);
    end_.store(begin + std::min(next.size, most), std::memory_order_relaxed);
    place_.store(begin, std::memory_order_relaxed);
  }

  // Fetches a little of what is expected; false if there is nothing more.
  bool fetch_some() {
    // Two threads, or a new forecast in between, may make an address wrong: a prefetch does not
    // fault.
    intptr_t end = end_.load(std::memory_order_relaxed);
    if (place_.load(std::memory_order_relaxed) >= end) return false;
    intptr_t place = place_.fetch_add(kFetched, std::memory_order_relaxed);
    for (int64_t line = 0; line < kFetched; line += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(place + line), 0, 2);
    }
    return true;
  }

 private:
  static constexpr int64_t kFetched = 1024;   // bytes at a time
  static constexpr size_t kMostKnown = 4096;  // streams

  struct Successor {
    Stream stream;
    bool was_right = false;
  };

  std::mutex mutex_;
  std::unordered_map<const char*, Successor> successors_;
  const char* last_ = nullptr;
  std::atomic<intptr_t> place_{0}, end_{0};
};

}  // namespace grok1
