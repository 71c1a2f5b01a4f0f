//! The reference: what a filesystem does, in the plainest way.

use std::collections::BTreeMap;

use polytropo_libservices::{Errno, RenameFlags};

use crate::operations::{Answer, Operation, Outcome, Path, SLOTS, Shown};

pub type Ino = usize;
pub const ROOT: Ino = 0;

pub enum Kind {
    Dir(BTreeMap<String, Ino>),
    File(Vec<u8>),
    Link(String),
    Fifo,
}

pub struct Inode {
    pub kind: Kind,
    pub permissions: u32,
    pub uid: u32,
    pub gid: u32,
    pub names: u32,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// Inodes are never removed: what has no name and is not open is simply not reached.
pub struct Model {
    pub inodes: Vec<Inode>,
    open: [Option<Ino>; SLOTS],
}

const DONE: Outcome = Ok(Answer::Done);

impl Inode {
    fn new(kind: Kind, permissions: u32) -> Self {
        Self { kind, permissions, uid: 0, gid: 0, names: 1, xattrs: BTreeMap::new() }
    }

    fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir(_))
    }

    pub fn shown(&self) -> Shown {
        let (file_type, size_bytes) = match &self.kind {
            Kind::Dir(_) => (libc::S_IFDIR, None),
            Kind::File(bytes) => (libc::S_IFREG, Some(bytes.len() as u64)),
            Kind::Link(_) => (libc::S_IFLNK, None),
            Kind::Fifo => (libc::S_IFIFO, None),
        };
        Shown {
            mode: file_type | self.permissions,
            uid: self.uid,
            gid: self.gid,
            nlink: (!self.is_dir()).then_some(self.names),
            size_bytes,
        }
    }
}

/// `bytes` with `length` times `byte` from `offset` on.
fn overwrite(bytes: &mut Vec<u8>, offset: u64, length: usize, byte: u8) {
    if length > 0 {
        let offset = offset as usize;
        bytes.resize(bytes.len().max(offset + length), 0);
        bytes[offset..offset + length].fill(byte);
    }
}

impl Model {
    pub fn new() -> Self {
        Self { inodes: vec![Inode::new(Kind::Dir(BTreeMap::new()), 0o755)], open: [None; SLOTS] }
    }

    pub fn entries(&self, ino: Ino) -> Result<&BTreeMap<String, Ino>, Errno> {
        match &self.inodes[ino].kind {
            Kind::Dir(entries) => Ok(entries),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn entries_mut(&mut self, ino: Ino) -> &mut BTreeMap<String, Ino> {
        match &mut self.inodes[ino].kind {
            Kind::Dir(entries) => entries,
            _ => unreachable!("looked at before"),
        }
    }

    fn find(&self, path: &[&str]) -> Result<Ino, Errno> {
        path.iter().try_fold(ROOT, |at, name| self.entries(at)?.get(*name).copied().ok_or(Errno::NOENT))
    }

    /// The parent of a path, which must be a directory.
    fn parent(&self, path: &Path) -> Result<Ino, Errno> {
        let parent = self.find(&path[..path.len() - 1])?;
        self.entries(parent)?;
        Ok(parent)
    }

    fn bytes(&mut self, ino: Ino) -> Result<&mut Vec<u8>, Errno> {
        match &mut self.inodes[ino].kind {
            Kind::File(bytes) => Ok(bytes),
            Kind::Dir(_) => Err(Errno::ISDIR),
            Kind::Link(_) => Err(Errno::LOOP),
            Kind::Fifo => Err(Errno::NXIO),
        }
    }

    fn opened(&mut self, slot: usize) -> &mut Vec<u8> {
        let ino = self.open[slot].expect("asked before");
        self.bytes(ino).expect("only regular files are opened")
    }

    /// Operations that the kernel never lets through to a filesystem, or that need an open file.
    pub fn has_no_sense(&self, operation: &Operation) -> bool {
        use Operation::*;
        let kind = |path: &Path| self.find(path).ok().map(|ino| &self.inodes[ino].kind);
        match operation {
            Link(path, _) => matches!(kind(path), Some(Kind::Dir(_))),
            Rename(from, to, _) => [from, to].into_iter().any(|path| {
                let parent = self.find(&path[..path.len() - 1]);
                parent.is_ok_and(|parent| !self.inodes[parent].is_dir())
            }),
            Truncate(path, _) => matches!(kind(path), Some(Kind::Link(_) | Kind::Fifo | Kind::Dir(_))),
            Chmod(path, _) | Chown(path, ..) => matches!(kind(path), Some(Kind::Link(_))),
            SetXattr(path, ..) | RemoveXattr(path, _) => {
                matches!(kind(path), Some(Kind::Link(_) | Kind::Fifo))
            }
            ReadOpen(slot, ..) | TruncateOpen(slot, _) | AttributesOpen(slot) | Close(slot) => {
                self.open[*slot].is_none()
            }
            WriteOpen { slot, .. } | PunchOpen { slot, .. } => self.open[*slot].is_none(),
            CopyOpen { from, to, .. } => {
                self.open[*from].is_none() || self.open[*to].is_none() || self.open[*from] == self.open[*to]
            }
            _ => false,
        }
    }

    pub fn run(&mut self, operation: &Operation) -> Outcome {
        use Operation::*;
        match operation {
            Mkdir(path) => self.make(path, Inode::new(Kind::Dir(BTreeMap::new()), 0o755)),
            Mkfifo(path) => self.make(path, Inode::new(Kind::Fifo, 0o644)),
            Symlink(path, target) => self.make(path, Inode::new(Kind::Link((*target).to_owned()), 0o777)),
            Create { path, exclusive, truncate } => self.create(path, *exclusive, *truncate),
            Readlink(path) => match &self.inodes[self.find(path)?].kind {
                Kind::Link(target) => Ok(Answer::Bytes(target.clone().into_bytes())),
                _ => Err(Errno::INVAL),
            },
            Link(from, to) => self.link(from, to),
            Unlink(path) => self.remove(path, false),
            Rmdir(path) => self.remove(path, true),
            Rename(from, to, flags) => self.rename(from, to, *flags),
            Read(path) => {
                let ino = self.find(path)?;
                Ok(Answer::Bytes(self.bytes(ino)?.clone()))
            }
            Write { path, offset, length, byte, append } => {
                let ino = self.find(path)?;
                let bytes = self.bytes(ino)?;
                let offset = if *append { bytes.len() as u64 } else { *offset };
                overwrite(bytes, offset, *length, *byte);
                DONE
            }
            Truncate(path, size) => {
                let ino = self.find(path)?;
                self.bytes(ino)?.resize(*size as usize, 0);
                DONE
            }
            Chmod(..) | Chown(..) | SetXattr(..) | RemoveXattr(..) => self.change(operation),
            _ => self.run_open(operation),
        }
    }

    fn change(&mut self, operation: &Operation) -> Outcome {
        use Operation::*;
        match operation {
            Chmod(path, mode) => {
                let ino = self.find(path)?;
                self.inodes[ino].permissions = *mode;
            }
            Chown(path, uid, gid) => {
                let ino = self.find(path)?;
                (self.inodes[ino].uid, self.inodes[ino].gid) = (*uid, *gid);
            }
            SetXattr(path, key, value) => {
                let ino = self.find(path)?;
                self.inodes[ino].xattrs.insert((*key).to_owned(), value.clone());
            }
            RemoveXattr(path, key) => {
                let ino = self.find(path)?;
                self.inodes[ino].xattrs.remove(*key).ok_or(Errno::NODATA)?;
            }
            _ => unreachable!(),
        }
        DONE
    }

    fn run_open(&mut self, operation: &Operation) -> Outcome {
        use Operation::*;
        match operation {
            Open { slot, path, truncate } => {
                self.open[*slot] = None;
                let ino = self.find(path)?;
                let bytes = self.bytes(ino)?;
                if *truncate {
                    bytes.clear();
                }
                self.open[*slot] = Some(ino);
            }
            ReadOpen(slot, offset, length) => {
                let bytes = self.opened(*slot);
                let start = bytes.len().min(*offset as usize);
                let end = bytes.len().min(start + length);
                return Ok(Answer::Bytes(bytes[start..end].to_vec()));
            }
            WriteOpen { slot, offset, length, byte } => {
                overwrite(self.opened(*slot), *offset, *length, *byte)
            }
            TruncateOpen(slot, size) => self.opened(*slot).resize(*size as usize, 0),
            PunchOpen { slot, offset, length } => {
                let bytes = self.opened(*slot);
                let start = bytes.len().min(*offset as usize);
                let end = bytes.len().min(start + *length as usize);
                bytes[start..end].fill(0);
            }
            CopyOpen { from, to, from_offset, to_offset, length } => {
                let source = self.opened(*from);
                let start = source.len().min(*from_offset as usize);
                let end = source.len().min(start + *length as usize);
                let copied = source[start..end].to_vec();
                let target = self.opened(*to);
                if !copied.is_empty() {
                    overwrite(target, *to_offset, copied.len(), 0);
                    target[*to_offset as usize..][..copied.len()].copy_from_slice(&copied);
                }
                return Ok(Answer::Count(copied.len() as u64));
            }
            AttributesOpen(slot) => {
                return Ok(Answer::Shown(self.inodes[self.open[*slot].expect("asked before")].shown()));
            }
            Close(slot) => self.open[*slot] = None,
            Restart => self.open = [None; SLOTS],
            _ => unreachable!(),
        }
        DONE
    }

    fn make(&mut self, path: &Path, inode: Inode) -> Outcome {
        let (parent, name) = (self.parent(path)?, path[path.len() - 1]);
        if self.entries(parent)?.contains_key(name) {
            return Err(Errno::EXIST);
        }
        self.inodes.push(inode);
        let ino = self.inodes.len() - 1;
        self.entries_mut(parent).insert(name.to_owned(), ino);
        DONE
    }

    fn create(&mut self, path: &Path, exclusive: bool, truncate: bool) -> Outcome {
        match self.make(path, Inode::new(Kind::File(Vec::new()), 0o644)) {
            Err(Errno::EXIST) if !exclusive => {}
            done => return done,
        }
        let ino = self.find(path)?;
        let bytes = self.bytes(ino)?;
        if truncate {
            bytes.clear();
        }
        DONE
    }

    fn link(&mut self, from: &Path, to: &Path) -> Outcome {
        let (ino, parent, name) = (self.find(from)?, self.parent(to)?, to[to.len() - 1]);
        if self.entries(parent)?.contains_key(name) {
            return Err(Errno::EXIST);
        }
        self.entries_mut(parent).insert(name.to_owned(), ino);
        self.inodes[ino].names += 1;
        DONE
    }

    fn remove(&mut self, path: &Path, directory: bool) -> Outcome {
        let (parent, name) = (self.parent(path)?, path[path.len() - 1]);
        let ino = self.find(path)?;
        match (&self.inodes[ino].kind, directory) {
            (Kind::Dir(_), false) => return Err(Errno::ISDIR),
            (Kind::Dir(entries), true) if !entries.is_empty() => return Err(Errno::NOTEMPTY),
            (Kind::File(_) | Kind::Link(_) | Kind::Fifo, true) => return Err(Errno::NOTDIR),
            _ => {}
        }
        self.entries_mut(parent).remove(name);
        self.inodes[ino].names -= 1;
        DONE
    }

    /// In the order in which rename(2) looks at things.
    fn rename(&mut self, from: &Path, to: &Path, flags: RenameFlags) -> Outcome {
        let (old_name, new_name) = (from[from.len() - 1], to[to.len() - 1]);
        let (old_parent, new_parent) = (self.find(&from[..from.len() - 1])?, self.find(&to[..to.len() - 1])?);
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let source = *self.entries(old_parent)?.get(old_name).ok_or(Errno::NOENT)?;
        let target = self.entries(new_parent)?.get(new_name).copied();
        if flags.contains(RenameFlags::NOREPLACE) && target.is_some() {
            return Err(Errno::EXIST);
        }
        if exchange && target.is_none() {
            return Err(Errno::NOENT);
        }
        if to.len() > from.len() && to.starts_with(from) {
            return Err(Errno::INVAL);
        }
        if from.len() > to.len() && from.starts_with(to) {
            return Err(if exchange { Errno::INVAL } else { Errno::NOTEMPTY });
        }
        if target == Some(source) {
            return DONE;
        }
        if let (Some(target), false) = (target, exchange) {
            match (self.inodes[source].is_dir(), &self.inodes[target].kind) {
                (true, Kind::Dir(entries)) if !entries.is_empty() => return Err(Errno::NOTEMPTY),
                (true, Kind::Dir(_)) => {}
                (true, _) => return Err(Errno::NOTDIR),
                (false, Kind::Dir(_)) => return Err(Errno::ISDIR),
                (false, _) => {}
            }
            self.inodes[target].names -= 1;
        }
        self.entries_mut(old_parent).remove(old_name);
        if let (Some(target), true) = (target, exchange) {
            self.entries_mut(old_parent).insert(old_name.to_owned(), target);
        }
        self.entries_mut(new_parent).insert(new_name.to_owned(), source);
        DONE
    }
}
