//! The layers of a union, what is held of them, and how their inode numbers become the union's.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::capabilities::Coherence;
use crate::error::{Errno, Result};
use crate::libservice::Libservice;
use crate::name::Name;
use crate::types::*;

/// Inode numbers of layers below this bound keep their value in the low bits.
const INO_BITS: u32 = 54;

/// One libservice that the union stands on.
pub struct Layer {
    pub service: Arc<dyn Libservice>,
    /// 0 for the upper; lowers count from 1 at the bottom, so that layers put on top change no number.
    pub ordinal: u16,
    /// Nobody changes it but (if at all) this union: what was found there may be remembered.
    pub settled: bool,
    /// Its files cannot be cloned into the upper: asked once.
    pub no_clones: AtomicBool,
}

impl Layer {
    pub fn new(service: Arc<dyn Libservice>, ordinal: u16) -> Arc<Self> {
        let settled = service.coherence() != Coherence::Shared;
        Arc::new(Self { service, ordinal, settled, no_clones: AtomicBool::new(false) })
    }

    pub fn is_upper(&self) -> bool {
        self.ordinal == 0
    }
}

/// An inode by the layer that it was first seen in; what `st_ino` is made of, for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    pub ordinal: u16,
    pub ino: u64,
}

impl Origin {
    /// The union's inode number: the ordinal in the high bits. Numbers too large for that are mixed into the upper half
    /// of the number space, where two meet with a probability of 2^-63.
    pub fn union_ino(self) -> u64 {
        if self.ino >> INO_BITS == 0 && u64::from(self.ordinal) < 1 << (63 - INO_BITS) {
            return u64::from(self.ordinal) << INO_BITS | self.ino;
        }
        let mut mixed = self.ino ^ u64::from(self.ordinal).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        1 << 63 | (mixed ^ mixed >> 31) >> 1
    }

    /// As it stands in `user.polytropo.origin` and in the names of the link index.
    pub fn text(self) -> String {
        format!("{}-{}", self.ordinal, self.ino)
    }

    pub fn parse(text: &[u8]) -> Option<Self> {
        let (ordinal, ino) = std::str::from_utf8(text).ok()?.split_once('-')?;
        let origin = Self { ordinal: ordinal.parse().ok()?, ino: ino.parse().ok()? };
        (origin.ordinal > 0).then_some(origin)
    }
}

/// An inode of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub ordinal: u16,
    pub node: NodeId,
}

/// One look-up of a layer's node, given back when dropped.
pub struct Held {
    pub layer: Arc<Layer>,
    pub node: NodeId,
}

impl Held {
    pub fn new(layer: &Arc<Layer>, node: NodeId) -> Self {
        Self { layer: layer.clone(), node }
    }

    pub fn service(&self) -> &dyn Libservice {
        &*self.layer.service
    }

    pub fn is_upper(&self) -> bool {
        self.layer.is_upper()
    }

    pub fn key(&self) -> Key {
        Key { ordinal: self.layer.ordinal, node: self.node }
    }

    /// What `name` stands for in this directory of this layer alone.
    pub fn find(&self, caller: &Caller, name: &Name) -> Result<Option<(Held, Attr)>> {
        match self.service().lookup(caller, self.node, name) {
            Ok(entry) => Ok(Some(self.take(entry))),
            Err(e) if e.is(Errno::NOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Becomes the owner of the look-up in an answer of this layer.
    pub fn take(&self, entry: Entry) -> (Held, Attr) {
        (Held::new(&self.layer, entry.node), entry.attr)
    }

    pub fn attr(&self, caller: &Caller) -> Result<Attr> {
        self.service().getattr(caller, self.node, None)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.service().forget(self.node, 1);
    }
}

/// An open file of a layer, closed when dropped.
pub struct OpenFile {
    pub held: Arc<Held>,
    pub handle: HandleId,
}

impl OpenFile {
    pub fn open(caller: &Caller, held: &Arc<Held>, flags: OpenFlags) -> Result<(Self, Opened)> {
        let opened = held.service().open(caller, held.node, flags)?;
        Ok((Self { held: held.clone(), handle: opened.handle }, opened))
    }

    pub fn service(&self) -> &dyn Libservice {
        self.held.service()
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.service().release(self.held.node, self.handle);
    }
}

/// An open directory of a layer, closed when dropped.
pub struct OpenDir {
    pub held: Arc<Held>,
    pub handle: HandleId,
}

impl OpenDir {
    pub fn open(caller: &Caller, held: &Arc<Held>) -> Result<Self> {
        let handle = held.service().opendir(caller, held.node)?;
        Ok(Self { held: held.clone(), handle })
    }

    pub fn read(&self, caller: &Caller, offset: u64, sink: &mut DirSink<'_>) -> Result<()> {
        self.held.service().readdir(caller, self.held.node, self.handle, offset, sink)
    }

    /// Feeds the whole directory.
    pub fn read_all(&self, caller: &Caller, mut each: impl FnMut(DirEntry<'_>)) -> Result<()> {
        let mut offset = 0;
        loop {
            let before = offset;
            self.read(caller, offset, &mut |entry| {
                offset = entry.next_offset;
                each(entry);
                true
            })?;
            if offset == before {
                return Ok(());
            }
        }
    }

    pub fn sync(&self, caller: &Caller, data_only: bool) -> Result<()> {
        self.held.service().fsyncdir(caller, self.held.node, self.handle, data_only)
    }
}

impl Drop for OpenDir {
    fn drop(&mut self) {
        self.held.service().releasedir(self.held.node, self.handle);
    }
}

/// Names of the union format.
pub mod names {
    use crate::error::{Errno, Error, Result};
    use crate::name::Name;

    const PREFIX: &[u8] = b".wh.";

    pub fn fixed(text: &'static str) -> &'static Name {
        Name::new(text.as_bytes()).expect("a name of the format is a name")
    }

    pub fn opaque() -> &'static Name {
        fixed(".wh..wh..opq")
    }

    pub fn work_area() -> &'static Name {
        fixed(".wh..wh.polytropo")
    }

    pub fn is_reserved(name: &Name) -> bool {
        name.as_bytes().starts_with(PREFIX)
    }

    /// The name that hides `name`. `None` when it would be too long for any layer to hold it.
    pub fn whiteout(name: &Name) -> Option<Box<Name>> {
        Name::new(&[PREFIX, name.as_bytes()].concat()).ok().map(Name::to_boxed)
    }

    /// What a whiteout hides. `None` for other names, the opaque marker and the work area among them.
    pub fn hidden_by(name: &Name) -> Option<&Name> {
        let hidden = name.as_bytes().strip_prefix(PREFIX)?;
        Name::new(hidden).ok().filter(|hidden| !is_reserved(hidden))
    }

    /// EINVAL for names that no union makes.
    pub fn check_new(name: &Name) -> Result<()> {
        if is_reserved(name) {
            return Err(Error::new(Errno::INVAL, "make a name that begins with .wh."));
        }
        Ok(())
    }
}

/// Extended attributes of the union format.
pub mod marks {
    pub const PREFIX: &[u8] = b"user.polytropo.";
    /// `ORDINAL-INO`: the lower inode that this one was copied from.
    pub const ORIGIN: &[u8] = b"user.polytropo.origin";
    /// The path in the lowers that this directory merges with, wherever it is now.
    pub const REDIRECT: &[u8] = b"user.polytropo.redirect";
    /// Entries of this directory may carry an origin.
    pub const IMPURE: &[u8] = b"user.polytropo.impure";
    /// How many names a file of the link index has in the union.
    pub const LINKS: &[u8] = b"user.polytropo.links";

    /// Which blocks of a file are the upper's own, and where the others are (`record`).
    pub const BLOCKS: &[u8] = b"user.polytropo.blocks";

    pub fn is_own(name: &[u8]) -> bool {
        name.starts_with(PREFIX)
    }
}
