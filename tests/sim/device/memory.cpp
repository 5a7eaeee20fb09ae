#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace sim {

void poison(char* begin, size_t nbytes) { std::memset(begin, 0xFF, nbytes); }

Block* Memory::find(const void* address) const {
  auto* byte = static_cast<char*>(const_cast<void*>(address));
  auto after = blocks_.upper_bound(byte);
  if (after == blocks_.begin()) return nullptr;
  Block* block = std::prev(after)->second.get();
  return byte < block->begin + block->nbytes ? block : nullptr;
}

Block* Memory::take(size_t nbytes, Kind kind, int stream) {
  nbytes = (nbytes + kAlignment - 1) / kAlignment * kAlignment;
  auto& cached = cache_[stream];
  Block* block = nullptr;
  if (auto found = cached.lower_bound(nbytes); found != cached.end()) {
    found = std::prev(cached.upper_bound(found->first));
    block = found->second;
    cached.erase(found);
    ++reused_blocks;
  } else {
    auto* begin = static_cast<char*>(std::aligned_alloc(kAlignment, nbytes));
    if (!begin) throw std::bad_alloc();
    poison(begin, nbytes);
    auto& slot = blocks_[begin];
    slot = std::make_unique<Block>(Block{begin, nbytes, kind, stream});
    block = slot.get();
  }
  set_used(block, nbytes);
  return block;
}

void Memory::retire(Block* block) { set_used(block, 0); }

void Memory::give_back(Block* block) { cache_[block->stream].emplace(block->nbytes, block); }

std::vector<Block*> Memory::unpark(const Streams& streams) {
  std::vector<Block*> free;
  for (auto parked = parked_.begin(); parked != parked_.end();) {
    auto& [block, moments] = *parked;
    const bool over =
        std::all_of(moments.begin(), moments.end(), [&](const Moment& moment) { return streams.over(moment); });
    if (!over) {
      ++parked;
      continue;
    }
    // The host is not ordered after these streams: only this block is known to be free of them.
    for (const Moment& moment : moments) block->log.forget(participant_of(moment.stream), moment.position);
    free.push_back(block);
    parked = parked_.erase(parked);
  }
  return free;
}

Block* Memory::register_host(char* begin, size_t nbytes) {
  constexpr size_t page = 4096;
  if (reinterpret_cast<size_t>(begin) % page || nbytes % page || nbytes == 0)
    throw std::runtime_error("only whole pages can be pinned");
  auto after = blocks_.lower_bound(begin);
  if (find(begin) || (after != blocks_.end() && after->first < begin + nbytes))
    throw std::runtime_error("this memory, or some of it, is pinned already");
  auto& slot = blocks_[begin];
  slot = std::make_unique<Block>(Block{begin, nbytes, Kind::registered, kNoStream});
  set_used(slot.get(), nbytes);
  return slot.get();
}

void Memory::unregister_host(Block* block) {
  set_used(block, 0);
  blocks_.erase(block->begin);
}

void Memory::set_used(Block* block, size_t nbytes) {
  auto& bytes = block->kind == Kind::device ? device_bytes : pinned_bytes;
  bytes += static_cast<int64_t>(nbytes) - static_cast<int64_t>(block->used);
  block->used = nbytes;
  device_peak_bytes = std::max(device_peak_bytes, device_bytes);
}

}  // namespace sim
