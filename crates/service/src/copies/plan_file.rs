//! The plan's file as the keeper reads it, and whether it fits this machine.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use polytropo_copy::features::{Features, Processor};
use polytropo_copy::plan::{Plan, Surroundings, kernel_method};

const PLAN_MAX_BYTES: u64 = 64 << 10;
const CPUINFO_MAX_BYTES: u64 = 8 << 10;
const CACHES: &str = "/sys/devices/system/cpu/cpu0/cache";

/// By what copies are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Choice {
    /// The plan of this processor; memcpy(3) where there is none.
    #[default]
    Tuned,
    /// memcpy(3).
    Libc,
    /// As the Linux kernel copies on this processor.
    Kernel,
}

/// The plan as text, canonically; None for memcpy(3). A plan that cannot be used is left out with a sentence.
pub fn read(choice: Choice, directory: Option<&Path>) -> (Option<String>, Option<String>) {
    let features = Features::detect();
    match choice {
        Choice::Libc => (None, None),
        Choice::Kernel => (text(&Plan::of(kernel_method(features))), None),
        Choice::Tuned => {
            let path = directory.map(|directory| directory.join(file_name(&Processor::detect())));
            match path.map(|path| read_file(&path, features)) {
                Some(Ok(Some(plan))) => (text(&plan), None),
                Some(Err(problem)) => (text(&Plan::default_for(features)), Some(problem)),
                Some(Ok(None)) | None => (text(&Plan::default_for(features)), None),
            }
        }
    }
}

fn text(plan: &Plan) -> Option<String> {
    let mut text = String::new();
    plan.write(&mut text).ok().map(|()| text)
}

fn file_name(processor: &Processor) -> PathBuf {
    let Processor { family, model, stepping, .. } = processor;
    format!("{}-{family}-{model}-{stepping}.plan", processor.vendor_str()).into()
}

/// None where nobody made a plan.
fn read_file(path: &Path, features: Features) -> Result<Option<Plan>, String> {
    let advice = "the default one is used, `polytropo tune memcpy` makes a new one";
    let mut bytes = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(PLAN_MAX_BYTES).read_to_end(&mut bytes)) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("the plan {} cannot be read ({error}); {advice}", path.display())),
    }
    let plan = Plan::parse(&String::from_utf8_lossy(&bytes), features)
        .map_err(|error| format!("{}: {error}; {advice}", path.display()))?;
    if plan.surroundings != surroundings() {
        let why = "microcode or caches of this machine are not those it was made with";
        return Err(format!("the plan {} is stale: {why}; {advice}", path.display()));
    }
    Ok(Some(plan))
}

/// Microcode and caches of this machine, as `polytropo.tuning` tells them. Zero is unknown.
pub fn surroundings() -> Surroundings {
    let mut caches_bytes = [0; 3];
    for entry in fs::read_dir(CACHES).into_iter().flatten().flatten() {
        let told = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let level = told("level").trim().parse::<usize>().ok().and_then(|level| level.checked_sub(1));
        let place = level.and_then(|level| caches_bytes.get_mut(level));
        if let (Some(place), Some(bytes)) = (place, size_of(told("size").trim()))
            && told("type").trim() != "Instruction"
        {
            *place = bytes;
        }
    }
    Surroundings { microcode: microcode().unwrap_or_default(), caches_bytes }
}

fn size_of(text: &str) -> Option<u64> {
    let (digits, unit) = text.find(|c: char| !c.is_ascii_digit()).map_or((text, ""), |at| text.split_at(at));
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Told in the part about the first CPU.
fn microcode() -> Option<u32> {
    let mut head = Vec::new();
    fs::File::open("/proc/cpuinfo").ok()?.take(CPUINFO_MAX_BYTES).read_to_end(&mut head).ok()?;
    let head = String::from_utf8_lossy(&head);
    let line = head.lines().find(|line| line.starts_with("microcode"))?;
    u32::from_str_radix(line.split_once(':')?.1.trim().strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(directory: &Path, change: impl Fn(String) -> String) {
        let mut plan = Plan::default_for(Features::detect());
        plan.surroundings = surroundings();
        let name = file_name(&Processor::detect());
        fs::write(directory.join(name), change(text(&plan).unwrap())).unwrap();
    }

    #[test]
    fn a_plan_of_this_machine_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let searched = "plain hot 4096 movsb\nend";
        saved(directory.path(), |text| text.replace("end", searched));
        let (text, problem) = read(Choice::Tuned, Some(directory.path()));
        assert!(text.unwrap().contains("plain hot 4096 movsb\n") && problem.is_none());
    }

    #[test]
    fn damaged_and_stale_plans_are_left_out_with_a_sentence() {
        let default = text(&Plan::default_for(Features::detect()));
        type Change = fn(String) -> String;
        let changes: [(Change, &str); 3] = [
            (|text| text.replace("end\n", ""), "damaged"),
            (|text| text.replace("\ncaches ", "\ncaches 9"), "stale"),
            (|_| "\u{fffd}".into(), "not a plan"),
        ];
        for (change, why) in changes {
            let directory = tempfile::tempdir().unwrap();
            saved(directory.path(), change);
            let (text, problem) = read(Choice::Tuned, Some(directory.path()));
            assert_eq!(text, default);
            let problem = problem.unwrap();
            assert!(problem.contains(why) && problem.contains("tune memcpy"), "{problem}");
        }
    }

    #[test]
    fn engines_can_be_chosen() {
        assert_eq!(read(Choice::Libc, None), (None, None));
        let kernel = read(Choice::Kernel, None).0.unwrap();
        let method = kernel_method(Features::detect()).name();
        assert!(kernel.contains(&format!("plain cold 64 {method}\n")), "{kernel}");
        assert!(kernel.contains(&format!("keep hot 64 {method}\n")), "{kernel}");
        assert_eq!(read(Choice::Tuned, None).0, text(&Plan::default_for(Features::detect())));
    }
}
