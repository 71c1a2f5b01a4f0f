/* Programs that give up system calls are killed for any that they would not have made themselves. */
#include "trap.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static int reads, writes, other;

/* Only calls that a strict sandbox allows: read, write, exit. */
static void use(void) {
    char bytes[40];
    for (int i = 0; i < 8; i++) {
        long got = read(reads, bytes, 5);
        if (write(writes, bytes, got) != got) syscall(SYS_exit, 9);
    }
    if (read(other, bytes, 5) != 5 || write(1, bytes, 5) != 5) syscall(SYS_exit, 8);
    syscall(SYS_exit, 0);
}

static void by_filter(int allow_close) {
    static const int allowed[] = {SYS_read, SYS_write, SYS_exit, SYS_exit_group, SYS_pread64, SYS_close};
    struct sock_filter code[20];
    int at = 0, count = 5 + allow_close;
    code[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < count; i++) {
        code[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], 0, 1);
        code[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    }
    code[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    struct sock_fprog program = {at, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (allow_close) {
        if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program)) _exit(7);
    } else if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
        _exit(7);
    }
}

int main(void) {
    begin();
    for (int way = 0; way < 3; way++) {
        for (int warm = 0; warm < 2; warm++) {
            char bytes[40];
            reads = open("known", O_RDONLY);
            other = open("known", O_RDONLY);
            writes = made("written", O_RDWR | O_TRUNC);
            if (warm)
                for (int i = 0; i < 10; i++) pread(other, bytes, 5, 0);
            pid_t child = fork();
            if (child == 0) {
                begin();
                int own = open("known", O_RDONLY);
                if (way == 0) prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT);
                else by_filter(way - 1);
                for (int i = 0; way == 2 && i < 12; i++)
                    if (pread(own, bytes, 9, 2) != 9 || pread(reads, bytes, 9, 0) != 9) _exit(6);
                if (way == 2 && close(own)) _exit(5);
                use();
            }
            wait_for(child);
            printf("\n");
            show("written");
            tell("position", lseek(reads, 0, SEEK_CUR));
            close(reads), close(other), close(writes);
        }
    }
    return 0;
}
