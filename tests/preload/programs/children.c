/* fork, vfork, posix_spawn, system, popen: what children do to descriptors stays theirs. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static int status_of(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child) abort();
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int main(void) {
    int file = open("/etc/passwd", O_RDONLY);
    if (file < 0) return 1;
    char bytes[5] = "";
    pid_t child = fork();
    if (child == 0) {
        if (read(file, bytes, 2) != 2) _exit(9);
        close(file);
        _exit(3);
    }
    printf("fork %d\n", status_of(child));
    if (read(file, bytes, 4) != 4) return 2;
    printf("shared offset: %s\n", bytes);
    fflush(stdout);

    child = vfork();
    if (child == 0) {
        dup2(file, 0);
        close(file);
        execl("/bin/sh", "sh", "-c", "read line; exit 4", NULL);
        _exit(127);
    }
    printf("vfork %d, still open %d\n", status_of(child), fcntl(file, F_GETFD) >= 0);

    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/etc/passwd", O_RDONLY, 0);
    posix_spawn_file_actions_addclose(&actions, file);
    posix_spawn_file_actions_adddup2(&actions, 1, 5);
    char *arguments[] = {"sh", "-c", "read line; echo \"$line\" >&5; exit 6", NULL};
    fflush(stdout);
    if (posix_spawn(&child, "/bin/sh", &actions, NULL, arguments, environ)) return 3;
    printf("spawn %d, still open %d\n", status_of(child), fcntl(file, F_GETFD) >= 0);
    fflush(stdout);
    printf("system %d\n", WEXITSTATUS(system("exit 7")));
    FILE *stream = popen("cat /etc/hostname", "r");
    char line[100] = "";
    if (!stream || !fgets(line, sizeof line, stream) || pclose(stream)) return 4;
    printf("popen %zu\n", strlen(line) > 1 ? (size_t)1 : (size_t)0);
    return 0;
}
