//! How the service copies: by the plan that `polytropo tune memcpy` made for this processor.
//!
//! The keeper reads the plan ([`read`]), the worker gets it as text at its start and makes code of it before its system call filter
//! forbids that ([`install`]). Programs find it in their channels.

mod counted;
mod plan_file;

use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;

use polytropo_copy::engine::{Engine, WORDS};
use polytropo_copy::features::Features;
use polytropo_copy::plan::{Context, Plan, Situation};
use polytropo_wire::copies::PlanWords;

pub use counted::{Counting, Tally, counts_by_name};
pub use plan_file::{Choice, read, surroundings};

struct Installed {
    engine: Engine,
    plain: [u32; WORDS],
    keep: [u32; WORDS],
}

static INSTALLED: OnceLock<Installed> = OnceLock::new();
static LIBRARY: Engine = Engine::library();

/// Takes a plan on for the life of the process. None is memcpy(3) for everything.
pub fn install(text: Option<&str>) -> Result<(), String> {
    let Some(text) = text else { return Ok(()) };
    let features = Features::detect();
    let plan = Plan::parse(text, features).map_err(|error| error.to_string())?;
    let engine = Engine::new(&plan, Context::Plain, features).map_err(|error| error.to_string())?;
    let (plain, keep) = (plan.words(Context::Plain), plan.words(Context::Keep));
    let _ = INSTALLED.set(Installed { engine, plain, keep });
    Ok(())
}

/// Copies `size_bytes` as the plan says.
///
/// # Safety
/// `source` may be read and `destination` written for `size_bytes`, and they do not overlap.
pub unsafe fn copy(destination: *mut u8, source: *const u8, size_bytes: usize, situation: Situation) {
    let engine = INSTALLED.get().map_or(&LIBRARY, |installed| &installed.engine);
    // SAFETY: the caller's word.
    unsafe { engine.copy(destination, source, size_bytes, situation) }
}

/// Gives the plan to a program.
pub fn hand_over(to: &PlanWords) {
    let Some(installed) = INSTALLED.get() else { return };
    for (place, word) in to.plain.iter().zip(installed.plain) {
        place.store(word, Relaxed);
    }
    for (place, word) in to.keep.iter().zip(installed.keep) {
        place.store(word, Relaxed);
    }
}
