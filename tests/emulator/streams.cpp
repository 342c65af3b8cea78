// Streams and events. One worker thread per stream executes what was queued, in order.
#include "emulator.h"

namespace emulator {
namespace {

bool all_done(const std::vector<MarkerPtr>& markers) {
  for (const MarkerPtr& marker : markers) {
    if (!marker->is_done) return false;
  }
  return true;
}

CUresult run_unlocked(std::unique_lock<std::mutex>& lock, const Task& task) {
  lock.unlock();
  std::this_thread::sleep_for(std::chrono::microseconds(state().latency_us));
  CUresult result = task.run();
  lock.lock();
  return result;
}

void work(std::shared_ptr<Stream> stream) {
  is_worker = true;
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  Context& context = *stream->context;
  for (;;) {
    s.changed.wait(lock, [&] { return !stream->queue.empty() || stream->is_closing; });
    if (stream->queue.empty()) return;
    Task task = std::move(stream->queue.front());
    stream->queue.pop_front();
    s.changed.wait(lock, [&] { return all_done(task.waits); });
    // After a failure the device does nothing more for this context.
    if (task.run && context.sticky == CUDA_SUCCESS && context.is_alive) {
      CUresult result = run_unlocked(lock, task);
      if (context.sticky == CUDA_SUCCESS) context.sticky = result;
    }
    task.done->is_done = true;
    task.done->time = Clock::now();
    s.changed.notify_all();
  }
}

std::shared_ptr<Stream> start_stream(Context& context, unsigned flags) {
  auto stream = std::make_shared<Stream>();
  stream->handle = state().streams.next();
  stream->context = &context;
  stream->flags = flags;
  state().streams.add(stream);
  std::thread(work, stream).detach();
  return stream;
}

// The legacy default stream and the blocking streams wait for each other.
std::vector<MarkerPtr> implicit_waits(const Stream& stream) {
  std::vector<MarkerPtr> waits;
  const Stream* null_stream = stream.context->null_stream.get();
  if (&stream == null_stream) {
    for (const auto& [handle, other] : state().streams.objects) {
      bool counts = other->context == stream.context && other->is_blocking() && other->tail;
      if (counts && other.get() != null_stream) waits.push_back(other->tail);
    }
  } else if (stream.is_blocking() && null_stream && null_stream->tail) {
    waits.push_back(null_stream->tail);
  }
  return waits;
}

CUresult create_stream(CUstream* stream, unsigned flags, const Call& call) {
  if (!stream || (flags & ~unsigned{CU_STREAM_NON_BLOCKING})) return CUDA_ERROR_INVALID_VALUE;
  *stream = start_stream(*call.context, flags)->handle;
  return CUDA_SUCCESS;
}

CUresult check_event_done(const Event* event) {
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
  return CUDA_SUCCESS;
}

CUresult record_on(CUevent event, CUstream stream, Call& call) {
  Event* found = state().events.find(event);
  Stream* on = find_stream(call, stream);
  if (!found || !on) return CUDA_ERROR_INVALID_HANDLE;
  if (on->capture) return record_event(*on, *found);
  found->capture.reset();
  found->marker = enqueue(*on, nullptr);
  return CUDA_SUCCESS;
}

CUresult elapsed(float* elapsed_ms, const Event* start, const Event* end) {
  if (!elapsed_ms) return CUDA_ERROR_INVALID_VALUE;
  for (const Event* event : {start, end}) {
    if (CUresult wrong = check_event_done(event)) return wrong;
    bool is_timed = event->marker && !(event->flags & CU_EVENT_DISABLE_TIMING);
    if (!is_timed) return CUDA_ERROR_INVALID_HANDLE;
  }
  if (!start->marker->is_done || !end->marker->is_done) return CUDA_ERROR_NOT_READY;
  std::chrono::duration<float, std::milli> span = end->marker->time - start->marker->time;
  *elapsed_ms = span.count();
  return CUDA_SUCCESS;
}

}  // namespace

Stream* find_stream(const Call& call, CUstream handle) {
  if (handle == nullptr || handle == CU_STREAM_LEGACY) {
    auto& null_stream = call.context->null_stream;
    if (!null_stream) null_stream = start_stream(*call.context, CU_STREAM_DEFAULT);
    return null_stream.get();
  }
  Stream* stream = state().streams.find(handle);
  return stream && stream->context == call.context ? stream : nullptr;
}

CUresult check_not_captured(Stream& stream) {
  if (!stream.capture) return CUDA_SUCCESS;
  invalidate(*stream.capture);
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

MarkerPtr enqueue(Stream& stream, std::function<CUresult()> run, std::vector<MarkerPtr> waits) {
  for (const MarkerPtr& implicit : implicit_waits(stream)) waits.push_back(implicit);
  stream.tail = std::make_shared<Marker>();
  stream.queue.push_back(Task{std::move(run), std::move(waits), stream.tail});
  state().changed.notify_all();
  return stream.tail;
}

CUresult submit(Call& call, CUstream handle, Work work, MarkerPtr* done) {
  Stream* stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) return record(*stream, std::move(work));
  if (stream == call.context->null_stream.get()) {
    if (CUresult wrong = check_capture_allows_null_stream(*call.context)) return wrong;
  }
  MarkerPtr marker = enqueue(*stream, std::move(work.run));
  if (done) *done = marker;
  return CUDA_SUCCESS;
}

CUresult wait_for(Call& call, const MarkerPtr& marker) {
  if (marker) state().changed.wait(call.lock, [&] { return marker->is_done; });
  return call.context->sticky;
}

void close_streams_of(Context& context) {
  for (const auto& [handle, stream] : state().streams.objects) {
    if (stream->context != &context) continue;
    leave_capture(*stream);
    stream->is_closing = true;
  }
  state().streams.remove_those_of(context);
  context.null_stream.reset();
  state().changed.notify_all();
}

}  // namespace emulator

using namespace emulator;

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  EMULATOR_CALL(cuStreamCreate, kContext);
  return create_stream(stream, flags, call);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
  EMULATOR_CALL(cuStreamCreateWithPriority, kContext);
  return create_stream(stream, flags, call);
}

CUresult cuStreamDestroy_v2(CUstream stream) {
  EMULATOR_CALL(cuStreamDestroy_v2, kContext);
  Stream* found = state().streams.find(stream);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  leave_capture(*found);
  found->is_closing = true;  // its worker ends after what is queued
  state().streams.remove(stream);
  state().changed.notify_all();
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  EMULATOR_CALL(cuStreamSynchronize, kContext);
  Stream* found = find_stream(call, stream);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (CUresult wrong = check_not_captured(*found)) return wrong;
  if (CUresult wrong = check_capture_allows_unsafe_calls()) return wrong;
  return wait_for(call, found->tail);
}

CUresult cuStreamQuery(CUstream stream) {
  EMULATOR_CALL(cuStreamQuery, kContext);
  Stream* found = find_stream(call, stream);
  if (!found) return CUDA_ERROR_INVALID_HANDLE;
  if (CUresult wrong = check_not_captured(*found)) return wrong;
  if (CUresult wrong = check_capture_allows_unsafe_calls()) return wrong;
  return !found->tail || found->tail->is_done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuStreamGetFlags(CUstream stream, unsigned* flags) {
  EMULATOR_CALL(cuStreamGetFlags, kContext);
  Stream* found = find_stream(call, stream);
  if (!found || !flags) return found ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
  *flags = found->flags;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  EMULATOR_CALL(cuStreamGetCtx, kContext);
  Stream* found = find_stream(call, stream);
  if (!found || !context) return found ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
  *context = found->context->handle;
  return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  EMULATOR_CALL(cuStreamWaitEvent, kContext);
  Stream* found = find_stream(call, stream);
  Event* on = state().events.find(event);
  if (!found || !on) return CUDA_ERROR_INVALID_HANDLE;
  if (flags) return CUDA_ERROR_NOT_SUPPORTED;  // event nodes: no caller has them
  if (found->capture || on->capture) return wait_in_capture(*found, *on);
  if (on->marker) enqueue(*found, nullptr, {on->marker});
  return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* user) {
  EMULATOR_CALL(cuLaunchHostFunc, kContext);
  if (!function) return CUDA_ERROR_INVALID_VALUE;
  auto run = [function, user] { function(user); return CUDA_SUCCESS; };
  return submit(call, stream, Work{CU_GRAPH_NODE_TYPE_HOST, run});
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  EMULATOR_CALL(cuEventCreate, kContext);
  bool is_for_other_processes = flags & CU_EVENT_INTERPROCESS;
  if (!event || flags > 7 || (is_for_other_processes && !(flags & CU_EVENT_DISABLE_TIMING))) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto created = std::make_shared<Event>();
  created->handle = *event = state().events.next();
  created->context = call.context;
  created->flags = flags;
  state().events.add(created);
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event) {
  EMULATOR_CALL(cuEventDestroy_v2, kContext);
  return state().events.remove(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  EMULATOR_CALL(cuEventRecord, kContext);
  return record_on(event, stream, call);
}

CUresult cuEventQuery(CUevent event) {
  EMULATOR_CALL(cuEventQuery, kContext | kUnsafe);
  Event* found = state().events.find(event);
  if (CUresult wrong = check_event_done(found)) return wrong;
  return !found->marker || found->marker->is_done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(CUevent event) {
  EMULATOR_CALL(cuEventSynchronize, kContext | kUnsafe);
  Event* found = state().events.find(event);
  if (CUresult wrong = check_event_done(found)) return wrong;
  return wait_for(call, found->marker);
}

CUresult cuEventElapsedTime(float* elapsed_ms, CUevent start, CUevent end) {
  EMULATOR_CALL(cuEventElapsedTime, kContext);
  return elapsed(elapsed_ms, state().events.find(start), state().events.find(end));
}

CUresult cuEventElapsedTime_v2(float* elapsed_ms, CUevent start, CUevent end) {
  EMULATOR_CALL(cuEventElapsedTime_v2, kContext);
  return elapsed(elapsed_ms, state().events.find(start), state().events.find(end));
}
