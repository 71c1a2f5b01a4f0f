/* Open directories in the working directory: what the C library lists, and finds below them, must be what the kernel says, asked by
 * instructions of our own, while names change in between, and while descriptors are duplicated, inherited and handed on. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "kernel.h"

static unsigned wrong;
#define EXPECT(true_, ...) \
    do { \
        if (!(true_) && wrong++ < 20) { \
            printf("line %d: ", __LINE__); \
            printf(__VA_ARGS__); \
            printf("\n"); \
        } \
    } while (0)

#define NAMES_MAX 600
struct names {
    int count;
    struct name {
        unsigned long ino;
        unsigned char type;
        char text[24];
    } all[NAMES_MAX];
};

static int compare(const void *a, const void *b) {
    return strcmp(((const struct name *)a)->text, ((const struct name *)b)->text);
}

static void add(struct names *to, unsigned long ino, unsigned char type, const char *text) {
    if (to->count == NAMES_MAX || strlen(text) > 23) abort();
    struct name *name = &to->all[to->count++];
    memset(name, 0, sizeof *name);
    name->ino = strcmp(text, "..") == 0 ? 0 : ino;
    name->type = type;
    strcpy(name->text, text);
}

static void by_kernel(const char *path, struct names *to) {
    char buffer[8192];
    to->count = 0;
    long file = raw(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_DIRECTORY, 0, 0);
    for (long got; (got = raw(SYS_getdents64, file, (long)buffer, sizeof buffer, 0, 0)) > 0;)
        for (long at = 0; at < got; at += *(unsigned short *)(buffer + at + 16))
            add(to, *(unsigned long *)(buffer + at), buffer[at + 18], buffer + at + 19);
    raw(SYS_close, file, 0, 0, 0, 0);
    qsort(to->all, to->count, sizeof *to->all, compare);
}

static void rest_of(DIR *from, struct names *to) {
    errno = 0;
    for (struct dirent *entry; (entry = readdir(from));) add(to, entry->d_ino, entry->d_type, entry->d_name);
    EXPECT(errno == 0, "readdir: %s", strerror(errno));
}

static int same(const struct names *a, const struct names *b) {
    return a->count == b->count && memcmp(a->all, b->all, a->count * sizeof *a->all) == 0;
}

static void check_listing(const char *path) {
    static struct names ours, theirs;
    by_kernel(path, &theirs);
    DIR *directory = opendir(path);
    EXPECT(directory, "opendir %s: %s", path, strerror(errno));
    if (!directory) return;
    ours.count = 0;
    rest_of(directory, &ours);
    qsort(ours.all, ours.count, sizeof *ours.all, compare);
    EXPECT(same(&ours, &theirs), "%s lists %d names, the kernel %d", path, ours.count, theirs.count);
    struct stat by_us, by_it;
    for (int at = 0; at < theirs.count; at++) {
        const char *name = theirs.all[at].text;
        long got = fstatat(dirfd(directory), name, &by_us, AT_SYMLINK_NOFOLLOW) ? -errno : 0;
        long expected = raw(SYS_newfstatat, dirfd(directory), (long)name, (long)&by_it, AT_SYMLINK_NOFOLLOW, 0);
        by_us.st_atim = by_it.st_atim;
        int equal = got == expected && (got || memcmp(&by_us, &by_it, sizeof by_us) == 0);
        EXPECT(equal, "stat of %s in %s: %ld, %ld", name, path, got, expected);
        struct statx x_us, x_it;
        memset(&x_us, 0, sizeof x_us);
        memset(&x_it, 0, sizeof x_it);
        got = statx(dirfd(directory), name, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &x_us) ? -errno : 0;
        raw(SYS_statx, dirfd(directory), (long)name, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, (long)&x_it);
        equal = x_us.stx_ino == x_it.stx_ino && x_us.stx_mode == x_it.stx_mode && x_us.stx_size == x_it.stx_size
            && x_us.stx_nlink == x_it.stx_nlink && x_us.stx_blocks == x_it.stx_blocks && x_us.stx_uid == x_it.stx_uid
            && x_us.stx_gid == x_it.stx_gid && x_us.stx_blksize == x_it.stx_blksize
            && memcmp(&x_us.stx_mtime, &x_it.stx_mtime, sizeof x_us.stx_mtime) == 0
            && memcmp(&x_us.stx_ctime, &x_it.stx_ctime, sizeof x_us.stx_ctime) == 0
            && memcmp(&x_us.stx_btime, &x_it.stx_btime, sizeof x_us.stx_btime) == 0
            && x_us.stx_dev_major == x_it.stx_dev_major && x_us.stx_dev_minor == x_it.stx_dev_minor
            && x_us.stx_rdev_major == x_it.stx_rdev_major && x_us.stx_rdev_minor == x_it.stx_rdev_minor
            && (x_us.stx_mask & 0xfff) == (x_it.stx_mask & 0xfff);
        EXPECT(got == 0 && equal, "statx of %s in %s: %ld, mask %x %x", name, path, got, x_us.stx_mask, x_it.stx_mask);
    }
    int missing = fstatat(dirfd(directory), "missing", &by_us, 0) ? errno : 0;
    EXPECT(missing == ENOENT, "stat of a missing name: %d", missing);
    closedir(directory);
}

static void path_of(char *to, int directory, int file) {
    if (file < 0) sprintf(to, "d%d", directory);
    else sprintf(to, "d%d/file %d", directory, file);
}

static void change(void) {
    char path[64], other[64];
    path_of(path, pick(12), pick(8));
    path_of(other, pick(12), pick(8));
    switch (pick(5)) {
    case 0: unlink(path); break;
    case 1: rename(path, other); break;
    case 2: chmod(path, 0600 + pick(64)); break;
    case 3: symlink(other, path); break;
    default: {
        int file = open(path, O_CREAT | O_WRONLY, 0644);
        if (file >= 0 && write(file, path, 1 + pick(9)) < 0) abort();
        close(file);
    }
    }
    if (pick(8)) return;
    path_of(path, pick(12), -1);
    rename(path, "between");
    path_of(other, pick(12), -1);
    rename(other, path);
    rename("between", other);
}

/* Positions, and what several descriptors and processes share of one. */
static void check_positions(void) {
    static struct names whole, parts;
    by_kernel("many", &whole);
    DIR *directory = opendir("many");
    parts.count = 0;
    long half = 0;
    for (int at = 0; at < whole.count / 2; at++) {
        struct dirent *entry = readdir(directory);
        add(&parts, entry->d_ino, entry->d_type, entry->d_name);
        half = telldir(directory);
    }
    int marked = parts.count;
    rest_of(directory, &parts);
    seekdir(directory, half);
    parts.count = marked;
    rest_of(directory, &parts);
    qsort(parts.all, parts.count, sizeof *parts.all, compare);
    EXPECT(same(&parts, &whole), "after seekdir %d names of %d", parts.count, whole.count);
    EXPECT(unlink("many/gone 1") == 0, "unlink: %s", strerror(errno));
    rewinddir(directory);
    parts.count = 0;
    rest_of(directory, &parts);
    EXPECT(parts.count == whole.count - 1, "after rewinddir %d names of %d", parts.count, whole.count - 1);
    closedir(directory);

    /* A duplicate goes on where the other stopped; so does a child, and the parent after it. */
    by_kernel("many", &whole);
    int count = 0, in_child = 0, status;
    char buffer[700];
    int first = open("many", O_RDONLY | O_DIRECTORY), second = dup(first);
    int files[2] = {first, second};
    for (int turn = 0; turn < 4; turn++) {
        long got = syscall(SYS_getdents64, files[turn % 2], buffer, sizeof buffer);
        for (long at = 0; at < got; at += *(unsigned short *)(buffer + at + 16)) count++;
    }
    if (fork() == 0) {
        int mine = 0;
        long got = syscall(SYS_getdents64, second, buffer, sizeof buffer);
        for (long at = 0; at < got; at += *(unsigned short *)(buffer + at + 16)) mine++;
        _exit(mine);
    }
    wait(&status);
    in_child = WEXITSTATUS(status);
    EXPECT(in_child > 0, "the child saw none");
    for (long got; (got = syscall(SYS_getdents64, first, buffer, sizeof buffer)) > 0;)
        for (long at = 0; at < got; at += *(unsigned short *)(buffer + at + 16)) count++;
    EXPECT(count + in_child == whole.count, "together %d and %d of %d", count, in_child, whole.count);
    EXPECT(syscall(SYS_getdents64, second, buffer, sizeof buffer) == 0, "the duplicate is not at the end");
    close(first);
    close(second);
}

/* What only a real open directory can do. */
static void check_kinds(void) {
    struct stat one, other;
    int file = open("d1", O_RDONLY | O_DIRECTORY);
    char byte;
    EXPECT(read(file, &byte, 1) == -1 && errno == EISDIR, "read: %d", errno);
    file = (close(file), open("d1", O_RDONLY | O_DIRECTORY | O_NONBLOCK));
    EXPECT((fcntl(file, F_GETFL) & (O_PATH | O_ACCMODE | O_NONBLOCK | O_DIRECTORY)) == (O_NONBLOCK | O_DIRECTORY), "flags %o",
           fcntl(file, F_GETFL));
    EXPECT(fsync(file) == 0, "fsync: %s", strerror(errno));
    file = (close(file), open("d1", O_RDONLY | O_DIRECTORY));
    EXPECT(flock(file, LOCK_SH | LOCK_NB) == 0, "flock: %s", strerror(errno));
    file = (close(file), open("d1", O_RDONLY | O_DIRECTORY));
    EXPECT(fchmod(file, 0750) == 0 && fstat(file, &one) == 0 && (one.st_mode & 07777) == 0750, "fchmod: %s", strerror(errno));
    file = (close(file), open("d1", O_RDONLY | O_DIRECTORY));
    EXPECT(fgetxattr(file, "user.none", &byte, 1) == -1 && errno == ENODATA, "fgetxattr: %s", strerror(errno));
    file = (close(file), open("d1", O_RDONLY | O_DIRECTORY));
    EXPECT(futimens(file, NULL) == 0, "futimens: %s", strerror(errno));
    file = (close(file), open("d1", O_RDONLY | O_DIRECTORY));
    EXPECT(fchdir(file) == 0 && stat(".", &one) == 0 && fstat(file, &other) == 0 && one.st_ino == other.st_ino, "fchdir");
    EXPECT(chdir("..") == 0, "chdir");
    /* Moved away, its names are found below it all the same; another in its place is another. */
    int inside = openat(file, "here", O_CREAT | O_WRONLY, 0600);
    close(inside);
    EXPECT(fstatat(file, "here", &one, 0) == 0, "before it moved: %s", strerror(errno));
    rename("d1", "moved");
    mkdir("d1", 0755);
    EXPECT(fstatat(file, "here", &other, 0) == 0 && one.st_ino == other.st_ino, "after it moved: %s", strerror(errno));
    EXPECT(stat("d1/here", &other) == -1 && errno == ENOENT, "the other has none");
    int below = openat(file, ".", O_RDONLY | O_DIRECTORY);
    EXPECT(fstatat(below, "here", &other, 0) == 0 && one.st_ino == other.st_ino, "opened through it");
    close(below);
    EXPECT(unlinkat(file, "here", 0) == 0, "unlinkat: %s", strerror(errno));
    rmdir("d1");
    rename("moved", "d1");
    close(file);
    /* Inherited by a program that knows nothing of it. */
    file = open("d2", O_RDONLY | O_DIRECTORY);
    char command[100];
    sprintf(command, "test \"$(ls /proc/self/fd/%d/ | wc -l)\" = \"$(ls d2 | wc -l)\"", file);
    EXPECT(system(command) == 0, "inherited");
    close(file);
    mkdir("empty", 0755);
    DIR *empty = opendir("empty");
    rmdir("empty");
    EXPECT(readdir(empty) == NULL, "a directory that is gone has names");
    closedir(empty);
}

int main(int count, char **words) {
    int rounds = count > 1 ? atoi(words[1]) : 100;
    char path[64];
    mkdir("many", 0755);
    for (int at = 0; at < 300; at++) {
        sprintf(path, "many/%s %d", at < 10 ? "gone" : "name", at);
        close(open(path, O_CREAT | O_WRONLY, 0600));
    }
    for (int at = 0; at < 12; at++) {
        path_of(path, at, -1);
        mkdir(path, 0755);
        for (int turn = 0; turn < 3; turn++) check_listing(path);
    }
    for (int round = 0; round < rounds; round++) {
        change();
        if (pick(20) == 0 && fork() == 0) {
            change();
            path_of(path, pick(12), -1);
            check_listing(path);
            _exit(wrong > 0);
        }
        for (int status; waitpid(-1, &status, 0) > 0;) EXPECT(status == 0, "a child: %x", status);
        path_of(path, pick(12), -1);
        check_listing(path);
    }
    check_positions();
    check_kinds();
    printf("%u wrong\n", wrong);
    return wrong > 0;
}
