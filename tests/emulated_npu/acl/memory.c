/* Device memory is host memory. Every block is known, so that copies can be checked against their kind and size, and
 * the total is bounded by EMULATED_NPU_HBM_BYTES. Blocks given back are poisoned: stale readers see NaN. */
#include "runtime.h"

#include <sys/mman.h>

#define MOST_BLOCKS 65536

enum Place { NOWHERE, DEVICE, PINNED, MAPPED };
static struct Block { char *start; size_t size; enum Place place; } blocks[MOST_BLOCKS];
static int num_blocks; /* slots in use or used before */
static size_t used_bytes;

size_t hbm_bytes(void) { return (size_t)setting("EMULATED_NPU_HBM_BYTES", 4l << 30); }

int take_hbm(size_t size) {
    pthread_mutex_lock(&lock);
    const bool fits = size <= hbm_bytes() && used_bytes <= hbm_bytes() - size;
    if (fits) used_bytes += size;
    pthread_mutex_unlock(&lock);
    return fits;
}
void give_hbm(size_t size) {
    pthread_mutex_lock(&lock);
    used_bytes -= size;
    pthread_mutex_unlock(&lock);
}

static void remember(void *start, size_t size, enum Place place) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < num_blocks && blocks[i].place) i++;
    if (i == MOST_BLOCKS) abort();
    blocks[i] = (struct Block){start, size, place};
    if (i == num_blocks) num_blocks++;
    pthread_mutex_unlock(&lock);
}
/* The size of the block that starts here, which is known no more; 0: there is none. */
static size_t forget(void *start, enum Place place) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_blocks; i++)
        if (blocks[i].place == place && blocks[i].start == start) {
            size = blocks[i].size;
            blocks[i].place = NOWHERE;
            break;
        }
    pthread_mutex_unlock(&lock);
    return size;
}
void remember_mapping(void *at, size_t size) { remember(at, size, MAPPED); }
void forget_mapping(void *at) { forget(at, MAPPED); }

/* Whether all of [pointer, pointer + size) lies in blocks of that kind; mapped pages may follow one another. */
static bool lies_in(const char *pointer, size_t size, bool device) {
    const char *at = pointer, *end = pointer + size;
    pthread_mutex_lock(&lock);
    for (bool moved = true; moved && at < end;) {
        moved = false;
        for (int i = 0; i < num_blocks; i++) {
            const struct Block *b = &blocks[i];
            const bool fits = device ? b->place == DEVICE || b->place == MAPPED : b->place == PINNED;
            if (!fits || at < b->start || at >= b->start + b->size) continue;
            if (b->place != MAPPED && end > b->start + b->size) continue; /* over the end of an allocation */
            at = b->start + b->size;
            moved = true;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return at >= end;
}
bool is_device(const void *pointer, size_t size) { return lies_in(pointer, size, true); }
bool is_pinned(const void *pointer, size_t size) { return lies_in(pointer, size, false); }

/* The first of `count` ranges that is not device memory (any more); -1: all are. Of a reserved range not every page need
 * be mapped: a kernel reads those that it is told, and others end the process. */
API int emulated_npu_first_dead(const uint64_t *starts, const uint64_t *sizes, int count) {
    for (int i = 0; i < count; i++)
        if (!is_device((const void *)starts[i], sizes[i]) && !is_reserved((const void *)starts[i], sizes[i])) return i;
    return -1;
}
API int emulated_npu_is_pinned(const void *pointer, size_t size) { return is_pinned(pointer, size); }
API size_t emulated_npu_used_bytes(void) { return used_bytes; }

static size_t rounded(size_t size) { return (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB); } /* huge pages */

API aclError aclrtMalloc(void **pointer, size_t size, aclrtMemMallocPolicy policy) {
    REQUIRE(pointer && size, "size %zu", size);
    REQUIRE((policy & 0xff) <= ACL_MEM_MALLOC_HUGE1G_ONLY_P2P, "policy %#x", policy);
    /* Allowed in a capture: torch_npu's allocator does it there without exchanging the mode. */
    if (!take_hbm(rounded(size))) return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "%zu bytes: %zu of %zu are in use", size, used_bytes, hbm_bytes());
    void *got = mmap(NULL, rounded(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) {
        give_hbm(rounded(size));
        return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes", size);
    }
    remember(got, rounded(size), DEVICE);
    TRACE("%zu -> %p", size, got);
    *pointer = got;
    return 0;
}
API aclError aclrtMallocAlign32(void **pointer, size_t size, aclrtMemMallocPolicy policy) { return aclrtMalloc(pointer, size, policy); }
API aclError aclrtFree(void *pointer) {
    TRACE("%p", pointer);
    const int forbidden = unsafe_in_capture(__func__);
    if (forbidden) return forbidden;
    pthread_mutex_lock(&lock);
    size_t size = 0;
    for (int i = 0; i < num_blocks; i++)
        if (blocks[i].place == DEVICE && blocks[i].start == pointer) size = blocks[i].size;
    pthread_mutex_unlock(&lock);
    REQUIRE(size, "%p was not allocated, or freed before", pointer);
    const int code = ask(MEMORY_GONE, pointer, size, 0, 0); /* queued work that uses it faults */
    forget(pointer, DEVICE);
    give_hbm(size);
    munmap(pointer, size);
    return code;
}

API aclError aclrtMallocHost(void **pointer, size_t size) {
    REQUIRE(pointer && size, "size %zu", size);
    *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    if (!*pointer) return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "%zu bytes of the host's", size);
    remember(*pointer, size, PINNED);
    return 0;
}
API aclError aclrtMallocHostWithCfg(void **pointer, uint64_t size, aclrtMallocConfig *config) {
    (void)config;
    return aclrtMallocHost(pointer, size);
}
API aclError aclrtFreeHost(void *pointer) {
    const size_t size = forget(pointer, PINNED);
    REQUIRE(size, "%p was not allocated, or freed before", pointer);
    free(pointer);
    return 0;
}
API aclError aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *attributes) {
    REQUIRE(attributes, "attributes is null");
    memset(attributes, 0, sizeof *attributes);
    attributes->location.type = is_device(pointer, 1)   ? ACL_MEM_LOCATION_TYPE_DEVICE
                                : is_pinned(pointer, 1) ? ACL_MEM_LOCATION_TYPE_HOST
                                                        : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    return 0;
}

/* A copy's kind says where its ends lie, and neither may reach over the end of its block. */
static int check_copy(const char *function, const void *to, size_t most, const void *from, size_t count, aclrtMemcpyKind kind) {
    if (!to || !from || count > most) return fail(ACL_ERROR_RT_PARAM_INVALID, function, "%zu bytes into %zu", count, most);
    const bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
    const bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
    if (kind > ACL_MEMCPY_DEVICE_TO_DEVICE) return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, function, "kind %d is not emulated", kind);
    if (is_device(to, count) != to_device || is_device(from, count) != from_device)
        return fail(ACL_ERROR_RT_PARAM_INVALID, function, "kind %d, but to %p from %p, %zu bytes", kind, to, from, count);
    return 0;
}
API aclError aclrtMemcpy(void *to, size_t most, const void *from, size_t count, aclrtMemcpyKind kind) {
    TRACE("%p <- %p %zu kind %d", to, from, count, kind);
    const int forbidden = unsafe_in_capture(__func__);
    if (forbidden) return forbidden;
    if (!count) return 0;
    const int wrong = check_copy(__func__, to, most, from, count, kind);
    if (wrong) return wrong;
    memmove(to, from, count); /* not ordered with any stream: that is for its caller */
    return 0;
}
API aclError aclrtMemcpyAsync(void *to, size_t most, const void *from, size_t count, aclrtMemcpyKind kind, aclrtStream handle) {
    TRACE("%p <- %p %zu kind %d stream %p", to, from, count, kind, handle);
    Stream *stream = stream_of(handle);
    REQUIRE(stream, "%p is no stream", handle);
    const int wrong = check_copy(__func__, to, most, from, count, kind);
    if (wrong) return wrong;
    const void *host = kind == ACL_MEMCPY_HOST_TO_DEVICE ? from : kind == ACL_MEMCPY_DEVICE_TO_HOST ? to : NULL;
    if (stream->capture && kind != ACL_MEMCPY_DEVICE_TO_DEVICE) {
        stream->capture->state = INVALIDATED;
        return FAIL(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, "a copy between host and device cannot be captured");
    }
    if (host && !is_pinned(host, count)) { /* pageable memory: the call returns when the copy is done */
        const int forbidden = unsafe_in_capture(__func__);
        if (forbidden) return forbidden;
        const int code = ask(SYNC_STREAM, stream, (uint64_t)-1, 0, 0);
        if (code) return code;
        memmove(to, from, count);
        return 0;
    }
    return ask(COPY, stream, (uint64_t)to, (uint64_t)from, count);
}
API aclError aclrtMemset(void *to, size_t most, int32_t value, size_t count) {
    REQUIRE(to && count <= most && is_device(to, count), "%zu bytes at %p", count, to);
    const int forbidden = unsafe_in_capture(__func__);
    if (forbidden) return forbidden;
    memset(to, value, count);
    return 0;
}
API aclError aclrtMemsetAsync(void *to, size_t most, int32_t value, size_t count, aclrtStream handle) {
    Stream *stream = stream_of(handle);
    REQUIRE(stream && to && count <= most && is_device(to, count), "%zu bytes at %p", count, to);
    return ask(FILL, stream, (uint64_t)to, (uint64_t)(uint32_t)value, count);
}
API aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *free_bytes, size_t *total_bytes) {
    REQUIRE(free_bytes && total_bytes && attribute <= ACL_HBM_MEM_HUGE1G, "attribute %d", attribute);
    pthread_mutex_lock(&lock);
    *total_bytes = hbm_bytes();
    *free_bytes = hbm_bytes() > used_bytes ? hbm_bytes() - used_bytes : 0;
    pthread_mutex_unlock(&lock);
    return 0;
}
