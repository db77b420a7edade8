// Exchanges between ranks of one host, through memory that they share: HvdkitSharedSum adds tensors up, and
// HvdkitSharedGather puts the ranks' rows one after another.
//
// Horovod moves gradients between ranks of one host through the loopback network: a negotiation and a ring of messages,
// each of which wakes threads on both sides. Ranks that share memory need neither. Every rank copies its tensors, as one
// stream of numbers cut into chunks, into a slot of its own; when all have written a chunk, every rank reads it.
//
// One meeting a chunk is enough, because each slot holds two chunks in turn: a rank writes chunk k over chunk k - 2 only
// after everyone came to the meeting of chunk k - 1, and so has read chunk k - 2. Sums are taken in the order of the
// ranks on all of them, so all end with the same bits. Up to four ranks each add up all of a chunk; more than that
// divide the adding among themselves (a reduce-scatter and an allgather; R. Thakur, R. Rabenseifner and W. Gropp,
// "Optimization of Collective Communication Operations in MPICH", 2005), which takes a second meeting.
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

constexpr size_t kChunkBytes = 512 << 10;  // with its double and those of a few ranks it stays in the cache
constexpr int kDivideAbove = 4;            // ranks from which on adding is divided among them
constexpr int kSpins = 2000;               // about 20 µs, less than it takes to sleep and to be woken
constexpr long kLookUpNanoseconds = 50'000'000;  // how often a rank that waits looks whether its step was cancelled

std::atomic<uint64_t> nanoseconds_waiting{0}, nanoseconds_in_all{0}, exchanges{0}, bytes_brought{0};

uint64_t Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000ull + now.tv_nsec;
}

// One rank's place in the segment, on a cache line of its own.
struct alignas(64) Place {
  std::atomic<uint32_t> arrived;   // meetings that it has come to
  std::atomic<uint32_t> sleepers;  // ranks that sleep until it comes to the next one
};

bool Fail(OpKernelContext* context, const absl::Status& status) {
  context->SetStatus(status);
  return false;
}

// Memory that the ranks of one host share, for the exchanges of one name.
class Segment {
 public:
  Segment(const std::string& path, int rank, int size) : path_(path), rank_(rank), size_(size) {}

  // All zeros is how it begins, so whoever comes first makes it and nobody waits for him.
  std::string Open() {
    const size_t bytes = size_ * (sizeof(Place) + 2 * kChunkBytes);
    const int file = open(path_.c_str(), O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (file < 0) return Failed("opened");
    // Reserved now: a page that is missing later would end the process with SIGBUS.
    const int refused = posix_fallocate(file, 0, bytes);
    void* at = refused ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (refused) errno = refused;
    const std::string problem = at == MAP_FAILED ? Failed("mapped") : "";
    close(file);
    if (!problem.empty()) return problem;
    places_ = static_cast<Place*>(at);
    slots_ = static_cast<char*>(at) + size_ * sizeof(Place);
    return "";
  }

  char* Slot(int rank) { return slots_ + (2 * rank + parity_) * kChunkBytes; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  void NextChunk() { parity_ ^= 1; }
  std::mutex& in_use() { return in_use_; }

  // Comes to a meeting and waits for all others. False if the step was cancelled meanwhile.
  bool Meet(bool spin, OpKernelContext* context) {
    Place& mine = places_[rank_];
    mine.arrived.store(++meeting_, std::memory_order_seq_cst);
    if (mine.sleepers.load(std::memory_order_seq_cst)) Futex(&mine.arrived, FUTEX_WAKE, INT_MAX, nullptr);
    for (int other = 0; other < size_; ++other) {
      if (other != rank_ && !Await(places_[other], spin, context)) return false;
    }
    // Everybody has it open: nothing is left behind, however the job ends.
    if (meeting_ == 1 && rank_ == 0) unlink(path_.c_str());
    return true;
  }

 private:
  bool Await(Place& other, bool spin, OpKernelContext* context) {
    // Numbers of meetings wrap around, so they are compared by their difference.
    const auto there = [&] { return static_cast<int32_t>(other.arrived.load() - meeting_) >= 0; };
    for (int i = 0; spin && i < kSpins; ++i) {
      if (there()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    while (!there()) {
      other.sleepers.fetch_add(1, std::memory_order_seq_cst);
      const uint32_t seen = other.arrived.load(std::memory_order_seq_cst);
      if (static_cast<int32_t>(seen - meeting_) < 0) {
        const timespec limit{0, kLookUpNanoseconds};
        Futex(&other.arrived, FUTEX_WAIT, seen, &limit);
      }
      other.sleepers.fetch_sub(1, std::memory_order_seq_cst);
      auto* manager = context->cancellation_manager();
      if (!there() && manager && manager->IsCancelled()) return false;
    }
    return true;
  }

  static void Futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* limit) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, limit, nullptr, 0);
  }

  std::string Failed(const char* what) {
    return "The shared memory " + path_ + " cannot be " + what + " (" + std::strerror(errno) +
           "). Give this host more of /dev/shm, or set HVDKIT_SHARED_MEMORY=0 to exchange over the network.";
  }

  const std::string path_;
  const int rank_, size_;
  uint32_t meeting_ = 0;
  int parity_ = 0;
  Place* places_ = nullptr;
  char* slots_ = nullptr;
  std::mutex in_use_;
};

// By path: a step that is traced anew on one rank alone goes on in the segment where the others are.
Segment* FindSegment(const std::string& path, int rank, int size, std::string* problem) {
  static std::mutex guard;
  static auto* segments = new std::map<std::string, std::unique_ptr<Segment>>;
  const std::lock_guard<std::mutex> lock(guard);
  auto& segment = (*segments)[path];
  if (!segment) {
    auto made = std::make_unique<Segment>(path, rank, size);
    *problem = made->Open();
    if (!problem->empty()) return nullptr;
    segment = std::move(made);
  }
  return segment.get();
}

// A part of a tensor within a chunk.
template <typename T>
struct Piece {
  const T* in;
  T* out;
  size_t count;
};

template <typename T>
struct Wider {
  using type = float;  // sums of 16-bit numbers are taken in 32 bits
};
template <>
struct Wider<double> {
  using type = double;
};

// sum[i] = scale * (of[0][i] + of[1][i] + ...). Two ranks are common enough for a loop that the compiler sees whole.
template <typename T>
void Add(const std::vector<const T*>& of, size_t offset, size_t count, typename Wider<T>::type scale, T* sum) {
  using W = typename Wider<T>::type;
  if (of.size() == 2) {
    const T *a = of[0] + offset, *b = of[1] + offset;
    for (size_t i = 0; i < count; ++i) sum[i] = static_cast<T>((static_cast<W>(a[i]) + static_cast<W>(b[i])) * scale);
    return;
  }
  constexpr size_t kBlock = 512;
  W total[kBlock];
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t n = std::min(kBlock, count - begin);
    std::fill_n(total, n, W(0));
    for (const T* part : of) {
      for (size_t i = 0; i < n; ++i) total[i] += static_cast<W>(part[offset + begin + i]);
    }
    for (size_t i = 0; i < n; ++i) sum[begin + i] = static_cast<T>(total[i] * scale);
  }
}

// What the operations have in common: a segment, and a thread that waits in it for the other ranks.
class SharedExchange : public AsyncOpKernel {
 public:
  explicit SharedExchange(OpKernelConstruction* construction) : AsyncOpKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("path", &path_));
    OP_REQUIRES_OK(construction, construction->GetAttr("rank", &rank_));
    OP_REQUIRES_OK(construction, construction->GetAttr("size", &size_));
    OP_REQUIRES_OK(construction, construction->GetAttr("own_core", &own_core_));
  }

  // On a thread of its own: whatever TensorFlow has queued behind this call, which may be an exchange that other ranks
  // have come to first, would wait with it.
  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::thread([this, context, done] {
      Locked(context);
      done();
    }).detach();
  }

 protected:
  // The exchange itself; false if the step was cancelled meanwhile.
  virtual bool Exchange(Segment* segment, OpKernelContext* context) = 0;

  bool Meet(Segment* segment, OpKernelContext* context) {
    const uint64_t began = Now();
    const bool all = segment->Meet(own_core_, context);
    nanoseconds_waiting += Now() - began;
    return all;
  }

  int rank_, size_;

 private:
  void Locked(OpKernelContext* context) {
    const uint64_t began = Now();
    std::string problem;
    Segment* segment = FindSegment(path_, rank_, size_, &problem);
    OP_REQUIRES(context, segment, absl::ResourceExhaustedError(problem));
    const std::lock_guard<std::mutex> lock(segment->in_use());
    if (!Exchange(segment, context) && context->status().ok()) {
      context->SetStatus(absl::CancelledError("The step was cancelled while ranks waited for each other."));
    }
    nanoseconds_in_all += Now() - began;
    ++exchanges;
    for (int i = 0; i < context->num_inputs(); ++i) bytes_brought += context->input(i).TotalBytes();
  }

  std::string path_;
  bool own_core_;
};

template <typename T>
class SharedSum : public SharedExchange {
 public:
  explicit SharedSum(OpKernelConstruction* construction) : SharedExchange(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("before", &before_));
    OP_REQUIRES_OK(construction, construction->GetAttr("after", &after_));
    OP_REQUIRES_OK(construction, construction->GetAttr("divisor", &divisor_));
  }

 private:
  bool Exchange(Segment* segment, OpKernelContext* context) override {
    std::vector<Piece<T>> tensors;
    for (int i = 0; i < context->num_inputs(); ++i) {
      const Tensor& in = context->input(i);
      Tensor* out = nullptr;
      // In place where nobody else holds the input: a rank reads its own numbers from its slot.
      const auto status = context->forward_input_or_allocate_output({i}, i, in.shape(), &out);
      if (!status.ok()) return Fail(context, status);
      tensors.push_back({in.flat<T>().data(), out->flat<T>().data(), static_cast<size_t>(in.NumElements())});
    }
    return Stream(tensors, segment, context);
  }

  // Takes the tensors as one stream, a chunk at a time.
  bool Stream(const std::vector<Piece<T>>& tensors, Segment* segment, OpKernelContext* context) {
    constexpr size_t kChunk = kChunkBytes / sizeof(T);
    std::vector<Piece<T>> chunk;
    size_t filled = 0;
    for (Piece<T> rest : tensors) {
      while (rest.count) {
        const size_t n = std::min(rest.count, kChunk - filled);
        chunk.push_back({rest.in, rest.out, n});
        rest.in += n, rest.out += n, rest.count -= n, filled += n;
        if (filled == kChunk) {
          if (!OneChunk(chunk, filled, segment, context)) return false;
          chunk.clear();
          filled = 0;
        }
      }
    }
    return !filled || OneChunk(chunk, filled, segment, context);
  }

  bool OneChunk(const std::vector<Piece<T>>& chunk, size_t filled, Segment* segment, OpKernelContext* context) {
    using W = typename Wider<T>::type;
    T* mine = reinterpret_cast<T*>(segment->Slot(rank_));
    for (const Piece<T>& piece : chunk) {
      if (before_ == 1.0f) {
        std::memcpy(mine, piece.in, piece.count * sizeof(T));
      } else {
        for (size_t i = 0; i < piece.count; ++i) mine[i] = static_cast<T>(static_cast<W>(piece.in[i]) * W(before_));
      }
      mine += piece.count;
    }
    if (!Meet(segment, context)) return false;
    std::vector<const T*> slots;
    for (int rank = 0; rank < size_; ++rank) slots.push_back(reinterpret_cast<const T*>(segment->Slot(rank)));
    size_t offset = 0;
    if (size_ <= kDivideAbove) {
      for (const Piece<T>& piece : chunk) {
        Add<T>(slots, offset, piece.count, W(after_) / W(divisor_), piece.out);
        offset += piece.count;
      }
    } else {
      const auto begin = [&](int rank) { return filled * rank / size_; };
      T* part = reinterpret_cast<T*>(segment->Slot(rank_)) + begin(rank_);  // which no other rank reads before it is a sum
      Add<T>(slots, begin(rank_), begin(rank_ + 1) - begin(rank_), W(after_) / W(divisor_), part);
      if (!Meet(segment, context)) return false;
      int rank = 0;
      for (const Piece<T>& piece : chunk) {
        for (size_t done = 0; done < piece.count;) {
          while (offset >= begin(rank + 1)) ++rank;
          const size_t n = std::min(piece.count - done, begin(rank + 1) - offset);
          std::memcpy(piece.out + done, slots[rank] + offset, n * sizeof(T));
          done += n, offset += n;
        }
      }
    }
    segment->NextChunk();
    return true;
  }

  int divisor_;  // apart from `after`, which is a float: a third of a double must be one
  float before_, after_;
};

// Rows of all ranks, in the order of the ranks. In each chunk a rank's slot begins with how many bytes it has in all.
class SharedGather : public SharedExchange {
 public:
  using SharedExchange::SharedExchange;

 private:
  static constexpr size_t kHead = 64, kRoom = kChunkBytes - kHead;

  bool Exchange(Segment* segment, OpKernelContext* context) override {
    const Tensor& mine = context->input(0);
    if (mine.dims() < 1) return Fail(context, absl::InvalidArgumentError("Rows are gathered, and a scalar has none."));
    const uint64_t bytes = mine.TotalBytes();
    const char* from = static_cast<const char*>(mine.data());
    std::vector<uint64_t> length(size_), begin(size_ + 1);
    char* to = nullptr;
    uint64_t longest = 0;
    for (uint64_t at = 0; at == 0 || at < longest; at += kRoom) {
      char* slot = segment->Slot(rank_);
      std::memcpy(slot, &bytes, sizeof bytes);
      if (at < bytes) std::memcpy(slot + kHead, from + at, std::min<uint64_t>(kRoom, bytes - at));
      if (!Meet(segment, context)) return false;
      if (at == 0) {
        for (int rank = 0; rank < size_; ++rank) {
          std::memcpy(&length[rank], segment->Slot(rank), sizeof(uint64_t));
          begin[rank + 1] = begin[rank] + length[rank];
          longest = std::max(longest, length[rank]);
        }
        to = Allocate(mine, begin[size_], context);
        if (!to) return false;
      }
      for (int rank = 0; rank < size_; ++rank) {
        if (at >= length[rank]) continue;
        std::memcpy(to + begin[rank] + at, segment->Slot(rank) + kHead, std::min<uint64_t>(kRoom, length[rank] - at));
      }
      segment->NextChunk();
    }
    return true;
  }

  // The output of so many bytes; null, with the context's status set, if that cannot be.
  static char* Allocate(const Tensor& mine, uint64_t bytes, OpKernelContext* context) {
    tensorflow::TensorShape shape = mine.shape();
    int64_t numbers_a_row = 1;
    for (int i = 1; i < shape.dims(); ++i) numbers_a_row *= shape.dim_size(i);
    const uint64_t row = numbers_a_row * tensorflow::DataTypeSize(mine.dtype());
    shape.set_dim(0, row ? bytes / row : mine.dim_size(0));
    Tensor* out = nullptr;
    const auto status = context->allocate_output(0, shape, &out);
    if (!status.ok()) {
      Fail(context, status);
      return nullptr;
    }
    static char nothing;  // of no bytes there is no address
    return bytes ? static_cast<char*>(out->data()) : &nothing;
  }
};

}  // namespace

REGISTER_OP("HvdkitSharedSum")
    .Input("tensors: number * T")
    .Output("sums: number * T")
    .Attr("number: int >= 1")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("path: string")
    .Attr("rank: int")
    .Attr("size: int")
    .Attr("before: float = 1.0")
    .Attr("after: float = 1.0")
    .Attr("divisor: int = 1")
    .Attr("own_core: bool = true")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* context) {
      for (int i = 0; i < context->num_inputs(); ++i) context->set_output(i, context->input(i));
      return absl::OkStatus();
    });

REGISTER_OP("HvdkitSharedGather")
    .Input("rows: T")
    .Output("all_rows: T")
    .Attr("T: {bool, int8, uint8, int16, uint16, int32, int64, uint32, uint64, half, bfloat16, float, double}")
    .Attr("path: string")
    .Attr("rank: int")
    .Attr("size: int")
    .Attr("own_core: bool = true")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* context) {
      tensorflow::shape_inference::ShapeHandle rows, all_rows;
      TF_RETURN_IF_ERROR(context->WithRankAtLeast(context->input(0), 1, &rows));
      TF_RETURN_IF_ERROR(context->ReplaceDim(rows, 0, context->UnknownDim(), &all_rows));
      context->set_output(0, all_rows);
      return absl::OkStatus();
    });

#define REGISTER(T) \
  REGISTER_KERNEL_BUILDER(Name("HvdkitSharedSum").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), SharedSum<T>)
REGISTER(Eigen::half);
REGISTER(Eigen::bfloat16);
REGISTER(float);
REGISTER(double);
REGISTER_KERNEL_BUILDER(Name("HvdkitSharedGather").Device(tensorflow::DEVICE_CPU), SharedGather);

// What this process has spent in exchanges so far: nanoseconds in all, of these waiting for others, and how many; and the
// bytes that it has brought to them.
extern "C" void hvdkit_exchange_times(uint64_t* in_all, uint64_t* waiting, uint64_t* number, uint64_t* bytes) {
  *in_all = nanoseconds_in_all;
  *waiting = nanoseconds_waiting;
  *number = exchanges;
  *bytes = bytes_brought;
}
