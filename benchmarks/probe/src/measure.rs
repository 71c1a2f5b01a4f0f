//! Figures: what was timed, how often, how long.

use std::time::Instant;

/// One measured kind of work.
pub struct Figure {
    pub name: &'static str,
    /// Units of work: calls, files or bytes, as the name says.
    pub units: u64,
    pub elapsed_ns: u64,
}

/// Times `work`, which says how many units it did.
pub fn timed<E>(name: &'static str, work: impl FnOnce() -> Result<u64, E>) -> Result<Figure, E> {
    let start = Instant::now();
    let units = work()?;
    Ok(Figure { name, units, elapsed_ns: u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX) })
}

pub fn to_json(figures: &[Figure]) -> serde_json::Value {
    figures
        .iter()
        .map(|figure| {
            (
                figure.name.to_owned(),
                serde_json::json!({"units": figure.units, "elapsed_ns": figure.elapsed_ns}),
            )
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}
