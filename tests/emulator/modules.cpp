// Modules, functions and kernel launches. The PTX tells the names and the parameters; what runs is
// the C++ twin of the kernel.
#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <regex>

extern "C" int emulated_kernel_launch(const char* name, const unsigned grid[3],
                                      const unsigned block[3], void** params);
extern "C" int emulated_kernel_parameters(const char* name, unsigned sizes[16]);

namespace emulator {
namespace {

thread_local sigjmp_buf* way_out = nullptr;
thread_local CUresult kernel_error = CUDA_SUCCESS;
struct sigaction previous_action;

// A bad address in a kernel is the device's fault, not the end of the process.
void leave_on_fault(int signal, siginfo_t* info, void* context) {
  if (way_out) siglongjmp(*way_out, 1);
  sigaction(signal, &previous_action, nullptr);
  (void)info;
  (void)context;
}

void install_fault_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_sigaction = leave_on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_action);
  });
}

// The newest PTX that a driver reads, by CUDA version.
int newest_ptx(int cuda_version) {
  const std::map<int, int> known{{12040, 84}, {12050, 85}, {12060, 85}, {12080, 87},
                                 {12090, 88}, {13000, 90}, {13010, 91}};
  auto after = known.upper_bound(cuda_version);
  return after == known.begin() ? 83 : std::prev(after)->second;
}

CUresult check_image(const char* image) {
  if (std::memcmp(image, "\x7f" "ELF", 4) == 0) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  int major = 0, minor = 0, arch = 0;
  const char* version = std::strstr(image, ".version ");
  const char* target = std::strstr(image, ".target sm_");
  if (!version || std::sscanf(version, ".version %d.%d", &major, &minor) != 2) {
    return CUDA_ERROR_INVALID_IMAGE;
  }
  if (major * 10 + minor > newest_ptx(state().settings.version)) {
    return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  }
  const bool has_target = target && std::sscanf(target, ".target sm_%d", &arch) == 1;
  return has_target && arch <= state().settings.arch ? CUDA_SUCCESS : CUDA_ERROR_INVALID_PTX;
}

std::shared_ptr<Function> read_function(const std::string& ptx, const std::string& name) {
  const std::size_t start = ptx.find(".entry " + name + "(");
  if (start == std::string::npos) return nullptr;
  const std::string text = ptx.substr(start, ptx.find(')', start) - start);
  auto function = std::make_shared<Function>();
  function->name = name;
  static const std::regex parameter(
      R"(\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)[^,\[]*(?:\[(\d+)\])?)");
  std::size_t end = 0;
  for (std::sregex_iterator found(text.begin(), text.end(), parameter), none; found != none;
       ++found) {
    const std::size_t element = std::stoul((*found)[2]) / 8;
    const std::size_t count = (*found)[3].matched ? std::stoul((*found)[3]) : 1;
    const std::size_t align = (*found)[1].matched ? std::stoul((*found)[1]) : element;
    end = (end + align - 1) / align * align;
    function->parameters.push_back({end, element * count});
    end += element * count;
  }
  function->parameter_bytes = end;
  return function;
}

// Whether the checked-in PTX and the C++ twin have the same parameters.
bool matches_twin(const Function& function) {
  unsigned sizes[16];
  const int count = emulated_kernel_parameters(function.name.c_str(), sizes);
  if (count < 0) return true;  // it is launching that fails
  bool is_same = function.parameters.size() == static_cast<std::size_t>(count);
  for (int k = 0; is_same && k < count; ++k) is_same = function.parameters[k].bytes == sizes[k];
  return is_same;
}

CUresult load(CUmodule* module, const void* image, const Call& call) {
  if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
  const char* text = static_cast<const char*>(image);
  if (CUresult wrong = check_image(text)) return wrong;
  auto loaded = std::make_shared<Module>();
  loaded->handle = *module = state().modules.next();
  loaded->context = call.context;
  loaded->ptx = text;
  state().modules.add(loaded);
  return CUDA_SUCCESS;
}

void unload(CUmodule handle) {
  for (const auto& [name, function] : state().modules.find(handle)->functions) {
    state().functions.remove(function);
  }
  state().modules.remove(handle);
}

// One packed buffer: the driver's other way to pass arguments.
CUresult find_buffer(void** extra, const Function& function, const char*& buffer) {
  std::size_t bytes = 0;
  for (int k = 0; extra[k] != CU_LAUNCH_PARAM_END && k < 4; k += 2) {
    if (extra[k] == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = static_cast<char*>(extra[k + 1]);
    if (extra[k] == CU_LAUNCH_PARAM_BUFFER_SIZE) bytes = *static_cast<std::size_t*>(extra[k + 1]);
  }
  if (bytes == function.parameter_bytes && (buffer || !bytes)) return CUDA_SUCCESS;
  report("%s takes %zu bytes of arguments, got %zu", function.name.c_str(),
         function.parameter_bytes, bytes);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult pack_arguments(const Function& function, void** params, void** extra,
                        std::vector<char>& packed) {
  packed.resize(function.parameter_bytes);
  if (extra) {
    const char* buffer = nullptr;
    if (params) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult wrong = find_buffer(extra, function, buffer)) return wrong;
    std::memcpy(packed.data(), buffer, packed.size());
    return CUDA_SUCCESS;
  }
  if (!params && !function.parameters.empty()) return CUDA_ERROR_INVALID_VALUE;
  for (std::size_t k = 0; k < function.parameters.size(); ++k) {
    const Parameter& one = function.parameters[k];
    std::memcpy(packed.data() + one.offset, params[k], one.bytes);
  }
  return CUDA_SUCCESS;
}

// A kernel takes 64 bits for an address or the handle of a condition; 0 stands for neither.
std::vector<Range> addresses_in(const Function& function, const std::vector<char>& packed) {
  std::vector<Range> addresses;
  for (const Parameter& one : function.parameters) {
    if (one.bytes != sizeof(Address)) continue;
    Address value = 0;
    std::memcpy(&value, packed.data() + one.offset, sizeof(value));
    if (value != 0) addresses.push_back({value, 0});
  }
  return addresses;
}

CUresult run_kernel(const std::string& name, const unsigned grid[3], const unsigned block[3],
                    std::vector<void*>& params) {
  ++state().num_launches;
  int found = 0;
  kernel_error = CUDA_SUCCESS;
  CUresult fault = run_guarded(
      [&] { found = emulated_kernel_launch(name.c_str(), grid, block, params.data()); });
  if (fault) report("%s: illegal address", name.c_str());
  if (!fault && !found) report("%s: no such kernel in host_kernels.h", name.c_str());
  if (fault) return fault;
  return found ? kernel_error : CUDA_ERROR_LAUNCH_FAILED;
}

bool is_launchable(const unsigned grid[3], const unsigned block[3], unsigned shared_bytes) {
  for (int k = 0; k < 3; ++k) {
    if (!grid[k] || !block[k]) return false;
  }
  return block[0] * block[1] * block[2] <= 1024 && block[2] <= 64 && grid[1] <= 65535 &&
         grid[2] <= 65535 && shared_bytes <= 49152;
}

struct Launch {
  std::string name;
  unsigned grid[3], block[3];
  std::vector<char> packed;
  std::vector<Parameter> parameters;
};

CUresult launch(Launch& launch) {
  std::vector<void*> params;
  for (const Parameter& one : launch.parameters) params.push_back(launch.packed.data() + one.offset);
  return run_kernel(launch.name, launch.grid, launch.block, params);
}

}  // namespace

CUresult run_guarded(const std::function<void()>& body) {
  install_fault_handler();
  sigjmp_buf here;
  if (sigsetjmp(here, 1)) {
    way_out = nullptr;
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  way_out = &here;
  body();
  way_out = nullptr;
  return CUDA_SUCCESS;
}

bool are_usable(const std::vector<Range>& uses) {
  for (const Range& range : uses) {
    if (is_device_range(range)) continue;
    const Allocation* pinned = find_allocation(range.address);
    const bool is_host_side = range.bytes && pinned && pinned->kind != Allocation::kDevice;
    auto condition = state().conditions.find(range.address);
    const bool is_condition =
        condition != state().conditions.end() && !condition->second.expired();
    if (is_host_side || is_condition) continue;
    report("%#zx is no device address", static_cast<std::size_t>(range.address));
    return false;
  }
  return true;
}

void unload_modules_of(Context& context) {
  std::vector<CUmodule> its_own;
  for (const auto& [handle, module] : state().modules.objects) {
    if (module->context == &context) its_own.push_back(handle);
  }
  for (CUmodule handle : its_own) unload(handle);
}

}  // namespace emulator

using namespace emulator;

// What kernels call. A condition may be set only while its graph runs.
extern "C" void cudaGraphSetConditional(unsigned long long handle, unsigned value) {
  std::lock_guard<std::mutex> lock(state().mutex);
  auto found = state().conditions.find(handle);
  ConditionPtr condition = found == state().conditions.end() ? nullptr : found->second.lock();
  if (condition && condition->num_running > 0) {
    condition->value = value;
    return;
  }
  report("cudaGraphSetConditional: no running graph has the condition %#llx", handle);
  kernel_error = CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  EMULATOR_CALL(cuModuleLoadData, kContext);
  return load(module, image, call);
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned num_options,
                            CUjit_option* options, void** values) {
  EMULATOR_CALL(cuModuleLoadDataEx, kContext);
  for (unsigned k = 0; k < num_options; ++k) {
    const bool is_log_size = options[k] == CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES ||
                             options[k] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES;
    if (is_log_size) values[k] = nullptr;  // how much of the log was written
  }
  return load(module, image, call);
}

CUresult cuModuleUnload(CUmodule module) {
  EMULATOR_CALL(cuModuleUnload, kContext);
  if (!state().modules.find(module)) return CUDA_ERROR_INVALID_HANDLE;
  unload(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  EMULATOR_CALL(cuModuleGetFunction, kContext);
  Module* found = state().modules.find(module);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (!function || !name || !*name) return CUDA_ERROR_INVALID_VALUE;
  auto known = found->functions.find(name);
  if (known == found->functions.end()) {
    std::shared_ptr<Function> read = read_function(found->ptx, name);
    if (!read) return CUDA_ERROR_NOT_FOUND;
    if (!matches_twin(*read)) {
      report("%s: its PTX and its C++ twin have other parameters", name);
      return CUDA_ERROR_INVALID_IMAGE;
    }
    read->handle = state().functions.next();
    state().functions.add(read);
    known = found->functions.emplace(name, read->handle).first;
  }
  *function = known->second;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  EMULATOR_CALL(cuFuncGetAttribute, kContext);
  if (!state().functions.find(function)) return CUDA_ERROR_INVALID_HANDLE;
  if (!value) return CUDA_ERROR_INVALID_VALUE;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

// Obsolete, yet PyCUDA makes it before a prepared call; the launch says the shape again.
CUresult cuFuncSetBlockShape(CUfunction function, int x, int y, int z) {
  EMULATOR_CALL(cuFuncSetBlockShape, kContext);
  if (!state().functions.find(function)) return CUDA_ERROR_INVALID_HANDLE;
  return x > 0 && y > 0 && z > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z,
                        unsigned shared_bytes, CUstream stream, void** params, void** extra) {
  EMULATOR_CALL(cuLaunchKernel, kContext);
  Function* found = state().functions.find(function);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  Launch wanted{found->name, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, {},
                found->parameters};
  if (!is_launchable(wanted.grid, wanted.block, shared_bytes)) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult wrong = pack_arguments(*found, params, extra, wanted.packed)) return wrong;
  Work work{CU_GRAPH_NODE_TYPE_KERNEL, nullptr, addresses_in(*found, wanted.packed)};
  Stream* on = find_stream(call, stream);
  const bool is_usable = (on && on->capture) || are_usable(work.uses);  // a graph asks at launch
  work.run = [wanted, is_usable]() mutable {
    return is_usable ? launch(wanted) : CUDA_ERROR_ILLEGAL_ADDRESS;
  };
  return submit(call, stream, std::move(work));
}
