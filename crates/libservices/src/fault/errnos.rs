//! Errors by name, as stack documents give them.

use crate::error::Errno;

macro_rules! errnos {
    ($($name:ident)*) => {
        /// Those that filesystems answer with, by name.
        pub const ERRNOS: &[(&str, i32)] = &[$((stringify!($name), libc::$name)),*];
    };
}

errnos! {
    E2BIG EACCES EAGAIN EBADF EBUSY ECANCELED ECONNREFUSED EDEADLK EDQUOT EEXIST EFAULT EFBIG EINTR EINVAL EIO EISDIR
    ELOOP EMFILE EMLINK ENAMETOOLONG ENFILE ENODATA ENODEV ENOENT ENOLCK ENOMEM ENOSPC ENOSYS ENOTCONN ENOTDIR
    ENOTEMPTY ENOTSUP ENOTTY ENXIO EOPNOTSUPP EOVERFLOW EPERM EPIPE ERANGE EREMOTEIO EROFS ESPIPE ESTALE ETIME
    ETIMEDOUT ETXTBSY EUCLEAN EXDEV
}

pub fn by_name(name: &str) -> Option<Errno> {
    ERRNOS.iter().find(|(known, _)| *known == name).map(|&(_, number)| Errno::from_raw_os_error(number))
}
