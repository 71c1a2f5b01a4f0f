//! The keeper's end. It believes nothing: what makes no sense ends the worker.

use std::collections::HashMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::io::{Errno, Result, retry_on_intr};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use super::recovery::{Recovered, recover};
use super::{APPENDS, CHANNEL, CHANNEL_GONE, MESSAGE_BYTES, Message, PERMIT, PERMIT_GONE, PERMITS_MAX};
use crate::held;

/// Bound on what is read at a time: more than a socket holds.
const MESSAGES_MAX: usize = 4096;
/// Channels of one door. Those of later programs are not known, and end with their worker without being told.
const CHANNELS_MAX: usize = 8192;

/// What one door's worker told.
pub struct Kept {
    socket: OwnedFd,
    /// By their numbers.
    channels: HashMap<u64, OwnedFd>,
    /// By their keys.
    permits: HashMap<u64, PermittedFile>,
    last: u64,
}

/// A file that may be written without waiting.
pub struct PermittedFile {
    channel: u64,
    pub number: u64,
    pub appends: bool,
    /// None where no file of the host has its bytes.
    pub file: Option<OwnedFd>,
}

impl Kept {
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, channels: HashMap::new(), permits: HashMap::new(), last: 0 }
    }

    /// Reads what has come. False for what makes no sense.
    pub fn look(&mut self) -> bool {
        for _ in 0..MESSAGES_MAX {
            match receive(&self.socket) {
                Ok(Some((message, file))) => {
                    if !self.heard(message, file) {
                        return false;
                    }
                }
                Ok(None) | Err(Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    fn heard(&mut self, message: Message, file: Option<OwnedFd>) -> bool {
        let [kind, number, channel, about] = message;
        // Numbers only grow, so that none is another one's later.
        let is_new = number > self.last;
        match kind {
            CHANNEL if is_new => {
                self.last = number;
                // Without a descriptor the keeper had none left.
                if let Some(memory) = file.filter(|_| self.channels.len() < CHANNELS_MAX) {
                    self.channels.insert(number, memory);
                }
                true
            }
            CHANNEL_GONE => {
                self.channels.remove(&number);
                self.permits.retain(|_, permit| permit.channel != number);
                true
            }
            PERMIT if is_new && self.permits.len() < 2 * PERMITS_MAX => {
                self.last = number;
                let sound = file.as_ref().is_none_or(|file| held::fits(file) == Ok(true));
                let (about, appends) = (about & !APPENDS, about & APPENDS != 0);
                self.permits.insert(number, PermittedFile { channel, number: about, appends, file });
                sound
            }
            PERMIT_GONE => {
                self.permits.remove(&number);
                true
            }
            _ => false,
        }
    }

    /// The worker is dead: what programs posted is applied, and they are told that their channels have ended.
    pub fn recover(mut self) -> Recovered {
        let mut recovered = Recovered::default();
        if !self.look() {
            recovered.damaged += 1;
        }
        for (number, memory) in &self.channels {
            let files = self.permits.values().filter(|permit| permit.channel == *number);
            recover(memory, &files.collect::<Vec<_>>(), &mut recovered);
        }
        recovered
    }
}

fn receive(socket: &OwnedFd) -> Result<Option<(Message, Option<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT)
    })?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.bytes != MESSAGE_BYTES || received.flags.contains(ReturnFlags::TRUNC) {
        return Err(Errno::PROTO);
    }
    let mut message = [0; 4];
    for (word, bytes) in message.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    Ok(Some((message, files.pop())))
}
