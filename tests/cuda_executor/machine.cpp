#include "machine.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/time.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <stdexcept>

namespace cuda_executor {

namespace {

// Threads that wait for a message all look for it once a round. Whoever is to send it has moved on
// by at least one barrier, shuffle or look in every round, so that this many are a livelock.
constexpr int kQuietRounds = 200;

// After so many looks a thread steps back, though each may have shown something new.
constexpr int kPolls = 64;

// Scheduling points between two exchanges at random, on average; a launch keeps to one of them.
constexpr int64_t kMeanQuanta[] = {1, 8, 64};

std::string demangled(const char* name) {
  int status;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
  return text ? text.get() : name;
}

std::string short_path(const std::string& path) {
  return path.substr(path.rfind('/') == std::string::npos ? 0 : path.rfind('/') + 1);
}

std::string text_of(const Site& site) {
  return short_path(site.file) + ":" + std::to_string(site.line);
}

bool operator!=(const Site& one, const Site& other) {
  return one.line != other.line || std::strcmp(one.file, other.file) != 0;
}

// A kernel that spins without touching memory reaches no scheduling point, ever.
void give_up(int) {
  constexpr char kText[] = "CUDA executor: a kernel loops without touching memory\n";
  if (write(2, kText, sizeof(kText) - 1) < 0) _exit(4);
  _exit(3);
}

class Watchdog {
 public:
  explicit Watchdog(double seconds) {
    struct sigaction action = {};
    action.sa_handler = give_up;
    sigaction(SIGPROF, &action, &before_);
    set(seconds);
  }
  ~Watchdog() {
    set(0);
    sigaction(SIGPROF, &before_, nullptr);
  }

 private:
  static void set(double seconds) {
    itimerval timer = {};
    timer.it_value.tv_sec = static_cast<time_t>(seconds);
    timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - timer.it_value.tv_sec) * 1e6);
    setitimer(ITIMER_PROF, &timer, nullptr);
  }
  struct sigaction before_;
};

void body_of_thread() { machine().work(); }

}  // namespace

Options& options() {
  static Options options;
  return options;
}

Planted& planted() {
  static Planted& planted = *new Planted;
  return planted;
}

bool Site::is_planted() const {
  return line == planted().line && short_path(file) == planted().file;
}

Machine& machine() {
  static Machine& machine = *new Machine;  // outlives whatever may still launch
  return machine;
}

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Watchdog watchdog(options().seconds * 1.5 + 1);
  machine().run(launch);
}

std::string& launched() {
  static std::string& names = *new std::string;
  return names;
}

uint64_t trace() { return machine().trace(); }

std::string line_of(const void* where) {
  Dl_info info;
  if (dladdr(where, &info) == 0) return "an unknown line";
  const auto offset = static_cast<const char*>(where) - static_cast<const char*>(info.dli_fbase);
  std::ostringstream command;
  command << "addr2line -i -e '" << info.dli_fname << "' 0x" << std::hex << offset - 1;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.str().c_str(), "r"), pclose);
  char line[1024];
  while (pipe && std::fgets(line, sizeof(line), pipe.get())) {
    std::string text = short_path(line);
    text.erase(text.find_first_of(" \n"));
    if (text.rfind("intrinsics.h", 0) != 0 && text.rfind("cuda_", 0) != 0) return text;
  }
  return "an unknown line";
}

int Places::first_from(int place) const {
  size_t i = place / 64;
  uint64_t word = words_[i] & (~uint64_t{0} << place % 64);
  while (word == 0) word = words_[i = (i + 1) % words_.size()];
  return static_cast<int>(i * 64 + __builtin_ctzll(word));
}

int Places::last() const {
  size_t i = words_.size() - 1;
  while (words_[i] == 0) --i;
  return static_cast<int>(i * 64 + 63 - __builtin_clzll(words_[i]));
}

// --- the life of a launch ---

void Machine::prepare(const Launch& launch) {
  launch_ = launch;
  first_identity_ = next_identity_;
  next_identity_ += static_cast<uint32_t>(launch.blocks * launch.threads);
  failure_.clear();
  messages_.clear();
  generator_.seed(options().seed * 1000003 + 1);
  mean_quantum_ = kMeanQuanta[random() % std::size(kMeanQuanta)];
  trace_ = quiet_rounds_ = turns_ = started_ = running_ = 0;
  deadline_ = std::clock() + static_cast<std::clock_t>(options().seconds * CLOCKS_PER_SEC);

  start_order_.resize(launch.blocks);
  for (int64_t i = 0; i < launch.blocks; ++i)
    start_order_[i] = options().schedule == Schedule::kReversed ? launch.blocks - 1 - i : i;
  if (options().schedule == Schedule::kRandom)
    std::shuffle(start_order_.begin(), start_order_.end(), generator_);

  const int64_t resident = std::min<int64_t>(std::max(options().resident, 1), launch.blocks);
  const int places = static_cast<int>(resident) * launch.threads;
  ready_.resize(places);
  idle_.resize(places);
  while (static_cast<int>(threads_.size()) < places) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->stack = std::make_unique<Stack>();
  }
  blocks_.clear();
  for (int64_t b = 0; b < resident; ++b) {
    blocks_.push_back(std::make_unique<Block>());
    Block& block = *blocks_.back();
    for (int i = 0; i < launch.threads; ++i) {
      Thread& t = *threads_[b * launch.threads + i];
      t.block = &block;
      t.index = i;
      t.place = static_cast<int>(b) * launch.threads + i;
      t.state = State::kDone;
      block.threads.push_back(&t);
    }
    block.shared.resize(launch.shared_bytes / sizeof(Line) + 1);
    block.shared_range.name = "shared memory";
    block.shared_range.base = block.shared[0].bytes;
    block.shared_range.bytes = launch.shared_bytes;
    start(block);
  }
}

void Machine::start(Block& block) {
  block.index = start_order_[started_++];
  block.running = launch_.threads;
  block.at_barrier = 0;
  block.warps.assign((launch_.threads + kWarp - 1) / kWarp, {});
  std::memset(block.shared_range.base, 0xFF, launch_.shared_bytes);  // a NaN in every format
  if (options().checks)
    block.shared_range.cells.assign((launch_.shared_bytes + kCell - 1) / kCell, {});
  for (Thread* t : block.threads) {
    t->view = {};
    t->clock() = 1;
    t->has_fenced = false;
    t->received.reset();
    t->polls = 0;
    for (auto& polled : t->polled) polled = {nullptr, 0};
    t->fiber.start(*t->stack, body_of_thread);
    make(*t, State::kReady);
  }
  running_ += launch_.threads;
}

void Machine::work() {
  launch_.body(launch_.arguments, thread->block->shared_range.base);
  exit();
}

void Machine::run(const Launch& launch) {
  prepare(launch);
  launched() += demangled(launch.kernel) + "\n";
  while (running_ > 0 && failure_.empty()) {
    Thread* t = next();
    if (t == nullptr) break;
    thread = t;
    t->fiber.resume();
    thread = nullptr;
    Block& block = *t->block;
    if (block.running == 0 && started_ < launch.blocks && failure_.empty()) start(block);
  }
  if (failure_.empty()) return;
  if (failed_at_ != nullptr) failure_ += " at " + line_of(failed_at_);
  if (failed_site_.file != nullptr) failure_ += " at " + text_of(failed_site_);
  throw std::runtime_error("CUDA executor: " + demangled(launch.kernel) + ": " + failure_);
}

// --- who runs ---

void Machine::make(Thread& t, State state) {
  if (t.state == State::kReady) ready_.remove(t.place);
  if (t.state == State::kIdle) idle_.remove(t.place);
  t.state = state;
  if (state == State::kReady) ready_.insert(t.place);
  if (state == State::kIdle) idle_.insert(t.place);
}

void Machine::draw_quantum() {
  quantum_ = options().schedule == Schedule::kRandom
                 ? 1 + static_cast<int64_t>(random() % (2 * mean_quantum_))
                 : INT64_MAX;
}

// Null where none can run, and then the failure is set.
Thread* Machine::next() {
  if (++turns_ % 1024 == 0 && std::clock() > deadline_) {
    set_failure("timeout: " + waiting());
    return nullptr;
  }
  if (ready_.count() == 0) {
    if (idle_.count() == 0 || ++quiet_rounds_ > kQuietRounds) {
      set_failure((idle_.count() == 0 ? "deadlock: " : "livelock: ") + waiting());
      return nullptr;
    }
    for (const auto& block : blocks_)
      for (Thread* t : block->threads)
        if (t->state == State::kIdle) make(*t, State::kReady);
  }
  draw_quantum();
  int place = 0;
  if (options().schedule == Schedule::kInOrder) {
    place = ready_.first_from(0);
  } else if (options().schedule == Schedule::kReversed) {
    place = ready_.last();
  } else {
    const uint64_t number = random();
    const Places& from = idle_.count() > 0 && number % 8 == 0 ? idle_ : ready_;
    place = from.first_from(static_cast<int>(
        (number >> 8) % (static_cast<uint64_t>(blocks_.size()) * launch_.threads)));
    if (&from == &idle_) make(*threads_[place], State::kReady);
  }
  trace_ = (trace_ ^ static_cast<uint64_t>(place + 1)) * 0x9E3779B97F4A7C15;
  return threads_[place].get();
}

void Machine::point() {
  if (--quantum_ <= 0) thread->fiber.suspend();
}

void Machine::wait(State state, const Site& site) {
  thread->site = site;
  make(*thread, state);
  thread->fiber.suspend();
}

void Machine::step_back() { wait(State::kIdle, {}); }

void Machine::poll(const void* address, size_t bytes, const void* where) {
  Thread& t = *thread;
  uint64_t value = 0;
  std::memcpy(&value, address, std::min(bytes, sizeof(value)));
  bool is_new = true;
  for (const auto& before : t.polled) is_new &= before != std::make_pair(address, value);
  if (is_new) {
    progress();
    t.polled[t.next_polled++ % std::size(t.polled)] = {address, value};
  }
  t.polls_at = where;
  if (!is_new || ++t.polls % kPolls == 0) step_back();
}

void Machine::exit() {
  Thread& t = *thread;
  Block& block = *t.block;
  Warp& warp = block.warps[t.index / kWarp];
  for (const Meeting& meeting : warp.meetings)
    if (meeting.mask >> t.lane() & 1)
      fail("the thread returns while its warp waits for it", nullptr, meeting.site);
  if (block.at_barrier > 0)
    fail("divergent barrier: the thread returns while others wait", nullptr, block.barrier);
  warp.exited |= 1u << t.lane();
  --block.running;
  --running_;
  progress();
  make(t, State::kDone);
  t.fiber.suspend();
}

void Machine::fail(const std::string& message, const void* where, const Site& site) {
  set_failure("block " + std::to_string(thread->block->index) + ", thread " +
              std::to_string(thread->index) + ": " + message);
  failed_at_ = where;
  failed_site_ = site;
  thread->fiber.suspend();
  __builtin_unreachable();
}

void Machine::set_failure(const std::string& message) {
  failure_ = message;
  failed_at_ = nullptr;
  failed_site_ = {};
}

// Where threads are, of the first few blocks: one entry for threads of a block in one place.
std::string Machine::waiting() const {
  std::ostringstream text;
  int entries = 0;
  for (const auto& block : blocks_) {
    const Thread* before = nullptr;
    for (const Thread* t : block->threads) {
      if (t->state == State::kDone) continue;
      if (before && before->state == t->state && before->site.line == t->site.line) continue;
      before = t;
      if (++entries > 6) return text.str() + " ...";
      text << (entries > 1 ? "; " : "") << "block " << block->index << ", from thread " << t->index;
      if (t->state == State::kAtBarrier) text << ", waits for the block at " << text_of(t->site);
      if (t->state == State::kAtWarp) text << ", waits for its warp at " << text_of(t->site);
      if (t->state == State::kIdle && t->polls_at)
        text << ", waits for a message at " << line_of(t->polls_at);
      if (t->state == State::kReady) text << ", runs";
    }
  }
  return text.str() + "; " + std::to_string(launch_.blocks - started_) + " blocks have not started";
}

// --- barriers, shuffles, votes ---

void Machine::barrier(const Site& site) {
  if (site.is_planted()) return;
  Block& block = *thread->block;
  if (block.running < launch_.threads)
    fail("divergent barrier: other threads of the block have returned", nullptr, site);
  if (block.at_barrier > 0 && block.barrier != site)
    fail("divergent barrier: others wait at " + text_of(block.barrier) + " and this one", nullptr,
         site);
  block.barrier = site;
  if (++block.at_barrier < launch_.threads) return wait(State::kAtBarrier, site);
  block.at_barrier = 0;
  if (options().checks) order_block(block);
  for (Thread* t : block.threads)
    if (t != thread) make(*t, State::kReady);
  point();
}

uint64_t Machine::meet(Collective kind, unsigned mask, uint64_t value, int lane, int width,
                       const Site& site) {
  if (kind == Collective::kSync && site.is_planted()) return 0;
  Thread& t = *thread;
  Warp& warp = t.block->warps[t.index / kWarp];
  if (!(mask >> t.lane() & 1)) fail("bad mask: it lacks the calling lane", nullptr, site);
  if (mask & warp.exited) fail("bad mask: it names lanes that have returned", nullptr, site);
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0)
    fail("the width of a shuffle must be a power of two up to 32", nullptr, site);
  size_t i = 0;
  while (i < warp.meetings.size() && warp.meetings[i].mask != mask) ++i;
  if (i == warp.meetings.size()) warp.meetings.push_back({kind, mask, width, site});
  Meeting& meeting = warp.meetings[i];
  if (meeting.kind != kind || meeting.width != width || meeting.site != site)
    fail("divergent warp: others wait at " + text_of(meeting.site) + " and this one", nullptr,
         site);
  meeting.arrived |= 1u << t.lane();
  meeting.values[t.lane()] = value;
  meeting.lanes[t.lane()] = lane;
  if (meeting.arrived != mask) {
    wait(State::kAtWarp, site);
  } else {
    Meeting whole = meeting;
    warp.meetings.erase(warp.meetings.begin() + static_cast<int64_t>(i));
    finish(whole, t.index - t.lane());
    point();
  }
  return t.result;
}

// All lanes have come: each gets its result. `first` is the index of lane 0.
void Machine::finish(const Meeting& meeting, int first) {
  if (meeting.kind == Collective::kSync && options().checks) order_lanes(meeting, first);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(meeting.mask >> lane & 1)) continue;
    Thread& t = *thread->block->threads[first + lane];
    t.result = result_for(meeting, lane);
    if (&t != thread) make(t, State::kReady);
  }
}

uint64_t Machine::result_for(const Meeting& meeting, int lane) {
  if (meeting.kind == Collective::kSync) return 0;
  if (meeting.kind == Collective::kBallot) {
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i)
      if (meeting.mask >> i & 1 && meeting.values[i] != 0) votes |= 1u << i;
    return votes;
  }
  const int begin = lane & -meeting.width, last = begin + meeting.width - 1;
  const int operand = meeting.lanes[lane];
  int source = lane;
  if (meeting.kind == Collective::kShuffle) source = begin + (operand & (meeting.width - 1));
  if (meeting.kind == Collective::kUp) source = lane - operand;
  if (meeting.kind == Collective::kDown) source = lane + operand;
  if (meeting.kind == Collective::kXor) source = lane ^ operand;
  if (source > last || (meeting.kind == Collective::kUp && source < begin)) source = lane;
  if (!(meeting.mask >> source & 1))
    fail("bad mask: lane " + std::to_string(lane) + " shuffles from lane " +
             std::to_string(source) + ", which is not in it",
         nullptr, meeting.site);
  return meeting.values[source];
}

// --- the order of accesses ---

void Machine::order_lanes(const Meeting& meeting, int first) {
  View joined;
  const auto for_each = [&](auto f) {
    for (int lane = 0; lane < kWarp; ++lane)
      if (meeting.mask >> lane & 1) f(*thread->block->threads[first + lane]);
  };
  for_each([&](Thread& t) {
    joined.known = Known::join(joined.known, t.view.known);
    for (int i = 0; i < kWarp; ++i) joined.warp[i] = std::max(joined.warp[i], t.view.warp[i]);
  });
  for_each([&](Thread& t) {
    t.view = joined;
    ++t.clock();
  });
}

void Machine::order_block(Block& block) {
  KnownPtr known;
  const auto clocks = std::make_shared<std::vector<uint32_t>>();
  for (Thread* t : block.threads) {
    known = Known::join(known, t->view.known);
    clocks->push_back(t->clock());
  }
  known = Known::with(known, block.index, clocks);
  for (Thread* t : block.threads) {
    t->view.known = known;
    ++t->clock();
  }
}

void Machine::fence(const Site& site) {
  if (site.is_planted()) return;
  Thread& t = *thread;
  t.view.known = Known::join(t.view.known, t.received);
  t.received.reset();
  t.fenced = t.view;
  t.has_fenced = true;
  ++t.clock();
}

void Machine::receive(const void* address) {
  const auto found = messages_.find(address);
  if (found != messages_.end()) thread->received = Known::join(thread->received, found->second);
}

void Machine::send(const void* address, bool adds) {
  const Thread& t = *thread;
  KnownPtr& message = messages_[address];
  if (!adds) message.reset();
  if (t.has_fenced)
    message =
        Known::join(message, t.fenced.all(t.block->index, t.index - t.lane(), launch_.threads));
}

bool Machine::knows(const Access& before) const {
  if (before.clock == 0 || before.thread < first_identity_) return true;
  const Thread& t = *thread;
  const auto [block, index] = thread_of(before.thread);
  if (block == t.block->index) {
    if (index == t.index) return true;
    if (index / kWarp == t.index / kWarp && t.view.warp[index % kWarp] >= before.clock) return true;
  }
  return t.view.covers(block, index, before.clock);
}

const Thread* Machine::owner_of_stack(const void* address) const {
  for (const auto& t : threads_)
    if (t->stack->contains(address)) return t.get();
  return nullptr;
}

}  // namespace cuda_executor
