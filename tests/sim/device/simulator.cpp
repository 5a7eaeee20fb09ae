#include "simulator.h"

#include <stdexcept>

namespace sim {

Simulator& simulator() {
  static Simulator& only = *new Simulator;  // never destroyed: tensors may outlive static destruction
  return only;
}

int& current_stream() {
  thread_local int stream = 0;
  return stream;
}

Simulator::Simulator()
    : streams([this](const std::string& error) { find("asynchronous error", error); }),
      device_memory_bytes(kDefaultDeviceMemory) {}

void Simulator::restart(Schedule schedule, uint32_t seed) {
  streams.restart(schedule, seed);
  memory.device_peak_bytes = memory.device_bytes;
  memory.reused_blocks = 0;
  costs = {};
  device_memory_bytes = kDefaultDeviceMemory;
  counters.clear();
  take_findings();
}

// ---- work

void Simulator::submit(int stream, const std::string& name, const std::vector<Span>& spans, const Cost& cost,
                       Streams::Work work) {
  const VectorClock& clock = streams.advance(stream, cost);
  for (const Span& span : spans) check({span, participant_of(stream), streams.submitted(stream), name}, clock);
  ++counters["submitted"];
  streams.push(stream, std::move(work));
}

void Simulator::host_access(const Span& span, const std::string& name) {
  const int64_t tick = streams.tick_host();
  check({span, kHost, tick, name}, streams.host_clock());
}

void Simulator::check(const Access& access, const VectorClock& clock) {
  Block* block = memory.find(access.span.begin);
  if (!block || access.span.begin == access.span.end) return;
  const std::string where = block->on_host() ? " (pinned memory)" : " (device memory)";
  for (const Access& earlier : block->log.conflicts(access, clock))
    find("race", access.describe() + " is not ordered after " + earlier.describe() + where);
  block->log.add(access);
}

void Simulator::host_wait(const Moment& moment, const std::string& reason) {
  ++counters["host waits: " + reason];
  streams.host_wait(moment);
}

void Simulator::drain(int stream, const std::string& reason) { host_wait(streams.record(stream), reason); }

void Simulator::drain_all(const std::string& reason) {
  ++counters["host waits: " + reason];
  for (int s = 0; s < streams.count(); ++s) streams.host_wait(streams.record(s));
}

// ---- memory

void* Simulator::allocate(size_t nbytes, Kind kind, int stream) {
  if (nbytes == 0) return nullptr;
  for (Block* block : memory.unpark(streams)) back_to_cache(block);
  Block* block = memory.take(nbytes, kind, kind == Kind::device ? stream : kNoStream);
  if (!block->poisoned) poison_in_order(block, "allocation");
  block->poisoned = false;
  return block->begin;
}

void Simulator::free(void* begin) {
  Block* block = memory.find(begin);
  memory.retire(block);
  if (block->users.empty()) return back_to_cache(block);
  std::vector<Moment> moments;
  for (int user : block->users) moments.push_back(streams.record(user));
  block->users.clear();
  memory.park(block, std::move(moments));
}

// Freed memory is poisoned at once where that is in order. Where it is not, nothing is wrong yet: its stream may still
// be made to wait before the memory is used again. Then it is poisoned at its next allocation, in order or not.
void Simulator::back_to_cache(Block* block) {
  if (block->on_host() || block->log.ordered_before(streams.record(block->stream).clock))
    poison_in_order(block, "free");
  memory.give_back(block);
}

void Simulator::poison_in_order(Block* block, const std::string& name) {
  char* begin = block->begin;
  const size_t nbytes = block->nbytes;
  block->poisoned = true;
  if (block->on_host()) {
    host_access(block->all(true), name);
    poison(begin, nbytes);
  } else {
    submit(block->stream, name, {block->all(true)}, {}, [=] { poison(begin, nbytes); });
  }
}

void Simulator::use_on(void* address, int stream) {
  Block* block = memory.find(address);
  if (block && block->stream != stream && block->kind != Kind::registered) block->users.insert(stream);
}

void Simulator::unregister_host(char* begin) {
  Block* block = memory.find(begin);
  if (!block || block->kind != Kind::registered || block->begin != begin)
    throw std::runtime_error("this memory was not registered");
  host_access(block->all(true), "unregister_host");
  for (int s = 0; s < streams.count(); ++s) streams.run_all(s);  // its owner may unmap it now
  memory.unregister_host(block);
}

bool Simulator::pinned(const void* address) const {
  const Block* block = memory.find(address);
  return block && block->on_host() && block->live();
}

// ---- findings

void Simulator::find(const std::string& kind, const std::string& text) {
  constexpr size_t enough = 200;
  ++counters["findings"];
  if (findings_.size() < enough && found_.insert(kind + text).second) findings_.push_back({kind, text});
}

std::vector<Finding> Simulator::take_findings() {
  std::vector<Finding> taken;
  taken.swap(findings_);
  found_.clear();
  return taken;
}

}  // namespace sim
