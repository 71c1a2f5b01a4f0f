//! Read-ahead by directory: who opens small files in the order in which their directory lists them will open the next ones, too. These are put where
//! all programs of its rights find them, after the request was answered, so that a search through a tree asks once for many files.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use polytropo_libservices::{Name, NodeId};
use polytropo_wire::answers::bytes::BYTES_MAX;
use polytropo_wire::listing::{COVERED, UNTOLD, View};

use super::client::OpenFile;
use super::operations::Work;
use super::permissions;
use super::walk::{Failure, Held};
use crate::epochs::Notes;

/// Files that are read ahead at a time: at first, and at the most.
const FILES_FIRST: usize = 4;
const FILES_MAX: usize = 32;
/// And their bytes.
const TOTAL_BYTES_MAX: u64 = 128 << 10;
/// Entries of a listing that are looked at for it.
const ENTRIES_MAX: usize = 256;
/// Others wait for the thread meanwhile.
const TIME_MAX: Duration = Duration::from_micros(300);

/// A small file that a program was given.
pub struct Given {
    pub directory: NodeId,
    pub directory_ino: u64,
    pub name: Box<Name>,
}

/// In which order one program opens small files.
#[derive(Default)]
pub struct Order(Mutex<Run>);

/// A part of a listing: from the file that was asked for last to the next one that is not there.
#[derive(Default)]
struct Run {
    directory: u64,
    from: usize,
    next: usize,
    /// How many files were read ahead the last time; 0: there is no order.
    files: usize,
}

/// A file that is listed next.
struct Next {
    at: usize,
    ino: u64,
    name: Box<Name>,
}

impl Run {
    /// What is to be read ahead after `name` was asked for.
    fn plan(&mut self, listing: &View<'_, [u64]>, name: &[u8]) -> Vec<Next> {
        let Some(asked) = listing.find(name) else { return Vec::new() };
        let known = self.directory == listing.ino();
        if known && (self.from..self.next).contains(&asked.at()) {
            // Too large to be read ahead, or changed since.
            return Vec::new();
        }
        let goes_on = if known {
            self.next == asked.at()
        } else {
            // From one directory to another.
            self.files > 0 && next_file(listing, listing.first()) == Some(asked.at())
        };
        self.files = if goes_on { (self.files * 2).clamp(FILES_FIRST, FILES_MAX) } else { 0 };
        (self.directory, self.from) = (listing.ino(), asked.at());
        let (mut at, mut bytes, mut names) = (asked.end(), 0, Vec::new());
        for _ in 0..ENTRIES_MAX {
            let Some(entry) = listing.entry(at) else { break };
            if entry.mode() & libc::S_IFMT == libc::S_IFREG {
                if names.len() >= self.files {
                    break;
                }
                let size_bytes = entry.attributes().size_bytes;
                if size_bytes <= BYTES_MAX as u64 && entry.flags() & (UNTOLD | COVERED) == 0 {
                    bytes += size_bytes;
                    if bytes > TOTAL_BYTES_MAX {
                        break;
                    }
                    let words = entry.name_bytes().div_ceil(8);
                    let mut name: Vec<u8> =
                        (0..words).flat_map(|n| entry.name_word(n).to_le_bytes()).collect();
                    name.truncate(entry.name_bytes());
                    let name = Name::new(&name).ok().map(Name::to_boxed);
                    names.extend(name.map(|name| Next { at, ino: entry.ino(), name }));
                }
            }
            at = entry.end();
        }
        self.next = at;
        names
    }
}

/// Where the first regular file from there on stands.
fn next_file(listing: &View<'_, [u64]>, mut at: usize) -> Option<usize> {
    for _ in 0..ENTRIES_MAX {
        let entry = listing.entry(at)?;
        if entry.mode() & libc::S_IFMT == libc::S_IFREG {
            return Some(at);
        }
        at = entry.end();
    }
    None
}

/// What became of a file that was to be brought.
enum Brought {
    There,
    /// It is not such a file, or no longer.
    NotSuch,
    No,
}

impl Work<'_> {
    /// After the answer: brings what the program may ask for next.
    pub fn read_ahead(&mut self, given: &Given) {
        let Some(listing) = self.door.listings.peek(given.directory_ino) else { return };
        // To look at a file takes back somebody's permission to write it without waiting.
        let undisturbed = self.door.grants.as_ref().is_none_or(|grants| !grants.any());
        if self.client.answers.is_none() || !self.may_always_read() || !undisturbed {
            return;
        }
        // Names of files here are for those alone who may list them.
        if let Err(failure) = self.may_list(given.directory) {
            if let Failure::Error(error) = failure {
                log::trace!("nothing is read ahead: {error}");
            }
            return;
        }
        let names = self.client.order.0.lock().plan(&View::new(&listing[..]), given.name.as_bytes());
        let begun = Instant::now();
        for next in names {
            if begun.elapsed() > TIME_MAX {
                self.client.order.0.lock().next = next.at;
                return;
            }
            match self.bring(given.directory, &next) {
                Ok(Brought::No) => {
                    // There is no room, or somebody changes files.
                    *self.client.order.0.lock() = Run::default();
                    return;
                }
                // Who asks for it hears of it.
                Err(Failure::Error(error)) => log::trace!("a file is not read ahead: {error}"),
                Ok(_) | Err(Failure::Kernel) => {}
            }
        }
    }

    fn may_list(&self, directory: NodeId) -> Result<(), Failure> {
        let attr = self.door.stack.getattr(self.caller(), directory, None)?;
        permissions::check(&*self.door.stack, self.caller(), directory, &attr, permissions::READ)
    }

    fn bring(&mut self, directory: NodeId, next: &Next) -> Result<Brought, Failure> {
        let notes = Notes::new(&self.door.epochs);
        notes.expect(next.ino);
        self.notes = Some(notes);
        let found = self.door.stack.lookup(self.caller(), directory, &next.name)?;
        let found = Held::of(&*self.client.door.stack, found);
        let attr = found.attr.clone();
        let small = attr.file_type() == libc::S_IFREG && attr.size_bytes <= BYTES_MAX as u64;
        if !small || attr.ino != next.ino || self.client.covered.contains(&found.node) {
            return Ok(Brought::NotSuch);
        }
        if self.is_shared(&attr) {
            return Ok(Brought::There);
        }
        let (kind, flags, ticket) = self.open_node(found.node, &attr, libc::O_RDONLY)?;
        let file = OpenFile::new(self.door.clone(), found.into_node().0, kind, flags, ticket);
        let Some(handle) = file.handle().filter(|_| self.door.immutable || self.stays_as_tagged(&file))
        else {
            return Ok(Brought::NotSuch);
        };
        let Some(bytes) = self.desk.bytes.get_mut(..attr.size_bytes as usize) else {
            return Ok(Brought::NotSuch);
        };
        let count = self.client.door.stack.read(&self.client.peer.caller, file.node, handle, 0, bytes)?;
        if count as u64 == attr.size_bytes {
            let shared = self.share_bytes(&attr, &self.desk.bytes[..count]);
            return Ok(if shared { Brought::There } else { Brought::No });
        }
        Ok(Brought::NotSuch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polytropo_wire::listing::{ENTRY_WORDS, HEAD_WORDS, hash, name_words};

    /// A directory with these names, modes and sizes.
    fn listing(ino: u64, entries: &[(&str, u32, u64)]) -> Vec<u64> {
        let mut words = vec![0; HEAD_WORDS];
        (words[1], words[2]) = (ino, (entries.len() as u64) << 32);
        let mut places = Vec::new();
        for (name, mode, size_bytes) in entries {
            let at = words.len();
            places.push((hash(name.as_bytes()), at));
            words.resize(at + ENTRY_WORDS, 0);
            words[at + 2] = (name.len() as u64) << 32;
            let told = polytropo_wire::message::Attributes {
                ino: at as u64,
                mode: *mode,
                size_bytes: *size_bytes,
                ..Default::default()
            };
            words[at + 4..at + ENTRY_WORDS].copy_from_slice(&told.to_words());
            words.extend(name_words(name.as_bytes()));
        }
        super::super::listings::put_index(&places, &mut words);
        words[0] = words.len() as u64;
        words
    }

    fn files(ino: u64, count: usize) -> (Vec<u64>, Vec<String>) {
        let names: Vec<_> = (0..count).map(|n| format!("file-{n:03}")).collect();
        let entries: Vec<_> = names.iter().map(|name| (name.as_str(), libc::S_IFREG | 0o644, 100)).collect();
        (listing(ino, &entries), names)
    }

    fn planned(run: &mut Run, listing: &[u64], name: &str) -> Vec<String> {
        let names = run.plan(&View::new(listing), name.as_bytes());
        names.iter().map(|next| String::from_utf8_lossy(next.name.as_bytes()).into_owned()).collect()
    }

    #[test]
    fn a_walk_in_order_asks_once_for_many_files() {
        let (first, names) = files(7, 200);
        let (mut run, mut there, mut asked) = (Run::default(), Vec::new(), 0);
        for name in &names {
            if !there.contains(name) {
                asked += 1;
                there.extend(planned(&mut run, &first, name));
            }
        }
        assert!(asked <= 2 + 3 + 200 / FILES_MAX, "{asked} questions");
        // The next directory begins as this one ended.
        let (second, names) = files(8, 40);
        assert_eq!(planned(&mut run, &second, &names[0]), names[1..=FILES_MAX]);
        assert_eq!(planned(&mut run, &second, &names[FILES_MAX + 1]), names[FILES_MAX + 2..]);
    }

    #[test]
    fn nothing_is_read_ahead_of_who_goes_by_no_order() {
        let (words, names) = files(7, 100);
        let mut run = Run::default();
        for n in [3usize, 50, 20, 99, 0, 7, 1_000] {
            let name = names.get(n).map_or("missing", String::as_str);
            assert!(planned(&mut run, &words, name).is_empty());
        }
        // Nor at the beginning of another directory.
        let (other, names) = files(8, 100);
        assert!(planned(&mut run, &other, &names[0]).is_empty());
        assert_eq!(planned(&mut run, &other, &names[1]), names[2..2 + FILES_FIRST]);
    }

    #[test]
    fn what_is_large_or_no_file_is_passed_over() {
        let file = libc::S_IFREG | 0o644;
        let words = listing(
            7,
            &[
                ("a", file, 10),
                ("directory", libc::S_IFDIR, 10),
                ("b", file, 10),
                ("large", file, BYTES_MAX as u64 + 1),
                ("c", file, 10),
                ("link", libc::S_IFLNK, 10),
                ("d", file, BYTES_MAX as u64),
            ],
        );
        let mut run = Run::default();
        assert!(planned(&mut run, &words, "a").is_empty());
        assert_eq!(planned(&mut run, &words, "b"), ["c", "d"]);
        // It was passed over, and the order goes on behind it.
        assert!(planned(&mut run, &words, "large").is_empty());
    }

    #[test]
    fn bytes_are_bounded_and_any_words_are_taken() {
        let names: Vec<_> = (0..100).map(|n| format!("{n:03}")).collect();
        let size = BYTES_MAX as u64;
        let entries: Vec<_> = names.iter().map(|name| (name.as_str(), libc::S_IFREG, size)).collect();
        let words = listing(7, &entries);
        let mut run = Run { files: FILES_MAX, ..Run::default() };
        assert_eq!(planned(&mut run, &words, "000").len() as u64, TOTAL_BYTES_MAX / size);
        let mut random = 1u64;
        for _ in 0..2_000 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let mut broken = words.clone();
            let place = (random >> 33) as usize % broken.len();
            broken[place] = random;
            let names = Run { files: 8, ..Run::default() }.plan(&View::new(&broken), b"001");
            assert!(names.len() <= FILES_MAX);
        }
    }
}
