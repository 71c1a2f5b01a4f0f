//! The lengths that we compute are those of objdump, over all code of this machine's C libraries.

use std::path::Path;
use std::process::Command;

use polytropo_preload::decode::{Flow, decode};

const LIBRARIES: [&str; 4] = [
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/x86_64-linux-gnu/libm.so.6",
    "/usr/lib/x86_64-linux-musl/libc.so",
];

struct Line {
    address: u64,
    bytes: Vec<u8>,
    text: String,
}

/// objdump's instructions; a line without text goes on with the bytes of the one before.
fn instructions(library: &str) -> Vec<Line> {
    let output = Command::new("objdump").args(["-d", "-w", library]).output().expect("objdump runs");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, '\t');
        let (Some(address), Some(bytes)) = (fields.next(), fields.next()) else { continue };
        let Ok(address) = u64::from_str_radix(address.trim().trim_end_matches(':'), 16) else { continue };
        let bytes = bytes.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        lines.push(Line { address, bytes, text: fields.next().unwrap_or("").to_owned() });
    }
    lines
}

fn direct_target(text: &str) -> Option<u64> {
    let mut words =
        text.split_whitespace().skip_while(|word| matches!(*word, "bnd" | "notrack" | "data16" | "rex.W"));
    let name = words.next()?.split(',').next()?;
    if !(name.starts_with('j') || name == "call" || name.starts_with("loop") || name == "xbegin") {
        return None;
    }
    u64::from_str_radix(words.next()?, 16).ok()
}

#[test]
fn lengths_and_targets_are_objdumps() {
    let mut checked = 0;
    for library in LIBRARIES {
        if !Path::new(library).exists() {
            assert!(library.contains("musl"), "{library} is missing");
            eprintln!("decode: skipped {library}, it is not installed (musl-tools)");
            continue;
        }
        for line in instructions(library) {
            if line.text.contains("(bad)") {
                continue;
            }
            // objdump shows a wait together with the x87 instruction after it.
            let own = if line.bytes[0] == 0x9b && line.bytes.len() > 1 {
                &line.bytes[1..]
            } else {
                &line.bytes[..]
            };
            let mut padded = own.to_vec();
            padded.resize(32, 0x90);
            let context = || format!("{library} {:x}: {:x?} {}", line.address, line.bytes, line.text);
            let found = decode(&padded).unwrap_or_else(|| panic!("not decoded: {}", context()));
            assert_eq!(usize::from(found.length), own.len(), "{}", context());
            assert_eq!(found.flow == Flow::Syscall, line.text.trim() == "syscall", "{}", context());
            assert_eq!(found.rip_displacement_at.is_some(), line.text.contains("(%rip)"), "{}", context());
            match (direct_target(&line.text), found.flow) {
                (Some(target), Flow::Branch { rel } | Flow::Call { rel }) => {
                    let end = line.address + u64::from(found.length);
                    assert_eq!(end.wrapping_add_signed(i64::from(rel)), target, "{}", context());
                }
                (None, Flow::Branch { .. } | Flow::Call { .. }) | (Some(_), _) => {
                    panic!("{}: {found:?}", context())
                }
                _ => {}
            }
            checked += 1;
        }
    }
    assert!(checked > 300_000, "only {checked} instructions");
}

#[test]
fn cut_off_instructions_are_refused() {
    for bytes in
        [&b"\x48"[..], b"\xb8\x01\x02\x03", b"\x0f", b"\x8b\x05\x00", b"\xc4\xe2", b"\x62\xf1\x7c", b""]
    {
        assert_eq!(decode(bytes), None, "{bytes:x?}");
    }
    // Sixteen prefixes are no instruction.
    assert_eq!(decode(&[0x66; 32]), None);
}
