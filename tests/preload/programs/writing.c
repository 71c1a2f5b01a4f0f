/* Writes files in all the ways in which their offsets and descriptors can be shared, handed on or cut; prints what came of it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef FALLOC_FL_ZERO_RANGE /* musl has none */
#define FALLOC_FL_ZERO_RANGE 0x10
#endif

static void tell(const char *what, long result) {
    printf("%s: %ld %s\n", what, result, result < 0 ? strerror(errno) : "");
    fflush(stdout);
}

/* The file as another open sees it. */
static void show(const char *what, const char *name) {
    static char bytes[1 << 20];
    struct stat status = {0};
    int file = open(name, O_RDONLY);
    if (file < 0) {
        tell(what, -1);
        return;
    }
    long got = read(file, bytes, sizeof bytes);
    unsigned sum = 0;
    for (long i = 0; i < got; i++) sum = sum * 31 + (unsigned char)bytes[i];
    stat(name, &status);
    printf("%s: %ld %u, size %ld, mode %o, links %d: %.*s\n", what, got, sum, (long)status.st_size, status.st_mode,
           (int)status.st_nlink, got < 60 ? (int)got : 0, bytes);
    fflush(stdout);
    close(file);
}

static int made(const char *name, int flags) {
    int file = open(name, flags | O_CREAT, 0666);
    if (file < 0) {
        tell(name, -1);
        exit(1);
    }
    return file;
}

static void of_one(void) {
    int file = made("one", O_RDWR | O_EXCL);
    tell("number", file);
    tell("flags", fcntl(file, F_GETFL) & (O_ACCMODE | O_APPEND | O_PATH));
    tell("write", write(file, "0123456789", 10));
    tell("at", lseek(file, 0, SEEK_CUR));
    show("written", "one");
    tell("pwrite", pwrite(file, "AB", 2, 3));
    tell("pwrite wrong", pwrite(file, "AB", 2, -3));
    tell("nothing", write(file, "", 0));
    tell("at", lseek(file, 0, SEEK_CUR));
    char bytes[8] = {0};
    tell("pread", pread(file, bytes, 5, 2));
    puts(bytes);
    tell("read at end", read(file, bytes, 5));
    tell("back", lseek(file, -4, SEEK_END));
    tell("read", read(file, bytes, 2));
    tell("write", write(file, "CD", 2));
    show("written", "one");
    tell("beyond", lseek(file, 20, SEEK_SET));
    struct iovec parts[3] = {{"ab", 2}, {"", 0}, {"cde", 3}};
    tell("writev", writev(file, parts, 3));
    tell("at", lseek(file, 0, SEEK_CUR));
    show("written", "one");
    struct stat status;
    tell("fstat", fstat(file, &status));
    tell("size", status.st_size);
    tell("cut", ftruncate(file, 7));
    tell("grow", ftruncate(file, 9));
    tell("wrong", ftruncate(file, -1));
    show("cut", "one");
    tell("sync", fsync(file) + fdatasync(file));
    tell("close", close(file));
    tell("write closed", write(file, "x", 1));
    tell("exclusive", open("one", O_WRONLY | O_CREAT | O_EXCL, 0600));
    tell("missing", open("none/one", O_WRONLY | O_CREAT, 0600));
    tell("directory", open(".", O_WRONLY));
    file = open("one", O_WRONLY);
    tell("read of a write-only one", read(file, bytes, 1));
    tell("pread", pread(file, bytes, 1, 0));
    tell("write over", write(file, "zz", 2));
    close(file);
    show("written over", "one");
    file = open("one", O_WRONLY | O_TRUNC);
    show("emptied", "one");
    close(file);
    umask(077);
    close(made("private", O_WRONLY));
    show("private", "private");
    umask(0);
    close(open("public", O_WRONLY | O_CREAT, 0751));
    show("public", "public");
    umask(022);
    close(open("read-only", O_WRONLY | O_CREAT, 0400));
    show("read-only", "read-only");
}

static void of_appending(void) {
    int one = made("log", O_WRONLY | O_APPEND), two = open("log", O_RDWR | O_APPEND);
    for (int i = 0; i < 50; i++) {
        if (write(one, "one ", 4) != 4 || write(two, "two\n", 4) != 4) tell("append", -1);
    }
    tell("at", lseek(one, 0, SEEK_CUR) <= 400);
    show("log", "log");
    tell("pwrite appends", pwrite(two, "end", 3, 0));
    show("log", "log");
    close(two);
    tell("alone", write(one, "alone", 5));
    tell("at", lseek(one, 0, SEEK_CUR));
    tell("set", lseek(one, 3, SEEK_SET));
    tell("more", write(one, "more", 4));
    if (fork() == 0) {
        tell("child", write(one, "child", 5));
        _exit(0);
    }
    wait(NULL);
    tell("parent", write(one, "parent", 6));
    show("log", "log");
    close(one);
}

static void of_sharing(void) {
    int file = made("shared", O_RDWR);
    write(file, "first ", 6);
    int copy = dup(file);
    tell("copy", write(copy, "copy ", 5));
    tell("first", write(file, "first ", 6));
    show("shared", "shared");
    close(copy);
    close(file);
    file = made("handed", O_WRONLY);
    write(file, "before ", 7);
    char command[100];
    snprintf(command, sizeof command, "echo inside >&%d; (echo deeper; cat /dev/null) >&%d", file, file);
    tell("system", system(command));
    tell("after", write(file, "after", 5));
    show("handed", "handed");
    close(file);
    file = made("moved", O_WRONLY);
    write(file, "moved ", 6);
    tell("rename", rename("moved", "there"));
    write(file, "and written", 11);
    show("there", "there");
    tell("unlink", unlink("there"));
    tell("write", write(file, "gone", 4));
    struct stat status;
    fstat(file, &status);
    printf("gone: size %ld, links %d\n", (long)status.st_size, (int)status.st_nlink);
    fflush(stdout);
    if (fork() == 0) _exit(write(file, "child", 5) != 5);
    int ended;
    wait(&ended);
    tell("child", ended);
    tell("at", lseek(file, 0, SEEK_CUR));
    close(file);
    file = made("mapped", O_RDWR);
    tell("grow", ftruncate(file, 5000));
    write(file, "written", 7);
    char *map = mmap(NULL, 5000, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) tell("mmap", -1);
    else {
        printf("map: %.7s\n", map);
        fflush(stdout);
        memcpy(map + 4990, "mapped", 6);
        msync(map, 5000, MS_SYNC);
        munmap(map, 5000);
    }
    tell("write", write(file, " more", 5));
    close(file);
    show("mapped", "mapped");
    struct pollfd ready = {.fd = made("polled", O_WRONLY), .events = POLLOUT};
    tell("poll", poll(&ready, 1, 0) == 1 && ready.revents == POLLOUT);
    tell("allocate", posix_fallocate(made("allocated", O_RDWR), 0, 10000));
    show("allocated", "allocated");
    tell("mode", fchmod(made("changed", O_RDWR), 0640));
    show("changed", "changed");
    struct flock lock = {.l_type = F_WRLCK};
    tell("lock", fcntl(made("locked", O_RDWR), F_SETLK, &lock));
    FILE *stream = fopen("stream", "w+");
    for (int i = 0; i < 3000; i++) fprintf(stream, "line %d\n", i);
    fseek(stream, 5, SEEK_SET);
    int number = -1;
    tell("scanned", fscanf(stream, "%d", &number));
    fseek(stream, 0, SEEK_END);
    fprintf(stream, "end %d %ld\n", number, ftell(stream));
    fclose(stream);
    show("stream", "stream");
    tell("copied", system("cp stream copied && cmp stream copied && mv copied moved && rm moved"));
}

static void of_space_and_attributes(void) {
    int file = made("space", O_RDWR | O_NOFOLLOW);
    for (int i = 0; i < 20; i++) write(file, "0123456789", 10);
    tell("keep size", fallocate(file, FALLOC_FL_KEEP_SIZE, 0, 100000));
    write(file, "abc", 3);
    show("space", "space");
    tell("larger", fallocate(file, 0, 5000, 20000));
    tell("hole", fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 100));
    show("space", "space");
    tell("zeros", fallocate(file, FALLOC_FL_ZERO_RANGE, 150, 10));
    tell("no length", fallocate(file, 0, 0, 0));
    tell("negative", fallocate(file, 0, -1, 5));
    show("space", "space");
    tell("sync", sync_file_range(file, 0, 0, 0));
    tell("sync", sync_file_range(file, 0, 100, SYNC_FILE_RANGE_WRITE));
    tell("sync", sync_file_range(file, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE));
    tell("sync", sync_file_range(file, 0, 0, 64));
    tell("sync", sync_file_range(file, -1, 0, 0));
    tell("mode", fchmod(file, 0640));
    tell("owner", fchown(file, -1, -1));
    tell("owner", fchown(file, 0, 7));
    struct timespec times[2] = {{1000, 5}, {2000, 7}};
    tell("times", futimens(file, times));
    times[0].tv_nsec = 2000000000;
    tell("times", futimens(file, times));
    write(file, "more", 4);
    struct stat status;
    tell("fstat", fstat(file, &status));
    printf("%o %d %d %ld %ld\n", status.st_mode, status.st_uid, status.st_gid, status.st_atim.tv_sec,
           (long)status.st_atim.tv_nsec);
    tell("now", futimens(file, NULL));
    tell("flags", fcntl(file, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK | O_NOFOLLOW));
    show("space", "space");
    close(file);
    // Once more by a descriptor that the kernel has opened.
    file = made("space", O_WRONLY);
    tell("dup", dup(file) > 0);
    tell("hole", fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 100, 100));
    tell("mode", fchmod(file, 0600));
    close(file);
    symlink("space", "link");
    tell("link", open("link", O_RDWR | O_NOFOLLOW));
    tell("link", open("link", O_RDWR | O_CREAT | O_NOFOLLOW, 0600));
    unlink("link");
    show("space", "space");
}

static int together;
static void *writer(void *mark) {
    char line[100];
    memset(line, *(char *)mark, sizeof line);
    for (int i = 0; i < 500; i++)
        if (write(together, line, sizeof line) != sizeof line) tell("together", -1);
    return NULL;
}

static void of_threads(void) {
    for (int appends = 0; appends < 2; appends++) {
        together = made("together", O_RDWR | O_TRUNC | (appends ? O_APPEND : 0));
        pthread_t threads[4];
        for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, writer, &"abcd"[i]);
        for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
        int counts[4] = {0}, torn = 0;
        char line[100];
        lseek(together, 0, SEEK_SET);
        while (read(together, line, sizeof line) == sizeof line) {
            for (size_t i = 1; i < sizeof line; i++) torn += line[i] != line[0];
            if (line[0] >= 'a' && line[0] <= 'd') counts[line[0] - 'a']++;
        }
        printf("together: %d %d %d %d, torn %d, %ld\n", counts[0], counts[1], counts[2], counts[3], torn,
               (long)lseek(together, 0, SEEK_END));
        fflush(stdout);
        close(together);
    }
}

static void of_limits(void) {
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {100, RLIM_INFINITY};
    int before = made("limited", O_WRONLY);
    tell("before", write(before, "x", 1));
    setrlimit(RLIMIT_FSIZE, &limit);
    static char bytes[200];
    tell("first", write(before, bytes, 200));
    tell("full", write(before, bytes, 1));
    int after = made("limited too", O_WRONLY);
    tell("first", write(after, bytes, 200));
    tell("full", write(after, bytes, 1));
    limit.rlim_cur = RLIM_INFINITY;
    setrlimit(RLIMIT_FSIZE, &limit);
    tell("more", write(made("limited", O_WRONLY | O_TRUNC), bytes, 200));
}

int main(void) {
    for (int i = 0; i < 40; i++) close(made("often", O_RDWR));
    for (int i = 0; i < 40; i++) close(open("often", O_RDONLY));
    of_one();
    of_appending();
    of_space_and_attributes();
    of_threads();
    of_sharing();
    of_limits();
    return 0;
}
