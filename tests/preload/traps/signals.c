/* Signals in the middle of calls, whose handler does the same calls, on the same file and on others. */
#include "trap.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>

enum { WRITES = 4000 };
static int log_file, wrong;
static volatile int handled;
static sigjmp_buf back;
static volatile sig_atomic_t jumps;

static void handler(int signal) {
    (void)signal;
    int before = errno;
    char bytes[36];
    int file = open("known", O_RDONLY);
    if (file < 0 || read(file, bytes, 36) != 36 || memcmp(bytes, "0123456789", 10)) wrong++;
    close(file);
    if (write(log_file, "h", 1) != 1) wrong++;
    struct stat status;
    if (stat("known", &status) || status.st_size != 36) wrong++;
    handled++;
    errno = before;
}

static void jumper(int signal) {
    (void)signal;
    jumps++;
    siglongjmp(back, 1);
}

static void every(int microseconds) {
    struct itimerval timer = {{0, microseconds}, {0, microseconds}};
    setitimer(ITIMER_REAL, &timer, NULL);
}

static void *work(void *nothing) {
    char bytes[36];
    for (int i = 0; i < 2000; i++) {
        int file = open("known", O_RDONLY);
        if (file < 0 || pread(file, bytes, 36, 0) != 36 || memcmp(bytes, "0123456789", 10)) wrong++;
        close(file);
    }
    return nothing;
}

int main(void) {
    begin();
    log_file = made("log", O_WRONLY | O_APPEND);
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    every(500);
    int file = made("written", O_RDWR);
    char bytes[100];
    memset(bytes, 'w', sizeof bytes);
    /* Until the handler came often enough, whatever the machine does meanwhile. */
    long written = 0;
    for (int i = 0; i < WRITES || handled < 50; i++) {
        if (write(file, bytes, sizeof bytes) != sizeof bytes) wrong++;
        if (pread(file, bytes, 50, written / 2) != 50 || bytes[0] != 'w') wrong++;
        written += sizeof bytes;
        if (i % 100 == 0) work(NULL);
    }
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    every(0);
    struct stat status;
    fstat(file, &status);
    printf("wrong %d, all there %d\n", wrong, status.st_size == written);
    fstat(log_file, &status);
    printf("handled %d\n", status.st_size == handled);
    /* Jumps out of calls: some may be lost, the rest goes on. */
    action.sa_handler = jumper;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGALRM, &action, NULL);
    every(700);
    volatile int turns = 0;
    while (jumps < 20) {
        if (sigsetjmp(back, 1) == 0)
            for (;;) {
                if (pread(file, bytes, 100, 0) != 100) wrong++;
                turns++;
            }
    }
    every(0);
    signal(SIGALRM, SIG_IGN);
    tell("after jumps", pread(file, bytes, 100, 0));
    tell("write", write(file, "more", 4));
    work(NULL);
    printf("wrong %d\n", wrong);
    return 0;
}
