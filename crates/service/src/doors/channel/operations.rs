//! What each request does.

use std::sync::Arc;

use polytropo_libservices::{Attr, Caller, Errno, Error, FsCapabilities, NodeId, OpenFlags};
use polytropo_wire::channel::AREA_BYTES;
use polytropo_wire::epochs::{TAG_WORDS, Tag};
use polytropo_wire::message::{
    ATTRIBUTE_WORDS, Attributes, CARRIED_BYTES_MAX, OPENED_TAG_AT, Operation, PATH_BYTES_MAX, REPLY_WORDS,
    TAG_AT, opened, opened_flags, window,
};

use super::Shared;
use super::ahead::Given;
use super::client::{Client, Kind, OpenFile};
use super::memory::Request;
use super::permissions::{self, EXECUTE, READ, WRITE, has};
use super::walk::{Failure, Last, Target, fail, walk};
use crate::doors::modes::Ticket;
use crate::epochs::Notes;

/// Failures that are as true as what they depend on. Others may pass by themselves.
const LASTING: [Errno; 8] = [
    Errno::NOENT,
    Errno::NOTDIR,
    Errno::ACCESS,
    Errno::LOOP,
    Errno::NAMETOOLONG,
    Errno::INVAL,
    Errno::ROFS,
    Errno::ISDIR,
];
/// A name that comes and goes under an open that may make it is given up on after so many tries.
const CREATE_TRIES_MAX: usize = 16;

const _: () = assert!(TAG_AT + TAG_WORDS == REPLY_WORDS && TAG_AT >= ATTRIBUTE_WORDS);

/// One thread's belongings.
pub struct Desk {
    pub bytes: Box<[u8; AREA_BYTES]>,
}

impl Default for Desk {
    fn default() -> Self {
        Self { bytes: vec![0; AREA_BYTES].into_boxed_slice().try_into().expect("as long as told") }
    }
}

/// A request while it is worked on.
pub struct Work<'a> {
    pub door: &'a Arc<Shared>,
    pub client: &'a Arc<Client>,
    pub desk: &'a mut Desk,
    pub request: Request,
    pub reply: [u64; REPLY_WORDS],
    /// What the answer depends on, for those that may be kept.
    pub notes: Option<Notes<'a>>,
    /// The small file that was opened.
    pub given: Option<Given>,
}

pub(super) type Done = Result<(), Failure>;
type Way = (Kind, OpenFlags, Option<Ticket>);

pub(super) const FOLLOW: Last = Last { follow: true };
pub(super) const NO_FOLLOW: Last = Last { follow: false };

impl Work<'_> {
    pub fn run(&mut self) -> Done {
        let Some(operation) = self.request.operation else {
            return fail(Errno::NOSYS, "do something unknown");
        };
        let door = self.door;
        let _under_way = match self.changes_something(operation)? {
            true => Some(door.begin_change()?),
            false => None,
        };
        match operation {
            Operation::Ping => self.ping(),
            Operation::Watch => {
                self.client.watch();
                Ok(())
            }
            Operation::Open if self.opens_only()? => self.kept(Self::open),
            Operation::Open => self.open(),
            Operation::Close => self.client.close(self.word(0)),
            Operation::Read => self.read(),
            Operation::FileStatus => self.file_status(),
            Operation::Status => self.kept(Self::status),
            Operation::Access => self.kept(Self::access),
            Operation::ReadLink => self.kept(Self::read_link),
            Operation::Window => self.window(),
            Operation::Write => self.write(),
            Operation::Truncate => self.truncate(),
            Operation::Sync => self.sync(),
            Operation::Allocate => self.allocate(),
            Operation::ReadDirectory => self.read_directory(),
            Operation::List => self.kept(Self::list),
            Operation::Hand => self.hand(),
            Operation::MakeDirectory => self.make_directory(),
            Operation::Unlink => self.unlink(),
            Operation::Rename => self.rename(),
            Operation::SymbolicLink => self.symbolic_link(),
            Operation::Link => self.link(),
            Operation::ChangeMode => self.change_mode(),
            Operation::ChangeOwner => self.change_owner(),
            Operation::ChangeTimes => self.change_times(),
            Operation::TruncatePath => self.truncate_path(),
            _ => Err(Failure::Kernel),
        }
    }

    fn changes_something(&self, operation: Operation) -> Result<bool, Failure> {
        let changing = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
        Ok(match operation {
            Operation::Open => self.word32(2)? as i32 & changing != 0,
            other => other.is_change(),
        })
    }

    /// Does something whose answer the program may keep, and says with it what the answer depends on.
    fn kept(&mut self, work: impl FnOnce(&mut Self) -> Done) -> Done {
        self.notes = Some(Notes::new(&self.door.epochs));
        let done = work(self);
        let lasting = match &done {
            // The words of an open file are needed for other things; a listing says by itself how long it is true.
            Ok(()) => !matches!(self.request.operation, Some(Operation::Open | Operation::List)),
            Err(Failure::Kernel) => true,
            Err(Failure::Error(error)) => LASTING.contains(&error.errno()),
        };
        let tag = self.notes.take().map(|notes| notes.tag());
        match tag.filter(Tag::is_good) {
            Some(tag) if lasting => self.reply[TAG_AT..].copy_from_slice(&tag.to_words()),
            Some(tag) if done.is_ok() && self.request.operation == Some(Operation::Open) => {
                self.tag_opened(&tag)?;
            }
            _ => {}
        }
        done
    }

    /// A file was opened: the tag lies behind its bytes, since there is no room among the words.
    fn tag_opened(&mut self, tag: &Tag) -> Done {
        let mut bytes = [0; TAG_WORDS * 8];
        for (place, word) in bytes.chunks_exact_mut(8).zip(tag.to_words()) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        if self.client.memory.put(self.request.slot, OPENED_TAG_AT, &bytes).is_none() {
            return fail(Errno::MSGSIZE, "put a tag into a reply");
        }
        self.reply[opened::FLAGS] |= opened_flags::TAGGED;
        Ok(())
    }

    /// What `node` is like, for an answer that depends on it.
    fn noted(&self, node: NodeId, seen: &Attr) -> Attr {
        self.notes.as_ref().map_or_else(
            || seen.clone(),
            |notes| notes.attributes(&*self.door.stack, self.caller(), node, seen),
        )
    }

    /// Refuses files that the kernel has in its hands.
    fn may_tell(&self, node: NodeId, attr: &Attr) -> Done {
        let served = if attr.file_type() == libc::S_IFREG { self.door.may_serve(node) } else { Ok(()) };
        served.inspect_err(|_| self.spoil_if_counted())
    }

    /// The kernel has a file. If that may change, nobody tells when it gives it back.
    fn spoil_if_counted(&self) {
        if let (true, Some(notes)) = (self.door.counts_files(), &self.notes) {
            notes.spoil();
        }
    }

    /// Opens something that is there, if it is: that it is not may be kept.
    fn opens_only(&self) -> Result<bool, Failure> {
        Ok(self.word32(2)? as i32 & (libc::O_CREAT | libc::O_TMPFILE) & !libc::O_DIRECTORY == 0)
    }

    pub(super) fn word(&self, at: usize) -> u64 {
        self.request.words[at]
    }

    pub(super) fn word32(&self, at: usize) -> Result<u32, Failure> {
        u32::try_from(self.word(at)).or_else(|_| fail(Errno::INVAL, "use a number that is too large"))
    }

    pub(super) fn caller(&self) -> &Caller {
        &self.client.peer.caller
    }

    /// Bytes of the slot's area, copied.
    pub(super) fn take(&self, at: usize, count: u64, max: usize) -> Result<Vec<u8>, Failure> {
        let count = usize::try_from(count).ok().filter(|count| *count <= max);
        let Some(count) = count else { return fail(Errno::NAMETOOLONG, "take a name from a request") };
        let mut bytes = vec![0; count];
        match self.client.memory.take(self.request.slot, at, &mut bytes) {
            Some(()) => Ok(bytes),
            None => fail(Errno::INVAL, "take bytes from a request"),
        }
    }

    pub(super) fn put(&self, bytes: &[u8]) -> Done {
        match self.client.memory.put(self.request.slot, 0, bytes) {
            Some(()) => Ok(()),
            None => fail(Errno::MSGSIZE, "put bytes into a reply"),
        }
    }

    /// The path that begins at word `at` says and lies at `place` in the area. An empty one means the start itself.
    pub(super) fn walk(&self, at: usize, place: usize, last: Last) -> Result<Target<'_>, Failure> {
        let path = self.take(place, self.word(at + 1), PATH_BYTES_MAX)?;
        walk(&self.client.ground(self.notes.as_ref()), self.client.start(self.word(at))?, &path, last)
    }

    pub(super) fn put_attributes(&mut self, at: usize, attr: &Attr) {
        self.reply[at..at + ATTRIBUTE_WORDS].copy_from_slice(&attributes(attr).to_words());
    }

    fn open(&mut self) -> Done {
        for _ in 0..CREATE_TRIES_MAX {
            if self.open_or_create()? {
                return Ok(());
            }
        }
        fail(Errno::STALE, "open a name that comes and goes")
    }

    /// Says whether it is done: not if somebody else made the file meanwhile that was to be made or opened.
    fn open_or_create(&mut self) -> Result<bool, Failure> {
        let flags = self.word32(2)? as i32;
        // A file without a name is nothing that this door makes.
        if flags & libc::O_TMPFILE == libc::O_TMPFILE {
            return Err(Failure::Kernel);
        }
        let creates = flags & libc::O_CREAT != 0 && flags & libc::O_PATH == 0;
        let exclusive = creates && flags & libc::O_EXCL != 0;
        let last = if flags & libc::O_NOFOLLOW != 0 || exclusive { NO_FOLLOW } else { FOLLOW };
        let mut target = self.walk(0, 0, last)?;
        self.in_known_directory(&target, 6)?;
        if creates {
            if target.found.is_none() && target.name.is_some() {
                let made = match self.create(&target, flags) {
                    Err(Failure::Error(error)) if !exclusive && error.is(Errno::EXIST) => return Ok(false),
                    made => made?,
                };
                drop(target);
                self.finish_create(made, flags)?;
                self.reply[opened::FLAGS] |= opened_flags::MADE;
                return Ok(true);
            }
            self.check_present(&target, exclusive)?;
        }
        let (node, attr) = target.existing()?;
        let mut attr = self.noted(node, attr);
        let (kind, open_flags, ticket) = self.open_node(node, &attr, flags)?;
        if flags & libc::O_TRUNC != 0 && matches!(kind, Kind::File(_)) {
            attr.size_bytes = 0;
            attr.blocks_512 = 0;
        }
        let small = matches!(kind, Kind::File(_)) && attr.size_bytes <= CARRIED_BYTES_MAX as u64;
        let given = target.name.clone().filter(|_| small && open_flags == OpenFlags::READ).map(|name| {
            let (directory, parent) = target.parent();
            Given { directory, directory_ino: parent.ino, name }
        });
        let looked_up = match target.found.take() {
            Some(found) => found.into_node().0,
            // The start or a directory on the way: looked up once more for the open file.
            None => self.look_up_again(&target, node)?,
        };
        drop(target);
        self.given = given;
        let file = OpenFile::new(self.door.clone(), looked_up, kind, open_flags, ticket);
        let file = Arc::new(file);
        self.finish_open(file, attr)?;
        Ok(true)
    }

    /// A look-up of its own of a node that something else holds.
    fn look_up_again(&self, target: &Target<'_>, node: NodeId) -> Result<NodeId, Failure> {
        let _ = target;
        if node == NodeId::ROOT {
            return Ok(node);
        }
        // `.` or `..` or an empty path at the end: no name leads there that is known.
        Err(Failure::Kernel)
    }

    pub(super) fn open_node(&self, node: NodeId, attr: &Attr, flags: i32) -> Result<Way, Failure> {
        let client = self.client;
        if flags & libc::O_DIRECTORY != 0 && !attr.is_dir() {
            return fail(Errno::NOTDIR, "open a file as a directory");
        }
        if flags & libc::O_PATH != 0 {
            return Ok((Kind::Place, OpenFlags::empty(), None));
        }
        let (wanted, open_flags) = access_of(flags);
        match attr.file_type() {
            libc::S_IFREG | libc::S_IFDIR => {}
            libc::S_IFLNK => return fail(Errno::LOOP, "open a link"),
            // Devices, FIFOs and sockets are the kernel's.
            _ => return Err(Failure::Kernel),
        }
        let truncates = flags & libc::O_TRUNC != 0;
        let wanted = if truncates { wanted | WRITE } else { wanted };
        permissions::check(&*client.door.stack, self.caller(), node, attr, wanted)?;
        if flags & libc::O_NOATIME != 0 && !permissions::is_owner(self.caller(), attr) {
            return fail(Errno::PERM, "read without a trace");
        }
        if attr.is_dir() {
            if wanted & WRITE != 0 {
                return fail(Errno::ISDIR, "write to a directory");
            }
            let handle = client.door.stack.opendir(self.caller(), node)?;
            return Ok((Kind::Directory(handle), open_flags, None));
        }
        if wanted & WRITE != 0 && client.peer.read_only {
            return fail(Errno::ROFS, "write through a read-only mount");
        }
        let privileged = attr.mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        if wanted & WRITE != 0 && privileged && has(self.caller(), FsCapabilities::FSETID) {
            // The host takes these bits away at each write. Who may keep them gets them back, also after this worker was killed in between, which
            // only the kernel's door writes down.
            return Err(Failure::Kernel);
        }
        let ticket = self.door.enter(node, wanted).inspect_err(|_| self.spoil_if_counted())?;
        let how = if truncates { open_flags | OpenFlags::TRUNCATE } else { open_flags };
        match client.door.stack.open(self.caller(), node, how) {
            Ok(opened) => {
                if truncates {
                    self.door.settle();
                }
                Ok((Kind::File(opened.handle), open_flags, Some(ticket)))
            }
            Err(error) => {
                self.door.modes.release(node, ticket);
                Err(error.into())
            }
        }
    }

    pub(super) fn finish_open(&mut self, file: Arc<OpenFile>, attr: Attr) -> Done {
        let mut flags = 0;
        if self.door.immutable {
            flags |= opened_flags::IMMUTABLE;
        }
        if self.door.grants.is_some() && file.flags.contains(OpenFlags::WRITE) {
            flags |= opened_flags::POSTS;
        }
        if let Some(handle) = file.handle().filter(|_| file.flags.contains(OpenFlags::READ)) {
            let size = usize::try_from(attr.size_bytes).unwrap_or(usize::MAX);
            if size <= CARRIED_BYTES_MAX && (self.door.immutable || self.stays_as_tagged(&file)) {
                let bytes = &mut self.desk.bytes[..size];
                let count =
                    self.client.door.stack.read(&self.client.peer.caller, file.node, handle, 0, bytes)?;
                if count == size {
                    self.put(&self.desk.bytes[..count])?;
                    self.share_bytes(&attr, &self.desk.bytes[..count]);
                    flags |= opened_flags::CARRIED;
                    self.reply[opened::CARRIED_BYTES] = count as u64;
                }
            } else if size > CARRIED_BYTES_MAX && self.door.windows.serves(size as u64) {
                flags |= opened_flags::WINDOW;
            }
        }
        self.put_attributes(opened::ATTRIBUTES, &attr);
        self.reply[opened::FLAGS] = flags;
        let carried = flags & opened_flags::CARRIED != 0;
        self.reply[opened::FILE] =
            if carried && self.will_do_with_bytes() { 0 } else { self.client.insert(file)? };
        Ok(())
    }

    /// The program needs no open file if it gets the bytes.
    fn will_do_with_bytes(&self) -> bool {
        self.word(5) == 1 && self.may_always_read()
    }

    /// What comes after a change a program without an open file does by the kernel, which weighs rights anew: it must not have lost them by then.
    pub(super) fn may_always_read(&self) -> bool {
        let always = FsCapabilities::DAC_OVERRIDE | FsCapabilities::DAC_READ_SEARCH;
        self.door.immutable || self.caller().capabilities.intersects(always)
    }

    /// Whether the program hears of every change of the file's bytes by the tag that it gets.
    pub(super) fn stays_as_tagged(&self, file: &OpenFile) -> bool {
        !file.flags.contains(OpenFlags::WRITE)
            && self.notes.as_ref().is_some_and(|notes| notes.tag().is_good())
    }

    fn read(&mut self) -> Done {
        let file = self.client.file(self.word(0))?;
        let handle = file.file()?;
        if !file.flags.contains(OpenFlags::READ) {
            return fail(Errno::BADF, "read a file that is open for writing only");
        }
        self.door.may_serve(file.node)?;
        told_late(&file)?;
        let (offset, count) = (self.word(1), self.word(2).min(AREA_BYTES as u64) as usize);
        if i64::try_from(offset).is_err() {
            return fail(Errno::INVAL, "read at such an offset");
        }
        let bytes = &mut self.desk.bytes[..count];
        let count = self.door.own.read(&self.client.peer.caller, file.node, handle, offset, bytes)?;
        self.put(&self.desk.bytes[..count.min(AREA_BYTES)])?;
        self.reply[0] = count as u64;
        Ok(())
    }

    /// Nothing; with a file, whatever of its writes is not with the layers yet, and what became of them.
    fn ping(&mut self) -> Done {
        let number = self.word(0);
        if number == 0 {
            return Ok(());
        }
        let file = self.client.file(number)?;
        if let Some(held) = &self.door.held {
            held.flush(file.node);
        }
        told_late(&file)
    }

    /// A name by which the kernel can open the file, wherever its own name is. Of regular files only: a directory has one place in the kernel's
    /// tree, which a second name would move it from, together with all that is mounted below.
    fn hand(&mut self) -> Done {
        let file = self.client.file(self.word(0))?;
        if !self.door.tells_kernel() || !matches!(file.kind, Kind::File(_)) {
            return Err(Failure::Kernel);
        }
        let name =
            self.door.modes.handed.give(file.node).map_err(|errno| Error::new(errno, "draw a name"))?;
        let oldest = self.client.given.lock().push(name);
        oldest.inspect(|oldest| self.door.modes.handed.take_back(*oldest));
        self.reply[..2].copy_from_slice(&name);
        Ok(())
    }

    fn file_status(&mut self) -> Done {
        let file = self.client.file(self.word(0))?;
        let stack = if file.handle().is_some() { &self.door.own } else { &self.door.stack };
        let attr = stack.getattr(self.caller(), file.node, file.handle())?;
        if attr.file_type() == libc::S_IFREG {
            self.door.may_serve(file.node)?;
        }
        self.put_attributes(0, &attr);
        Ok(())
    }

    fn status(&mut self) -> Done {
        let last = if self.word32(2)? as i32 & libc::AT_SYMLINK_NOFOLLOW != 0 { NO_FOLLOW } else { FOLLOW };
        let attr = {
            let target = self.walk(0, 0, last)?;
            let (node, attr) = target.existing()?;
            self.may_tell(node, attr)?;
            self.noted(node, attr)
        };
        self.put_attributes(0, &attr);
        Ok(())
    }

    fn access(&mut self) -> Done {
        let (mode, flags) = (self.word32(2)?, self.word32(3)? as i32);
        // The real ids may differ from those that this door knows.
        if mode > 7 || flags & !(libc::AT_SYMLINK_NOFOLLOW | libc::AT_EACCESS | libc::AT_EMPTY_PATH) != 0 {
            return fail(Errno::INVAL, "ask for such an access");
        }
        let last = if flags & libc::AT_SYMLINK_NOFOLLOW != 0 { NO_FOLLOW } else { FOLLOW };
        let target = self.walk(0, 0, last)?;
        let (node, attr) = target.existing()?;
        let attr = &self.noted(node, attr);
        let special = !matches!(attr.file_type(), libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK);
        if mode & WRITE != 0 && !special && (self.client.peer.read_only || self.door.read_only) {
            return fail(Errno::ROFS, "write through a read-only mount");
        }
        permissions::check(
            &*self.client.door.stack,
            self.caller(),
            node,
            attr,
            mode & (READ | WRITE | EXECUTE),
        )
    }

    fn read_link(&mut self) -> Done {
        let text = {
            let target = self.walk(0, 0, NO_FOLLOW)?;
            let (node, attr) = target.existing()?;
            if attr.file_type() != libc::S_IFLNK {
                return fail(Errno::INVAL, "read a link that is none");
            }
            self.client.door.stack.readlink(self.caller(), node)?
        };
        self.put(&text)?;
        self.reply[0] = text.len() as u64;
        Ok(())
    }

    fn window(&mut self) -> Done {
        let file = self.client.file(self.word(0))?;
        let handle = file.file()?;
        if !file.flags.contains(OpenFlags::READ) {
            return fail(Errno::BADF, "read a file that is open for writing only");
        }
        self.door.may_serve(file.node)?;
        let (offset, wanted) = (self.word(1), self.word(2));
        let buffer = &mut self.desk.bytes[..];
        let name = self.door.windows.fetch((file.node, handle), &file.window, (offset, wanted), buffer)?;
        self.reply[window::NAME] = name[0];
        self.reply[window::NAME_MORE] = name[1];
        Ok(())
    }
}

/// What became of writes that had returned, once.
pub(super) fn told_late(file: &OpenFile) -> Done {
    match file.late.take() {
        0 => Ok(()),
        errno => fail(Errno::from_raw_os_error(errno as i32), "write what was held"),
    }
}

/// What access(2) calls the access, and how the layers are to open.
pub(super) fn access_of(flags: i32) -> (u32, OpenFlags) {
    let (wanted, mut open) = match flags & libc::O_ACCMODE {
        libc::O_RDONLY => (READ, OpenFlags::READ),
        libc::O_WRONLY => (WRITE, OpenFlags::WRITE),
        _ => (READ | WRITE, OpenFlags::READ | OpenFlags::WRITE),
    };
    for (bits, flag) in [
        (libc::O_NOATIME, OpenFlags::NOATIME),
        (libc::O_APPEND, OpenFlags::APPEND),
        (libc::O_SYNC, OpenFlags::SYNC),
        (libc::O_DSYNC, OpenFlags::DSYNC),
    ] {
        open.set(flag, flags & bits == bits);
    }
    (wanted, open)
}

pub fn attributes(attr: &Attr) -> Attributes {
    let btime = attr.btime.unwrap_or_default();
    Attributes {
        ino: attr.ino,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        size_bytes: attr.size_bytes,
        blocks_512: attr.blocks_512,
        blksize_bytes: attr.blksize_bytes,
        atime_ns: attr.atime.nanoseconds,
        mtime_ns: attr.mtime.nanoseconds,
        ctime_ns: attr.ctime.nanoseconds,
        btime_ns: btime.nanoseconds,
        has_btime: attr.btime.is_some(),
        atime_s: attr.atime.seconds,
        mtime_s: attr.mtime.seconds,
        ctime_s: attr.ctime.seconds,
        btime_s: btime.seconds,
    }
}
