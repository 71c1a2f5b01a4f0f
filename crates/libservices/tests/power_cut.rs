//! A power cut: what fsync acknowledged is there afterwards.
//!
//! Stacks stand on an ext4 filesystem of their own. The cut is that filesystem's shutdown without a flush of its journal
//! (FS_IOC_SHUTDOWN, as xfstests use it): what was not written to the device by then is lost, and what was is
//! found by replaying the journal at the next mount. That proves that the right files of the host were made durable before
//! fsync returned. It does not show what a disk loses that lies about its own cache, nor filesystems that order
//! less than ext4. Each cut also loses bytes that nobody made durable: so it does cut.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use polytropo_libservices::dir::Dir;
use polytropo_libservices::owners::Owners;
use polytropo_libservices::stack::{DirCoherence, DirLayer, Ownership};
use polytropo_libservices::union::{BlockSizes, Union};
use polytropo_libservices::*;

const IMAGE_SIZE_BYTES: u64 = 64 << 20;
/// linux/fs.h: _IOR('X', 125, __u32); 2 is "without flushing the log".
const FS_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
const NO_LOG_FLUSH: u32 = 2;
const READ_WRITE: OpenFlags = OpenFlags::READ.union(OpenFlags::WRITE);

/// An ext4 filesystem in a file, mounted for this thread only.
struct Disk {
    temp: tempfile::TempDir,
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Disk {
    /// `None` where this cannot be tried.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can mount a filesystem to cut its power");
            return None;
        }
        // SAFETY: parts only this thread's view of mounts (and working directory) from that of the others.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        succeed(Command::new("mount").args(["--make-rprivate", "/"]));
        let disk = Self { temp: tempfile::tempdir().unwrap() };
        fs::create_dir(disk.root()).unwrap();
        fs::File::create(disk.image()).unwrap().set_len(IMAGE_SIZE_BYTES).unwrap();
        let at_once = "lazy_itable_init=0,lazy_journal_init=0";
        succeed(Command::new("mkfs.ext4").args(["-q", "-F", "-E", at_once]).arg(disk.image()));
        disk.mount();
        for name in ["lower", "upper"] {
            fs::create_dir(disk.root().join(name)).unwrap();
        }
        Some(disk)
    }

    fn image(&self) -> PathBuf {
        self.temp.path().join("image")
    }

    fn root(&self) -> PathBuf {
        self.temp.path().join("mnt")
    }

    fn mount(&self) {
        // The journal is committed when asked only.
        let options = "loop,commit=600";
        succeed(Command::new("mount").args(["-o", options]).arg(self.image()).arg(self.root()));
    }

    /// Everything on the disk by now stays.
    fn settle(&self) {
        rustix::fs::syncfs(fs::File::open(self.root()).unwrap()).unwrap();
    }

    /// Makes durable whatever ext4 commits along with the fsync of a file that has nothing to do with the stack.
    fn commit_journal(&self) {
        let file = fs::File::create(self.root().join("unrelated")).unwrap();
        file.sync_all().unwrap();
    }

    /// The stack must be dropped already: it keeps files open.
    fn cut(&self) {
        let lost = self.root().join("never durable");
        fs::write(&lost, vec![7; 50_000]).unwrap();
        self.cut_now();
        let left = fs::read(&lost).unwrap_or_default();
        assert!(!left.contains(&7), "what was not made durable is lost");
    }

    fn cut_now(&self) {
        let root = fs::File::open(self.root()).unwrap();
        // SAFETY: the call reads one u32.
        let done = unsafe { libc::ioctl(root.as_raw_fd(), FS_IOC_SHUTDOWN, &NO_LOG_FLUSH) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        drop(root);
        self.unmount();
        self.mount();
    }

    /// Programs that other tests are starting hold what is open here until they run.
    fn unmount(&self) {
        for _ in 0..100 {
            if Command::new("umount").arg("-q").arg(self.root()).status().unwrap().success() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        succeed(Command::new("umount").arg(self.root()));
    }

    fn dir(&self, name: &str, ownership: Ownership) -> Arc<dyn Libservice> {
        let path = self.root().join(name);
        let root = OwnedFd::from(fs::File::open(&path).unwrap());
        let config = DirLayer { path, read_only: false, coherence: DirCoherence::Exclusive, ownership };
        let dir = Arc::new(Dir::new(root, &config).unwrap());
        match ownership {
            Ownership::Native => dir,
            Ownership::Xattr => Arc::new(Owners::new(dir)),
        }
    }

    fn stack(&self, kind: Kind) -> Arc<dyn Libservice> {
        match kind {
            Kind::Dir(ownership) => self.dir("lower", ownership),
            Kind::Union(ownership) => {
                let (lower, upper) = (self.dir("lower", ownership), self.dir("upper", ownership));
                Arc::new(Union::new(vec![lower], Some(upper)).unwrap())
            }
            Kind::Blocks(ownership) => {
                let (lower, upper) = (self.dir("lower", ownership), self.dir("upper", ownership));
                let sizes = BlockSizes { block_bytes: 4096, whole_max_bytes: 0 };
                Arc::new(Union::with_sizes(vec![lower], Some(upper), sizes).unwrap())
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The loop device goes with the mount, at the latest with this thread's namespace.
        let _ = Command::new("umount").arg("-l").arg(self.root()).status();
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Dir(Ownership),
    Union(Ownership),
    /// A union that copies no file whole.
    Blocks(Ownership),
}

const KINDS: [Kind; 6] = [
    Kind::Dir(Ownership::Native),
    Kind::Dir(Ownership::Xattr),
    Kind::Union(Ownership::Native),
    Kind::Union(Ownership::Xattr),
    Kind::Blocks(Ownership::Native),
    Kind::Blocks(Ownership::Xattr),
];

fn caller() -> Caller {
    Caller::service()
}

fn name(text: &str) -> &Name {
    Name::new(text.as_bytes()).unwrap()
}

fn find(s: &dyn Libservice, path: &str) -> Result<Entry> {
    let mut steps = path.split('/').map(|step| Name::new(step.as_bytes()).unwrap());
    let first = s.lookup(&caller(), NodeId::ROOT, steps.next().unwrap())?;
    steps.try_fold(first, |at, step| s.lookup(&caller(), at.node, step))
}

fn content(s: &dyn Libservice, path: &str) -> Vec<u8> {
    let node = find(s, path).unwrap().node;
    let handle = s.open(&caller(), node, OpenFlags::READ).unwrap().handle;
    let mut buffer = vec![0; 1 << 20];
    let done = s.read(&caller(), node, handle, 0, &mut buffer).unwrap();
    s.release(node, handle);
    buffer.truncate(done);
    buffer
}

/// Makes a directory durable.
fn sync_dir(s: &dyn Libservice, node: NodeId) {
    let handle = s.opendir(&caller(), node).unwrap();
    s.fsyncdir(&caller(), node, handle, false).unwrap();
    s.releasedir(node, handle);
}

/// Runs `before` on a stack over `seed`ed directories, cuts the power, and holds what `after` finds.
fn cut_between(
    seed: impl Fn(&Path),
    before: impl Fn(&dyn Libservice, &Disk),
    after: impl Fn(&dyn Libservice, Kind),
) {
    let Some(disk) = Disk::new() else { return };
    for kind in KINDS {
        for name in ["lower", "upper"] {
            fs::remove_dir_all(disk.root().join(name)).unwrap();
            fs::create_dir(disk.root().join(name)).unwrap();
        }
        seed(&disk.root().join("lower"));
        disk.settle();
        let stack = disk.stack(kind);
        before(&*stack, &disk);
        drop(stack);
        disk.cut();
        let stack = disk.stack(kind);
        after(&*stack, kind);
    }
}

fn seed_file(lower: &Path) {
    fs::write(lower.join("f"), vec![b'.'; 100_000]).unwrap();
}

#[test]
fn a_new_file_is_there_after_fsync() {
    cut_between(
        |lower| fs::create_dir(lower.join("d")).unwrap(),
        |s, _| {
            let parent = find(s, "d").unwrap().node;
            let owner = Caller { uid: 7, gid: 8, ..caller() };
            let (entry, opened) = s.create(&owner, parent, name("new"), 0o640, READ_WRITE).unwrap();
            s.write(&caller(), entry.node, opened.handle, 0, &[b'x'; 70_000]).unwrap();
            s.setxattr(&caller(), entry.node, b"user.k", b"v", XattrFlags::empty()).unwrap();
            s.fsync(&caller(), entry.node, opened.handle, false).unwrap();
            s.release(entry.node, opened.handle);
        },
        |s, kind| {
            assert!(content(s, "d/new") == [b'x'; 70_000], "{kind:?}");
            let entry = find(s, "d/new").unwrap();
            assert_eq!((entry.attr.uid, entry.attr.gid, entry.attr.mode & 0o7777), (7, 8, 0o640), "{kind:?}");
            assert_eq!(s.getxattr(&caller(), entry.node, b"user.k").unwrap(), b"v", "{kind:?}");
        },
    );
}

#[test]
fn bytes_written_over_others_are_there_after_fdatasync() {
    cut_between(
        seed_file,
        |s, _| {
            let node = find(s, "f").unwrap().node;
            let handle = s.open(&caller(), node, READ_WRITE).unwrap().handle;
            s.write(&caller(), node, handle, 50_000, b"changed").unwrap();
            s.fsync(&caller(), node, handle, true).unwrap();
            s.release(node, handle);
        },
        |s, kind| {
            let found = content(s, "f");
            assert_eq!((found.len(), &found[50_000..50_007]), (100_000, &b"changed"[..]), "{kind:?}");
            let others = found[..50_000].iter().chain(&found[50_007..]);
            assert!(others.into_iter().all(|&b| b == b'.'), "{kind:?}");
        },
    );
}

/// A file that was opened to read before it was copied up.
#[test]
fn fsync_through_another_handle_counts_too() {
    cut_between(
        seed_file,
        |s, _| {
            let node = find(s, "f").unwrap().node;
            let reader = s.open(&caller(), node, OpenFlags::READ).unwrap().handle;
            let writer = s.open(&caller(), node, OpenFlags::WRITE | OpenFlags::APPEND).unwrap().handle;
            s.write(&caller(), node, writer, 0, b"more").unwrap();
            s.fsync(&caller(), node, reader, false).unwrap();
        },
        |s, kind| {
            let found = content(s, "f");
            assert_eq!((found.len(), &found[100_000..]), (100_004, &b"more"[..]), "{kind:?}");
        },
    );
}

/// Bytes that were durable in a lower layer are not lost because somebody began to change the file.
#[test]
fn a_change_that_was_never_made_durable_loses_nothing_old() {
    cut_between(
        seed_file,
        |s, disk| {
            let node = find(s, "f").unwrap().node;
            let handle = s.open(&caller(), node, OpenFlags::WRITE | OpenFlags::APPEND).unwrap().handle;
            s.write(&caller(), node, handle, 0, b"more").unwrap();
            s.setattr(&caller(), node, None, &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
            s.release(node, handle);
            disk.commit_journal();
        },
        |s, kind| {
            let found = content(s, "f");
            assert!(found.len() >= 100_000, "{kind:?}: {} bytes left", found.len());
            assert!(found[..100_000].iter().all(|&b| b == b'.'), "{kind:?}: old bytes are lost");
        },
    );
}

#[test]
fn names_are_as_they_were_when_their_directory_was_made_durable() {
    cut_between(
        |lower| {
            seed_file(lower);
            fs::write(lower.join("gone"), b"").unwrap();
            fs::create_dir(lower.join("d")).unwrap();
            fs::write(lower.join("d/inside"), b"kept").unwrap();
        },
        |s, _| {
            let c = caller();
            let root = NodeId::ROOT;
            let none = RenameFlags::empty();
            s.unlink(&c, root, name("gone")).unwrap();
            s.mkdir(&c, root, name("made"), 0o700).unwrap();
            s.rename(&c, root, name("f"), root, name("moved"), none).unwrap();
            s.rename(&c, root, name("d"), root, name("e"), none).unwrap();
            s.symlink(&c, root, name("l"), b"target").unwrap();
            sync_dir(s, root);
        },
        |s, kind| {
            for absent in ["gone", "f", "d"] {
                assert!(find(s, absent).is_err_and(|e| e.is(Errno::NOENT)), "{kind:?}: {absent} came back");
            }
            assert_eq!(find(s, "made").unwrap().attr.mode & 0o7777, 0o700, "{kind:?}");
            assert_eq!(content(s, "moved").len(), 100_000, "{kind:?}");
            assert_eq!(content(s, "e/inside"), b"kept", "{kind:?}");
            let link = find(s, "l").unwrap().node;
            assert_eq!(s.readlink(&caller(), link).unwrap(), b"target", "{kind:?}");
        },
    );
}

/// What programs do to replace a file safely.
#[test]
fn write_sync_rename_sync_leaves_the_new_file() {
    cut_between(
        seed_file,
        |s, _| {
            let c = caller();
            let (entry, opened) = s.create(&c, NodeId::ROOT, name("f.new"), 0o644, READ_WRITE).unwrap();
            s.write(&c, entry.node, opened.handle, 0, &[b'n'; 30_000]).unwrap();
            s.fsync(&c, entry.node, opened.handle, false).unwrap();
            s.release(entry.node, opened.handle);
            let none = RenameFlags::empty();
            s.rename(&c, NodeId::ROOT, name("f.new"), NodeId::ROOT, name("f"), none).unwrap();
            sync_dir(s, NodeId::ROOT);
        },
        |s, kind| {
            assert!(content(s, "f") == [b'n'; 30_000], "{kind:?}");
            assert!(find(s, "f.new").is_err(), "{kind:?}");
        },
    );
}

/// Every block is the old one or the new one, whatever the journal had of them, and those made durable are the new ones.
#[test]
fn blocks_are_old_or_new() {
    const BLOCKS: usize = 24;
    let block = |n: usize| 4096 * n as u64;
    cut_between(
        seed_file,
        |s, disk| {
            let node = find(s, "f").unwrap().node;
            let handle = s.open(&caller(), node, READ_WRITE).unwrap().handle;
            for n in 0..BLOCKS {
                let (offset, data_only) = (block(n) + 1000, n % 2 == 0);
                s.write(&caller(), node, handle, offset, b"changed").unwrap();
                match n % 6 {
                    4 | 5 => s.fsync(&caller(), node, handle, data_only).unwrap(),
                    2 => disk.commit_journal(),
                    _ => {}
                }
            }
            // Durable, but for what comes now.
            s.fsync(&caller(), node, handle, true).unwrap();
            let punch = FallocateMode::PUNCH_HOLE | FallocateMode::KEEP_SIZE;
            s.fallocate(&caller(), node, handle, punch, 98_500, 500).unwrap();
            s.write(&caller(), node, handle, 20_000, &[b'!'; 300]).unwrap();
            disk.commit_journal();
            s.release(node, handle);
        },
        |s, kind| {
            let found = content(s, "f");
            assert_eq!(found.len(), 100_000, "{kind:?}");
            for (at, &byte) in found.iter().enumerate() {
                let written = at < BLOCKS * 4096 && (1000..1007).contains(&(at % 4096));
                let late = (20_000..20_300).contains(&at) && byte == b'!';
                let punched = (98_500..99_000).contains(&at) && byte == 0;
                let expected = if written { b"changed"[at % 4096 - 1000] } else { b'.' };
                assert!(byte == expected || late || punched, "{kind:?}: {byte} at {at}");
            }
        },
    );
}

/// Nothing is made durable: blocks that the journal happens to know of are whole.
#[test]
fn blocks_that_were_never_made_durable_are_not_zeros() {
    cut_between(
        seed_file,
        |s, disk| {
            let node = find(s, "f").unwrap().node;
            s.setattr(&caller(), node, None, &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
            let handle = s.open(&caller(), node, READ_WRITE).unwrap().handle;
            for at in [10_000, 30_000, 32_768, 99_999] {
                s.write(&caller(), node, handle, at, b"n").unwrap();
                disk.commit_journal();
            }
            s.write(&caller(), node, handle, 60_000, &[b'n'; 20_000]).unwrap();
            disk.commit_journal();
            s.release(node, handle);
        },
        |s, kind| {
            let found = content(s, "f");
            assert_eq!(found.len(), 100_000, "{kind:?}");
            assert!(found.iter().all(|&b| b == b'.' || b == b'n'), "{kind:?}: zeros");
        },
    );
}
