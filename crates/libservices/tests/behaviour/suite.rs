//! What a check is, how checks are run, and the short words that they are written in.

use std::any::Any;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use polytropo_libservices::*;

pub const READ_WRITE: OpenFlags = OpenFlags::READ.union(OpenFlags::WRITE);
pub const ROOT: NodeId = NodeId::ROOT;

/// One property of a libservice.
pub struct Check {
    pub name: &'static str,
    /// What a stack must declare to be held to it.
    pub needs: Capabilities,
    pub run: fn(&Stack),
}

/// `check!(function)` or `check!(function, CAPABILITY | CAPABILITY)`.
macro_rules! check {
    ($function:ident) => {
        check!($function, WRITE)
    };
    ($function:ident, $($capability:ident)|+) => {
        $crate::suite::Check {
            name: concat!(module_path!(), "::", stringify!($function)),
            needs: polytropo_libservices::Capabilities::empty()
                $(.union(polytropo_libservices::Capabilities::$capability))+,
            run: $function,
        }
    };
}
pub(crate) use check;

/// A fresh stack to run one check on.
pub struct Stack {
    pub service: Arc<dyn Libservice>,
    /// A directory of the host: what is put there before it is first looked for, shows in the stack's root (in a union,
    /// the lowest layer).
    pub seed: PathBuf,
    _keep: Box<dyn Any>,
}

/// Holds the stacks that `make` makes to every check that they declare to pass.
pub fn run(make: impl Fn() -> Stack) {
    let checks = [
        crate::names::CHECKS,
        crate::files::CHECKS,
        crate::attributes::CHECKS,
        crate::links::CHECKS,
        crate::listing::CHECKS,
        crate::xattrs::CHECKS,
    ];
    let mut failed = Vec::new();
    for check in checks.into_iter().flatten() {
        let stack = make();
        let missing = check.needs - stack.service.capabilities();
        if !missing.is_empty() {
            println!("skipped {}: the stack does not declare {missing:?}", check.name);
        } else if catch_unwind(AssertUnwindSafe(|| (check.run)(&stack))).is_err() {
            failed.push(check.name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:#?}");
}

pub fn name(text: &str) -> &Name {
    Name::new(text.as_bytes()).unwrap()
}

/// The errno of a result that must be an error.
#[track_caller]
pub fn errno<T>(result: Result<T>) -> Errno {
    match result {
        Ok(_) => panic!("succeeded, and must fail"),
        Err(e) => e.errno(),
    }
}

/// An ordinary user.
pub fn user(uid: u32, gid: u32) -> Caller {
    Caller { uid, gid, capabilities: FsCapabilities::empty(), ..Caller::service() }
}

impl Stack {
    pub fn new(service: Arc<dyn Libservice>, seed: PathBuf, keep: impl Any) -> Self {
        Self { service, seed, _keep: Box::new(keep) }
    }

    /// Root, or this process's user where the stack cannot keep other owners.
    pub fn caller(&self) -> Caller {
        let mut caller = Caller::service();
        if !self.service.capabilities().contains(Capabilities::OWNERS) {
            caller.uid = rustix::process::geteuid().as_raw();
            caller.gid = rustix::process::getegid().as_raw();
        }
        caller
    }

    /// Puts a file under the stack, mode 0644, before the stack knows of it.
    pub fn seed_file(&self, path: &str, bytes: &[u8]) {
        let path = self.seed.join(path);
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
    }

    pub fn seed_dir(&self, path: &str) {
        let path = self.seed.join(path);
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    pub fn look(&self, parent: NodeId, text: &str) -> Result<Entry> {
        self.service.lookup(&self.caller(), parent, name(text))
    }

    /// The node of a path that is there.
    #[track_caller]
    pub fn node(&self, path: &str) -> NodeId {
        path.split('/').fold(ROOT, |at, step| match self.look(at, step) {
            Ok(entry) => entry.node,
            Err(e) => panic!("look up {step} of {path}: {e}"),
        })
    }

    #[track_caller]
    pub fn attr(&self, node: NodeId) -> Attr {
        self.service.getattr(&self.caller(), node, None).unwrap()
    }

    #[track_caller]
    pub fn mkdir(&self, parent: NodeId, text: &str) -> NodeId {
        self.service.mkdir(&self.caller(), parent, name(text), 0o755).unwrap().node
    }

    /// A new file, closed again.
    #[track_caller]
    pub fn file(&self, parent: NodeId, text: &str, bytes: &[u8]) -> NodeId {
        let (node, handle) = self.create(parent, text);
        self.write(node, handle, 0, bytes);
        self.service.release(node, handle);
        node
    }

    /// A new file, open for reading and writing.
    #[track_caller]
    pub fn create(&self, parent: NodeId, text: &str) -> (NodeId, HandleId) {
        let flags = READ_WRITE | OpenFlags::EXCLUSIVE;
        let (entry, opened) = self.service.create(&self.caller(), parent, name(text), 0o644, flags).unwrap();
        (entry.node, opened.handle)
    }

    #[track_caller]
    pub fn open(&self, node: NodeId, flags: OpenFlags) -> HandleId {
        self.service.open(&self.caller(), node, flags).unwrap().handle
    }

    #[track_caller]
    pub fn write(&self, node: NodeId, handle: HandleId, offset: u64, bytes: &[u8]) {
        let done = self.service.write(&self.caller(), node, handle, offset, bytes).unwrap();
        assert_eq!(done, bytes.len());
    }

    #[track_caller]
    pub fn read(&self, node: NodeId, handle: HandleId, offset: u64, length: usize) -> Vec<u8> {
        let mut buffer = vec![0xee; length];
        let done = self.service.read(&self.caller(), node, handle, offset, &mut buffer).unwrap();
        buffer.truncate(done);
        buffer
    }

    /// Everything in a file, by an open file of its own.
    #[track_caller]
    pub fn content(&self, node: NodeId) -> Vec<u8> {
        let handle = self.open(node, OpenFlags::READ);
        let bytes = self.read(node, handle, 0, 1 << 20);
        self.service.release(node, handle);
        bytes
    }

    #[track_caller]
    pub fn set(&self, node: NodeId, changes: SetAttr) -> Attr {
        self.service.setattr(&self.caller(), node, None, &changes).unwrap()
    }

    pub fn unlink(&self, parent: NodeId, text: &str) -> Result<()> {
        self.service.unlink(&self.caller(), parent, name(text))
    }

    pub fn rename(&self, from: (NodeId, &str), to: (NodeId, &str), flags: RenameFlags) -> Result<()> {
        self.service.rename(&self.caller(), from.0, name(from.1), to.0, name(to.1), flags)
    }

    /// The names in a directory, sorted, by a listing of its own that takes `step` entries a call.
    #[track_caller]
    pub fn names_by(&self, node: NodeId, step: usize) -> Vec<String> {
        let handle = self.service.opendir(&self.caller(), node).unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let before = names.len();
            let from = offset;
            let mut sink = |entry: DirEntry<'_>| {
                let room = names.len() - before < step;
                if room {
                    assert_ne!(entry.next_offset, 0);
                    offset = entry.next_offset;
                    names.push(String::from_utf8_lossy(entry.name.as_bytes()).into_owned());
                }
                room
            };
            self.service.readdir(&self.caller(), node, handle, from, &mut sink).unwrap();
            if names.len() == before {
                break;
            }
        }
        self.service.releasedir(node, handle);
        names.sort();
        names
    }

    #[track_caller]
    pub fn names(&self, node: NodeId) -> Vec<String> {
        self.names_by(node, usize::MAX)
    }
}
