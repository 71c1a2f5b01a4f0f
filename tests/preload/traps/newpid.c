/* Children that have their parent's number, in another namespace of processes, and its memory. */
#include "trap.h"
#include <sched.h>

static int first_of_all(void) {
    char bytes[8] = {0};
    struct stat status;
    printf("number %d\n", getpid());
    begin();
    int file = open("known", O_RDONLY), written = made("written", O_WRONLY);
    tell("before", read(file, bytes, 3));
    if (unshare(CLONE_NEWPID)) return 2;
    int after = open("known", O_RDONLY);
    tell("after", read(after, bytes, 5));
    pid_t child = vfork();
    if (child == 0) {
        close(file);
        close(written);
        close(after);
        dup2(0, 50);
        int own = open("known", O_RDONLY);
        if (read(own, bytes, 1) != 1) _exit(4);
        _exit(getpid() == 1 ? 0 : 3);
    }
    wait_for(child);
    tell("read", read(file, bytes, 7));
    puts(bytes);
    tell("read", read(after, bytes, 7));
    puts(bytes);
    tell("write", write(written, "abc", 3));
    tell("close", close(file));
    tell("close", close(written));
    tell("not open", fstat(50, &status));
    show("written");
    return 0;
}

int main(int count, char **arguments) {
    (void)arguments;
    if (count > 1) return first_of_all();
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (unshare(CLONE_NEWPID)) _exit(1);
        pid_t first = fork();
        if (first == 0) {
            execl("/proc/self/exe", "newpid", "first", NULL);
            _exit(127);
        }
        int status;
        waitpid(first, &status, 0);
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 99);
    }
    wait_for(child);
    return 0;
}
