//! `polytropo-service`: keeper, worker, and small helpers of the command line.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use polytropo_libservices::stack::StackDocument;
use polytropo_service::doors::fuse::Transport;
use polytropo_service::{copies, keeper, logging, worker};

/// Serves a tenant's containers their files. Started by `polytropo`, not by hand.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Take orders at RUN_DIR/control.sock until stopped or idle.
    Keeper(KeeperArguments),
    /// Serve files for a keeper (which starts this).
    #[command(hide = true)]
    Worker {
        #[arg(long, value_enum, default_value_t)]
        fuse_transport: Transport,
    },
    /// Run a program in the namespaces of the keeper at RUN_DIR, where its mounts are.
    Enter {
        #[arg(long)]
        run_dir: PathBuf,
        /// The program and its arguments, after `--`.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Map the ids of a keeper's user namespace (which starts this).
    #[command(hide = true)]
    MapIds { pid: u32 },
    /// Check a stack document on standard input: status 0, or 1 and one sentence.
    CheckStack,
}

#[derive(clap::Args)]
struct KeeperArguments {
    /// Where the control socket lies.
    #[arg(long)]
    run_dir: PathBuf,
    /// First of the host ids that the worker runs under.
    #[arg(long)]
    uid_base: u32,
    /// How many ids from there.
    #[arg(long, default_value_t = 65_536)]
    uid_count: u32,
    /// End so long after the last unmount.
    #[arg(long)]
    idle_timeout_s: u64,
    /// A descriptor that is told one line when the keeper is ready.
    #[arg(long)]
    ready_fd: Option<i32>,
    /// How much memory cached bytes may take that programs share with the service.
    #[arg(long, default_value_t = 256 << 20)]
    cache_bytes: u64,
    /// Let programs write through shared memory. Then the kernel holds back no writes of other programs.
    #[arg(long)]
    channel_writes: bool,
    /// By what bytes are copied between programs and the service.
    #[arg(long, value_enum, default_value_t)]
    copy_engine: copies::Choice,
    /// How many workers a minute take over at once from one that died; later ones wait ever longer, 30 s at most. 0: none ever does.
    #[arg(long, default_value_t = 5)]
    restarts: usize,
    /// Where plans of `polytropo tune memcpy` lie.
    #[arg(long)]
    tuning_dir: Option<PathBuf>,
    /// Which way FUSE requests travel: over io_uring where the kernel offers it (auto, uring) or the device alone.
    #[arg(long, value_enum, default_value_t)]
    fuse_transport: Transport,
    /// The tenant's name, for mount tables and logs.
    #[arg(long)]
    tenant: Option<String>,
    /// Run as an ordinary user, in a user and mount namespace of its own.
    #[arg(long)]
    rootless: bool,
    /// A /dev/fuse that was opened in this user namespace, for one mount; may be given several times.
    #[arg(long)]
    fuse_fd: Vec<i32>,
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Keeper(arguments) => run_keeper(arguments),
        Command::Worker { fuse_transport } => {
            logging::start("worker");
            ExitCode::from(worker::run(fuse_transport) as u8)
        }
        Command::CheckStack => check_stack(),
        Command::MapIds { pid } => match keeper::rootless::map_ids_of(pid) {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => {
                eprintln!("{problem}");
                ExitCode::FAILURE
            }
        },
        Command::Enter { run_dir, command } => {
            let (status, problem) = polytropo_service::enter::enter(&run_dir, &command);
            eprintln!("polytropo-service: {problem}");
            ExitCode::from(status)
        }
    }
}

fn run_keeper(arguments: KeeperArguments) -> ExitCode {
    logging::start("keeper");
    let devices: Vec<_> = arguments.fuse_fd.iter().filter_map(|&fd| take_descriptor(fd)).collect();
    if devices.len() != arguments.fuse_fd.len() {
        log::warn!("some descriptor of --fuse-fd is not open");
    }
    let config = keeper::Config {
        run_dir: arguments.run_dir,
        uid_base: arguments.uid_base,
        uid_count: arguments.uid_count,
        idle_timeout: Duration::from_secs(arguments.idle_timeout_s),
        ready: arguments.ready_fd.and_then(take_descriptor),
        tenant: arguments.tenant,
        rootless: arguments.rootless,
        cache_bytes: arguments.cache_bytes,
        channel_writes: arguments.channel_writes,
        fuse_transport: arguments.fuse_transport,
        copy_engine: arguments.copy_engine,
        restarts: arguments.restarts,
        tuning_dir: arguments.tuning_dir,
        devices,
    };
    match keeper::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            keeper::report_failure(&refusal);
            ExitCode::FAILURE
        }
    }
}

/// A descriptor that whoever started this process left open for it.
fn take_descriptor(number: i32) -> Option<OwnedFd> {
    if number <= 2 {
        return None;
    }
    // SAFETY: F_GETFD reads a flag of a descriptor and has no effect on memory; a closed number gives EBADF.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: the number is open, was named for us on the command line, and nothing here has taken it yet.
    let taken = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&taken, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(taken)
}

fn check_stack() -> ExitCode {
    const DOCUMENT_MAX_BYTES: u64 = 4 << 20;
    let mut text = String::new();
    if let Err(error) = std::io::stdin().take(DOCUMENT_MAX_BYTES).read_to_string(&mut text) {
        eprintln!("stack document: cannot be read: {error}");
        return ExitCode::FAILURE;
    }
    match StackDocument::parse(&text) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
