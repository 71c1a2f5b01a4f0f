//! Unions of directories of the host, looked at by path and from below.

mod basics;
mod blocks;
mod concurrent;
mod copying;
mod counting;
mod interrupted;
mod model;
mod watching;

use std::collections::BTreeMap;
use std::fs as host;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::dir::Dir;
use crate::stack::{DirCoherence, DirLayer, Ownership};

/// A union of `lowers` layers and an upper, in a temporary directory.
pub struct Rig {
    pub temp: tempfile::TempDir,
    pub lower_count: usize,
    pub coherence: DirCoherence,
    pub sizes: BlockSizes,
}

pub fn name(text: &str) -> &Name {
    Name::new(text.as_bytes()).unwrap()
}

pub fn dir_layer(path: &Path, read_only: bool, coherence: DirCoherence) -> Arc<dyn Libservice> {
    let root = OwnedFd::from(host::File::open(path).unwrap());
    let config = DirLayer { path: "/".into(), read_only, coherence, ownership: Ownership::Native };
    Arc::new(Dir::new(root, &config).unwrap())
}

/// Blocks so small that every file has some, and none is copied whole.
pub const TINY: BlockSizes = BlockSizes { block_bytes: 4, whole_max_bytes: 0 };

/// A temporary directory, in memory where that can hold attributes: many small unions sync many small copies.
pub fn quick_tempdir() -> tempfile::TempDir {
    let Ok(temp) = tempfile::tempdir_in("/dev/shm") else { return tempfile::tempdir().unwrap() };
    let none = rustix::fs::XattrFlags::empty();
    match rustix::fs::setxattr(temp.path(), "user.test", b"y", none) {
        Ok(()) => temp,
        Err(_) => tempfile::tempdir().unwrap(),
    }
}

impl Rig {
    pub fn new(lower_count: usize) -> Self {
        Self::at(tempfile::tempdir().unwrap(), lower_count)
    }

    pub fn quick(lower_count: usize) -> Self {
        Self::at(quick_tempdir(), lower_count)
    }

    fn at(temp: tempfile::TempDir, lower_count: usize) -> Self {
        for i in 0..lower_count {
            host::create_dir(temp.path().join(format!("lower{i}"))).unwrap();
        }
        host::create_dir(temp.path().join("upper")).unwrap();
        Self { temp, lower_count, coherence: DirCoherence::Immutable, sizes: BlockSizes::default() }
    }

    pub fn with_sizes(mut self, sizes: BlockSizes) -> Self {
        self.sizes = sizes;
        self
    }

    /// A path in a lower; 0 is the topmost.
    pub fn lower(&self, i: usize, path: &str) -> PathBuf {
        self.temp.path().join(format!("lower{i}")).join(path)
    }

    pub fn upper(&self, path: &str) -> PathBuf {
        self.temp.path().join("upper").join(path)
    }

    /// Makes a file (and what lies above it) in a lower.
    pub fn put(&self, i: usize, path: &str, bytes: &str) {
        let path = self.lower(i, path);
        host::create_dir_all(path.parent().unwrap()).unwrap();
        host::write(path, bytes).unwrap();
    }

    pub fn lowers(&self) -> Vec<Arc<dyn Libservice>> {
        (0..self.lower_count).map(|i| dir_layer(&self.lower(i, ""), true, self.coherence)).collect()
    }

    /// Of the upper, which is written.
    pub fn upper_coherence(&self) -> DirCoherence {
        if self.coherence == DirCoherence::Shared { DirCoherence::Shared } else { DirCoherence::Exclusive }
    }

    pub fn union(&self) -> View {
        let upper = dir_layer(&self.upper(""), false, self.upper_coherence());
        View::of_union(Union::with_sizes(self.lowers(), Some(upper), self.sizes).unwrap())
    }

    pub fn read_only(&self) -> View {
        View::of_union(Union::new(self.lowers(), None).unwrap())
    }
}

/// A libservice by paths. What is looked up is forgotten at once.
pub struct View {
    pub union: Arc<dyn Libservice>,
    pub caller: Caller,
    nodes: Option<Arc<Nodes>>,
}

impl View {
    pub fn new(service: Arc<dyn Libservice>) -> Self {
        Self { union: service, caller: Caller::service(), nodes: None }
    }

    pub fn of_union(union: Union) -> Self {
        let nodes = Some(union.nodes.clone());
        Self { nodes, ..Self::new(Arc::new(union)) }
    }

    /// Looks `path` up and runs `then` while the look-up is held.
    pub fn at<T>(&self, path: &str, then: impl FnOnce(&Entry) -> Result<T>) -> Result<T> {
        let root = Entry {
            node: NodeId::ROOT,
            generation: 0,
            attr: self.union.getattr(&self.caller, NodeId::ROOT, None).unwrap(),
        };
        let mut held = vec![root];
        let walk = || {
            for part in path.split('/').filter(|part| !part.is_empty()) {
                let parent = held.last().unwrap().node;
                held.push(self.union.lookup(&self.caller, parent, name(part))?);
            }
            then(held.last().unwrap())
        };
        let done = walk();
        for entry in held.iter().rev().filter(|entry| entry.node != NodeId::ROOT) {
            self.union.forget(entry.node, 1);
        }
        done
    }

    pub fn in_parent<T>(&self, path: &str, then: impl FnOnce(NodeId, &Name) -> Result<T>) -> Result<T> {
        let (parent, last) = path.rsplit_once('/').unwrap_or(("", path));
        self.at(parent, |entry| {
            // As a kernel above would: the layers need not find that first.
            let is_dir = entry.attr.is_dir();
            if is_dir { then(entry.node, name(last)) } else { Err(Error::new(Errno::NOTDIR, "walk a path")) }
        })
    }

    fn given(&self, entry: Entry) -> Attr {
        self.union.forget(entry.node, 1);
        entry.attr
    }

    pub fn attr(&self, path: &str) -> Result<Attr> {
        self.at(path, |entry| {
            let attr = self.union.getattr(&self.caller, entry.node, None)?;
            assert_eq!(attr.ino, entry.attr.ino);
            Ok(attr)
        })
    }

    pub fn open(&self, path: &str, flags: OpenFlags) -> Result<HandleId> {
        self.at(path, |entry| Ok(self.union.open(&self.caller, entry.node, flags)?.handle))
    }

    pub fn close(&self, handle: HandleId) {
        self.union.release(NodeId::ROOT, handle);
    }

    pub fn read_handle(&self, handle: HandleId) -> String {
        let mut buffer = vec![0; 1 << 16];
        let count = self.union.read(&self.caller, NodeId::ROOT, handle, 0, &mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    }

    pub fn read(&self, path: &str) -> Result<String> {
        let handle = self.open(path, OpenFlags::READ)?;
        let text = self.read_handle(handle);
        self.close(handle);
        Ok(text)
    }

    /// Writes a file anew, as a shell's `>` does.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let flags = OpenFlags::WRITE | OpenFlags::TRUNCATE;
        let (entry, opened) = self.in_parent(path, |parent, last| {
            self.union.create(&self.caller, parent, last, libc::S_IFREG | 0o644, flags)
        })?;
        let done = self.union.write(&self.caller, entry.node, opened.handle, 0, text.as_bytes());
        self.close(opened.handle);
        self.given(entry);
        assert_eq!(done?, text.len());
        Ok(())
    }

    pub fn append(&self, path: &str, text: &str) -> Result<()> {
        let handle = self.open(path, OpenFlags::WRITE | OpenFlags::APPEND)?;
        let done = self.union.write(&self.caller, NodeId::ROOT, handle, 0, text.as_bytes());
        self.close(handle);
        done.map(drop)
    }

    pub fn mkdir(&self, path: &str) -> Result<Attr> {
        self.in_parent(path, |parent, last| self.union.mkdir(&self.caller, parent, last, 0o755))
            .map(|entry| self.given(entry))
    }

    pub fn symlink(&self, path: &str, target: &str) -> Result<Attr> {
        self.in_parent(path, |parent, last| self.union.symlink(&self.caller, parent, last, target.as_bytes()))
            .map(|entry| self.given(entry))
    }

    pub fn link(&self, path: &str, new: &str) -> Result<Attr> {
        self.at(path, |entry| {
            self.in_parent(new, |parent, last| self.union.link(&self.caller, entry.node, parent, last))
        })
        .map(|entry| self.given(entry))
    }

    pub fn unlink(&self, path: &str) -> Result<()> {
        self.in_parent(path, |parent, last| self.union.unlink(&self.caller, parent, last))
    }

    pub fn rmdir(&self, path: &str) -> Result<()> {
        self.in_parent(path, |parent, last| self.union.rmdir(&self.caller, parent, last))
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.rename_with(from, to, RenameFlags::empty())
    }

    pub fn rename_with(&self, from: &str, to: &str, flags: RenameFlags) -> Result<()> {
        self.in_parent(from, |old_parent, old| {
            self.in_parent(to, |new_parent, new| {
                self.union.rename(&self.caller, old_parent, old, new_parent, new, flags)
            })
        })
    }

    pub fn setattr(&self, path: &str, changes: &SetAttr) -> Result<Attr> {
        self.at(path, |entry| self.union.setattr(&self.caller, entry.node, None, changes))
    }

    /// Name and inode number of what a directory lists; checked against what look-ups say.
    pub fn list(&self, path: &str) -> Result<Vec<String>> {
        let entries = self.at(path, |entry| {
            let handle = self.union.opendir(&self.caller, entry.node)?;
            let mut entries = Vec::new();
            self.union.readdir(&self.caller, entry.node, handle, 0, &mut |line| {
                entries.push((String::from_utf8_lossy(line.name.as_bytes()).into_owned(), line.ino));
                true
            })?;
            self.union.releasedir(entry.node, handle);
            Ok(entries)
        })?;
        let mut names = Vec::new();
        for (listed, ino) in entries {
            assert_eq!(self.attr(&format!("{path}/{listed}"))?.ino, ino, "d_ino of {path}/{listed}");
            names.push(listed);
        }
        names.sort();
        Ok(names)
    }

    /// Every path with its attributes, a directory before what it holds.
    pub fn attrs(&self) -> Vec<(String, Attr)> {
        let mut found = Vec::new();
        let mut next = vec![String::new()];
        while let Some(parent) = next.pop() {
            for child in self.list(&parent).unwrap() {
                let path = if parent.is_empty() { child } else { format!("{parent}/{child}") };
                let attr = self.attr(&path).unwrap();
                if attr.is_dir() {
                    next.push(path.clone());
                }
                found.push((path, attr));
            }
        }
        found
    }

    /// Everything that has to be equal, hard links by the first of their names.
    pub fn state(&self, with_nlink: bool) -> Vec<String> {
        let mut first: BTreeMap<u64, String> = BTreeMap::new();
        let mut lines = Vec::new();
        for (path, attr) in self.attrs() {
            let leader = first.entry(attr.ino).or_insert_with(|| path.clone()).clone();
            let bytes = match attr.file_type() {
                libc::S_IFREG => self.read(&path).unwrap(),
                libc::S_IFDIR => String::new(),
                _ => "special".into(),
            };
            let xattr =
                self.at(&path, |entry| self.union.getxattr(&self.caller, entry.node, b"user.test")).ok();
            let nlink = if attr.is_dir() || !with_nlink { 0 } else { attr.nlink };
            lines.push(format!("{path} {:o} {leader} {nlink} {xattr:?} {bytes}", attr.mode));
        }
        lines
    }

    pub fn inos(&self) -> Vec<(String, u64)> {
        self.attrs().into_iter().map(|(path, attr)| (path, attr.ino)).collect()
    }

    /// The whole tree as text, one line a name.
    pub fn tree(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.walk("", &mut lines);
        lines
    }

    fn walk(&self, path: &str, lines: &mut Vec<String>) {
        for child in self.list(path).unwrap() {
            let path = if path.is_empty() { child } else { format!("{path}/{child}") };
            let attr = self.attr(&path).unwrap();
            let what = match attr.file_type() {
                libc::S_IFREG => format!("= {}", self.read(&path).unwrap()),
                libc::S_IFLNK => {
                    let target = self.at(&path, |entry| self.union.readlink(&self.caller, entry.node));
                    format!("-> {}", String::from_utf8_lossy(&target.unwrap()))
                }
                _ => String::new(),
            };
            lines.push(format!("{path} {:o} {} {what}", attr.mode, attr.uid));
            if attr.is_dir() {
                self.walk(&path, lines);
            }
        }
    }

    /// Nothing may be held by the table but the root.
    pub fn assert_nothing_held(&self) {
        let (by_id, _) = self.nodes.as_ref().expect("a view of a union").len();
        assert_eq!(by_id, 1, "nodes by number");
    }
}

pub fn errno<T: std::fmt::Debug>(done: Result<T>) -> Errno {
    done.unwrap_err().errno()
}
