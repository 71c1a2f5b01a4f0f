//! `fault`: errors, delays and short results on demand, for tests of what stands above.
//!
//! An error is answered in place of the operation: below, nothing happens.

mod errnos;
mod rules;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::capabilities::Capabilities;
use crate::error::Result;
use crate::libservice::Libservice;
use crate::name::Name;
use crate::stack::FaultLayer;
use crate::types::*;

use rules::Rules;

pub use errnos::{ERRNOS, by_name as errno_by_name};
pub use rules::ANY;

/// A layer that fails as its rules say.
pub struct Fault {
    below: Arc<dyn Libservice>,
    rules: Rules,
}

impl Fault {
    pub fn new(below: Arc<dyn Libservice>, config: &FaultLayer) -> Result<Self> {
        Ok(Self { below, rules: Rules::new(&config.rules, config.seed)? })
    }
}

/// Declares the operations that only pass or fail; `read`, `write` and `copy_range` are written out.
macro_rules! operations {
    ($($name:ident($($argument:ident: $type:ty),*) -> $output:ty;)*) => {
        /// The operations that a rule may name. Those that cannot fail (`forget`, `release`, `releasedir`) are not
        /// among them.
        pub const OPERATIONS: &[&str] = &["read", "write", "copy_range", $(stringify!($name)),*];

        #[allow(non_camel_case_types)]
        enum Operation { read, write, copy_range, $($name),* }

        impl Libservice for Fault {
            fn below(&self) -> Option<&dyn Libservice> {
                Some(&*self.below)
            }

            fn kind(&self) -> &'static str {
                "fault"
            }

            /// Rules are for `open` and `flush` too, so these have to reach this layer.
            fn capabilities(&self) -> Capabilities {
                self.below.capabilities() - Capabilities::STATELESS_OPEN
            }

            fn read(
                &self,
                caller: &Caller,
                node: NodeId,
                handle: HandleId,
                offset: u64,
                buffer: &mut [u8],
            ) -> Result<usize> {
                let length = self.at_most(Operation::read, buffer.len())?;
                self.below.read(caller, node, handle, offset, &mut buffer[..length])
            }

            fn write(
                &self,
                caller: &Caller,
                node: NodeId,
                handle: HandleId,
                offset: u64,
                data: &[u8],
            ) -> Result<usize> {
                let length = self.at_most(Operation::write, data.len())?;
                self.below.write(caller, node, handle, offset, &data[..length])
            }

            fn copy_range(
                &self,
                caller: &Caller,
                from: (NodeId, HandleId, u64),
                to: (NodeId, HandleId, u64),
                length: u64,
            ) -> Result<u64> {
                let most = self.rules.strike(Operation::copy_range as usize)?;
                self.below.copy_range(caller, from, to, length.min(most))
            }

            /// None: who reads the host's file goes past the rules.
            fn host_file(&self, _handle: HandleId) -> Option<Arc<OwnedFd>> {
                None
            }

            /// None, for the same reason.
            fn immutable_file(&self, _handle: HandleId) -> Option<Arc<OwnedFd>> {
                None
            }

            $(fn $name(&self, $($argument: $type),*) -> Result<$output> {
                self.rules.strike(Operation::$name as usize)?;
                self.below.$name($($argument),*)
            })*
        }
    };
}

operations! {
    lookup(caller: &Caller, parent: NodeId, name: &Name) -> Entry;
    look_up_again(caller: &Caller, node: NodeId) -> Entry;
    getattr(caller: &Caller, node: NodeId, handle: Option<HandleId>) -> Attr;
    setattr(caller: &Caller, node: NodeId, handle: Option<HandleId>, changes: &SetAttr) -> Attr;
    readlink(caller: &Caller, node: NodeId) -> Vec<u8>;
    mknod(caller: &Caller, parent: NodeId, name: &Name, mode: u32, rdev: u64) -> Entry;
    mkdir(caller: &Caller, parent: NodeId, name: &Name, mode: u32) -> Entry;
    symlink(caller: &Caller, parent: NodeId, name: &Name, target: &[u8]) -> Entry;
    link(caller: &Caller, node: NodeId, new_parent: NodeId, new_name: &Name) -> Entry;
    unlink(caller: &Caller, parent: NodeId, name: &Name) -> ();
    rmdir(caller: &Caller, parent: NodeId, name: &Name) -> ();
    rename(caller: &Caller, parent: NodeId, name: &Name, new_parent: NodeId, new_name: &Name, flags: RenameFlags) -> ();
    open(caller: &Caller, node: NodeId, flags: OpenFlags) -> Opened;
    create(caller: &Caller, parent: NodeId, name: &Name, mode: u32, flags: OpenFlags) -> (Entry, Opened);
    tmpfile(caller: &Caller, parent: NodeId, mode: u32, flags: OpenFlags) -> (Entry, Opened);
    flush(caller: &Caller, node: NodeId, handle: HandleId) -> ();
    fsync(caller: &Caller, node: NodeId, handle: HandleId, data_only: bool) -> ();
    opendir(caller: &Caller, node: NodeId) -> HandleId;
    readdir(caller: &Caller, node: NodeId, handle: HandleId, offset: u64, sink: &mut DirSink<'_>) -> ();
    readdir_plus(caller: &Caller, node: NodeId, handle: HandleId, offset: u64, sink: &mut DirPlusSink<'_>) -> ();
    fsyncdir(caller: &Caller, node: NodeId, handle: HandleId, data_only: bool) -> ();
    statfs(caller: &Caller, node: NodeId) -> StatFs;
    getxattr(caller: &Caller, node: NodeId, name: &[u8]) -> Vec<u8>;
    listxattr(caller: &Caller, node: NodeId) -> Vec<u8>;
    setxattr(caller: &Caller, node: NodeId, name: &[u8], value: &[u8], flags: XattrFlags) -> ();
    removexattr(caller: &Caller, node: NodeId, name: &[u8]) -> ();
    fallocate(caller: &Caller, node: NodeId, handle: HandleId, mode: FallocateMode, offset: u64, length: u64) -> ();
    seek(caller: &Caller, node: NodeId, handle: HandleId, offset: u64, to: SeekTo) -> u64;
}

impl Fault {
    fn at_most(&self, operation: Operation, length: usize) -> Result<usize> {
        let most = self.rules.strike(operation as usize)?;
        Ok(length.min(usize::try_from(most).unwrap_or(usize::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dir::Dir;
    use crate::error::Errno;
    use crate::stack::{Layer, StackDocument};
    use crate::types::OpenFlags;

    fn stack(rules: &str) -> (tempfile::TempDir, Fault) {
        let temp = tempfile::tempdir().unwrap();
        let json = format!(
            r#"{{"version":1,"root":{{"kind":"fault","below":{{"kind":"dir","path":"/"}},"rules":[{rules}],"seed":7}}}}"#
        );
        let Layer::Fault(config) = StackDocument::parse(&json).unwrap().root else { unreachable!() };
        let Layer::Dir(dir) = &*config.below else { unreachable!() };
        let root = OwnedFd::from(std::fs::File::open(temp.path()).unwrap());
        let fault = Fault::new(Arc::new(Dir::new(root, dir).unwrap()), &config).unwrap();
        (temp, fault)
    }

    fn statfs(fault: &Fault) -> Option<Errno> {
        fault.statfs(&Caller::service(), NodeId::ROOT).err().map(|e| e.errno())
    }

    #[test]
    fn calls_are_counted() {
        let (_temp, fault) = stack(r#"{"operation":"statfs","after":2,"times":3,"errno":"ENOSPC"}"#);
        let outcomes: Vec<_> = (0..8).map(|_| statfs(&fault)).collect();
        let hit = Some(Errno::NOSPC);
        assert_eq!(outcomes, [None, None, hit, hit, hit, None, None, None]);
        fault.getattr(&Caller::service(), NodeId::ROOT, None).unwrap();
    }

    #[test]
    fn any_operation_and_nothing_happens_below() {
        let (temp, fault) = stack(r#"{"operation":"*","errno":"EIO"}"#);
        let name = Name::new(b"d").unwrap();
        assert!(fault.mkdir(&Caller::service(), NodeId::ROOT, name, 0o755).unwrap_err().is(Errno::IO));
        assert_eq!(statfs(&fault), Some(Errno::IO));
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn dice_fall_the_same_for_the_same_seed() {
        let rule = r#"{"operation":"statfs","probability":0.3,"errno":"EIO"}"#;
        let outcomes = || {
            let (_temp, fault) = stack(rule);
            (0..1000).map(|_| statfs(&fault).is_some()).collect::<Vec<_>>()
        };
        let first = outcomes();
        assert_eq!(first, outcomes());
        let hits = first.iter().filter(|&&hit| hit).count();
        assert!((200..400).contains(&hits), "{hits}");
    }

    #[test]
    fn results_are_short() {
        let (_temp, fault) = stack(
            r#"{"operation":"write","times":1,"short_bytes":3},{"operation":"read","after":1,"short_bytes":2}"#,
        );
        let (c, name) = (Caller::service(), Name::new(b"f").unwrap());
        let flags = OpenFlags::READ | OpenFlags::WRITE;
        let (entry, opened) = fault.create(&c, NodeId::ROOT, name, 0o644, flags).unwrap();
        assert_eq!(fault.write(&c, entry.node, opened.handle, 0, b"abcdef").unwrap(), 3);
        assert_eq!(fault.write(&c, entry.node, opened.handle, 3, b"def").unwrap(), 3);
        let mut buffer = [0; 10];
        assert_eq!(fault.read(&c, entry.node, opened.handle, 0, &mut buffer).unwrap(), 6);
        assert_eq!(fault.read(&c, entry.node, opened.handle, 0, &mut buffer).unwrap(), 2);
    }

    #[test]
    fn delays_wait() {
        let (_temp, fault) = stack(r#"{"operation":"statfs","times":1,"delay_ms":30}"#);
        let before = std::time::Instant::now();
        assert_eq!(statfs(&fault), None);
        assert!(before.elapsed() >= std::time::Duration::from_millis(30));
    }

    /// Or the kernel would read it past the rules.
    #[test]
    fn no_file_is_given_out() {
        let (temp, _) = stack("");
        std::fs::write(temp.path().join("f"), "x").unwrap();
        let json =
            r#"{"version":1,"root":{"kind":"dir","path":"/","read_only":true,"coherence":"immutable"}}"#;
        let Layer::Dir(dir) = StackDocument::parse(json).unwrap().root else { unreachable!() };
        let below = Arc::new(Dir::new(std::fs::File::open(temp.path()).unwrap().into(), &dir).unwrap());
        let config = FaultLayer { below: Box::new(Layer::Dir(dir)), rules: vec![], seed: 0 };
        let fault = Fault::new(below.clone(), &config).unwrap();
        let given = |service: &dyn Libservice| {
            let caller = Caller::service();
            let entry = service.lookup(&caller, NodeId::ROOT, Name::new(b"f").unwrap()).unwrap();
            let opened = service.open(&caller, entry.node, OpenFlags::READ).unwrap();
            service.immutable_file(opened.handle).is_some()
        };
        assert!(given(&*below) && !given(&fault));
    }

    #[test]
    fn wrong_rules_are_refused_by_place() {
        let refused = |rule: &str| {
            let json = format!(
                r#"{{"version":1,"root":{{"kind":"fault","below":{{"kind":"dir","path":"/"}},"rules":[{rule}]}}}}"#
            );
            StackDocument::parse(&json).unwrap_err().to_string()
        };
        let told = refused(r#"{"operation":"read","errno":"EIO"},{"operation":"red","errno":"EIO"}"#);
        assert!(told.contains("root.rules[1].operation: \"red\" is no operation"), "{told}");
        let told = refused(r#"{"operation":"read","errno":"EWHAT"}"#);
        assert!(told.contains("root.rules[0].errno: \"EWHAT\" is no error"), "{told}");
        assert!(errno_by_name("ENOTSUP").is_some_and(|errno| errno == Errno::OPNOTSUPP));
    }
}
