/* What a queued operation of HCCL does when the device comes to it. Called by the machine, one at a time. */
#include "hccl.h"

#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>

#define LOOK_EVERY_NS 20000000u /* whether the others live */

static const char *const names[] = {"nothing", "AllReduce", "Reduce", "Broadcast", "AllGather", "ReduceScatter", "Scatter", "AlltoAll", "Send", "Receive", "Barrier"};

static bool takes_part(const Operation *o, uint32_t rank) { return o->box == EVERYBODY || rank == o->box - 1; }
static Member *member(const Comm *comm, uint32_t rank) { return &comm->room->members[rank]; }
/* Where that rank posts for this operation: a pair's box is numbered by the other one. */
static Box *box_of(const Operation *o, uint32_t rank) {
    return &member(o->comm, rank)->boxes[o->box == EVERYBODY || rank == o->comm->rank ? o->box : 1 + o->comm->rank];
}
static int fault(Comm *comm, int code, const char *text) {
    comm->async_error = HCCL_E_REMOTE;
    comm->result = code;
    member(comm, comm->rank)->state = GONE; /* it takes part in nothing any more */
    set_device_fault("%s, communicator %s", text, comm->name);
    return code;
}

static bool write_all(int file, const char *from, size_t size) {
    for (size_t at = 0; at < size;) {
        const ssize_t count = pwrite(file, from + at, size - at, (off_t)at);
        if (count <= 0) return false;
        at += (size_t)count;
    }
    return true;
}
static bool read_all(int file, char *to, size_t size, size_t from) {
    for (size_t at = 0; at < size;) {
        const ssize_t count = pread(file, to + at, size - at, (off_t)(from + at));
        if (count <= 0) return false;
        at += (size_t)count;
    }
    return true;
}
static int peer_file(const Operation *o, uint32_t rank) {
    int *known = &o->comm->peer_files[rank][o->box];
    if (!*known) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/fd/%d", member(o->comm, rank)->pid, box_of(o, rank)->file);
        const int file = open(path, O_RDONLY | O_CLOEXEC);
        *known = file < 0 ? 0 : file;
    }
    return *known;
}

static uint64_t extent(const Piece *pieces) {
    uint64_t end = 0;
    for (int i = 0; i < MOST_RANKS; i++)
        if (pieces[i].count && pieces[i].at + pieces[i].count > end) end = pieces[i].at + pieces[i].count;
    return end;
}
API int emulated_npu_collective_begin(const Operation *o) {
    Comm *comm = o->comm;
    if (comm->magic != COMM_MAGIC) {
        set_device_fault("%s of a communicator that was destroyed", names[o->terms.kind]);
        return ACL_ERROR_RT_MODEL_EXECUTE;
    }
    if (comm->async_error) return fault(comm, ACL_ERROR_RT_FFTS_PLUS_EXCEPTION, "the communicator has failed before");
    if (comm->running) return fault(comm, ACL_ERROR_RT_FFTS_PLUS_EXCEPTION, "two operations of a communicator at once");
    Box *box = box_of(o, comm->rank);
    int *file = &comm->files[o->box];
    if (!*file) *file = memfd_create("hccl", MFD_CLOEXEC);
    if (!write_all(*file, o->send, extent(o->to) * size_of((HcclDataType)o->terms.type))) return fault(comm, ACL_ERROR_RT_FFTS_PLUS_EXCEPTION, "nothing can be sent");
    box->terms = o->terms, box->file = *file;
    memcpy(box->to, o->to, sizeof box->to);
    comm->running = true, comm->read = false, comm->result = 0;
    comm->began_ns = comm->looked_ns = now_ns();
    box->posted = ++comm->numbers[o->box];
    return 0;
}

/* Whether the peer does what this rank does. */
static bool agrees(const Operation *o, uint32_t rank, char *why, size_t room) {
    const Box *box = box_of(o, rank);
    const Terms *here = &o->terms, *there = &box->terms;
    const uint32_t kind = here->kind == SEND ? RECEIVE : here->kind == RECEIVE ? SEND : here->kind;
    const bool same_root = o->box != EVERYBODY || here->root == there->root;
    if (kind == there->kind && here->type == there->type && here->reduction == there->reduction && same_root &&
        here->count == there->count && (here->kind == SEND || box->to[o->comm->rank].count == o->from[rank].count))
        return true;
    snprintf(why, room, "EI0005 the arguments for collective communication are inconsistent between ranks: rank %u has %s type %u op %u root %u count %llu, rank %u has %s type %u op %u root %u count %llu",
             o->comm->rank, names[here->kind], here->type, here->reduction, here->root, (unsigned long long)o->from[rank].count,
             rank, names[there->kind], there->type, there->reduction, there->root, (unsigned long long)box->to[o->comm->rank].count);
    return false;
}
static bool reduces(const Operation *o) { return o->terms.kind == ALL_REDUCE || o->terms.kind == REDUCE || o->terms.kind == REDUCE_SCATTER; }

/* Read what the others have posted for this rank. */
static bool take(const Operation *o) {
    const Comm *comm = o->comm;
    const HcclDataType type = (HcclDataType)o->terms.type;
    const size_t size = size_of(type), total = extent(o->from) * size;
    char *part = total ? malloc(total) : NULL, *sum = total ? malloc(total) : NULL;
    bool good = true, first = true;
    for (uint32_t r = 0; r < comm->num_ranks && good; r++) {
        const Piece mine = o->from[r];
        if (!mine.count || !takes_part(o, r)) continue;
        const int file = r == comm->rank ? comm->files[o->box] : peer_file(o, r);
        good = file && read_all(file, part, mine.count * size, box_of(o, r)->to[comm->rank].at * size);
        if (!good) break;
        if (!reduces(o)) memcpy(o->receive + mine.at * size, part, mine.count * size);
        else if (first) memcpy(sum, part, mine.count * size);
        else reduce(sum, part, mine.count, type, (HcclReduceOp)o->terms.reduction);
        first = false;
    }
    if (good && reduces(o)) memcpy(o->receive, sum, total);
    free(part), free(sum);
    return good;
}

static bool all_have(const Operation *o, bool read) {
    const uint64_t number = o->comm->numbers[o->box];
    for (uint32_t r = 0; r < o->comm->num_ranks; r++)
        if (takes_part(o, r) && (read ? box_of(o, r)->done : box_of(o, r)->posted) < number) return false;
    return true;
}
static int look_after(const Operation *o) {
    Comm *comm = o->comm;
    const uint64_t now = now_ns(), number = comm->numbers[o->box];
    char text[256];
    if (comm->timeout_ns && now - comm->began_ns > comm->timeout_ns) {
        snprintf(text, sizeof text, "EI0002 the wait execution of the Notify register times out (HCCL_EXEC_TIMEOUT) in %s", names[o->terms.kind]);
        return fault(comm, ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, text);
    }
    if (now - comm->looked_ns < LOOK_EVERY_NS) return NOT_YET;
    comm->looked_ns = now;
    for (uint32_t r = 0; r < comm->num_ranks; r++) {
        const Member *peer = member(comm, r);
        const bool lags = takes_part(o, r) && r != comm->rank && (comm->read ? box_of(o, r)->done : box_of(o, r)->posted) < number;
        if (!lags || (peer->state == PRESENT && birth_of(peer->pid) == peer->birth)) continue;
        snprintf(text, sizeof text, "EI0002 no Notify record from remote rank %u in %s: heartbeat lost, its process has exited, or its communicator has failed or is destroyed", r, names[o->terms.kind]);
        return fault(comm, ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, text);
    }
    return NOT_YET;
}
/* 0: it is done; NOT_YET; otherwise the error that it ended with. */
API int emulated_npu_collective_step(const Operation *o) {
    Comm *comm = o->comm;
    if (comm->magic != COMM_MAGIC) {
        set_device_fault("the communicator was destroyed while it had work");
        return ACL_ERROR_RT_MODEL_EXECUTE;
    }
    if (comm->result) return comm->result;
    if (!comm->read && all_have(o, false)) {
        char why[512];
        bool good = true;
        for (uint32_t r = 0; r < comm->num_ranks && good; r++) good = !takes_part(o, r) || r == comm->rank || agrees(o, r, why, sizeof why);
        if (!good) fault(comm, ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, why);
        else if (!take(o)) fault(comm, ACL_ERROR_RT_FFTS_PLUS_EXCEPTION, "what a rank has posted cannot be read");
        comm->read = true;
        box_of(o, comm->rank)->done = comm->numbers[o->box];
        if (comm->result) return comm->result;
    }
    return comm->read && all_have(o, true) ? 0 : look_after(o);
}
API void emulated_npu_collective_end(const Operation *o) { o->comm->running = false; }

/* For the machine, which keeps operations as bytes. */
API size_t emulated_npu_operation_bytes(void) { return sizeof(Operation); }
API size_t emulated_npu_operation_buffer(int which) { return which ? offsetof(Operation, receive) : offsetof(Operation, send); }
