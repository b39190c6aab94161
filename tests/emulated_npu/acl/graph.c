/* Captured models (aclmdlRI): the states of a capture, task groups and updates. Nodes are kept by machine.py. */
#include "runtime.h"

#define MOST_CAPTURES 16

static Model *captures[MOST_CAPTURES];
static int next_id = 1;
static _Thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

static Model *model_of(aclmdlRI handle) {
    Model *model = handle;
    return model && model->magic == MODEL_MAGIC ? model : NULL;
}

/* A capture in any mode but "relaxed" forbids waiting calls, on every thread. By the documents "thread_local" leaves
 * other threads alone; on devices they have been seen to fail all the same, so they fail here. A thread that has
 * exchanged its own mode for "relaxed", as torch_npu's allocator does, is let through. */
Model *forbidding_capture(void) {
    if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return NULL;
    Model *found = NULL;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_CAPTURES && !found; i++)
        if (captures[i] && captures[i]->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED) found = captures[i];
    pthread_mutex_unlock(&lock);
    return found;
}
int unsafe_in_capture(const char *function) {
    Model *model = forbidding_capture();
    if (!model) return 0;
    model->state = INVALIDATED;
    return fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, function, "the current capture mode does not support this operation");
}
int task_not_supported(Stream *stream, const char *function) {
    if (stream->capture) stream->capture->state = INVALIDATED;
    return fail(ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT, function, "rtEventRecord execution failed, reason=task not supported: runtime result = %d", ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT);
}
API int emulated_npu_unsafe_in_capture(void) { return unsafe_in_capture("a kernel that waits for its result"); }

API aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
    REQUIRE(mode && *mode <= ACL_MODEL_RI_CAPTURE_MODE_RELAXED, "mode is null or unknown");
    const aclmdlRICaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return 0;
}
API aclError aclmdlRICaptureBegin(aclrtStream on, aclmdlRICaptureMode mode) {
    TRACE("%p mode %d", on, mode);
    Stream *stream = stream_of(on);
    REQUIRE(stream && mode <= ACL_MODEL_RI_CAPTURE_MODE_RELAXED, "stream %p, mode %d", on, mode);
    if (!on) return FAIL(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the default stream cannot be captured");
    if (stream->capture) return FAIL(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured already");
    if (stream->updating) return FAIL(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "the stream is in a task update");
    if (!take_streams(1)) return FAIL(ACL_ERROR_RT_NO_STREAM_RESOURCE, "EL0009 Stream resources are insufficient");
    Model *made = calloc(1, sizeof *made);
    *made = (Model){.magic = MODEL_MAGIC, .num_streams = 1, .mode = mode, .state = CAPTURING, .origin = stream, .owner = pthread_self()};
    pthread_mutex_lock(&lock);
    made->id = next_id++;
    int i = 0;
    while (i < MOST_CAPTURES && captures[i]) i++;
    if (i < MOST_CAPTURES) captures[i] = made;
    pthread_mutex_unlock(&lock);
    if (i == MOST_CAPTURES) return FAIL(ACL_ERROR_RT_NO_MODEL_RESOURCE, "%d captures at once", MOST_CAPTURES);
    stream->capture = made;
    return ask(CAPTURE_BEGIN, stream, (uint64_t)made, 0, 0);
}
API aclError aclmdlRICaptureGetInfo(aclrtStream on, aclmdlRICaptureStatus *status, aclmdlRI *model) {
    const Stream *stream = stream_of(on);
    REQUIRE(stream && status, "%p is no stream", on);
    Model *capture = stream->capture;
    *status = !capture                       ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
              : capture->state == CAPTURING ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE
                                             : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
    if (model) *model = capture;
    return 0;
}
API aclError aclmdlRICaptureEnd(aclrtStream on, aclmdlRI *handle) {
    TRACE("%p", on);
    Stream *stream = stream_of(on);
    REQUIRE(stream && handle, "%p is no stream", on);
    Model *model = stream->capture;
    if (!model) return FAIL(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    if (model->origin != stream) return FAIL(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture began on another stream");
    if (model->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && !pthread_equal(model->owner, pthread_self()))
        return FAIL(ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD, "the capture began on another thread");
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_CAPTURES; i++)
        if (captures[i] == model) captures[i] = NULL;
    pthread_mutex_unlock(&lock);
    const bool broken = model->state == INVALIDATED, open = model->group_open;
    model->state = broken || open ? INVALIDATED : READY;
    const int code = ask(CAPTURE_END, stream, (uint64_t)model, model->state == READY, 0); /* also releases the streams */
    *handle = NULL;
    if (broken || open || code) {
        give_streams(model->num_streams);
        model->num_streams = 0;
        if (broken) return FAIL(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "something forbidden happened in the capture");
        return open ? FAIL(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "a task group was not ended") : code;
    }
    *handle = model;
    return 0;
}
API void emulated_npu_release_capture(void *handle) { /* a stream is captured no more */
    Stream *stream = stream_of(handle);
    if (stream) stream->capture = NULL, stream->joined = false;
}
API aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream on) {
    TRACE("%p on %p", handle, on);
    Model *model = model_of(handle);
    Stream *stream = stream_of(on);
    REQUIRE(model && stream, "model %p, stream %p", handle, on);
    if (model->state != READY) return FAIL(ACL_ERROR_RT_MODEL_CAPTURED, "the capture has not ended well");
    if (stream->capture) return FAIL(ACL_ERROR_RT_STREAM_CAPTURED, "a replay inside a capture");
    return ask(EXECUTE, stream, (uint64_t)model, 0, 0);
}
API aclError aclmdlRIDestroy(aclmdlRI handle) {
    TRACE("%p", handle);
    Model *model = model_of(handle);
    REQUIRE(model && model->state != CAPTURING, "%p is no model that can be destroyed", handle);
    const int code = ask(DESTROY_MODEL, model, 0, 0, 0);
    if (code) return code; /* it still runs */
    give_streams(model->num_streams);
    model->magic = 0; /* the handle stays readable, so that a second destruction is seen */
    return 0;
}
API aclError aclmdlRIGetId(aclmdlRI handle, uint32_t *id) {
    REQUIRE(model_of(handle) && id, "%p is no model", handle);
    *id = (uint32_t)model_of(handle)->id;
    return 0;
}

API aclError aclmdlRICaptureTaskGrpBegin(aclrtStream on) {
    Stream *stream = stream_of(on);
    REQUIRE(stream, "%p is no stream", on);
    if (!stream->capture) return FAIL(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "a task group outside a capture");
    if (stream->capture->group_open) return FAIL(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "task groups do not nest");
    stream->capture->group_open = stream->capture->has_groups = true;
    return ask(GROUP_BEGIN, stream, 0, 0, 0);
}
API aclError aclmdlRICaptureTaskGrpEnd(aclrtStream on, aclrtTaskGrp *handle) {
    Stream *stream = stream_of(on);
    REQUIRE(stream && handle, "%p is no stream", on);
    if (!stream->capture || !stream->capture->group_open) return FAIL(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no task group is open");
    Group *made = calloc(1, sizeof *made);
    made->magic = GROUP_MAGIC, made->model = stream->capture;
    stream->capture->group_open = false;
    *handle = made;
    return ask(GROUP_END, stream, (uint64_t)made, 0, 0);
}
API aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream on, aclrtTaskGrp handle) {
    TRACE("%p on %p", handle, on);
    Stream *stream = stream_of(on);
    Group *group = handle;
    REQUIRE(stream && group && group->magic == GROUP_MAGIC, "%p is no task group", handle);
    REQUIRE(group->model->magic == MODEL_MAGIC, "the model of the task group is destroyed");
    if (group->model->state != READY) return FAIL(ACL_ERROR_RT_MODEL_CAPTURED, "the model is still being captured");
    if (stream->capture) return FAIL(ACL_ERROR_RT_STREAM_CAPTURED, "an update on a captured stream");
    if (stream->updating) return FAIL(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "task updates do not nest");
    stream->updating = group;
    return ask(UPDATE_BEGIN, stream, (uint64_t)group, 0, 0);
}
API aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream on) {
    Stream *stream = stream_of(on);
    REQUIRE(stream, "%p is no stream", on);
    if (!stream->updating) return FAIL(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no task update is open");
    Group *group = stream->updating;
    stream->updating = NULL;
    return ask(UPDATE_END, stream, (uint64_t)group, 0, 0);
}
