//! Landlock rules, where the kernel has them.

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope,
};

/// The newest rules that this program knows; older kernels enforce what they can.
const ABI_KNOWN: ABI = ABI::V6;

/// For this thread and those it starts: files below `roots` only, and no changes below those that are read-only;
/// no TCP, no signals to others, no abstract sockets of others.
///
/// All of it is one layer of rules: any further layer, whatever it is about, forbids every rename between two
/// directories (`LANDLOCK_ACCESS_FS_REFER` is denied by layers that do not grant it), and unions copy up by those.
pub fn allow_only<'a>(roots: impl Iterator<Item = (&'a OwnedFd, bool)>) -> Result<(), RulesetError> {
    let every: BitFlags<AccessFs> = AccessFs::from_all(ABI_KNOWN) & !AccessFs::Execute;
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_KNOWN))?
        .handle_access(AccessNet::from_all(ABI_KNOWN))?
        .scope(Scope::from_all(ABI_KNOWN))?
        .create()?;
    for (root, read_only) in roots {
        let allowed = if read_only { reading } else { every };
        rules = rules.add_rule(PathBeneath::new(root, allowed))?;
    }
    if rules.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        log::warn!("this kernel has no Landlock; the other walls stand without it");
    }
    Ok(())
}
