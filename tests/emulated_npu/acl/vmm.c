/* Virtual memory: a physical allocation is a file in memory, a mapping is mmap. All arguments are checked. */
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#define GRANULE (2 * MIB)
#define MOST_RANGES 1024
#define MOST_MAPPINGS 65536

typedef struct { int file, num_mapped; size_t size; } Physical;
static struct { char *start; size_t size; } ranges[MOST_RANGES];
static struct { char *at; Physical *physical; } mappings[MOST_MAPPINGS];
static int num_mappings; /* slots in use or used before */

static bool valid(const aclrtPhysicalMemProp *p) {
    return p && p->handleType == ACL_MEM_HANDLE_TYPE_NONE && p->allocationType == ACL_MEM_ALLOCATION_TYPE_PINNED &&
           (p->memAttr == ACL_HBM_MEM_HUGE || p->memAttr == ACL_HBM_MEM_HUGE1G) &&
           p->location.type == ACL_MEM_LOCATION_TYPE_DEVICE && physical_device((int32_t)p->location.id) >= 0 &&
           p->reserve == 0;
}
static size_t granule_of(const aclrtPhysicalMemProp *p) { return p->memAttr == ACL_HBM_MEM_HUGE1G ? 1024 * MIB : GRANULE; }
static int range_of(const char *at, size_t size) {
    for (int i = 0; i < MOST_RANGES; i++)
        if (ranges[i].start && at >= ranges[i].start && at + size <= ranges[i].start + ranges[i].size) return i;
    return -1;
}
bool is_reserved(const void *pointer, size_t size) { return range_of(pointer, size) >= 0; }
/* The mapping that shares a byte with [at, at + size), or -1. */
static int mapping_in(const char *at, size_t size) {
    for (int i = 0; i < num_mappings; i++)
        if (mappings[i].physical && at < mappings[i].at + mappings[i].physical->size && mappings[i].at < at + size) return i;
    return -1;
}

API aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *prop, aclrtMemGranularityOptions option, size_t *granularity) {
    REQUIRE(valid(prop) && granularity, "a wrong property");
    REQUIRE(option == ACL_RT_MEM_ALLOC_GRANULARITY_MINIMUM || option == ACL_RT_MEM_ALLOC_GRANULARITY_RECOMMENDED, "option %d", option);
    *granularity = granule_of(prop);
    return 0;
}
API aclError aclrtReserveMemAddress(void **address, size_t size, size_t alignment, void *expected, uint64_t flags) {
    /* The alignment must be 0; of the flags only "huge pages" is known. Any size will do, as torch_npu tries it with
     * 512 bytes: what is reserved is whole pages. */
    TRACE("%zu flags %lu", size, (unsigned long)flags);
    REQUIRE(address && size && alignment == 0 && flags <= 1, "size %zu, alignment %zu, flags %lu", size, alignment, (unsigned long)flags);
    size = (size + GRANULE - 1) / GRANULE * GRANULE;
    char *got = mmap(expected, size + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "%zu bytes of addresses", size);
    const size_t before = -(uintptr_t)got % GRANULE;
    if (before) munmap(got, before);
    if (GRANULE - before) munmap(got + before + size, GRANULE - before);
    got += before;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_RANGES; i++)
        if (!ranges[i].start) {
            ranges[i].start = got, ranges[i].size = size;
            *address = got;
            pthread_mutex_unlock(&lock);
            TRACE("%zu -> %p", size, (void *)got);
            return 0;
        }
    pthread_mutex_unlock(&lock);
    munmap(got, size);
    return FAIL(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "more than %d reservations", MOST_RANGES);
}
API aclError aclrtReleaseMemAddress(void *address) {
    TRACE("%p", address);
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < MOST_RANGES && (!address || ranges[i].start != address)) i++;
    const bool known = i < MOST_RANGES, mapped = known && mapping_in(address, ranges[i].size) >= 0;
    if (known && !mapped) {
        munmap(address, ranges[i].size);
        ranges[i].start = NULL;
    }
    pthread_mutex_unlock(&lock);
    REQUIRE(known, "%p is not the start of a reservation", address);
    REQUIRE(!mapped, "pages are still mapped at %p", address);
    return 0;
}
API aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size, const aclrtPhysicalMemProp *prop, uint64_t flags) {
    REQUIRE(handle && valid(prop) && flags == 0, "a wrong property, or flags %lu", (unsigned long)flags);
    REQUIRE(size && size % granule_of(prop) == 0, "size %zu is no multiple of %zu", size, granule_of(prop));
    if (!take_hbm(size)) return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "%zu bytes do not fit in what is left of %zu", size, hbm_bytes());
    Physical *made = calloc(1, sizeof *made);
    made->file = memfd_create("npu", MFD_CLOEXEC), made->size = size;
    if (made->file < 0 || ftruncate(made->file, (off_t)size)) {
        give_hbm(size);
        free(made);
        return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes", size);
    }
    *handle = made;
    return 0;
}
API aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    Physical *physical = handle;
    REQUIRE(physical && physical->num_mapped == 0, "%p is still mapped", handle);
    give_hbm(physical->size);
    close(physical->file);
    free(physical);
    return 0;
}
API aclError aclrtMapMem(void *address, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
    TRACE("%p %zu", address, size);
    Physical *physical = handle;
    /* The offset must be 0, and a physical allocation is mapped whole. */
    REQUIRE(physical && offset == 0 && flags == 0, "offset %zu, flags %lu", offset, (unsigned long)flags);
    REQUIRE(size == physical->size && (uintptr_t)address % GRANULE == 0, "%zu of %zu bytes at %p", size, physical->size, address);
    pthread_mutex_lock(&lock);
    const bool reserved = range_of(address, size) >= 0, taken = mapping_in(address, size) >= 0;
    int i = 0;
    while (i < num_mappings && mappings[i].physical) i++;
    const bool fits = reserved && !taken && i < MOST_MAPPINGS;
    if (fits) {
        if (i == num_mappings) num_mappings++;
        mappings[i].at = address, mappings[i].physical = physical, physical->num_mapped++;
    }
    pthread_mutex_unlock(&lock);
    REQUIRE(reserved, "%p is not reserved", address);
    REQUIRE(fits, "something is mapped at %p", address);
    if (mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, 0) != address) return FAIL(ACL_ERROR_RT_MEMORY_ALLOCATION, "mmap");
    remember_mapping(address, size);
    return 0;
}
API aclError aclrtUnmapMem(void *address) {
    TRACE("%p", address);
    pthread_mutex_lock(&lock);
    const int i = mapping_in(address, 1);
    const bool starts = i >= 0 && mappings[i].at == (char *)address;
    const size_t size = starts ? mappings[i].physical->size : 0;
    pthread_mutex_unlock(&lock);
    REQUIRE(starts, "no mapping starts at %p", address);
    const int code = ask(MEMORY_GONE, address, size, 0, 0); /* queued work that uses it faults */
    pthread_mutex_lock(&lock);
    mappings[i].physical->num_mapped--;
    mappings[i].physical = NULL;
    pthread_mutex_unlock(&lock);
    forget_mapping(address);
    mmap(address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return code;
}
