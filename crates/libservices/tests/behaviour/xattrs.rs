//! Extended attributes and POSIX ACLs.

use polytropo_libservices::*;

use crate::suite::{Check, READ_WRITE, ROOT, Stack, check, errno, name};

pub const CHECKS: &[Check] = &[
    check!(attributes_come_back, XATTRS),
    check!(create_and_replace, XATTRS),
    check!(missing_attributes_are_enodata, XATTRS),
    check!(values_are_bytes_and_may_be_empty, XATTRS),
    check!(file_capabilities_are_kept, XATTRS),
    check!(access_acl_and_mode_agree, POSIX_ACLS),
    check!(default_acl_replaces_the_umask, POSIX_ACLS),
];

fn attributes_come_back(s: &Stack) {
    s.seed_file("f", b"");
    s.seed_dir("d");
    for text in ["f", "d"] {
        let (node, c) = (s.node(text), s.caller());
        for key in ["user.a", "user.b"] {
            s.service.setxattr(&c, node, key.as_bytes(), key.as_bytes(), XattrFlags::empty()).unwrap();
        }
        assert_eq!(s.service.getxattr(&c, node, b"user.a").unwrap(), b"user.a");
        assert_eq!(listed(s, node), ["user.a", "user.b"]);
        s.service.removexattr(&c, node, b"user.a").unwrap();
        assert_eq!(listed(s, node), ["user.b"]);
    }
}

/// The names of users' attributes, sorted.
fn listed(s: &Stack, node: NodeId) -> Vec<String> {
    let list = s.service.listxattr(&s.caller(), node).unwrap();
    assert!(list.is_empty() || list.ends_with(&[0]));
    let names = list.split(|&b| b == 0).map(|n| String::from_utf8_lossy(n).into_owned());
    let mut names: Vec<_> = names.filter(|n| n.starts_with("user.")).collect();
    names.sort();
    names
}

fn create_and_replace(s: &Stack) {
    let (node, c) = (s.file(ROOT, "f", b""), s.caller());
    let set = |flags| s.service.setxattr(&c, node, b"user.a", b"x", flags);
    assert_eq!(errno(set(XattrFlags::REPLACE)), Errno::NODATA);
    set(XattrFlags::CREATE).unwrap();
    assert_eq!(errno(set(XattrFlags::CREATE)), Errno::EXIST);
    set(XattrFlags::REPLACE).unwrap();
}

fn missing_attributes_are_enodata(s: &Stack) {
    let (node, c) = (s.file(ROOT, "f", b""), s.caller());
    assert_eq!(errno(s.service.getxattr(&c, node, b"user.a")), Errno::NODATA);
    assert_eq!(errno(s.service.removexattr(&c, node, b"user.a")), Errno::NODATA);
    assert!(listed(s, node).is_empty());
}

fn values_are_bytes_and_may_be_empty(s: &Stack) {
    let (node, c) = (s.file(ROOT, "f", b""), s.caller());
    let long: Vec<u8> = (0..2500).map(|i| i as u8).collect();
    for value in [&b""[..], b"\0", &long] {
        s.service.setxattr(&c, node, b"user.a", value, XattrFlags::empty()).unwrap();
        assert_eq!(s.service.getxattr(&c, node, b"user.a").unwrap(), value);
    }
}

/// `cap_net_raw+ep` in the second revision, as setcap(8) writes it.
const NET_RAW: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn file_capabilities_are_kept(s: &Stack) {
    let (node, c) = (s.file(ROOT, "f", b""), s.caller());
    let set = s.service.setxattr(&c, node, b"security.capability", NET_RAW, XattrFlags::empty());
    match set {
        Ok(()) => assert_eq!(s.service.getxattr(&c, node, b"security.capability").unwrap(), NET_RAW),
        // Not every service may give capabilities; it must say so.
        Err(e) => assert!(e.is(Errno::PERM) && !rustix::process::geteuid().is_root(), "{e}"),
    }
}

/// user::rw-, user:1234:rw-, group::r--, mask::rw-, other::---
fn acl() -> Vec<u8> {
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions, id) in
        [(1u16, 6u16, u32::MAX), (2, 6, 1234), (4, 4, u32::MAX), (0x10, 6, u32::MAX), (0x20, 0, u32::MAX)]
    {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    acl
}

fn access_acl_and_mode_agree(s: &Stack) {
    let (node, c) = (s.file(ROOT, "f", b""), s.caller());
    s.service.setxattr(&c, node, b"system.posix_acl_access", &acl(), XattrFlags::empty()).unwrap();
    assert_eq!(s.attr(node).mode & 0o777, 0o660);
    assert_eq!(s.service.getxattr(&c, node, b"system.posix_acl_access").unwrap(), acl());
    s.set(node, SetAttr { mode: Some(0o600), ..SetAttr::default() });
    let mut masked = acl();
    masked[4 + 3 * 8 + 2] = 0;
    assert_eq!(s.service.getxattr(&c, node, b"system.posix_acl_access").unwrap(), masked);
    s.service.removexattr(&c, node, b"system.posix_acl_access").unwrap();
    assert_eq!(errno(s.service.getxattr(&c, node, b"system.posix_acl_access")), Errno::NODATA);
}

fn default_acl_replaces_the_umask(s: &Stack) {
    let (dir, c) = (s.mkdir(ROOT, "d"), Caller { umask: 0o077, ..s.caller() });
    s.service.setxattr(&c, dir, b"system.posix_acl_default", &acl(), XattrFlags::empty()).unwrap();
    let (made, _) = s.service.create(&c, dir, name("f"), 0o666, READ_WRITE).unwrap();
    assert_eq!(made.attr.mode & 0o777, 0o660);
    assert_eq!(s.service.getxattr(&c, made.node, b"system.posix_acl_access").unwrap(), acl());
    let made = s.service.mkdir(&c, dir, name("e"), 0o700).unwrap();
    assert_eq!(made.attr.mode & 0o777, 0o600);
    assert_eq!(s.service.getxattr(&c, made.node, b"system.posix_acl_default").unwrap(), acl());
}
