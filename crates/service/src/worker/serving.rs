//! The stacks of a worker and the doors that serve them.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};

use log::info;
use parking_lot::Mutex;
use polytropo_libservices::stack::StackDocument;
use polytropo_libservices::{DoorId, Interner, build_with};
use serde_json::{Value, json};

use crate::doors::fuse::{FuseDoor, FuseOptions};
use crate::link::{Link, Report};

/// The keeper refuses longer ones.
const DOCUMENT_MAX_BYTES: usize = 4 << 20;

/// The doors that are open, by the keeper's numbers.
pub struct Doors {
    link: Arc<Link>,
    interner: Interner,
    open: Arc<Mutex<HashMap<u64, Arc<FuseDoor>>>>,
}

impl Doors {
    pub fn new(link: Arc<Link>) -> Self {
        Self { link, interner: Interner::default(), open: Arc::default() }
    }

    /// Builds a stack and serves it at a FUSE device. `descriptors`: the document, then the device.
    pub fn serve(
        &mut self,
        number: u64,
        descriptors: Vec<OwnedFd>,
        document_bytes: usize,
        roots: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let mut descriptors = descriptors.into_iter();
        let (Some(document), Some(device)) = (descriptors.next(), descriptors.next()) else {
            return Err("the keeper sent no document or no device".into());
        };
        let document = read_document(document, document_bytes)?;
        let stack = build_with(&document, roots, &self.interner)
            .map_err(|error| format!("the stack cannot be built: {error}"))?;
        let door = FuseDoor::start(device, stack, FuseOptions::default(), door_id(number)?)
            .map_err(|error| format!("the FUSE door cannot be opened: {error}"))?;
        let door = Arc::new(door);
        self.open.lock().insert(number, door.clone());
        self.watch(number, door).inspect_err(|_| {
            self.open.lock().remove(&number);
        })
    }

    /// Tells the keeper when the door ends.
    fn watch(&self, number: u64, door: Arc<FuseDoor>) -> Result<(), String> {
        let (link, open) = (self.link.clone(), Arc::downgrade(&self.open));
        let watch = move || {
            door.wait_ended();
            if let Some(open) = Weak::upgrade(&open) {
                open.lock().remove(&number);
            }
            // The stack's last writes are done before the keeper may hear of it.
            drop(door);
            info!("door {number} ended");
            // A keeper that is gone needs no report.
            let _ = link.send(&Report::Ended { door: number, problem: None }, &[]);
        };
        let spawned = std::thread::Builder::new().name(format!("door-{number}")).spawn(watch);
        spawned.map(drop).map_err(|error| format!("the door cannot be watched: {error}"))
    }

    pub fn statistics(&self, number: u64) -> Value {
        let door = self.open.lock().get(&number).cloned();
        door.and_then(|door| serde_json::to_value(door.statistics()).ok()).unwrap_or_else(|| json!({}))
    }
}

fn door_id(number: u64) -> Result<DoorId, String> {
    u32::try_from(number).map(DoorId).map_err(|_| "too many doors were opened".into())
}

fn read_document(descriptor: OwnedFd, bytes: usize) -> Result<StackDocument, String> {
    if bytes > DOCUMENT_MAX_BYTES {
        return Err("the stack document is too long".into());
    }
    let mut text = vec![0; bytes];
    File::from(descriptor)
        .read_exact_at(&mut text, 0)
        .map_err(|error| format!("the stack document cannot be read: {error}"))?;
    let text = String::from_utf8(text).map_err(|_| "the stack document is not UTF-8".to_owned())?;
    StackDocument::parse(&text).map_err(|error| error.to_string())
}
