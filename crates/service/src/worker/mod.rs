//! The worker: builds the stacks that the keeper hands it and runs their doors.

mod serving;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use log::{error, info, warn};

use crate::doors::fuse::{DOORS_MAX, RingPool, Transport};
use crate::isolation;
use crate::link::{Link, Report, Task};
use serving::{Doors, Given};

/// Bound on the directories of one stack: 500 layers and some.
const ROOTS_MAX: usize = 1024;

/// Runs until the keeper is gone. The link is standard input.
pub fn run(transport: Transport) -> i32 {
    match start(transport) {
        Ok((link, rings)) => {
            let link = Arc::new(link);
            let ended = serve(&link, rings);
            match ended {
                Ok(()) => info!("the keeper is gone"),
                Err(errno) => error!("the keeper broke the protocol: {errno}"),
            }
            i32::from(ended.is_err())
        }
        Err(problem) => {
            error!("{problem}");
            1
        }
    }
}

fn start(transport: Transport) -> Result<(Link, Option<Arc<RingPool>>), String> {
    // For ps(1); the program was started by a name that tells nothing.
    let _ = rustix::thread::set_name(c"polytropo-work");
    let link = take_link()?;
    // Behind its walls it may make no more.
    let rings = if transport == Transport::Device { None } else { RingPool::new(DOORS_MAX) };
    isolation::enter(|| {
        link.send(&Report::Separated {}, &[]).map_err(|e| format!("the keeper does not listen: {e}"))?;
        match link.receive::<Task>() {
            Ok(Some((Task::Mapped { copies, first_number }, _))) => {
                polytropo_libservices::begin_numbers_at(first_number);
                // Now, because no code can be made later. Without it bytes are copied all the same.
                crate::copies::install(copies.as_deref())
                    .unwrap_or_else(|problem| warn!("copies are made by memcpy(3): {problem}"));
                Ok(())
            }
            other => Err(format!("the keeper maps no ids but says {other:?}")),
        }
    })
    .inspect_err(|problem| {
        // The sentence is in the log too, should the keeper be gone.
        let _ = link.send(&Report::Done { request: 0, problem: Some(problem.clone()) }, &[]);
    })?;
    link.send(&Report::Ready {}, &[]).map_err(|errno| format!("the keeper does not listen: {errno}"))?;
    Ok((link, rings))
}

/// Takes the link from standard input and closes all else that was inherited, but the log.
fn take_link() -> Result<Link, String> {
    let link = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map_err(|errno| format!("there is no link on standard input: {errno}"))?;
    let number = link.as_raw_fd() as u32;
    for (first, last) in [(3, number.wrapping_sub(1)), (number + 1, u32::MAX)] {
        // SAFETY: nothing in this process has opened a descriptor yet but the link, which is left out.
        if first <= last && unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
            return Err(format!("descriptors cannot be closed: {}", std::io::Error::last_os_error()));
        }
    }
    let nothing = std::fs::File::open("/dev/null").map_err(|e| format!("/dev/null cannot be opened: {e}"))?;
    rustix::stdio::dup2_stdin(&nothing).map_err(|e| format!("standard input cannot be replaced: {e}"))?;
    Ok(Link::from_socket(link))
}

fn serve(link: &Arc<Link>, rings: Option<Arc<RingPool>>) -> rustix::io::Result<()> {
    let mut doors = Doors::new(link.clone(), rings);
    while let Some((task, descriptors)) = link.receive::<Task>()? {
        match task {
            Task::Serve {
                request,
                door,
                document_bytes,
                roots,
                cache_bytes,
                passthrough,
                channel_writes,
                incarnation,
                blame,
            } => {
                let roots = receive_roots(link, roots)?;
                let given = Given {
                    descriptors,
                    document_bytes,
                    cache_bytes,
                    passthrough,
                    channel_writes,
                    incarnation,
                    blame,
                };
                let problem = doors.serve(door, given, roots).err();
                link.send(&Report::Done { request, problem }, &[])?;
            }
            Task::Connect { request, door, newcomer } => {
                let problem = doors.connect(door, newcomer, descriptors).err();
                link.send(&Report::Done { request, problem }, &[])?;
            }
            Task::Roots {} | Task::Mapped { .. } => return Err(rustix::io::Errno::PROTO),
            Task::Statistics { request, door } => {
                let statistics = doors.statistics(door);
                link.send(&Report::Statistics { request, statistics }, &[])?;
            }
        }
    }
    Ok(())
}

fn receive_roots(link: &Link, count: usize) -> rustix::io::Result<Vec<OwnedFd>> {
    let mut roots = Vec::new();
    while roots.len() < count.min(ROOTS_MAX) {
        match link.receive::<Task>()? {
            Some((Task::Roots {}, descriptors)) if !descriptors.is_empty() => roots.extend(descriptors),
            _ => return Err(rustix::io::Errno::PROTO),
        }
    }
    if roots.len() == count { Ok(roots) } else { Err(rustix::io::Errno::PROTO) }
}
