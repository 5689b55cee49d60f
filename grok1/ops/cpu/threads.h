// Work shared out over the threads of XLA's pool.
//
// A job is a number of units that any thread may take. What a unit computes depends on its number
// alone, so results do not depend on the number of threads or on which was faster.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "forecast.h"
#include "xla/ffi/api/ffi.h"

namespace grok1 {

// How long a helper that has run out of work looks for the next job before it returns to the pool:
// longer than what XLA computes between two kernels of a layer. Waking a thread takes as long as
// reading a megabyte.
constexpr auto kLinger = std::chrono::microseconds(50);

constexpr int64_t kNearBytes = 1 << 19;  // of a thread's cache, for what it will read next

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What a thread does that has nothing to do: fetches what is expected to be read next.
inline void idle() {
  if (!Forecast::get().fetch_some()) pause();
}

// Waits for what another thread is doing. Only a thread that was descheduled takes long.
template <typename Condition>
void wait_until(Condition is_met, void (*meanwhile)() = pause) {
  for (int spins = 0; !is_met(); ++spins) {
    spins > 10000 ? std::this_thread::yield() : meanwhile();
  }
}

// Threads that a kernel may have, which the process that loads the library says.
inline std::atomic<int64_t>& allowed_threads() {
  static std::atomic<int64_t> number{1};
  return number;
}

inline int64_t num_threads() { return allowed_threads().load(std::memory_order_relaxed); }

struct Job {
  std::function<void(int64_t)> run_unit;
  int64_t num_units;
  std::atomic<int64_t> next_unit{0};
  std::atomic<int64_t> num_done{0};

  void work() {
    for (int64_t unit; (unit = next_unit.fetch_add(1, std::memory_order_relaxed)) < num_units;) {
      run_unit(unit);
      num_done.fetch_add(1, std::memory_order_release);
    }
  }

  bool has_units() const { return next_unit.load(std::memory_order_relaxed) < num_units; }

  void wait() {
    wait_until([this] { return num_done.load(std::memory_order_acquire) == num_units; }, idle);
  }
};

// The jobs in progress, several when several devices compute, and the helpers looking for them.
class JobBoard {
 public:
  static JobBoard& get() {
    // Never destroyed: the pool's threads may outlive the process's static objects.
    static JobBoard* board = new JobBoard;
    return *board;
  }

  // Runs all units of a job. Nothing waits for a helper that has not started, so that jobs of
  // several devices cannot wait for each other.
  void run(xla::ffi::ThreadPool& pool, int64_t num_units, std::function<void(int64_t)> run_unit,
           Stream stream) {
    if (stream.begin != nullptr) Forecast::get().note(stream, num_threads() * kNearBytes);
    auto job = std::make_shared<Job>();
    job->run_unit = std::move(run_unit);
    job->num_units = num_units;
    int64_t most_helpers = std::min({num_threads(), pool.num_threads(), num_units}) - 1;
    if (most_helpers > 0) post(pool, job, most_helpers);
    job->work();
    job->wait();
    if (most_helpers > 0) remove(job);
  }

 private:
  void post(xla::ffi::ThreadPool& pool, const std::shared_ptr<Job>& job, int64_t most_helpers) {
    int64_t to_start;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(job);
      // Helpers that are busy with another device's job look here when that is done.
      to_start = std::min(most_helpers, num_threads() - num_callers() - num_helpers_);
      num_helpers_ += std::max<int64_t>(0, to_start);
    }
    num_posted_.fetch_add(1, std::memory_order_release);
    for (int64_t helper = 0; helper < to_start; ++helper) {
      pool.Schedule([this] { help(); });
    }
  }

  void remove(const std::shared_ptr<Job>& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
  }

  // Each job's caller works on it, and takes the place of a helper.
  int64_t num_callers() const { return static_cast<int64_t>(jobs_.size()); }

  void help() {
    while (true) {
      int64_t posted = num_posted_.load(std::memory_order_acquire);
      if (std::shared_ptr<Job> job = next_job()) {
        job->work();
        continue;
      }
      auto deadline = std::chrono::steady_clock::now() + kLinger;
      while (num_posted_.load(std::memory_order_acquire) == posted) {
        if (std::chrono::steady_clock::now() < deadline) {
          idle();
          continue;
        }
        std::lock_guard<std::mutex> lock(mutex_);
        // A job posted since then counts on this helper.
        if (num_posted_.load(std::memory_order_acquire) == posted && !any_units()) {
          --num_helpers_;
          return;
        }
        break;
      }
    }
  }

  bool any_units() const {
    return std::any_of(jobs_.begin(), jobs_.end(),
                       [](const std::shared_ptr<Job>& job) { return job->has_units(); });
  }

  std::shared_ptr<Job> next_job() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const std::shared_ptr<Job>& job : jobs_) {
      if (job->has_units()) return job;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::vector<std::shared_ptr<Job>> jobs_;
  std::atomic<int64_t> num_posted_{0};
  int64_t num_helpers_ = 0;
};

// Memory that a thread keeps between calls: the allocator would give the pages back after each.
class Scratch {
 public:
  float* floats(size_t size) {
    if (memory_.size() < size) memory_.resize(size);
    return memory_.data();
  }

 private:
  std::vector<float> memory_;
};

// `stream` is the memory that the units read, in their order, if there is much of it.
inline void run_units(xla::ffi::ThreadPool& pool, int64_t num_units,
                      std::function<void(int64_t)> run_unit, Stream stream = {}) {
  JobBoard::get().run(pool, num_units, std::move(run_unit), stream);
}

}  // namespace grok1
