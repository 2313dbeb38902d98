// A CUDA grid on one CPU thread, so that a kernel body compiled by an ordinary C++ compiler can be run,
// debugged and tested where there is no GPU.
//
// Every CUDA thread is a fiber. It runs until it has to wait for others: at a barrier, or at an operation a
// whole warp or warpgroup performs together. The schedule is greedy: one warp runs as far as it possibly can
// before the next one starts, in rising or falling order (SIMT_ORDER=reverse; SIMT_ORDER=late3 holds warp 3
// up as long as another can run), and within a warp one lane before the next. A missing barrier then shows at
// once, because the data it should have waited for is not there. What is asynchronous on a GPU (cp.async,
// TMA, wgmma) lands as late as the program allows, and its destination holds NaN until then.
//
// Blocks run one after the other, so waiting for another block is a deadlock here as it may be on a GPU.
#pragma once
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kWarpgroup = 128;
constexpr int kPoison = 0xff;  // all bits set is a NaN in every floating type and -1 in every integer
constexpr size_t kStackBytes = 256 * 1024;

// Operations issued in groups and finished in order, at the latest moment: cp.async and wgmma.
class AsyncQueue {
 public:
  void post(std::function<void()> operation) { open_.push_back(std::move(operation)); }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t groups_left) {
    for (; groups_.size() > groups_left; groups_.pop_front())
      for (auto& operation : groups_.front()) operation();
  }

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};

struct Thread {
  ucontext_t context;
  bool finished = false;
  bool (*ready)(void*) = nullptr;  // what it waits for; null: nothing
  void* condition = nullptr;
  const char* operation = "";  // where it waits, for the report of a deadlock
  AsyncQueue copies;           // cp.async
  AsyncQueue products;         // wgmma
};

// The threads of a warp or warpgroup gather here; the last to come performs the operation for all.
struct Meeting {
  void* arguments[kWarpgroup];
  unsigned arrived = 0, generation = 0;
  const char* operation = "";
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps, warpgroups;
  Barrier barriers[16];  // as many as the hardware has; 0 is __syncthreads
  unsigned char* shared = nullptr;
  unsigned current = 0;
  std::function<void()> kernel;
  ucontext_t scheduler;
  std::exception_ptr error;
  std::shared_ptr<void> extension;  // state of a model in another header
  std::function<void()> at_end;     // its check when all threads have finished
};
inline Block* block = nullptr;

inline Thread& current_thread() { return block->threads[block->current]; }

// Suspends the calling thread until `ready()` holds. The scheduler evaluates it, on whatever stack it happens
// to be.
template <class Ready>
void wait_until(const char* operation, Ready ready) {
  if (ready()) return;
  Thread& me = current_thread();
  me.ready = [](void* condition) { return (*static_cast<Ready*>(condition))(); };
  me.condition = &ready;
  me.operation = operation;
  swapcontext(&me.context, &block->scheduler);
  me.ready = nullptr;
}

// Called by every thread of an aligned group of `kThreads` with its own arguments. `operation(Arguments*
// const all[])` runs once and may write into every thread's arguments.
template <unsigned kThreads, class Arguments, class Operation>
void collective(const char* name, Arguments& mine, Operation operation) {
  static_assert(kThreads == kWarp || kThreads == kWarpgroup, "a warp or a warpgroup");
  Meeting& meeting = (kThreads == kWarp ? block->warps : block->warpgroups)[block->current / kThreads];
  if (meeting.arrived == 0) meeting.operation = name;
  if (std::strcmp(meeting.operation, name) != 0)
    throw std::logic_error(std::string("threads of one group meet in ") + meeting.operation + " and in " +
                           name);
  meeting.arguments[block->current % kThreads] = &mine;
  if (++meeting.arrived == kThreads) {
    operation(reinterpret_cast<Arguments* const*>(meeting.arguments));
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    const unsigned generation = meeting.generation;
    wait_until(name, [&meeting, generation] { return meeting.generation != generation; });
  }
}

// bar.arrive: counts the calling thread in, and opens the barrier when it is the last of `threads`.
inline void barrier_arrive(unsigned id, unsigned threads) {
  Barrier& barrier = block->barriers[id];
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

// bar.sync: counts the calling thread in and waits until all `threads` have come.
inline void barrier_sync(unsigned id, unsigned threads, const char* name = "bar.sync") {
  const Barrier& barrier = block->barriers[id];
  const unsigned generation = barrier.generation;
  barrier_arrive(id, threads);
  wait_until(name, [&barrier, generation] { return barrier.generation != generation; });
}

namespace detail {

inline void fiber() {
  try {
    block->kernel();
  } catch (...) {
    block->error = std::current_exception();
  }
  current_thread().finished = true;
}

inline void start_fiber(Thread& thread, char* stack) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = &block->scheduler;
  makecontext(&thread.context, fiber, 0);
}

inline void resume(unsigned thread) {
  block->current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y));
  swapcontext(&block->scheduler, &block->threads[thread].context);
  if (block->error) std::rethrow_exception(block->error);
}

// Runs every thread of a warp that can run until it waits again; false if none could.
inline bool advance(unsigned warp, bool reverse) {
  bool moved = false;
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned thread = warp * kWarp + (reverse ? kWarp - 1 - i : i);
    if (thread >= block->threads.size()) continue;
    Thread& t = block->threads[thread];
    if (t.finished || (t.ready && !t.ready(t.condition))) continue;
    resume(thread);
    moved = true;
  }
  return moved;
}

// Warp `late`, if there is one, gets on only while no other can.
inline void run_block(bool reverse, unsigned late) {
  const auto warps = static_cast<unsigned>(block->warps.size());
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = reverse ? warps - 1 - i : i;
      if (warp == late) continue;
      while (advance(warp, reverse)) moved = true;
    }
    // A few times, because a wait may ask for others to come first.
    for (int i = 0; i < 3 && !moved && late < warps; ++i) moved = advance(late, reverse);
  }
  for (unsigned i = 0; i < block->threads.size(); ++i)
    if (!block->threads[i].finished)
      throw std::logic_error("deadlock: thread " + std::to_string(i) + " waits in " +
                             block->threads[i].operation);
  if (block->at_end) block->at_end();
}

}  // namespace detail

// kernel<<<grid, threads, shared_bytes>>>(...), with the call in a closure. Throws std::logic_error on a
// deadlock, on a store past the end of shared memory, and when a warp is not together where it has to be.
inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> kernel) {
  constexpr size_t kAlignment = 1024, kGuard = 256;
  const char* order = std::getenv("SIMT_ORDER");
  const bool reverse = order && std::strcmp(order, "reverse") == 0;
  const auto late =
      order && std::strncmp(order, "late", 4) == 0 ? static_cast<unsigned>(std::atoi(order + 4)) : ~0u;
  const unsigned count = threads.x * threads.y * threads.z, blocks = grid.x * grid.y * grid.z;
  const std::unique_ptr<char[]> stacks(new char[count * kStackBytes]);
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared_bytes + kGuard + kAlignment]);
  const uintptr_t base =
      (reinterpret_cast<uintptr_t>(memory.get()) + kAlignment - 1) / kAlignment * kAlignment;
  blockDim = threads;
  gridDim = grid;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned index = reverse ? blocks - 1 - i : i;
    blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y));
    Block state;
    block = &state;
    state.kernel = kernel;
    state.shared = reinterpret_cast<unsigned char*>(base);
    std::memset(state.shared, kPoison, shared_bytes + kGuard);
    state.threads.resize(count);
    state.warps.resize((count + kWarp - 1) / kWarp);
    state.warpgroups.resize((count + kWarpgroup - 1) / kWarpgroup);
    for (unsigned t = 0; t < count; ++t)
      detail::start_fiber(state.threads[t], stacks.get() + t * kStackBytes);
    detail::run_block(reverse, late);
    for (size_t byte = shared_bytes; byte < shared_bytes + kGuard; ++byte)
      if (state.shared[byte] != kPoison) throw std::logic_error("a store went past the end of shared memory");
  }
}

}  // namespace simt
