// The kernels themselves, compiled for the CPU.
#include "host_kernels.h"

#include "../../edgetrack/runtime/kernels/frame.cu"

EXPORT_FRAME_KERNELS
