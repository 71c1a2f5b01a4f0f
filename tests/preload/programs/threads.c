/* Threads that are cancelled in the middle of calls, signals in the middle of calls, a handler that does I/O. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int cleaned;
static volatile sig_atomic_t handled;
static int log_pipe[2];

static void cleanup(void *unused) { (void)unused; __atomic_add_fetch(&cleaned, 1, __ATOMIC_SEQ_CST); }

static void *blocked(void *pipe_end) {
    char byte;
    pthread_cleanup_push(cleanup, NULL);
    if (read(*(int *)pipe_end, &byte, 1) >= 0) puts("read something");
    pthread_cleanup_pop(0);
    return NULL;
}

/* Nobody ever writes to it. */
static void *waiting_for_writers(void *path) {
    pthread_cleanup_push(cleanup, NULL);
    if (open(path, O_RDONLY) >= 0) puts("opened something");
    pthread_cleanup_pop(0);
    return NULL;
}

static void *busy(void *path) {
    for (int i = 0; i < 2000; i++) {
        char bytes[16];
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0 || pread(file, bytes, 1, 0) != 1 || close(file)) abort();
    }
    return NULL;
}

static void handler(int unused) {
    (void)unused;
    int saved = errno;
    char byte = 'x';
    if (write(log_pipe[1], &byte, 1) != 1) abort();
    int file = open("/proc/self/comm", O_RDONLY);
    if (file < 0 || read(file, &byte, 1) != 1 || close(file)) abort();
    handled++;
    errno = saved;
}

static void *stormed(void *unused) {
    /* A small stack for handlers. */
    char *memory = malloc(16384);
    stack_t stack = {.ss_sp = memory, .ss_size = 8192};
    sigaltstack(&stack, NULL);
    for (int i = 0; i < 20000; i++) {
        if (getppid() < 0) abort();
        int file = open("/dev/null", O_RDWR);
        if (file < 0) abort();
        if (write(file, "abc", 3) != 3 || close(file)) abort();
    }
    stack.ss_flags = SS_DISABLE;
    sigaltstack(&stack, NULL);
    free(memory);
    return unused;
}

int main(int count, char **arguments) {
    (void)count;
    int ends[2];
    pthread_t threads[4], storm;
    if (pipe(ends) || pipe2(log_pipe, O_NONBLOCK)) return 1;
    char fifo[] = "/tmp/polytropo-fifo-XXXXXX";
    if (!mkdtemp(fifo)) return 1;
    rmdir(fifo);
    if (mkfifo(fifo, 0600)) return 1;
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, blocked, &ends[0]);
    for (int i = 2; i < 4; i++) pthread_create(&threads[i], NULL, waiting_for_writers, fifo);
    usleep(50000);
    for (int i = 0; i < 4; i++) pthread_cancel(threads[i]);
    int cancelled = 0;
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        cancelled += result == PTHREAD_CANCELED;
    }
    unlink(fifo);
    printf("cancelled %d, cleaned %d\n", cancelled, cleaned);

    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, busy, arguments[0]);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);

    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART | SA_ONSTACK};
    sigaction(SIGUSR1, &action, NULL);
    pthread_create(&storm, NULL, stormed, NULL);
    for (int i = 0; i < 300; i++) {
        char drained[64];
        if (pthread_kill(storm, SIGUSR1)) break;
        usleep(100);
        while (read(log_pipe[0], drained, sizeof drained) > 0) {}
    }
    pthread_join(storm, NULL);
    printf("handled %s\n", handled > 0 ? "some" : "none");
    return 0;
}
