//! POSIX ACLs where the host does not keep them: the arithmetic of acl(5) between ACL, mode and umask.

use crate::error::{Errno, Error, Result};

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

/// The format's version, as in linux/posix_acl_xattr.h.
const VERSION: u32 = 2;
const HEADER_LEN: usize = 4;
const ENTRY_LEN: usize = 8;

const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ace {
    tag: u16,
    permissions: u16,
    id: u32,
}

/// A valid ACL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl(Vec<Ace>);

impl Acl {
    /// Reads the value of `system.posix_acl_*`. EINVAL when it is no valid ACL.
    pub fn parse(value: &[u8]) -> Result<Self> {
        Self::read(value).ok_or_else(|| Error::new(Errno::INVAL, "read a POSIX ACL"))
    }

    fn read(value: &[u8]) -> Option<Self> {
        let (version, entries) = value.split_at_checked(HEADER_LEN)?;
        if version != VERSION.to_le_bytes() || entries.len() % ENTRY_LEN != 0 {
            return None;
        }
        let entries = entries.chunks_exact(ENTRY_LEN).map(|e| Ace {
            tag: u16::from_le_bytes([e[0], e[1]]),
            permissions: u16::from_le_bytes([e[2], e[3]]),
            id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
        });
        let acl = Self(entries.collect());
        acl.is_valid().then_some(acl)
    }

    // Entries in the order of their tags, owner, group and others once each, a mask if anybody is named.
    fn is_valid(&self) -> bool {
        let count = |tag| self.0.iter().filter(|ace| ace.tag == tag).count();
        let named = count(USER) + count(GROUP) > 0;
        let known = [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER];
        self.0.iter().all(|ace| ace.permissions <= 7 && known.contains(&ace.tag))
            && self.0.is_sorted_by_key(|ace| ace.tag)
            && [USER_OBJ, GROUP_OBJ, OTHER].into_iter().all(|tag| count(tag) == 1)
            && (count(MASK) == 1 || count(MASK) == 0 && !named)
    }

    pub fn to_value(&self) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for ace in &self.0 {
            value.extend_from_slice(&ace.tag.to_le_bytes());
            value.extend_from_slice(&ace.permissions.to_le_bytes());
            value.extend_from_slice(&ace.id.to_le_bytes());
        }
        value
    }

    /// Says no more than permission bits do.
    pub fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }

    /// The permission bits that agree with it.
    pub fn permissions(&self) -> u32 {
        self.0.iter().fold(0, |bits, ace| match self.shift(ace.tag) {
            Some(shift) => bits | u32::from(ace.permissions) << shift,
            None => bits,
        })
    }

    /// chmod(2)
    pub fn set_permissions(&mut self, bits: u32) {
        for i in 0..self.0.len() {
            if let Some(shift) = self.shift(self.0[i].tag) {
                self.0[i].permissions = (bits >> shift & 7) as u16;
            }
        }
    }

    /// What a new inode made with `bits` gets of this default ACL.
    pub fn inherited(&self, bits: u32) -> Self {
        let mut acl = self.clone();
        acl.set_permissions(bits & self.permissions());
        acl
    }

    /// Which of the three classes of a mode an entry stands for: with a mask, that is the group's.
    fn shift(&self, tag: u16) -> Option<u32> {
        let masked = self.0.iter().any(|ace| ace.tag == MASK);
        match tag {
            USER_OBJ => Some(6),
            OTHER => Some(0),
            MASK => Some(3),
            GROUP_OBJ if !masked => Some(3),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        Acl(entries.iter().map(|&(tag, permissions, id)| Ace { tag, permissions, id }).collect()).to_value()
    }

    const NONE: u32 = u32::MAX;

    #[test]
    fn mode_and_acl_agree() {
        let minimal = Acl::parse(&value(&[(1, 6, NONE), (4, 4, NONE), (32, 0, NONE)])).unwrap();
        assert!(minimal.is_minimal());
        assert_eq!(minimal.permissions(), 0o640);
        let mut named =
            Acl::parse(&value(&[(1, 7, NONE), (2, 6, 9), (4, 4, NONE), (16, 6, NONE), (32, 1, NONE)]))
                .unwrap();
        assert!(!named.is_minimal());
        assert_eq!(named.permissions(), 0o761);
        assert_eq!(named.inherited(0o640).permissions(), 0o640);
        assert_eq!(named.inherited(0o444).permissions(), 0o440);
        named.set_permissions(0o750);
        assert_eq!(
            named.to_value(),
            value(&[(1, 7, NONE), (2, 6, 9), (4, 4, NONE), (16, 5, NONE), (32, 0, NONE)])
        );
    }

    #[test]
    fn nonsense_is_refused() {
        let good = value(&[(1, 6, NONE), (4, 4, NONE), (32, 0, NONE)]);
        let refused = [
            Vec::new(),
            good[..good.len() - 1].to_vec(),
            [&[3, 0, 0, 0], &good[4..]].concat(),
            value(&[]),
            value(&[(1, 6, NONE), (4, 4, NONE)]),
            value(&[(1, 6, NONE), (1, 6, NONE), (4, 4, NONE), (32, 0, NONE)]),
            value(&[(1, 6, NONE), (2, 6, 9), (4, 4, NONE), (32, 0, NONE)]),
            value(&[(1, 8, NONE), (4, 4, NONE), (32, 0, NONE)]),
            value(&[(4, 4, NONE), (1, 6, NONE), (32, 0, NONE)]),
            value(&[(1, 6, NONE), (4, 4, NONE), (32, 0, NONE), (64, 0, NONE)]),
        ];
        for value in refused {
            assert!(Acl::parse(&value).unwrap_err().is(Errno::INVAL), "{value:?}");
        }
    }
}
