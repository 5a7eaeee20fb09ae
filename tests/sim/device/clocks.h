// Vector clocks: which work is ordered before which. Plain C++, knows nothing of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sim {

// Participant 0 is the host, all its threads together; participant s + 1 is stream s.
constexpr int kHost = 0;
constexpr int participant_of(int stream) { return stream + 1; }

// How far each participant had come, as far as the owner of this clock is ordered after it.
class VectorClock {
 public:
  int64_t at(int participant) const {
    const auto index = static_cast<size_t>(participant);
    return index < ticks_.size() ? ticks_[index] : 0;
  }

  void set(int participant, int64_t tick) {
    const auto index = static_cast<size_t>(participant);
    if (ticks_.size() <= index) ticks_.resize(index + 1, 0);
    ticks_[index] = tick;
  }

  void join(const VectorClock& other) {
    if (ticks_.size() < other.ticks_.size()) ticks_.resize(other.ticks_.size(), 0);
    for (size_t i = 0; i < other.ticks_.size(); ++i) ticks_[i] = std::max(ticks_[i], other.ticks_[i]);
  }

 private:
  std::vector<int64_t> ticks_;
};

}  // namespace sim
