//! What a caller may do with a node: the kernel's rules (path_resolution(7)), for requests that come without a kernel in front.

use polytropo_libservices::{Attr, Caller, Capabilities, Errno, Error, FsCapabilities, Libservice, NodeId};

use super::walk::Failure;

pub const READ: u32 = 4;
pub const WRITE: u32 = 2;
pub const EXECUTE: u32 = 1;

/// Refuses what `caller` may not do. An access ACL that would decide makes it the kernel's business.
pub fn check(
    stack: &dyn Libservice,
    caller: &Caller,
    node: NodeId,
    attr: &Attr,
    wanted: u32,
) -> Result<(), Failure> {
    if has_power(caller, attr, wanted) {
        return Ok(());
    }
    let shift = match class(caller, attr) {
        Class::Owner => 6,
        class => {
            // The group's bits are the ACL's mask where there is one; without any of them it grants nobody anything.
            if attr.mode & 0o070 != 0 && has_acl(stack, caller, node)? {
                return Err(Failure::Kernel);
            }
            if class == Class::Group { 3 } else { 0 }
        }
    };
    if attr.mode >> shift & wanted == wanted { Ok(()) } else { Err(denied()) }
}

/// The same where nobody can be asked for an ACL. None: that one might decide.
pub fn check_without_acl(caller: &Caller, attr: &Attr, wanted: u32, acls: bool) -> Option<bool> {
    if has_power(caller, attr, wanted) {
        return Some(true);
    }
    let shift = match class(caller, attr) {
        Class::Owner => 6,
        _ if acls && attr.mode & 0o070 != 0 => return None,
        Class::Group => 3,
        Class::Other => 0,
    };
    Some(attr.mode >> shift & wanted == wanted)
}

#[derive(PartialEq, Eq)]
enum Class {
    Owner,
    Group,
    Other,
}

fn class(caller: &Caller, attr: &Attr) -> Class {
    if caller.uid == attr.uid {
        Class::Owner
    } else if in_group(caller, attr.gid) {
        Class::Group
    } else {
        Class::Other
    }
}

pub fn in_group(caller: &Caller, gid: u32) -> bool {
    caller.gid == gid || caller.groups.contains(&gid)
}

pub fn has(caller: &Caller, capability: FsCapabilities) -> bool {
    caller.capabilities.contains(capability)
}

/// Whether a capability allows what the permission bits may not.
fn has_power(caller: &Caller, attr: &Attr, wanted: u32) -> bool {
    let override_all = has(caller, FsCapabilities::DAC_OVERRIDE);
    let search = has(caller, FsCapabilities::DAC_READ_SEARCH) && wanted & WRITE == 0;
    if attr.is_dir() {
        return override_all || search;
    }
    // Nobody executes what is executable for nobody.
    let executable = wanted & EXECUTE == 0 || attr.mode & 0o111 != 0;
    (override_all && executable) || (search && wanted & EXECUTE == 0)
}

fn has_acl(stack: &dyn Libservice, caller: &Caller, node: NodeId) -> Result<bool, Failure> {
    if !stack.capabilities().contains(Capabilities::POSIX_ACLS) {
        return Ok(false);
    }
    match stack.getxattr(caller, node, b"system.posix_acl_access") {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.errno(), Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The owner, or who may act as it.
pub fn is_owner(caller: &Caller, attr: &Attr) -> bool {
    caller.uid == attr.uid || has(caller, FsCapabilities::FOWNER)
}

/// Removing or renaming `victim` in a sticky directory takes being the owner of either.
pub fn check_sticky(caller: &Caller, directory: &Attr, victim: &Attr) -> Result<(), Failure> {
    let sticky = directory.mode & libc::S_ISVTX != 0;
    if !sticky
        || caller.uid == victim.uid
        || caller.uid == directory.uid
        || has(caller, FsCapabilities::FOWNER)
    {
        return Ok(());
    }
    Err(Error::new(Errno::PERM, "change a name in a sticky directory").into())
}

fn denied() -> Failure {
    Error::new(Errno::ACCESS, "use a file without permission").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use polytropo_libservices::Timestamp;

    struct NoAcls;
    impl Libservice for NoAcls {
        fn kind(&self) -> &'static str {
            "no-acls"
        }
    }

    fn attr(mode: u32, uid: u32, gid: u32) -> Attr {
        let time = Timestamp::default();
        Attr {
            ino: 1,
            mode,
            nlink: 1,
            uid,
            gid,
            rdev: 0,
            size_bytes: 0,
            blocks_512: 0,
            blksize_bytes: 4096,
            atime: time,
            mtime: time,
            ctime: time,
            btime: None,
        }
    }

    fn caller(uid: u32, capabilities: FsCapabilities) -> Caller {
        Caller { uid, gid: 100, groups: [200].into(), capabilities, ..Caller::service() }
    }

    fn may(caller: &Caller, attr: &Attr, wanted: u32) -> bool {
        check(&NoAcls, caller, NodeId::ROOT, attr, wanted).is_ok()
    }

    #[test]
    fn weighs_the_first_class_that_fits_only() {
        let nobody = caller(1000, FsCapabilities::empty());
        let file = |mode, uid, gid| attr(libc::S_IFREG | mode, uid, gid);
        assert!(may(&nobody, &file(0o600, 1000, 0), READ | WRITE));
        assert!(!may(&nobody, &file(0o077, 1000, 100), READ));
        assert!(may(&nobody, &file(0o040, 1, 100), READ));
        assert!(may(&nobody, &file(0o040, 1, 200), READ));
        assert!(!may(&nobody, &file(0o707, 1, 200), READ));
        assert!(may(&nobody, &file(0o004, 1, 300), READ));
        assert!(!may(&nobody, &file(0o004, 1, 300), READ | WRITE));
    }

    #[test]
    fn capabilities_go_as_far_as_the_kernels() {
        let root = caller(0, FsCapabilities::DAC_OVERRIDE);
        let searcher = caller(5, FsCapabilities::DAC_READ_SEARCH);
        let file = |mode| attr(libc::S_IFREG | mode, 1, 1);
        let directory = attr(libc::S_IFDIR, 1, 1);
        assert!(may(&root, &file(0), READ | WRITE) && !may(&root, &file(0), EXECUTE));
        assert!(may(&root, &file(0o001), EXECUTE) && may(&root, &directory, WRITE | EXECUTE));
        assert!(may(&searcher, &file(0), READ) && !may(&searcher, &file(0), WRITE));
        assert!(may(&searcher, &directory, READ | EXECUTE) && !may(&searcher, &directory, WRITE));
        assert!(!may(&caller(0, FsCapabilities::empty()), &file(0), READ));
    }

    #[test]
    fn sticky_directories_protect_names() {
        let tmp = attr(libc::S_IFDIR | 0o1777, 0, 0);
        let theirs = attr(libc::S_IFREG, 7, 7);
        let other = caller(8, FsCapabilities::empty());
        assert!(check_sticky(&other, &tmp, &theirs).is_err());
        assert!(check_sticky(&caller(7, FsCapabilities::empty()), &tmp, &theirs).is_ok());
        assert!(check_sticky(&caller(8, FsCapabilities::FOWNER), &tmp, &theirs).is_ok());
    }
}
