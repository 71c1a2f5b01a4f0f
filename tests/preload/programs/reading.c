/* Reads one file in all the ways in which its offset and its descriptor can be shared, handed on or replaced. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *path, *other;
static char bytes[70000];

static uint64_t sum(const char *from, ssize_t count) {
    uint64_t hash = 1469598103934665603u;
    for (ssize_t i = 0; i < count; i++) hash = (hash ^ (unsigned char)from[i]) * 1099511628211u;
    return hash;
}

static void tell(const char *what, long result) {
    long count = result < (long)sizeof bytes ? result : 0;
    printf("%s: %ld %llx\n", what, result, (unsigned long long)(count > 0 ? sum(bytes, count) : 0));
    fflush(stdout);
}

/* Read often enough to be served otherwise than at first. */
static int warm(const char *name) {
    int file = open(name, O_RDONLY);
    if (file < 0) exit(1);
    for (int i = 0; i < 10; i++) {
        ssize_t got = read(file, bytes, 1000);
        if (i == 9) tell("tenth read", got);
    }
    return file;
}

static int shared;
static uint64_t totals[4];

static void *reader(void *total) {
    char own[512];
    ssize_t got;
    while ((got = read(shared, own, sizeof own)) > 0)
        for (ssize_t i = 0; i < got; i++) *(uint64_t *)total += (unsigned char)own[i];
    return NULL;
}

static void wait_for(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child || status) exit(2);
}

int main(int count, char **arguments) {
    if (count < 3) return 64;
    path = arguments[1];
    other = arguments[2];
    struct stat status;

    int file = warm(path);
    tell("lseek cur", lseek(file, 0, SEEK_CUR));
    tell("lseek back", lseek(file, -500, SEEK_CUR));
    tell("read", read(file, bytes, 700));
    tell("lseek end", lseek(file, -10, SEEK_END));
    tell("read to end", read(file, bytes, 100));
    tell("read at end", read(file, bytes, 100));
    tell("lseek wrong", lseek(file, -1, SEEK_SET));
    tell("lseek beyond", lseek(file, 1L << 40, SEEK_SET));
    tell("read beyond", read(file, bytes, 10));
    tell("pread", pread(file, bytes, 65536, 12345));
    tell("pread wrong", pread(file, bytes, 10, -1));
    tell("lseek data", lseek(file, 100, SEEK_DATA));
    tell("write", write(file, "x", 1));
    lseek(file, 3000, SEEK_SET);
    struct iovec parts[2] = {{bytes, 10}, {bytes + 10, 20}};
    tell("readv", readv(file, parts, 2));
    tell("read after readv", read(file, bytes, 100));

    int copy = dup(file);
    tell("read of copy", read(copy, bytes, 50));
    tell("read of first", read(file, bytes, 50));
    close(copy);

    file = warm(path);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        tell("child's read", read(file, bytes, 111));
        tell("child's pread", pread(file, bytes, 111, 5));
        for (int i = 0; i < 10; i++) pread(file, bytes, 100, i);
        tell("child's later pread", pread(file, bytes, 222, 7));
        int own = warm(other);
        tell("child's own", lseek(own, 0, SEEK_CUR));
        _exit(0);
    }
    wait_for(child);
    tell("parent's read", read(file, bytes, 111));

    file = warm(path);
    child = vfork();
    if (child == 0) {
        dup2(open(other, O_RDONLY), file);
        close(0);
        _exit(0);
    }
    wait_for(child);
    tell("read after vfork", read(file, bytes, 99));
    tell("pread after vfork", pread(file, bytes, 99, 99));
    tell("standard input", fcntl(0, F_GETFD));

    file = warm(path);
    char command[100];
    snprintf(command, sizeof command, "head -c 100 <&%d | cksum", file);
    tell("system", system(command));
    tell("read after system", read(file, bytes, 99));

    file = warm(path);
    int second = warm(other);
    dup2(second, file);
    tell("read after dup2", read(file, bytes, 77));
    tell("pread after dup2", pread(file, bytes, 77, 0));
    tell("read of the other", read(second, bytes, 77));

    file = warm(path);
    close(file);
    tell("read after close", read(file, bytes, 1));
    int again = open(other, O_RDONLY);
    printf("same number %d\n", again == file);
    tell("pread of the next", pread(again, bytes, 500, 0));
    close(again);

    file = warm(path);
    int pair[2], pipe_ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || pipe(pipe_ends)) return 3;
    struct {
        struct cmsghdr header;
        int descriptor;
    } control = {{CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}, file};
    char letter = 'x';
    struct iovec one = {&letter, 1};
    struct msghdr message = {.msg_iov = &one, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (sendmsg(pair[0], &message, 0) != 1 || recvmsg(pair[1], &message, 0) != 1) return 4;
    tell("read of what was sent", read(control.descriptor, bytes, 88));
    tell("read of what was kept", read(file, bytes, 88));

    file = warm(path);
    tell("sendfile", sendfile(pipe_ends[1], file, NULL, 1000));
    tell("read after sendfile", read(file, bytes, 88));
    tell("from the pipe", read(pipe_ends[0], bytes, 1000));
    file = warm(path);
    tell("splice", splice(file, NULL, pipe_ends[1], NULL, 1000, 0));
    tell("read after splice", read(file, bytes, 88));
    char *mapped = mmap(NULL, 5000, PROT_READ, MAP_PRIVATE, file, 0);
    memcpy(bytes, mapped, 5000);
    tell("mmap", 5000);
    fstat(file, &status);
    printf("size %ld\n", (long)status.st_size);
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int reopened = open(link, O_RDONLY);
    tell("reopened", read(reopened, bytes, 88));

    shared = warm(path);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, reader, &totals[i]);
    uint64_t total = 0;
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        total += totals[i];
    }
    printf("together %llu\n", (unsigned long long)total);

    file = warm(path);
    fflush(stdout);
    closefrom(3);
    printf("closed %d\n", fcntl(file, F_GETFD));
    file = warm(other);
    tell("after closefrom", read(file, bytes, 333));

    file = warm(path);
    fcntl(file, F_SETFD, 0);
    fflush(stdout);
    snprintf(command, sizeof command, "head -c 50 <&%d | cksum; exit 5", file);
    execl("/bin/sh", "sh", "-c", command, NULL);
    return 9;
}
