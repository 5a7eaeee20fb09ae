// The simulated device as a whole: streams, memory, findings. Plain C++, knows nothing of torch.
//
// Every function but `simulator()` wants the lock of lock.h.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "memory.h"
#include "streams.h"

namespace sim {

struct Finding {
  std::string kind;
  std::string text;
};

constexpr int64_t kDefaultDeviceMemory = int64_t{1} << 30;

struct Costs {
  double operator_us = 10;
  double bytes_per_us = 25'000;  // of a link: 25 GB/s
};

class Simulator {
 public:
  Simulator();

  void restart(Schedule schedule, uint32_t seed);

  // Queues an operation, after looking at whether what it touches is ordered after what others did with it.
  void submit(int stream, const std::string& name, const std::vector<Span>& spans, const Cost& cost, Streams::Work work);

  // The host waits for all that a stream has been given. Counted by its reason: a library may promise not to wait.
  void drain(int stream, const std::string& reason);
  void host_wait(const Moment& moment, const std::string& reason);
  void drain_all(const std::string& reason);

  // The host reads or writes memory that the device can see.
  void host_access(const Span& span, const std::string& name = "host_access");

  void* allocate(size_t nbytes, Kind kind, int stream);
  void free(void* begin);
  void use_on(void* address, int stream);  // the block is not used again before this stream is through with it
  void register_host(char* begin, size_t nbytes) { memory.register_host(begin, nbytes); }
  void unregister_host(char* begin);
  bool pinned(const void* address) const;

  void find(const std::string& kind, const std::string& text);
  std::vector<Finding> take_findings();

  Streams streams;
  Memory memory;
  Costs costs;
  int64_t device_memory_bytes;  // how much the device has
  std::map<std::string, int64_t> counters;

 private:
  void check(const Access& access, const VectorClock& clock);
  void back_to_cache(Block* block);
  void poison_in_order(Block* block, const std::string& name);

  std::vector<Finding> findings_;
  std::set<std::string> found_;
};

Simulator& simulator();  // the only one; it lives as long as the process

// The stream that this thread queues its work on.
int& current_stream();

}  // namespace sim
