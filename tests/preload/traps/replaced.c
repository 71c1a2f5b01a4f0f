/* Descriptors that are copied, replaced, ended in ranges, and run out. */
#include "trap.h"
#include <sys/resource.h>

int main(void) {
    begin();
    char bytes[40];
    for (int turn = 0; turn < 3; turn++) {
        int reads = open("known", O_RDONLY), writes = made("written", O_RDWR | O_TRUNC);
        tell("write", write(writes, "one ", 4));
        int copy = dup(writes);
        tell("write to the copy", write(copy, "two ", 4));
        tell("write", write(writes, "three ", 6));
        tell("position", lseek(copy, 0, SEEK_CUR));
        tell("seek", lseek(copy, 1, SEEK_SET));
        tell("read", read(writes, bytes, 3));
        tell("close", close(writes));
        tell("write to what is left", write(copy, "!", 1));
        tell("flags", fcntl(copy, F_GETFL) & (O_ACCMODE | O_APPEND));
        tell("append", fcntl(copy, F_SETFL, O_APPEND));
        int third = fcntl(copy, F_DUPFD_CLOEXEC, 50);
        tell("number", third);
        tell("flags of the copy's copy", fcntl(third, F_GETFL) & (O_ACCMODE | O_APPEND));
        tell("appended", write(third, "end", 3));
        tell("close-on-exec", fcntl(third, F_GETFD));
        show("written");

        tell("dup2 over one of ours", dup2(reads, copy));
        tell("read", read(copy, bytes, 4));
        tell("position of the first", lseek(reads, 0, SEEK_CUR));
        tell("dup2 onto itself", dup2(reads, reads));
        tell("dup3 onto itself", dup3(reads, reads, 0));
        tell("dup2 of nothing", dup2(999, reads));
        tell("still there", read(reads, bytes, 4));
        int pipes[2];
        if (pipe(pipes)) return 1;
        tell("a pipe over ours", dup2(pipes[0], reads));
        tell("write to the pipe", write(pipes[1], "pipe", 4));
        tell("read from it", read(reads, bytes, 10));
        printf("%.4s\n", bytes);
        tell("the copy is as it was", lseek(copy, 0, SEEK_CUR));
        int again = open("known", O_RDONLY);
        tell("ours over the pipe", dup2(again, pipes[0]));
        tell("read", read(pipes[0], bytes, 6));
        tell("read on", read(again, bytes, 6));
        printf("%.6s\n", bytes);

        int first = open("known", O_RDONLY), last = first;
        for (int i = 0; i < 5; i++) last = open("known", O_RDONLY);
        tell("close_range", close_range(first, last, 0));
        tell("closed", fcntl(first, F_GETFD));
        tell("closed", read(last, bytes, 1));
        tell("others are not", read(again, bytes, 1));
        first = open("known", O_RDONLY);
        tell("close-on-exec by range", close_range(first, first, CLOSE_RANGE_CLOEXEC));
        tell("is", fcntl(first, F_GETFD));
        tell("readable", read(first, bytes, 4));
        tell("wrong range", close_range(9, 3, 0));
        for (int file = 3; file < 100; file++) close(file);
    }
    tell("all", close_range(3, ~0U, 0));
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    struct rlimit low = {20, limit.rlim_max};
    tell("limit", setrlimit(RLIMIT_NOFILE, &low));
    int count = 0, file, last = 0;
    while (count < 100 && (file = open("known", count % 2 ? O_RDONLY : O_RDWR)) >= 0) count++, last = file;
    tell("opened", count);
    tell("last", last);
    tell("one more", open("known", O_RDONLY));
    tell("one to make", open("made", O_CREAT | O_WRONLY, 0644));
    tell("dup", dup(last));
    tell("dup2 beyond", dup2(last, 30));
    tell("fork", fork() == 0 ? (_exit(read(last, bytes, 3) != 3), 0) : 0);
    int status;
    wait(&status);
    tell("child", status);
    tell("works", read(last, bytes, 3));
    tell("closed", close(last));
    tell("next", open("known", O_RDONLY));
    close_range(3, ~0U, 0);
    return 0;
}
