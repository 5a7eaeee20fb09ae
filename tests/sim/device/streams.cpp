#include "streams.h"

#include <stdexcept>

namespace sim {
namespace {

// Without the stack that torch appends.
std::string message_of(const std::exception& error) {
  const std::string all = error.what();
  return all.substr(0, all.find("\nException raised from"));
}

}  // namespace

Streams::Streams(OnError on_error) : on_error_(std::move(on_error)) { create(); }

void Streams::create() { streams_.push_back(std::make_unique<Stream>()); }

int Streams::next_from_pool() {
  const int stream = 1 + handed_out_++ % kPooledStreams;
  while (count() <= stream) create();
  return stream;
}

void Streams::restart(Schedule schedule, uint32_t seed) {
  for (int s = 0; s < count(); ++s) {
    finish(s, streams_[s]->submitted);
    host_clock_.join(streams_[s]->clock);
    streams_[s]->us = 0;
  }
  for (double& us : link_us_) us = 0;
  error_.clear();
  handed_out_ = 0;
  ++epoch_;
  schedule_ = schedule;
  seed_ = seed;
  chance_.seed(seed);
}

// ---- submitting

const VectorClock& Streams::advance(int stream, const Cost& cost) {
  Stream& s = *streams_[stream];
  ++s.submitted;
  s.clock.join(host_clock_);
  s.clock.set(participant_of(stream), s.submitted);
  s.us = std::max(s.us, host_us());
  if (cost.link >= 0) s.us = std::max(s.us, link_us_[cost.link]);
  s.us += cost.us;
  if (cost.link >= 0) link_us_[cost.link] = s.us;
  return s.clock;
}

void Streams::push(int stream, Work work) {
  streams_[stream]->queue.push_back({std::move(work), {}});
  after_submitting(stream);
}

Moment Streams::record(int stream) {
  const Stream& s = *streams_[stream];
  Moment moment{stream, s.submitted, s.clock, std::max(s.us, host_us())};
  moment.clock.join(host_clock_);
  return moment;
}

// As on a real device, the wait is for what the event had recorded by now; recording it again changes nothing.
void Streams::wait(int stream, const Moment& moment) {
  Stream& s = *streams_[stream];
  advance(stream, {});
  s.clock.join(moment.clock);
  s.us = std::max(s.us, moment.us);
  s.queue.push_back({nullptr, moment});
  after_submitting(stream);
}

void Streams::after_submitting(int stream) {
  if (schedule_ == Schedule::eager) finish(stream, streams_[stream]->submitted);
  if (schedule_ == Schedule::random)
    for (unsigned steps = chance_() % 4; steps > 0; --steps) step();
}

// ---- running

void Streams::run_next(Stream& stream) {
  Task task = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (task.work) {
    try {
      task.work();
    } catch (const std::exception& error) {
      if (error_.empty()) error_ = message_of(error);
      on_error_(message_of(error));
    }
  } else {
    finish(task.awaited.stream, task.awaited.position);
  }
  ++stream.done;
}

// Ends: a stream waits only for what was submitted before the wait.
void Streams::finish(int stream, int64_t position) {
  if (stream < 0) return;
  while (streams_[stream]->done < position) run_next(*streams_[stream]);
}

bool Streams::runnable(const Stream& stream) const { return !stream.queue.empty() && over(stream.queue.front().awaited); }

void Streams::step() {
  constexpr double idle = 0.5;  // so that slow streams lag even when no other has work
  double total = idle;
  for (int s = 0; s < count(); ++s)
    if (runnable(*streams_[s])) total += speed(s);
  double pick = total * (chance_() / 4294967296.0) - idle;
  if (pick < 0) return;
  for (int s = 0; s < count(); ++s) {
    if (!runnable(*streams_[s])) continue;
    pick -= speed(s);
    if (pick < 0) return run_next(*streams_[s]);
  }
}

void Streams::step_towards(const Moment& moment) {
  int stream = moment.stream;
  while (!runnable(*streams_[stream])) stream = streams_[stream]->queue.front().awaited.stream;
  run_next(*streams_[stream]);
}

double Streams::speed(int stream) const {
  constexpr double speeds[] = {1.0 / 64, 1, 8};
  std::mt19937 mixed(seed_ * 2654435761u + static_cast<uint32_t>(stream) * 40503u);
  mixed.discard(3);
  return speeds[mixed() % 3];
}

// ---- waiting

bool Streams::over(const Moment& moment) const {
  return moment.stream < 0 || streams_[moment.stream]->done >= moment.position;
}

bool Streams::poll(const Moment& moment) {
  if (!over(moment)) {
    if (schedule_ == Schedule::random && chance_() % 2) step();
    else step_towards(moment);
  }
  if (!over(moment)) return false;
  order_host_after(moment);
  return true;
}

void Streams::host_wait(const Moment& moment) {
  finish(moment.stream, moment.position);
  order_host_after(moment);
  if (error_.empty()) return;
  const std::string error = std::move(error_);
  error_.clear();
  throw std::runtime_error("work on the simulated device failed: " + error);
}

void Streams::order_host_after(const Moment& moment) {
  host_clock_.join(moment.clock);
  host_us() = std::max(host_us(), moment.us);
}

int64_t Streams::tick_host() {
  host_clock_.set(kHost, ++host_tick_);
  return host_tick_;
}

double& Streams::host_us() {
  thread_local int64_t epoch = -1;
  thread_local double us = 0;
  if (epoch != epoch_) {
    epoch = epoch_;
    us = 0;
  }
  return us;
}

double Streams::finish_us() const {
  double us = 0;
  for (const auto& stream : streams_) us = std::max(us, stream->us);
  return us;
}

}  // namespace sim
