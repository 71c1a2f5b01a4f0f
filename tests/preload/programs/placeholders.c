/* What can be done with a descriptor of a file that was opened often, besides reading it: prints what came of it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static const char *name;

static void tell(const char *what, long result) {
    printf("%s: %ld %s\n", what, result, result < 0 ? strerror(errno) : "");
    fflush(stdout);
}

/* musl has no closefrom(3). */
static void close_above(void) { syscall(436 /* close_range */, 3, ~0U, 0); }

static int opened(int flags) {
    int file = open(name, O_RDONLY | flags);
    if (file < 0) exit(1);
    return file;
}

static void show(const char *what, int file) {
    char bytes[16] = {0};
    long got = read(file, bytes, 8);
    unsigned sum = 0;
    for (long i = 0; i < got; i++) sum = sum * 31 + (unsigned char)bytes[i];
    printf("%s: %ld %u at %ld\n", what, got, sum, (long)lseek(file, 0, SEEK_CUR));
    fflush(stdout);
}

static void wait_for(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child || status) printf("child: %x\n", status);
    fflush(stdout);
}

static void of_the_descriptor(void) {
    int file = opened(O_CLOEXEC), next = opened(0);
    printf("numbers %d %d\n", file, next);
    tell("close-on-exec", fcntl(file, F_GETFD));
    tell("not", fcntl(next, F_GETFD));
    tell("set", fcntl(next, F_SETFD, FD_CLOEXEC));
    tell("is", fcntl(next, F_GETFD));
    tell("flags", fcntl(file, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK | O_PATH | O_DIRECTORY));
    tell("terminal", isatty(file));
    tell("close", close(file));
    tell("close again", close(file));
    tell("read closed", read(file, &file, 1));
    tell("number again", opened(0));
    char link[40], target[300] = {0}, *base;
    snprintf(link, sizeof link, "/proc/self/fd/%d", next);
    tell("link", readlink(link, target, sizeof target - 1));
    base = strrchr(target, '/');
    printf("leads to %s\n", base ? base : target);
    show("opened by it", open(link, O_RDONLY));
    tell("as a directory", openat(next, "x", O_RDONLY));
    tell("change to it", fchdir(next));
    struct stat by_name, by_file, by_path;
    tell("stat", stat(name, &by_name));
    tell("fstat", fstat(next, &by_file));
    tell("empty path", fstatat(next, "", &by_path, AT_EMPTY_PATH));
    printf("same %d %d\n", !memcmp(&by_name, &by_file, sizeof by_name), !memcmp(&by_name, &by_path, sizeof by_name));
#ifdef __GLIBC__
    struct statx more;
    tell("statx", statx(next, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &more));
    printf("same %d\n", more.stx_ino == by_name.st_ino && more.stx_size == (unsigned long)by_name.st_size);
#endif
    struct statfs space;
    tell("fstatfs", fstatfs(next, &space));
}

static void of_the_kernel(void) {
    int file = opened(0);
    show("first", file);
    int copy = dup(file);
    show("dup", copy);
    show("after dup", file);
    file = opened(0);
    show("first", file);
    copy = fcntl(file, F_DUPFD, 100);
    show("F_DUPFD", copy);
    show("after F_DUPFD", file);
    struct pollfd ready = {.fd = opened(0), .events = POLLIN};
    tell("poll", poll(&ready, 1, 0));
    tell("ready", ready.revents);
    fd_set set;
    FD_ZERO(&set);
    file = opened(0);
    FD_SET(file, &set);
    struct timeval now = {0};
    tell("select", select(file + 1, &set, NULL, NULL, &now));
    struct epoll_event event = {.events = EPOLLIN};
    tell("epoll", epoll_ctl(epoll_create1(0), EPOLL_CTL_ADD, opened(0), &event));
    tell("flock", flock(opened(0), LOCK_SH | LOCK_NB));
    struct flock lock = {.l_type = F_RDLCK};
    tell("lock", fcntl(opened(0), F_SETLK, &lock));
    tell("fsync", fsync(opened(0)));
    tell("ftruncate", ftruncate(opened(0), 0));
    tell("write", write(opened(0), "x", 1));
    tell("advice", posix_fadvise(opened(0), 0, 0, POSIX_FADV_SEQUENTIAL));
    int left = 0;
    file = opened(0);
    show("some", file);
    tell("left", ioctl(file, FIONREAD, &left));
    printf("left %d\n", left);
    tell("append", fcntl(file, F_SETFL, O_APPEND));
    tell("is", fcntl(file, F_GETFL) & (O_ACCMODE | O_APPEND));
    file = opened(0);
    const unsigned char *mapped = mmap(NULL, 100, PROT_READ, MAP_PRIVATE, file, 0);
    tell("mmap", mapped == MAP_FAILED ? -1 : mapped[7]);
    show("after mmap", file);
    tell("mmap for writing", mmap(NULL, 100, PROT_WRITE, MAP_SHARED, opened(0), 0) == MAP_FAILED ? -1 : 0);
    tell("raw pread", syscall(SYS_pread64, opened(0), &left, 4L, 0L));
    char entries[100];
    tell("entries", syscall(SYS_getdents64, opened(0), entries, 100L));
}

static void of_children(void) {
    int file = opened(0), hidden = opened(O_CLOEXEC);
    show("before", file);
    show("hidden", hidden);
    char command[200];
    snprintf(command, sizeof command, "head -c 3 <&%d | wc -c; (true <&%d) 2>/dev/null || echo closed", file, hidden);
    tell("system", system(command));
    show("after system", file);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, hidden, 0);
    char *words[] = {"wc", "-c", NULL};
    pid_t child;
    int spawned = posix_spawnp(&child, "wc", &actions, NULL, words, environ);
    wait_for(child);
    tell("spawn", spawned);
    show("after wc", hidden);
    file = opened(0);
    show("before", file);
    if ((child = vfork()) == 0) {
        char byte;
        _exit(read(file, &byte, 1) != 1);
    }
    wait_for(child);
    show("after vfork", file);
    file = opened(0);
    if ((child = fork()) == 0) {
        show("child", file);
        show("child's own", opened(0));
        _exit(0);
    }
    wait_for(child);
    show("parent", file);
}

static void of_limits(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    for (int turn = 0; turn < 2; turn++) {
        struct rlimit low = {turn ? 600 : 40, limit.rlim_max};
        setrlimit(RLIMIT_NOFILE, &low);
        int count = 0, last = 0, file;
        while ((file = open(name, O_RDONLY)) >= 0 && count < 2000) count++, last = file;
        /* A few of the higher numbers may be the library's. */
        if (turn == 0) printf("opened %d, last %d: %s\n", count, last, strerror(errno));
        else printf("enough %d: %s\n", count > 400, strerror(errno));
        close_above();
        show("after", opened(0));
    }
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void *open_and_read(void *wrong) {
    char first[8], bytes[8];
    int file = open(name, O_RDONLY);
    if (read(file, first, 8) != 8) ++*(int *)wrong;
    close(file);
    for (int i = 0; i < 3000; i++) {
        file = open(name, O_RDONLY);
        int copy = i % 16 ? -1 : dup(file);
        if (file < 0 || read(file, bytes, 8) != 8 || memcmp(first, bytes, 8)) ++*(int *)wrong;
        if (close(file) || (copy >= 0 && close(copy))) ++*(int *)wrong;
    }
    return NULL;
}

static void of_threads(void) {
    int wrong[4] = {0};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, open_and_read, &wrong[i]);
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (child == 0) {
            int file = open(name, O_RDONLY);
            char byte;
            _exit(read(file, &byte, 1) != 1);
        }
        wait_for(child);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        printf("wrong %d\n", wrong[i]);
    }
}

static void of_rights(void) {
    int file = opened(0);
    show("as root", file);
    tell("setuid", setresuid(65534, 65534, 65534));
    show("as nobody", file);
    struct stat status;
    tell("fstat", fstat(file, &status));
    if (status.st_mode & 4) printf("readable\n");
    tell("open", open(name, O_RDONLY) < 0 ? -1 : 0);
}

int main(int count, char **arguments) {
    if (count < 2) return 64;
    name = arguments[1];
    /* So often that the library opens it by itself. */
    for (int i = 0; i < 40; i++) close(opened(0));
    of_the_descriptor();
    close_above();
    of_the_kernel();
    close_above();
    of_children();
    close_above();
    of_limits();
    close_above();
    of_threads();
    close_above();
    if (count > 2) of_rights();
    return 0;
}
