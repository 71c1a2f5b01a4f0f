/* The time of single calls, in nanoseconds: the best of several rounds. The first argument is a file of at least 2 MiB. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

#define ROUNDS 9
#define MEASURE(name, turns, call)                                      \
    do {                                                                \
        double best = 1e18;                                             \
        for (int round = 0; round < ROUNDS; round++) {                  \
            double start = now_ns();                                    \
            for (long i = 0; i < (turns); i++) { call; }                \
            double each = (now_ns() - start) / (turns);                 \
            if (each < best) best = each;                               \
        }                                                               \
        printf("%s %.1f\n", name, best);                                \
    } while (0)

static char bytes[1 << 20];

static void must(int done) {
    if (!done) abort();
}

int main(int count, char **arguments) {
    struct stat status;
    int file = count == 2 ? open(arguments[1], O_RDONLY) : -1;
    int zero = open("/dev/zero", O_RDONLY);
    if (file < 0 || zero < 0 || fstat(file, &status) || status.st_size < 2 << 20) return 1;
    long room = status.st_size - sizeof bytes;
    MEASURE("getppid", 20000, syscall(SYS_getppid));
    MEASURE("close of no descriptor", 20000, close(-1));
    MEASURE("ftruncate of no descriptor", 20000, must(ftruncate(-1, 0) < 0));
    MEASURE("read of /dev/zero", 20000, must(read(zero, bytes, 1) == 1));
    MEASURE("pread 1 B", 20000, must(pread(file, bytes, 1, i * 4096 % room) == 1));
    MEASURE("pread 4 KiB", 10000, must(pread(file, bytes, 4096, i * 4096 % room) == 4096));
    MEASURE("pread 64 KiB", 1000, must(pread(file, bytes, 65536, i * 65536 % room) == 65536));
    MEASURE("pread 1 MiB", 100, must(pread(file, bytes, 1 << 20, i * 4096 % room) == 1 << 20));
    MEASURE("read 4 KiB in sequence", 4, {
        lseek(file, 0, SEEK_SET);
        for (int turn = 0; turn < 512; turn++) must(read(file, bytes, 4096) == 4096);
    });
    return 0;
}
