/* The calls of HCCL that are queued on a stream: their arguments are checked here, what they do is in hccl_task.c. */
#include "hccl.h"

typedef struct Call {
    const char *name;
    Operation operation;
    int code;
} Call;

static Call *refuse(Call *call, int code, const char *why, uint64_t value) {
    if (!call->code) call->code = fail(code, call->name, "EI0003 %s (%llu)", why, (unsigned long long)value);
    return call;
}
static void check(Call *call, bool condition, int code, const char *why, uint64_t value) {
    if (!condition) refuse(call, code, why, value);
}

/* A task group takes kernels only, and a collective records events. With AIV, collectives are kernels of the vector cores
 * themselves: beside task groups anywhere in the capture, devices have been seen to fail so at the capture, or to hang in
 * the replay (vllm-ascend#13688); here it is always the former. */
static void check_capture(Call *call, const Comm *comm, Stream *stream) {
    const bool has_groups = stream->capture && stream->capture->has_groups;
    if (!in_task_group(stream) && !(comm->on_vector_cores && has_groups)) return;
    task_not_supported(stream, call->name);
    call->code = HCCL_E_RUNTIME;
}

static Call begin(const char *name, enum Kind kind, HcclComm handle, aclrtStream on, HcclDataType type) {
    Call call = {.name = name, .operation.terms = {.kind = kind, .type = type}};
    Comm *comm = handle;
    Stream *stream = stream_of(on);
    int32_t device = -1;
    if (!comm) refuse(&call, HCCL_E_PTR, "comm is null", 0);
    else if (comm->magic != COMM_MAGIC) refuse(&call, HCCL_E_PARA, "the communicator was destroyed", (uint64_t)handle);
    else if (!on || !stream) refuse(&call, HCCL_E_PARA, "not a stream", (uint64_t)on);
    else if (comm->async_error) refuse(&call, comm->async_error, "the communicator has failed before", comm->async_error);
    else if (aclrtGetDevice(&device) || device != comm->device) refuse(&call, HCCL_E_PARA, "the thread's device is not the communicator's", (uint64_t)device);
    else if (stream->device != comm->device) refuse(&call, HCCL_E_PARA, "the stream's device is not the communicator's", (uint64_t)stream->device);
    else check_capture(&call, comm, stream);
    check(&call, size_of(type), HCCL_E_NOT_SUPPORT, "dataType", type);
    call.operation.comm = comm;
    return call;
}
static void reducing(Call *call, HcclReduceOp op) {
    check(call, op <= HCCL_REDUCE_MIN, HCCL_E_PARA, "op", op);
    check(call, can_reduce((HcclDataType)call->operation.terms.type, op), HCCL_E_NOT_SUPPORT, "reduction of dataType", call->operation.terms.type);
    call->operation.terms.reduction = op;
}
static void rooted(Call *call, uint32_t root) {
    check(call, call->code || root < call->operation.comm->num_ranks, HCCL_E_PARA, "rank", root);
    call->operation.terms.root = root;
}
static uint64_t extent(const Piece *pieces) {
    uint64_t end = 0;
    for (int i = 0; i < MOST_RANKS; i++)
        if (pieces[i].count && pieces[i].at + pieces[i].count > end) end = pieces[i].at + pieces[i].count;
    return end;
}
/* The buffers, once the pieces are known; then it is queued. */
static HcclResult submit(Call *call, const void *send, void *receive, aclrtStream on) {
    Operation *o = &call->operation;
    o->send = send, o->receive = receive;
    const uint64_t size = size_of((HcclDataType)o->terms.type), sent = extent(o->to) * size, received = extent(o->from) * size;
    check(call, send || !sent, HCCL_E_PTR, "sendBuf is null", 0);
    check(call, receive || !received, HCCL_E_PTR, "recvBuf is null", 0);
    check(call, call->code || !sent || is_device(send, sent), HCCL_E_PARA, "sendBuf is no device memory of so many bytes", sent);
    check(call, call->code || !received || is_device(receive, received), HCCL_E_PARA, "recvBuf is no device memory of so many bytes", received);
    if (call->code) return (HcclResult)call->code;
    TRACE("%s %lu, %lu bytes on %p", call->name, (unsigned long)sent, (unsigned long)received, on);
    return ask(COLLECTIVE, stream_of(on), (uint64_t)o, sent, received) ? HCCL_E_RUNTIME : HCCL_SUCCESS;
}
#define BEGIN(kind, type) Call call = begin(__func__, kind, comm, stream, type); Operation *const o = &call.operation
#define EACH_RANK(r) if (!call.code) for (uint32_t r = 0; r < o->comm->num_ranks; r++)
#define SUBMIT(send, receive) return submit(&call, send, receive, stream)

API HcclResult HcclAllReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    BEGIN(ALL_REDUCE, dataType);
    reducing(&call, op);
    o->terms.count = count;
    EACH_RANK(r) o->to[r].count = o->from[r].count = count;
    SUBMIT(sendBuf, recvBuf);
}
API HcclResult HcclReduce(void *sendBuf, void *recvBuf, uint64_t count, HcclDataType dataType, HcclReduceOp op, uint32_t root, HcclComm comm, aclrtStream stream) {
    BEGIN(REDUCE, dataType);
    reducing(&call, op);
    rooted(&call, root);
    o->terms.count = count;
    if (!call.code) o->to[root].count = count;
    EACH_RANK(r) o->from[r].count = o->comm->rank == root ? count : 0;
    SUBMIT(sendBuf, recvBuf);
}
API HcclResult HcclBroadcast(void *buf, uint64_t count, HcclDataType dataType, uint32_t root, HcclComm comm, aclrtStream stream) {
    BEGIN(BROADCAST, dataType);
    rooted(&call, root);
    o->terms.count = count;
    EACH_RANK(r) o->to[r].count = o->comm->rank == root ? count : 0;
    if (!call.code) o->from[root].count = count;
    SUBMIT(buf, buf);
}
API HcclResult HcclAllGather(void *sendBuf, void *recvBuf, uint64_t sendCount, HcclDataType dataType, HcclComm comm, aclrtStream stream) {
    BEGIN(ALL_GATHER, dataType);
    o->terms.count = sendCount;
    EACH_RANK(r) o->to[r].count = sendCount, o->from[r] = (Piece){r * sendCount, sendCount};
    SUBMIT(sendBuf, recvBuf);
}
API HcclResult HcclAllGatherV(void *sendBuf, uint64_t sendCount, void *recvBuf, const void *recvCounts, const void *recvDispls, HcclDataType dataType, HcclComm comm, aclrtStream stream) {
    BEGIN(ALL_GATHER, dataType);
    check(&call, recvCounts && recvDispls, HCCL_E_PTR, "recvCounts or recvDispls is null", 0);
    EACH_RANK(r) o->to[r].count = sendCount, o->from[r] = (Piece){((const uint64_t *)recvDispls)[r], ((const uint64_t *)recvCounts)[r]};
    SUBMIT(sendBuf, recvBuf);
}
API HcclResult HcclReduceScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    BEGIN(REDUCE_SCATTER, dataType);
    reducing(&call, op);
    o->terms.count = recvCount;
    EACH_RANK(r) o->to[r] = (Piece){r * recvCount, recvCount}, o->from[r].count = recvCount;
    SUBMIT(sendBuf, recvBuf);
}
API HcclResult HcclReduceScatterV(void *sendBuf, const void *sendCounts, const void *sendDispls, void *recvBuf, uint64_t recvCount, HcclDataType dataType, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    BEGIN(REDUCE_SCATTER, dataType);
    reducing(&call, op);
    check(&call, sendCounts && sendDispls, HCCL_E_PTR, "sendCounts or sendDispls is null", 0);
    EACH_RANK(r) o->to[r] = (Piece){((const uint64_t *)sendDispls)[r], ((const uint64_t *)sendCounts)[r]}, o->from[r].count = recvCount;
    SUBMIT(sendBuf, recvBuf);
}
API HcclResult HcclScatter(void *sendBuf, void *recvBuf, uint64_t recvCount, HcclDataType dataType, uint32_t root, HcclComm comm, aclrtStream stream) {
    BEGIN(SCATTER, dataType);
    rooted(&call, root);
    o->terms.count = recvCount;
    EACH_RANK(r) if (o->comm->rank == root) o->to[r] = (Piece){r * recvCount, recvCount};
    if (!call.code) o->from[root].count = recvCount;
    SUBMIT(sendBuf, recvBuf);
}
API HcclResult HcclAlltoAll(const void *sendBuf, uint64_t sendCount, HcclDataType sendType, const void *recvBuf, uint64_t recvCount, HcclDataType recvType, HcclComm comm, aclrtStream stream) {
    BEGIN(ALL_TO_ALL, sendType);
    check(&call, sendType == recvType && sendCount == recvCount, HCCL_E_PARA, "what is sent and what is received differ", recvCount);
    o->terms.count = sendCount;
    EACH_RANK(r) o->to[r] = o->from[r] = (Piece){r * sendCount, sendCount};
    SUBMIT(sendBuf, (void *)recvBuf);
}
API HcclResult HcclAlltoAllV(const void *sendBuf, const void *sendCounts, const void *sdispls, HcclDataType sendType, const void *recvBuf, const void *recvCounts, const void *rdispls, HcclDataType recvType, HcclComm comm, aclrtStream stream) {
    BEGIN(ALL_TO_ALL, sendType);
    check(&call, sendType == recvType, HCCL_E_PARA, "what is sent and what is received differ", recvType);
    check(&call, sendCounts && sdispls && recvCounts && rdispls, HCCL_E_PTR, "counts or displacements are null", 0);
    EACH_RANK(r) {
        o->to[r] = (Piece){((const uint64_t *)sdispls)[r], ((const uint64_t *)sendCounts)[r]};
        o->from[r] = (Piece){((const uint64_t *)rdispls)[r], ((const uint64_t *)recvCounts)[r]};
    }
    SUBMIT(sendBuf, (void *)recvBuf);
}
static void paired(Call *call, uint32_t peer) {
    rooted(call, peer);
    check(call, call->code || peer != call->operation.comm->rank, HCCL_E_PARA, "a rank's own number", peer);
    call->operation.box = 1 + peer;
}
API HcclResult HcclSend(void *sendBuf, uint64_t count, HcclDataType dataType, uint32_t destRank, HcclComm comm, aclrtStream stream) {
    BEGIN(SEND, dataType);
    paired(&call, destRank);
    o->terms.count = count;
    if (!call.code) o->to[destRank].count = count;
    SUBMIT(sendBuf, NULL);
}
API HcclResult HcclRecv(void *recvBuf, uint64_t count, HcclDataType dataType, uint32_t srcRank, HcclComm comm, aclrtStream stream) {
    BEGIN(RECEIVE, dataType);
    paired(&call, srcRank);
    o->terms.count = count;
    if (!call.code) o->from[srcRank].count = count;
    SUBMIT(NULL, recvBuf);
}
API HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
    BEGIN(BARRIER, HCCL_DATA_TYPE_INT8);
    (void)o;
    SUBMIT(NULL, NULL);
}
