// A CUDA driver that executes on the CPU, so that the code above it runs on a machine without a GPU.
//
// Device memory is host memory, a stream is a worker thread, a kernel is its C++ twin (host_kernels.h).
// It is stricter than a driver: what a driver leaves undefined is an error here. Handles are numbers
// above 2^32, so a caller who drops their upper half is found.
#pragma once

// Declares every version of every call: an entry point with a wrong signature does not compile.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

static_assert(CUDA_VERSION >= 12080, "needs cuda.h of CUDA 12.8 or newer");

namespace emulator {

using Address = std::uintptr_t;
using Clock = std::chrono::steady_clock;

struct Context;
struct Graph;
struct Node;
struct Stream;

// A point in a stream's work; an event and a wait share it.
struct Marker {
  bool is_done = false;
  Clock::time_point time;
};
using MarkerPtr = std::shared_ptr<Marker>;

struct Range {
  Address address;
  std::size_t bytes;  // 0: one byte must be there, the extent is not known (a kernel's argument)
};

// What a stream executes and a graph records: a kernel, a copy, a fill, a host function.
struct Work {
  CUgraphNodeType type;
  std::function<CUresult()> run;
  std::vector<Range> uses{};
  bool touches_pageable = false;
};

struct Task {
  std::function<CUresult()> run;
  std::vector<MarkerPtr> waits;
  MarkerPtr done;
};

struct Capture {
  cuuint64_t id;
  Graph* graph;
  Stream* origin;
  bool owns_graph;  // else it captures into a graph that was there before
  CUstreamCaptureMode mode;
  std::thread::id thread;
  bool is_invalid = false;
  bool is_over = false;
  std::set<Stream*> streams{};
};
using CapturePtr = std::shared_ptr<Capture>;

struct Stream {
  CUstream handle;
  Context* context;
  unsigned flags;
  std::deque<Task> queue{};
  MarkerPtr tail{};  // done once all that was queued is
  bool is_closing = false;
  CapturePtr capture{};
  std::vector<CUgraphNode> dependencies{};      // of the next node captured
  std::vector<CUgraphNode> lent_dependencies{};  // what the last capture query pointed to
  bool is_blocking() const { return !(flags & CU_STREAM_NON_BLOCKING); }
};

struct Event {
  CUevent handle;
  Context* context;
  unsigned flags;
  MarkerPtr marker{};
  CapturePtr capture{};  // set when it was last recorded in a capture
  std::vector<CUgraphNode> captured{};
};

struct Context {
  CUcontext handle;
  CUdevice device;
  bool is_alive = true;
  CUresult sticky = CUDA_SUCCESS;  // after a failed kernel every call returns it
  std::shared_ptr<Stream> null_stream{};
};

struct Allocation {
  enum Kind { kDevice, kHost, kRegistered } kind;
  Address base;
  std::size_t bytes;
  unsigned flags;
  Context* context;
};

struct Parameter {
  std::size_t offset, bytes;
};

struct Function {
  CUfunction handle;
  std::string name;
  std::vector<Parameter> parameters;
  std::size_t parameter_bytes;
};

struct Module {
  CUmodule handle;
  Context* context;
  std::string ptx;
  std::map<std::string, CUfunction> functions{};
};

// The value that a conditional node tests; kernels set it.
struct Condition {
  CUgraphConditionalHandle id;
  Graph* graph;
  Context* context;
  unsigned default_value;
  bool has_default;
  bool has_node = false;
  unsigned value = 0xCDCDCDCD;
  int num_running = 0;
};
using ConditionPtr = std::shared_ptr<Condition>;

struct Node {
  CUgraphNode handle;
  Graph* graph;
  Work work;
  Context* context;
  std::vector<CUgraphNode> dependencies;
  std::unique_ptr<Graph> child{};
  ConditionPtr condition{};
  CUgraphConditionalNodeType condition_type{};
  std::vector<std::unique_ptr<Graph>> bodies{};
  std::vector<CUgraph> body_handles{};
};

struct Graph {
  CUgraph handle = nullptr;
  Node* parent = nullptr;  // of a child graph or a body
  std::vector<std::unique_ptr<Node>> nodes{};
  std::vector<ConditionPtr> conditions{};
  int num_captures = 0;
};

// An instantiated graph: its nodes in one order of execution.
struct Plan {
  struct Step {
    Work work;
    ConditionPtr condition;
    CUgraphConditionalNodeType condition_type;
    std::vector<std::shared_ptr<Plan>> graphs;  // the child graph, or the bodies
  };
  std::vector<Step> steps;
};

struct GraphExec {
  CUgraphExec handle;
  Context* context;
  std::shared_ptr<Plan> plan;
  std::vector<ConditionPtr> conditions;
  MarkerPtr last_launch{};
};

// A handle is never given twice, so one that was closed stays unknown, whatever its kind.
inline std::uintptr_t next_handle() {
  static std::atomic<std::uintptr_t> number{0x7ec000000000};
  return number += 0x40;
}

// Objects by handle.
template <class Handle, class Object>
class Registry {
 public:
  static Handle next() { return reinterpret_cast<Handle>(next_handle()); }
  void add(std::shared_ptr<Object> object) { objects[object->handle] = std::move(object); }
  Object* find(Handle handle) const {
    auto found = objects.find(handle);
    return found == objects.end() ? nullptr : found->second.get();
  }
  bool remove(Handle handle) { return objects.erase(handle) > 0; }
  void remove_those_of(const Context& context) {
    for (auto entry = objects.begin(); entry != objects.end();) {
      entry = entry->second->context == &context ? objects.erase(entry) : std::next(entry);
    }
  }

  std::unordered_map<Handle, std::shared_ptr<Object>> objects;
};

struct Settings {
  int version, arch, num_devices;
  bool is_integrated;
  std::size_t memory_bytes;
};

struct Failure {
  int countdown;
  CUresult code;
};

struct State {
  std::mutex mutex;  // guards all below; never held while work or a callback runs
  std::condition_variable changed;
  Settings settings;
  pid_t pid;
  bool is_initialised = false;

  std::string log;
  std::map<std::string, Failure> failures;
  std::atomic<int> num_launches{0};
  std::atomic<unsigned> latency_us{0};

  Registry<CUcontext, Context> contexts;
  Registry<CUstream, Stream> streams;
  Registry<CUevent, Event> events;
  Registry<CUmodule, Module> modules;
  Registry<CUfunction, Function> functions;
  Registry<CUgraphExec, GraphExec> execs;
  std::unordered_map<CUgraph, Graph*> graphs;
  std::unordered_map<CUgraphNode, Node*> nodes;
  std::map<CUgraph, std::unique_ptr<Graph>> owned_graphs;
  std::map<CUgraphConditionalHandle, std::weak_ptr<Condition>> conditions;
  std::map<Address, Allocation> allocations;
  std::vector<CapturePtr> captures;

  struct Primary {
    Context* context = nullptr;
    int num_retained = 0;
    unsigned flags = 0;
  };
  std::vector<Primary> primaries;
};

State& state();

// What a call asks for before it does anything.
enum Needs : unsigned {
  kNothing = 0,
  kInit = 1,
  kContext = 3,       // a current context
  kUnsafe = 4,        // may not be called while a capture is under way
};

// The entry to every driver call: logs it, takes the lock, and finds why it cannot go on.
struct Call {
  Call(const char* name, unsigned needs);
  CUresult error = CUDA_SUCCESS;
  Context* context = nullptr;
  std::unique_lock<std::mutex> lock{};
};

#define EMULATOR_CALL(name, needs)          \
  ::emulator::Call call(#name, needs);      \
  if (call.error != CUDA_SUCCESS) return call.error

// device.cpp
Settings read_settings();
Context* current_context();
extern thread_local bool is_worker;  // this thread runs a stream's work
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

// streams.cpp
Stream* find_stream(const Call& call, CUstream handle);
CUresult check_not_captured(Stream& stream);
MarkerPtr enqueue(Stream& stream, std::function<CUresult()> run, std::vector<MarkerPtr> waits = {});
CUresult submit(Call& call, CUstream stream, Work work, MarkerPtr* done = nullptr);
CUresult wait_for(Call& call, const MarkerPtr& marker);
void close_streams_of(Context& context);

// capture.cpp
Node* add_node(Graph& graph, Work work, Context* context, std::vector<CUgraphNode> dependencies);
CUresult record(Stream& stream, Work work);
void invalidate(Capture& capture);
CUresult check_capture_allows_unsafe_calls();
CUresult check_capture_allows_null_stream(const Context& context);
CUresult record_event(Stream& stream, Event& event);
CUresult wait_in_capture(Stream& stream, Event& event);
void leave_capture(Stream& stream);

// graphs.cpp
Graph* new_graph(Node* parent);
void forget_graph(Graph& graph);

// memory.cpp
const Allocation* find_allocation(Address address);
bool is_device_range(const Range& range);
void free_memory_of(Context& context);

// modules.cpp
void unload_modules_of(Context& context);
CUresult run_guarded(const std::function<void()>& body);
bool are_usable(const std::vector<Range>& uses);

}  // namespace emulator
