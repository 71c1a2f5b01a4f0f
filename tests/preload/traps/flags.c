/* Close-on-exec that one thread sets while another one has the kernel open the file. */
#include "trap.h"
#include <pthread.h>

static volatile int file, begun, wanted, before;

static void *set(void *unused) {
    while (!begun) {}
    for (volatile int wait = 0; wait < before; wait++) {}
    fcntl(file, F_SETFD, wanted);
    return unused;
}

int main(void) {
    int right = 0, rounds = 1500;
    begin();
    for (int i = 0; i < rounds; i++) {
        pthread_t thread;
        file = open("known", O_RDONLY | (i % 2 ? O_CLOEXEC : 0));
        wanted = i % 2 ? 0 : FD_CLOEXEC;
        begun = 0;
        before = i * 997 % 60000;
        pthread_create(&thread, NULL, set, NULL);
        begun = 1;
        int copy = dup(file);
        pthread_join(thread, NULL);
        right += fcntl(file, F_GETFD) == wanted;
        close(copy);
        close(file);
    }
    printf("%d of %d\n", right, rounds);
    return 0;
}
