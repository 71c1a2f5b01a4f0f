//! Copies: their parameter space, their times, plans, and a plan at work.

use polytropo_copy::code::{Code, CopyFunction};
use polytropo_copy::engine::Engine;
use polytropo_copy::features::{Features, Processor};
use polytropo_copy::measure::{Bench, Condition, Contender};
use polytropo_copy::plan::{self, Context, Plan, Situation, class_of};
use polytropo_copy::space;
use polytropo_copy::variant::Variant;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use std::sync::Mutex;

const LIBC: &str = "libc";

fn variant(name: &str) -> PyResult<Variant> {
    Variant::parse(name).ok_or_else(|| PyValueError::new_err(format!("{name:?} names no way to copy")))
}

fn situation(name: &str) -> PyResult<Situation> {
    Situation::parse(name).ok_or_else(|| {
        PyValueError::new_err(format!("{name:?} is none of hot, fresh, handed, relayed, cold, read"))
    })
}

fn context(keep: bool) -> Context {
    if keep { Context::Keep } else { Context::Plain }
}

fn invalid(error: impl std::error::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Names of all variants that this processor can run and that differ at this size.
#[pyfunction]
fn copy_space(keep: bool, size_bytes: usize) -> Vec<String> {
    let all = space::variants(Features::detect(), keep);
    all.iter().filter(|v| v.is_worth_trying(size_bytes)).map(|v| v.name().to_string()).collect()
}

/// The variant that the Linux kernel would use on this processor.
#[pyfunction]
fn copy_kernel_method() -> String {
    plan::kernel_method(Features::detect()).name().to_string()
}

/// Vendor, family, model and stepping.
#[pyfunction]
fn copy_processor() -> (String, u16, u16, u8) {
    let found = Processor::detect();
    (found.vendor_str().to_owned(), found.family, found.model, found.stepping)
}

/// Samples by contender, and a condition each round.
type Taken = (Vec<Vec<f64>>, Vec<(Option<f64>, Option<&'static str>)>);

/// Takes samples on one CPU, with another one as the peer.
#[pyclass(module = "polytropo._native", frozen)]
pub struct CopyBench {
    bench: Mutex<Bench>,
}

#[pymethods]
impl CopyBench {
    #[new]
    #[pyo3(signature = (cpu, other_cpu))]
    fn new(cpu: usize, other_cpu: Option<usize>) -> Self {
        Self { bench: Mutex::new(Bench::new(cpu, other_cpu)) }
    }

    /// Nanoseconds a copy: for each name a sample in every round. And what each round was taken under: nothing to tell, nanoseconds to the
    /// other core and back, or where sources lay.
    fn sample(
        &self,
        py: Python<'_>,
        names: Vec<String>,
        situation_name: &str,
        size_bytes: usize,
        rounds: usize,
        sample_ns: u64,
    ) -> PyResult<Taken> {
        let situation = situation(situation_name)?;
        let emitted = names.iter().filter(|name| *name != LIBC).map(|name| variant(name));
        let variants = emitted.collect::<PyResult<Vec<_>>>()?;
        let mut functions: Vec<CopyFunction> = Vec::with_capacity(variants.len());
        let placed = |_: usize, function| functions.push(function);
        let _code = Code::new(variants.into_iter(), Features::detect(), false, placed).map_err(invalid)?;
        let mut functions = functions.into_iter();
        let contenders: Vec<Contender> = names
            .iter()
            .map(|name| {
                if name == LIBC {
                    Contender::Libc
                } else {
                    functions.next().map_or(Contender::Libc, Contender::Emitted)
                }
            })
            .collect();
        let found = py.detach(|| {
            let mut bench = self.bench.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            bench.sample(&contenders, situation, size_bytes.max(1), rounds, sample_ns)
        })?;
        let told = found.conditions.into_iter().map(|condition| match condition {
            Condition::Usual => (None, None),
            Condition::RoundTrip { ns } => (Some(ns), None),
            Condition::Source(place) => (None, Some(place)),
        });
        Ok((found.ns, told.collect()))
    }
}

/// Which variant copies which sizes.
#[pyclass(module = "polytropo._native", frozen)]
pub struct CopyPlan {
    plan: Mutex<Plan>,
}

impl CopyPlan {
    fn with<T>(&self, work: impl FnOnce(&mut Plan) -> T) -> T {
        work(&mut self.plan.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

#[pymethods]
impl CopyPlan {
    #[staticmethod]
    fn default() -> Self {
        Self { plan: Mutex::new(Plan::default_for(Features::detect())) }
    }

    #[staticmethod]
    fn parse(text: &str) -> PyResult<Self> {
        Ok(Self { plan: Mutex::new(Plan::parse(text, Features::detect()).map_err(invalid)?) })
    }

    fn get(&self, keep: bool, situation_name: &str, size_bytes: usize) -> PyResult<String> {
        let situation = situation(situation_name)?;
        Ok(self.with(|plan| plan.get(context(keep), situation, class_of(size_bytes))).name().to_string())
    }

    fn set(&self, keep: bool, situation_name: &str, from_bytes: usize, name: &str) -> PyResult<()> {
        let (situation, variant) = (situation(situation_name)?, variant(name)?);
        if self.with(|plan| plan.set(context(keep), situation, from_bytes, variant)) {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("{name} changes vector registers, which must be kept there")))
    }

    #[getter]
    fn microcode(&self) -> u32 {
        self.with(|plan| plan.surroundings.microcode)
    }

    #[getter]
    fn caches_bytes(&self) -> (u64, u64, u64) {
        self.with(|plan| plan.surroundings.caches_bytes.into())
    }

    fn set_surroundings(&self, microcode: u32, caches_bytes: (u64, u64, u64)) {
        self.with(|plan| {
            plan.surroundings.microcode = microcode;
            plan.surroundings.caches_bytes = caches_bytes.into();
        });
    }

    fn text(&self) -> PyResult<String> {
        let mut text = String::new();
        self.with(|plan| plan.write(&mut text)).map_err(invalid)?;
        Ok(text)
    }
}

/// A plan at work.
#[pyclass(module = "polytropo._native", frozen)]
pub struct Copier {
    engine: Engine,
}

#[pymethods]
impl Copier {
    #[new]
    fn new(plan: &CopyPlan) -> PyResult<Self> {
        let made = plan.with(|plan| Engine::new(plan, Context::Plain, Features::detect()));
        Ok(Self { engine: made.map_err(invalid)? })
    }

    fn copy(
        &self,
        py: Python<'_>,
        to: &Bound<'_, PyAny>,
        from: &Bound<'_, PyAny>,
        situation_name: &str,
    ) -> PyResult<usize> {
        let situation = situation(situation_name)?;
        let (to, from) = (PyBuffer::<u8>::get(to)?, PyBuffer::<u8>::get(from)?);
        if to.readonly() {
            return Err(PyBufferError::new_err("the destination is read-only"));
        }
        if !to.is_c_contiguous() || !from.is_c_contiguous() {
            return Err(PyBufferError::new_err("both buffers have to lie in one piece (C-contiguous)"));
        }
        let size_bytes = from.len_bytes();
        if to.len_bytes() < size_bytes {
            let sentence = format!("{size_bytes} bytes do not fit into {}", to.len_bytes());
            return Err(PyValueError::new_err(sentence));
        }
        let (into, out_of) = (to.buf_ptr() as usize, from.buf_ptr() as usize);
        if into < out_of + size_bytes && out_of < into + size_bytes && size_bytes > 0 {
            return Err(PyValueError::new_err("source and destination overlap"));
        }
        py.detach(|| {
            // SAFETY: the views keep both buffers in place, they are large enough and do not overlap. Other threads of the program
            // that change them meanwhile get what memcpy(3) would give them: mixed bytes.
            unsafe { self.engine.copy(into as *mut u8, out_of as *const u8, size_bytes, situation) }
        });
        Ok(size_bytes)
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(copy_space, module)?)?;
    module.add_function(wrap_pyfunction!(copy_kernel_method, module)?)?;
    module.add_function(wrap_pyfunction!(copy_processor, module)?)?;
    module.add_class::<CopyBench>()?;
    module.add_class::<CopyPlan>()?;
    module.add_class::<Copier>()
}
