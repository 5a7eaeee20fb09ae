// Blocks of memory, and a cache of freed ones for each stream. Plain C++, knows nothing of torch.
//
// Memory is never given back to the system: an access that comes too late reads what it finds, it does not crash.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <vector>

#include "races.h"
#include "streams.h"

namespace sim {

enum class Kind {
  device,
  pinned,      // host memory from the pinning allocator
  registered,  // host memory that somebody else owns and has registered
};

constexpr int kNoStream = -1;  // where freed pinned blocks are kept
constexpr size_t kAlignment = 512;

struct Block {
  char* begin;
  size_t nbytes;  // rounded up to the alignment, but for registered blocks
  Kind kind;
  int stream;       // that it was allocated on, and that may use it again without waiting
  size_t used = 0;  // what was asked for, rounded up; 0 when it is free
  bool poisoned = true;  // since it was freed
  std::set<int> users;  // other streams that must be through with it before it is used again
  AccessLog log;

  bool live() const { return used > 0; }
  bool on_host() const { return kind != Kind::device; }
  Span all(bool write) const { return {begin, begin + nbytes, write}; }
};

// Every byte is 0xFF: a NaN in every floating dtype, -1 in every signed one.
void poison(char* begin, size_t nbytes);

class Memory {
 public:
  Block* find(const void* address) const;  // the block, live or not, that holds this byte; null for foreign memory

  // A freed block of this stream, the smallest that is large enough and of those the last freed, else a fresh one.
  // Large blocks serve small requests, whole: what reuses memory early finds somebody's bytes there.
  Block* take(size_t nbytes, Kind kind, int stream);
  void retire(Block* block);     // its owner has no more use for it
  void give_back(Block* block);  // nor has anybody else

  // Freed blocks that other streams still use, each with the moments at which they are through with it.
  void park(Block* block, std::vector<Moment> moments) { parked_.emplace_back(block, std::move(moments)); }
  std::vector<Block*> unpark(const Streams& streams);

  Block* register_host(char* begin, size_t nbytes);  // throws unless it is whole pages, none pinned yet
  void unregister_host(Block* block);

  int64_t device_bytes = 0;  // live
  int64_t device_peak_bytes = 0;
  int64_t pinned_bytes = 0;  // live, registered bytes included
  int64_t reused_blocks = 0;

 private:
  void set_used(Block* block, size_t nbytes);

  std::map<char*, std::unique_ptr<Block>> blocks_;
  std::map<int, std::multimap<size_t, Block*>> cache_;  // by stream, by size
  std::vector<std::pair<Block*, std::vector<Moment>>> parked_;
};

}  // namespace sim
