//! The worker: builds the stacks that the keeper hands it and runs their doors.

mod serving;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use log::{error, info};

use crate::link::{Link, Report, Task};
use serving::Doors;

/// Bound on the directories of one stack: 500 layers and some.
const ROOTS_MAX: usize = 1024;

/// Runs until the keeper is gone. The link is standard input.
pub fn run() -> i32 {
    match start() {
        Ok(link) => {
            let link = Arc::new(link);
            let ended = serve(&link);
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

fn start() -> Result<Link, String> {
    let link = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map_err(|errno| format!("there is no link on standard input: {errno}"))?;
    let nothing = std::fs::File::open("/dev/null").map_err(|e| format!("/dev/null cannot be opened: {e}"))?;
    rustix::stdio::dup2_stdin(&nothing).map_err(|e| format!("standard input cannot be replaced: {e}"))?;
    polytropo_libservices::dir::keep_proc_self_fd();
    let link = Link::from_socket(link);
    link.send(&Report::Ready {}, &[]).map_err(|errno| format!("the keeper does not listen: {errno}"))?;
    Ok(link)
}

fn serve(link: &Arc<Link>) -> rustix::io::Result<()> {
    let mut doors = Doors::new(link.clone());
    while let Some((task, descriptors)) = link.receive::<Task>()? {
        match task {
            Task::Serve { request, door, document_bytes, roots } => {
                let roots = receive_roots(link, roots)?;
                let problem = doors.serve(door, descriptors, document_bytes, roots).err();
                link.send(&Report::Done { request, problem }, &[])?;
            }
            Task::Roots {} => return Err(rustix::io::Errno::PROTO),
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
