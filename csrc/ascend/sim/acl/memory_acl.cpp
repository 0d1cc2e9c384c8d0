// A CANN runtime that has memory and nothing else: torch-npu loads on a machine without CANN and makes tensors on
// npu:0, which lie in host memory. For tests only; never part of a package. It stands for every CANN library that
// torch-npu links against, so the one shared object is linked to under each of their names (tests/npu/runtime.py).
//
// Memory, copies, streams and events do what the ACL documentation says of a device that has always finished. The rest
// is of two kinds: accounts that nobody reads (profiling, logging, settings) do nothing, and everything that would
// compute or talk to another device answers ACL_ERROR_FEATURE_UNSUPPORTED and leaves its name for aclGetRecentErrMsg.
// Signatures come from the headers in the torch-npu wheel.
#include <cstdlib>
#include <cstring>
#include <string>

#include "acl/acl.h"

namespace {

constexpr size_t kAlignment = 512;  // as aclrtMalloc
constexpr size_t kTotal = size_t(8) << 30;

thread_local std::string last_error;
thread_local int32_t current_device = 0;
size_t allocated = 0;
char context;

aclError fail(aclError code, const std::string& text) {
  last_error = "memory-only ACL: " + text;
  return code;
}

aclError allocate(void** pointer, size_t size) {
  // torch-npu's allocator asks for 32 bytes more than it shows
  if (posix_memalign(pointer, kAlignment, size + kAlignment)) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "out of host memory");
  }
  __atomic_add_fetch(&allocated, size, __ATOMIC_RELAXED);
  return ACL_SUCCESS;
}

aclError copy(void* to, size_t room, const void* from, size_t count) {
  if (count > room) {
    return fail(ACL_ERROR_INVALID_PARAM, std::to_string(count) + " bytes copied into " + std::to_string(room));
  }
  std::memmove(to, from, count);
  return ACL_SUCCESS;
}

// A handle is memory of its own, so that no two are equal and using one after it was destroyed is seen by a sanitizer.
aclError handle(void** out) {
  *out = std::malloc(sizeof(int));
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

// process and device
aclError aclInit(const char*) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }
const char* aclGetRecentErrMsg() { return last_error.c_str(); }
const char* aclrtGetSocName() { return "Ascend910B3"; }
aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = 1;
  return ACL_SUCCESS;
}
aclError aclrtSetDevice(int32_t device) {
  if (device != 0) {
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "there is one device, asked for number " + std::to_string(device));
  }
  current_device = device;
  return ACL_SUCCESS;
}
aclError aclrtGetDevice(int32_t* device) {
  *device = current_device;
  return ACL_SUCCESS;
}
aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }
aclError aclrtGetCurrentContext(aclrtContext* out) {
  *out = &context;
  return ACL_SUCCESS;
}
aclError aclrtSetCurrentContext(aclrtContext) { return ACL_SUCCESS; }
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
  *value = 40;  // vector cores of a 910B3
  return ACL_SUCCESS;
}
aclError aclrtSynchronizeDevice() { return ACL_SUCCESS; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return ACL_SUCCESS; }

// memory
aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) { return allocate(pointer, size); }
aclError aclrtMallocAlign32(void** pointer, size_t size, aclrtMemMallocPolicy) { return allocate(pointer, size); }
aclError aclrtMallocHost(void** pointer, size_t size) { return allocate(pointer, size); }
aclError aclrtFree(void* pointer) {
  std::free(pointer);
  return ACL_SUCCESS;
}
aclError aclrtFreeHost(void* pointer) {
  std::free(pointer);
  return ACL_SUCCESS;
}
aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  *total = kTotal;
  const size_t used = __atomic_load_n(&allocated, __ATOMIC_RELAXED);  // never given back: torch-npu keeps what it has
  *free = used < kTotal ? kTotal - used : 0;
  return ACL_SUCCESS;
}
aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t count, aclrtMemcpyKind) {
  return copy(to, room, from, count);
}
aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t count, aclrtMemcpyKind, aclrtStream) {
  return copy(to, room, from, count);
}
aclError aclrtMemset(void* to, size_t room, int32_t value, size_t count) {
  if (count > room) {
    return fail(ACL_ERROR_INVALID_PARAM, std::to_string(count) + " bytes set of " + std::to_string(room));
  }
  std::memset(to, value, count);
  return ACL_SUCCESS;
}
aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t count, aclrtStream) {
  return aclrtMemset(to, room, value, count);
}

// streams and events: whatever was enqueued has run
aclError aclrtCreateStream(aclrtStream* stream) { return handle(stream); }
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return handle(stream); }
aclError aclrtDestroyStream(aclrtStream stream) {
  std::free(stream);
  return ACL_SUCCESS;
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSynchronizeStream(aclrtStream) { return ACL_SUCCESS; }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream, int32_t) { return ACL_SUCCESS; }
aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus* status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtStreamWaitEvent(aclrtStream, aclrtEvent) { return ACL_SUCCESS; }
aclError aclrtCreateEvent(aclrtEvent* event) { return handle(event); }
aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) { return handle(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) { return handle(event); }
aclError aclrtDestroyEvent(aclrtEvent event) {
  std::free(event);
  return ACL_SUCCESS;
}
aclError aclrtRecordEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtSynchronizeEvent(aclrtEvent) { return ACL_SUCCESS; }
aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus* status) {
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent, aclrtEvent) {
  *milliseconds = 0;
  return ACL_SUCCESS;
}

// descriptions of an operator's arguments, which torch-npu makes before it asks for the operator
// and destroys after it was refused
aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return static_cast<aclDataBuffer*>(std::malloc(sizeof(int))); }
aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  std::free(const_cast<aclDataBuffer*>(buffer));
  return ACL_SUCCESS;
}
aclTensorDesc* aclCreateTensorDesc(aclDataType, int, const int64_t*, aclFormat) {
  return static_cast<aclTensorDesc*>(std::malloc(sizeof(int)));
}
void aclDestroyTensorDesc(const aclTensorDesc* description) { std::free(const_cast<aclTensorDesc*>(description)); }
aclopAttr* aclopCreateAttr() { return static_cast<aclopAttr*>(std::malloc(sizeof(int))); }
void aclopDestroyAttr(const aclopAttr* attributes) { std::free(const_cast<aclopAttr*>(attributes)); }

// settings
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}
void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

}  // extern "C"

// Functions whose arguments nobody looks at, under their C names.
#define ANSWER(name, value)                   \
  extern "C" int answer_##name() __asm__(#name); \
  int answer_##name() { return value; }
#define NOTHING(name) ANSWER(name, 0)
#define REFUSED(name) ANSWER(name, fail(ACL_ERROR_FEATURE_UNSUPPORTED, #name " is not emulated"))

NOTHING(aclrtSetSysParamOpt)
NOTHING(aclrtCtxSetSysParamOpt)
NOTHING(aclrtSetDeviceSatMode)
NOTHING(aclrtSetOpExecuteTimeOut)
NOTHING(aclSetCompileopt)
NOTHING(aclSetTensorDescName)
NOTHING(aclSetTensorFormat)
NOTHING(aclSetTensorPlaceMent)
NOTHING(aclSetTensorShape)
NOTHING(aclopSetAttrBool)
NOTHING(aclopSetAttrDataType)
NOTHING(aclopSetAttrFloat)
NOTHING(aclopSetAttrInt)
NOTHING(aclopSetAttrListBool)
NOTHING(aclopSetAttrListFloat)
NOTHING(aclopSetAttrListInt)
NOTHING(aclopSetAttrListListInt)
NOTHING(aclopSetAttrString)
NOTHING(MsprofGetHashId)
NOTHING(MsprofRegisterCallback)
NOTHING(MsprofReportAdditionalInfo)
NOTHING(MsprofReportApi)
NOTHING(MsprofReportCompactInfo)
NOTHING(MsprofSysCycleTime)
NOTHING(aclmdlInitDump)
NOTHING(aclmdlSetDump)
NOTHING(aclmdlFinalizeDump)

REFUSED(aclGetTensorDescDimV2)
REFUSED(aclGetTensorDescFormat)
REFUSED(aclGetTensorDescNumDims)
REFUSED(aclGetTensorDescType)
REFUSED(aclopCompileAndExecute)
REFUSED(aclrtBinaryGetFunction)
REFUSED(aclrtBinaryLoadFromData)
REFUSED(aclrtDeviceCanAccessPeer)
REFUSED(aclrtDeviceEnablePeerAccess)
REFUSED(aclrtDeviceGetBareTgid)
REFUSED(aclrtFreePhysical)
REFUSED(aclrtGetFunctionAddr)
REFUSED(aclrtMallocPhysical)
REFUSED(aclrtMapMem)
REFUSED(aclrtMemExportToShareableHandle)
REFUSED(aclrtMemImportFromShareableHandle)
REFUSED(aclrtMemSetPidToShareableHandle)
REFUSED(aclrtProcessReport)
REFUSED(aclrtReleaseMemAddress)
REFUSED(aclrtReserveMemAddress)
REFUSED(aclrtUnmapMem)
REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister)
REFUSED(rtGetC2cCtrlAddr)
REFUSED(rtKernelLaunch)
