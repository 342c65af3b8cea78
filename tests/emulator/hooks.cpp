// What tests ask of the emulator beyond the driver's calls.
#include "emulator.h"

#include <algorithm>

using namespace emulator;

int unsupported_call(const char* name) {
  Call call(name, kNothing);
  return call.error ? call.error : CUDA_ERROR_NOT_SUPPORTED;
}

extern "C" {

// Queues or captures host code as if it were a kernel.
int emulator_enqueue(void* stream, void (*function)(void*), void* user) {
  EMULATOR_CALL(emulator_enqueue, kContext);
  auto run = [function, user] {
    ++state().num_launches;
    function(user);
    return CUDA_SUCCESS;
  };
  return submit(call, static_cast<CUstream>(stream), Work{CU_GRAPH_NODE_TYPE_KERNEL, run});
}

// The driver calls so far, in order, one a line; valid until this thread asks again.
const char* emulator_log() {
  static thread_local std::string copy;
  std::lock_guard<std::mutex> lock(state().mutex);
  copy = state().log;
  return copy.c_str();
}

void emulator_log_clear() {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().log.clear();
}

// Overrules what the environment set; 1 where there is no setting of that name.
int emulator_configure(const char* name, long long value) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const std::string setting = name;
  if (setting == "version") s.settings.version = static_cast<int>(value);
  else if (setting == "arch") s.settings.arch = static_cast<int>(value);
  else if (setting == "integrated") s.settings.is_integrated = value != 0;
  else if (setting == "memory_bytes") s.settings.memory_bytes = static_cast<std::size_t>(value);
  else if (setting == "devices") s.settings.num_devices = static_cast<int>(value);
  else if (setting == "latency_us") s.latency_us = static_cast<unsigned>(value);
  else return 1;
  s.primaries.resize(std::max<std::size_t>(s.primaries.size(), s.settings.num_devices));
  return 0;
}

// Forgets the log, the failures asked for, and what was configured; contexts and memory stay.
void emulator_reset() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.log.clear();
  s.failures.clear();
  s.settings = read_settings();
  s.latency_us = 0;
}

// Lets the nth call from here on (1: the next one) of this name fail with this code.
void emulator_fail(const char* name, int nth, int code) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().failures[name] = Failure{nth, static_cast<CUresult>(code)};
}

// Device and pinned host memory that is not freed yet.
unsigned long long emulator_live_bytes() {
  std::lock_guard<std::mutex> lock(state().mutex);
  unsigned long long bytes = 0;
  for (const auto& [base, allocation] : state().allocations) {
    if (allocation.kind != Allocation::kRegistered) bytes += allocation.bytes;
  }
  return bytes;
}

// Handles that are not given back yet, of one kind or ("") of all kinds.
int emulator_live_handles(const char* kind) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  int num_contexts = 0, num_null_streams = 0;
  for (const State::Primary& primary : s.primaries) num_contexts += primary.num_retained;
  for (const auto& [handle, context] : s.contexts.objects) {
    num_null_streams += context->null_stream != nullptr;
  }
  const std::map<std::string, std::size_t> counts{
      {"context", num_contexts},
      {"event", s.events.objects.size()},
      {"exec", s.execs.objects.size()},
      {"graph", s.owned_graphs.size()},
      {"module", s.modules.objects.size()},
      {"stream", s.streams.objects.size() - num_null_streams},
  };
  int live = 0;
  for (const auto& [name, count] : counts) {
    if (!*kind || name == kind) live += static_cast<int>(count);
  }
  return live;
}

// Kernels executed so far.
int emulator_num_launches() { return state().num_launches; }

}  // extern "C"
