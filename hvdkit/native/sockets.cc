// Collectives between ranks of several hosts over TCP sockets: HvdkitSocketsSum is an allreduce that sums tensors, and
// HvdkitSocketsGather is an allgather of rows. HvdkitSocketsSumStart and HvdkitSocketsSumDone are the two halves of an
// allreduce that goes on while the rank computes (XLA has all-reduce-start and all-reduce-done).
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
using hvdkit::Layout;
using hvdkit::Network;
using hvdkit::Now;
using hvdkit::Pause;
using hvdkit::Piece;
using hvdkit::Places;
using hvdkit::ReadFactor;
using hvdkit::Wider;
using tensorflow::AsyncOpKernel;
using tensorflow::OpKernel;
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
  // The stream does not own the tensors.
  void Append(const Tensor& in, Tensor* out) {
    layout_.Add(in.shape(), 0);
    if (!in.NumElements()) return;
    pieces_.push_back({in.flat<T>().data(), out->flat<T>().data(), static_cast<size_t>(in.NumElements())});
    length_ += in.NumElements();
  }

  size_t length() const { return length_; }
  const Layout& layout() const { return layout_; }

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
  Layout layout_;
};

// One collective of one step.
class Collective {
 public:
  Collective(uint64_t name, const std::vector<int>& ranks, int rank)
      : network_(Network::Get()), name_(name), call_(network_.NextCall(name)), ranks_(ranks) {
    me_ = std::find(ranks.begin(), ranks.end(), rank) - ranks.begin();
  }
  virtual ~Collective() { network_.Abandon(&exchange_); }

  // Sends what can be sent at once, and names the messages that it expects.
  virtual void Begin() = 0;
  // Works on what has arrived. Returns whether all is done, except for messages that are still to be sent.
  virtual bool Advance() = 0;

  const Exchange& exchange() const { return exchange_; }

 protected:
  size_t size() const { return ranks_.size(); }
  Header MessageOf(uint32_t part, size_t bytes) const { return {name_, call_, part, layout_.hash, bytes, bytes}; }
  void Send(size_t to, uint32_t part, Places places, bool may_be_packed) {
    const Header header = MessageOf(part, BytesOf(places));
    network_.Send(ranks_[to], header, std::move(places), &exchange_, may_be_packed);
  }
  void Expect(size_t from, uint32_t part, Places places, std::atomic<bool>* arrived) {
    network_.Expect(ranks_[from], MessageOf(part, 0), {layout_.hash, std::move(places), nullptr, arrived, &exchange_});
  }
  void ExpectWhole(size_t from, std::vector<char>* bytes) {
    network_.Expect(ranks_[from], MessageOf(0, 0), {layout_.hash, {}, bytes, nullptr, &exchange_});
  }

  size_t me_;
  Layout layout_;

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

  Sum(uint64_t name, const std::vector<int>& ranks, int rank, W scale, Stream<T> stream)
      : Collective(name, ranks, rank), scale_(scale), stream_(std::move(stream)) {
    layout_ = stream_.layout();
    layout_.Add('S');
  }

  void Begin() override {
    is_divided_ = size() > 2 && stream_.length() * sizeof(T) > kUndividedBytes;
    Cut(is_divided_ ? PartBegin(me_) : 0, is_divided_ ? PartBegin(me_ + 1) : stream_.length());
    const size_t others = size() - 1;
    // The others' elements: the first other rank's arrive in the result, which then becomes the sum.
    if (!stream_.length()) Greet();
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

  // Sends and expects empty messages: other ranks may have elements, and then must not wait for ever.
  void Greet() {
    for (size_t other = 1; other < size(); ++other) {
      Expect((me_ + other) % size(), 0, {}, nullptr);
      Send((me_ + other) % size(), 0, {}, false);
    }
  }

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
  const Stream<T> stream_;
  bool is_divided_ = false;
  size_t begin_ = 0, end_ = 0;  // of the elements that this rank sums
  std::vector<std::pair<size_t, size_t>> chunks_;
  std::vector<T> scratch_;
  std::vector<std::atomic<bool>> arrived_;  // [chunk, other rank]
  size_t at_ = 0;                           // the chunk that is summed next
};

// Gathers the rows of all ranks, in the order of the ranks.
class Gather : public Collective {
 public:
  Gather(OpKernelContext* context, uint64_t name, const std::vector<int>& ranks, int rank)
      : Collective(name, ranks, rank), context_(context) {
    layout_.Add(context->input(0).shape(), 1);
    layout_.Add('G');
  }

  void Begin() override {
    const Tensor& mine = context_->input(0);
    rows_.resize(size());
    for (size_t rank = 0; rank < size(); ++rank) {
      if (rank != me_) ExpectWhole(rank, &rows_[rank]);
    }
    for (size_t other = 1; other < size(); ++other) {
      Send((me_ + other) % size(), 0, {{mine.data(), mine.TotalBytes()}}, false);
    }
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

  OpKernelContext* context_;
  std::vector<std::vector<char>> rows_;
};

// The identity of a collective, from the attributes of its operation.
struct Identity {
  uint64_t name;
  std::vector<int> ranks;
  int rank;

  absl::Status Read(OpKernelConstruction* construction) {
    int64_t hash;
    TF_RETURN_IF_ERROR(construction->GetAttr("collective", &hash));
    name = hash;
    TF_RETURN_IF_ERROR(construction->GetAttr("ranks", &ranks));
    return construction->GetAttr("rank", &rank);
  }
};

// The factor of a sum, from the attributes of its operation.
struct Factor {
  double after;
  int divisor;

  absl::Status Read(OpKernelConstruction* construction) {
    TF_RETURN_IF_ERROR(ReadFactor(construction, "after", &after));
    return construction->GetAttr("divisor", &divisor);
  }
  template <typename T>
  typename Wider<T>::type As() const {
    using W = typename Wider<T>::type;
    return W(after) / W(divisor);
  }
};

// The common base of the operations that wait: runs a collective until all its messages are sent and received.
class SocketsCollective : public AsyncOpKernel {
 public:
  explicit SocketsCollective(OpKernelConstruction* construction) : AsyncOpKernel(construction) {
    OP_REQUIRES_OK(construction, identity_.Read(construction));
    OP_REQUIRES_OK(construction, construction->GetAttr("spins", &spins_));
    OP_REQUIRES_OK(construction, construction->GetAttr("blocks", &blocks_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const uint64_t began = Now();
    const std::shared_ptr<Collective> collective = New(context);
    if (collective) collective->Begin();
    const bool is_over = !collective || Spin(collective.get(), context);
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
  // Returns null after an error, which is then in the context's status.
  virtual std::shared_ptr<Collective> New(OpKernelContext* context) = 0;

  Identity identity_;

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
    OP_REQUIRES_OK(construction, factor_.Read(construction));
  }

 private:
  std::shared_ptr<Collective> New(OpKernelContext* context) override {
    Stream<T> stream;
    for (int i = 0; i < context->num_inputs(); ++i) {
      Tensor* out = nullptr;
      const auto status = context->allocate_output(i, context->input(i).shape(), &out);
      if (!status.ok()) {
        context->SetStatus(status);
        return nullptr;
      }
      stream.Append(context->input(i), out);
    }
    const auto& [name, ranks, rank] = identity_;
    return std::make_shared<Sum<T>>(name, ranks, rank, factor_.template As<T>(), std::move(stream));
  }

  Factor factor_;
};

class SocketsGather : public SocketsCollective {
 public:
  using SocketsCollective::SocketsCollective;

 private:
  std::shared_ptr<Collective> New(OpKernelContext* context) override {
    if (context->input(0).dims() < 1) {
      context->SetStatus(absl::InvalidArgumentError("A scalar has no rows to gather."));
      return nullptr;
    }
    const auto& [name, ranks, rank] = identity_;
    return std::make_shared<Gather>(context, name, ranks, rank);
  }
};

// A sum that was started: a thread of its own completes it. It owns the tensors, so that it outlives the step that
// started it, even one that was cancelled.
class StartedSum {
 public:
  // TensorFlow does not write to tensors that others hold, too, so `ins` need not be copied.
  StartedSum(std::vector<Tensor> ins, std::vector<Tensor> outs, std::unique_ptr<Collective> collective)
      : ins_(std::move(ins)), outs_(std::move(outs)), collective_(std::move(collective)) {}

  // Waits until the sum is complete or has failed.
  void Run() {
    Network& network = Network::Get();
    for (uint64_t seen = network.events(); !collective_->Advance(); seen = network.events()) {
      if (collective_->exchange().has_failed) {
        status_ = absl::AbortedError(collective_->exchange().problem);
        break;
      }
      network.Sleep(seen);
    }
    std::function<void()> then;
    {
      const std::lock_guard<std::mutex> lock(guard_);
      is_over_ = true;
      then = std::move(then_);
    }
    if (then) then();
  }

  // Calls `then` once the sum is complete or has failed: now, or in the thread that waits for it.
  void WhenOver(std::function<void()> then) {
    {
      const std::lock_guard<std::mutex> lock(guard_);
      if (!is_over_) {
        then_ = std::move(then);
        return;
      }
    }
    then();
  }

  // To be called when it is over.
  const absl::Status& status() const { return status_; }
  const std::vector<Tensor>& outs() const { return outs_; }

 private:
  const std::vector<Tensor> ins_, outs_;
  const std::unique_ptr<Collective> collective_;  // ends before the tensors that it uses
  absl::Status status_;
  std::mutex guard_;
  bool is_over_ = false;
  std::function<void()> then_;
};

// The sums that were started in this process and are not yet asked for, by slot.
class StartedSums {
 public:
  static StartedSums& Get() {
    static auto* sums = new StartedSums;
    return *sums;
  }

  // An earlier sum in the slot is dropped: it completes, as the other ranks need it to, but has no results.
  void Put(const std::string& slot, std::shared_ptr<StartedSum> sum) {
    const std::lock_guard<std::mutex> lock(guard_);
    sums_[slot].swap(sum);
  }

  // Returns null if there is none.
  std::shared_ptr<StartedSum> Take(const std::string& slot) {
    const std::lock_guard<std::mutex> lock(guard_);
    const auto found = sums_.find(slot);
    if (found == sums_.end()) return nullptr;
    const auto sum = std::move(found->second);
    sums_.erase(found);
    return sum;
  }

  void Clear() {
    const std::lock_guard<std::mutex> lock(guard_);
    sums_.clear();
  }

 private:
  std::mutex guard_;
  std::map<std::string, std::shared_ptr<StartedSum>> sums_;
};

template <typename T>
class SocketsSumStart : public OpKernel {
 public:
  explicit SocketsSumStart(OpKernelConstruction* construction) : OpKernel(construction) {
    OP_REQUIRES_OK(construction, identity_.Read(construction));
    OP_REQUIRES_OK(construction, factor_.Read(construction));
    OP_REQUIRES_OK(construction, construction->GetAttr("slot", &slot_));
  }

  void Compute(OpKernelContext* context) override {
    const uint64_t began = Now();
    std::vector<Tensor> ins, outs(context->num_inputs());
    Stream<T> stream;
    for (int i = 0; i < context->num_inputs(); ++i) {
      ins.push_back(context->input(i));
      OP_REQUIRES_OK(context, context->allocate_temp(ins[i].dtype(), ins[i].shape(), &outs[i]));
      stream.Append(ins[i], &outs[i]);
    }
    const auto& [name, ranks, rank] = identity_;
    auto collective = std::make_unique<Sum<T>>(name, ranks, rank, factor_.template As<T>(), std::move(stream));
    Collective& started = *collective;
    auto sum = std::make_shared<StartedSum>(std::move(ins), std::move(outs), std::move(collective));
    started.Begin();
    OP_REQUIRES(context, !started.exchange().has_failed, absl::AbortedError(started.exchange().problem));
    StartedSums::Get().Put(slot_, sum);
    std::thread([sum = std::move(sum)] { sum->Run(); }).detach();
    nanoseconds_in_all += Now() - began;
  }

 private:
  Identity identity_;
  Factor factor_;
  std::string slot_;
};

// Waits for a sum that was started, in a step that may be cancelled meanwhile: the sum then goes on without it.
class SocketsSumDone : public AsyncOpKernel {
 public:
  explicit SocketsSumDone(OpKernelConstruction* construction) : AsyncOpKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("slot", &slot_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const uint64_t began = Now();
    const auto sum = StartedSums::Get().Take(slot_);
    OP_REQUIRES_ASYNC(context, sum, absl::FailedPreconditionError("No sum was started in the slot " + slot_ + "."),
                      done);
    const auto is_answered = std::make_shared<std::atomic<bool>>(false);
    auto* manager = context->cancellation_manager();
    const auto token = manager ? manager->get_cancellation_token() : tensorflow::CancellationToken();
    const auto cancel = [context, done, is_answered] {
      if (is_answered->exchange(true)) return;
      context->SetStatus(absl::CancelledError("The step was cancelled while ranks waited for each other."));
      done();
    };
    if (manager && !manager->RegisterCallback(token, cancel)) return cancel();
    sum->WhenOver([sum, context, done, is_answered, manager, token, began] {
      if (is_answered->exchange(true)) return;  // the context is gone
      if (manager) manager->DeregisterCallback(token);
      context->SetStatus(Answer(*sum, context));
      nanoseconds_waiting += Now() - began;
      nanoseconds_in_all += Now() - began;
      ++collectives;
      done();
    });
  }

 private:
  static absl::Status Answer(const StartedSum& sum, OpKernelContext* context) {
    if (!sum.status().ok()) return sum.status();
    if (static_cast<int>(sum.outs().size()) != context->num_outputs()) {
      return absl::FailedPreconditionError("Another number of tensors was started than is asked for.");
    }
    for (int i = 0; i < context->num_outputs(); ++i) {
      if (sum.outs()[i].dtype() != context->expected_output_dtype(i)) {
        return absl::FailedPreconditionError("Tensors of another dtype were started than are asked for.");
      }
      context->set_output(i, sum.outs()[i]);
    }
    return absl::OkStatus();
  }

  std::string slot_;
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
    .Attr("after: string = '1'")
    .Attr("divisor: int = 1")
    .Attr("spins: bool = true")
    .Attr("blocks: bool = false")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* context) {
      for (int i = 0; i < context->num_inputs(); ++i) context->set_output(i, context->input(i));
      return absl::OkStatus();
    });

REGISTER_OP("HvdkitSocketsSumStart")
    .Input("tensors: number * T")
    .Attr("number: int >= 1")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("slot: string")
    .Attr("collective: int")
    .Attr("ranks: list(int) >= 2")
    .Attr("rank: int")
    .Attr("after: string = '1'")
    .Attr("divisor: int = 1")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("HvdkitSocketsSumDone")
    .Output("sums: number * T")
    .Attr("number: int >= 1")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("slot: string")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::UnknownShape);

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

#define REGISTER(T)                                                                                     \
  REGISTER_KERNEL_BUILDER(Name("HvdkitSocketsSum").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          SocketsSum<T>);                                                               \
  REGISTER_KERNEL_BUILDER(Name("HvdkitSocketsSumStart").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), \
                          SocketsSumStart<T>)
REGISTER(Eigen::half);
REGISTER(Eigen::bfloat16);
REGISTER(float);
REGISTER(double);
REGISTER_KERNEL_BUILDER(Name("HvdkitSocketsSumDone").Device(tensorflow::DEVICE_CPU), SocketsSumDone);
REGISTER_KERNEL_BUILDER(Name("HvdkitSocketsGather").Device(tensorflow::DEVICE_CPU), SocketsGather);

// Takes over the connected sockets to `count` other ranks. `packing` is a value of Packing.
extern "C" void hvdkit_sockets_start(int count, const int* ranks, const int* files, int packing) {
  Network::Get().Start(count, ranks, files, static_cast<hvdkit::Packing>(packing));
}

// Closes all connections.
extern "C" void hvdkit_sockets_stop() {
  Network::Get().Stop();
  StartedSums::Get().Clear();
}

// Returns what this process has spent in these collectives so far: total nanoseconds, nanoseconds of waiting for other
// ranks, number of collectives, and bytes sent.
extern "C" void hvdkit_sockets_times(uint64_t* in_all, uint64_t* waiting, uint64_t* number, uint64_t* bytes) {
  *in_all = nanoseconds_in_all;
  *waiting = nanoseconds_waiting;
  *number = collectives;
  *bytes = Network::Get().sent_bytes();
}
