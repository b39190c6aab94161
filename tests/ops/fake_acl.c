/* The virtual memory calls of Ascend's ACL runtime on host memory, strict about every argument: what a caller gets
 * wrong here fails here. A physical allocation is a file in memory, a mapping is mmap. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define GRANULE (2ul << 20)
#define BAD_PARAM 107000
#define NO_MEMORY 207001
#define NO_CONTEXT 107002
#define MOST 65536

typedef struct {
    int32_t handle_type, allocation_type, memory_attribute;
    struct {
        uint32_t id;
        int32_t type;
    } location;
    uint64_t reserved;
} Property;
typedef struct {
    int file, num_mapped;
    size_t size;
} Physical;

static struct { char *start; size_t size; } ranges[64];
static struct { char *at; Physical *physical; } mapped[MOST];

static int valid(const Property *p) {
    return p && p->handle_type == 0 && p->allocation_type == 0 && p->memory_attribute == 4 && p->location.id == 0 &&
           p->location.type == 1 && p->reserved == 0;
}
static int range_of(const char *at, size_t size) {
    for (int i = 0; i < 64; i++)
        if (ranges[i].start && at >= ranges[i].start && at + size <= ranges[i].start + ranges[i].size) return i;
    return -1;
}
static int mapping_at(const char *at) {
    for (int i = 0; i < MOST; i++)
        if (mapped[i].physical && at >= mapped[i].at && at < mapped[i].at + mapped[i].physical->size) return i;
    return -1;
}

static __thread int entered; /* as a thread's current device is */

int aclrtSetDevice(int32_t device) {
    entered = device == 0;
    return entered ? 0 : BAD_PARAM;
}

int aclrtMemGetAllocationGranularity(const Property *property, int option, size_t *granularity) {
    if (!entered) return NO_CONTEXT;
    if (!valid(property) || option < 0 || option > 1) return BAD_PARAM;
    *granularity = GRANULE;
    return 0;
}
int aclrtReserveMemAddress(void **address, size_t size, size_t alignment, void *expected, uint64_t flags) {
    if (!entered) return NO_CONTEXT;
    if (size == 0 || size % GRANULE || alignment || expected || flags) return BAD_PARAM;
    char *got = mmap(NULL, size + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) return NO_MEMORY;
    got += -(uintptr_t)got % GRANULE;
    for (int i = 0; i < 64; i++)
        if (!ranges[i].start) {
            ranges[i].start = got, ranges[i].size = size;
            *address = got;
            return 0;
        }
    return NO_MEMORY;
}
int aclrtReleaseMemAddress(void *address) {
    if (!entered) return NO_CONTEXT;
    for (int i = 0; i < 64; i++)
        if (ranges[i].start == (char *)address && address) {
            for (int m = 0; m < MOST; m++)
                if (mapped[m].physical && range_of(mapped[m].at, 1) == i) return BAD_PARAM; /* still mapped */
            munmap(address, ranges[i].size);
            ranges[i].start = NULL;
            return 0;
        }
    return BAD_PARAM;
}
int aclrtMallocPhysical(void **handle, size_t size, const Property *property, uint64_t flags) {
    if (!entered) return NO_CONTEXT;
    if (size == 0 || size % GRANULE || !valid(property) || flags) return BAD_PARAM;
    Physical *made = calloc(1, sizeof *made);
    made->file = memfd_create("fake-npu", 0), made->size = size;
    if (made->file < 0 || ftruncate(made->file, (off_t)size)) return NO_MEMORY;
    *handle = made;
    return 0;
}
int aclrtFreePhysical(void *handle) {
    if (!entered) return NO_CONTEXT;
    Physical *physical = handle;
    if (!physical || physical->num_mapped) return BAD_PARAM;
    close(physical->file);
    free(physical);
    return 0;
}
int aclrtMapMem(void *address, size_t size, size_t offset, void *handle, uint64_t flags) {
    if (!entered) return NO_CONTEXT;
    Physical *physical = handle;
    if (offset || flags || !physical || size != physical->size || (uintptr_t)address % GRANULE) return BAD_PARAM;
    if (range_of(address, size) < 0) return BAD_PARAM;
    for (char *at = address; at < (char *)address + size; at += GRANULE)
        if (mapping_at(at) >= 0) return BAD_PARAM;
    if (mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, 0) != address) return NO_MEMORY;
    for (int i = 0; i < MOST; i++)
        if (!mapped[i].physical) {
            mapped[i].at = address, mapped[i].physical = physical, physical->num_mapped++;
            return 0;
        }
    return NO_MEMORY;
}
int aclrtUnmapMem(void *address) {
    if (!entered) return NO_CONTEXT;
    const int i = mapping_at(address);
    if (i < 0 || mapped[i].at != (char *)address) return BAD_PARAM;
    mmap(address, mapped[i].physical->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    mapped[i].physical->num_mapped--;
    mapped[i].physical = NULL;
    return 0;
}
int aclrtMemset(void *address, size_t most, int32_t value, size_t count) {
    if (!entered) return NO_CONTEXT;
    if (count > most || mapping_at(address) < 0 || mapping_at((char *)address + count - 1) < 0) return BAD_PARAM;
    for (size_t i = 0; i < count; i++) ((char *)address)[i] = (char)value;
    return 0;
}
