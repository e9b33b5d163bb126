/* A CUDA runtime and driver with one device that is never asked to do anything: torch's autograd
   asks them which devices and streams there are before it looks at a tensor. */
#include <string.h>

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaStreamIsCapturing(void *stream, int *state) { *state = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    *stream = (void *)2;
    return 0;
}
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = ""; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 0;
    return 0;
}

int cudaGetDriverEntryPoint(const char *name, void **found, unsigned long long flags, int *state) {
    *found = strstr(name, "PrimaryCtxGetState") ? (void *)cuDevicePrimaryCtxGetState : (void *)cuInit;
    if (state) *state = 0;
    return 0;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version,
                                     unsigned long long flags, int *state) {
    return cudaGetDriverEntryPoint(name, found, flags, state);
}
