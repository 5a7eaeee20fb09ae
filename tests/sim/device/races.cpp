#include "races.h"

namespace sim {
namespace {

bool overlap(const Span& a, const Span& b) { return a.begin < b.end && b.begin < a.end; }
bool covers(const Span& a, const Span& b) { return a.begin <= b.begin && b.end <= a.end; }

template <class Predicate>
void erase_if(std::vector<Access>& accesses, Predicate predicate) {
  accesses.erase(std::remove_if(accesses.begin(), accesses.end(), predicate), accesses.end());
}

}  // namespace

std::string Access::describe() const {
  const std::string who = participant == kHost ? "the host" : "stream " + std::to_string(participant - 1);
  return (span.write ? "write of " : "read of ") + std::to_string(span.end - span.begin) + " bytes by " + operation +
         " on " + who;
}

std::vector<Access> AccessLog::conflicts(const Access& access, const VectorClock& clock) const {
  std::vector<Access> found;
  for (const Access& earlier : accesses_)
    if ((earlier.span.write || access.span.write) && overlap(earlier.span, access.span) &&
        earlier.participant != access.participant && clock.at(earlier.participant) < earlier.tick)
      found.push_back(earlier);
  return found;
}

void AccessLog::add(const Access& access) {
  erase_if(accesses_, [&](const Access& earlier) {
    const bool replaced = access.span.write || (!earlier.span.write && earlier.participant == access.participant);
    return replaced && covers(access.span, earlier.span);
  });
  accesses_.push_back(access);
}

bool AccessLog::ordered_before(const VectorClock& clock) const {
  return std::all_of(accesses_.begin(), accesses_.end(), [&](const Access& earlier) {
    return clock.at(earlier.participant) >= earlier.tick;
  });
}

void AccessLog::forget(int participant, int64_t tick) {
  erase_if(accesses_, [&](const Access& earlier) {
    return earlier.participant == participant && earlier.tick <= tick;
  });
}

}  // namespace sim
