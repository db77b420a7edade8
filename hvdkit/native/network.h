// The TCP connections between the ranks, and the messages that they carry: what the collectives of sockets.cc are made of.
#ifndef HVDKIT_NATIVE_NETWORK_H_
#define HVDKIT_NATIVE_NETWORK_H_

#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "pack.h"

namespace hvdkit {

constexpr int kCancelPollMilliseconds = 50;  // how often a waiting rank checks whether its step was cancelled
constexpr size_t kMostPieces = 64;           // of one call of sendmsg or recvmsg

// What stands before each message. Ranks run the same program on hosts of one byte order, as all of TensorFlow assumes.
struct Header {
  uint64_t collective;  // hash of its name, dtype and ranks
  uint32_t call;        // number of the call of this collective, from 0
  uint32_t part;        // number of the message within the call
  uint64_t layout;      // hash of the shapes of the sender's tensors, which must be those of the receiver's
  uint64_t bytes;       // of the message, without this header
  uint64_t sent_bytes;  // less than `bytes` if the message is packed

  bool IsPacked() const { return sent_bytes != bytes; }
};
using Tag = std::tuple<uint64_t, uint32_t, uint32_t>;
enum class Packing { kNever, kAlways, kWhereItSavesTime };

inline Tag TagOf(const Header& header) { return {header.collective, header.call, header.part}; }

// Removes `bytes` from the front of places[*at:].
inline void Consume(Places* places, size_t* at, size_t bytes) {
  while (bytes) {
    iovec& place = (*places)[*at];
    const size_t n = std::min(bytes, place.iov_len);
    place.iov_base = static_cast<char*>(place.iov_base) + n;
    place.iov_len -= n;
    bytes -= n;
    if (!place.iov_len) ++*at;
  }
}

// The messages of one collective of one step.
struct Exchange {
  std::atomic<int> left{0};  // number of messages that are not yet sent or received
  std::atomic<bool> has_failed{false};
  std::string problem;  // written once, before has_failed

  void Fail(const std::string& why) {
    if (has_failed) return;
    problem = why;
    has_failed = true;
  }
};

// A message to receive: the places for it, or a vector if its size is not known before.
struct Receipt {
  uint64_t layout = 0;
  Places places;
  std::vector<char>* whole = nullptr;
  std::atomic<bool>* arrived = nullptr;
  Exchange* exchange = nullptr;
};

// The connection to another rank.
struct Peer {
  struct Outgoing {
    Header header;
    Places places;  // once it has begun, the first is the header
    Exchange* exchange;
    bool may_be_packed, has_begun = false;
    size_t at = 0;
    std::vector<char> packed;
  };
  struct Early {
    Header header;
    std::vector<char> bytes;
  };

  int rank = -1, file = -1;
  std::string problem;
  std::deque<Outgoing> outgoing;
  std::map<Tag, Receipt> expected;
  std::map<Tag, Early> early;  // messages of collectives that this rank has not started yet
  // The message that is being received.
  Header header;
  size_t header_bytes = 0, at = 0, left = 0;
  Receipt incoming;
  Places into;              // where its bytes go
  std::vector<char> aside;  // its bytes, if it is packed or not expected
};

// All connections of this process. The threads that wait for messages also send and receive for all the others.
class Network {
 public:
  static Network& Get() {
    static auto* network = new Network;
    return *network;
  }

  void Start(int count, const int* ranks, const int* files, Packing packing) {
    const std::lock_guard<std::mutex> lock(guard_);
    packing_ = packing;
    if (wake_ < 0) wake_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (int i = 0; i < count; ++i) {
      auto& peer = peers_[ranks[i]];
      peer = std::make_unique<Peer>();
      peer->rank = ranks[i];
      peer->file = files[i];
    }
  }

  void Stop() {
    const std::lock_guard<std::mutex> lock(guard_);
    for (auto& [rank, peer] : peers_) Break(peer.get(), "this rank has left the job");
    calls_.clear();
  }

  uint32_t NextCall(uint64_t collective) {
    const std::lock_guard<std::mutex> lock(guard_);
    return calls_[collective]++;
  }

  // Sends a message. `may_be_packed`: the receiver expects it in places of its own.
  void Send(int rank, const Header& header, Places places, Exchange* exchange, bool may_be_packed) {
    const std::lock_guard<std::mutex> lock(guard_);
    Peer* peer = Find(rank, exchange);
    if (!peer) return;
    ++exchange->left;
    peer->outgoing.push_back({header, std::move(places), exchange, may_be_packed});
    if (peer->outgoing.size() == 1) Flush(peer);
    if (!peer->outgoing.empty() && is_polling_) Wake();  // the polling thread must wait for room in this socket, too
  }

  void Expect(int rank, const Header& header, Receipt receipt) {
    const std::lock_guard<std::mutex> lock(guard_);
    Peer* peer = Find(rank, receipt.exchange);
    if (!peer) return;
    ++receipt.exchange->left;
    peer->expected[TagOf(header)] = std::move(receipt);
    Match(peer, header);
  }

  // Sends and receives what is possible now. Returns whether it did anything.
  bool Progress() {
    std::unique_lock<std::mutex> lock(guard_, std::try_to_lock);
    return lock.owns_lock() && ProgressLocked();
  }

  // The number of messages that were sent or received so far, and of connections that ended.
  uint64_t events() const { return events_; }
  uint64_t sent_bytes() const { return sent_bytes_; }

  // Sleeps until something can be sent or received, by this thread or by another one, and does it. Returns at once if
  // anything has happened since the caller read `events`: another thread may have completed what the caller waits for.
  void Sleep(uint64_t seen) {
    std::unique_lock<std::mutex> lock(guard_);
    if (events_ != seen) return;
    if (is_polling_) {
      progress_.wait_for(lock, std::chrono::milliseconds(kCancelPollMilliseconds));
      return;
    }
    std::vector<pollfd> files{{wake_, POLLIN, 0}};
    for (const auto& [rank, peer] : peers_) {
      const short events = POLLIN | (peer->outgoing.empty() ? 0 : POLLOUT);
      if (peer->problem.empty()) files.push_back({peer->file, events, 0});
    }
    is_polling_ = true;
    lock.unlock();
    poll(files.data(), files.size(), kCancelPollMilliseconds);
    lock.lock();
    is_polling_ = false;
    uint64_t ignored;
    if (files[0].revents && read(wake_, &ignored, sizeof ignored)) {
    }
    ProgressLocked();
    progress_.notify_all();
  }

  // Forgets an exchange whose step was cancelled: its memory is about to be freed.
  void Abandon(Exchange* exchange) {
    const std::lock_guard<std::mutex> lock(guard_);
    if (exchange->left == 0) return;
    for (auto& [rank, peer] : peers_) Break(peer.get(), "an earlier step was cancelled: start the job again");
  }

 private:
  Peer* Find(int rank, Exchange* exchange) {
    const auto found = peers_.find(rank);
    Peer* peer = found == peers_.end() ? nullptr : found->second.get();
    if (!peer || !peer->problem.empty()) {
      exchange->Fail(peer ? peer->problem : "There is no connection to rank " + std::to_string(rank) + ".");
      return nullptr;
    }
    return peer;
  }

  bool ProgressLocked() {
    bool did = false;
    for (auto& [rank, peer] : peers_) {
      if (peer->problem.empty() && !peer->outgoing.empty()) did |= Flush(peer.get());
      if (peer->problem.empty()) did |= Receive(peer.get());
    }
    return did;
  }

  bool Flush(Peer* peer) {
    bool did = false;
    while (!peer->outgoing.empty()) {
      Peer::Outgoing& message = peer->outgoing.front();
      if (!message.has_begun) BeginSending(peer, &message);
      while (message.at < message.places.size()) {
        msghdr parts{};
        parts.msg_iov = message.places.data() + message.at;
        parts.msg_iovlen = std::min(kMostPieces, message.places.size() - message.at);
        const ssize_t n = sendmsg(peer->file, &parts, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return did;
        if (n < 0) {
          Break(peer, std::strerror(errno));
          return true;
        }
        Consume(&message.places, &message.at, n);
        did = true;
      }
      --message.exchange->left;
      ++events_;
      peer->outgoing.pop_front();
    }
    return did;
  }

  // Packs the message if that is worth it, and puts the header in front of it.
  void BeginSending(Peer* peer, Peer::Outgoing* message) {
    message->has_begun = true;
    Places& places = message->places;
    places.erase(std::remove_if(places.begin(), places.end(), [](const iovec& p) { return !p.iov_len; }), places.end());
    if (message->may_be_packed && HasWholeWords(places) && PaysToPack(peer, places)) {
      message->packed = Pack(places);
      const size_t bytes = message->packed.size();
      if (bytes < message->header.bytes) places = {{message->packed.data(), bytes}};
    }
    message->header.sent_bytes = BytesOf(places);
    sent_bytes_ += message->header.sent_bytes;
    places.insert(places.begin(), {&message->header, sizeof(Header)});
  }

  bool PaysToPack(const Peer* peer, const Places& places) const {
    if (packing_ != Packing::kWhereItSavesTime) return packing_ == Packing::kAlways && !places.empty();
    tcp_info info{};
    socklen_t size = sizeof info;
    const bool is_known = !getsockopt(peer->file, IPPROTO_TCP, TCP_INFO, &info, &size);
    return is_known && info.tcpi_delivery_rate && IsWorthPacking(places, info.tcpi_delivery_rate);
  }

  bool Receive(Peer* peer) {
    bool did = false;
    for (;;) {
      ssize_t n;
      if (peer->header_bytes < sizeof(Header)) {
        char* to = reinterpret_cast<char*>(&peer->header) + peer->header_bytes;
        n = recv(peer->file, to, sizeof(Header) - peer->header_bytes, MSG_DONTWAIT);
        if (n > 0 && (peer->header_bytes += n) == sizeof(Header)) BeginMessage(peer);
      } else {
        msghdr parts{};
        parts.msg_iov = peer->into.data() + peer->at;
        parts.msg_iovlen = std::min(kMostPieces, peer->into.size() - peer->at);
        n = recvmsg(peer->file, &parts, MSG_DONTWAIT);
        if (n > 0) {
          Consume(&peer->into, &peer->at, n);
          peer->left -= n;
        }
      }
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return did;
      if (n <= 0) {
        Break(peer, n ? std::strerror(errno) : "the process has ended");
        return true;
      }
      did = true;
      if (peer->header_bytes == sizeof(Header) && !peer->left && peer->problem.empty()) EndMessage(peer);
      if (!peer->problem.empty()) return true;
    }
  }

  // Finds the place for the message whose header has arrived.
  void BeginMessage(Peer* peer) {
    const auto found = peer->expected.find(TagOf(peer->header));
    peer->at = 0;
    peer->left = peer->header.sent_bytes;
    peer->incoming = {};
    if (found != peer->expected.end()) {
      if (!Fits(peer, peer->header, found->second)) return;
      peer->incoming = std::move(found->second);
      peer->expected.erase(found);
    }
    peer->into = peer->incoming.places;
    if (!peer->incoming.exchange || peer->incoming.whole || peer->header.IsPacked()) {
      auto& bytes = peer->incoming.whole ? *peer->incoming.whole : peer->aside;
      bytes.resize(peer->left + (peer->header.IsPacked() ? kWord : 0));  // `Unpack` reads one word more
      peer->into = {{bytes.data(), peer->left}};
    }
    while (peer->at < peer->into.size() && !peer->into[peer->at].iov_len) ++peer->at;
  }

  void EndMessage(Peer* peer) {
    peer->header_bytes = 0;
    if (!peer->incoming.exchange) {
      peer->early[TagOf(peer->header)] = {peer->header, std::exchange(peer->aside, {})};
      Match(peer, peer->header);
    } else if (!peer->header.IsPacked() || Place(peer, peer->header, peer->aside.data(), peer->incoming)) {
      Complete(peer->incoming);
      peer->incoming = {};
    }
  }

  // Hands over a message that had arrived before this rank expected it.
  void Match(Peer* peer, const Header& header) {
    const auto expected = peer->expected.find(TagOf(header));
    const auto early = peer->early.find(TagOf(header));
    if (expected == peer->expected.end() || early == peer->early.end()) return;
    const Receipt receipt = std::move(expected->second);
    const Peer::Early message = std::move(early->second);
    peer->expected.erase(expected);
    peer->early.erase(early);
    if (!Fits(peer, message.header, receipt)) return;
    if (receipt.whole) {
      *receipt.whole = message.bytes;
    } else if (!Place(peer, message.header, message.bytes.data(), receipt)) {
      return;
    }
    Complete(receipt);
  }

  // Copies or unpacks a message into its places.
  bool Place(Peer* peer, const Header& header, const char* bytes, const Receipt& receipt) {
    if (header.IsPacked()) {
      if (Unpack(bytes, header.sent_bytes, receipt.places)) return true;
      receipt.exchange->Fail("Rank " + std::to_string(peer->rank) + " sent a message that cannot be unpacked.");
      Break(peer, receipt.exchange->problem);
      return false;
    }
    for (const iovec& place : receipt.places) {
      std::memcpy(place.iov_base, bytes, place.iov_len);
      bytes += place.iov_len;
    }
    return true;
  }

  // Returns whether a message is of the size and of tensors of the shapes that its receiver expects.
  bool Fits(Peer* peer, const Header& header, const Receipt& receipt) {
    const size_t expected = receipt.whole ? header.bytes : BytesOf(receipt.places);
    if (header.bytes == expected && header.layout == receipt.layout) return true;
    const std::string sender = "rank " + std::to_string(peer->rank);
    receipt.exchange->Fail(
        (header.bytes == expected ? "Mismatched shapes: " + sender + " passed other shapes than this rank"
                                  : "Mismatched sizes: " + sender + " sent " + std::to_string(header.bytes) +
                                        " bytes where this rank expected " + std::to_string(expected)) +
        ". All ranks must pass tensors of the same shapes to a collective; to an allgather, rows of the same shape.");
    Break(peer, receipt.exchange->problem);
    return false;
  }

  void Complete(const Receipt& receipt) {
    if (receipt.arrived) receipt.arrived->store(true, std::memory_order_release);
    --receipt.exchange->left;
    ++events_;
  }

  // Ends a connection, and all exchanges that use it. The words are those by which `watchdog.was_thrown_out` knows it.
  void Break(Peer* peer, const std::string& why) {
    if (!peer->problem.empty()) return;
    peer->problem = "Connection closed by peer, rank " + std::to_string(peer->rank) + ": " + why;
    close(peer->file);
    for (auto& message : peer->outgoing) message.exchange->Fail(peer->problem);
    for (auto& [tag, receipt] : peer->expected) receipt.exchange->Fail(peer->problem);
    if (peer->header_bytes == sizeof(Header) && peer->incoming.exchange) peer->incoming.exchange->Fail(peer->problem);
    peer->outgoing.clear();
    peer->expected.clear();
    peer->early.clear();
    ++events_;
    progress_.notify_all();
    if (is_polling_) Wake();
  }

  void Wake() {
    const uint64_t one = 1;
    if (write(wake_, &one, sizeof one)) {
    }
  }

  std::mutex guard_;
  std::condition_variable progress_;
  std::map<int, std::unique_ptr<Peer>> peers_;
  std::map<uint64_t, uint32_t> calls_;
  std::atomic<uint64_t> events_{0}, sent_bytes_{0};
  bool is_polling_ = false;
  Packing packing_ = Packing::kNever;
  int wake_ = -1;
};

}  // namespace hvdkit

#endif  // HVDKIT_NATIVE_NETWORK_H_
