// Collectives between ranks of one host through shared memory: HvdkitSharedSum is an allreduce that sums tensors, and
// HvdkitSharedGather is an allgather of rows.
//
// Horovod sends gradients between ranks of one host through the loopback network. That takes a negotiation and a ring
// of messages, each of which wakes threads on both sides. With shared memory, neither is needed: every rank copies its
// tensors, as one stream of elements cut into chunks, into its own slot. After all ranks have written a chunk, every
// rank reads it.
//
// One barrier per chunk is enough, because each slot holds two chunks alternately. A rank overwrites chunk k - 2 with
// chunk k after the barrier of chunk k - 1. At that time, every rank has read chunk k - 2. All ranks sum in the order
// of the ranks, so they get bit-identical results. Up to four ranks each sum a complete chunk. More ranks divide the
// sum among themselves (a reduce-scatter and an allgather; R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of
// Collective Communication Operations in MPICH", 2005), which takes a second barrier.
//
// With each chunk a rank also writes the layout of its tensors. After the barrier, each rank compares all layouts before
// it reads anything, so all ranks fail together if they differ.
//
// A collective runs on TensorFlow's thread as long as it does not have to wait for other ranks, and continues on its
// own thread otherwise: to start a thread takes longer than an allreduce of a small model's gradients.
#include <fcntl.h>
#include <linux/futex.h>
#include <semaphore.h>
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

#include "sum.h"

namespace {

using hvdkit::Add;
using hvdkit::Fail;
using hvdkit::Layout;
using hvdkit::Now;
using hvdkit::Pause;
using hvdkit::Piece;
using hvdkit::ReadFactor;
using hvdkit::Wider;
using tensorflow::AsyncOpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

constexpr size_t kChunkBytes = 512 << 10;  // two chunks per slot, and the slots of a few ranks, fit into the cache
constexpr int kDivideAbove = 4;            // more ranks than this divide the sum among themselves
constexpr uint64_t kSpinNanoseconds = 500'000;  // typical time between ranks in a step; a wake-up takes longer
constexpr long kCancelPollNanoseconds = 50'000'000;  // how often a waiting rank checks whether its step was cancelled

std::atomic<uint64_t> nanoseconds_waiting{0}, nanoseconds_in_all{0}, collectives{0}, input_bytes{0};

// One rank's counters in the segment, on a separate cache line.
struct alignas(64) Counters {
  std::atomic<uint32_t> arrived;   // number of barriers that it has reached
  std::atomic<uint32_t> sleepers;  // number of ranks that sleep until it reaches the next one
  Layout layouts[2];               // of its tensors, at barriers of even and of odd number
};
static_assert(sizeof(Counters) == 64);

// Memory that the ranks of one host share, for the collectives of one name.
class Segment {
 public:
  Segment(const std::string& path, int rank, int size) : path_(path), rank_(rank), size_(size) {
    sem_init(&free_, 0, 1);
  }

  // The initial content is all zeros. So the first rank can create it, and no rank waits for another.
  std::string Open() {
    const size_t bytes = size_ * (sizeof(Counters) + 2 * kChunkBytes);
    const int file = open(path_.c_str(), O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (file < 0) return Failed("opened");
    // Reserve the memory now: a missing page would later end the process with SIGBUS.
    const int refused = posix_fallocate(file, 0, bytes);
    void* at = refused ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (refused) errno = refused;
    const std::string problem = at == MAP_FAILED ? Failed("mapped") : "";
    close(file);
    if (!problem.empty()) return problem;
    counters_ = static_cast<Counters*>(at);
    slots_ = static_cast<char*>(at) + size_ * sizeof(Counters);
    return "";
  }

  char* Slot(int rank) { return slots_ + (2 * rank + parity_) * kChunkBytes; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  void NextChunk() { parity_ ^= 1; }

  // One collective at a time. A semaphore, not a mutex, because a different thread may end the collective.
  bool TryEnter() { return sem_trywait(&free_) == 0; }
  void Enter() {
    while (sem_wait(&free_)) {
    }
  }
  // A rank that stops between two barriers has not read chunks that the others may overwrite.
  void Leave(bool is_well) {
    is_broken_ |= has_arrived_ && !is_well;
    has_arrived_ = false;
    sem_post(&free_);
  }
  bool is_broken() const { return is_broken_; }

  // Tells the other ranks that this one has reached the next barrier, and what it has brought.
  void Arrive(const Layout& layout) {
    has_arrived_ = true;
    Counters& mine = counters_[rank_];
    mine.layouts[(barrier_ + 1) & 1] = layout;
    mine.arrived.store(++barrier_, std::memory_order_seq_cst);
    if (mine.sleepers.load(std::memory_order_seq_cst)) Futex(&mine.arrived, FUTEX_WAKE, INT_MAX, nullptr);
  }

  // Returns how a rank's tensors at this barrier, which all have reached, differ from this rank's; or an empty string.
  std::string Mismatch() const {
    const Layout& mine = counters_[rank_].layouts[barrier_ & 1];
    for (int rank = 0; rank < size_; ++rank) {
      const Layout& other = counters_[rank].layouts[barrier_ & 1];
      if (!(other == mine)) return mine.Mismatch(other, "number " + std::to_string(rank) + " of the ranks");
    }
    return "";
  }

  // Returns whether all other ranks have reached the barrier, or reach it while this thread spins.
  bool AllHaveArrived(bool spin) {
    const uint64_t end = spin ? Now() + kSpinNanoseconds : 0;
    while (!std::all_of(counters_, counters_ + size_, [&](const Counters& other) { return HasArrived(other); })) {
      if (Now() >= end) return false;
      Pause();
    }
    // All ranks have opened the file: remove its name now, so it does not remain if the job is killed.
    if (barrier_ == 1 && rank_ == 0) unlink(path_.c_str());
    return true;
  }

  // Sleeps until all other ranks have reached the barrier. Returns false if the step was cancelled meanwhile.
  bool Await(OpKernelContext* context) {
    for (Counters* other = counters_; other != counters_ + size_; ++other) {
      while (!HasArrived(*other)) {
        other->sleepers.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t seen = other->arrived.load(std::memory_order_seq_cst);
        if (static_cast<int32_t>(seen - barrier_) < 0) {
          const timespec limit{0, kCancelPollNanoseconds};
          Futex(&other->arrived, FUTEX_WAIT, seen, &limit);
        }
        other->sleepers.fetch_sub(1, std::memory_order_seq_cst);
        auto* manager = context->cancellation_manager();
        if (!HasArrived(*other) && manager && manager->IsCancelled()) return false;
      }
    }
    return AllHaveArrived(false);
  }

 private:
  // Barrier numbers wrap around, so compare them by their difference.
  bool HasArrived(const Counters& other) const { return static_cast<int32_t>(other.arrived.load() - barrier_) >= 0; }

  static void Futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* limit) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, limit, nullptr, 0);
  }

  std::string Failed(const char* what) {
    return "The shared memory " + path_ + " cannot be " + what + " (" + std::strerror(errno) +
           "). Give this host more of /dev/shm, or set HVDKIT_SHARED_MEMORY=0 to communicate over the network.";
  }

  const std::string path_;
  const int rank_, size_;
  uint32_t barrier_ = 0;
  int parity_ = 0;
  Counters* counters_ = nullptr;
  char* slots_ = nullptr;
  sem_t free_;
  bool has_arrived_ = false, is_broken_ = false;
};

// Finds segments by path: if only one rank traces its step again, it must continue in the segment of the others.
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

// One collective of one step: a rank's work before, between and after the barriers.
class Collective {
 public:
  Collective(Segment* segment, OpKernelContext* context) : segment_(*segment), context_(context) {}
  virtual ~Collective() = default;

  // Does the next part of the work. Returns true if a barrier must follow, and false at the end or after an error,
  // which is then in the context's status.
  virtual bool Advance() = 0;

  const Layout& layout() const { return layout_; }

 protected:
  Segment& segment_;
  OpKernelContext* context_;
  Layout layout_;
};

// Sums tensors over the ranks, as one stream of elements cut into chunks.
template <typename T>
class Sum : public Collective {
 public:
  using W = typename Wider<T>::type;

  Sum(Segment* segment, OpKernelContext* context, W before, W after)
      : Collective(segment, context), before_(before), after_(after) {
    layout_.Add('S');
    for (int i = 0; i < context->num_inputs(); ++i) layout_.Add(context->input(i).shape(), 0);
  }

  bool Advance() override {
    if (!is_cut_) {
      if (!Cut()) return false;
    } else if (segment_.size() > kDivideAbove && !is_part_added_) {
      AddPart();
      return is_part_added_ = true;
    } else {
      Take();
      segment_.NextChunk();
      is_part_added_ = false;
      ++at_;
    }
    if (at_ == chunks_.size()) return false;
    Put();
    return true;
  }

 private:
  struct Chunk {
    std::vector<Piece<T>> pieces;
    size_t filled = 0;
  };

  bool Cut() {
    constexpr size_t kChunk = kChunkBytes / sizeof(T);
    for (int i = 0; i < context_->num_inputs(); ++i) {
      const Tensor& in = context_->input(i);
      Tensor* out = nullptr;
      // In place if nothing else uses the input: a rank reads its own elements from its slot.
      const auto status = context_->forward_input_or_allocate_output({i}, i, in.shape(), &out);
      if (!status.ok()) return Fail(context_, status);
      Piece<T> rest{in.flat<T>().data(), out->flat<T>().data(), static_cast<size_t>(in.NumElements())};
      while (rest.count) {
        if (chunks_.empty() || chunks_.back().filled == kChunk) chunks_.emplace_back();
        Chunk& chunk = chunks_.back();
        const size_t n = std::min(rest.count, kChunk - chunk.filled);
        chunk.pieces.push_back({rest.in, rest.out, n});
        chunk.filled += n;
        rest.in += n, rest.out += n, rest.count -= n;
      }
    }
    if (chunks_.empty()) chunks_.emplace_back();  // others may have elements: meet them at a barrier
    return is_cut_ = true;
  }

  void Put() {
    T* mine = Slot(segment_.rank());
    for (const Piece<T>& piece : chunks_[at_].pieces) {
      if (before_ == W(1)) {
        std::memcpy(mine, piece.in, piece.count * sizeof(T));
      } else {
        for (size_t i = 0; i < piece.count; ++i) mine[i] = static_cast<T>(static_cast<W>(piece.in[i]) * before_);
      }
      mine += piece.count;
    }
  }

  // Sums this rank's part of the chunk into its slot. No other rank reads this part before the next barrier.
  void AddPart() {
    const int rank = segment_.rank();
    Add<T>(Slots(), PartBegin(rank), PartBegin(rank + 1) - PartBegin(rank), after_, Slot(rank) + PartBegin(rank));
  }

  void Take() {
    const std::vector<const T*> slots = Slots();
    size_t offset = 0;
    int rank = 0;
    for (const Piece<T>& piece : chunks_[at_].pieces) {
      if (!is_part_added_) {
        Add<T>(slots, offset, piece.count, after_, piece.out);
        offset += piece.count;
        continue;
      }
      for (size_t done = 0; done < piece.count;) {
        while (offset >= PartBegin(rank + 1)) ++rank;
        const size_t n = std::min(piece.count - done, PartBegin(rank + 1) - offset);
        std::memcpy(piece.out + done, slots[rank] + offset, n * sizeof(T));
        done += n, offset += n;
      }
    }
  }

  size_t PartBegin(int rank) const { return chunks_[at_].filled * rank / segment_.size(); }
  T* Slot(int rank) { return reinterpret_cast<T*>(segment_.Slot(rank)); }
  std::vector<const T*> Slots() {
    std::vector<const T*> slots;
    for (int rank = 0; rank < segment_.size(); ++rank) slots.push_back(Slot(rank));
    return slots;
  }

  const W before_, after_;
  bool is_cut_ = false, is_part_added_ = false;
  std::vector<Chunk> chunks_;
  size_t at_ = 0;
};

// Gathers the rows of all ranks, in the order of the ranks. In each chunk, a slot begins with the rank's total size in
// bytes.
class Gather : public Collective {
 public:
  Gather(Segment* segment, OpKernelContext* context)
      : Collective(segment, context), mine_(context->input(0)), length_(segment->size()), begin_(segment->size() + 1) {
    layout_.Add('G');
    layout_.Add(mine_.shape(), 1);
  }

  bool Advance() override {
    if (mine_.dims() < 1) return Fail(context_, absl::InvalidArgumentError("A scalar has no rows to gather."));
    if (has_put_) {
      if (at_ == 0 && !Allocate()) return false;
      Take();
      segment_.NextChunk();
      at_ += kRoom;
      if (at_ >= longest_) return false;
    }
    Put();
    return has_put_ = true;
  }

 private:
  static constexpr size_t kHead = 64, kRoom = kChunkBytes - kHead;

  void Put() {
    const uint64_t bytes = mine_.TotalBytes();
    char* slot = segment_.Slot(segment_.rank());
    std::memcpy(slot, &bytes, sizeof bytes);
    const char* from = static_cast<const char*>(mine_.data()) + at_;
    if (at_ < bytes) std::memcpy(slot + kHead, from, std::min<uint64_t>(kRoom, bytes - at_));
  }

  void Take() {
    for (int rank = 0; rank < segment_.size(); ++rank) {
      if (at_ >= length_[rank]) continue;
      const uint64_t bytes = std::min<uint64_t>(kRoom, length_[rank] - at_);
      std::memcpy(to_ + begin_[rank] + at_, segment_.Slot(rank) + kHead, bytes);
    }
  }

  // Allocates the output. Its size is known after all ranks have written their first chunk.
  bool Allocate() {
    for (int rank = 0; rank < segment_.size(); ++rank) {
      std::memcpy(&length_[rank], segment_.Slot(rank), sizeof(uint64_t));
      begin_[rank + 1] = begin_[rank] + length_[rank];
      longest_ = std::max(longest_, length_[rank]);
    }
    tensorflow::TensorShape shape = mine_.shape();
    int64_t row_elements = 1;
    for (int i = 1; i < shape.dims(); ++i) row_elements *= shape.dim_size(i);
    const uint64_t row = row_elements * tensorflow::DataTypeSize(mine_.dtype());
    shape.set_dim(0, row ? begin_.back() / row : mine_.dim_size(0));
    Tensor* out = nullptr;
    const auto status = context_->allocate_output(0, shape, &out);
    if (!status.ok()) return Fail(context_, status);
    to_ = static_cast<char*>(out->data());
    return true;
  }

  const Tensor& mine_;
  std::vector<uint64_t> length_, begin_;  // of each rank's rows, in bytes
  uint64_t longest_ = 0, at_ = 0;
  char* to_ = nullptr;
  bool has_put_ = false;
};

// The common base of the operations: finds the segment and runs a collective through its barriers.
class SharedCollective : public AsyncOpKernel {
 public:
  explicit SharedCollective(OpKernelConstruction* construction) : AsyncOpKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("path", &path_));
    OP_REQUIRES_OK(construction, construction->GetAttr("rank", &rank_));
    OP_REQUIRES_OK(construction, construction->GetAttr("size", &size_));
    OP_REQUIRES_OK(construction, construction->GetAttr("own_core", &own_core_));
    OP_REQUIRES_OK(construction, construction->GetAttr("blocks", &blocks_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const uint64_t began = Now();
    std::string problem;
    Segment* segment = FindSegment(path_, rank_, size_, &problem);
    OP_REQUIRES_ASYNC(context, segment, absl::ResourceExhaustedError(problem), done);
    const std::shared_ptr<Collective> collective = Begin(segment, context);
    const bool has_entered = segment->TryEnter();
    if (has_entered && AdvanceWithoutSleep(collective.get(), segment, context)) {
      return End(segment, context, began, done);
    }
    if (blocks_) {
      if (!has_entered) segment->Enter();
      Finish(collective.get(), segment, context, has_entered);
      return End(segment, context, began, done);
    }
    // Wait on a separate thread. Otherwise the work that TensorFlow has queued after this call would wait, too, and
    // that may be a collective that other ranks run first: a deadlock.
    std::thread([=] {
      if (!has_entered) segment->Enter();
      Finish(collective.get(), segment, context, has_entered);
      End(segment, context, began, done);
    }).detach();
  }

 protected:
  virtual std::unique_ptr<Collective> Begin(Segment* segment, OpKernelContext* context) = 0;

 private:
  // Returns true at the end, and false if this rank has reached a barrier before the others and would have to sleep.
  bool AdvanceWithoutSleep(Collective* collective, Segment* segment, OpKernelContext* context) {
    if (segment->is_broken()) {
      context->SetStatus(absl::AbortedError("An earlier step ended during a collective: start the job again."));
      return true;
    }
    while (collective->Advance()) {
      segment->Arrive(collective->layout());
      const uint64_t began = Now();
      const bool all = segment->AllHaveArrived(own_core_);
      nanoseconds_waiting += Now() - began;
      if (!all) return false;
      if (!AreAlike(segment, context)) return true;
    }
    return true;
  }

  // Sleeps at each barrier until the collective is over.
  void Finish(Collective* collective, Segment* segment, OpKernelContext* context, bool has_begun) {
    bool is_over = !has_begun && AdvanceWithoutSleep(collective, segment, context);
    while (!is_over && Await(segment, context)) is_over = AdvanceWithoutSleep(collective, segment, context);
  }

  // Returns false if the step was cancelled meanwhile, or the ranks' tensors differ.
  static bool Await(Segment* segment, OpKernelContext* context) {
    const uint64_t began = Now();
    const bool all = segment->Await(context);
    nanoseconds_waiting += Now() - began;
    if (!all) context->SetStatus(absl::CancelledError("The step was cancelled while ranks waited for each other."));
    return all && AreAlike(segment, context);
  }

  // Horovod reports differing tensors by this kind of error, too.
  static bool AreAlike(Segment* segment, OpKernelContext* context) {
    const std::string mismatch = segment->Mismatch();
    return mismatch.empty() || Fail(context, absl::FailedPreconditionError(mismatch));
  }

  static void End(Segment* segment, OpKernelContext* context, uint64_t began, const DoneCallback& done) {
    segment->Leave(context->status().ok());
    nanoseconds_in_all += Now() - began;
    ++collectives;
    for (int i = 0; i < context->num_inputs(); ++i) input_bytes += context->input(i).TotalBytes();
    done();
  }

  std::string path_;
  int rank_, size_;
  bool own_core_, blocks_;
};

template <typename T>
class SharedSum : public SharedCollective {
 public:
  explicit SharedSum(OpKernelConstruction* construction) : SharedCollective(construction) {
    OP_REQUIRES_OK(construction, ReadFactor(construction, "before", &before_));
    OP_REQUIRES_OK(construction, ReadFactor(construction, "after", &after_));
    OP_REQUIRES_OK(construction, construction->GetAttr("divisor", &divisor_));
  }

 private:
  std::unique_ptr<Collective> Begin(Segment* segment, OpKernelContext* context) override {
    using W = typename Wider<T>::type;
    return std::make_unique<Sum<T>>(segment, context, W(before_), W(after_) / W(divisor_));
  }

  double before_, after_;
  int divisor_;
};

class SharedGather : public SharedCollective {
 public:
  using SharedCollective::SharedCollective;

 private:
  std::unique_ptr<Collective> Begin(Segment* segment, OpKernelContext* context) override {
    return std::make_unique<Gather>(segment, context);
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
    .Attr("before: string = '1'")
    .Attr("after: string = '1'")
    .Attr("divisor: int = 1")
    .Attr("own_core: bool = true")
    .Attr("blocks: bool = false")
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
    .Attr("blocks: bool = false")
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

// Returns what this process has spent in collectives so far: total nanoseconds, nanoseconds of waiting for other ranks,
// number of collectives, and bytes of their inputs.
extern "C" void hvdkit_exchange_times(uint64_t* in_all, uint64_t* waiting, uint64_t* number, uint64_t* bytes) {
  *in_all = nanoseconds_in_all;
  *waiting = nanoseconds_waiting;
  *number = collectives;
  *bytes = input_bytes;
}
