//! `polytropo._native`: the crates as Python sees them. Bindings only; what people use is the Python package.

mod copy;
mod errors;
mod fs;
mod queue;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<queue::Queue>()?;
    copy::register(module)?;
    fs::register(module)?;
    errors::register(module)
}
