/* A pool of threads whose waiting is bounded, so that another process on the same cores costs its share and no more.
 *
 * OpenMP's threads spin for milliseconds before they sleep, and each operator waits for every one of them: where one core
 * is taken by a neighbour, the others burn their time slices for a thread that has none. Here
 *   - who waits spins for SPIN_NS and then sleeps;
 *   - parts of the range are claimed one by one, and work that a thread has not begun is taken back from it, so that the
 *     caller waits only for parts that are being computed;
 *   - a thread that was woken on the caller's core moves to another one, as both cannot run there. (Seen while a third
 *     thread of the process was busy as well; what it brings alone has not been measured.)
 *
 * One caller at a time has the pool; another one, or an operator inside a part, does all of its range alone. After a
 * fork the child starts with an empty pool.
 */
#define _GNU_SOURCE /* sched_getcpu */
#include "pool.h"
#include "vectors.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define MAX_WORKERS 255
#define SPIN_NS 100000 /* longer than what passes between two operators of a step, far shorter than a time slice */
#define CLOCK_EVERY 32 /* turns of the spinning loop */
#define MOVE_EVERY_NS 2000000 /* a thread moves at most that often */

enum { IDLE, POSTED, RUNNING };

typedef struct {
    Range *range;
    const void *context;
    int64_t n, chunk;
    _Atomic int64_t next;
} Work;

/* Where one thread sleeps. */
typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t condition;
    atomic_int asleep;
} Bell;

typedef struct {
    atomic_int state;
    Work *work; /* written by the caller before POSTED */
    Bell bell;
    int64_t moved_ns;
} __attribute__((aligned(128))) Worker;

static Worker workers[MAX_WORKERS];
static int num_workers;
static Bell caller_bell;
static atomic_int caller_core;
static atomic_flag taken = ATOMIC_FLAG_INIT;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static __thread int is_inside; /* this thread is in a part, or has the pool */

static void breathe(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void make_bell(Bell *bell) {
    pthread_mutex_init(&bell->mutex, NULL);
    pthread_cond_init(&bell->condition, NULL);
    atomic_store(&bell->asleep, 0);
}

/* Wake who sleeps there. After a change of the state that it waits for: one of both sees what the other has written. */
static void ring(Bell *bell) {
    if (!atomic_load(&bell->asleep)) return;
    pthread_mutex_lock(&bell->mutex);
    atomic_store(&bell->asleep, 0);
    pthread_cond_signal(&bell->condition);
    pthread_mutex_unlock(&bell->mutex);
}

/* Return when *state is no longer `value`. */
static void wait_change(atomic_int *state, int value, Bell *bell) {
    int64_t end_ns = 0;
    for (int turn = 1; atomic_load_explicit(state, memory_order_acquire) == value; turn++) {
        breathe();
        if (turn % CLOCK_EVERY) continue;
        const int64_t now = now_ns();
        if (!end_ns) end_ns = now + SPIN_NS;
        if (now < end_ns) continue;
        pthread_mutex_lock(&bell->mutex);
        for (;;) {
            atomic_store(&bell->asleep, 1);
            if (atomic_load(state) != value) break;
            pthread_cond_wait(&bell->condition, &bell->mutex);
        }
        atomic_store(&bell->asleep, 0);
        pthread_mutex_unlock(&bell->mutex);
        return;
    }
}

static void take_parts(Work *work) {
    for (;;) {
        const int64_t begin = atomic_fetch_add_explicit(&work->next, work->chunk, memory_order_relaxed);
        if (begin >= work->n) return;
        work->range(work->context, begin, MIN(begin + work->chunk, work->n));
    }
}

/* Leave the caller's core to the caller: forbid it to this thread for a moment. What it may use afterwards is as before. */
static void step_aside(Worker *worker) {
#ifdef __linux__
    const int core = atomic_load_explicit(&caller_core, memory_order_relaxed);
    cpu_set_t allowed, others;
    if (sched_getcpu() != core) return;
    const int64_t now = now_ns();
    if (now - worker->moved_ns < MOVE_EVERY_NS || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    worker->moved_ns = now;
    others = allowed;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
#else
    (void)worker;
#endif
}

static void *work_forever(void *argument) {
    Worker *worker = argument;
    is_inside = 1;
    for (;;) {
        wait_change(&worker->state, IDLE, &worker->bell);
        step_aside(worker);
        int posted = POSTED;
        if (!atomic_compare_exchange_strong(&worker->state, &posted, RUNNING)) continue; /* taken back */
        take_parts(worker->work);
        atomic_store(&worker->state, IDLE);
        ring(&caller_bell);
    }
    return NULL;
}

/* In the child of a fork: its only thread is the one that forked. */
static void forget_workers(void) {
    num_workers = 0;
    make_bell(&caller_bell);
    atomic_flag_clear(&taken);
}

static void begin(void) {
    make_bell(&caller_bell);
    pthread_atfork(NULL, NULL, forget_workers);
}

/* Start threads until there are `wanted`, or as many as the system gives. Signals are for the threads of the program. */
static void grow(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (num_workers < MIN(wanted, MAX_WORKERS)) {
        Worker *worker = workers + num_workers;
        pthread_t thread;
        atomic_store(&worker->state, IDLE);
        make_bell(&worker->bell);
        if (pthread_create(&thread, NULL, work_forever, worker)) break;
        pthread_detach(thread);
        num_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void share_out(Range *range, const void *context, int64_t n, int64_t chunk, int num_threads) {
    if (n <= 0) return;
    if (num_threads <= 1 || n <= chunk || is_inside) return range(context, 0, n);
    pthread_once(&once, begin);
    if (atomic_flag_test_and_set_explicit(&taken, memory_order_acquire)) return range(context, 0, n);
    is_inside = 1;
    if (num_workers < num_threads - 1) grow(num_threads - 1);
    const int num_posted = (int)MIN(MIN(num_threads - 1, num_workers), (n - 1) / chunk);
    Work work = {range, context, n, chunk, 0};
#ifdef __linux__
    atomic_store_explicit(&caller_core, sched_getcpu(), memory_order_relaxed);
#endif
    for (int i = 0; i < num_posted; i++) {
        workers[i].work = &work;
        atomic_store(&workers[i].state, POSTED);
        ring(&workers[i].bell);
    }
    take_parts(&work);
    for (int i = 0; i < num_posted; i++) {
        int posted = POSTED;
        if (atomic_compare_exchange_strong(&workers[i].state, &posted, IDLE)) continue; /* not begun: taken back */
        wait_change(&workers[i].state, RUNNING, &caller_bell);
    }
    is_inside = 0;
    atomic_flag_clear_explicit(&taken, memory_order_release);
}

/* For tests: `share_out` with a function of theirs. */
EXPORT void xllm_share_out(Range *range, const void *context, int64_t n, int64_t chunk, int num_threads) {
    share_out(range, context, n, chunk, num_threads);
}
