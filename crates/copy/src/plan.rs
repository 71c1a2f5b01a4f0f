//! Which variant copies which sizes in which situation on which processor, as a small readable file.
//!
//! ```text
//! polytropo copy plan 1
//! processor AuthenticAMD 26 2 1          vendor, family, model, stepping
//! microcode 0xb002151                    what else the figures depend on; whoever loads the file compares it
//! caches 49152 1048576 33554432          bytes of the first, second and third level
//! plain hot 64 v64.b128                  from so many bytes on, until the next line of that situation
//! keep cold 1048576 movsb                the same for who must give vector registers back
//! end
//! ```
//!
//! Lines that begin with `#` are comments. Whatever is not understood makes the whole file refused.

use crate::features::{Features, Processor};
use crate::text::{Text, number};
use crate::variant::{Move, Variant};
use core::fmt;

pub const VERSION: u32 = 1;
/// Sizes are classed by their highest bit: 64 B to 64 MiB and more.
pub const CLASSES: usize = 21;
pub const CLASS_BYTES_MIN: usize = 64;
const LINES_MAX: usize = 1024;

/// Where source and destination lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Situation {
    /// Both in this core's caches.
    Hot = 0,
    /// The source was just written by another core.
    Fresh = 1,
    /// The destination is soon read by another core.
    Handed = 2,
    /// Both of these.
    Relayed = 3,
    /// Neither is in any cache.
    Cold = 4,
    /// The source lies in any cache or in none; the destination is the reader's own, in this core's caches.
    Read = 5,
}

pub const SITUATIONS: [(Situation, &str); 6] = [
    (Situation::Hot, "hot"),
    (Situation::Fresh, "fresh"),
    (Situation::Handed, "handed"),
    (Situation::Relayed, "relayed"),
    (Situation::Cold, "cold"),
    (Situation::Read, "read"),
];

impl Situation {
    pub fn parse(word: &str) -> Option<Self> {
        SITUATIONS.iter().find(|(_, name)| *name == word).map(|(situation, _)| *situation)
    }

    /// Whether another core has a part in it.
    pub fn is_across_cores(self) -> bool {
        matches!(self, Self::Fresh | Self::Handed | Self::Relayed)
    }
}

/// What the copying code may do to vector registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Context {
    /// Ordinary functions: the compiler saves what it needs.
    Plain = 0,
    /// Called in the place of a system call: they come back as they were.
    Keep = 1,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlanError {
    NotAPlan,
    OtherVersion,
    /// Made for another processor.
    Foreign(Processor),
    /// The line (from 1) that is not understood, or is missing.
    Damaged {
        line: usize,
    },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAPlan => f.write_str("this is not a plan of copies"),
            Self::OtherVersion => write!(f, "the plan has another version than {VERSION}"),
            Self::Foreign(p) => write!(
                f,
                "the plan was made for another processor ({} family {} model {} stepping {})",
                p.vendor_str(),
                p.family,
                p.model,
                p.stepping
            ),
            Self::Damaged { line } => write!(f, "the plan is damaged: line {line} cannot be understood"),
        }
    }
}

impl core::error::Error for PlanError {}

/// The caches and the microcode that a plan was made with. Zero is unknown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Surroundings {
    pub microcode: u32,
    pub caches_bytes: [u64; 3],
}

type Table = [[[Variant; CLASSES]; SITUATIONS.len()]; 2];

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    pub processor: Processor,
    pub surroundings: Surroundings,
    table: Table,
}

/// The class of a size of at least [`CLASS_BYTES_MIN`].
#[inline]
pub fn class_of(size_bytes: usize) -> usize {
    let highest_bit = (usize::BITS - 1 - (size_bytes | 1).leading_zeros()) as usize;
    highest_bit.saturating_sub(CLASS_BYTES_MIN.trailing_zeros() as usize).min(CLASSES - 1)
}

impl Plan {
    /// What is right everywhere and good on most, for processors that nobody searched: memcpy(3), whose makers know many of them, and
    /// where vector registers are to be kept what needs none.
    pub fn default_for(features: Features) -> Self {
        let words = Variant::parse("v8.b64").unwrap_or(Variant::MOVSB);
        let mut plan = Self::of(Variant::LIBRARY);
        let [_, keep] = &mut plan.table;
        for row in keep {
            for (class, variant) in row.iter_mut().enumerate() {
                let strings = features.fsrm || (features.erms && class >= class_of(512));
                *variant = if strings { Variant::MOVSB } else { words };
            }
        }
        plan
    }

    /// One way for everything.
    pub fn of(variant: Variant) -> Self {
        let table = [[[variant; CLASSES]; SITUATIONS.len()]; 2];
        Self { processor: Processor::detect(), surroundings: Surroundings::default(), table }
    }

    pub fn get(&self, context: Context, situation: Situation, class: usize) -> Variant {
        self.table[context as usize][situation as usize][class.min(CLASSES - 1)]
    }

    /// From `from_bytes` on, until the largest size. Tells whether that variant may be used there.
    pub fn set(
        &mut self,
        context: Context,
        situation: Situation,
        from_bytes: usize,
        variant: Variant,
    ) -> bool {
        if context == Context::Keep && variant.clobbers().vector_registers > 0 {
            return false;
        }
        self.table[context as usize][situation as usize][class_of(from_bytes)..].fill(variant);
        true
    }

    /// Reads a plan for this processor with these features.
    pub fn parse(text: &str, features: Features) -> Result<Self, PlanError> {
        let mut lines = text.lines().enumerate().take(LINES_MAX).map(|(index, line)| (index + 1, line));
        let header = lines.next().ok_or(PlanError::NotAPlan)?.1;
        let version = header.strip_prefix("polytropo copy plan ").ok_or(PlanError::NotAPlan)?;
        if number::<u32>(version) != Some(VERSION) {
            return Err(PlanError::OtherVersion);
        }
        let mut plan = Self::default_for(features);
        let here = plan.processor;
        let mut last = 1;
        let mut named = false;
        for (line, words) in lines {
            last = line;
            let damaged = PlanError::Damaged { line };
            if words.starts_with('#') {
                continue;
            }
            if words == "end" {
                return if named { Ok(plan) } else { Err(damaged) };
            }
            let (word, rest) = words.split_once(' ').ok_or(damaged)?;
            match word {
                "processor" => {
                    let made_for = processor(rest).ok_or(damaged)?;
                    if made_for != here {
                        return Err(PlanError::Foreign(made_for));
                    }
                    named = true;
                }
                "microcode" => plan.surroundings.microcode = hexadecimal(rest).ok_or(damaged)?,
                "caches" => plan.surroundings.caches_bytes = three(rest).ok_or(damaged)?,
                "plain" | "keep" => {
                    let context = if word == "keep" { Context::Keep } else { Context::Plain };
                    let (situation, from_bytes, variant) = entry(rest, features).ok_or(damaged)?;
                    plan.set(context, situation, from_bytes, variant).then_some(()).ok_or(damaged)?;
                }
                _ => return Err(damaged),
            }
        }
        Err(PlanError::Damaged { line: last + 1 })
    }

    /// Writes the plan as text, line by line.
    pub fn write(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        let p = self.processor;
        writeln!(out, "polytropo copy plan {VERSION}")?;
        writeln!(out, "processor {} {} {} {}", p.vendor_str(), p.family, p.model, p.stepping)?;
        writeln!(out, "microcode {:#x}", self.surroundings.microcode)?;
        let [l1, l2, l3] = self.surroundings.caches_bytes;
        writeln!(out, "caches {l1} {l2} {l3}")?;
        for (context, word) in [(Context::Plain, "plain"), (Context::Keep, "keep")] {
            for (situation, name) in SITUATIONS {
                let mut before = None;
                for class in 0..CLASSES {
                    let variant = self.get(context, situation, class);
                    if before != Some(variant) {
                        writeln!(out, "{word} {name} {} {}", CLASS_BYTES_MIN << class, variant.name())?;
                    }
                    before = Some(variant);
                }
            }
        }
        writeln!(out, "end")
    }
}

fn processor(words: &str) -> Option<Processor> {
    let mut words = words.split(' ');
    let name = words.next()?;
    // Vendors of fewer letters are padded with zeros, as CPUID tells them.
    let mut vendor = [0; 12];
    vendor.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    let found = Processor {
        vendor,
        family: number(words.next()?)?,
        model: number(words.next()?)?,
        stepping: number(words.next()?)?,
    };
    words.next().is_none().then_some(found)
}

fn hexadecimal(word: &str) -> Option<u32> {
    let digits = word.strip_prefix("0x")?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

fn three(words: &str) -> Option<[u64; 3]> {
    let mut words = words.split(' ');
    let found = [number(words.next()?)?, number(words.next()?)?, number(words.next()?)?];
    words.next().is_none().then_some(found)
}

fn entry(words: &str, features: Features) -> Option<(Situation, usize, Variant)> {
    let mut words = words.split(' ');
    let situation = Situation::parse(words.next()?)?;
    let from_bytes: usize = number(words.next()?)?;
    let variant = Variant::parse(words.next()?)?;
    let from_a_class = from_bytes.is_power_of_two() && from_bytes >= CLASS_BYTES_MIN;
    (words.next().is_none() && from_a_class && variant.runs_on(features))
        .then_some((situation, from_bytes, variant))
}

/// What the Linux kernel would copy user memory with on this processor (`arch/x86/lib/copy_user_64.S`: REP MOVSB where FSRM
/// is told, else words).
pub fn kernel_method(features: Features) -> Variant {
    Variant {
        moves: if features.fsrm || features.erms { Move::Bytes } else { Move::Words },
        ..Variant::MOVSB
    }
}

/// A name for an unknown variant in messages.
pub type Name = Text<{ crate::variant::NAME_BYTES_MAX }>;
