// Calls that PyCUDA links and this project does not make: they exist, and say that they do nothing.
// Without cuda.h, whose prototypes would ask for the arguments of each.
int unsupported_call(const char* name);

#define EMULATOR_UNSUPPORTED(DO)                                                                  \
  DO(cuArray3DCreate_v2) DO(cuArray3DGetDescriptor_v2) DO(cuArrayCreate_v2) DO(cuArrayDestroy)    \
  DO(cuArrayGetDescriptor_v2) DO(cuCtxAttach) DO(cuCtxDetach) DO(cuCtxDisablePeerAccess)          \
  DO(cuCtxEnablePeerAccess) DO(cuCtxGetApiVersion) DO(cuCtxGetCacheConfig) DO(cuCtxGetLimit)      \
  DO(cuCtxGetSharedMemConfig) DO(cuCtxSetCacheConfig) DO(cuCtxSetLimit)                           \
  DO(cuCtxSetSharedMemConfig) DO(cuDeviceCanAccessPeer) DO(cuDeviceGetByPCIBusId)                 \
  DO(cuDeviceGetPCIBusId) DO(cuFuncSetAttribute)                                                  \
  DO(cuFuncSetCacheConfig) DO(cuFuncSetSharedSize) DO(cuIpcCloseMemHandle)                        \
  DO(cuIpcGetEventHandle) DO(cuIpcGetMemHandle) DO(cuIpcOpenEventHandle)                          \
  DO(cuIpcOpenMemHandle_v2) DO(cuLaunch) DO(cuLaunchGrid) DO(cuLaunchGridAsync)                   \
  DO(cuLinkAddData_v2) DO(cuLinkAddFile_v2) DO(cuLinkComplete) DO(cuLinkCreate_v2)                \
  DO(cuLinkDestroy) DO(cuMemAllocManaged) DO(cuMemcpy3DAsync_v2) DO(cuMemcpy3DPeer)               \
  DO(cuMemcpy3DPeerAsync) DO(cuMemcpy3D_v2) DO(cuMemcpyAtoA_v2) DO(cuMemcpyAtoD_v2)               \
  DO(cuMemcpyAtoH_v2) DO(cuMemcpyDtoA_v2) DO(cuMemcpyHtoA_v2) DO(cuMemcpyPeer)                    \
  DO(cuMemcpyPeerAsync) DO(cuMemsetD16Async) DO(cuMemsetD16_v2) DO(cuMemsetD2D16Async)            \
  DO(cuMemsetD2D16_v2) DO(cuMemsetD2D32Async) DO(cuMemsetD2D32_v2) DO(cuMemsetD2D8Async)          \
  DO(cuMemsetD2D8_v2) DO(cuModuleGetGlobal_v2) DO(cuModuleGetSurfRef) DO(cuModuleGetTexRef)       \
  DO(cuModuleLoad) DO(cuParamSetSize) DO(cuParamSetTexRef) DO(cuParamSetf) DO(cuParamSeti)        \
  DO(cuParamSetv) DO(cuProfilerInitialize) DO(cuProfilerStart) DO(cuProfilerStop)                 \
  DO(cuStreamAttachMemAsync) DO(cuSurfRefGetArray) DO(cuSurfRefSetArray) DO(cuTexRefCreate)       \
  DO(cuTexRefDestroy) DO(cuTexRefGetAddressMode) DO(cuTexRefGetAddress_v2) DO(cuTexRefGetArray)   \
  DO(cuTexRefGetFilterMode) DO(cuTexRefGetFlags) DO(cuTexRefGetFormat)                            \
  DO(cuTexRefSetAddress2D_v3) DO(cuTexRefSetAddressMode) DO(cuTexRefSetAddress_v2)                \
  DO(cuTexRefSetArray) DO(cuTexRefSetFilterMode) DO(cuTexRefSetFlags) DO(cuTexRefSetFormat)

#define EMULATOR_DEFINE(name) \
  int name() { return unsupported_call(#name); }

extern "C" {
EMULATOR_UNSUPPORTED(EMULATOR_DEFINE)
}
