// How Python sets the executor and asks what happened.
#pragma once

#include <exception>
#include <string>

#include "executor.h"
#include "shadow.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda_executor {

std::string& last_error();

// Checks that every element of every output was written, and keeps the counts for Python.
void conclude();

// Runs f on a memory that is empty before and after; whether it ended well.
template <class F>
int guarded(const F& f) {
  memory().clear();
  launched().clear();
  bool well = true;
  try {
    f();
    conclude();
  } catch (const std::exception& error) {
    last_error() = error.what();
    well = false;
  }
  memory().clear();
  return well;
}

}  // namespace cuda_executor
