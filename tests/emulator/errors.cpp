// The names of the driver's error codes, and what it says of them.
#include "emulator.h"

#include <algorithm>
#include <cctype>

namespace {

#define EMULATOR_ERRORS(DO)                                                                     \
  DO(CUDA_SUCCESS) DO(CUDA_ERROR_INVALID_VALUE) DO(CUDA_ERROR_OUT_OF_MEMORY)                    \
  DO(CUDA_ERROR_NOT_INITIALIZED) DO(CUDA_ERROR_DEINITIALIZED) DO(CUDA_ERROR_STUB_LIBRARY)       \
  DO(CUDA_ERROR_NO_DEVICE) DO(CUDA_ERROR_INVALID_DEVICE) DO(CUDA_ERROR_INVALID_IMAGE)           \
  DO(CUDA_ERROR_INVALID_CONTEXT) DO(CUDA_ERROR_MAP_FAILED) DO(CUDA_ERROR_UNMAP_FAILED)          \
  DO(CUDA_ERROR_NO_BINARY_FOR_GPU) DO(CUDA_ERROR_UNSUPPORTED_LIMIT) DO(CUDA_ERROR_INVALID_PTX)  \
  DO(CUDA_ERROR_UNSUPPORTED_PTX_VERSION) DO(CUDA_ERROR_INVALID_SOURCE)                          \
  DO(CUDA_ERROR_FILE_NOT_FOUND) DO(CUDA_ERROR_OPERATING_SYSTEM) DO(CUDA_ERROR_INVALID_HANDLE)   \
  DO(CUDA_ERROR_ILLEGAL_STATE) DO(CUDA_ERROR_LOSSY_QUERY) DO(CUDA_ERROR_NOT_FOUND)              \
  DO(CUDA_ERROR_NOT_READY) DO(CUDA_ERROR_ILLEGAL_ADDRESS)                                       \
  DO(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES) DO(CUDA_ERROR_LAUNCH_TIMEOUT)                          \
  DO(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE) DO(CUDA_ERROR_CONTEXT_IS_DESTROYED)                     \
  DO(CUDA_ERROR_ASSERT) DO(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)                           \
  DO(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED) DO(CUDA_ERROR_HARDWARE_STACK_ERROR)                 \
  DO(CUDA_ERROR_ILLEGAL_INSTRUCTION) DO(CUDA_ERROR_MISALIGNED_ADDRESS)                          \
  DO(CUDA_ERROR_INVALID_PC) DO(CUDA_ERROR_LAUNCH_FAILED) DO(CUDA_ERROR_NOT_PERMITTED)           \
  DO(CUDA_ERROR_NOT_SUPPORTED) DO(CUDA_ERROR_SYSTEM_NOT_READY)                                  \
  DO(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH) DO(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)               \
  DO(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED) DO(CUDA_ERROR_STREAM_CAPTURE_MERGE)                 \
  DO(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED) DO(CUDA_ERROR_STREAM_CAPTURE_UNJOINED)                \
  DO(CUDA_ERROR_STREAM_CAPTURE_ISOLATION) DO(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)                \
  DO(CUDA_ERROR_CAPTURED_EVENT) DO(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)                      \
  DO(CUDA_ERROR_TIMEOUT) DO(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE) DO(CUDA_ERROR_UNKNOWN)

struct Text {
  const char* name;
  std::string description;
};

// "CUDA_ERROR_INVALID_VALUE" is told as "invalid value": as short as the driver's, and distinct.
std::string describe(std::string name) {
  const std::string prefix = "CUDA_ERROR_";
  if (name == "CUDA_SUCCESS") return "no error";
  name = name.substr(prefix.size());
  std::replace(name.begin(), name.end(), '_', ' ');
  for (char& letter : name) letter = static_cast<char>(std::tolower(letter));
  return name;
}

const Text* find_text(CUresult error) {
#define EMULATOR_TEXT(code) {code, {#code, describe(#code)}},
  static const std::map<CUresult, Text> texts{EMULATOR_ERRORS(EMULATOR_TEXT)};
  auto found = texts.find(error);
  return found == texts.end() ? nullptr : &found->second;
}

}  // namespace

CUresult cuGetErrorName(CUresult error, const char** name) {
  const Text* text = find_text(error);
  if (!name) return CUDA_ERROR_INVALID_VALUE;
  *name = text ? text->name : nullptr;
  return text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** description) {
  const Text* text = find_text(error);
  if (!description) return CUDA_ERROR_INVALID_VALUE;
  *description = text ? text->description.c_str() : nullptr;
  return text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
