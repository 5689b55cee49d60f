// Rows of files to memory and on to devices, without the interpreter: `native.py` says the same in
// Python's types, and `blocks.py` and `sending.py` are what it does, to be read.
//
// A thread calls once for a block of many megabytes. What was read is looked at while it is in the
// core's own cache, and sent while the next rows are being read.

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>

namespace {

// Bytes of one call of the system's where what is read is looked at: a core's cache has room for it.
constexpr int64_t kLookedAt = 1 << 19;
constexpr int64_t kMostRead = 1 << 22;  // otherwise; whoever stops a read waits for so many

enum Look : int32_t { kNotAtAll, kFloat32, kBfloat16 };

enum Outcome : int32_t {
  kDone,
  kImpossible,  // the arguments contradict one another
  kNotRead,
  kNotFinite,
  kStopped,
  kNoContext,
  kNotCopied,
  kNotCopied2D,
  kNotArrived,
};

struct Rows {
  int32_t descriptor, look;
  int64_t offset, count, bytes, stride;  // of the first row; rows; of a row; from one to the next
  const int32_t* stop;  // not 0 once nobody wants them any more; another thread writes it
};

struct Driver {
  int32_t (*set_context)(void*);
  int32_t (*copy)(uint64_t, const void*, size_t, void*);
  int32_t (*copy_2d)(const void*, void*);
  int32_t (*synchronize)(void*);
};

// Columns of the rows, and where they go.
struct Piece {
  void* context;
  uint64_t out;
  int64_t out_bytes, pitch, column, width;
};

struct Slot {
  char* memory;
  int64_t bytes;
  void* const* streams;  // one for each piece
};

struct Report {
  double reading, looking, copying, waiting;  // seconds
  int32_t outcome, status;                    // what the driver said, if it refused
};

// CUDA_MEMCPY2D of cuda.h.
struct Copy2D {
  size_t src_x, src_y;
  uint32_t src_type;
  const void* src_host;
  uint64_t src_device;
  void* src_array;
  size_t src_pitch;
  size_t dst_x, dst_y;
  uint32_t dst_type;
  void* dst_host;
  uint64_t dst_device;
  void* dst_array;
  size_t dst_pitch, width, height;
};
constexpr uint32_t kHost = 1, kDevice = 2;  // CUmemorytype

// Adds the time of a block to one of the seconds.
class Timer {
 public:
  explicit Timer(double& seconds) : seconds_(seconds), begin_(now()) {}
  ~Timer() { seconds_ += std::chrono::duration<double>(now() - begin_).count(); }

 private:
  static std::chrono::steady_clock::time_point now() { return std::chrono::steady_clock::now(); }
  double& seconds_;
  std::chrono::steady_clock::time_point begin_;
};

// As integers the magnitudes of floats are in their order, and what is not finite is largest.
template <typename Bits>
bool are_finite(const char* memory, int64_t bytes, Bits magnitude, Bits infinite) {
  const Bits* bits = reinterpret_cast<const Bits*>(memory);
  Bits largest = 0;
  for (int64_t i = 0; i < bytes / int64_t{sizeof(Bits)}; ++i) {
    largest = std::max(largest, static_cast<Bits>(bits[i] & magnitude));
  }
  return largest < infinite;
}

bool is_good(int32_t look, const char* memory, int64_t bytes) {
  if (look == kFloat32) return are_finite<uint32_t>(memory, bytes, 0x7fffffff, 0x7f800000);
  if (look == kBfloat16) return are_finite<uint16_t>(memory, bytes, 0x7fff, 0x7f80);
  return true;
}

Outcome read_whole(const Rows& rows, char* out, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    if (__atomic_load_n(rows.stop, __ATOMIC_RELAXED) != 0) return kStopped;
    const ssize_t count = pread(rows.descriptor, out, std::min(bytes, kMostRead), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return kNotRead;
    out += count, offset += count, bytes -= count;
  }
  return kDone;
}

// Reads some of the rows, and looks at them.
Outcome read_rows(const Rows& rows, int64_t first, int64_t count, char* out, Report& report) {
  // Rows that follow one another are one.
  const bool whole = rows.stride == rows.bytes;
  const int64_t size = whole ? count * rows.bytes : rows.bytes;
  const int64_t most = rows.look == kNotAtAll ? size : kLookedAt;
  for (int64_t row = first; row < first + (whole ? 1 : count); ++row) {
    for (int64_t start = 0; start < size; start += most) {
      const int64_t here = std::min(most, size - start);
      {
        Timer timer(report.reading);
        const int64_t place = rows.offset + row * rows.stride + start;
        const Outcome outcome = read_whole(rows, out, here, place);
        if (outcome != kDone) return outcome;
      }
      if (rows.look != kNotAtAll) {
        Timer timer(report.looking);
        if (!is_good(rows.look, out, here)) return kNotFinite;
      }
      out += here;
    }
  }
  return kDone;
}

bool are_possible(const Rows& rows) {
  const int64_t size = rows.look == kFloat32 ? 4 : rows.look == kBfloat16 ? 2 : 1;
  return rows.count > 0 && rows.bytes > 0 && rows.offset >= 0 && rows.stride >= rows.bytes &&
         rows.bytes % size == 0 && rows.look >= kNotAtAll && rows.look <= kBfloat16;
}

// What sends a block, in the order of its rows.
class Sender {
 public:
  Sender(const Driver& driver, const Piece* pieces, int64_t num_pieces, Report& report)
      : driver_(driver), pieces_(pieces), num_pieces_(num_pieces), report_(report),
        context_(pieces[0].context) {}

  // The caller's thread is as it was.
  ~Sender() { enter(pieces_[0].context); }

  // Waits until a slot may be written to.
  Outcome wait(const Slot& slot) {
    Timer timer(report_.waiting);
    for (int64_t i = 0; i < num_pieces_; ++i) {
      if (!enter(pieces_[i].context)) return kNoContext;
      if (failed(driver_.synchronize(slot.streams[i]))) return kNotArrived;
    }
    return kDone;
  }

  // Begins to copy rows, each of so many bytes, out of a slot.
  Outcome send(const Slot& slot, int64_t first, int64_t count, int64_t bytes) {
    Timer timer(report_.copying);
    for (int64_t i = 0; i < num_pieces_; ++i) {
      const Piece& piece = pieces_[i];
      if (!enter(piece.context)) return kNoContext;
      const uint64_t out = piece.out + first * piece.pitch;
      const char* source = slot.memory + piece.column;
      if (count == 1 || (piece.width == bytes && piece.width == piece.pitch)) {
        const size_t size = count * piece.width;
        if (failed(driver_.copy(out, source, size, slot.streams[i]))) return kNotCopied;
        continue;
      }
      Copy2D copy{};
      copy.src_type = kHost, copy.src_host = source, copy.src_pitch = bytes;
      copy.dst_type = kDevice, copy.dst_device = out, copy.dst_pitch = piece.pitch;
      copy.width = piece.width, copy.height = count;
      if (failed(driver_.copy_2d(&copy, slot.streams[i]))) return kNotCopied2D;
    }
    return kDone;
  }

 private:
  bool enter(void* context) {
    if (context != context_ && failed(driver_.set_context(context))) return false;
    context_ = context;
    return true;
  }

  bool failed(int32_t status) {
    if (status != 0 && report_.status == 0) report_.status = status;
    return status != 0;
  }

  const Driver& driver_;
  const Piece* pieces_;
  const int64_t num_pieces_;
  Report& report_;
  void* context_;
};

Outcome send_rows(const Rows& rows, Sender& sender, const Slot* slots, int64_t num_slots,
                  Report& report) {
  const int64_t step = std::min(rows.count, slots[0].bytes / rows.bytes);
  for (int64_t first = 0, turn = 0; first < rows.count; first += step, ++turn) {
    const Slot& slot = slots[turn % num_slots];
    const int64_t count = std::min(step, rows.count - first);
    Outcome outcome = sender.wait(slot);
    if (outcome == kDone) outcome = read_rows(rows, first, count, slot.memory, report);
    if (outcome == kDone) outcome = sender.send(slot, first, count, rows.bytes);
    if (outcome != kDone) return outcome;
  }
  return kDone;
}

bool are_possible(const Rows& rows, const Piece* pieces, int64_t num_pieces, const Slot* slots,
                  int64_t num_slots) {
  if (!are_possible(rows) || num_pieces < 1 || num_slots < 1) return false;
  for (int64_t i = 0; i < num_pieces; ++i) {
    const Piece& piece = pieces[i];
    if (piece.column < 0 || piece.width < 1 || piece.column + piece.width > rows.bytes ||
        piece.pitch < piece.width ||
        (rows.count - 1) * piece.pitch + piece.width > piece.out_bytes) {
      return false;
    }
  }
  for (int64_t i = 0; i < num_slots; ++i) {
    if (slots[i].bytes < rows.bytes || slots[i].bytes != slots[0].bytes) return false;
  }
  return true;
}

}  // namespace

extern "C" {

// Reads rows to memory of so many bytes.
void grok1_read(const Rows* rows, char* out, int64_t bytes, Report* report) {
  const bool possible = are_possible(*rows) && rows->count * rows->bytes <= bytes;
  report->outcome = possible ? read_rows(*rows, 0, rows->count, out, *report) : kImpossible;
}

// Reads rows to slots of pinned memory in turn, as many as fit, and begins to copy them. At its end
// what the last copies read is still in the slots.
void grok1_send(const Rows* rows, const Driver* driver, const Piece* pieces, int64_t num_pieces,
                const Slot* slots, int64_t num_slots, Report* report) {
  if (!are_possible(*rows, pieces, num_pieces, slots, num_slots)) {
    report->outcome = kImpossible;
    return;
  }
  Sender sender(*driver, pieces, num_pieces, *report);
  report->outcome = send_rows(*rows, sender, slots, num_slots, *report);
}

}  // extern "C"
