//! Requests for whole directories.

use polytropo_libservices::{Attr, Capabilities, Errno};
use polytropo_wire::channel::AREA_BYTES;
use polytropo_wire::epochs::EVERYTHING;
use polytropo_wire::listing::{COVERED, View};
use polytropo_wire::message::{Attributes, PATH_BYTES_MAX, listed};
use zerocopy::IntoBytes;

use super::listings::{self, Listing};
use super::operations::{Done, FOLLOW, Work};
use super::permissions::{self, EXECUTE, READ};
use super::walk::{Failure, fail};
use crate::epochs::Notes;

const AREA_WORDS: usize = AREA_BYTES / 8;

impl Work<'_> {
    pub(super) fn list(&mut self) -> Done {
        let Some(table) = self.door.epochs.table() else { return Err(Failure::Kernel) };
        let everything = table.sample(EVERYTHING);
        let listing = match self.list_known()? {
            Some(listing) => listing,
            None => self.list_by_walk()?,
        };
        let listing = self.with_covers(listing);
        let (_, sample) = View::new(&listing[..]).sample();
        let first = usize::try_from(self.word(2)).unwrap_or(usize::MAX);
        if first > 0 && self.word(3) != sample {
            // Another one than that of the part before.
            return Err(Failure::Kernel);
        }
        self.reply[listed::WORDS] = listing.len() as u64;
        self.reply[listed::SAMPLE] = sample;
        if first == 0
            && let Some(everything) = everything
            && let Some(position) = self.share_listing(&listing, everything)?
        {
            self.reply[listed::POSITION] = position;
            return Ok(());
        }
        let Some(rest) = listing.get(first..) else { return fail(Errno::INVAL, "list from such a place") };
        let part = &rest[..rest.len().min(AREA_WORDS)];
        self.put(part.as_bytes())?;
        self.reply[listed::HERE] = part.len() as u64;
        self.reply[listed::EVERYTHING] = everything.unwrap_or(u64::MAX);
        Ok(())
    }

    fn list_by_walk(&self) -> Result<Listing, Failure> {
        let target = self.walk(0, 0, FOLLOW)?;
        let (node, attr) = target.existing()?;
        if !attr.is_dir() {
            return fail(Errno::NOTDIR, "list what is no directory");
        }
        let (door, caller) = (&**self.door, self.caller());
        permissions::check(&*door.stack, caller, node, attr, READ)?;
        // What is in it is told, too.
        if permissions::check(&*door.stack, caller, node, attr, EXECUTE).is_err() {
            return Err(Failure::Kernel);
        }
        // What stands in the way may be gone soon.
        listings::list(door, caller, node, attr.ino).inspect_err(|_| {
            self.notes.iter().for_each(Notes::spoil);
        })
    }

    /// From the root through directories that were all listed before and have not changed since: nobody is asked. None: it has to be walked.
    fn list_known(&self) -> Result<Option<Listing>, Failure> {
        let Some(table) = self.door.epochs.table().filter(|_| self.word(0) == 0) else { return Ok(None) };
        let listings = &self.door.listings;
        let path = self.take(0, self.word(1), PATH_BYTES_MAX)?;
        let acls = self.door.stack.capabilities().contains(Capabilities::POSIX_ACLS);
        let Some(mut at) = listings.root().and_then(|root| listings.recall(root, table)) else {
            return Ok(None);
        };
        let allowed = |listing: &Listing, wanted: u32| {
            let attr = attr_of(&View::new(&listing[..]).attributes());
            permissions::check_without_acl(self.caller(), &attr, wanted, acls) == Some(true)
        };
        for name in path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")) {
            let Some(entry) = View::new(&at[..]).find(name).filter(|_| name != b"..") else {
                return Ok(None);
            };
            if !allowed(&at, EXECUTE) || self.client.covered_inos.contains(&entry.ino()) {
                return Ok(None);
            }
            let Some(next) = listings.recall(entry.ino(), table) else { return Ok(None) };
            at = next;
        }
        let whole = !listings::is_too_large(&at);
        Ok((whole && allowed(&at, READ | EXECUTE)).then_some(at))
    }

    /// Marks what something else is mounted on, as this program sees it.
    fn with_covers(&self, listing: Listing) -> Listing {
        let covered = &self.client.covered_inos;
        if covered.is_empty() {
            return listing;
        }
        let view = View::new(&listing[..]);
        let (mut at, mut places) = (view.first(), Vec::new());
        while let Some(entry) = view.entry(at) {
            if covered.contains(&entry.ino()) {
                places.push(entry.at());
            }
            at = entry.end();
        }
        if places.is_empty() {
            return listing;
        }
        let mut words = listing.to_vec();
        places.into_iter().for_each(|at| words[at + 2] |= COVERED << 48);
        words.into()
    }
}

/// What permissions are weighed by.
fn attr_of(told: &Attributes) -> Attr {
    let nothing = polytropo_libservices::Timestamp::default();
    Attr {
        ino: told.ino,
        mode: told.mode,
        nlink: told.nlink,
        uid: told.uid,
        gid: told.gid,
        rdev: told.rdev,
        size_bytes: told.size_bytes,
        blocks_512: told.blocks_512,
        blksize_bytes: told.blksize_bytes,
        atime: nothing,
        mtime: nothing,
        ctime: nothing,
        btime: None,
    }
}
