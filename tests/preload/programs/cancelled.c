/* Threads that are cancelled at any moment: in calls that wait, before and behind them, and in calls that the library answers. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int ends[2], begun, cleaned, expected;

static void cleanup(void *unused) { (void)unused; __atomic_add_fetch(&cleaned, 1, __ATOMIC_SEQ_CST); }

/* From here on whoever is cancelled has to clean up. */
static void begin(void) { __atomic_store_n(&begun, 1, __ATOMIC_SEQ_CST); }

/* Reads what comes, and waits when nothing does. */
static void *reading(void *unused) {
    char byte;
    pthread_cleanup_push(cleanup, NULL);
    begin();
    while (read(ends[0], &byte, 1) == 1) {}
    pthread_cleanup_pop(0);
    return unused;
}

/* Never waits. */
static void *answered(void *path) {
    char bytes[16];
    pthread_cleanup_push(cleanup, NULL);
    begin();
    int file = open(path, O_RDONLY);
    if (file < 0) abort();
    while (pread(file, bytes, sizeof bytes, 0) == sizeof bytes) {}
    pthread_cleanup_pop(0);
    return NULL;
}

/* Nobody ever writes to it. */
static void *opening(void *path) {
    pthread_cleanup_push(cleanup, NULL);
    begin();
    if (open(path, O_RDONLY) >= 0) puts("opened something");
    pthread_cleanup_pop(0);
    return NULL;
}

static int cancel(void *(*run)(void *), void *argument, int round) {
    pthread_t thread;
    void *result;
    static char some[4000];
    begun = 0;
    if (pthread_create(&thread, NULL, run, argument)) abort();
    if (run == reading && write(ends[1], some, sizeof some) != sizeof some) abort();
    for (volatile int wait = 0; wait < round * 997 % 200000; wait++) {}
    pthread_cancel(thread);
    if (pthread_join(thread, &result)) abort();
    expected += result == PTHREAD_CANCELED && begun;
    return result == PTHREAD_CANCELED;
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 300, cancelled[3] = {0};
    char fifo[] = "/tmp/polytropo-fifo-XXXXXX", bytes[4096];
    if (pipe2(ends, 0) || !mkdtemp(fifo) || rmdir(fifo) || mkfifo(fifo, 0600)) return 1;
    /* So often that the library opens it by itself from now on. */
    int file = open("known", O_CREAT | O_RDWR, 0644);
    if (file < 0 || write(file, arguments[0], 1) != 1 || ftruncate(file, 100) || close(file)) return 1;
    for (int i = 0; i < 100; i++) {
        file = open("known", O_RDONLY);
        if (file < 0 || read(file, bytes, 100) != 100 || close(file)) return 1;
    }
    alarm(50);
    for (int round = 0; round < rounds; round++) {
        cancelled[0] += cancel(reading, NULL, round);
        fcntl(ends[0], F_SETFL, O_NONBLOCK);
        while (read(ends[0], bytes, sizeof bytes) > 0) {}
        fcntl(ends[0], F_SETFL, 0);
        cancelled[1] += cancel(answered, "known", round);
        if (round % 10 == 0) cancelled[2] += cancel(opening, fifo, round);
    }
    unlink(fifo);
    unlink("known");
    printf("%d %d %d, cleaned %d of %d\n", cancelled[0], cancelled[1], cancelled[2], cleaned, expected);
    return expected == 0 || cleaned != expected;
}
