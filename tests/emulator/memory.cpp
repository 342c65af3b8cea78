// Memory: allocations with their limits, copies, fills.
//
// Fresh memory holds 0xCD, as a GPU's is not zero. Behind each allocation lies a page that nobody
// may touch, and what is left of its own last page is looked at when it is freed.
#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

constexpr int kFresh = 0xCD;
constexpr int kBehind = 0xFD;

// Freed memory that queued work may still use: given back once that work is done.
struct Dying {
  Address base;
  std::size_t bytes;
  std::vector<MarkerPtr> users;
};
std::vector<Dying> dying;

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

std::size_t whole_pages(std::size_t bytes) {
  return (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

void give_back_done() {
  auto is_done = [](const Dying& one) {
    for (const MarkerPtr& user : one.users) {
      if (!user->is_done) return false;
    }
    munmap(reinterpret_cast<void*>(one.base), whole_pages(one.bytes) + page_bytes());
    return true;
  };
  dying.erase(std::remove_if(dying.begin(), dying.end(), is_done), dying.end());
}

std::size_t used_bytes() {
  std::size_t bytes = 0;
  for (const auto& [base, allocation] : state().allocations) {
    bool is_on_device = allocation.kind == Allocation::kDevice ||
                        (allocation.kind == Allocation::kHost && state().settings.is_integrated);
    if (is_on_device) bytes += allocation.bytes;
  }
  return bytes;
}

bool counts_as_device(Allocation::Kind kind) {
  return kind == Allocation::kDevice || state().settings.is_integrated;
}

CUresult allocate(const Call& call, Allocation::Kind kind, std::size_t bytes, unsigned flags,
                  Address* address) {
  if (!address || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  give_back_done();
  const std::size_t limit = state().settings.memory_bytes;
  if (counts_as_device(kind) && bytes > limit - std::min(limit, used_bytes())) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  const std::size_t body = whole_pages(bytes);
  void* memory = mmap(nullptr, body + page_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = reinterpret_cast<Address>(memory);
  mprotect(static_cast<char*>(memory) + body, page_bytes(), PROT_NONE);
  std::memset(memory, kFresh, bytes);
  std::memset(static_cast<char*>(memory) + bytes, kBehind, body - bytes);
  state().allocations[*address] = Allocation{kind, *address, bytes, flags, call.context};
  return CUDA_SUCCESS;
}

bool is_written_behind(const Allocation& allocation) {
  const auto* end = reinterpret_cast<const unsigned char*>(allocation.base + allocation.bytes);
  const auto* last = end + (whole_pages(allocation.bytes) - allocation.bytes);
  return std::any_of(end, last, [](unsigned char byte) { return byte != kBehind; });
}

void forget(const Allocation& allocation) {
  Dying one{allocation.base, allocation.bytes, {}};
  for (const auto& [handle, stream] : state().streams.objects) {
    if (stream->tail) one.users.push_back(stream->tail);
  }
  if (allocation.kind != Allocation::kRegistered) dying.push_back(std::move(one));
  state().allocations.erase(allocation.base);
  give_back_done();
}

CUresult release(Call& call, Address address, Allocation::Kind kind) {
  auto found = state().allocations.find(address);
  if (found == state().allocations.end() || found->second.kind != kind) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const bool is_spoilt = kind != Allocation::kRegistered && is_written_behind(found->second);
  if (is_spoilt) {
    report("wrote behind the end of an allocation of %zu bytes", found->second.bytes);
    call.context->sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  forget(found->second);
  return is_spoilt ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

struct Side {
  Address address;
  std::size_t pitch;
  bool is_host;
  bool is_pageable = false;
};

struct Copy {
  Side to, from;
  std::size_t width, rows;
};

std::size_t extent(const Side& side, const Copy& copy) {
  return copy.rows ? (copy.rows - 1) * side.pitch + copy.width : 0;
}

CUresult check_side(Side& side, const Copy& copy) {
  if (copy.rows > 1 && side.pitch < copy.width) return CUDA_ERROR_INVALID_VALUE;
  const Range range{side.address, extent(side, copy)};
  if (!side.is_host) return is_device_range(range) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  if (!side.address) return CUDA_ERROR_INVALID_VALUE;
  const Allocation* pinned = find_allocation(side.address);
  side.is_pageable = pinned == nullptr;
  if (!pinned) return CUDA_SUCCESS;
  const bool fits = side.address + range.bytes <= pinned->base + pinned->bytes;
  return pinned->kind != Allocation::kDevice && fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

void move_rows(const Copy& copy) {
  for (std::size_t row = 0; row < copy.rows; ++row) {
    std::memcpy(reinterpret_cast<void*>(copy.to.address + row * copy.to.pitch),
                reinterpret_cast<const void*>(copy.from.address + row * copy.from.pitch),
                copy.width);
  }
}

// As the driver: pageable memory is read before the call returns, and written before it returns;
// pinned memory is touched whenever the stream gets there, unless the call is a synchronous one.
CUresult copy_on(Call& call, CUstream stream, Copy copy, bool is_synchronous) {
  if (copy.width == 0 || copy.rows == 0) return CUDA_SUCCESS;
  if (CUresult wrong = check_side(copy.to, copy)) return wrong;
  if (CUresult wrong = check_side(copy.from, copy)) return wrong;
  Stream* found = find_stream(call, stream);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;

  Work work{CU_GRAPH_NODE_TYPE_MEMCPY, nullptr};
  for (const Side& side : {copy.to, copy.from}) {
    if (!side.is_pageable) work.uses.push_back({side.address, extent(side, copy)});
    work.touches_pageable |= side.is_pageable;
  }
  std::vector<char> staged;
  if (copy.from.is_pageable && !found->capture) {
    const auto* source = reinterpret_cast<const char*>(copy.from.address);
    staged.assign(source, source + extent(copy.from, copy));
  }
  work.run = [copy, staged = std::move(staged)]() mutable {
    if (!staged.empty()) copy.from.address = reinterpret_cast<Address>(staged.data());
    return run_guarded([&] { move_rows(copy); });
  };
  MarkerPtr done;
  if (CUresult failed = submit(call, stream, std::move(work), &done)) return failed;
  const bool has_pinned_host = (copy.to.is_host && !copy.to.is_pageable) ||
                               (copy.from.is_host && !copy.from.is_pageable);
  const bool waits = copy.to.is_pageable || (is_synchronous && has_pinned_host);
  return done && waits ? wait_for(call, done) : CUDA_SUCCESS;
}

Side host(const void* address) { return {reinterpret_cast<Address>(address), 0, true}; }
Side device(CUdeviceptr address) { return {static_cast<Address>(address), 0, false}; }

CUresult copy_line(Call& call, CUstream stream, Side to, Side from, std::size_t bytes,
                   bool is_synchronous) {
  return copy_on(call, stream, Copy{to, from, bytes, 1}, is_synchronous);
}

CUresult copy_2d(Call& call, CUstream stream, const CUDA_MEMCPY2D* wanted, bool is_synchronous) {
  if (!wanted) return CUDA_ERROR_INVALID_VALUE;
  auto side = [](CUmemorytype type, const void* in_host, CUdeviceptr on_device, std::size_t pitch,
                 std::size_t x, std::size_t y) {
    Side made = type == CU_MEMORYTYPE_HOST ? host(in_host) : device(on_device);
    made.address += y * pitch + x;
    made.pitch = pitch;
    return made;
  };
  for (CUmemorytype type : {wanted->srcMemoryType, wanted->dstMemoryType}) {
    if (type != CU_MEMORYTYPE_HOST && type != CU_MEMORYTYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
  }
  const CUDA_MEMCPY2D& w = *wanted;
  Copy copy{side(w.dstMemoryType, w.dstHost, w.dstDevice, w.dstPitch, w.dstXInBytes, w.dstY),
            side(w.srcMemoryType, w.srcHost, w.srcDevice, w.srcPitch, w.srcXInBytes, w.srcY),
            w.WidthInBytes, w.Height};
  return copy_on(call, stream, copy, is_synchronous);
}

template <class Value>
CUresult fill(Call& call, CUstream stream, CUdeviceptr address, Value value, std::size_t count) {
  const auto start = static_cast<Address>(address);
  const Range range{start, count * sizeof(Value)};
  if (count == 0) return CUDA_SUCCESS;
  if (start % sizeof(Value) || !is_device_range(range)) return CUDA_ERROR_INVALID_VALUE;
  auto run = [start, value, count] {
    return run_guarded([&] { std::fill_n(reinterpret_cast<Value*>(start), count, value); });
  };
  return submit(call, stream, Work{CU_GRAPH_NODE_TYPE_MEMSET, run, {range}});
}

}  // namespace

const Allocation* find_allocation(Address address) {
  auto next = state().allocations.upper_bound(address);
  if (next == state().allocations.begin()) return nullptr;
  const Allocation& before = std::prev(next)->second;
  return address < before.base + before.bytes ? &before : nullptr;
}

bool is_device_range(const Range& range) {
  const Allocation* found = find_allocation(range.address);
  if (!found) return false;
  const bool is_seen = found->kind == Allocation::kDevice ||
                       (found->flags & CU_MEMHOSTALLOC_DEVICEMAP);
  return is_seen && range.address + range.bytes <= found->base + found->bytes;
}

void free_memory_of(Context& context) {
  std::vector<Allocation> its_own;
  for (const auto& [base, allocation] : state().allocations) {
    if (allocation.context == &context) its_own.push_back(allocation);
  }
  for (const Allocation& allocation : its_own) forget(allocation);
}

}  // namespace emulator

using namespace emulator;

CUresult cuMemAlloc_v2(CUdeviceptr* address, std::size_t bytes) {
  EMULATOR_CALL(cuMemAlloc_v2, kContext | kUnsafe);
  Address made = 0;
  if (!address) return CUDA_ERROR_INVALID_VALUE;
  CUresult result = allocate(call, Allocation::kDevice, bytes, 0, &made);
  if (result == CUDA_SUCCESS) *address = made;
  return result;
}

CUresult cuMemAllocPitch_v2(CUdeviceptr* address, std::size_t* pitch, std::size_t width,
                            std::size_t rows, unsigned element) {
  EMULATOR_CALL(cuMemAllocPitch_v2, kContext | kUnsafe);
  if (!address || !pitch || (element != 4 && element != 8 && element != 16)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Address made = 0;
  *pitch = (width + 511) / 512 * 512;
  CUresult result = allocate(call, Allocation::kDevice, *pitch * rows, 0, &made);
  if (result == CUDA_SUCCESS) *address = made;
  return result;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  EMULATOR_CALL(cuMemFree_v2, kContext | kUnsafe);
  if (!address) return CUDA_SUCCESS;
  return release(call, static_cast<Address>(address), Allocation::kDevice);
}

// Stream-ordered allocation: as a node it must be refused in the body of a conditional node.
CUresult cuMemAllocAsync(CUdeviceptr* address, std::size_t bytes, CUstream stream) {
  EMULATOR_CALL(cuMemAllocAsync, kContext);
  Address made = 0;
  if (!address) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult wrong = allocate(call, Allocation::kDevice, bytes, 0, &made)) return wrong;
  *address = made;
  return submit(call, stream, Work{CU_GRAPH_NODE_TYPE_MEM_ALLOC, [] { return CUDA_SUCCESS; }});
}

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  EMULATOR_CALL(cuMemFreeAsync, kContext);
  Stream* found = find_stream(call, stream);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (found->capture) {
    return record(*found, Work{CU_GRAPH_NODE_TYPE_MEM_FREE, [] { return CUDA_SUCCESS; }});
  }
  return release(call, static_cast<Address>(address), Allocation::kDevice);
}

CUresult cuMemHostAlloc(void** address, std::size_t bytes, unsigned flags) {
  EMULATOR_CALL(cuMemHostAlloc, kContext | kUnsafe);
  Address made = 0;
  if (!address || flags > 7) return CUDA_ERROR_INVALID_VALUE;
  CUresult result = allocate(call, Allocation::kHost, bytes, flags, &made);
  if (result == CUDA_SUCCESS) *address = reinterpret_cast<void*>(made);
  return result;
}

CUresult cuMemFreeHost(void* address) {
  EMULATOR_CALL(cuMemFreeHost, kContext | kUnsafe);
  return release(call, reinterpret_cast<Address>(address), Allocation::kHost);
}

CUresult cuMemHostRegister_v2(void* address, std::size_t bytes, unsigned flags) {
  EMULATOR_CALL(cuMemHostRegister_v2, kContext | kUnsafe);
  const auto base = reinterpret_cast<Address>(address);
  if (!base || !bytes) return CUDA_ERROR_INVALID_VALUE;
  if (find_allocation(base) || find_allocation(base + bytes - 1)) {
    return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  }
  Allocation made{Allocation::kRegistered, base, bytes, flags, call.context};
  state().allocations[base] = made;
  return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void* address) {
  EMULATOR_CALL(cuMemHostUnregister, kContext | kUnsafe);
  CUresult result = release(call, reinterpret_cast<Address>(address), Allocation::kRegistered);
  return result ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* on_device, void* address, unsigned flags) {
  EMULATOR_CALL(cuMemHostGetDevicePointer_v2, kContext);
  const auto wanted = reinterpret_cast<Address>(address);
  const Allocation* found = find_allocation(wanted);
  const bool is_mapped = found && found->kind != Allocation::kDevice && is_device_range({wanted, 0});
  if (!on_device || flags || !is_mapped) return CUDA_ERROR_INVALID_VALUE;
  *on_device = wanted;
  return CUDA_SUCCESS;
}

CUresult cuMemHostGetFlags(unsigned* flags, void* address) {
  EMULATOR_CALL(cuMemHostGetFlags, kContext);
  const Allocation* found = find_allocation(reinterpret_cast<Address>(address));
  if (!flags || !found || found->kind != Allocation::kHost) return CUDA_ERROR_INVALID_VALUE;
  *flags = found->flags;
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  EMULATOR_CALL(cuMemGetInfo_v2, kContext);
  if (!free || !total) return CUDA_ERROR_INVALID_VALUE;
  *total = state().settings.memory_bytes;
  *free = *total - std::min(*total, used_bytes());
  return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, std::size_t* bytes, CUdeviceptr address) {
  EMULATOR_CALL(cuMemGetAddressRange_v2, kContext);
  const Allocation* found = find_allocation(static_cast<Address>(address));
  if (!found) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = found->base;
  if (bytes) *bytes = found->bytes;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr address) {
  EMULATOR_CALL(cuPointerGetAttribute, kContext);
  const Allocation* found = find_allocation(static_cast<Address>(address));
  if (!data || !found) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: {
      const bool is_device = found->kind == Allocation::kDevice;
      *static_cast<unsigned*>(data) = is_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      return CUDA_SUCCESS;
    }
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      if (!is_device_range({static_cast<Address>(address), 0})) return CUDA_ERROR_INVALID_VALUE;
      *static_cast<CUdeviceptr*>(data) = address;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(data) = found->context->device;
      return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, std::size_t bytes) {
  EMULATOR_CALL(cuMemcpyHtoD_v2, kContext | kUnsafe);
  return copy_line(call, nullptr, device(to), host(from), bytes, true);
}

CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, std::size_t bytes) {
  EMULATOR_CALL(cuMemcpyDtoH_v2, kContext | kUnsafe);
  return copy_line(call, nullptr, host(to), device(from), bytes, true);
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
  EMULATOR_CALL(cuMemcpyDtoD_v2, kContext | kUnsafe);
  return copy_line(call, nullptr, device(to), device(from), bytes, true);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, std::size_t bytes, CUstream s) {
  EMULATOR_CALL(cuMemcpyHtoDAsync_v2, kContext);
  return copy_line(call, s, device(to), host(from), bytes, false);
}

CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, std::size_t bytes, CUstream s) {
  EMULATOR_CALL(cuMemcpyDtoHAsync_v2, kContext);
  return copy_line(call, s, host(to), device(from), bytes, false);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream s) {
  EMULATOR_CALL(cuMemcpyDtoDAsync_v2, kContext);
  return copy_line(call, s, device(to), device(from), bytes, false);
}

CUresult cuMemcpy2D_v2(const CUDA_MEMCPY2D* copy) {
  EMULATOR_CALL(cuMemcpy2D_v2, kContext | kUnsafe);
  return copy_2d(call, nullptr, copy, true);
}

CUresult cuMemcpy2DUnaligned_v2(const CUDA_MEMCPY2D* copy) {
  EMULATOR_CALL(cuMemcpy2DUnaligned_v2, kContext | kUnsafe);
  return copy_2d(call, nullptr, copy, true);
}

CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* copy, CUstream stream) {
  EMULATOR_CALL(cuMemcpy2DAsync_v2, kContext);
  return copy_2d(call, stream, copy, false);
}

CUresult cuMemsetD8_v2(CUdeviceptr address, unsigned char value, std::size_t count) {
  EMULATOR_CALL(cuMemsetD8_v2, kContext | kUnsafe);
  return fill(call, nullptr, address, value, count);
}

CUresult cuMemsetD32_v2(CUdeviceptr address, unsigned value, std::size_t count) {
  EMULATOR_CALL(cuMemsetD32_v2, kContext | kUnsafe);
  return fill(call, nullptr, address, value, count);
}

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, std::size_t count, CUstream s) {
  EMULATOR_CALL(cuMemsetD8Async, kContext);
  return fill(call, s, address, value, count);
}

CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, std::size_t count, CUstream s) {
  EMULATOR_CALL(cuMemsetD32Async, kContext);
  return fill(call, s, address, value, count);
}
