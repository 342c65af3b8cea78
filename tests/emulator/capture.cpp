// Stream capture: what a stream records instead of executing it, and who may call what meanwhile.
#include "emulator.h"

#include <algorithm>

namespace emulator {
namespace {

thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
cuuint64_t num_captures = 0;

bool forbids_unsafe_calls(const Capture& capture) {
  if (capture.mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
  if (capture.thread == std::this_thread::get_id()) return true;
  return thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
         capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
}

void merge(std::vector<CUgraphNode>& into, const std::vector<CUgraphNode>& more) {
  for (CUgraphNode node : more) {
    if (std::find(into.begin(), into.end(), node) == into.end()) into.push_back(node);
  }
}

// The array that a capture query lends is the driver's: after the next operation it holds junk.
void change_dependencies(Stream& stream, std::vector<CUgraphNode> dependencies) {
  stream.dependencies = std::move(dependencies);
  auto junk = reinterpret_cast<CUgraphNode>(0xDEADDEADDEADDEAD);
  std::fill(stream.lent_dependencies.begin(), stream.lent_dependencies.end(), junk);
}

std::set<CUgraphNode> ancestors(const std::vector<CUgraphNode>& nodes) {
  std::set<CUgraphNode> seen;
  std::vector<CUgraphNode> open = nodes;
  while (!open.empty()) {
    CUgraphNode node = open.back();
    open.pop_back();
    if (!seen.insert(node).second) continue;
    auto found = state().nodes.find(node);
    if (found == state().nodes.end()) continue;
    open.insert(open.end(), found->second->dependencies.begin(), found->second->dependencies.end());
  }
  return seen;
}

// Whether the work of every stream that joined the capture is waited for by its origin.
bool is_joined(const Capture& capture) {
  std::set<CUgraphNode> reached = ancestors(capture.origin->dependencies);
  for (const Stream* stream : capture.streams) {
    for (CUgraphNode node : stream->dependencies) {
      if (!reached.count(node)) return false;
    }
  }
  return true;
}

void end_capture(Capture& capture) {
  for (Stream* stream : capture.streams) {
    stream->capture.reset();
    change_dependencies(*stream, {});
  }
  capture.is_over = true;
  --capture.graph->num_captures;
  auto& captures = state().captures;
  auto is_this = [&](const CapturePtr& other) { return other.get() == &capture; };
  captures.erase(std::remove_if(captures.begin(), captures.end(), is_this), captures.end());
}

CUresult begin(const Call& call, CUstream handle, Graph* graph, CUstreamCaptureMode mode,
               std::vector<CUgraphNode> dependencies) {
  if (mode < CU_STREAM_CAPTURE_MODE_GLOBAL || mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Stream* stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream == call.context->null_stream.get()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  bool owns_graph = graph == nullptr;
  if (owns_graph) graph = new_graph(nullptr);
  stream->capture = std::make_shared<Capture>(Capture{
      ++num_captures, graph, stream, owns_graph, mode, std::this_thread::get_id()});
  stream->capture->streams.insert(stream);
  ++graph->num_captures;
  change_dependencies(*stream, std::move(dependencies));
  state().captures.push_back(stream->capture);
  return CUDA_SUCCESS;
}

bool are_nodes_of(const Graph& graph, const CUgraphNode* nodes, std::size_t count) {
  if (count > graph.nodes.size() || (count && !nodes)) return false;
  return std::all_of(nodes, nodes + count, [&](CUgraphNode node) {
    auto found = state().nodes.find(node);
    return found != state().nodes.end() && found->second->graph == &graph;
  });
}

struct Info {
  CUstreamCaptureStatus* status;
  cuuint64_t* id;
  CUgraph* graph;
  const CUgraphNode** dependencies;
  std::size_t* num_dependencies;
};

CUresult query(const Call& call, CUstream handle, const Info& info) {
  Stream* stream = find_stream(call, handle);
  if (!info.status || !stream) return stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
  *info.status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (!stream->capture) return CUDA_SUCCESS;
  *info.status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
  if (stream->capture->is_invalid) return CUDA_SUCCESS;
  *info.status = CU_STREAM_CAPTURE_STATUS_ACTIVE;
  stream->lent_dependencies = stream->dependencies;
  if (info.id) *info.id = stream->capture->id;
  if (info.graph) *info.graph = stream->capture->graph->handle;
  if (info.dependencies) *info.dependencies = stream->lent_dependencies.data();
  if (info.num_dependencies) *info.num_dependencies = stream->lent_dependencies.size();
  return CUDA_SUCCESS;
}

CUresult update(const Call& call, CUstream handle, const CUgraphNode* nodes, std::size_t count,
                unsigned flags) {
  Stream* stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  if (flags > CU_STREAM_SET_CAPTURE_DEPENDENCIES) return CUDA_ERROR_INVALID_VALUE;
  if (!are_nodes_of(*stream->capture->graph, nodes, count)) return CUDA_ERROR_INVALID_VALUE;
  std::vector<CUgraphNode> dependencies;
  if (flags == CU_STREAM_ADD_CAPTURE_DEPENDENCIES) dependencies = stream->dependencies;
  merge(dependencies, {nodes, nodes + count});
  change_dependencies(*stream, std::move(dependencies));
  return CUDA_SUCCESS;
}

}  // namespace

void invalidate(Capture& capture) { capture.is_invalid = true; }

CUresult check_capture_allows_unsafe_calls() {
  if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  CUresult result = CUDA_SUCCESS;
  for (const CapturePtr& capture : state().captures) {
    if (!forbids_unsafe_calls(*capture)) continue;
    invalidate(*capture);
    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return result;
}

CUresult check_capture_allows_null_stream(const Context& context) {
  for (const CapturePtr& capture : state().captures) {
    const Stream& origin = *capture->origin;
    bool depends = origin.context == &context && origin.is_blocking();
    if (!depends) continue;
    invalidate(*capture);
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  }
  return CUDA_SUCCESS;
}

CUresult record(Stream& stream, Work work) {
  Capture& capture = *stream.capture;
  if (capture.is_invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  Node* node = add_node(*capture.graph, std::move(work), stream.context, stream.dependencies);
  change_dependencies(stream, {node->handle});
  return CUDA_SUCCESS;
}

void leave_capture(Stream& stream) {
  if (!stream.capture) return;
  CapturePtr capture = stream.capture;
  invalidate(*capture);
  if (capture->origin == &stream) {
    end_capture(*capture);
    if (capture->owns_graph) forget_graph(*capture->graph);
  } else {
    capture->streams.erase(&stream);
    stream.capture.reset();
  }
}

CUresult record_event(Stream& stream, Event& event) {
  if (stream.capture->is_invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  event.marker.reset();
  event.capture = stream.capture;
  event.captured = stream.dependencies;
  return CUDA_SUCCESS;
}

CUresult wait_in_capture(Stream& stream, Event& event) {
  if (!event.capture) {
    invalidate(*stream.capture);
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (event.capture->is_over) return CUDA_ERROR_CAPTURED_EVENT;
  if (event.capture->is_invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (stream.capture && stream.capture != event.capture) {
    invalidate(*stream.capture);
    invalidate(*event.capture);
    return CUDA_ERROR_STREAM_CAPTURE_MERGE;
  }
  if (&stream == stream.context->null_stream.get()) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  stream.capture = event.capture;
  stream.capture->streams.insert(&stream);
  std::vector<CUgraphNode> dependencies = stream.dependencies;
  merge(dependencies, event.captured);
  change_dependencies(stream, std::move(dependencies));
  return CUDA_SUCCESS;
}

}  // namespace emulator

using namespace emulator;

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
  EMULATOR_CALL(cuStreamBeginCapture_v2, kContext);
  return begin(call, stream, nullptr, mode, {});
}

CUresult cuStreamBeginCaptureToGraph(CUstream stream, CUgraph graph, const CUgraphNode* nodes,
                                     const CUgraphEdgeData*, std::size_t count,
                                     CUstreamCaptureMode mode) {
  EMULATOR_CALL(cuStreamBeginCaptureToGraph, kContext);
  auto found = state().graphs.find(graph);
  if (found == state().graphs.end()) return CUDA_ERROR_INVALID_VALUE;
  if (!are_nodes_of(*found->second, nodes, count)) return CUDA_ERROR_INVALID_VALUE;
  return begin(call, stream, found->second, mode, {nodes, nodes + count});
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  EMULATOR_CALL(cuStreamEndCapture, kContext);
  Stream* stream = find_stream(call, handle);
  if (!stream || !graph) return stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
  if (!stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  CapturePtr capture = stream->capture;
  if (capture->origin != stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  bool is_other_thread = capture->thread != std::this_thread::get_id();
  if (is_other_thread && capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  CUresult result = CUDA_SUCCESS;
  if (capture->is_invalid) result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!result && !is_joined(*capture)) result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  end_capture(*capture);
  *graph = result ? nullptr : capture->graph->handle;
  if (result && capture->owns_graph) forget_graph(*capture->graph);
  return result;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  EMULATOR_CALL(cuStreamIsCapturing, kContext);
  return query(call, stream, {status, nullptr, nullptr, nullptr, nullptr});
}

CUresult cuStreamGetCaptureInfo(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id) {
  EMULATOR_CALL(cuStreamGetCaptureInfo, kContext);
  return query(call, stream, {status, id, nullptr, nullptr, nullptr});
}

CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id,
                                   CUgraph* graph, const CUgraphNode** dependencies,
                                   std::size_t* count) {
  EMULATOR_CALL(cuStreamGetCaptureInfo_v2, kContext);
  return query(call, stream, {status, id, graph, dependencies, count});
}

CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id,
                                   CUgraph* graph, const CUgraphNode** dependencies,
                                   const CUgraphEdgeData** edges, std::size_t* count) {
  EMULATOR_CALL(cuStreamGetCaptureInfo_v3, kContext);
  static const std::vector<CUgraphEdgeData> plain_edges(4096);
  if (edges) *edges = plain_edges.data();
  return query(call, stream, {status, id, graph, dependencies, count});
}

CUresult cuStreamUpdateCaptureDependencies(CUstream stream, CUgraphNode* nodes, std::size_t count,
                                           unsigned flags) {
  EMULATOR_CALL(cuStreamUpdateCaptureDependencies, kContext);
  return update(call, stream, nodes, count, flags);
}

CUresult cuStreamUpdateCaptureDependencies_v2(CUstream stream, CUgraphNode* nodes,
                                              const CUgraphEdgeData*, std::size_t count,
                                              unsigned flags) {
  EMULATOR_CALL(cuStreamUpdateCaptureDependencies_v2, kContext);
  return update(call, stream, nodes, count, flags);
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  EMULATOR_CALL(cuThreadExchangeStreamCaptureMode, kInit);
  if (!mode || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
  std::swap(*mode, thread_mode);
  return CUDA_SUCCESS;
}
