/* Emulated HCCL: communicators between processes of one machine.
 *
 * The root of a communicator makes a room, a piece of memory that its ranks share; the root information says where it
 * is. A rank posts what it sends as a file in memory and a header in the room; once all that take part have posted, each
 * reads what is for it, and once all have read, the operation is over. So every operation is a rendezvous, which is the
 * strictest that HCCL may be.
 */
#ifndef EMULATED_NPU_HCCL_H
#define EMULATED_NPU_HCCL_H
#include "runtime.h"

#include <stdatomic.h>
#include <unistd.h>

/* The wheel's header is C++ in these two points. */
typedef union HcclConfigValue HcclConfigValue;
#define nullptr NULL
#include "third_party/hccl/inc/hccl/hccl.h"
#undef nullptr

#define MOST_RANKS 16
#define EVERYBODY 0 /* the box of a collective; that of a pair is 1 + the other's rank */
#define MOST_BOXES (1 + MOST_RANKS)

enum Kind { ALL_REDUCE = 1, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, SCATTER, ALL_TO_ALL, SEND, RECEIVE, BARRIER };

typedef struct Piece { uint64_t at, count; } Piece; /* of a buffer, in elements */

/* What all ranks of a collective must agree on. */
typedef struct Terms {
    uint32_t kind, type, reduction, root;
    uint64_t count; /* 0 where it may differ */
} Terms;

/* One call. The machine keeps a copy, so it has no pointer to anything that ends with the call. */
typedef struct Operation {
    struct Comm *comm;
    Terms terms;
    uint32_t box;
    const char *send;
    char *receive;
    Piece to[MOST_RANKS], from[MOST_RANKS]; /* of `send`, of `receive` */
} Operation;

/* In shared memory. A box is written by its owner only. */
typedef struct Box {
    _Atomic uint64_t posted, done; /* the number of the last operation */
    Terms terms;
    Piece to[MOST_RANKS];
    int file;
} Box;
typedef struct Member {
    _Atomic int state; /* ABSENT, CLAIMED, PRESENT, GONE */
    int pid, device;
    uint64_t birth; /* of the process, so that its number taken by another is seen */
    Box boxes[MOST_BOXES];
} Member;
typedef struct Room {
    _Atomic uint32_t num_ranks, refused;
    Member members[MOST_RANKS];
} Room;
enum { ABSENT, CLAIMED, PRESENT, GONE };

typedef struct Comm {
    int magic, device;
    uint32_t num_ranks, rank;
    char name[128];
    Room *room;
    bool on_vector_cores; /* HCCL_OP_EXPANSION_MODE=AIV */
    size_t buffer_bytes;
    uint64_t timeout_ns; /* of one operation; 0: none */
    HcclResult async_error;
    int files[MOST_BOXES], peer_files[MOST_RANKS][MOST_BOXES]; /* opened when needed; 0: not yet */
    uint64_t numbers[MOST_BOXES];
    /* The operation that runs. */
    bool running, read;
    int result;
    uint64_t began_ns, looked_ns;
} Comm;
enum { COMM_MAGIC = 0xc033 };

uint64_t now_ns(void);
uint64_t birth_of(int pid); /* 0: there is no such process, or it has ended */
size_t size_of(HcclDataType type); /* 0: not a type */
bool can_reduce(HcclDataType type, HcclReduceOp op);
/* into[i] = into[i] op from[i], rounded to the type each time. */
void reduce(void *into, const void *from, uint64_t count, HcclDataType type, HcclReduceOp op);
#endif
