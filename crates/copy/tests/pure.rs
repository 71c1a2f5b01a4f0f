//! What needs no processor of its own, so that Miri can run it: names, words and the emitter, which writes into a plain buffer.

use polytropo_copy::features::Features;
use polytropo_copy::variant::Variant;

/// Something of every parameter.
const NAMES: [&str; 12] = [
    "libc",
    "movsb",
    "movsq.dst",
    "v8.b64",
    "v8.b128.x2.w@2.src",
    "v16.b1024.staged.t1@32.dst",
    "v16.b64.x4.t0@1",
    "v32.b256.nt.nta@16.dst",
    "v32.b64.sl.t2@4.src",
    "v64.b512.staged.w@0.dst.keep",
    "v64.b128.sl.t0@64.src.keep",
    "v16.b256.dst.keep",
];

#[test]
fn names_and_words_lead_back_to_their_variants() {
    for name in NAMES {
        let variant = Variant::parse(name).unwrap_or_else(|| panic!("{name} is a variant"));
        assert_eq!(variant.name().as_str(), name);
        assert_eq!(Variant::from_word(variant.to_word()), Some(variant), "{name}");
    }
}

#[test]
fn no_word_and_no_name_makes_reading_panic() {
    let mut state = 1u64;
    for _ in 0..2000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = (state >> 32) as u32 & 0x1ff_ffff;
        if let Some(variant) = Variant::from_word(word) {
            assert_eq!(variant.to_word(), word);
            assert_eq!(Variant::parse(variant.name().as_str()), Some(variant));
        }
    }
    for name in NAMES {
        for cut in 0..name.len() {
            if let Some(variant) = Variant::parse(&name[..cut]) {
                assert!(variant.is_sound(), "{name} cut to {cut}");
            }
        }
    }
}

/// In any room nothing is written beyond it, and code that does not fit is none.
#[cfg(target_arch = "x86_64")]
#[test]
fn code_is_written_within_its_room() {
    use polytropo_copy::emit::{CODE_BYTES_MAX, emit};
    let features = Features { sse41: true, avx: true, avx2: true, avx512f: true, erms: true, fsrm: true };
    for name in NAMES.iter().skip(1) {
        let variant = Variant::parse(name).expect("a variant");
        let mut room = vec![0xcc; CODE_BYTES_MAX];
        let length = emit(&variant, features, &mut room).unwrap_or_else(|| panic!("{name} can be emitted"));
        assert!(room[length..].iter().all(|byte| *byte == 0xcc), "{name}");
        assert!(room[..length].contains(&0xc3), "{name} returns");
        for short in [0, 1, 2, 3, length / 2, length - 1] {
            assert_eq!(emit(&variant, features, &mut room[..short]), None, "{name} in {short} bytes");
        }
        assert_eq!(emit(&variant, features, &mut room[..length]), Some(length), "{name}");
    }
    assert_eq!(emit(&Variant::LIBRARY, features, &mut [0; CODE_BYTES_MAX]), None);
    let wide = Variant::parse("v64.b64").expect("a variant");
    assert_eq!(emit(&wide, Features::default(), &mut [0; CODE_BYTES_MAX]), None);
}

#[cfg(not(target_arch = "x86_64"))]
#[test]
fn only_what_needs_no_instructions_of_its_own_runs_elsewhere() {
    assert!(Variant::LIBRARY.runs_on(Features::default()));
    assert!(!Variant::parse("v64.b64").expect("a variant").runs_on(Features::default()));
}
