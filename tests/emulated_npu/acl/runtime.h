/* An emulated Ascend runtime: the functions of ACL that torch_npu calls, on host memory, strict about every argument.
 *
 * Built against the ACL headers of the installed wheel, so that every prototype here is checked by the compiler.
 * This library owns handles, memory, capture states and error codes. What is queued on a stream is owned by the
 * process's Python side (tests/emulated_npu/machine.py), which installs one hook. Without a hook there is memory and
 * there are handles, but nothing can be queued.
 */
#ifndef EMULATED_NPU_RUNTIME_H
#define EMULATED_NPU_RUNTIME_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/error_codes/rt_error_codes.h"

#define API __attribute__((visibility("default")))
#define MIB (1ul << 20)
#define NOT_YET 1

/* What the hook is asked to do; machine.py has the same numbers. Answers are ACL error codes, for QUERY_* 0 or 1. */
enum Request {
    SYNC_STREAM = 1, SYNC_DEVICE, SYNC_EVENT, QUERY_STREAM, QUERY_EVENT,
    RECORD_EVENT, WAIT_EVENT, VALUE_WAIT, VALUE_WRITE, COPY, FILL, HOST_FUNCTION,
    CAPTURE_BEGIN, CAPTURE_JOIN, CAPTURE_END, EXECUTE, DESTROY_MODEL,
    GROUP_BEGIN, GROUP_END, UPDATE_BEGIN, UPDATE_END, FORGET_STREAM, FORGET_EVENT, MEMORY_GONE,
    COLLECTIVE, COMM_OPENED, COMM_CLOSED,
};
typedef int (*Hook)(int request, void *handle, uint64_t a, uint64_t b, uint64_t c);
int ask(enum Request request, void *handle, uint64_t a, uint64_t b, uint64_t c);

enum { STREAM_MAGIC = 0x57e4, EVENT_MAGIC = 0xe7e7, MODEL_MAGIC = 0x30de, GROUP_MAGIC = 0x6709, CONTEXT_MAGIC = 0xc0c0 };

typedef struct Model {
    int magic, id, num_streams; /* num_streams: of the device, taken while the model lives */
    aclmdlRICaptureMode mode;
    enum { CAPTURING, INVALIDATED, READY } state;
    struct Stream *origin;
    pthread_t owner;
    bool group_open, has_groups;
} Model;
typedef struct Group {
    int magic;
    Model *model;
} Group;
typedef struct Stream {
    int magic, id, device;
    Model *capture;   /* being captured into */
    Group *updating;  /* between TaskUpdateBegin and End */
    bool joined;      /* in the capture by waiting for one of its events */
    struct Stream *next;
} Stream;
typedef struct Event {
    int magic;
    uint32_t flag;
    int recorded;        /* times */
    Model *captured_in;  /* the last record was captured */
    uint64_t recorded_ns;
} Event;

extern pthread_mutex_t lock; /* of all tables; never held while the hook runs, which may wait for the GIL */

/* Sets what aclGetRecentErrMsg says and returns `code`. */
int fail(int code, const char *function, const char *format, ...) __attribute__((format(printf, 3, 4)));
#define FAIL(code, ...) fail(code, __func__, __VA_ARGS__)
#define REQUIRE(condition, ...) do { if (!(condition)) return FAIL(ACL_ERROR_RT_PARAM_INVALID, __VA_ARGS__); } while (0)
/* What is told with the error that the device reports next. */
void set_device_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
long setting(const char *name, long otherwise); /* an environment variable, read once per call */
bool tracing(void);
int physical_device(int32_t logical); /* of those that the process sees; -1: it does not */
static inline bool in_task_group(const Stream *stream) { return stream->updating || (stream->capture && stream->capture->group_open); }
/* What a device says of an event that is recorded within a task group, which takes kernels only; the capture is lost. */
int task_not_supported(Stream *stream, const char *function);
#define TASK_NOT_SUPPORTED(stream) task_not_supported(stream, __func__)
#define TRACE(...) do { if (tracing()) { fprintf(stderr, "[acl] %s ", __func__); fprintf(stderr, __VA_ARGS__); fputc('\n', stderr); } } while (0)

Stream *stream_of(aclrtStream handle); /* NULL: not a stream. The null handle is the device's default stream. */
int take_streams(int count);           /* from the device's number; false: there are none left */
void give_streams(int count);
Model *forbidding_capture(void);       /* a capture that forbids this thread what may wait for the device, or NULL */
int unsafe_in_capture(const char *function); /* 0, or the code that a capture makes of this call; it ends the capture */
bool is_pinned(const void *pointer, size_t size);
bool is_device(const void *pointer, size_t size);
bool is_reserved(const void *pointer, size_t size);
size_t hbm_bytes(void);
int take_hbm(size_t size);
void give_hbm(size_t size);
void remember_mapping(void *at, size_t size);
void forget_mapping(void *at);
#endif
