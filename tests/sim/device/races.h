// Who touched which bytes of a block, and whether that was in order. Plain C++, knows nothing of torch.
//
// Two accesses race when they overlap, at least one of them writes, and neither participant's clock covers the other
// access. It is looked at when work is submitted, so a race is found whatever the schedule then makes of it.
#pragma once

#include <string>
#include <vector>

#include "clocks.h"

namespace sim {

// Bytes that an operation reads or writes. Of a strided tensor: all from its first to its last byte.
struct Span {
  char* begin;
  char* end;
  bool write;
};

// What the host or a stream did with a span, at this tick of its clock.
struct Access {
  Span span;
  int participant;
  int64_t tick;
  std::string operation;

  std::string describe() const;
};

class AccessLog {
 public:
  // The accesses so far that race with this one, by somebody whose clock is `clock`.
  std::vector<Access> conflicts(const Access& access, const VectorClock& clock) const;

  // Takes the access in, in place of those that no later access can race with before it races with this one.
  void add(const Access& access);

  // Whether everything so far is ordered before somebody whose clock is `clock`.
  bool ordered_before(const VectorClock& clock) const;

  // Forgets what a participant had done by then: it is known to be over, by other means than clocks.
  void forget(int participant, int64_t tick);

 private:
  std::vector<Access> accesses_;
};

}  // namespace sim
