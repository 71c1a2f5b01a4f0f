//! The same operations on a stack.

use std::sync::Arc;

use polytropo_libservices::*;

use crate::operations::{Answer, Operation, Outcome, Path, SLOTS, Shown};

const READ_WRITE: OpenFlags = OpenFlags::READ.union(OpenFlags::WRITE);
/// Longer than any file of the test.
const LENGTH_MAX: usize = 200_000;

pub struct Subject {
    pub service: Arc<dyn Libservice>,
    open: [Option<(NodeId, HandleId)>; SLOTS],
    /// Look-ups of the operation under way.
    held: Vec<NodeId>,
}

fn caller() -> Caller {
    Caller::service()
}

fn name(text: &str) -> &Name {
    Name::new(text.as_bytes()).unwrap()
}

fn last(path: &Path) -> &'static Name {
    name(path[path.len() - 1])
}

pub fn shown(attr: &Attr) -> Shown {
    Shown {
        mode: attr.mode,
        uid: attr.uid,
        gid: attr.gid,
        nlink: (!attr.is_dir()).then_some(attr.nlink),
        size_bytes: (attr.file_type() == libc::S_IFREG).then_some(attr.size_bytes),
    }
}

impl Subject {
    pub fn new(service: Arc<dyn Libservice>) -> Self {
        Self { service, open: [None; SLOTS], held: Vec::new() }
    }

    pub fn run(&mut self, operation: &Operation) -> Outcome {
        let outcome = self.attempt(operation).map_err(|e| e.errno());
        for node in std::mem::take(&mut self.held) {
            self.service.forget(node, 1);
        }
        outcome
    }

    pub fn close_all(&mut self) {
        for slot in 0..SLOTS {
            self.close(slot);
        }
    }

    fn close(&mut self, slot: usize) {
        if let Some((node, handle)) = self.open[slot].take() {
            self.service.release(node, handle);
            self.service.forget(node, 1);
        }
    }

    fn find(&mut self, path: &[&str]) -> Result<NodeId> {
        let mut at = NodeId::ROOT;
        for step in path {
            at = self.service.lookup(&caller(), at, name(step))?.node;
            self.held.push(at);
        }
        Ok(at)
    }

    fn parent(&mut self, path: &Path) -> Result<NodeId> {
        self.find(&path[..path.len() - 1])
    }

    fn keep(&mut self, entry: Result<Entry>) -> Result<Answer> {
        self.held.push(entry?.node);
        Ok(Answer::Done)
    }

    /// Runs `use_it` on a file opened for it alone.
    fn with_file(
        &mut self,
        path: &Path,
        flags: OpenFlags,
        use_it: impl FnOnce(&dyn Libservice, NodeId, HandleId) -> Result<Answer>,
    ) -> Result<Answer> {
        let node = self.find(path)?;
        let handle = self.service.open(&caller(), node, flags)?.handle;
        let done = use_it(&*self.service, node, handle);
        self.service.release(node, handle);
        done
    }

    fn set(&mut self, path: &Path, changes: SetAttr) -> Result<Answer> {
        let node = self.find(path)?;
        self.service.setattr(&caller(), node, None, &changes)?;
        Ok(Answer::Done)
    }

    fn attempt(&mut self, operation: &Operation) -> Result<Answer> {
        use Operation::*;
        let (s, c) = (self.service.clone(), caller());
        match operation {
            Mkdir(path) => {
                let parent = self.parent(path)?;
                self.keep(s.mkdir(&c, parent, last(path), 0o755))
            }
            Mkfifo(path) => {
                let parent = self.parent(path)?;
                self.keep(s.mknod(&c, parent, last(path), libc::S_IFIFO | 0o644, 0))
            }
            Symlink(path, target) => {
                let parent = self.parent(path)?;
                self.keep(s.symlink(&c, parent, last(path), target.as_bytes()))
            }
            Create { path, exclusive, truncate } => {
                let parent = self.parent(path)?;
                let mut flags = READ_WRITE;
                flags.set(OpenFlags::EXCLUSIVE, *exclusive);
                flags.set(OpenFlags::TRUNCATE, *truncate);
                let (entry, opened) = s.create(&c, parent, last(path), 0o644, flags)?;
                s.release(entry.node, opened.handle);
                self.keep(Ok(entry))
            }
            Readlink(path) => Ok(Answer::Bytes(s.readlink(&c, self.find(path)?)?)),
            Link(from, to) => {
                let (node, parent) = (self.find(from)?, self.parent(to)?);
                self.keep(s.link(&c, node, parent, last(to)))
            }
            Unlink(path) => s.unlink(&c, self.parent(path)?, last(path)).map(|()| Answer::Done),
            Rmdir(path) => s.rmdir(&c, self.parent(path)?, last(path)).map(|()| Answer::Done),
            Rename(from, to, flags) => {
                let (old, new) = (self.parent(from)?, self.parent(to)?);
                s.rename(&c, old, last(from), new, last(to), *flags).map(|()| Answer::Done)
            }
            Read(path) => {
                self.with_file(path, OpenFlags::READ, |s, node, handle| read(s, node, handle, 0, LENGTH_MAX))
            }
            Write { path, offset, length, byte, append } => {
                let flags = OpenFlags::WRITE | if *append { OpenFlags::APPEND } else { OpenFlags::empty() };
                self.with_file(path, flags, |s, node, handle| write(s, node, handle, *offset, *length, *byte))
            }
            Truncate(path, size) => self.set(path, SetAttr { size_bytes: Some(*size), ..SetAttr::default() }),
            Chmod(path, mode) => self.set(path, SetAttr { mode: Some(*mode), ..SetAttr::default() }),
            Chown(path, uid, gid) => {
                self.set(path, SetAttr { uid: Some(*uid), gid: Some(*gid), ..SetAttr::default() })
            }
            SetXattr(path, key, value) => {
                let node = self.find(path)?;
                s.setxattr(&c, node, key.as_bytes(), value, XattrFlags::empty()).map(|()| Answer::Done)
            }
            RemoveXattr(path, key) => {
                let node = self.find(path)?;
                s.removexattr(&c, node, key.as_bytes()).map(|()| Answer::Done)
            }
            _ => self.attempt_open(operation),
        }
    }

    fn attempt_open(&mut self, operation: &Operation) -> Result<Answer> {
        use Operation::*;
        let (s, c) = (self.service.clone(), caller());
        let opened = |slot: &usize| self.open[*slot].expect("the model has it open");
        match operation {
            Open { slot, path, truncate } => {
                self.close(*slot);
                let node = self.find(path)?;
                let mut flags = READ_WRITE;
                flags.set(OpenFlags::TRUNCATE, *truncate);
                let handle = s.open(&c, node, flags)?.handle;
                self.open[*slot] = Some((node, handle));
                // This look-up is held as long as the file is open.
                self.held.pop();
                Ok(Answer::Done)
            }
            ReadOpen(slot, offset, length) => {
                let (node, handle) = opened(slot);
                read(&*s, node, handle, *offset, *length)
            }
            WriteOpen { slot, offset, length, byte } => {
                let (node, handle) = opened(slot);
                write(&*s, node, handle, *offset, *length, *byte)
            }
            TruncateOpen(slot, size) => {
                let (node, handle) = opened(slot);
                let changes = SetAttr { size_bytes: Some(*size), ..SetAttr::default() };
                s.setattr(&c, node, Some(handle), &changes).map(|_| Answer::Done)
            }
            PunchOpen { slot, offset, length } => {
                let (node, handle) = opened(slot);
                let mode = FallocateMode::PUNCH_HOLE | FallocateMode::KEEP_SIZE;
                s.fallocate(&c, node, handle, mode, *offset, *length).map(|()| Answer::Done)
            }
            CopyOpen { from, to, from_offset, to_offset, length } => {
                let ((from, reader), (to, writer)) = (opened(from), opened(to));
                let copied =
                    s.copy_range(&c, (from, reader, *from_offset), (to, writer, *to_offset), *length)?;
                Ok(Answer::Count(copied))
            }
            AttributesOpen(slot) => {
                let (node, handle) = opened(slot);
                Ok(Answer::Shown(shown(&s.getattr(&c, node, Some(handle))?)))
            }
            Close(slot) => {
                self.close(*slot);
                Ok(Answer::Done)
            }
            _ => unreachable!("done above, or by the test"),
        }
    }
}

pub fn read(
    s: &dyn Libservice,
    node: NodeId,
    handle: HandleId,
    offset: u64,
    length: usize,
) -> Result<Answer> {
    let mut buffer = vec![0; length];
    let done = s.read(&caller(), node, handle, offset, &mut buffer)?;
    buffer.truncate(done);
    Ok(Answer::Bytes(buffer))
}

fn write(
    s: &dyn Libservice,
    node: NodeId,
    handle: HandleId,
    offset: u64,
    length: usize,
    byte: u8,
) -> Result<Answer> {
    let done = s.write(&caller(), node, handle, offset, &vec![byte; length])?;
    assert_eq!(done, length);
    Ok(Answer::Done)
}
