//! The scanner on this machine's C libraries, held against objdump.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use common::Loaded;
use polytropo_preload::scan::{SITES_MAX, Site, Summary, scan, scratch_bytes};
use polytropo_preload::table;

const GLIBC: &str = "/lib/x86_64-linux-gnu/libc.so.6";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
const MUSL: &str = "/usr/lib/x86_64-linux-musl/libc.so";

fn scanned(loaded: &Loaded) -> (Vec<Site>, Summary) {
    loaded.with(|image| {
        assert!(image.is_library());
        let (_, code) = image.code().unwrap();
        let mut scratch = vec![0; scratch_bytes(code.len())];
        let mut sites = vec![Site::default(); SITES_MAX];
        let summary = scan(image, &mut scratch, &mut sites).unwrap();
        sites.truncate(summary.sites as usize);
        (sites, summary)
    })
}

/// Each instruction's address and text.
fn listing(library: &str) -> BTreeMap<u32, String> {
    let output = Command::new("objdump").args(["-d", "-w", "--no-show-raw-insn", library]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| {
        let (address, instruction) = line.split_once(":\t")?;
        Some((u32::from_str_radix(address.trim(), 16).ok()?, instruction.trim().to_owned()))
    };
    text.lines().filter_map(line).collect()
}

/// Where a direct jump or call leads.
fn target(text: &str) -> Option<u32> {
    text.split_whitespace().skip(1).find_map(|word| u32::from_str_radix(word, 16).ok())
}

#[test]
fn sites_are_what_objdump_shows() {
    for (library, left_max) in [(GLIBC, 30), (LOADER, 12), (MUSL, 30)] {
        let Some(loaded) = Loaded::open(library) else {
            assert_eq!(library, MUSL, "{library} is missing");
            eprintln!("scan: skipped {library}, it is not installed (musl-tools)");
            continue;
        };
        let (all, summary) = scanned(&loaded);
        let (callers, sites): (Vec<_>, Vec<_>) = all.iter().copied().partition(Site::calls_bridge);
        let listing = listing(library);
        // musl, and newer glibc, make calls that can be cancelled by one instruction, which only some others come to.
        for site in &callers {
            let text = &listing[&site.patch];
            assert!(text.starts_with("call") && target(text) == Some(site.syscall), "{text}");
            assert_eq!(site.end - site.patch, 5);
        }
        let bridges: BTreeSet<u32> = callers.iter().map(|site| site.syscall).collect();
        assert!(bridges.len() <= 1 && (library != MUSL || bridges.len() == 1), "{bridges:x?}");
        assert_eq!(summary.leaving, 0);
        assert!(all.is_sorted_by_key(|site| site.patch));
        let calls: Vec<_> = listing.iter().filter(|(_, text)| *text == "syscall").collect();
        eprintln!("{library}: {summary:?}");
        assert_eq!(summary.instructions as usize, calls.len());
        let left = summary.no_room + summary.unsure;
        assert_eq!(summary.unsure, 0);
        let targets: BTreeSet<u32> = listing.values().filter_map(|text| target(text)).collect();
        let mut left_texts = Vec::new();
        for (at, _) in &calls {
            if !sites.iter().any(|site| site.syscall == **at) {
                let before: Vec<_> = listing.range(..**at).rev().take(3).map(|(_, text)| text).collect();
                left_texts.push(format!("{at:x} after {before:?}"));
            }
        }
        assert!(left <= left_max, "{library}: {summary:?}: {left_texts:#?}");
        for site in &sites {
            assert_eq!(listing.get(&site.syscall).map(String::as_str), Some("syscall"));
            assert!(listing.contains_key(&site.patch), "{:x} is no border", site.patch);
            assert!(site.end - site.patch >= 5 && site.patch <= site.syscall);
            assert!(site.end == site.syscall || listing.contains_key(&site.end));
            for inside in site.patch + 1..site.end {
                assert!(!targets.contains(&inside), "a jump leads to {inside:x}, inside of a site");
            }
        }
        // What is said of a number is what objdump shows: a load of it, and nothing on eax between.
        for (site, number) in sites.iter().filter_map(|site| Some((site, site.number?))) {
            let before: Vec<_> =
                listing.range(site.patch..site.syscall).map(|(_, text)| text.as_str()).collect();
            let loads =
                [format!("$0x{number:x},%eax"), format!("$0x{number:x},%rax"), "%eax,%eax".to_owned()];
            let load = before.iter().rposition(|text| loads.iter().any(|load| text.ends_with(load.as_str())));
            let after = &before[load.unwrap_or_else(|| panic!("{number} is not loaded in {before:?}")) + 1..];
            assert!(
                !after.iter().any(|text| text.ends_with("ax") || text.ends_with("%al")),
                "{number}: {before:?}"
            );
        }
        let numbers: Vec<_> = sites.iter().filter_map(|site| site.number).collect();
        assert!(numbers.iter().all(|number| table::SEEN[usize::from(*number)] != 0));
    }
}
