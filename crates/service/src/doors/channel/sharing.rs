//! What was looked up for one program, put where all programs with its rights read it.

use polytropo_libservices::Attr;
use polytropo_wire::answers::bytes::{BYTES_MAX, head};
use polytropo_wire::answers::{Kind, New};
use polytropo_wire::listing::{View, name_words};
use polytropo_wire::message::PATH_BYTES_MAX;

use super::listings::Listing;
use super::operations::{Work, attributes};
use super::walk::Failure;

impl Work<'_> {
    /// Where a listing lies now; None if there is no room, or the program wants it for itself.
    pub(super) fn share_listing(&self, listing: &Listing, everything: u64) -> Result<Option<u64>, Failure> {
        let for_itself = self.word(0) != 0 || self.word(4) != 0;
        let Some(answers) = self.client.answers.as_ref().filter(|_| !for_itself) else { return Ok(None) };
        let path = self.take(0, self.word(1), PATH_BYTES_MAX)?;
        let ino = View::new(&listing[..]).ino();
        Ok(answers.put(&New { kind: Kind::Listing, ino, everything, path: &path, payload: listing }))
    }

    /// Whether programs of the same rights find the file's bytes already. `attr` was noted.
    pub(super) fn is_shared(&self, attr: &Attr) -> bool {
        let (Some(answers), Some(notes)) = (&self.client.answers, &self.notes) else { return false };
        let (Some(everything), Some(sample)) = (notes.everything(), notes.inode()) else { return false };
        answers.has_bytes(attr.ino, everything, sample)
    }

    /// All bytes of a small file that this program may read and is just being told. Who finds them has no open file. False if they were not put there.
    pub(super) fn share_bytes(&self, attr: &Attr, bytes: &[u8]) -> bool {
        let shares = bytes.len() <= BYTES_MAX && self.may_always_read();
        let Some(answers) = self.client.answers.as_ref().filter(|_| shares) else { return false };
        let Some(notes) = self.notes.as_ref().filter(|notes| notes.tag().is_good()) else { return false };
        let (Some(everything), Some(sample)) = (notes.everything(), notes.inode()) else { return false };
        let mut payload = head(sample, bytes.len(), &attributes(attr)).to_vec();
        payload.extend(name_words(bytes));
        // Where there is no room it is asked for again.
        let new = New { kind: Kind::Bytes, ino: attr.ino, everything, path: b"", payload: &payload };
        answers.put(&new).is_some()
    }
}
