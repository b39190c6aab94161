/* Streams and events: handles, their number, and what a capture forbids. */
#include "runtime.h"

#include <time.h>

static Stream default_stream = {.magic = STREAM_MAGIC};
static Stream *streams = &default_stream;
static int next_id = 1, taken_streams = 1;

/* All streams of a device share its hardware queues; a captured model needs queues of its own. */
static int most_streams(void) { return (int)setting("EMULATED_NPU_STREAMS", 2048); }

int take_streams(int count) {
    pthread_mutex_lock(&lock);
    const bool fits = taken_streams + count <= most_streams();
    if (fits) taken_streams += count;
    pthread_mutex_unlock(&lock);
    return fits;
}
void give_streams(int count) {
    pthread_mutex_lock(&lock);
    taken_streams -= count;
    pthread_mutex_unlock(&lock);
}
API aclError aclrtGetStreamAvailableNum(uint32_t *count) {
    REQUIRE(count, "count is null");
    *count = (uint32_t)(most_streams() > taken_streams ? most_streams() - taken_streams : 0);
    return 0;
}

Stream *stream_of(aclrtStream handle) {
    if (!handle) return &default_stream;
    Stream *found = NULL;
    pthread_mutex_lock(&lock);
    for (Stream *s = streams; s && !found; s = s->next) found = s == handle ? s : NULL;
    pthread_mutex_unlock(&lock);
    return found;
}
API aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    REQUIRE(stream && priority <= 7, "priority %u", priority);
    REQUIRE((flag & ~0x3fu) == 0, "flag %#x", flag);
    if (!take_streams(1)) return FAIL(ACL_ERROR_RT_NO_STREAM_RESOURCE, "EL0009 Stream resources are insufficient: %d are in use", taken_streams);
    Stream *made = calloc(1, sizeof *made);
    made->magic = STREAM_MAGIC;
    if (aclrtGetDevice(&made->device)) made->device = 0;
    pthread_mutex_lock(&lock);
    made->id = next_id++, made->next = streams, streams = made;
    pthread_mutex_unlock(&lock);
    TRACE("%d -> %p", made->id, (void *)made);
    *stream = made;
    return 0;
}
API aclError aclrtCreateStream(aclrtStream *stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
API aclError aclrtDestroyStream(aclrtStream handle) {
    Stream *stream = stream_of(handle);
    REQUIRE(handle && stream, "%p is no stream", handle);
    if (stream->capture) return FAIL(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured");
    const int code = ask(FORGET_STREAM, stream, 0, 0, 0); /* runs what is queued */
    pthread_mutex_lock(&lock);
    Stream **link = &streams;
    while (*link != stream) link = &(*link)->next;
    *link = stream->next;
    stream->magic = 0;
    pthread_mutex_unlock(&lock);
    give_streams(1);
    free(stream);
    return code;
}
API aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
API aclError aclrtStreamGetId(aclrtStream handle, int32_t *id) {
    Stream *stream = stream_of(handle);
    REQUIRE(stream && id, "%p is no stream", handle);
    *id = stream->id;
    return 0;
}
API aclError aclrtSetStreamFailureMode(aclrtStream handle, uint64_t mode) {
    REQUIRE(stream_of(handle) && mode <= 1, "mode %lu", (unsigned long)mode);
    return 0;
}
API aclError aclrtSetStreamAttribute(aclrtStream handle, aclrtStreamAttr attribute, aclrtStreamAttrValue *value) {
    REQUIRE(stream_of(handle) && value, "attribute %d", attribute);
    return 0;
}
API aclError aclrtGetStreamOverflowSwitch(aclrtStream handle, uint32_t *flag) {
    REQUIRE(stream_of(handle) && flag, "%p is no stream", handle);
    *flag = 0;
    return 0;
}

/* Waiting for a stream that is being captured is an error, for others it is forbidden while a capture runs. */
API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout_ms) {
    TRACE("%p", handle);
    Stream *stream = stream_of(handle);
    REQUIRE(stream && timeout_ms >= -1, "%p is no stream", handle);
    if (stream->capture) {
        stream->capture->state = INVALIDATED;
        return FAIL(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured");
    }
    const int forbidden = unsafe_in_capture(__func__);
    return forbidden ? forbidden : ask(SYNC_STREAM, stream, (uint64_t)(int64_t)timeout_ms, 0, 0);
}
API aclError aclrtSynchronizeStream(aclrtStream stream) { return aclrtSynchronizeStreamWithTimeout(stream, -1); }
API aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
    TRACE("%d", timeout_ms);
    REQUIRE(timeout_ms >= -1, "timeout %d", timeout_ms);
    const int forbidden = unsafe_in_capture(__func__);
    return forbidden ? forbidden : ask(SYNC_DEVICE, NULL, (uint64_t)(int64_t)timeout_ms, 0, 0);
}
API aclError aclrtSynchronizeDevice(void) { return aclrtSynchronizeDeviceWithTimeout(-1); }
API aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus *status) {
    Stream *stream = stream_of(handle);
    REQUIRE(stream && status, "%p is no stream", handle);
    if (stream->capture) return FAIL(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured");
    const int answer = ask(QUERY_STREAM, stream, 0, 0, 0);
    *status = answer ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
    return answer > 1 ? answer : 0;
}

static Event *event_of(aclrtEvent handle) {
    Event *event = handle;
    return event && event->magic == EVENT_MAGIC ? event : NULL;
}
API aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
    REQUIRE(event && (flag & ~0x7fu) == 0, "flag %#x", flag);
    Event *made = calloc(1, sizeof *made);
    made->magic = EVENT_MAGIC, made->flag = flag;
    *event = made;
    return 0;
}
API aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
API aclError aclrtCreateEvent(aclrtEvent *event) { return aclrtCreateEventExWithFlag(event, ACL_EVENT_SYNC); }
API aclError aclrtDestroyEvent(aclrtEvent handle) {
    Event *event = event_of(handle);
    REQUIRE(event, "%p is no event", handle);
    const int code = ask(FORGET_EVENT, event, 0, 0, 0);
    event->magic = 0;
    free(event);
    return code;
}
API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream on) {
    TRACE("%p on %p", handle, on);
    Event *event = event_of(handle);
    Stream *stream = stream_of(on);
    REQUIRE(event && stream, "event %p, stream %p", handle, on);
    if (in_task_group(stream)) return TASK_NOT_SUPPORTED(stream);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->recorded++, event->captured_in = stream->capture;
    event->recorded_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return ask(RECORD_EVENT, stream, (uint64_t)event, 0, 0);
}
/* A stream that waits for an event of a captured stream is captured too, into the same model. */
API aclError aclrtStreamWaitEvent(aclrtStream on, aclrtEvent handle) {
    TRACE("%p on %p", handle, on);
    Event *event = event_of(handle);
    Stream *stream = stream_of(on);
    REQUIRE(event && stream, "event %p, stream %p", handle, on);
    if (stream->updating || (stream->capture && stream->capture->group_open))
        return FAIL(ACL_ERROR_STREAM_TASK_GROUP_INTR, "an event inside a task group");
    Model *model = event->captured_in;
    if (model && model->magic == MODEL_MAGIC && model->state == CAPTURING) {
        if (stream->capture && stream->capture != model) return FAIL(ACL_ERROR_STREAM_CAPTURE_CONFLICT, "two captures at once");
        if (!stream->capture) {
            if (!take_streams(1)) return FAIL(ACL_ERROR_RT_NO_STREAM_RESOURCE, "EL0009 Stream resources are insufficient");
            model->num_streams++;
            stream->capture = model, stream->joined = true;
            const int code = ask(CAPTURE_JOIN, stream, (uint64_t)model, 0, 0);
            if (code) return code;
        }
    } else if (model && model->magic == MODEL_MAGIC) {
        return FAIL(ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a capture that has ended");
    } else if (stream->capture) {
        stream->capture->state = INVALIDATED;
        return FAIL(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for work that is not captured");
    }
    return ask(WAIT_EVENT, stream, (uint64_t)event, 0, 0);
}
API aclError aclrtResetEvent(aclrtEvent handle, aclrtStream on) {
    REQUIRE(event_of(handle) && stream_of(on), "event %p, stream %p", handle, on);
    return 0; /* a later record counts as another one already */
}
static int status_of(const char *function, aclrtEvent handle, int *answer) {
    Event *event = event_of(handle);
    if (!event) return fail(ACL_ERROR_RT_PARAM_INVALID, function, "%p is no event", handle);
    if (event->captured_in) return fail(ACL_ERROR_RT_EVENT_CAPTURED, function, "the event was recorded in a capture");
    *answer = ask(QUERY_EVENT, event, 0, 0, 0);
    return *answer > 1 ? *answer : 0;
}
API aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    int answer = 0;
    const int code = status_of(__func__, event, &answer);
    REQUIRE(status, "status is null");
    *status = answer ? ACL_EVENT_RECORDED_STATUS_NOT_READY : ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return code;
}
API aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    int answer = 0;
    const int code = status_of(__func__, event, &answer);
    REQUIRE(status, "status is null");
    *status = answer ? ACL_EVENT_WAIT_STATUS_NOT_READY : ACL_EVENT_WAIT_STATUS_COMPLETE;
    return code;
}
API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
    Event *event = event_of(handle);
    REQUIRE(event, "%p is no event", handle);
    if (event->captured_in) return FAIL(ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a capture");
    const int forbidden = unsafe_in_capture(__func__);
    return forbidden ? forbidden : ask(SYNC_EVENT, event, 0, 0, 0);
}
API aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
    Event *first = event_of(start), *last = event_of(end);
    REQUIRE(ms && first && last, "start %p, end %p", start, end);
    if (!(first->flag & ACL_EVENT_TIME_LINE) || !(last->flag & ACL_EVENT_TIME_LINE) || !first->recorded || !last->recorded)
        return FAIL(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "an event without a time");
    *ms = (float)(last->recorded_ns - first->recorded_ns) / 1e6f;
    return 0;
}

/* A word in device memory that streams wait for and write: what torch_npu's ExternalEvent is made of. */
API aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream on) {
    TRACE("%p = %lu on %p", address, (unsigned long)value, on);
    Stream *stream = stream_of(on);
    REQUIRE(stream && (uintptr_t)address % 8 == 0 && is_device(address, 8), "address %p", address);
    REQUIRE(flag <= ACL_STREAM_WAIT_VALUE_NOR, "flag %u", flag);
    if (stream->updating || (stream->capture && stream->capture->group_open))
        return FAIL(ACL_ERROR_STREAM_TASK_GROUP_INTR, "a wait inside a task group");
    return ask(VALUE_WAIT, stream, (uint64_t)address, value, flag);
}
API aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream on) {
    TRACE("%p = %lu on %p", address, (unsigned long)value, on);
    Stream *stream = stream_of(on);
    REQUIRE(stream && (uintptr_t)address % 8 == 0 && is_device(address, 8) && flag == 0, "address %p, flag %u", address, flag);
    if (stream->updating || (stream->capture && stream->capture->group_open))
        return FAIL(ACL_ERROR_STREAM_TASK_GROUP_INTR, "a write inside a task group");
    return ask(VALUE_WRITE, stream, (uint64_t)address, value, flag);
}
API aclError aclrtLaunchHostFunc(aclrtStream on, aclrtHostFunc function, void *argument) {
    Stream *stream = stream_of(on);
    REQUIRE(stream && function, "stream %p", on);
    return ask(HOST_FUNCTION, stream, (uint64_t)function, (uint64_t)argument, 0);
}
