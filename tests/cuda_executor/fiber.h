// A stack of one's own and the switch to it and back: Boost.Context where its headers are installed
// (some 7 ns a switch), glibc's ucontext elsewhere (some 270 ns).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if __has_include(<boost/context/detail/fcontext.hpp>) && !defined(EXECUTOR_UCONTEXT)
#include <boost/context/detail/fcontext.hpp>
#define EXECUTOR_BOOST 1
#else
#include <ucontext.h>
#define EXECUTOR_BOOST 0
#endif

namespace cuda_executor {

// Never shrinks: a new launch takes the old stacks. The page below each cannot be touched, so that
// an overflow is a fault and not another thread's data.
class Stack {
 public:
  static constexpr size_t kBytes = 64 << 10, kGuard = 4 << 10;

  Stack() {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
    low_ = static_cast<char*>(memory);
  }
  Stack(const Stack&) = delete;

  char* top() const { return low_ + kBytes; }
  size_t usable() const { return kBytes - kGuard; }
  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - low_) < kBytes;
  }

 private:
  char* low_;
};

// A fiber that is not resumed any more is simply dropped: what is on its stack is never destroyed.
class Fiber {
 public:
  // `body` must leave by suspend() and never return.
  void start(const Stack& stack, void (*body)()) {
#if EXECUTOR_BOOST
    body_ = body;
    self_ = boost::context::detail::make_fcontext(stack.top(), stack.usable(), [](auto transfer) {
      Fiber* fiber = static_cast<Fiber*>(transfer.data);
      fiber->caller_ = transfer.fctx;
      fiber->body_();
    });
#else
    getcontext(&self_);
    self_.uc_stack.ss_sp = stack.top() - stack.usable();
    self_.uc_stack.ss_size = stack.usable();
    makecontext(&self_, body, 0);
#endif
  }

  // Runs the fiber until it suspends.
  void resume() {
#if EXECUTOR_BOOST
    self_ = boost::context::detail::jump_fcontext(self_, this).fctx;
#else
    swapcontext(&caller_, &self_);
#endif
  }

  // To be called on the fiber: goes back to where it was resumed.
  void suspend() {
#if EXECUTOR_BOOST
    caller_ = boost::context::detail::jump_fcontext(caller_, nullptr).fctx;
#else
    swapcontext(&self_, &caller_);
#endif
  }

 private:
#if EXECUTOR_BOOST
  boost::context::detail::fcontext_t self_, caller_;
  void (*body_)();
#else
  ucontext_t self_, caller_;
#endif
};

}  // namespace cuda_executor
