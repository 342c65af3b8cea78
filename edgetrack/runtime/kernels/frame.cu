// What a tracker does per frame beside its network: crop, decide, settle. See device_state.py for
// the structs and build.py for how this becomes frame.ptx.
//
// No headers, so that NVRTC compiles it without an include path; and no fused multiply-add
// (--fmad=false), so that it computes bit for bit what crops.py, runtime/target.py and
// runtime/policies.py do: double where Python does, float where NumPy does.

extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

// Frames in flight: frame n has slot n % RING. A power of two, so that n may wrap around.
#define RING 4

enum Format { BGR8, RGB8, GRAY8, BGRA8, NV12_BT601, NV12_BT709, RGBA8 };

struct alignas(16) Source {  // a frame; mapped host memory, written before the frame is launched
  unsigned long long pixels, chroma;  // device addresses of pixel (0, 0); chroma: NV12's UV plane
  int width_px, height_px, pitch_bytes, chroma_pitch_bytes, format;
  int padding[7];
};

struct Window {  // crops.CropWindow
  int left_px, top_px, side_px;
};

struct Target {    // target.TargetState, and where the frame at work stands
  float x, y, w, h;  // xywh, frame pixels
  int num_unsure, is_lost;
  Window window;    // where to look in the next frame
  int frame_index;  // frames settled; the frame at work is the next one
  int exit_index;   // the exit that the frame at work takes
  int is_sane;      // whether the last answer was finite
  float corner_x_px, corner_y_px;  // of the window, as maps between frame and crop take it
  int padding[2];
};

struct Rules {  // target.TargetRules; a rule that is off by an infinity has a huge number
  double centre_smoothing, size_smoothing, max_size_change, unsure_score, search_growth, size_hold,
      found_score, look_around, search_factor, template_factor;
  int patience, lost_after, width_px, height_px;
  int is_ostrack;  // bundle.CropSpec.geometry
  int padding;
};

struct Decision {  // policies.ExitPolicy
  double weight, score_weight;
  double thresholds[8];
  int num_exits;
  int padding;
};

struct Result {  // an answer; mapped host memory
  float x, y, w, h, score, uncertainty;
  int exit_index, is_lost;
  Window window;      // where the next frame is looked at
  float answer[4];    // xywh before any rule
  unsigned sequence;  // the frame's number, once all the rest is written
};

struct Rgb {
  int r, g, b;
};

// Where a pixel's bytes are; a grey pixel's one byte is all three colours.
struct Layout {
  int num_bytes, red, green, blue;
};

__device__ __forceinline__ Layout layout_of(int format) {
  if (format == GRAY8) return {1, 0, 0, 0};
  int num_bytes = format == BGRA8 || format == RGBA8 ? 4 : 3;
  bool is_rgb = format == RGB8 || format == RGBA8;
  return {num_bytes, is_rgb ? 0 : 2, 1, is_rgb ? 2 : 0};
}

__device__ __forceinline__ int byte_of(int value) { return min(max(value, 0), 255); }

// Limited-range YUV to RGB in units of 2^-20, rounded as OpenCV does; the four pixels of a block
// have one chroma. The numbers are OpenCV's for BT.601 and ITU-R BT.709's own.
__device__ __forceinline__ Rgb nv12_pixel(const Source& source, int x, int y) {
  const unsigned char* luma = (const unsigned char*)source.pixels;
  const unsigned char* chroma = (const unsigned char*)source.chroma +
                                (long long)(y / 2) * source.chroma_pitch_bytes + x / 2 * 2;
  bool is_bt709 = source.format == NV12_BT709;
  int light = max(__ldg(luma + (long long)y * source.pitch_bytes + x) - 16, 0);
  int u = __ldg(chroma) - 128, v = __ldg(chroma + 1) - 128;
  light = light * (is_bt709 ? 1220945 : 1220542) + (1 << 19);
  int red = light + (is_bt709 ? 1879825 : 1673527) * v;
  int green = light - (is_bt709 ? 223607 : 409993) * u - (is_bt709 ? 558796 : 852492) * v;
  int blue = light + (is_bt709 ? 2215014 : 2116026) * u;
  return {byte_of(red >> 20), byte_of(green >> 20), byte_of(blue >> 20)};
}

__device__ __forceinline__ Rgb pixel(const Source& source, const Layout& layout, int x, int y) {
  if (x < 0 || y < 0 || x >= source.width_px || y >= source.height_px) return {0, 0, 0};
  if (source.format == NV12_BT601 || source.format == NV12_BT709) return nv12_pixel(source, x, y);
  const unsigned char* bytes = (const unsigned char*)source.pixels +
                               (long long)y * source.pitch_bytes + x * layout.num_bytes;
  return {__ldg(bytes + layout.red), __ldg(bytes + layout.green), __ldg(bytes + layout.blue)};
}

// The two columns, or rows, of a window that pixel `index` of the crop lies between.
struct Taps {
  int low_px, high_px, low_weight, high_weight;  // weights in units of 1 / 2048
};

__device__ __forceinline__ Taps taps_of(int index, int side_px, int size_px) {
  // (index + 1/2) * side / size - 1/2 with one rounding: the product is exact up to 2^24.
  float at = (float)((2 * index + 1) * side_px - size_px) / (float)(2 * size_px);
  float low = floorf(at), share = at - low;
  int low_px = (int)low;
  return {min(max(low_px, 0), side_px - 1), min(max(low_px + 1, 0), side_px - 1),
          (int)rintf((1.0f - share) * 2048.0f), (int)rintf(share * 2048.0f)};
}

// The roundings of OpenCV's resize of bytes: 1 / 16 of a row's sum, 1 / 4 of a grey level.
__device__ __forceinline__ unsigned char blend(int top_left, int top_right, int bottom_left,
                                               int bottom_right, const Taps& column,
                                               const Taps& row) {
  int top = (top_left * column.low_weight + top_right * column.high_weight) >> 4;
  int bottom = (bottom_left * column.low_weight + bottom_right * column.high_weight) >> 4;
  return (((top * row.low_weight) >> 16) + ((bottom * row.high_weight) >> 16) + 2) >> 2;
}

// Cuts `target->window` out of the frame at work: `out` (size_px, size_px, 3) RGB. One thread is
// one pixel; zeros outside the frame, and the window's last pixels go on beyond its edge.
extern "C" __global__ void __launch_bounds__(256)
    edgetrack_crop(const Source* __restrict__ sources, const Target* __restrict__ target,
                   unsigned char* __restrict__ out, int size_px) {
  int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= size_px || y >= size_px) return;
  const Source source = sources[((unsigned)target->frame_index + 1u) % RING];
  const Window window = target->window;
  Taps column = taps_of(x, window.side_px, size_px), row = taps_of(y, window.side_px, size_px);
  int left = window.left_px + column.low_px, right = window.left_px + column.high_px;
  int top = window.top_px + row.low_px, bottom = window.top_px + row.high_px;
  Layout layout = layout_of(source.format);
  Rgb a = pixel(source, layout, left, top), b = pixel(source, layout, right, top);
  Rgb c = pixel(source, layout, left, bottom), d = pixel(source, layout, right, bottom);
  unsigned char* rgb = out + 3 * (y * size_px + x);
  rgb[0] = blend(a.r, b.r, c.r, d.r, column, row);
  rgb[1] = blend(a.g, b.g, c.g, d.g, column, row);
  rgb[2] = blend(a.b, b.b, c.b, d.b, column, row);
}

// ExitPolicy.should_exit: the comparison is strict, and NaN never stops.
__device__ __forceinline__ bool should_exit(const Decision& decision, int exit_index,
                                            double uncertainty, double score) {
  if (exit_index >= decision.num_exits - 1) return true;
  double criterion = decision.weight * uncertainty + decision.score_weight * (1.0 - score);
  return criterion < decision.thresholds[exit_index];
}

// Decides behind an exit and sets the condition of the rest of the frame's graph.
extern "C" __global__ void edgetrack_gate(const float* uncertainty, const float* score,
                                          const Decision* decision, Target* target, int exit_index,
                                          unsigned long long handle) {
  bool stop = should_exit(*decision, exit_index, *uncertainty, *score);
  target->exit_index = stop ? exit_index : exit_index + 1;
  cudaGraphSetConditional(handle, !stop);
}

// The same where the exit has a head of its own: it runs if the rest does not.
extern "C" __global__ void edgetrack_gate_with_head(const float* uncertainty, const float* score,
                                                    const Decision* decision, Target* target,
                                                    int exit_index, unsigned long long handle,
                                                    unsigned long long head_handle) {
  bool stop = should_exit(*decision, exit_index, *uncertainty, *score);
  target->exit_index = stop ? exit_index : exit_index + 1;
  cudaGraphSetConditional(handle, !stop);
  cudaGraphSetConditional(head_handle, stop);
}

// Decides behind an exit and tells the host: (frame number << 1) | whether to go on.
extern "C" __global__ void edgetrack_gate_flag(const float* uncertainty, const float* score,
                                               const Decision* decision, Target* target,
                                               int exit_index, unsigned* flag) {
  bool stop = should_exit(*decision, exit_index, *uncertainty, *score);
  target->exit_index = stop ? exit_index : exit_index + 1;
  __threadfence_system();
  *(volatile unsigned*)flag = (((unsigned)target->frame_index + 1u) << 1) | !stop;
}

__device__ __forceinline__ bool is_finite(double value) { return value - value == 0.0; }

// np.maximum and np.minimum; there is no NaN where they are used.
__device__ __forceinline__ float maximum(float a, float b) { return a >= b ? a : b; }
__device__ __forceinline__ float minimum(float a, float b) { return a <= b ? a : b; }

// One axis of a box.
struct Span {
  float low, size;
};

// TargetState._smoothed
__device__ __forceinline__ Span smoothed(Span answer, Span last, const Rules& rules,
                                         double size_smoothing) {
  float size = answer.size;
  if (is_finite(rules.max_size_change)) {
    float change = (float)rules.max_size_change;
    size = minimum(maximum(size, last.size / change), last.size * change);
  }
  size = size + (float)size_smoothing * (last.size - size);
  float centre = answer.low + answer.size / 2.0f;
  centre = centre + (float)rules.centre_smoothing * (last.low + last.size / 2.0f - centre);
  return {centre - size / 2.0f, size};
}

// TargetState._in_frame: boxes.clip_xywh with a margin of 10 px, then a side of at least 2 px.
__device__ __forceinline__ Span in_frame(Span span, int frame_px, bool is_ostrack) {
  float frame = (float)frame_px;
  float least = minimum(maximum(span.size, is_ostrack ? 10.0f : 0.0f), 10.0f);
  float high = minimum(maximum(span.low + span.size, least), frame);
  float low = minimum(maximum(span.low, 0.0f), frame - least);
  return {low, maximum(maximum(high - low, least), 2.0f)};
}

__device__ __forceinline__ bool looks_beside(const Target& target, const Rules& rules) {
  return target.is_lost && rules.look_around > 0.0 && target.num_unsure % 2 == 1;
}

// TargetState.settle; returns whether the answer is finite.
__device__ __forceinline__ bool settle(Target& target, const Rules& rules, Span across, Span down,
                                       double score) {
  bool is_sane = is_finite(across.low) && is_finite(across.size) && is_finite(down.low) &&
                 is_finite(down.size) && is_finite(score);
  bool is_unsure = !is_sane || score < rules.unsure_score;
  bool is_found = is_sane && score >= max(rules.found_score, rules.unsure_score);
  bool is_taken = is_sane && (is_found || !looks_beside(target, rules));
  target.num_unsure = is_unsure ? target.num_unsure + 1 : 0;
  target.is_lost = target.is_lost ? !is_found : target.num_unsure >= rules.lost_after;
  if (is_taken) {
    double hold = max(rules.size_smoothing, is_unsure ? rules.size_hold : 0.0);
    across = smoothed(across, {target.x, target.w}, rules, hold);
    down = smoothed(down, {target.y, target.h}, rules, hold);
    across = in_frame(across, rules.width_px, rules.is_ostrack);
    down = in_frame(down, rules.height_px, rules.is_ostrack);
    target.x = across.low, target.y = down.low, target.w = across.size, target.h = down.size;
  }
  return is_sane;
}

// Python refuses a window that is no number; here it is one pixel, and a side has a bound, so that
// the crop's whole numbers cannot overflow.
__device__ __forceinline__ int whole_px(double value, int fallback) {
  return fabs(value) < 524288.0 ? (int)value : fallback;
}

// CropWindow.around: sets the window and its corner. The place is a float, as in the host's boxes.
__device__ __forceinline__ void set_window(Target& target, bool is_ostrack, float x, float y,
                                           double w, double h, double factor) {
  int side = max(whole_px(ceil(sqrt(w * h) * factor), 1), 1);
  double left = x + w / 2 - side / 2.0, top = y + h / 2 - side / 2.0;
  Window window = {whole_px(rint(left), 0), whole_px(rint(top), 0), side};
  target.window = window;
  target.corner_x_px = is_ostrack ? (float)left : (float)window.left_px;
  target.corner_y_px = is_ostrack ? (float)top : (float)window.top_px;
}

// TargetState.search_window
__device__ __forceinline__ void aim_search(Target& target, const Rules& rules) {
  double factor = rules.search_factor;
  if (rules.unsure_score != 0.0 && target.num_unsure >= rules.patience)
    factor *= rules.search_growth;
  float x = target.x, y = target.y;
  double w = target.w, h = target.h;
  if (looks_beside(target, rules)) {
    int turn = max(target.num_unsure - rules.lost_after, 0) / 2 + 1;
    double reach = rules.look_around * factor * sqrt(w * h) * sqrt((double)turn);
    double angle = turn * 2.399963229728653;  // golden
    double centre_x = min(max(x + w / 2 + reach * cos(angle), 0.0), (double)rules.width_px);
    double centre_y = min(max(y + h / 2 + reach * sin(angle), 0.0), (double)rules.height_px);
    x = (float)(centre_x - w / 2), y = (float)(centre_y - h / 2);
  }
  set_window(target, rules.is_ostrack, x, y, w, h, factor);
}

// The crop of the update graph: the target as it is in frame `number`, and where it is in the crop.
__device__ __forceinline__ void aim_update(Target* out, float* bbox_cxcywh, Target target,
                                           const Rules& rules, unsigned number) {
  set_window(target, rules.is_ostrack, target.x, target.y, target.w, target.h,
             rules.template_factor);
  target.frame_index = (int)(number - 1u);
  *out = target;
  if (!bbox_cxcywh) return;
  float side = (float)target.window.side_px;  // CropWindow.to_crop
  bbox_cxcywh[0] = (target.x + target.w / 2.0f - target.corner_x_px) / side;
  bbox_cxcywh[1] = (target.y + target.h / 2.0f - target.corner_y_px) / side;
  bbox_cxcywh[2] = target.w / side;
  bbox_cxcywh[3] = target.h / side;
}

__device__ __forceinline__ void tell(Result* results, unsigned number) {
  __threadfence_system();  // who sees the sequence sees all the rest
  *(volatile unsigned*)&results[number % RING].sequence = number;
}

// Turns the answer of the exit that was taken into the target's state, the next window and the
// frame's result. With a `template_target`, says there where to cut the update graph's crop, and
// leaves it to edgetrack_tell to say that the frame is done.
extern "C" __global__ void edgetrack_settle(const float* bbox_cxcywh, const float* score,
                                            const float* uncertainty, const Rules* rules,
                                            Target* target, Result* results,
                                            Target* template_target,
                                            float* template_bbox_cxcywh) {
  Target state = *target;
  float side = (float)state.window.side_px;
  Span across = {bbox_cxcywh[0] * side, bbox_cxcywh[2] * side};  // CropWindow.to_frame
  Span down = {bbox_cxcywh[1] * side, bbox_cxcywh[3] * side};
  across.low = across.low - across.size / 2.0f + state.corner_x_px;
  down.low = down.low - down.size / 2.0f + state.corner_y_px;
  state.is_sane = settle(state, *rules, across, down, *score);
  aim_search(state, *rules);
  unsigned number = (unsigned)state.frame_index + 1u;
  state.frame_index = (int)number;
  *target = state;

  Result* result = results + number % RING;
  result->x = state.x, result->y = state.y, result->w = state.w, result->h = state.h;
  result->score = state.is_sane ? *score : 0.0f;
  result->uncertainty = *uncertainty;
  result->exit_index = state.exit_index;
  result->is_lost = state.is_lost;
  result->window = state.window;
  result->answer[0] = across.low, result->answer[1] = down.low;
  result->answer[2] = across.size, result->answer[3] = down.size;
  if (template_target)
    aim_update(template_target, template_bbox_cxcywh, state, *rules, number);
  else
    tell(results, number);
}

// Says that the frame that was settled last is done: its pixels are not read any more.
extern "C" __global__ void edgetrack_tell(const Target* target, Result* results) {
  tell(results, (unsigned)target->frame_index);
}

struct alignas(16) Chunk {
  unsigned long long low, high;
};

// Copies what the update graph wrote to where the next frame reads it, unless the frame's answer
// was no number.
extern "C" __global__ void edgetrack_carry(const Target* target, const Chunk* __restrict__ source,
                                           Chunk* __restrict__ out, unsigned num_chunks) {
  if (!target->is_sane) return;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < num_chunks;
       i += gridDim.x * blockDim.x)
    out[i] = source[i];
}

// Tells at start-up whether this device runs conditional graph nodes.
extern "C" __global__ void edgetrack_probe(unsigned* word, unsigned value,
                                           unsigned long long handle) {
  *word = value;
  cudaGraphSetConditional(handle, value & 1);
}
