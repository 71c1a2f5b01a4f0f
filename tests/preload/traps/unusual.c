/* Calls that name descriptors in other ways: asynchronous ones, by numbers alone, in structures. */
#include "trap.h"
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>

static char bytes[100];

int main(void) {
    begin();
    struct iovec part = {bytes, 10};
    int reads = open("known", O_RDONLY), writes = made("written", O_RDWR);
    tell("preadv2", preadv2(reads, &part, 1, 3, 0));
    tell("preadv2 at the offset", preadv2(reads, &part, 1, -1, 0));
    tell("position", lseek(reads, 0, SEEK_CUR));
    tell("pwritev2", pwritev2(writes, &part, 1, 0, 0));
    tell("pwritev2 at the offset", pwritev2(writes, &part, 1, -1, 0));
    tell("pwritev2 appends", pwritev2(writes, &part, 1, 0, RWF_APPEND));
    tell("preadv", preadv(reads, &part, 1, 5));
    tell("pwritev", pwritev(writes, &part, 1, 5));
    tell("by number", syscall(SYS_write, writes, "number", 6L));
    tell("by number", syscall(SYS_pread64, writes, bytes, 6L, 10L));
    show("written");
    int fresh = open("known", O_RDONLY), target = made("clone", O_RDWR);
    tell("write", write(target, "t", 1));
    long cloned = ioctl(target, FICLONE, fresh);
    printf("clone refused: %s\n", cloned ? strerror(errno) : "no");
    struct file_clone_range range = {.src_fd = open("known", O_RDONLY)};
    cloned = ioctl(target, FICLONERANGE, &range);
    printf("clone refused: %s\n", cloned ? strerror(errno) : "no");
    int count = -1;
    tell("FIONREAD", ioctl(fresh, FIONREAD, &count));
    tell("left", count);
    tell("FIOCLEX", ioctl(fresh, FIOCLEX));
    tell("is", fcntl(fresh, F_GETFD));
    tell("terminal", isatty(fresh));
    tell("block size", ioctl(fresh, FIGETBSZ, &count) < 0 ? -1 : 0);

    aio_context_t context = 0;
    int other = open("known", O_RDONLY), to = made("aio", O_RDWR);
    tell("write", write(to, "before", 6));
    tell("io_setup", syscall(SYS_io_setup, 4, &context));
    memset(bytes, 0, sizeof bytes);
    struct iocb read_it = {.aio_fildes = other, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_buf = (long)bytes, .aio_nbytes = 12};
    struct iocb write_it = {.aio_fildes = to, .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_buf = (long)"AIO", .aio_nbytes = 3};
    struct iocb *all[] = {&read_it, &write_it};
    struct io_event events[2];
    tell("io_submit", syscall(SYS_io_submit, context, 2, all));
    tell("io_getevents", syscall(SYS_io_getevents, context, 2, 2, events, NULL));
    printf("%s\n", bytes);
    show("aio");
    int later = open("known", O_RDONLY);
    read_it.aio_fildes = later;
    tell("of one opened later", syscall(SYS_io_submit, context, 1, all));
    tell("io_getevents", syscall(SYS_io_getevents, context, 1, 1, events, NULL));
    tell("result", events[0].res);
    return 0;
}
