/* Maps of all kinds see what is written, are seen, run, and grow with their file. */
#include "trap.h"
#include <dlfcn.h>
#include <sys/mman.h>

static char *map(int file, size_t bytes, int rights, int how) {
    char *at = mmap(NULL, bytes, rights, how, file, 0);
    if (at == MAP_FAILED) printf("mmap: %s\n", strerror(errno));
    return at == MAP_FAILED ? NULL : at;
}

int main(void) {
    begin();
    char bytes[100] = "";
    for (int turn = 0; turn < 3; turn++) {
        int file = made("mapped", O_RDWR | O_TRUNC);
        tell("write", write(file, "written before it was mapped", 28));
        char *shared = map(file, 8192, PROT_READ | PROT_WRITE, MAP_SHARED);
        char *copied = map(file, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE);
        int other = open("mapped", O_RDWR);
        char *seen = map(other, 8192, PROT_READ, MAP_SHARED);
        printf("%s, %s, %s\n", shared, copied, seen);
        memcpy(shared, "MAPPED!", 7);
        tell("pread", pread(other, bytes, 10, 0));
        printf("%.10s\n", bytes);
        tell("pwrite", pwrite(other, "by the other", 12, 8));
        printf("%s, %s\n", shared, seen);
        memcpy(copied, "nobody", 6);
        printf("%.6s, %.6s\n", copied, seen);
        tell("append", lseek(file, 0, SEEK_END));
        tell("append", write(file, ", and more", 10));
        printf("%s\n", seen);
        tell("grow", ftruncate(file, 6000));
        shared[5000] = 'x';
        tell("msync", msync(shared, 8192, MS_SYNC));
        tell("pread far", pread(other, bytes, 2, 4999));
        printf("%d %c\n", bytes[0], bytes[1]);
        tell("cut", ftruncate(other, 10));
        tell("grow again", ftruncate(file, 6000));
        printf("%.12s, %d\n", shared, shared[5000]);
        pid_t child = fork();
        if (child == 0) {
            memcpy(shared, "by a child", 10);
            _exit(0);
        }
        wait_for(child);
        tell("pread", pread(other, bytes, 10, 0));
        printf("%.10s\n", bytes);
        tell("close", close(file) + close(other));
        memcpy(shared, "after", 5);
        show("mapped");
        munmap(shared, 8192), munmap(copied, 8192), munmap(seen, 8192);
        show("mapped");
        tell("unlink", unlink("mapped"));
    }
    int reads = open("known", O_RDONLY), writes = made("other", O_WRONLY);
    tell("write", write(writes, "x", 1));
    map(reads, 100, PROT_READ | PROT_WRITE, MAP_SHARED);
    map(writes, 100, PROT_READ, MAP_PRIVATE);
    char *closed = map(reads, 100, PROT_READ, MAP_PRIVATE);
    close(reads);
    printf("%.5s\n", closed);
    /* Code from a file that was made here. */
    static const unsigned char answer[] = {0xb8, 42, 0, 0, 0, 0xc3};
    int code = made("code", O_RDWR);
    tell("write", write(code, answer, sizeof answer));
    char *run = map(code, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE);
    if (run) tell("run", ((int (*)(void))run)());
    int from = open("/lib/x86_64-linux-gnu/libm.so.6", O_RDONLY), to = made("library.so", O_WRONLY);
    char block[4096];
    for (long got; (got = read(from, block, sizeof block)) > 0;)
        if (write(to, block, got) != got) return 1;
    close(from), close(to);
    void *library = dlopen("./library.so", RTLD_NOW);
    tell("library", library != NULL);
    return 0;
}
