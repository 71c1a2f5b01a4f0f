//! Plans as files: what is written is read again, what is damaged or foreign is refused.

use polytropo_copy::engine::{Engine, WORDS};
use polytropo_copy::features::{Features, Processor};
use polytropo_copy::plan::{CLASSES, Context, Plan, PlanError, SITUATIONS, Situation, class_of};
use polytropo_copy::variant::Variant;
use proptest::prelude::*;

fn text(plan: &Plan) -> String {
    let mut text = String::new();
    plan.write(&mut text).expect("writing to a string");
    text
}

#[cfg(feature = "std")]
fn any_variant(keep: bool) -> impl Strategy<Value = Variant> {
    let all = polytropo_copy::space::variants(Features::detect(), keep);
    (0..all.len()).prop_map(move |index| all[index])
}

#[cfg(feature = "std")]
proptest! {
    #[cfg_attr(miri, ignore = "Miri takes minutes for the whole space")]
    #[test]
    fn names_lead_back_to_their_variants(plain in any_variant(false), keep in any_variant(true)) {
        prop_assert_eq!(Variant::parse(plain.name().as_str()), Some(plain));
        prop_assert_eq!(Variant::parse(keep.name().as_str()), Some(keep));
    }

    #[cfg_attr(miri, ignore = "Miri takes minutes for the whole space")]
    #[test]
    fn written_plans_are_read_again(entries in prop::collection::vec((0..SITUATIONS.len(), 0..CLASSES, any_variant(false)), 0..40)) {
        let mut plan = Plan::default_for(Features::detect());
        for (situation, class, variant) in entries {
            prop_assert!(plan.set(Context::Plain, SITUATIONS[situation].0, 64 << class, variant));
        }
        prop_assert_eq!(Plan::parse(&text(&plan), Features::detect()), Ok(plan));
    }

    #[test]
    fn no_text_makes_reading_panic(text in "(polytropo copy plan 1\n)?(processor|plain hot|keep|end|[ -~\n])*") {
        let _ = Plan::parse(&text, Features::detect());
    }

    #[test]
    fn a_plan_cut_anywhere_is_refused(cut in 0..1000usize) {
        let whole = text(&Plan::default_for(Features::detect()));
        let cut = cut % (whole.len() - 1);
        prop_assert!(Plan::parse(&whole[..cut], Features::detect()).is_err());
    }
}

#[test]
fn plans_of_others_are_refused() {
    let plan = Plan::default_for(Features::detect());
    let whole = text(&plan);
    let foreign =
        whole.replace(&format!("processor {}", plan.processor.vendor_str()), "processor SomebodyElses");
    assert!(matches!(Plan::parse(&foreign, Features::detect()), Err(PlanError::Damaged { line: 2 })));
    let foreign =
        whole.replace(&format!("processor {}", plan.processor.vendor_str()), "processor SomebodyElse");
    assert!(matches!(Plan::parse(&foreign, Features::detect()), Err(PlanError::Foreign(Processor { .. }))));
    let other = whole.replace("copy plan 1", "copy plan 2");
    assert_eq!(Plan::parse(&other, Features::detect()), Err(PlanError::OtherVersion));
    assert_eq!(Plan::parse("", Features::detect()), Err(PlanError::NotAPlan));
    let nonsense = whole.replace("end\n", "plain hot 65 movsb\nend\n");
    assert!(matches!(Plan::parse(&nonsense, Features::detect()), Err(PlanError::Damaged { .. })));
}

#[test]
fn who_must_keep_vector_registers_never_gets_a_variant_that_changes_them() {
    let mut plan = Plan::default_for(Features::detect());
    let vectors = Variant::parse("v16.b64").expect("a name");
    assert!(!plan.set(Context::Keep, Situation::Hot, 64, vectors));
    assert!(plan.set(Context::Plain, Situation::Hot, 64, vectors));
    for (situation, _) in SITUATIONS {
        for class in 0..CLASSES {
            assert_eq!(plan.get(Context::Keep, situation, class).clobbers().vector_registers, 0);
        }
    }
}

#[test]
fn classes_are_by_the_highest_bit() {
    assert_eq!([64, 127, 128, 4096, 64 << 20, usize::MAX].map(class_of), [0, 0, 1, 6, 20, 20]);
}

#[test]
fn impossible_names_are_refused() {
    for name in [
        "",
        "v",
        "v32",
        "v32.b100",
        "v32.b2048",
        "v24.b64",
        "v16.b64.nt",
        "v8.b64.sl.src",
        "movsb.nt",
        "movsb.src",
        "v32.b128.t0@65",
        "v32.b128.t0@0",
        "v32.b128.staged",
        "v8.b512",
        "v32.b512.x2",
        "v32.b064",
        "v32.b64.",
        "movsq.keep",
    ] {
        assert_eq!(Variant::parse(name), None, "{name}");
    }
}

#[cfg(feature = "std")]
proptest! {
    #[cfg_attr(miri, ignore = "Miri takes minutes for the whole space")]
    #[test]
    fn words_lead_back_to_their_variants(plain in any_variant(false), keep in any_variant(true)) {
        prop_assert_eq!(Variant::from_word(plain.to_word()), Some(plain));
        prop_assert_eq!(Variant::from_word(keep.to_word()), Some(keep));
    }

    #[test]
    fn what_a_word_says_can_be(word: u32) {
        if let Some(variant) = Variant::from_word(word) {
            prop_assert!(variant.is_sound());
            prop_assert_eq!(variant.to_word(), word);
        }
    }

    /// Whatever stands in shared memory: bytes are copied rightly, and by nothing that changes registers which are to be kept.
    #[test]
    fn engines_of_any_words_copy(words in prop::collection::vec(any::<u32>().prop_map(|word| word & 0xff_ffff), WORDS), keep: bool, size in 0..5000usize) {
        let context = if keep { Context::Keep } else { Context::Plain };
        let engine = Engine::of_words(|index| words[index], context, Features::detect());
        let engine = engine.expect("an engine");
        let source: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        for (situation, _) in SITUATIONS {
            let mut destination = vec![0; size];
            // SAFETY: both have that size.
            unsafe { engine.copy(destination.as_mut_ptr(), source.as_ptr(), size, situation) };
            prop_assert_eq!(&destination, &source);
        }
    }
}
