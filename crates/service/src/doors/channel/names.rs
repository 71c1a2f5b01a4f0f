//! Changes of names, and listings.

use std::sync::Arc;

use polytropo_libservices::{Attr, DirEntry, Entry, Errno, OpenFlags, Opened, RenameFlags};
use polytropo_wire::channel::AREA_BYTES;
use polytropo_wire::message::PATH_BYTES_MAX;

use super::client::{Kind, OpenFile};
use super::operations::{Done, FOLLOW, NO_FOLLOW, Work, access_of};
use super::permissions::{self, EXECUTE, WRITE, check_sticky};
use super::walk::{Failure, Held, Last, Target, fail, walk};

/// Positions in a listing after `.` and `..`, as at the FUSE door.
const AFTER_DOT: u64 = i64::MAX as u64 - 16;
const AFTER_DOT_DOT: u64 = i64::MAX as u64 - 15;
const INO_UNKNOWN: u64 = 0xffff_ffff;

impl Work<'_> {
    /// Does what must not be done twice, after all was looked at that could forbid it: a program that gets no answer learns how far it came.
    fn once<T>(
        &self,
        inode: impl FnOnce(&T) -> u64,
        work: impl FnOnce() -> polytropo_libservices::Result<T>,
    ) -> Result<T, Failure> {
        let (memory, slot) = (&self.client.memory, self.request.slot);
        memory.begin(slot);
        let result = work();
        match &result {
            Ok(done) => memory.changed(slot, inode(done)),
            Err(_) => memory.progress(slot, None),
        }
        // How far it came stays so: the program asks the kernel to do it again, so that it hears of it.
        Ok(result?)
    }

    /// Making or removing names in the target's directory takes writing to it.
    fn may_change_names(&self, target: &Target<'_>) -> Done {
        let (node, attr) = target.parent();
        if !attr.is_dir() {
            return fail(Errno::NOTDIR, "change names in what is no directory");
        }
        self.may_change()?;
        permissions::check(&*self.door.stack, self.caller(), node, attr, WRITE | EXECUTE)
    }

    /// O_CREAT met a file. With O_EXCL that is an error; in directories where everybody writes it may be protected (protected_regular in
    /// proc(5)), which the kernel knows.
    pub(super) fn check_present(&self, target: &Target<'_>, exclusive: bool) -> Done {
        if exclusive {
            return fail(Errno::EXIST, "make a file that is there");
        }
        let (_, attr) = target.existing()?;
        if attr.is_dir() {
            return fail(Errno::ISDIR, "open a directory to make a file");
        }
        let (_, directory) = target.parent();
        let shared = directory.mode & libc::S_ISVTX != 0 && directory.mode & 0o022 != 0;
        if shared && attr.uid != self.caller().uid && attr.uid != directory.uid {
            return Err(Failure::Kernel);
        }
        Ok(())
    }

    pub(super) fn create(&self, target: &Target<'_>, flags: i32) -> Result<(Entry, Opened), Failure> {
        if target.must_be_directory || flags & libc::O_DIRECTORY != 0 {
            return fail(Errno::ISDIR, "make a file where a directory is wanted");
        }
        self.may_change_names(target)?;
        // Making a file is writing it: nobody knows of it that this door does not.
        if !self.door.makes_files() {
            return Err(Failure::Kernel);
        }
        let mut caller = self.caller().clone();
        caller.umask = self.word32(4)? & 0o777;
        let mode = libc::S_IFREG | self.word32(3)? & 0o7777;
        let (_, open) = access_of(flags);
        let name = target.last_name(Errno::ISDIR)?;
        // Exclusive: what somebody else makes meanwhile was not weighed.
        let how = open | OpenFlags::EXCLUSIVE;
        let create = || self.door.own.create(&caller, target.parent().0, name, mode, how);
        let made = self.once(|(entry, _): &(Entry, Opened)| entry.attr.ino, create)?;
        self.door.settle();
        Ok(made)
    }

    pub(super) fn finish_create(&mut self, (entry, opened): (Entry, Opened), flags: i32) -> Done {
        let (wanted, open) = access_of(flags);
        let ticket = match self.door.enter(entry.node, wanted) {
            Ok(ticket) => Some(ticket),
            Err(failure) => {
                self.door.stack.release(entry.node, opened.handle);
                self.door.stack.forget(entry.node, 1);
                return Err(failure);
            }
        };
        let kind = Kind::File(opened.handle);
        let file = OpenFile::new(self.door.clone(), entry.node, kind, open, ticket).made_now();
        self.finish_open(Arc::new(file), entry.attr)
    }

    /// A new name, of what is not there yet.
    fn new_name<'t>(&self, target: &'t Target<'_>) -> Result<&'t polytropo_libservices::Name, Failure> {
        if target.found.is_some() || target.name.is_none() {
            return fail(Errno::EXIST, "make a name that is there");
        }
        self.may_change_names(target)?;
        target.last_name(Errno::EXIST)
    }

    /// Makes a name, once.
    fn make(&self, work: impl FnOnce() -> polytropo_libservices::Result<Entry>) -> Done {
        self.made(self.once(|entry: &Entry| entry.attr.ino, work)?)
    }

    /// Gives the look-up of an answer back, which nobody here needs.
    fn made(&self, entry: Entry) -> Done {
        drop(Held::of(&*self.door.stack, entry));
        self.door.settle();
        Ok(())
    }

    /// The program knows in which directory the name is to be, if the word at `at` is not 0: the path leads there only as long as nobody
    /// moves it.
    pub(super) fn in_known_directory(&self, target: &Target<'_>, at: usize) -> Done {
        let known = self.word(at);
        if known != 0 && target.parent().1.ino != known { Err(Failure::Kernel) } else { Ok(()) }
    }

    pub(super) fn make_directory(&mut self) -> Done {
        let target = self.walk(0, 0, NO_FOLLOW)?;
        self.in_known_directory(&target, 4)?;
        let name = self.new_name(&target)?;
        let mut caller = self.caller().clone();
        caller.umask = self.word32(3)? & 0o777;
        let mode = self.word32(2)? & 0o1777;
        self.make(|| self.door.stack.mkdir(&caller, target.parent().0, name, mode))
    }

    pub(super) fn symbolic_link(&mut self) -> Done {
        let text_bytes = self.word(2);
        let text = self.take(0, text_bytes, PATH_BYTES_MAX)?;
        if text.is_empty() || text.contains(&0) {
            return fail(Errno::NOENT, "make an empty link");
        }
        let target = self.walk(0, text.len(), NO_FOLLOW)?;
        self.in_known_directory(&target, 3)?;
        let name = self.new_name(&target)?;
        if target.must_be_directory {
            return fail(Errno::NOENT, "make a link where a directory is wanted");
        }
        self.make(|| self.door.stack.symlink(self.caller(), target.parent().0, name, &text))
    }

    pub(super) fn link(&mut self) -> Done {
        let follow = self.word32(4)? as i32 & libc::AT_SYMLINK_FOLLOW != 0;
        let from = self.walk(0, 0, if follow { FOLLOW } else { NO_FOLLOW })?;
        let (node, attr) = from.existing()?;
        let to = self.second_walk(2, self.word(1))?;
        self.in_known_directory(&from, 5)?;
        self.in_known_directory(&to, 6)?;
        let name = self.new_name(&to)?;
        if attr.is_dir() {
            return fail(Errno::PERM, "give a directory another name");
        }
        if to.must_be_directory {
            return fail(Errno::NOENT, "make a file where a directory is wanted");
        }
        // Others' files may be protected (protected_hardlinks in proc(5)), which the kernel knows.
        if !permissions::is_owner(self.caller(), attr) {
            return Err(Failure::Kernel);
        }
        self.make(|| self.door.stack.link(self.caller(), node, to.parent().0, name))
    }

    /// The request's second path, at words `at`; it lies behind the first, which has `first_bytes`.
    fn second_walk(&self, at: usize, first_bytes: u64) -> Result<Target<'_>, Failure> {
        let place = usize::try_from(first_bytes).unwrap_or(usize::MAX);
        if place > PATH_BYTES_MAX {
            return fail(Errno::NAMETOOLONG, "take a name from a request");
        }
        self.walk(at, place, NO_FOLLOW)
    }

    /// The last component names an entry: a path that ends in `.` or `..` does not.
    fn entry<'t>(
        &self,
        target: &'t Target<'_>,
        why: Errno,
    ) -> Result<(&'t polytropo_libservices::Name, &'t Attr), Failure> {
        let name = target.last_name(why)?;
        match &target.found {
            Some(found) => Ok((name, &found.attr)),
            None => fail(Errno::NOENT, "change a name that is not there"),
        }
    }

    /// Removing `victim` from the target's directory.
    fn may_remove(&self, target: &Target<'_>, victim: &Attr) -> Done {
        self.may_change_names(target)?;
        check_sticky(self.caller(), target.parent().1, victim)
    }

    pub(super) fn unlink(&mut self) -> Done {
        let directory = self.word32(2)? as i32 & libc::AT_REMOVEDIR != 0;
        let path = self.take(0, self.word(1), PATH_BYTES_MAX)?;
        let last = path.rsplit(|&byte| byte == b'/').find(|part| !part.is_empty());
        match (last, directory) {
            (Some(b"."), true) => return fail(Errno::INVAL, "remove the directory that a path ends in"),
            (Some(b".."), true) => return fail(Errno::NOTEMPTY, "remove a directory above"),
            (Some(b"." | b".."), false) => return fail(Errno::ISDIR, "remove a directory as a file"),
            _ => {}
        }
        let target =
            walk(&self.client.ground(None), self.client.start(self.word(0))?, &path, Last { follow: false })?;
        self.in_known_directory(&target, 3)?;
        let (name, attr) = self.entry(&target, if directory { Errno::BUSY } else { Errno::ISDIR })?;
        self.may_remove(&target, attr)?;
        let (parent, caller) = (target.parent().0, self.caller());
        match (directory, attr.is_dir()) {
            (true, true) => self.once(|()| 0, || self.door.stack.rmdir(caller, parent, name))?,
            (true, false) => return fail(Errno::NOTDIR, "remove a file as a directory"),
            (false, true) => return fail(Errno::ISDIR, "remove a directory as a file"),
            (false, false) if target.must_be_directory => return fail(Errno::NOTDIR, "remove a file"),
            (false, false) => self.once(|()| 0, || self.door.stack.unlink(caller, parent, name))?,
        }
        self.door.settle();
        Ok(())
    }

    pub(super) fn rename(&mut self) -> Done {
        let Some(flags) = RenameFlags::from_bits(self.word32(4)?) else {
            return fail(Errno::INVAL, "rename with flags that are not known");
        };
        // A whiteout is a device, which takes more than this door weighs.
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Failure::Kernel);
        }
        let from = self.walk(0, 0, NO_FOLLOW)?;
        let to = self.second_walk(2, self.word(1))?;
        self.in_known_directory(&from, 5)?;
        self.in_known_directory(&to, 6)?;
        // As the kernel does: before it looks whether anything is there.
        let new_name = to.last_name(Errno::BUSY)?;
        let (name, attr) = self.entry(&from, Errno::BUSY)?;
        if self.word(7) != 0
            && [&from, &to].iter().any(|at| at.found.as_ref().is_some_and(|f| f.attr.is_dir()))
        {
            return Err(Failure::Kernel);
        }
        if from.found.as_ref().is_some_and(|moved| to.passes(moved.node)) {
            return fail(Errno::INVAL, "move a directory into itself");
        }
        if to.found.as_ref().is_some_and(|replaced| from.passes(replaced.node)) {
            let exchange = flags.contains(RenameFlags::EXCHANGE);
            let why = if exchange { Errno::INVAL } else { Errno::NOTEMPTY };
            return fail(why, "put something in the place of what it lies in");
        }
        self.may_remove(&from, attr)?;
        match &to.found {
            Some(_) if flags.contains(RenameFlags::NOREPLACE) => return fail(Errno::EXIST, "replace a name"),
            Some(found) => {
                self.may_remove(&to, &found.attr)?;
                let exchange = flags.contains(RenameFlags::EXCHANGE);
                if !exchange && attr.is_dir() != found.attr.is_dir() {
                    let why = if attr.is_dir() { Errno::NOTDIR } else { Errno::ISDIR };
                    return fail(why, "rename over something of another kind");
                }
                self.may_move(&to, &from, &found.attr, exchange)?;
            }
            None => {
                if to.must_be_directory && !attr.is_dir() {
                    return fail(Errno::NOTDIR, "rename a file to a directory's name");
                }
                self.may_change_names(&to)?;
            }
        }
        self.may_move(&from, &to, attr, true)?;
        let (parent, new_parent) = (from.parent().0, to.parent().0);
        self.once(
            |()| 0,
            || self.door.stack.rename(self.caller(), parent, name, new_parent, new_name, flags),
        )?;
        self.door.settle();
        Ok(())
    }

    /// A directory that moves to another one is written to: its `..` changes.
    fn may_move(&self, from: &Target<'_>, to: &Target<'_>, moved: &Attr, moves: bool) -> Done {
        if !moves || !moved.is_dir() || from.parent().0 == to.parent().0 {
            return Ok(());
        }
        match &from.found {
            Some(found) => permissions::check(&*self.door.stack, self.caller(), found.node, moved, WRITE),
            None => Ok(()),
        }
    }

    pub(super) fn read_directory(&mut self) -> Done {
        let file = self.client.file(self.word(0))?;
        let Kind::Directory(handle) = file.kind else {
            return fail(Errno::NOTDIR, "list what is no directory");
        };
        let position = self.word(1);
        let room_bytes = usize::try_from(self.word(2)).unwrap_or(AREA_BYTES).min(AREA_BYTES);
        let bytes = &mut self.desk.bytes[..room_bytes];
        let mut listing = Listing { bytes, filled: 0, next: position, refused: false };
        let caller = &self.client.peer.caller;
        let attr = self.door.stack.getattr(caller, file.node, None)?;
        let mut room = true;
        if position == 0 {
            room = listing.add(attr.ino, AFTER_DOT, libc::S_IFDIR, b".");
        }
        if room && matches!(position, 0 | AFTER_DOT) {
            room = listing.add(INO_UNKNOWN, AFTER_DOT_DOT, libc::S_IFDIR, b"..");
        }
        if room {
            let offset = if matches!(position, AFTER_DOT | AFTER_DOT_DOT) { 0 } else { position };
            let mut sink =
                |e: DirEntry<'_>| listing.add(e.ino, e.next_offset, e.file_type, e.name.as_bytes());
            self.door.stack.readdir(caller, file.node, handle, offset, &mut sink)?;
        }
        let (filled, next) = (listing.filled, listing.next);
        if filled == 0 && listing.refused {
            return fail(Errno::INVAL, "list a directory into too small a buffer");
        }
        self.put(&self.desk.bytes[..filled])?;
        (self.reply[0], self.reply[1]) = (filled as u64, next);
        Ok(())
    }
}

/// Entries as getdents64(2) writes them.
struct Listing<'a> {
    bytes: &'a mut [u8],
    filled: usize,
    next: u64,
    /// There was more than fits.
    refused: bool,
}

const DIRENT_HEAD_BYTES: usize = 19;
const _: () = assert!(DIRENT_HEAD_BYTES + 256 < AREA_BYTES);

impl Listing<'_> {
    /// False when it does not fit.
    fn add(&mut self, ino: u64, next: u64, file_type: u32, name: &[u8]) -> bool {
        let bytes = (DIRENT_HEAD_BYTES + name.len() + 1).next_multiple_of(8);
        let Some(record) = self.bytes.get_mut(self.filled..self.filled + bytes) else {
            self.refused = true;
            return false;
        };
        record.fill(0);
        record[..8].copy_from_slice(&ino.to_ne_bytes());
        record[8..16].copy_from_slice(&next.to_ne_bytes());
        record[16..18].copy_from_slice(&(bytes as u16).to_ne_bytes());
        record[18] = (file_type >> 12) as u8;
        record[DIRENT_HEAD_BYTES..DIRENT_HEAD_BYTES + name.len()].copy_from_slice(name);
        self.filled += bytes;
        self.next = next;
        true
    }
}
