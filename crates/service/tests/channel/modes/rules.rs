//! The rules of modes as a table: in which state of a file an open goes which way, what it changes, and what its holder sees. Written
//! apart from the service's own, and held against both that and the kernel.

use super::events::Event;

/// How the service says that a holder's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    Passthrough,
    Cached,
    Kernel,
    Direct,
    Window,
}

/// What the table looks at when somebody opens a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Always,
    /// The kernel's inode was replaced, and is reached without a name.
    Replaced,
    /// The image's bytes are the file's, are passed through, and neither the kernel's cache nor a channel's writer stands against it.
    Passing,
    PassthroughHeld,
    KernelHeld,
    ChannelHeld,
    ChannelWriterHeld,
    /// A program runs from it.
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    FuseRead,
    FuseWriteOnly,
    FuseReadWrite,
    ChannelRead,
    ChannelWrite,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Open(Way),
    /// Another inode of the kernel takes over, and the table is asked again.
    RenewThen,
    /// Not by the channel; by the kernel, and the table is asked again.
    ThroughKernel,
}

pub struct Rule(pub &'static [Opening], pub Condition, pub Outcome);

/// The first that fits counts.
pub const RULES: &[Rule] = {
    use Condition::*;
    use Opening::*;
    use Outcome::*;
    const FUSE: &[Opening] = &[FuseRead, FuseWriteOnly, FuseReadWrite];
    const CHANNEL: &[Opening] = &[ChannelRead, ChannelWrite];
    &[
        Rule(CHANNEL, KernelHeld, ThroughKernel),
        Rule(&[ChannelWrite], Running, ThroughKernel),
        Rule(CHANNEL, Always, Open(Way::Window)),
        Rule(FUSE, Replaced, Open(Way::Direct)),
        Rule(&[FuseRead], Passing, Open(Way::Passthrough)),
        Rule(FUSE, PassthroughHeld, RenewThen),
        Rule(&[FuseRead], ChannelWriterHeld, Open(Way::Direct)),
        Rule(&[FuseRead], Always, Open(Way::Cached)),
        Rule(&[FuseWriteOnly], ChannelHeld, Open(Way::Direct)),
        Rule(&[FuseWriteOnly, FuseReadWrite], Always, Open(Way::Kernel)),
    ]
};

/// What the kernel lets in beside what it has of one inode (fs/fuse/iomode.c): rows are held, columns come.
pub fn kernel_allows(held: Way, comes: Way) -> bool {
    use Way::*;
    match (held, comes) {
        (Window, _) | (_, Window) => true,
        (Passthrough, Passthrough) => true,
        (Passthrough, _) | (_, Passthrough) => false,
        _ => true,
    }
}

/// One inode of the kernel's and what the service knows of it, while a walk goes.
#[derive(Clone, Debug, Default)]
pub struct File {
    /// The image's bytes are its own.
    pub of_image: bool,
    pub renewed: bool,
}

/// A holder as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which of the files that had the name.
    pub file: usize,
    pub way: Way,
    pub writes: bool,
    pub runs: bool,
    /// The service knows of it.
    pub open: bool,
    /// It sees the image's bytes whatever becomes of the file.
    pub sees_image: bool,
    /// Of an inode that another one has replaced since.
    pub left_behind: bool,
}

/// What the rules say of an open of `file` (`replaced`: by the old inode), with what is held.
pub fn decide(
    opening: Opening,
    (number, file): (usize, &mut File),
    held: &mut [Held],
    passes: bool,
    by_old_inode: bool,
) -> Way {
    let mut opening = opening;
    loop {
        let here = |what: &dyn Fn(&Held) -> bool| {
            held.iter().any(|held| held.file == number && held.open && what(held))
        };
        let holds = |condition| match condition {
            Condition::Always => true,
            Condition::Replaced => by_old_inode && file.renewed,
            Condition::Passing => {
                passes
                    && file.of_image
                    && !here(&|held| matches!(held.way, Way::Cached | Way::Kernel))
                    && !here(&|held| held.way == Way::Window && held.writes)
            }
            Condition::PassthroughHeld => here(&|held| held.way == Way::Passthrough && !held.left_behind),
            Condition::KernelHeld => here(&|held| held.way == Way::Kernel),
            Condition::ChannelHeld => here(&|held| held.way == Way::Window),
            Condition::Running => here(&|held| held.runs),
            Condition::ChannelWriterHeld => here(&|held| held.way == Way::Window && held.writes),
        };
        let rule = RULES.iter().find(|rule| rule.0.contains(&opening) && holds(rule.1));
        match rule.expect("a rule for every open").2 {
            Outcome::Open(way) => {
                let beside = held.iter().filter(|held| held.file == number && held.open && !held.left_behind);
                if !(by_old_inode && file.renewed) {
                    beside.for_each(|held| assert!(kernel_allows(held.way, way), "{held:?} and {way:?}"));
                }
                return way;
            }
            Outcome::RenewThen => {
                file.renewed = true;
                for held in held.iter_mut().filter(|held| held.file == number && held.way == Way::Passthrough)
                {
                    held.left_behind = true;
                }
            }
            Outcome::ThroughKernel => {
                opening = match opening {
                    Opening::ChannelRead => Opening::FuseRead,
                    _ => Opening::FuseReadWrite,
                }
            }
        }
    }
}

/// How an event opens the file that its name leads to, if it does; and whether that stays open.
pub fn opens(event: Event) -> Option<Opening> {
    use Event::*;
    Some(match event {
        Read | ReadDirect | ReopenRead | Execute | MapPrivate | MapShared | ReadByName => Opening::FuseRead,
        Write | Append | Truncate => Opening::FuseWriteOnly,
        ReadWrite | ReopenWrite | MapWrite => Opening::FuseReadWrite,
        ChannelRead => Opening::ChannelRead,
        ChannelWrite => Opening::ChannelWrite,
        _ => return None,
    })
}

/// Whether the event gives the file bytes, or at least attributes, of its own.
pub fn takes_from_image(event: Event) -> bool {
    use Event::*;
    matches!(
        event,
        Write
            | Append
            | Truncate
            | ReadWrite
            | ReopenWrite
            | MapWrite
            | ChannelWrite
            | ChannelCut
            | CutByName
            | ChangeMode
    )
}
