// Collectives between ranks of several hosts over TCP sockets: HvdkitSocketsSum is an allreduce that sums tensors, and
// HvdkitSocketsGather is an allgather of rows.
//
// Horovod sends gradients between hosts from its background thread, after a negotiation with a coordinator, through
// Gloo's own thread. Each of these steps wakes another thread, which on a rank with one core first waits for that core.
// Here, the thread that runs the operation also reads and writes the sockets. There is no coordinator: each message
// names its collective, so ranks may start collectives in different orders.
//
// Two ranks send each other all their elements. More ranks divide the sum: each rank sums one part of the elements,
// which the others send to it, and sends the result to the others (a pairwise reduce-scatter and allgather; R. Thakur,
// R. Rabenseifner and W. Gropp, "Optimization of Collective Communication Operations in MPICH", 2005). Each rank sends
// 2 (N - 1) / N times the buffer, as in a ring, in two steps instead of 2 (N - 1). A few elements go to all ranks in
// one step. All ranks sum in the order of the ranks, so they get bit-identical results.
//
// Tensors are sent from where they are, and received into the results: nothing is copied into a buffer before.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

#include "network.h"
#include "sum.h"

namespace {

using hvdkit::Add;
using hvdkit::BytesOf;
using hvdkit::Exchange;
using hvdkit::Header;
using hvdkit::Network;
using hvdkit::Now;
using hvdkit::Pause;
using hvdkit::Piece;
using hvdkit::Places;
using hvdkit::Wider;
using tensorflow::AsyncOpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

constexpr size_t kChunkBytes = 1 << 20;    // of a message: a chunk is summed while the next one arrives
constexpr size_t kUndividedBytes = 32 << 10;  // up to this size, a second step costs more than sending all to all ranks
constexpr uint64_t kSpinNanoseconds = 300'000;  // typical time between ranks in a step; a wake-up takes longer

std::atomic<uint64_t> nanoseconds_waiting{0}, nanoseconds_in_all{0}, collectives{0};

// A stream of elements over several tensors.
template <typename T>
class Stream {
 public:
  bool Open(OpKernelContext* context) {
    for (int i = 0; i < context->num_inputs(); ++i) {
      const Tensor& in = context->input(i);
      Tensor* out = nullptr;
      const auto status = context->allocate_output(i, in.shape(), &out);
      if (!status.ok()) return hvdkit::Fail(context, status);
      if (!in.NumElements()) continue;
      pieces_.push_back({in.flat<T>().data(), out->flat<T>().data(), static_cast<size_t>(in.NumElements())});
      length_ += in.NumElements();
    }
    return true;
  }

  size_t length() const { return length_; }

  std::vector<Piece<T>> Slice(size_t begin, size_t end) const {
    std::vector<Piece<T>> slice;
    size_t at = 0;
    for (const Piece<T>& piece : pieces_) {
      const size_t from = std::max(begin, at), to = std::min(end, at + piece.count);
      if (from < to) slice.push_back({piece.in + (from - at), piece.out + (from - at), to - from});
      at += piece.count;
      if (at >= end) break;
    }
    return slice;
  }

  Places In(size_t begin, size_t end) const {
    Places places;
    for (const Piece<T>& piece : Slice(begin, end)) places.push_back({const_cast<T*>(piece.in), piece.count * sizeof(T)});
    return places;
  }

  Places Out(size_t begin, size_t end) const {
    Places places;
    for (const Piece<T>& piece : Slice(begin, end)) places.push_back({piece.out, piece.count * sizeof(T)});
    return places;
  }

 private:
  std::vector<Piece<T>> pieces_;
  size_t length_ = 0;
};

// One collective of one step.
class Collective {
 public:
  Collective(OpKernelContext* context, uint64_t name, const std::vector<int>& ranks, int rank)
      : context_(context), network_(Network::Get()), name_(name), call_(network_.NextCall(name)), ranks_(ranks) {
    me_ = std::find(ranks.begin(), ranks.end(), rank) - ranks.begin();
  }
  virtual ~Collective() { network_.Abandon(&exchange_); }

  // Sends what can be sent at once, and names the messages that it expects. Returns false after an error, which is then
  // in the context's status.
  virtual bool Begin() = 0;
  // Works on what has arrived. Returns whether all is done, except for messages that are still to be sent.
  virtual bool Advance() = 0;

  const Exchange& exchange() const { return exchange_; }

 protected:
  size_t size() const { return ranks_.size(); }
  Header MessageOf(uint32_t part, size_t bytes) const { return {name_, call_, part, bytes, bytes}; }
  void Send(size_t to, uint32_t part, Places places, bool may_be_packed) {
    const Header header = MessageOf(part, BytesOf(places));
    network_.Send(ranks_[to], header, std::move(places), &exchange_, may_be_packed);
  }
  void Expect(size_t from, uint32_t part, Places places, std::atomic<bool>* arrived) {
    network_.Expect(ranks_[from], MessageOf(part, 0), {std::move(places), nullptr, arrived, &exchange_});
  }
  void ExpectWhole(size_t from, std::vector<char>* bytes) {
    network_.Expect(ranks_[from], MessageOf(0, 0), {{}, bytes, nullptr, &exchange_});
  }

  OpKernelContext* context_;
  size_t me_;

 private:
  Network& network_;
  Exchange exchange_;
  const uint64_t name_;
  const uint32_t call_;
  const std::vector<int> ranks_;
};

// Sums tensors. Each rank sums the elements of its part; two ranks, and ranks with few elements, sum all of them.
template <typename T>
class Sum : public Collective {
 public:
  using W = typename Wider<T>::type;

  Sum(OpKernelContext* context, uint64_t name, const std::vector<int>& ranks, int rank, W scale)
      : Collective(context, name, ranks, rank), scale_(scale) {}

  bool Begin() override {
    if (!stream_.Open(context_)) return false;
    is_divided_ = size() > 2 && stream_.length() * sizeof(T) > kUndividedBytes;
    Cut(is_divided_ ? PartBegin(me_) : 0, is_divided_ ? PartBegin(me_ + 1) : stream_.length());
    const size_t others = size() - 1;
    // The others' elements: the first other rank's arrive in the result, which then becomes the sum.
    scratch_.resize((others - 1) * (end_ - begin_));
    arrived_ = std::vector<std::atomic<bool>>(chunks_.size() * others);
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const auto [from, to] = chunks_[c];
      for (size_t other = 0; other < others; ++other) {
        const size_t rank = (me_ + 1 + other) % size();
        Expect(rank, c, other ? Scratch(other, from, to) : stream_.Out(from, to), &arrived_[c * others + other]);
      }
    }
    for (size_t other = 0; other < others; ++other) {
      const size_t rank = (me_ + 1 + other) % size();
      const size_t from = is_divided_ ? PartBegin(rank) : 0, to = is_divided_ ? PartBegin(rank + 1) : stream_.length();
      uint32_t c = 0;
      for (size_t at = from; at < to; at += kChunk) Send(rank, c++, stream_.In(at, std::min(to, at + kChunk)), true);
      c = kSums;
      if (!is_divided_) continue;
      for (size_t at = from; at < to; at += kChunk) {
        Expect(rank, c++, stream_.Out(at, std::min(to, at + kChunk)), nullptr);
      }
    }
    return true;
  }

  bool Advance() override {
    const size_t others = size() - 1;
    for (; at_ < chunks_.size(); ++at_) {
      for (size_t other = 0; other < others; ++other) {
        if (!arrived_[at_ * others + other].load(std::memory_order_acquire)) return false;
      }
      AddChunk(chunks_[at_].first, chunks_[at_].second);
      if (!is_divided_) continue;
      for (size_t other = 0; other < others; ++other) {
        Send((me_ + 1 + other) % size(), kSums + at_, stream_.Out(chunks_[at_].first, chunks_[at_].second), true);
      }
    }
    return exchange().left == 0;
  }

 private:
  static constexpr size_t kChunk = kChunkBytes / sizeof(T);
  static constexpr uint32_t kSums = 1u << 31;  // number of the first message with sums

  void Cut(size_t begin, size_t end) {
    begin_ = begin, end_ = end;
    for (size_t at = begin; at < end; at += kChunk) chunks_.push_back({at, std::min(end, at + kChunk)});
  }

  // Adds the elements of all ranks, in the order of the ranks.
  void AddChunk(size_t begin, size_t end) {
    std::vector<const T*> of(size());
    size_t at = begin;
    for (const Piece<T>& piece : stream_.Slice(begin, end)) {
      for (size_t other = 0; other + 1 < size(); ++other) {
        of[(me_ + 1 + other) % size()] = other ? &scratch_[(other - 1) * (end_ - begin_) + at - begin_] : piece.out;
      }
      of[me_] = piece.in;
      Add<T>(of, 0, piece.count, scale_, piece.out);
      at += piece.count;
    }
  }

  Places Scratch(size_t other, size_t from, size_t to) {
    return {{&scratch_[(other - 1) * (end_ - begin_) + from - begin_], (to - from) * sizeof(T)}};
  }
  size_t PartBegin(size_t rank) const { return stream_.length() * rank / size(); }

  const W scale_;
  bool is_divided_ = false;
  Stream<T> stream_;
  size_t begin_ = 0, end_ = 0;  // of the elements that this rank sums
  std::vector<std::pair<size_t, size_t>> chunks_;
  std::vector<T> scratch_;
  std::vector<std::atomic<bool>> arrived_;  // [chunk, other rank]
  size_t at_ = 0;                           // the chunk that is summed next
};

// Gathers the rows of all ranks, in the order of the ranks.
class Gather : public Collective {
 public:
  using Collective::Collective;

  bool Begin() override {
    const Tensor& mine = context_->input(0);
    if (mine.dims() < 1) return hvdkit::Fail(context_, absl::InvalidArgumentError("A scalar has no rows to gather."));
    rows_.resize(size());
    for (size_t rank = 0; rank < size(); ++rank) {
      if (rank != me_) ExpectWhole(rank, &rows_[rank]);
    }
    for (size_t other = 1; other < size(); ++other) {
      Send((me_ + other) % size(), 0, {{mine.data(), mine.TotalBytes()}}, false);
    }
    return true;
  }

  bool Advance() override { return exchange().left == 0 && !exchange().has_failed && Join(); }

 private:
  // Writes the output. Its size is known when all rows have arrived.
  bool Join() {
    const Tensor& mine = context_->input(0);
    uint64_t bytes = mine.TotalBytes();
    for (const auto& rows : rows_) bytes += rows.size();
    tensorflow::TensorShape shape = mine.shape();
    int64_t row_elements = 1;
    for (int i = 1; i < shape.dims(); ++i) row_elements *= shape.dim_size(i);
    const uint64_t row = row_elements * tensorflow::DataTypeSize(mine.dtype());
    shape.set_dim(0, row ? bytes / row : mine.dim_size(0));
    Tensor* out = nullptr;
    const auto status = context_->allocate_output(0, shape, &out);
    if (!status.ok()) {
      context_->SetStatus(status);
      return true;
    }
    char* to = static_cast<char*>(out->data());
    for (size_t rank = 0; rank < size(); ++rank) {
      const size_t n = rank == me_ ? mine.TotalBytes() : rows_[rank].size();
      if (n) std::memcpy(to, rank == me_ ? mine.data() : rows_[rank].data(), n);
      to += n;
    }
    return true;
  }

  std::vector<std::vector<char>> rows_;
};

// The common base of the operations: runs a collective until all its messages are sent and received.
class SocketsCollective : public AsyncOpKernel {
 public:
  explicit SocketsCollective(OpKernelConstruction* construction) : AsyncOpKernel(construction) {
    int64_t name;
    OP_REQUIRES_OK(construction, construction->GetAttr("collective", &name));
    name_ = name;
    OP_REQUIRES_OK(construction, construction->GetAttr("ranks", &ranks_));
    OP_REQUIRES_OK(construction, construction->GetAttr("rank", &rank_));
    OP_REQUIRES_OK(construction, construction->GetAttr("spins", &spins_));
    OP_REQUIRES_OK(construction, construction->GetAttr("blocks", &blocks_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const uint64_t began = Now();
    const std::shared_ptr<Collective> collective = New(context);
    const bool is_over = !collective->Begin() || Spin(collective.get(), context);
    if (is_over || blocks_) {
      if (!is_over) Wait(collective.get(), context);
      return End(began, done);
    }
    // Wait on a separate thread. Otherwise the work that TensorFlow has queued after this call would wait, too, and
    // that may be a collective that other ranks run first: a deadlock.
    std::thread([this, collective, context, began, done = std::move(done)] {
      Wait(collective.get(), context);
      End(began, done);
    }).detach();
  }

 protected:
  virtual std::shared_ptr<Collective> New(OpKernelContext* context) = 0;

  uint64_t name_;
  std::vector<int> ranks_;
  int rank_;

 private:
  bool IsOver(Collective* collective, OpKernelContext* context) {
    if (collective->Advance()) return true;
    if (!collective->exchange().has_failed) return false;
    context->SetStatus(absl::AbortedError(collective->exchange().problem));
    return true;
  }

  // Returns whether the collective has ended without a wait for long.
  bool Spin(Collective* collective, OpKernelContext* context) {
    const uint64_t began = Now();
    bool is_over;
    while (!(is_over = IsOver(collective, context))) {
      if (!Network::Get().Progress()) {
        if (!spins_ || Now() - began > kSpinNanoseconds) break;
        Pause();
      }
    }
    nanoseconds_waiting += Now() - began;
    return is_over;
  }

  void Wait(Collective* collective, OpKernelContext* context) {
    const uint64_t began = Now();
    auto* manager = context->cancellation_manager();
    for (uint64_t seen = Network::Get().events(); !IsOver(collective, context); seen = Network::Get().events()) {
      Network::Get().Sleep(seen);
      if (manager && manager->IsCancelled() && !IsOver(collective, context)) {
        context->SetStatus(absl::CancelledError("The step was cancelled while ranks waited for each other."));
        break;
      }
    }
    nanoseconds_waiting += Now() - began;
  }

  static void End(uint64_t began, const DoneCallback& done) {
    nanoseconds_in_all += Now() - began;
    ++collectives;
    done();
  }

  bool spins_, blocks_;
};

template <typename T>
class SocketsSum : public SocketsCollective {
 public:
  explicit SocketsSum(OpKernelConstruction* construction) : SocketsCollective(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("after", &after_));
    OP_REQUIRES_OK(construction, construction->GetAttr("divisor", &divisor_));
  }

 private:
  std::shared_ptr<Collective> New(OpKernelContext* context) override {
    using W = typename Wider<T>::type;
    return std::make_shared<Sum<T>>(context, name_, ranks_, rank_, W(after_) / W(divisor_));
  }

  float after_;
  int divisor_;  // not a part of `after`, which is a float: dividing a double by 3 needs double precision
};

class SocketsGather : public SocketsCollective {
 public:
  using SocketsCollective::SocketsCollective;

 private:
  std::shared_ptr<Collective> New(OpKernelContext* context) override {
    return std::make_shared<Gather>(context, name_, ranks_, rank_);
  }
};

}  // namespace

REGISTER_OP("HvdkitSocketsSum")
    .Input("tensors: number * T")
    .Output("sums: number * T")
    .Attr("number: int >= 1")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("collective: int")
    .Attr("ranks: list(int) >= 2")
    .Attr("rank: int")
    .Attr("after: float = 1.0")
    .Attr("divisor: int = 1")
    .Attr("spins: bool = true")
    .Attr("blocks: bool = false")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* context) {
      for (int i = 0; i < context->num_inputs(); ++i) context->set_output(i, context->input(i));
      return absl::OkStatus();
    });

REGISTER_OP("HvdkitSocketsGather")
    .Input("rows: T")
    .Output("all_rows: T")
    .Attr("T: {bool, int8, uint8, int16, uint16, int32, int64, uint32, uint64, half, bfloat16, float, double}")
    .Attr("collective: int")
    .Attr("ranks: list(int) >= 2")
    .Attr("rank: int")
    .Attr("spins: bool = true")
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
  REGISTER_KERNEL_BUILDER(Name("HvdkitSocketsSum").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), SocketsSum<T>)
REGISTER(Eigen::half);
REGISTER(Eigen::bfloat16);
REGISTER(float);
REGISTER(double);
REGISTER_KERNEL_BUILDER(Name("HvdkitSocketsGather").Device(tensorflow::DEVICE_CPU), SocketsGather);

// Takes over the connected sockets to `count` other ranks. `packing` is a value of Packing.
extern "C" void hvdkit_sockets_start(int count, const int* ranks, const int* files, int packing) {
  Network::Get().Start(count, ranks, files, static_cast<hvdkit::Packing>(packing));
}

// Closes all connections.
extern "C" void hvdkit_sockets_stop() { Network::Get().Stop(); }

// Returns what this process has spent in these collectives so far: total nanoseconds, nanoseconds of waiting for other
// ranks, number of collectives, and bytes sent.
extern "C" void hvdkit_sockets_times(uint64_t* in_all, uint64_t* waiting, uint64_t* number, uint64_t* bytes) {
  *in_all = nanoseconds_in_all;
  *waiting = nanoseconds_waiting;
  *number = collectives;
  *bytes = Network::Get().sent_bytes();
}
