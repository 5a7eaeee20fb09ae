// Queues of work, when it runs, and two kinds of time: vector clocks and a virtual clock. Plain C++, no torch.
//
// Work is queued when it is submitted and runs when the schedule says so, always in a thread of the host that submits,
// polls or waits; there are no threads of the device. The caller holds the simulator's lock.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "clocks.h"

namespace sim {

enum class Schedule {
  eager,   // work runs as it is submitted
  lazy,    // work runs only when somebody waits for it, or, one task a time, polls for it
  random,  // streams are fast or slow by the seed, and run a few tasks whenever the host does something
};

// A place in a stream; what an event records.
struct Moment {
  int stream = -1;       // -1: never recorded, so always over
  int64_t position = 0;  // over when the stream has done so many tasks
  VectorClock clock;     // what whoever waits for it is ordered after
  double us = 0;         // when it is over, on the virtual clock
};

struct Cost {
  double us = 0;
  int link = -1;  // which link it keeps busy: copies of one direction share one
};
constexpr int kLinks = 2;
constexpr int kPooledStreams = 32;

class Streams {
 public:
  using Work = std::function<void()>;  // an exception in it is kept, and thrown at the next wait of the host
  using OnError = std::function<void(const std::string&)>;

  explicit Streams(OnError on_error);

  int next_from_pool();  // as on CUDA: a fixed number of them, handed out in turn
  int count() const { return static_cast<int>(streams_.size()); }

  // Runs all that is queued, orders the host after it, sets the virtual clock to zero, and goes on with this schedule.
  // Streams are handed out from the first again, so that a test finds the same speeds wherever it runs.
  void restart(Schedule schedule, uint32_t seed);

  // Makes room for one task: its tick in the stream's clock, its time on the virtual clock. `push` must follow.
  const VectorClock& advance(int stream, const Cost& cost);
  void push(int stream, Work work);

  Moment record(int stream);
  void wait(int stream, const Moment& moment);  // the stream waits

  bool over(const Moment& moment) const;
  bool poll(const Moment& moment);       // asking lets the device go on a little, so asking again and again ends
  void host_wait(const Moment& moment);  // the host waits
  void run_all(int stream) { finish(stream, streams_[stream]->submitted); }  // orders nothing

  const VectorClock& host_clock() const { return host_clock_; }
  int64_t tick_host();
  const VectorClock& clock(int stream) const { return streams_[stream]->clock; }
  int64_t submitted(int stream) const { return streams_[stream]->submitted; }

  double& host_us();         // each thread of the host has its own time
  double finish_us() const;  // when all streams are through with all that was submitted

 private:
  struct Task {
    Work work;
    Moment awaited;  // a task that waits has no work
  };
  struct Stream {
    std::deque<Task> queue;
    int64_t submitted = 0;
    int64_t done = 0;
    VectorClock clock;
    double us = 0;
  };

  void create();
  void after_submitting(int stream);
  void run_next(Stream& stream);
  void finish(int stream, int64_t position);
  bool runnable(const Stream& stream) const;
  void step();                             // runs a task of a stream that chance picks, or none
  void step_towards(const Moment& moment);  // runs one task that this moment needs
  double speed(int stream) const;
  void order_host_after(const Moment& moment);

  OnError on_error_;
  std::vector<std::unique_ptr<Stream>> streams_;  // 0 is the default stream
  int handed_out_ = 0;
  VectorClock host_clock_;
  int64_t host_tick_ = 0;
  Schedule schedule_ = Schedule::lazy;
  uint32_t seed_ = 0;
  std::mt19937 chance_{0};
  double link_us_[kLinks] = {0, 0};
  int64_t epoch_ = 0;  // of the virtual clock
  std::string error_;
};

}  // namespace sim
