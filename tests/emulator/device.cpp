// Start-up, devices, contexts, and what every call checks first.
#include "emulator.h"

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulator {
namespace {

thread_local std::vector<CUcontext> context_stack;

long long setting(const char* name, long long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoll(text) : otherwise;
}

// A new context, alive until its last user lets go.
Context* create_context(CUdevice device) {
  State& s = state();
  auto context = std::make_shared<Context>();
  context->handle = s.contexts.next();
  context->device = device;
  s.contexts.add(context);
  return context.get();
}

// Destroys what the context owns; the object stays, so that a stale handle is told from a wrong one.
void destroy_context(Context& context) {
  context.is_alive = false;
  free_memory_of(context);  // while its streams are known: what they execute still needs it
  close_streams_of(context);
  state().events.remove_those_of(context);
  state().execs.remove_those_of(context);
  unload_modules_of(context);
}

bool is_device(CUdevice device) {
  return device >= 0 && device < state().settings.num_devices;
}

int device_attribute(CUdevice_attribute attribute) {
  const Settings& settings = state().settings;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return settings.arch / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return settings.arch % 10;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: return settings.is_integrated;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 8;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 918000;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: return 1;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: return 1;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return settings.is_integrated ? 1 : 2;
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: return 1;
    default: return 0;
  }
}

CUresult check_can_call(const char* name, unsigned needs, Call& call) {
  State& s = state();
  // As a driver: what a fork inherits is of no use to the child.
  if ((needs & kInit) && (getpid() != s.pid || !s.is_initialised)) {
    return CUDA_ERROR_NOT_INITIALIZED;
  }
  auto failure = s.failures.find(name);
  if (failure != s.failures.end() && --failure->second.countdown == 0) {
    CUresult code = failure->second.code;
    s.failures.erase(failure);
    return code;
  }
  if (is_worker) return CUDA_ERROR_NOT_PERMITTED;
  call.context = current_context();
  if ((needs & kContext) == kContext) {
    if (!call.context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!call.context->is_alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (call.context->sticky) return call.context->sticky;
  }
  return needs & kUnsafe ? check_capture_allows_unsafe_calls() : CUDA_SUCCESS;
}

}  // namespace

thread_local bool is_worker = false;

Settings read_settings() {
  Settings settings{};
  settings.version = static_cast<int>(setting("EMULATED_CUDA_VERSION", 12060));
  settings.arch = static_cast<int>(setting("EMULATED_ARCH", 87));
  settings.is_integrated = setting("EMULATED_INTEGRATED", 1) != 0;
  settings.memory_bytes = static_cast<std::size_t>(setting("EMULATED_MEMORY_BYTES", 8LL << 30));
  settings.num_devices = static_cast<int>(setting("EMULATED_DEVICES", 1));
  return settings;
}

State& state() {
  // Never destroyed: worker threads outlive the end of main.
  static State& only = [&]() -> State& {
    State& fresh = *new State;
    fresh.settings = read_settings();
    fresh.pid = getpid();
    fresh.primaries.resize(static_cast<std::size_t>(fresh.settings.num_devices));
    return fresh;
  }();
  return only;
}

Call::Call(const char* name, unsigned needs) {
  State& s = state();
  // A lock that another thread held at the fork would never open in the child.
  if (getpid() == s.pid) lock = std::unique_lock<std::mutex>(s.mutex);
  s.log.append(name).append("\n");
  error = check_can_call(name, needs, *this);
}

Context* current_context() {
  return context_stack.empty() ? nullptr : state().contexts.find(context_stack.back());
}

void report(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("emulated CUDA driver: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputs("\n", stderr);
  va_end(arguments);
}

}  // namespace emulator

using namespace emulator;

CUresult cuInit(unsigned flags) {
  EMULATOR_CALL(cuInit, kNothing);
  if (getpid() != state().pid) return CUDA_ERROR_NOT_INITIALIZED;
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (state().settings.num_devices == 0) return CUDA_ERROR_NO_DEVICE;
  state().is_initialised = true;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  EMULATOR_CALL(cuDriverGetVersion, kNothing);
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = state().settings.version;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  EMULATOR_CALL(cuDeviceGetCount, kInit);
  if (!count) return CUDA_ERROR_INVALID_VALUE;
  *count = state().settings.num_devices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  EMULATOR_CALL(cuDeviceGet, kInit);
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  EMULATOR_CALL(cuDeviceGetName, kInit);
  if (!name || size < 1) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(name, static_cast<std::size_t>(size), "Emulated sm_%d", state().settings.arch);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(std::size_t* bytes, CUdevice device) {
  EMULATOR_CALL(cuDeviceTotalMem_v2, kInit);
  if (!bytes) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = state().settings.memory_bytes;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  EMULATOR_CALL(cuDeviceGetAttribute, kInit);
  if (!value || attribute < 1 || attribute >= CU_DEVICE_ATTRIBUTE_MAX) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *value = device_attribute(attribute);
  return CUDA_SUCCESS;
}

CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  EMULATOR_CALL(cuDeviceComputeCapability, kInit);
  if (!major || !minor) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *major = state().settings.arch / 10;
  *minor = state().settings.arch % 10;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  EMULATOR_CALL(cuDevicePrimaryCtxRetain, kInit);
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  State::Primary& primary = state().primaries[static_cast<std::size_t>(device)];
  if (!primary.context) primary.context = create_context(device);
  ++primary.num_retained;
  *context = primary.context->handle;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  EMULATOR_CALL(cuDevicePrimaryCtxRelease_v2, kInit);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  State::Primary& primary = state().primaries[static_cast<std::size_t>(device)];
  if (primary.num_retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (--primary.num_retained == 0) {
    destroy_context(*primary.context);
    primary.context = nullptr;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
  EMULATOR_CALL(cuDevicePrimaryCtxReset_v2, kInit);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  State::Primary& primary = state().primaries[static_cast<std::size_t>(device)];
  if (primary.context) destroy_context(*primary.context);
  primary = State::Primary{};
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags) {
  EMULATOR_CALL(cuDevicePrimaryCtxSetFlags_v2, kInit);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (flags & ~unsigned{CU_CTX_FLAGS_MASK}) return CUDA_ERROR_INVALID_VALUE;
  state().primaries[static_cast<std::size_t>(device)].flags = flags;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  EMULATOR_CALL(cuDevicePrimaryCtxGetState, kInit);
  if (!flags || !active) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  const State::Primary& primary = state().primaries[static_cast<std::size_t>(device)];
  *flags = primary.flags;
  *active = primary.context != nullptr;
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v4(CUcontext* context, CUctxCreateParams*, unsigned, CUdevice device) {
  EMULATOR_CALL(cuCtxCreate_v4, kInit);
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  context_stack.push_back(create_context(device)->handle);
  *context = context_stack.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(CUcontext* context, unsigned flags, CUdevice device) {
  return cuCtxCreate_v4(context, nullptr, flags, device);
}

CUresult cuCtxDestroy_v2(CUcontext context) {
  EMULATOR_CALL(cuCtxDestroy_v2, kInit);
  Context* found = state().contexts.find(context);
  if (!found || !found->is_alive) return CUDA_ERROR_INVALID_CONTEXT;
  for (const State::Primary& primary : state().primaries) {
    if (primary.context == found) return CUDA_ERROR_INVALID_CONTEXT;
  }
  destroy_context(*found);
  if (!context_stack.empty() && context_stack.back() == context) context_stack.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  EMULATOR_CALL(cuCtxPushCurrent_v2, kInit);
  Context* found = state().contexts.find(context);
  if (!found) return CUDA_ERROR_INVALID_CONTEXT;
  if (!found->is_alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  context_stack.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  EMULATOR_CALL(cuCtxPopCurrent_v2, kInit);
  if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = context_stack.back();
  context_stack.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  EMULATOR_CALL(cuCtxSetCurrent, kInit);
  if (context && !state().contexts.find(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context_stack.empty()) context_stack.pop_back();
  if (context) context_stack.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  EMULATOR_CALL(cuCtxGetCurrent, kInit);
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  *context = context_stack.empty() ? nullptr : context_stack.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  EMULATOR_CALL(cuCtxGetDevice, kContext);
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  *device = call.context->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  EMULATOR_CALL(cuCtxSynchronize, kContext | kUnsafe);
  std::vector<MarkerPtr> tails;
  for (const auto& [handle, stream] : state().streams.objects) {
    if (stream->context != call.context) continue;
    if (stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->tail) tails.push_back(stream->tail);
  }
  for (const MarkerPtr& tail : tails) {
    if (CUresult failed = wait_for(call, tail)) return failed;
  }
  return CUDA_SUCCESS;
}
