/* What children do to descriptors in borrowed memory stays theirs, and what both have open is one open file. */
#include "trap.h"
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>

extern char **environ;

static void run(const char *what, const posix_spawn_file_actions_t *actions, const char *script) {
    char *words[] = {"sh", "-c", (char *)script, NULL};
    pid_t child;
    int spawned = posix_spawn(&child, "/bin/sh", actions, NULL, words, environ);
    wait_for(child);
    tell(what, spawned);
}

static int in_clone(void *file) {
    char bytes[4] = "";
    return read(*(int *)file, bytes, 3) != 3 || close(*(int *)file);
}

int main(void) {
    begin();
    char bytes[40] = "";
    for (int turn = 0; turn < 3; turn++) {
        int writes = made("written", O_RDWR | O_TRUNC), reads = open("known", O_RDONLY), other = open("known", O_RDONLY);
        tell("write", write(writes, "before ", 7));
        tell("read", read(reads, bytes, 5));
        pid_t child = vfork();
        if (child == 0) {
            /* None of these is the parent's. */
            close(reads);
            dup2(writes, 1);
            close(writes);
            if (open("known", O_RDONLY) < 0 || write(1, "child ", 6) != 6) _exit(1);
            execl("/bin/echo", "echo", "echoed", NULL);
            _exit(127);
        }
        wait_for(child);
        tell("write after vfork", write(writes, "after", 5));
        tell("read after vfork", read(reads, bytes, 5));
        printf("%.5s\n", bytes);
        show("written");

        child = vfork();
        if (child == 0) {
            close_range(3, 1000, 0);
            _exit(0);
        }
        wait_for(child);
        tell("read after a child's close_range", read(reads, bytes, 5));
        tell("position", lseek(writes, 0, SEEK_CUR));

        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_adddup2(&actions, writes, 1);
        posix_spawn_file_actions_adddup2(&actions, other, 0);
        posix_spawn_file_actions_addclose(&actions, reads);
        posix_spawn_file_actions_addopen(&actions, 7, "known", O_RDONLY, 0);
        run("spawn", &actions, "read word <&7; echo $word; cat; echo >&2");
        tell("write after spawn", write(writes, "!", 1));
        tell("read after spawn", read(reads, bytes, 5));
        tell("read of the child's", read(other, bytes, 5));
        show("written");
        posix_spawn_file_actions_destroy(&actions);

        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_addchdir_np(&actions, "/");
        run("spawn elsewhere", &actions, "pwd");
        tell("here", access("known", F_OK));

        child = fork();
        if (child == 0) {
            char own[8] = "";
            int file = open("known", O_RDONLY);
            tell("child's", read(reads, own, 3) + read(file, own, 7) + write(writes, "?", 1));
            close(reads), close(writes);
            _exit(0);
        }
        wait_for(child);
        tell("position of both", lseek(reads, 0, SEEK_CUR));
        tell("position of both", lseek(writes, 0, SEEK_CUR));
        show("written");
        close(writes), close(reads), close(other);
    }
    /* Children that share memory or descriptors without being threads. */
    char *stack = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int file = open("known", O_RDONLY);
    pid_t child = clone(in_clone, stack + (1 << 20), CLONE_FILES | SIGCHLD, &file);
    wait_for(child);
    tell("closed by the child", read(file, bytes, 1));
    file = open("known", O_RDONLY);
    child = clone(in_clone, stack + (1 << 20), CLONE_VM | SIGCHLD, &file);
    wait_for(child);
    tell("still open", read(file, bytes, 5));
    printf("%.5s\n", bytes);
    return 0;
}
