/* io_uring names descriptors where nobody looks. */
#include "trap.h"
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>

int main(void) {
    begin();
    int before = open("known", O_RDONLY), writes = made("written", O_RDWR);
    tell("write", write(writes, "before ring", 11));
    struct io_uring_params p = {0};
    int ring = syscall(SYS_io_uring_setup, 4, &p);
    if (ring < 0) {
        printf("no rings here: %s\n", strerror(errno));
        return 0;
    }
    char *sq = mmap(0, p.sq_off.array + 4 * sizeof(unsigned), 3, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    char *cq = mmap(0, p.cq_off.cqes + 8 * sizeof(struct io_uring_cqe), 3, MAP_SHARED, ring, IORING_OFF_CQ_RING);
    struct io_uring_sqe *sqe = mmap(0, 4 * sizeof *sqe, 3, MAP_SHARED, ring, IORING_OFF_SQES);
    char bytes[40] = "";
    int after = open("known", O_RDONLY), files[] = {before, writes, after};
    for (int i = 0; i < 3; i++) {
        memset(sqe, 0, sizeof *sqe);
        sqe->opcode = i == 1 ? IORING_OP_WRITE : IORING_OP_READ;
        sqe->fd = files[i];
        sqe->addr = (long)(i == 1 ? "RING" : bytes);
        sqe->len = i == 1 ? 4 : 8;
        unsigned *tail = (unsigned *)(sq + p.sq_off.tail);
        ((unsigned *)(sq + p.sq_off.array))[*tail & (p.sq_entries - 1)] = 0;
        __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
        tell("enter", syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0));
        struct io_uring_cqe *cqe = (struct io_uring_cqe *)(cq + p.cq_off.cqes) + (i & (p.cq_entries - 1));
        tell("result", cqe->res);
        __atomic_store_n((unsigned *)(cq + p.cq_off.head), i + 1, __ATOMIC_RELEASE);
    }
    printf("%s\n", bytes);
    show("written");
    return 0;
}
