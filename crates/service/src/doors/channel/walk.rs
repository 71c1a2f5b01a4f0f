//! From a path to a node, component by component, as the kernel would go for the same caller.

use std::collections::VecDeque;

use polytropo_libservices::{Attr, Caller, Entry, Errno, Error, Libservice, Name, NodeId};
use rustc_hash::FxHashSet;

use super::kept::Kept;
use super::permissions::{self, EXECUTE};
use crate::epochs::Notes;

/// As in the kernel (MAXSYMLINKS).
const LINKS_MAX: u32 = 40;
/// Components of one walk, links included: paths have less than 4,096 bytes, and so have links.
const COMPONENTS_MAX: usize = 8192;

/// Why a request is not done.
#[derive(Debug)]
pub enum Failure {
    Error(Error),
    /// The kernel has to do it.
    Kernel,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

pub fn fail<T>(errno: Errno, attempt: &'static str) -> Result<T, Failure> {
    Err(Error::new(errno, attempt).into())
}

/// What all walks of one client have in common.
pub struct Ground<'a> {
    pub stack: &'a dyn Libservice,
    pub caller: &'a Caller,
    /// Nodes on which the process has something else mounted.
    pub covered: &'a FxHashSet<NodeId>,
    /// The mount is the root directory of the process: absolute links begin there.
    pub is_root: bool,
    pub kept: &'a Kept,
    /// Where it is noted what the answer depends on, if it may be kept.
    pub notes: Option<&'a Notes<'a>>,
}

/// A node that is looked up once for us; given back when dropped.
pub struct Held<'a> {
    stack: &'a dyn Libservice,
    /// Takes the look-up over in the end.
    keeper: Option<&'a Kept>,
    pub node: NodeId,
    pub attr: Attr,
}

impl<'a> Held<'a> {
    pub fn of(stack: &'a dyn Libservice, entry: Entry) -> Self {
        Self { stack, keeper: None, node: entry.node, attr: entry.attr }
    }

    /// The look-up is somebody else's from now on.
    pub fn into_node(self) -> (NodeId, Attr) {
        let this = std::mem::ManuallyDrop::new(self);
        (this.node, this.attr.clone())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        match self.keeper {
            Some(kept) => kept.keep(self.stack, self.node),
            None => self.stack.forget(self.node, 1),
        }
    }
}

/// What the last component is to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Last {
    /// A link at the end is followed.
    pub follow: bool,
}

/// Where a path leads. Nodes on the way are held until this is dropped.
pub struct Target<'a> {
    /// Directories from the start on; the last one holds `name`.
    trail: Vec<Held<'a>>,
    start: (NodeId, Attr),
    /// The last component; None when the path ends in the directory itself (`.`, `/`, an empty path).
    pub name: Option<Box<Name>>,
    /// What is there; None: nothing yet.
    pub found: Option<Held<'a>>,
    /// The path ended with a slash: only a directory will do.
    pub must_be_directory: bool,
}

impl<'a> Target<'a> {
    /// The directory that holds the last component.
    pub fn parent(&self) -> (NodeId, &Attr) {
        match self.trail.last() {
            Some(held) => (held.node, &held.attr),
            None => (self.start.0, &self.start.1),
        }
    }

    /// Whether the path goes through `node` on the way to its last component.
    pub fn passes(&self, node: NodeId) -> bool {
        self.start.0 == node || self.trail.iter().any(|held| held.node == node)
    }

    /// The node itself; ENOENT when there is none.
    pub fn existing(&self) -> Result<(NodeId, &Attr), Failure> {
        match (&self.found, &self.name) {
            (Some(found), _) => Ok((found.node, &found.attr)),
            (None, None) => Ok(self.parent()),
            (None, Some(_)) => fail(Errno::NOENT, "find a name"),
        }
    }

    /// The last component, for those who make or remove it; `why` when there is none.
    pub fn last_name(&self, why: Errno) -> Result<&Name, Failure> {
        match &self.name {
            Some(name) => Ok(name),
            None => fail(why, "change the directory that a path ends in"),
        }
    }
}

enum Step {
    Name(Box<Name>),
    Up,
}

/// Walks `path` from `start`. Every directory on the way must be searchable for the caller.
pub fn walk<'a>(
    ground: &Ground<'a>,
    start: (NodeId, Attr),
    path: &[u8],
    last: Last,
) -> Result<Target<'a>, Failure> {
    let mut target = Target { trail: Vec::new(), start, name: None, found: None, must_be_directory: false };
    let mut from_root = path.first() == Some(&b'/');
    let mut steps = VecDeque::new();
    target.must_be_directory = push_steps(&mut steps, path)?;
    let mut links = 0;
    let mut taken = 0;
    loop {
        if from_root {
            if !ground.is_root && links > 0 {
                return Err(Failure::Kernel);
            }
            target.trail.clear();
            target.start = (NodeId::ROOT, ground.stack.getattr(ground.caller, NodeId::ROOT, None)?);
            from_root = false;
        }
        let Some(step) = steps.pop_front() else {
            if target.trail.is_empty() && target.start.0 == NodeId::ROOT {
                // It is asked for itself, with its size and times.
                target.start.1 = ground.stack.getattr(ground.caller, NodeId::ROOT, None)?;
            }
            return Ok(target);
        };
        taken += 1;
        if taken > COMPONENTS_MAX {
            return fail(Errno::LOOP, "follow a path");
        }
        let (parent, attr) = target.parent();
        if !attr.is_dir() {
            return fail(Errno::NOTDIR, "look into what is no directory");
        }
        permissions::check(ground.stack, ground.caller, parent, attr, EXECUTE)?;
        let name = match step {
            Step::Up => {
                if target.trail.pop().is_none() {
                    return Err(Failure::Kernel);
                }
                continue;
            }
            Step::Name(name) => name,
        };
        if let Some(notes) = ground.notes {
            notes.name(attr, &name);
        }
        let found = match ground.stack.lookup(ground.caller, parent, &name) {
            Ok(entry) => Some(Held::of(ground.stack, entry)),
            Err(error) if error.is(Errno::NOENT) && steps.is_empty() => None,
            Err(error) => return Err(error.into()),
        };
        let Some(mut found) = found else {
            target.name = Some(name);
            return Ok(target);
        };
        if ground.covered.contains(&found.node) {
            return Err(Failure::Kernel);
        }
        let at_end = steps.is_empty();
        let is_link = found.attr.file_type() == libc::S_IFLNK;
        if is_link && (!at_end || last.follow || target.must_be_directory) {
            links += 1;
            if links > LINKS_MAX {
                return fail(Errno::LOOP, "follow links");
            }
            may_follow(ground, &target, &found)?;
            let text = ground.stack.readlink(ground.caller, found.node)?;
            if text.is_empty() {
                return fail(Errno::NOENT, "follow an empty link");
            }
            from_root = text.first() == Some(&b'/');
            let mut ahead = VecDeque::new();
            let slash = push_steps(&mut ahead, &text)?;
            target.must_be_directory |= at_end && slash;
            ahead.append(&mut steps);
            steps = ahead;
            continue;
        }
        if at_end {
            if target.must_be_directory && !found.attr.is_dir() {
                return fail(Errno::NOTDIR, "use a file as a directory");
            }
            target.name = Some(name);
            target.found = Some(found);
            return Ok(target);
        }
        found.keeper = found.attr.is_dir().then_some(ground.kept);
        target.trail.push(found);
    }
}

/// Links in directories where everybody writes may be protected (protected_symlinks in proc(5)): the kernel knows whether they are.
fn may_follow(ground: &Ground<'_>, target: &Target<'_>, link: &Held<'_>) -> Result<(), Failure> {
    let (_, directory) = target.parent();
    let open_to_all = directory.mode & (libc::S_ISVTX | libc::S_IWOTH) == libc::S_ISVTX | libc::S_IWOTH;
    if open_to_all && link.attr.uid != ground.caller.uid && link.attr.uid != directory.uid {
        return Err(Failure::Kernel);
    }
    Ok(())
}

/// Appends the components of `path`; tells whether it ends as a directory must.
fn push_steps(steps: &mut VecDeque<Step>, path: &[u8]) -> Result<bool, Failure> {
    let mut ends_open = path.last() == Some(&b'/');
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" => {}
            b"." => ends_open = true,
            b".." => {
                steps.push_back(Step::Up);
                ends_open = true;
            }
            name => {
                steps.push_back(Step::Name(Name::new(name)?.to_boxed()));
                ends_open = path.last() == Some(&b'/');
            }
        }
    }
    Ok(ends_open)
}
