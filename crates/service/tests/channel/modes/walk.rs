//! One walk: events one after the other, and what has to hold after each.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use polytropo_client::{At, Channel, Error};
use serde_json::json;

use super::Setting;
use super::events::{Event, Side};
use super::holders::{Holder, View};
use super::rules::{self, File, Held, Way};
use crate::support::Site;

/// Closing is told the service a moment later.
const SETTLED_MAX: Duration = Duration::from_secs(10);

pub struct Ground<'a> {
    pub setting: Setting,
    pub image: &'a [u8],
    pub mnt: &'a Path,
    pub mirror: &'a Path,
    pub channel: Option<&'a Channel>,
}

/// What the rules say of the file of one name, beside what is.
struct Expected {
    files: Vec<File>,
    /// Which of them the name leads to.
    named: Option<usize>,
    /// As the sides' holders.
    held: Vec<Held>,
    passes: bool,
    asked: bool,
}

impl Expected {
    fn new(setting: Setting) -> Self {
        let file = File { of_image: setting.image, renewed: false };
        let asked = setting.passthrough || setting.channels;
        Self { files: vec![file], named: Some(0), held: Vec::new(), passes: setting.passthrough, asked }
    }

    /// `event` was done, with that outcome; `holders` are there now.
    fn follow(&mut self, event: Event, done: &io::Result<()>, holders: usize) {
        match (event, done) {
            (Event::CloseOldest | Event::CloseNewest, _) if !self.asked => {}
            (Event::CloseOldest, _) => drop(self.held.remove(0)),
            (Event::CloseNewest, _) => drop(self.held.pop()),
            (Event::Unlink, Ok(())) => self.named = None,
            (Event::RenameOver, Ok(())) => {
                self.named = Some(self.files.len());
                self.files.push(File::default());
            }
            _ => self.follow_open(event, done, holders),
        }
    }

    fn follow_open(&mut self, event: Event, done: &io::Result<()>, holders: usize) {
        let by_old_inode = matches!(event, Event::ReopenRead | Event::ReopenWrite);
        let Some(number) = (if by_old_inode { Some(0) } else { self.named }) else { return };
        let opening = rules::opens(event);
        // A program that cannot be run was opened; a file that is being run is not opened to be written.
        if done.is_err() && opening != Some(rules::Opening::FuseRead) {
            return;
        }
        let file = &mut self.files[number];
        if done.is_ok() && rules::takes_from_image(event) {
            file.of_image = false;
        }
        let Some(opening) = opening.filter(|_| self.asked) else { return };
        let way = rules::decide(opening, (number, file), &mut self.held, self.passes, by_old_inode);
        if holders > self.held.len() {
            let writes = !matches!(opening, rules::Opening::FuseRead | rules::Opening::ChannelRead);
            // A map of what is passed through holds the layer's file, and is told to nobody.
            let maps = matches!(event, Event::MapPrivate | Event::MapShared);
            self.held.push(Held {
                file: number,
                way,
                writes,
                runs: event == Event::Execute,
                open: !(maps && way == Way::Passthrough),
                // What is both direct and passed through is read by requests.
                sees_image: way == Way::Passthrough && event != Event::ReadDirect,
                left_behind: false,
            });
        }
    }

    /// Whether that is why the mount refuses.
    fn is_bound(&self, ours: &io::Error) -> bool {
        let bound = |held: &Held| held.file == 0 && held.open && held.way == Way::Passthrough;
        let direct = |held: &Held| held.file == 0 && held.way == Way::Direct && self.files[0].renewed;
        ours.raw_os_error() == Some(libc::ETXTBSY) && self.held.iter().any(|held| bound(held) || direct(held))
    }

    /// Whether it is read by requests, past what the kernel has cached for those who came after it.
    fn reads_apart(&self, holder: usize) -> bool {
        self.held.get(holder).is_some_and(|held| held.way == Way::Passthrough && !held.sees_image)
    }

    fn ways(&self) -> Vec<Way> {
        let mut ways: Vec<_> = self.held.iter().filter(|held| held.open).map(|held| held.way).collect();
        ways.sort();
        ways
    }

    fn sees_image(&self, holder: usize) -> bool {
        self.held.get(holder).is_some_and(|held| held.sees_image)
    }
}

/// What the keeper lists.
fn listed(site: &mut Site) -> Vec<Way> {
    let told = site.order(&json!({"op": "open_files", "mount": 1}));
    let files = told["open_files"].as_array().expect("a list");
    let way = |bytes: &str| match bytes {
        "passthrough" => Way::Passthrough,
        "cached" => Way::Cached,
        "kernel" => Way::Kernel,
        "direct" => Way::Direct,
        "window" => Way::Window,
        other => panic!("an open file's bytes go {other}"),
    };
    let mut ways: Vec<_> = files
        .iter()
        .filter(|file| file["kind"] == "file")
        .map(|file| way(file["bytes"].as_str().expect("a word")))
        .collect();
    ways.sort();
    ways
}

fn settle(site: &mut Site, expected: &Expected, what: &dyn Fn() -> String) {
    let deadline = Instant::now() + SETTLED_MAX;
    loop {
        let (found, wanted) = (listed(site), expected.ways());
        if found == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{}: the rules say {wanted:?}, and the service {found:?}", what());
        std::thread::yield_now();
    }
}

/// Where the host refuses (ETXTBSY) and the mount does not, for reasons that are known. The walk ends there.
fn excused(event: Event, expected: &Expected, theirs: &io::Error) -> bool {
    let apart =
        |held: &Held| held.left_behind || (held.way == Way::Direct && expected.files[held.file].renewed);
    let why = |held: &Held| {
        // A program runs from, or somebody writes by, an inode of the kernel that another one has replaced.
        (held.runs && held.left_behind) || (held.writes && event == Event::Execute && apart(held))
            // The kernel does not know who writes through a channel.
            || (held.writes && event == Event::Execute && held.way == Way::Window)
    };
    theirs.raw_os_error() == Some(libc::ETXTBSY) && expected.held.iter().any(why)
}

/// Where the mount refuses (ETXTBSY) and the host does not: to write by an inode of the kernel that is bound to the image's file; channels
/// come there when the kernel takes the file over. The walk ends there.
fn busy(event: Event, expected: &Expected, ours: &io::Error) -> bool {
    use Event::{ChannelWrite, CutHeld, ReopenWrite, WriteHeld};
    matches!(event, ReopenWrite | WriteHeld | CutHeld | ChannelWrite) && expected.is_bound(ours)
}

pub fn walk(site: &mut Site, ground: &Ground<'_>, name: &str, order: &[Event]) {
    let mut ours = Side::new(ground.mnt, name, ground.channel);
    let mut theirs = Side::new(ground.mirror, name, None);
    let mut expected = Expected::new(ground.setting);
    let ino = ours.metadata().expect("a file").ino();
    for (step, event) in order.iter().enumerate() {
        let what = || format!("{name} {order:?} after {event:?} (step {step})");
        if event.wants_holder() && ours.holders.is_empty() {
            continue;
        }
        let done = ours.act(*event, step as u8);
        let beside = theirs.act(*event, step as u8);
        match (&done, &beside) {
            (Ok(()), Err(error)) if excused(*event, &expected, error) => return,
            (Err(error), Ok(())) if busy(*event, &expected, error) => return,
            _ => assert_eq!(errno(&done), errno(&beside), "{}: ours and theirs", what()),
        }
        assert_eq!(ours.holders.len(), theirs.holders.len(), "{}", what());
        expected.follow(*event, &done, ours.holders.len());
        if expected.asked {
            settle(site, &expected, &what);
        }
        if !compare(ground, &mut ours, &mut theirs, &expected, &what) {
            return;
        }
        if let (Some(found), Some(0)) = (ours.metadata(), expected.named) {
            assert_eq!(found.ino(), ino, "{}: the inode's number", what());
        }
    }
    let what = || format!("{name} {order:?} in the end");
    compare_by_name(ground, &ours, &theirs, name, &what);
    ours.holders.clear();
    theirs.holders.clear();
    let what = || format!("{name} {order:?} when all is closed");
    compare_by_name(ground, &ours, &theirs, name, &what);
    expected.held.clear();
    if expected.asked {
        settle(site, &expected, &what);
    }
}

fn errno(done: &io::Result<()>) -> Option<i32> {
    done.as_ref().err().map(|error| error.raw_os_error().unwrap_or(-1))
}

/// Each holder sees what the one beside it sees. False where that cannot be told any more (as `busy`).
fn compare(
    ground: &Ground<'_>,
    ours: &mut Side<'_>,
    theirs: &mut Side<'_>,
    expected: &Expected,
    what: &dyn Fn() -> String,
) -> bool {
    let mapped = theirs.holders.iter().any(Holder::is_written_map);
    for (at, (our, their)) in ours.views().into_iter().zip(theirs.views()).enumerate() {
        let our = match our {
            Err(error) if expected.is_bound(&error) => return false,
            seen => seen.unwrap_or_else(|error| panic!("{}: holder {at}: {error}", what())),
        };
        let their = their.expect("look at the host's file");
        let (Some(our), Some(their)) = (our, their) else { continue };
        // What is written to a map goes to the service later.
        if mapped && expected.reads_apart(at) {
            continue;
        }
        let wanted = match expected.sees_image(at) {
            true => View { size_bytes: their.size_bytes, ..View::of(ground.image) },
            false => their,
        };
        assert!(our == wanted, "{}: holder {at} sees {}, not {}", what(), told(&our), told(&wanted));
    }
    let (our, their) = (ours.metadata(), theirs.metadata());
    let facts = |found: &std::fs::Metadata| (found.len(), found.mode());
    assert_eq!(our.as_ref().map(facts), their.as_ref().map(facts), "{}: size and mode by name", what());
    true
}

fn compare_by_name(
    ground: &Ground<'_>,
    ours: &Side<'_>,
    theirs: &Side<'_>,
    name: &str,
    what: &dyn Fn() -> String,
) {
    let wanted = theirs.content();
    let seen = ours.content();
    assert!(
        seen == wanted,
        "{}: by name {:?}, not {:?}",
        what(),
        seen.map(|b| b.len()),
        wanted.map(|b| b.len())
    );
    let Some(channel) = ground.channel else { return };
    match channel.open(At::Root, name.as_bytes(), libc::O_RDONLY as u32, 0, 0) {
        Err(Error::Kernel) => {}
        Err(Error::Errno(errno)) => {
            assert_eq!((errno, wanted), (libc::ENOENT, None), "{}: through the channel", what());
        }
        Err(error) => panic!("{}: the channel answers {error:?}", what()),
        Ok(opened) => {
            let mut bytes = vec![0; ground.image.len() + 4096];
            match channel.pread(opened.file, &mut bytes, 0) {
                Err(Error::Kernel) => {}
                count => {
                    bytes.truncate(count.expect("read through the channel"));
                    assert!(Some(bytes) == wanted, "{}: through the channel", what());
                }
            }
            channel.close(opened.file).expect("close through the channel");
        }
    }
}

/// A view in a few words: which pages are there, and the bytes that walks write.
fn told(view: &View) -> String {
    let pages: Vec<_> = view.pages.iter().map(|page| page.as_ref().map(Vec::len)).collect();
    let first = view.pages.first().cloned().flatten().unwrap_or_default();
    format!("{:?}, {:?}, {:?}", view.size_bytes, pages, first.get(298..310))
}
