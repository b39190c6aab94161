/* Communicators: how they come to be between processes, their names, errors and ends. */
#include "hccl.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>

#define EXEC_TIMEOUT_S 1836
#define CONNECT_TIMEOUT_S 120
#define BUFFER_MIB 200

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
uint64_t birth_of(int pid) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    const ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0) return 0;
    text[length] = 0;
    const char *after_name = strrchr(text, ')');
    char state = 0;
    unsigned long long birth = 0;
    /* field 3 is the state, field 22 the start */
    if (!after_name || sscanf(after_name + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu", &state, &birth) != 2) return 0;
    return state == 'Z' || state == 'X' ? 0 : birth + 1;
}

API HcclResult HcclGetRootInfo(HcclRootInfo *info) {
    if (!info) return FAIL(HCCL_E_PTR, "rootInfo is null");
    const int file = memfd_create("hccl", MFD_CLOEXEC); /* stays open: others come through this process to it */
    if (file < 0 || ftruncate(file, sizeof(Room))) return FAIL(HCCL_E_MEMORY, "no memory to share");
    memset(info, 0, sizeof *info);
    snprintf(info->internal, sizeof info->internal, "emulated-hccl %d %d %llu", getpid(), file, (unsigned long long)birth_of(getpid()));
    TRACE("%s", info->internal);
    return HCCL_SUCCESS;
}
static Room *room_at(const HcclRootInfo *info) {
    char path[64];
    int pid, file;
    unsigned long long birth;
    if (sscanf(info->internal, "emulated-hccl %d %d %llu", &pid, &file, &birth) != 3 || birth_of(pid) != birth) return NULL;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, file);
    const int mine = open(path, O_RDWR | O_CLOEXEC);
    if (mine < 0) return NULL;
    Room *room = mmap(NULL, sizeof(Room), PROT_READ | PROT_WRITE, MAP_SHARED, mine, 0);
    close(mine);
    return room == MAP_FAILED ? NULL : room;
}

/* Until all are there, or one of them cannot be. */
static int wait_for_all(Room *room, uint32_t num_ranks) {
    const uint64_t end = now_ns() + (uint64_t)setting("HCCL_CONNECT_TIMEOUT", CONNECT_TIMEOUT_S) * 1000000000u;
    for (;;) {
        uint32_t present = 0;
        if (room->refused) return FAIL(HCCL_E_PARA, "EI0004 another rank was refused");
        for (uint32_t i = 0; i < num_ranks; i++) {
            const int state = room->members[i].state;
            present += state == PRESENT;
            if (state == GONE || (state == PRESENT && birth_of(room->members[i].pid) != room->members[i].birth))
                return room->refused ? FAIL(HCCL_E_PARA, "EI0004 another rank was refused") : FAIL(HCCL_E_TIMEOUT, "EI0006 rank %u left while links were made", i);
        }
        if (present == num_ranks) return 0;
        if (now_ns() > end) return FAIL(HCCL_E_TIMEOUT, "EI0006 socket build timeout: %u of %u ranks came", present, num_ranks);
        usleep(500);
    }
}
static int join(Room *room, uint32_t num_ranks, uint32_t rank, int device) {
    uint32_t unset = 0;
    if (!atomic_compare_exchange_strong(&room->num_ranks, &unset, num_ranks) && unset != num_ranks) {
        room->refused = 1;
        return FAIL(HCCL_E_PARA, "EI0004 %u ranks here, %u elsewhere", num_ranks, unset);
    }
    Member *self = &room->members[rank];
    int absent = ABSENT;
    if (!atomic_compare_exchange_strong(&self->state, &absent, CLAIMED)) {
        room->refused = 1;
        return FAIL(HCCL_E_PARA, "EI0004 two processes are rank %u", rank);
    }
    self->pid = getpid(), self->birth = birth_of(getpid()), self->device = physical_device(device);
    self->state = PRESENT;
    const int code = wait_for_all(room, num_ranks);
    for (uint32_t i = 0; i < num_ranks && !code; i++)
        if (i != rank && room->members[i].device == self->device) {
            room->refused = 1;
            return FAIL(HCCL_E_PARA, "EI0004 ranks %u and %u use the same device, %d", rank, i, self->device);
        }
    return code;
}

static uint64_t timeout_ns(const HcclCommConfig *config) {
    long seconds = setting("HCCL_EXEC_TIMEOUT", EXEC_TIMEOUT_S);
    if (config && config->hcclExecTimeOut != (int32_t)HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET) seconds = config->hcclExecTimeOut;
    return (uint64_t)seconds * 1000000000u;
}
static bool on_vector_cores(const HcclCommConfig *config) {
    const char *mode = getenv("HCCL_OP_EXPANSION_MODE");
    if (config && config->hcclOpExpansionMode != HCCL_COMM_DEFAULT_OP_EXPANSION_MODE) return config->hcclOpExpansionMode == 3;
    return mode && !strcmp(mode, "AIV");
}
/* Each communicator has a buffer to send from and one to receive into. */
static size_t buffer_bytes(const HcclCommConfig *config) {
    long mib = setting("HCCL_BUFFSIZE", BUFFER_MIB);
    if (config && config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET) mib = config->hcclBufferSize;
    return 2 * (size_t)mib * MIB;
}

static HcclResult init(uint32_t num_ranks, const HcclRootInfo *info, uint32_t rank, const HcclCommConfig *config, HcclComm *made) {
    TRACE("rank %u of %u", rank, num_ranks);
    if (!info || !made) return FAIL(HCCL_E_PTR, "a null pointer");
    if (num_ranks == 0 || num_ranks > MOST_RANKS || rank >= num_ranks) return FAIL(HCCL_E_PARA, "rank %u of %u", rank, num_ranks);
    int32_t device;
    if (aclrtGetDevice(&device)) return FAIL(HCCL_E_RUNTIME, "this thread has set no device");
    if (unsafe_in_capture(__func__)) return HCCL_E_RUNTIME; /* it allocates and waits */
    Room *room = room_at(info);
    if (!room) return FAIL(HCCL_E_TCP_CONNECT, "EI0006 the root is not there");
    const size_t bytes = buffer_bytes(config);
    if (!take_hbm(bytes)) return FAIL(HCCL_E_OOM, "EI0007 no memory for buffers of %zu bytes (HCCL_BUFFSIZE)", bytes);
    const int code = join(room, num_ranks, rank, device);
    if (code) {
        room->members[rank].state = GONE;
        give_hbm(bytes);
        return (HcclResult)code;
    }
    Comm *comm = calloc(1, sizeof *comm);
    *comm = (Comm){.magic = COMM_MAGIC, .device = device, .num_ranks = num_ranks, .rank = rank, .room = room,
                   .on_vector_cores = on_vector_cores(config), .buffer_bytes = bytes, .timeout_ns = timeout_ns(config)};
    if (config && config->hcclCommName[0]) memcpy(comm->name, config->hcclCommName, sizeof comm->name - 1);
    else snprintf(comm->name, sizeof comm->name, "%.100s", info->internal);
    *made = comm;
    return (HcclResult)ask(COMM_OPENED, comm, 0, 0, 0);
}
API HcclResult HcclCommInitRootInfo(uint32_t num_ranks, const HcclRootInfo *info, uint32_t rank, HcclComm *comm) {
    return init(num_ranks, info, rank, NULL, comm);
}
API HcclResult HcclCommInitRootInfoConfig(uint32_t num_ranks, const HcclRootInfo *info, uint32_t rank, const HcclCommConfig *config, HcclComm *comm) {
    if (!config) return FAIL(HCCL_E_PTR, "config is null");
    const struct { size_t size; uint32_t magic, version; } *head = (const void *)config;
    if (head->magic != HCCL_COMM_CONFIG_MAGIC_WORD || head->size > sizeof *config) return FAIL(HCCL_E_PARA, "a configuration that was not initialised");
    return init(num_ranks, info, rank, config, comm);
}
API uint32_t HcclGetCommConfigCapability(void) { return HCCL_COMM_CONFIG_EXEC_TIMEOUT + 1; }

/* The memory of a communicator stays readable, so that a use after its end is seen. */
static Comm *comm_of(HcclComm handle) {
    Comm *comm = handle;
    return comm && comm->magic == COMM_MAGIC ? comm : NULL;
}
API HcclResult HcclCommDestroy(HcclComm handle) {
    TRACE("%p", handle);
    if (!handle) return FAIL(HCCL_E_PTR, "comm is null");
    if (!comm_of(handle)) return FAIL(HCCL_E_PARA, "%p is no communicator (any more)", handle);
    return (HcclResult)ask(COMM_CLOSED, handle, 0, 0, 0);
}
API void emulated_npu_comm_close(void *handle) { /* called by the machine, while nothing of it runs */
    Comm *comm = handle;
    if (!comm_of(comm)) return;
    comm->magic = 0;
    comm->room->members[comm->rank].state = GONE;
    for (int box = 0; box < MOST_BOXES; box++) {
        if (comm->files[box]) close(comm->files[box]);
        for (int peer = 0; peer < MOST_RANKS; peer++)
            if (comm->peer_files[peer][box]) close(comm->peer_files[peer][box]);
    }
    give_hbm(comm->buffer_bytes);
}
/* What was queued is given up: the others are not to wait for it. */
API void emulated_npu_comm_drop(void *handle) {
    Comm *comm = handle;
    if (!comm_of(comm) || !comm->running) return;
    comm->running = false, comm->async_error = HCCL_E_REMOTE;
    comm->room->members[comm->rank].state = GONE;
}

API HcclResult HcclGetCommName(HcclComm handle, char *name) {
    const Comm *comm = comm_of(handle);
    if (!comm || !name) return FAIL(comm ? HCCL_E_PTR : HCCL_E_PARA, "%p is no communicator, or name is null", handle);
    strcpy(name, comm->name);
    return HCCL_SUCCESS;
}
API HcclResult HcclGetRankSize(HcclComm handle, uint32_t *size) {
    const Comm *comm = comm_of(handle);
    if (!comm || !size) return FAIL(HCCL_E_PTR, "%p is no communicator, or size is null", handle);
    *size = comm->num_ranks;
    return HCCL_SUCCESS;
}
API HcclResult HcclGetRankId(HcclComm handle, uint32_t *rank) {
    const Comm *comm = comm_of(handle);
    if (!comm || !rank) return FAIL(HCCL_E_PTR, "%p is no communicator, or rank is null", handle);
    *rank = comm->rank;
    return HCCL_SUCCESS;
}
API HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult *error) {
    const Comm *comm = comm_of(handle);
    if (!comm || !error) return FAIL(comm ? HCCL_E_PTR : HCCL_E_PARA, "%p is no communicator, or asyncError is null", handle);
    *error = comm->async_error;
    return HCCL_SUCCESS;
}
API const char *HcclGetErrorString(HcclResult code) {
    static const char *const names[] = {"no error", "parameter error", "empty pointer", "memory error", "internal error",
        "not support feature", "not found specific resource", "resource unavailable", "call system interface error", "timeout"};
    return code < sizeof names / sizeof *names ? names[code] : code == HCCL_E_REMOTE ? "remote error" : "unknown error";
}
API HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue value) { /* only whether sums have a fixed order: here they do */
    if (config != HCCL_DETERMINISTIC || value.value < 0 || value.value > 2) return FAIL(HCCL_E_PARA, "config %d = %d", config, value.value);
    return HCCL_SUCCESS;
}
