/* Names in the working directory: what the C library is told must be what the kernel says, asked by an instruction of our own, while
 * names, modes and directories change in between, by this process, by its children, through any door. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel.h"

static unsigned long asked, wrong;

static void differ(const char *what, const char *path, long ours, long theirs) {
    if (wrong++ < 20) printf("%s of %.60s: %ld, the kernel says %ld\n", what, path, ours, theirs);
}

/* Everything but the access time, which the kernel does not keep up to date for others' reads. */
static int same_status(struct stat a, struct stat b) {
    a.st_atim = b.st_atim;
    return memcmp(&a, &b, sizeof a) == 0;
}

static void check(const char *path) {
    for (int follow = 0; follow < 2; follow++) {
        struct stat ours, theirs;
        memset(&ours, 0, sizeof ours);
        memset(&theirs, 0, sizeof theirs);
        int flags = follow ? 0 : AT_SYMLINK_NOFOLLOW;
        long expected = raw(SYS_newfstatat, AT_FDCWD, (long)path, (long)&theirs, flags, 0);
        long got = follow ? stat(path, &ours) : lstat(path, &ours);
        if (got < 0) got = -errno;
        if (got != expected) differ(follow ? "stat" : "lstat", path, got, expected);
        else if (got == 0 && !same_status(ours, theirs)) {
            differ("inode", path, ours.st_ino, theirs.st_ino);
            printf(" mode %o %o, links %lu %lu, size %ld %ld, blocks %ld %ld of %ld %ld, device %lx %lx, mtime %ld.%09ld %ld.%09ld, ctime %ld.%09ld %ld.%09ld\n",
                   ours.st_mode, theirs.st_mode, ours.st_nlink, theirs.st_nlink, ours.st_size, theirs.st_size,
                   ours.st_blocks, theirs.st_blocks, ours.st_blksize, theirs.st_blksize, ours.st_dev, theirs.st_dev,
                   ours.st_mtim.tv_sec, ours.st_mtim.tv_nsec, theirs.st_mtim.tv_sec, theirs.st_mtim.tv_nsec,
                   ours.st_ctim.tv_sec, ours.st_ctim.tv_nsec, theirs.st_ctim.tv_sec, theirs.st_ctim.tv_nsec);
        }
    }
    for (int mode = 0; mode < 8; mode++) {
        long expected = raw(SYS_access, (long)path, mode, 0, 0, 0);
        long got = access(path, mode);
        if (got < 0) got = -errno;
        if (got != expected) differ("access", path, got, expected);
    }
    const int ways[] = {O_RDONLY, O_RDONLY | O_DIRECTORY, O_PATH | O_NOFOLLOW, O_RDONLY | O_NOFOLLOW};
    for (int at = 0; at < 4; at++) {
        long expected = raw(SYS_openat, AT_FDCWD, (long)path, ways[at], 0, 0);
        if (expected >= 0) raw(SYS_close, expected, 0, 0, 0, 0);
        long got = open(path, ways[at]);
        if (got >= 0) close(got);
        else got = -errno;
        if (got < 0 || expected < 0 ? got != expected : 0) differ("open", path, got, expected);
    }
    char ours[300], theirs[300];
    long expected = raw(SYS_readlinkat, AT_FDCWD, (long)path, (long)theirs, sizeof theirs, 0);
    long got = readlink(path, ours, sizeof ours);
    if (got < 0) got = -errno;
    if (got != expected || (got > 0 && memcmp(ours, theirs, got))) differ("readlink", path, got, expected);
    asked += 11;
}

static char long_name[256];
static const char *names[] = {"a", "b", "a/x", "b/x", "a/y", "b/link/deep", "a/link", "b/link", "a/x/deep", "b/x/deep",
                              "a/../b/x", "a/./x", ".", "..", "a/x/", "a\xff\xfe", long_name};
enum { NAMES = sizeof names / sizeof *names };
static char places[NAMES][5000];

static void check_all(void) {
    for (int at = 0; at < NAMES; at++) {
        check(names[at]);
        check(places[at]);
    }
}

/* One change: by the C library, by an instruction of our own, or by a child. */
static void change(void) {
    const char *one = names[pick(10)], *two = names[pick(10)];
    int way = pick(3), kind = pick(9);
    pid_t child = way == 2 ? fork() : 0;
    if (way == 2 && child > 0) {
        int status;
        if (waitpid(child, &status, 0) != child || status) abort();
        return;
    }
    switch (kind) {
    case 0: way == 1 ? raw(SYS_mkdir, (long)one, 0755, 0, 0, 0) : mkdir(one, 0755); break;
    case 1: {
        long file = way == 1 ? raw(SYS_open, (long)one, O_CREAT | O_EXCL | O_WRONLY, 0644, 0, 0)
                             : open(one, O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (file >= 0) {
            if (write(file, two, strlen(two)) < 0) abort();
            close(file);
        }
        break;
    }
    case 2: way == 1 ? raw(SYS_unlink, (long)one, 0, 0, 0, 0) : unlink(one); break;
    case 3: way == 1 ? raw(SYS_rmdir, (long)one, 0, 0, 0, 0) : rmdir(one); break;
    case 4:
    case 5: way == 1 ? raw(SYS_rename, (long)one, (long)two, 0, 0, 0) : rename(one, two); break;
    case 6: way == 1 ? raw(SYS_symlink, (long)"x", (long)one, 0, 0, 0) : symlink("x", one); break;
    case 7: way == 1 ? raw(SYS_link, (long)one, (long)two, 0, 0, 0) : link(one, two); break;
    case 8: {
        int mode = 0700 | pick(64);
        way == 1 ? raw(SYS_chmod, (long)one, mode, 0, 0, 0) : chmod(one, mode);
        break;
    }
    }
    if (way == 2) _exit(0);
}

/* A directory moves while its names are asked for: they are in one place or the other, and what is there is always the same. */
static void moving(void) {
    mkdir("m", 0755);
    mkdir("m/one", 0755);
    mkdir("m/one/f", 0755);
    struct stat first, seen;
    if (stat("m/one/f", &first)) abort();
    pid_t child = fork();
    if (child == 0) {
        for (int round = 0; round < 200; round++) {
            int back = round % 2;
            if (rename(back ? "m/two" : "m/one", back ? "m/one" : "m/two")) _exit(1);
        }
        _exit(0);
    }
    int status = 0;
    while (waitpid(child, &status, WNOHANG) == 0) {
        const char *paths[] = {"m/one/f", "m/two/f"};
        for (int at = 0; at < 2; at++)
            if (stat(paths[at], &seen) == 0 ? seen.st_ino != first.st_ino : errno != ENOENT) differ("moving", paths[at], errno, 0);
    }
    if (status) abort();
    check("m/one/f");
    check("m/two/f");
}

/* Search permission on the way: taken away by a child that is root, asked for by one that is not. */
static void permission(void) {
    if (geteuid()) return;
    if (mkdir("p", 0755) || mkdir("p/q", 0755) || mkdir("p/q/f", 0755)) abort();
    if (chmod("p", 0755) || chmod("p/q", 0755)) abort();
    int go[2], done[2];
    char byte;
    if (pipe(go) || pipe(done)) abort();
    pid_t child = fork();
    if (child == 0) {
        if (setresgid(4711, 4711, 4711) || setresuid(4711, 4711, 4711)) _exit(9);
        for (int round = 0; round < 4; round++) {
            for (int times = 0; times < 100; times++) check("p/q/f");
            if (write(done[1], ".", 1) != 1 || read(go[0], &byte, 1) != 1) _exit(8);
        }
        _exit(wrong != 0);
    }
    for (int round = 0; round < 4; round++) {
        if (read(done[0], &byte, 1) != 1) abort();
        chmod("p", round % 2 ? 0755 : 0700);
        if (write(go[1], ".", 1) != 1) abort();
    }
    int status;
    if (waitpid(child, &status, 0) != child || status) differ("permission", "p/q/f", status, 0);
    /* Rights given up after the names were asked for. */
    chmod("p", 0700);
    child = fork();
    if (child == 0) {
        for (int times = 0; times < 200; times++) check("p/q/f");
        if (setresgid(4711, 4711, 4711) || setresuid(4711, 4711, 4711)) _exit(9);
        for (int times = 0; times < 10; times++) check("p/q/f");
        struct stat seen;
        if (stat("p/q/f", &seen) == 0 || errno != EACCES) _exit(7);
        _exit(wrong != 0);
    }
    if (waitpid(child, &status, 0) != child || status) differ("rights given up", "p/q/f", status, 0);
    /* Another root. */
    child = fork();
    if (child == 0) {
        for (int times = 0; times < 200; times++) check(places[0]);
        if (chroot("p")) _exit(9);
        for (int times = 0; times < 10; times++) {
            check(places[0]);
            check("/q/f");
        }
        _exit(wrong != 0);
    }
    if (waitpid(child, &status, 0) != child || status) differ("chroot", "p", status, 0);
}

static void working_directories(void) {
    if (mkdir("w", 0755) || mkdir("w/1", 0755) || mkdir("w/2", 0755) || mkdir("w/2/only", 0755)) abort();
    int back = open(".", O_RDONLY | O_DIRECTORY);
    for (int round = 0; round < 100; round++) {
        if (chdir(round % 2 ? "w/1" : "w/2")) abort();
        for (int times = 0; times < 4; times++) {
            check("only");
            check("../2/only");
            check(".");
        }
        if (round % 3) {
            if (fchdir(back)) abort();
        } else if (chdir("../..")) abort();
        check("w/2/only");
    }
    /* The working directory itself is moved, and then removed. */
    if (mkdir("w/3", 0755) || mkdir("w/3/in", 0755) || chdir("w/3")) abort();
    for (int times = 0; times < 100; times++) check("in");
    if (rename("../3", "../4")) abort();
    check("in");
    if (rmdir("in") || rmdir("../4")) abort();
    for (int times = 0; times < 10; times++) check("in");
    if (fchdir(back)) abort();
    check("w/2/only");
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 150;
    memset(long_name, 'n', 255);
    char here[4096];
    if (!getcwd(here, sizeof here)) return 1;
    for (int at = 0; at < NAMES; at++) snprintf(places[at], sizeof places[at], "%s/%s", here, names[at]);
    if (mkdir(long_name, 0700) || mkdir("a\xff\xfe", 0700)) return 2;
    for (int round = 0; round < 100 && round < rounds; round++) check_all();
    for (int round = 0; round < rounds; round++) {
        change();
        check_all();
    }
    working_directories();
    moving();
    permission();
    check("/");
    check("/proc/self/exe");
    check("/dev/null");
    printf("%lu wrong\n", wrong);
    return wrong != 0;
}
