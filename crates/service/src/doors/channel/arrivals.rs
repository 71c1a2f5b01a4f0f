//! Programs that come for a channel: what is made for each, and what it is told.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use polytropo_libservices::{Caller, NodeId};
use polytropo_wire::channel::TOTAL_BYTES;
use polytropo_wire::hello::{Verdict, Welcome};
use polytropo_wire::{VERSION, answers, epochs};
use rustc_hash::FxHashSet;
use rustix::event::{EventfdFlags, epoll};
use rustix::io::Errno;

use super::Shared;
use super::client::{Client, Peer};
use super::memory::ChannelMemory;
use super::walk::{Ground, Last, walk};
use crate::epochs::Table;

/// What the descriptors of a client are, in the low bits of an event's number.
pub const BELL: u64 = 0;
const SOCKET: u64 = 1;
const PROCESS: u64 = 2;
const MOUNTS: u64 = 3;

/// Tells why there is no channel.
pub fn refuse(socket: BorrowedFd<'_>, verdict: Verdict) {
    let bytes = Welcome::refusal(verdict).to_bytes();
    let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
    // Who is gone, or does not listen, misses nothing.
    let _ = rustix::net::send(socket, &bytes, flags);
}

/// Makes a channel over memory and tells the program.
pub fn open_channel(
    shared: &Arc<Shared>,
    shown: &OwnedFd,
    epoll: &OwnedFd,
    key: u64,
    peer: Peer,
    memory: rustix::io::Result<ChannelMemory>,
) -> rustix::io::Result<Client> {
    let made = memory.and_then(|memory| {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok((memory, bell))
    });
    let (memory, bell) = made.inspect_err(|_| refuse(peer.socket.as_fd(), Verdict::Failed))?;
    let kept = shared.custodian.as_ref().map(|custodian| custodian.channel(memory.descriptor()));
    let kept = kept.transpose().inspect_err(|_| refuse(peer.socket.as_fd(), Verdict::Failed))?;
    let covered = covered_nodes(shared, &peer);
    let client = Client::new((memory, kept), bell, peer, shared.clone(), covered);
    let entered = watch(epoll, key, &client).and_then(|()| greet(&client, shown));
    if let Err(errno) = entered {
        refuse(client.peer.socket.as_fd(), Verdict::Failed);
        for descriptor in client.descriptors() {
            // Those that were not added yet are not there.
            let _ = epoll::delete(epoll, descriptor);
        }
        return Err(errno);
    }
    Ok(client)
}

fn watch(epoll: &OwnedFd, key: u64, client: &Client) -> rustix::io::Result<()> {
    use epoll::EventFlags;
    let add = |descriptor: BorrowedFd<'_>, kind: u64, flags: EventFlags| {
        epoll::add(epoll, descriptor, epoll::EventData::new_u64(key << 2 | kind), flags)
    };
    add(client.bell.as_fd(), BELL, EventFlags::IN)?;
    add(client.peer.socket.as_fd(), SOCKET, EventFlags::IN | EventFlags::RDHUP)?;
    add(client.peer.process.as_fd(), PROCESS, EventFlags::IN)?;
    add(client.peer.mounts.as_fd(), MOUNTS, EventFlags::PRI)
}

fn greet(client: &Client, shown: &OwnedFd) -> rustix::io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let welcome = Welcome {
        version: VERSION,
        verdict: Verdict::Welcome as u32,
        channel_bytes: TOTAL_BYTES as u64,
        device: client.peer.device,
        mount_id: client.peer.mount_id,
        epochs_bytes: client.door.epochs.table().map_or(0, |_| epochs::TOTAL_BYTES as u64),
        answers_bytes: client.answers.as_ref().map_or(0, |_| answers::TOTAL_BYTES as u64),
    };
    let epochs = client.door.epochs.table().map(Table::descriptor);
    let answers = client.answers.as_ref().map(|answers| answers.descriptor());
    // Without one of them its number of bytes says so, and some descriptor holds the place.
    let descriptors = [
        client.memory.descriptor(),
        client.bell.as_fd(),
        shown.as_fd(),
        epochs.unwrap_or(shown.as_fd()),
        answers.unwrap_or(shown.as_fd()),
    ];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(5))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::MSGSIZE);
    }
    let bytes = welcome.to_bytes();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(&client.peer.socket, &[io::IoSlice::new(&bytes)], &mut control, flags).map(drop)
}

/// Nodes on which the process has something else mounted, each looked up once, and their inodes.
fn covered_nodes(shared: &Arc<Shared>, peer: &Peer) -> (FxHashSet<NodeId>, FxHashSet<u64>) {
    let caller = Caller { door: shared.id, ..Caller::service() };
    let nothing = FxHashSet::default();
    let ground = Ground {
        notes: None,
        stack: &*shared.stack,
        caller: &caller,
        covered: &nothing,
        is_root: peer.is_root,
        kept: &shared.kept,
    };
    let (mut found, mut inos) = (FxHashSet::default(), FxHashSet::default());
    for path in &peer.covered {
        let root = shared.stack.getattr(&caller, NodeId::ROOT, None);
        let Ok(root) = root else { continue };
        let start = (NodeId::ROOT, root);
        // What is not there is not met either.
        let Ok(mut target) = walk(&ground, start, path, Last { follow: false }) else { continue };
        if let Some(held) = target.found.take() {
            let (node, attr) = held.into_node();
            inos.insert(attr.ino);
            if !found.insert(node) {
                shared.stack.forget(node, 1);
            }
        }
    }
    (found, inos)
}
