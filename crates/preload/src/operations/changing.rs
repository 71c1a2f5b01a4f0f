//! Names that come, go and move: made, removed and renamed at the service, by one request each.
//!
//! Renaming and removing directories is the kernel's: who has one open, or for a working directory, asks the kernel where it is, and whether
//! it is there still.

use polytropo_client::{Amid, At, Channel, Error, PATH_BYTES_MAX, Result};

use super::amid::{Found, Made};
use super::process::LINK;
use super::{amid, directories, names, standins, writing};
use crate::hooks::Answer;
use crate::sys::{self, AT_FDCWD, nr};
use crate::trace::{self, Counter};

const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
const RENAME_EXCHANGE: usize = 2;

/// A name and where it begins, as the program gave them.
#[derive(Clone, Copy)]
struct Given {
    directory: usize,
    path: usize,
}

/// The same for the service.
struct Placed<'a> {
    at: At,
    path: &'a [u8],
    /// The directory that holds the name, if that is known; else 0.
    parent: u64,
}

enum Change {
    Mkdir(Given, u32),
    Unlink(Given),
    Symlink(usize, Given),
    Link(Given, Given, u32),
    Rename(Given, Given, u32),
}

impl Change {
    /// Of the name that is made or goes.
    fn path(&self) -> usize {
        match self {
            Self::Mkdir(given, _) | Self::Unlink(given) | Self::Symlink(_, given) => given.path,
            Self::Link(_, given, _) | Self::Rename(_, given, _) => given.path,
        }
    }

    /// Where it begins at an open directory, the way there may be an old one.
    fn is_by_one_path(&self) -> bool {
        match self {
            Self::Mkdir(given, _) | Self::Unlink(given) | Self::Symlink(_, given) => {
                given.directory as u32 == AT_FDCWD as u32
            }
            Self::Link(..) | Self::Rename(..) => false,
        }
    }
}

/// One of the calls that change names; None if the kernel has to do it.
#[inline]
pub fn answer(number: usize, arguments: &[usize; 6]) -> Option<Answer> {
    let change = change_of(number, arguments)?;
    if names::has_ended() {
        return None;
    }
    let Some(channel) = LINK.get() else {
        names::count_change(change.path());
        return None;
    };
    if !channel.keeps_answers() {
        return None;
    }
    if matches!(change, Change::Rename(..) | Change::Unlink(_))
        && let Some(table) = super::process::known_table()
    {
        // By their names, as long as they have those: should the service die, nobody knows others.
        standins::name_all(table);
    }
    let done = perform(channel, &change)?;
    trace::count(Counter::Request);
    match done {
        Ok(()) => Some(Answer::Done(0)),
        Err(Error::Errno(errno @ (ENOENT | EEXIST))) if change.is_by_one_path() => {
            Some(Answer::Done(-(errno as isize)))
        }
        // The kernel knows, or comes to the same; of several things that are wrong it tells the first.
        Err(Error::Errno(_) | Error::Kernel) => None,
        Err(Error::Gone) => {
            LINK.give_up(channel);
            None
        }
        Err(Error::GoneAmid(amid)) => {
            LINK.give_up(channel);
            Some(Answer::Asked(do_again(number, arguments, &change, amid)))
        }
    }
}

/// A service that went away may have done it before, since nothing forbade it: then the kernel says that it is there already, or gone.
#[cold]
fn do_again(number: usize, arguments: &[usize; 6], change: &Change, amid: Amid) -> isize {
    let call = || {
        // SAFETY: the program's own call.
        unsafe { sys::call(number, *arguments) }
    };
    // Though it be done, so that the kernel hears of it.
    let done = call();
    let (again, made) = match *change {
        Change::Unlink(..) | Change::Rename(..) => return if done == -(ENOENT as isize) { 0 } else { done },
        Change::Mkdir(name, mode) => (name, Made::Directory { mode: mode & !writing::umask().unwrap_or(0) }),
        Change::Symlink(text, name) => (name, Made::Symlink { text }),
        Change::Link(from, name, _) => (name, Made::Link { from: (from.directory, from.path) }),
    };
    if done != -(EEXIST as isize) {
        return done;
    }
    let name = (again.directory, again.path);
    match (amid, amid::found(name, made, amid)) {
        (Amid::Done { .. }, _) | (_, Found::Ours(_)) => 0,
        (_, Found::Half) if amid::remove(name, made) => call(),
        (_, Found::Half | Found::Others) => done,
    }
}

fn change_of(number: usize, arguments: &[usize; 6]) -> Option<Change> {
    let given = |directory: usize, path: usize| Given { directory, path };
    let here = |path: usize| given(AT_FDCWD, path);
    let [a, b, c, d, e, _] = *arguments;
    Some(match number {
        nr::MKDIR => Change::Mkdir(here(a), b as u32),
        nr::MKDIRAT => Change::Mkdir(given(a, b), c as u32),
        nr::UNLINK => Change::Unlink(here(a)),
        nr::UNLINKAT if c as u32 == 0 => Change::Unlink(given(a, b)),
        nr::SYMLINK => Change::Symlink(a, here(b)),
        nr::SYMLINKAT => Change::Symlink(a, given(b, c)),
        nr::LINK => Change::Link(here(a), here(b), 0),
        nr::LINKAT if e == 0 => Change::Link(given(a, b), given(c, d), 0),
        nr::RENAME => Change::Rename(here(a), here(b), 0),
        nr::RENAMEAT => Change::Rename(given(a, b), given(c, d), 0),
        // Twice done it is undone, should the service die of it.
        nr::RENAMEAT2 if e & RENAME_EXCHANGE == 0 => Change::Rename(given(a, b), given(c, d), e as u32),
        _ => return None,
    })
}

fn perform(channel: &Channel, change: &Change) -> Option<Result<()>> {
    let (mut first, mut second) = ([0; PATH_BYTES_MAX], [0; PATH_BYTES_MAX]);
    Some(match *change {
        Change::Mkdir(given, mode) => {
            let placed = place(channel, given, &mut first)?;
            let umask = writing::umask()?;
            channel.names([placed.parent, 0]).mkdir(placed.at, placed.path, mode & 0o7777, umask)
        }
        Change::Unlink(given) => {
            let placed = place(channel, given, &mut first)?;
            channel.names([placed.parent, 0]).unlink(placed.at, placed.path, 0)
        }
        Change::Symlink(text, given) => {
            let placed = place(channel, given, &mut first)?;
            channel.names([placed.parent, 0]).symlink(names::read_path(text)?, placed.at, placed.path)
        }
        Change::Link(from, to, flags) => {
            let (from, to) = (place(channel, from, &mut first)?, place(channel, to, &mut second)?);
            channel.names([from.parent, to.parent]).link((from.at, from.path), (to.at, to.path), flags)
        }
        Change::Rename(from, to, flags) => {
            let (from, to) = (place(channel, from, &mut first)?, place(channel, to, &mut second)?);
            channel.names([from.parent, to.parent]).rename((from.at, from.path), (to.at, to.path), flags)
        }
    })
}

fn place<'a>(channel: &Channel, given: Given, buffer: &'a mut [u8; PATH_BYTES_MAX]) -> Option<Placed<'a>> {
    let path = names::read_path(given.path)?;
    if path.first() == Some(&b'/') || given.directory as u32 == AT_FDCWD as u32 {
        let (at, path) = names::place(channel, given.directory, path)?;
        return Some(Placed { at, path, parent: 0 });
    }
    // The way to an open directory may be another by now, but its inode is not.
    if path.contains(&b'/') || matches!(path, b"." | b"..") {
        return None;
    }
    let parent = directories::inode(channel, given.directory)?;
    let bytes = channel.path_below(parent, path, buffer)?;
    Some(Placed { at: At::Root, path: &buffer[..bytes], parent })
}
