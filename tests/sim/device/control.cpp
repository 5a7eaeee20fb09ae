// What the tests call: torch.ops.odewei_sim. tests/sim/simulator.py gives it its public form.
#include <torch/library.h>

#include "lock.h"
#include "tensors.h"

namespace sim {
namespace {

Schedule schedule_named(const std::string& name) {
  if (name == "eager") return Schedule::eager;
  if (name == "lazy") return Schedule::lazy;
  if (name == "random") return Schedule::random;
  TORCH_CHECK(false, "no schedule is named ", name);
}

char* pointer(int64_t address) { return reinterpret_cast<char*>(address); }

void restart(const std::string& schedule, int64_t seed) {
  Lock lock;
  simulator().restart(schedule_named(schedule), static_cast<uint32_t>(seed));
}

std::vector<std::string> take_findings() {  // kind, text, kind, text, ...
  Lock lock;
  std::vector<std::string> flat;
  for (Finding& finding : simulator().take_findings()) {
    flat.push_back(std::move(finding.kind));
    flat.push_back(std::move(finding.text));
  }
  return flat;
}

c10::Dict<std::string, int64_t> counters() {
  Lock lock;
  const Memory& memory = simulator().memory;
  c10::Dict<std::string, int64_t> all;
  for (const auto& [name, value] : simulator().counters) all.insert(name, value);
  all.insert("device bytes", memory.device_bytes);
  all.insert("device bytes at most", memory.device_peak_bytes);
  all.insert("pinned bytes", memory.pinned_bytes);
  all.insert("blocks used again", memory.reused_blocks);
  return all;
}

void host_access(int64_t address, int64_t nbytes, bool write) {
  Lock lock;
  TORCH_CHECK(nbytes == 0 || simulator().pinned(pointer(address)), "host_access: this memory is not pinned");
  simulator().host_access({pointer(address), pointer(address) + nbytes, write});
}

void host_register(int64_t address, int64_t nbytes) {
  Lock lock;
  simulator().register_host(pointer(address), static_cast<size_t>(nbytes));
}

void host_unregister(int64_t address) {
  Lock lock;
  simulator().unregister_host(pointer(address));
}

void device_memory(int64_t nbytes) {
  Lock lock;
  simulator().device_memory_bytes = nbytes;
}

// ---- the virtual clock, in microseconds

void costs(double operator_us, double bytes_per_us) {
  Lock lock;
  simulator().costs = {operator_us, bytes_per_us};
}

double host_us() {
  Lock lock;
  return simulator().streams.host_us();
}

void set_host_us(double us) {
  Lock lock;
  simulator().streams.host_us() = us;
}

double device_us() {
  Lock lock;
  return simulator().streams.finish_us();
}

TORCH_LIBRARY(odewei_sim, library) {
  library.def("restart", &restart);
  library.def("take_findings", &take_findings);
  library.def("counters", &counters);
  library.def("host_access", &host_access);
  library.def("host_register", &host_register);
  library.def("host_unregister", &host_unregister);
  library.def("device_memory", &device_memory);
  library.def("costs", &costs);
  library.def("host_us", &host_us);
  library.def("set_host_us", &set_host_us);
  library.def("device_us", &device_us);
}

}  // namespace
}  // namespace sim
